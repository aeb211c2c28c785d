"""Scorers that read the base policy's hidden states: prefix scorer and probe. They cost no extra pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyengine.errors import InputError, first_line, whole
from pyengine.scorers.base import Candidates, Hidden, Policy, Scorer

FORMAT = "pyengine_scorer"


class _HeadScorer(Scorer, nn.Module):
    """A small network on one hidden layer, stored as config.json + model.safetensors."""

    kind: str

    def __init__(self, hidden_size: int, layer: int, name: str) -> None:
        nn.Module.__init__(self)
        if not isinstance(name, str):
            raise InputError(f"the name of a scorer is a string, got {name!r:.40}")
        self.hidden_size = whole(hidden_size, f"scorer {name!r}: hidden_size", 1)
        self.layer, self.name = whole(layer, f"scorer {name!r}: layer", -(2**31)), name
        self.layers = (layer,)

    def config(self) -> dict[str, Any]:
        return {FORMAT: self.kind, "hidden_size": self.hidden_size, "layer": self.layer, "name": self.name}

    def save(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config(), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path / "model.safetensors")

    def move(self, device: torch.device) -> None:
        self.to(device)

    def check(self, policy: Policy) -> None:
        if self.hidden_size != policy.hidden_size:
            raise InputError(
                f"scorer {self.name!r} reads hidden states of width {self.hidden_size}, "
                f"{policy.name} has {policy.hidden_size}: it was trained for another model"
            )
        if not -policy.layers <= self.layer < policy.layers:
            raise InputError(f"scorer {self.name!r} reads layer {self.layer}, {policy.name} has {policy.layers}")


class PrefixScorer(_HeadScorer):
    """V(y^t, z) for every next token z at once: hidden -> SiLU -> vocabulary (Controlled Decoding's CD-FUDGE and CD-Q).

    Tokenwise uses all of it; a prefix is scored as V(y^t) = Q[t-1, y_t].
    """

    kind = "prefix"
    scores_tokens = reads_ids = True

    def __init__(
        self, hidden_size: int, vocab_size: int, width: int = 128, layer: int = -1, name: str = "prefix"
    ) -> None:
        super().__init__(hidden_size, layer, name)
        self.vocab_size = whole(vocab_size, f"scorer {name!r}: vocab_size", 1)
        self.width = whole(width, f"scorer {name!r}: width", 1)
        self.trunk = nn.Linear(hidden_size, width)
        self.activation = nn.SiLU()
        self.head = nn.Linear(width, vocab_size)

    def config(self) -> dict[str, Any]:
        return super().config() | {"vocab_size": self.vocab_size, "width": self.width}

    def check(self, policy: Policy) -> None:
        if self.vocab_size != policy.vocab_size:
            raise InputError(
                f"scorer {self.name!r} scores a vocabulary of {self.vocab_size} tokens, "
                f"{policy.name} has {policy.vocab_size}: they need the same tokenizer"
            )
        super().check(policy)

    def features(self, hidden: Tensor) -> Tensor:
        return self.activation(self.trunk(hidden.to(self.trunk.weight.dtype)))

    def values(self, hidden: Hidden) -> Tensor:
        return self.head(self.features(hidden[self.layer])).float()

    def values_at(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Q[., z] for one token z a row: hidden [N, D], token [N] -> [N]."""
        return (self.features(hidden) * self.head.weight[token]).sum(-1) + self.head.bias[token]

    def score(self, candidates: Candidates) -> Tensor:
        hidden = candidates.previous[self.layer]
        last = torch.tensor([tokens[-1] for tokens in candidates.tokens], device=hidden.device)
        return self.values_at(hidden, last).float()


class Probe(_HeadScorer):
    """A function of the hidden state at the last token (Q-Probe): linear, or an MLP with ReLU.

    hidden: widths of the hidden layers; () is the linear probe.
    """

    kind = "probe"

    def __init__(self, hidden_size: int, layer: int = -1, name: str = "probe", hidden: Sequence[int] = ()) -> None:
        super().__init__(hidden_size, layer, name)
        self.hidden = tuple(whole(width, f"probe {name!r}: a width in hidden", 1) for width in hidden)
        sizes = (hidden_size, *self.hidden)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(sizes):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], 1)

    def config(self) -> dict[str, Any]:
        return super().config() | {"hidden": list(self.hidden)}

    def forward(self, hidden: Tensor) -> Tensor:
        """Q of each hidden state: [..., D], any float type -> [...], in the type of the weights, with gradients."""
        return self.head(self.trunk(hidden.to(self.head.weight.dtype)))[..., 0]

    def score(self, candidates: Candidates) -> Tensor:
        return self(candidates.hidden[self.layer]).float()


def load_head(directory: Path, config: dict[str, Any]) -> PrefixScorer | Probe:
    """The prefix scorer or probe stored in `directory`; safetensors only."""
    arguments = dict(config)
    kind, kinds = str(arguments.pop(FORMAT)), {cls.kind: cls for cls in (PrefixScorer, Probe)}
    if kind not in kinds:
        raise InputError(f"scorer {directory}: unknown kind {kind!r}, known are {sorted(kinds)}")
    try:
        with torch.device("meta"):  # sizes that the weights do not have take no memory
            scorer = kinds[kind](**arguments)
        scorer.load_state_dict(load_file(directory / "model.safetensors"), assign=True)
    except (OSError, RuntimeError, TypeError, ValueError, OverflowError, SafetensorError) as error:
        raise InputError(f"scorer {directory}: {_said(error)}") from error
    return scorer.float().eval()


def _said(error: Exception) -> str:
    """One line; of the mismatches that torch lists, the first."""
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 and isinstance(error, RuntimeError) else first_line(error)
