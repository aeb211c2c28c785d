"""What a scorer is, and how several of them become one."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine.errors import InputError

Hidden = dict[int, Tensor]  # layer -> [N, D]; layer as in transformers' hidden_states, -1 the last


@dataclass(frozen=True)
class Policy:
    """What a scorer may ask about the base policy it is to score for."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: int  # hidden states that exist: the embedding and one for each decoder layer
    device: torch.device
    tokenizer: Any = None


@dataclass
class Candidates:
    """N prefixes x + y^t to score; every one has at least one response token."""

    prompts: Sequence[str]
    tokens: Sequence[Sequence[int]]  # y^t, an EOS included
    hidden: Hidden  # at the last token
    previous: Hidden  # at the token before it
    decode: Callable[[Sequence[Sequence[int]]], list[str]] = field(repr=False)
    prompt_ids: Sequence[Sequence[int]] = ()  # the prompts' tokens

    @cached_property
    def completions(self) -> list[str]:
        """The responses as text, without special tokens."""
        return self.decode(self.tokens)


class Scorer:
    """Scores prefixes: `score` always, and `values` where it can score all next tokens at once."""

    name: str = "scorer"
    layers: tuple[int, ...] = ()  # hidden states of the base policy that it reads
    scores_tokens = False  # whether `values` is there, which Tokenwise needs

    def check(self, policy: Policy) -> None:
        """Raise InputError if this scorer does not fit the base policy."""

    def move(self, device: torch.device) -> None:
        """Move parameters to the base policy's device."""

    def score(self, candidates: Candidates) -> Tensor:
        """Utility of each prefix, fp32 [N]; higher is better."""
        raise NotImplementedError

    def values(self, hidden: Hidden) -> Tensor:
        """V(y^t, z) of every next token z, fp32 [N, V]."""
        raise NotImplementedError


class FunctionScorer(Scorer):
    """A Python callable over lists of prompts and completions that returns one float for each.

    Called with `prompts=` and `completions=` where it takes arguments of these names, as TRL's reward
    functions do, else with the two lists in this order. None stands for NaN.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", "function"))
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # some builtins have none
            parameters = {}  # type: ignore[assignment]
        rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._by_name = "completions" in parameters and (rest or "prompts" in parameters)

    def score(self, candidates: Candidates) -> Tensor:
        prompts, completions = list(candidates.prompts), candidates.completions
        if self._by_name:
            scores = self.function(prompts=prompts, completions=completions)
        else:
            scores = self.function(prompts, completions)
        if isinstance(scores, (list, tuple)):
            scores = [math.nan if s is None else s for s in scores]
        out = torch.as_tensor(scores, dtype=torch.float32)
        if out.shape != (len(candidates.tokens),):
            raise InputError(
                f"scorer {self.name!r} must return one number for each of {len(candidates.tokens)} completions, "
                f"got shape {list(out.shape)}"
            )
        return out


class Part(NamedTuple):
    """One scorer of a weighted sum, under the name that results use for it."""

    weight: float
    name: str
    scorer: Scorer


# A scorer, a directory of one, a callable, or a weighted list of any of these.
ScorerLike = Scorer | str | os.PathLike[str] | Callable[..., Any] | Sequence[tuple[float, Any]]
