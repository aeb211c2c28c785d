"""A host that shows texts and no token ids: what `BlockwiseDriver` keeps of a response, and what scorers read of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyengine.codec import Prompt
from pyengine.decode.settle import Judge, Owned
from pyengine.errors import InputError
from pyengine.reader import Reader
from pyengine.scorers import Candidates, Part, Policy, Scorer


@dataclass
class Written:
    """A text that grows by characters; it stands for a `codec.Text`, and characters for its tokens."""

    text: str = ""

    def copy(self) -> Written:
        return Written(self.text)

    def push(self, characters: Sequence[str], last: bool = False) -> str:
        new = "".join(characters)
        self.text += new
        return new


class TextJudge(Judge):
    """Scorers read the texts that the host gave."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, None, True)  # type: ignore[arg-type]

    def _score(self, scorer: Scorer, reader: Reader | None, owned: Owned, at: list[int]) -> Tensor:
        some = [owned[i] for i in at]
        texts = [branch.text.grown.text for _, branch in some if branch.text is not None]
        return scorer.score(
            Candidates(
                prompts=[request.prompt for request, _ in some],
                tokens=[request.tokens + branch.tokens for request, branch in some],
                hidden={},
                previous={},
                decode=lambda tokens, skip_special_tokens=True: texts,
            )
        )


def text_of(prompt: Any, label: str) -> Prompt:
    """A prompt for such a host; InputError, naming `label`, unless it is a text."""
    given = prompt.get("prompt") if isinstance(prompt, dict) and len(prompt) == 1 else prompt
    if not isinstance(given, str) or not given:
        raise InputError(f"{label} is no text that is not empty: to drive this host by anything else, give tokenizer")
    return Prompt(given, [])


def check_scorers(parts: Sequence[Part]) -> None:
    """InputError for scorers that read token ids."""
    for part in parts:
        if part.scorer.reads_ids:
            raise InputError(
                f"scorer {part.name!r} reads token ids, which a host driven by text does not show: give tokenizer"
            )
