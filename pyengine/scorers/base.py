"""What a scorer is, and how several of them become one."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine.codec import PromptKey
from pyengine.errors import InputError, first_line, real

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
    decode: Callable[..., list[str]] = field(repr=False)  # of the responses' tokens[, skip_special_tokens=True]
    prompt_ids: Sequence[Sequence[int]] = ()  # the prompts' tokens
    messages: Sequence[Sequence[Any] | None] = ()  # what the prompts were that were conversations

    @property
    def conversations(self) -> Sequence[Sequence[Any] | None]:
        """`messages`, one for each prompt."""
        return self.messages or [None] * len(self.prompts)

    @cached_property
    def completions(self) -> list[str]:
        """The responses as text, without special tokens."""
        return self.decode(self.tokens)

    @cached_property
    def completions_with_special_tokens(self) -> list[str]:
        """The responses as text, special tokens (an EOS, `<think>`) included."""
        return self.decode(self.tokens, skip_special_tokens=False)


def as_given(texts: Sequence[str]) -> Callable[..., list[str]]:
    """`Candidates.decode` of responses that are texts already, with whatever special tokens are in them."""
    return lambda tokens, skip_special_tokens=True: list(texts)


class Algebra:
    """Operators of scorers and of their sums: `0.7 * a + b - c`, and `a & b` of log-probabilities.

    The other operand of +, - and & may be anything that is a scorer: a directory, a callable, a weighted list.
    """

    __array_ufunc__ = None  # NumPy's numbers leave the product to the scorer

    def __mul__(self, weight: float) -> Sum:
        factor = real(weight, "the weight of a scorer")
        return Sum((factor * w, scorer) for w, scorer in _terms(self))

    __rmul__ = __mul__

    def __neg__(self) -> Sum:
        return self * -1.0

    def __add__(self, other: ScorerLike) -> Sum:
        return Sum((*_terms(self), *_terms(other)))

    def __radd__(self, other: ScorerLike) -> Sum:
        return Sum((*_terms(other), *_terms(self)))

    def __sub__(self, other: ScorerLike) -> Sum:
        return self + -Sum(_terms(other))

    def __rsub__(self, other: ScorerLike) -> Sum:
        return Sum(_terms(other)) + -self

    def __and__(self, other: ScorerLike) -> Sum:
        """log P(a and b) = log P(a) + log P(b) of properties independent given prompt and response (LSC, Theorem 2).

        InputError unless both sides are log-probabilities of weight 1: `lsc(...)`, `log_sigmoid(...)` or an AND.
        """
        return Sum((*_log_probabilities(self), *_log_probabilities(other)))

    def __rand__(self, other: ScorerLike) -> Sum:
        return Sum((*_log_probabilities(other), *_log_probabilities(self)))


class Sum(Algebra, tuple[tuple[float, Any], ...]):  # type: ignore[misc]  # a tuple's + and * are not a sum's
    """(weight, scorer) pairs: the utility sum_r weight_r * score_r. Made by the operators of scorers."""


class Scorer(Algebra):
    """Scores prefixes: `score` always, and `values` where it can score all next tokens at once."""

    name: str = "scorer"
    layers: tuple[int, ...] = ()  # hidden states of the base policy that it reads
    scores_tokens = False  # whether `values` is there, which Tokenwise needs
    reads_ids = False  # whether it reads the responses' token ids, and not their text alone

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

    A function that takes `completions` or `completion_ids` is called by name, with these and `prompts`, and with all
    three where it takes any name, as TRL's reward functions do; others with prompts and completions in this order. A
    prompt that was a conversation comes as its messages. None stands for NaN. skip_special_tokens: whether completions
    come without special tokens, as `<think>` may be one.

    Whatever the function raises is an InputError that names it, with the exception as its cause.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, skip_special_tokens: bool = True) -> None:
        self.function, self.skip_special_tokens = function, skip_special_tokens
        self.name = name or str(getattr(function, "__name__", "function"))
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # some builtins have none
            parameters = {}  # type: ignore[assignment]
        known = ("prompts", "completions", "completion_ids")
        rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = {name for name in known if name in parameters}
        self.reads_ids = "completion_ids" in named
        self._names = [name for name in known if rest or name in named] if named - {"prompts"} or rest else []

    def score(self, candidates: Candidates) -> Tensor:
        given: dict[str, Any] = {
            "prompts": [p.form if isinstance(p, PromptKey) else p for p in candidates.prompts],
            "completions": candidates.completions
            if self.skip_special_tokens
            else candidates.completions_with_special_tokens,
            "completion_ids": [list(tokens) for tokens in candidates.tokens],
        }
        for i, messages in enumerate(candidates.messages):
            if messages:
                given["prompts"][i] = list(messages)
        try:
            if self._names:  # of texts that no tokenizer has read there are no ids to give
                known = [name for name in self._names if name != "completion_ids" or any(candidates.tokens)]
                scores = self.function(**{name: given[name] for name in known})
            else:
                scores = self.function(given["prompts"], given["completions"])
        except Exception as error:  # the caller's own
            raise InputError(f"scorer {self.name!r} raised {type(error).__name__}: {first_line(error)}") from error
        return self._numbers(scores, len(candidates.tokens))

    def _numbers(self, scores: Any, count: int) -> Tensor:
        wanted = f"scorer {self.name!r} must return one number for each of {count} completions"
        if isinstance(scores, (list, tuple)):
            scores = [math.nan if s is None else s for s in scores]
        try:
            out = torch.as_tensor(scores, dtype=torch.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"{wanted}, got {scores!r:.60} ({first_line(error)})") from error
        if out.shape != (count,):
            raise InputError(f"{wanted}, got shape {list(out.shape)}")
        return out


@dataclass(frozen=True)
class Transform:
    """A function of raw scores: fp32 [N] and their N prompts -> fp32 [N].

    The engine also calls it with zeros for all prompts before it decodes any, so that it can refuse a prompt early.
    log_probability: what it gives is log P(property | prompt, response), which `&` may join.
    """

    name: str
    function: Callable[[Tensor, Sequence[str]], Tensor] = field(repr=False)
    log_probability: bool = False


class Transformed(Scorer):
    """A scorer whose raw scores pass through transforms, the first of them first.

    It scores whole prefixes only, whatever the scorer inside can do: a transform of V(y^t), an expectation, is not
    the expectation of the transformed reward.
    """

    def __init__(self, scorer: Scorer, *transforms: Transform) -> None:
        self.scorer: Scorer = scorer
        self.transforms: tuple[Transform, ...] = transforms
        if isinstance(scorer, Transformed):
            self.scorer, self.transforms = scorer.scorer, (*scorer.transforms, *transforms)
        self.layers, self.reads_ids = self.scorer.layers, self.scorer.reads_ids
        self.name = scorer.name
        for transform in transforms:
            self.name = f"{transform.name}({self.name})"

    def check(self, policy: Policy) -> None:
        self.scorer.check(policy)

    def move(self, device: torch.device) -> None:
        self.scorer.move(device)

    def score(self, candidates: Candidates) -> Tensor:
        return transformed(self.scorer.score(candidates), candidates.prompts, self.transforms)


def transformed(scores: Tensor, prompts: Sequence[str], transforms: Iterable[Transform]) -> Tensor:
    """Utilities, fp32 [N], of raw scores [N] to these N prompts."""
    for transform in transforms:
        scores = transform.function(scores, prompts)
    return scores


class Part(NamedTuple):
    """One term of a weighted sum, under the name that results use for it.

    scorer gives the raw score; the term, and what results call its score, is weight times the transformed one.
    """

    weight: float
    name: str
    scorer: Scorer
    transforms: tuple[Transform, ...] = ()

    def utilities(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores [N] of these N prompts, transformed; without the weight."""
        return transformed(scores, prompts, self.transforms)

    def term(self) -> tuple[float, Scorer]:
        """(weight, scorer with its transforms), of which `parts_of` makes this part again."""
        return self.weight, Transformed(self.scorer, *self.transforms) if self.transforms else self.scorer


def _terms(scorer: Any) -> tuple[tuple[float, Any], ...]:
    """What an operand adds to a sum; `parts_of` flattens what is nested."""
    if isinstance(scorer, Sum):
        return tuple(scorer)
    if scorer is None or isinstance(scorer, (bool, int, float)):
        raise InputError(f"a sum of scorers takes scorers, got {scorer!r}; a constant changes no choice: leave it out")
    return ((1.0, scorer),)


def _log_probabilities(scorer: Any) -> tuple[tuple[float, Any], ...]:
    terms = _terms(scorer)
    for weight, part in terms:
        if weight != 1 or not (isinstance(part, Transformed) and any(t.log_probability for t in part.transforms[-1:])):
            name = getattr(part, "name", None) or getattr(part, "__name__", None) or str(part)
            raise InputError(
                f"& joins log-probabilities of weight 1, {name!r} with weight {weight:g} is none: "
                "wrap each raw scorer in lsc(scorer, reference), or write a weighted sum with +"
            )
    return terms


# A scorer, a directory of one, a callable, or a weighted list of any of these.
ScorerLike = Scorer | str | os.PathLike[str] | Callable[..., Any] | Sequence[tuple[float, Any]]
