"""Prompts that state the reward of the response to come: conditional alignment (arXiv:2308.12050).

Training and inference share `Conditioning.prompt`, so that they share its bytes.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from string import Formatter
from typing import Self

from pyengine.errors import InputError, real, whole
from pyengine.rewards.references import _read, _write

FIELDS = ("instruction", "score", "response")


@dataclass(frozen=True)
class Conditioning:
    """A template with {instruction}, {score} and, at its end, {response}; the score is printed with `decimals`.

    The defaults are the paper's: "<rm_score> a.b" right before the response, and 5.0 asked for at inference. Literal
    braces are doubled, as in str.format. Raises InputError for a template that lacks a field or holds another.
    """

    template: str = "User:{instruction} Assistant: <rm_score> {score}{response}"
    decimals: int = 1

    def __post_init__(self) -> None:
        whole(self.decimals, "Conditioning: decimals", 0, 17)
        try:
            pieces = list(Formatter().parse(self.template))
        except (TypeError, ValueError) as error:
            raise InputError(f"Conditioning: template {self.template!r}: {error}") from error
        found = [name for _, name, spec, conversion in pieces if name is not None]
        plain = not any(spec or conversion for _, _, spec, conversion in pieces)
        if sorted(found) != sorted(FIELDS) or not plain or pieces[-1][1] != "response":
            raise InputError(
                f"Conditioning: template {self.template!r} must hold {{instruction}}, {{score}} and, at its end, "
                "{response}, once each and nothing else in braces"
            )

    def score(self, z: float) -> str:
        """The reward as it is printed, in standard deviations; what rounds to zero has no sign."""
        text = f"{real(z, 'Conditioning: z'):.{self.decimals}f}"
        return text.lstrip("-") if float(text) == 0 else text

    def prompt(self, instruction: str, z: float) -> str:
        """All that comes before the response; z is the response's in training, the one asked for at inference."""
        return self.template.format(instruction=instruction, score=self.score(z), response="")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        _write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """What `save` wrote; InputError, naming the file, for anything else."""
        return _read(cls, path, "conditioning")


# OpenRLHF's: a colon, two decimals, and a space before the response.
OPENRLHF = Conditioning("{instruction} <rm_score>: {score} {response}", 2)
