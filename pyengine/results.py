"""What goes in and what comes out of the engine: sampling parameters, results and events."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pyengine.errors import SMALLEST, InputError, real, single, whole

FinishReason = Literal["stop", "length"]  # an EOS token; max_tokens or the end of the context


# What SamplingParams.grammar may hold: of which types, and in words.
GRAMMARS: dict[str, tuple[tuple[type, ...], str]] = {
    "json": ((str, Mapping), "a JSON schema"),
    "regex": ((str,), "a pattern that is not empty"),
    "ebnf": ((str,), "a grammar that is not empty"),
    "json_object": ((bool,), "True"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from the policy, what the base policy may say, and where it ends: vLLM's names and defaults.

    max_tokens: most new tokens. n: samples of the prompt, each with a seed of its own. temperature: 0 is greedy.
    top_k: 0 or -1 is off; top_p: 1 is off; min_p: 0 is off; they apply in this order, to the tilted distribution. seed:
    the same seed and prompt give the same result, whatever else is in the batch; None draws a fresh one.
    skip_special_tokens: leave special tokens, the EOS among them, out of the text; what scorers read is for them to
    say. logprobs: so many of the likeliest tokens at each place, beside the drawn one; -1 is all of them, None is none;
    prompt_logprobs: the same of the prompt's tokens.

    These shape the base policy, from which the KL is measured: what they change costs no KL.
    logit_bias: {token id: what is added to its logit}, from -100 to 100. repetition_penalty: logits of tokens that the
    prompt or the response has are divided by it where positive and multiplied where negative; 1 is off.
    frequency_penalty, presence_penalty: taken from a token's logit for each time that the response has it, and once if
    it has it; 0 is off. allowed_token_ids: no other token is drawn. bad_words: texts whose tokens are never completed,
    with or without a space before them. min_tokens: no EOS, stop token or stop string ends a response that has not more
    tokens than these. grammar: one of {"json": schema}, {"regex": pattern}, {"ebnf": grammar} and
    {"json_object": True}, which the response is in; it takes the extra `grammar`.

    A response ends with an EOS token, unless ignore_eos; with one of stop_token_ids; or with the token that completes
    one of the strings `stop`, which is looked for in the response's text alone. The text ends before a stop string or
    stop token, or behind it with include_stop_str_in_output.

    Raises InputError, which names the field, for a value that is not of its kind or range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    skip_special_tokens: bool = True
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    grammar: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("skip_special_tokens", "include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"SamplingParams: {name} must be a bool, got {getattr(self, name)!r}")
        max_tokens = whole(self.max_tokens, "SamplingParams: max_tokens", 1)
        checked = {
            "max_tokens": max_tokens,
            "temperature": single(self.temperature, "SamplingParams: temperature", 0),
            "top_k": max(0, whole(self.top_k, "SamplingParams: top_k", -1)),
            "top_p": real(self.top_p, "SamplingParams: top_p", 1e-9, 1),
            "min_p": real(self.min_p, "SamplingParams: min_p", 0, 1),
            "seed": None if self.seed is None else whole(self.seed, "SamplingParams: seed", -(2**63)),
            "n": whole(self.n, "SamplingParams: n", 1),
            "stop": _strings(self.stop, "stop"),
            "stop_token_ids": _ids(self.stop_token_ids, "stop_token_ids"),
            "min_tokens": whole(self.min_tokens, "SamplingParams: min_tokens", 0, max_tokens),
            "logprobs": _count(self.logprobs, "logprobs"),
            "prompt_logprobs": _count(self.prompt_logprobs, "prompt_logprobs"),
            "logit_bias": _biases(self.logit_bias),
            "allowed_token_ids": _ids(self.allowed_token_ids, "allowed_token_ids"),
            "bad_words": _strings(self.bad_words, "bad_words"),
            "presence_penalty": single(self.presence_penalty, "SamplingParams: presence_penalty", -2, 2),
            "frequency_penalty": single(self.frequency_penalty, "SamplingParams: frequency_penalty", -2, 2),
            "repetition_penalty": single(self.repetition_penalty, "SamplingParams: repetition_penalty", SMALLEST),
            "grammar": _grammar(self.grammar),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # NumPy's numbers become Python's, lists tuples
        if self.allowed_token_ids == ():
            raise InputError("SamplingParams: allowed_token_ids is empty; give at least one token, or None for all")
        if self.grammar and (self.ignore_eos or self.min_tokens):
            raise InputError("SamplingParams: grammar says where a response ends; leave out ignore_eos and min_tokens")
        if self.n > 1 and self.temperature == 0:
            raise InputError(f"SamplingParams: n is {self.n} at temperature 0, where all samples are one; leave n at 1")


def _several(value: Any, name: str, of: str) -> tuple[Any, ...] | None:
    """A list of anything but characters as a tuple."""
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InputError(f"SamplingParams: {name} must be a list of {of}, got {value!r:.80}")
    return tuple(value)


def _ids(value: Any, name: str) -> tuple[int, ...] | None:
    ids = _several(value, name, "token ids")
    return ids and tuple(whole(token, f"SamplingParams: a token of {name}", 0) for token in ids)


def _strings(value: Any, name: str) -> tuple[str, ...] | None:
    several = (value,) if isinstance(value, str) else _several(value, name, "strings")
    for one in several or ():
        if not isinstance(one, str) or not one:
            raise InputError(f"SamplingParams: {name} must hold strings that are not empty, got {one!r:.80}")
    return several


def _count(value: Any, name: str) -> int | None:
    return None if value is None else whole(value, f"SamplingParams: {name}", -1)


def _biases(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"SamplingParams: logit_bias must be a mapping of token ids to numbers, got {value!r:.80}")
    return {
        whole(token, "SamplingParams: a token of logit_bias", 0): single(
            bias, f"SamplingParams: logit_bias of token {token}", -100, 100
        )
        for token, bias in value.items()
    }


def _grammar(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in GRAMMARS:
        kinds = ", ".join(GRAMMARS)
        raise InputError(f"SamplingParams: grammar must be a mapping with one of {kinds}, got {value!r:.80}")
    ((kind, given),) = value.items()
    types, wanted = GRAMMARS[kind]
    if not isinstance(given, types) or given in ("", False):
        raise InputError(f"SamplingParams: grammar {kind} must be {wanted}, got {given!r:.80}")
    return {kind: given}


def seeded(prompts: Sequence[Any], sampling: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """One SamplingParams for each prompt, every one with a seed; InputError for another number of them."""
    if sampling is None or isinstance(sampling, SamplingParams):
        params = [sampling or SamplingParams()] * len(prompts)
    else:
        params = list(sampling)
        if len(params) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(params)} SamplingParams: give one, or one for each")
    return [p if p.seed is not None else dataclasses.replace(p, seed=secrets.randbits(63)) for p in params]


@dataclass
class Candidate:
    """One branch of a block. utility is the weighted sum of scores, each after its transforms; NaN ranks as -inf.
    logp_base: log-probability in nats of its tokens under the base policy.

    text is what its tokens add: a character that is split between two blocks belongs to the one that completes it. The
    texts of the chosen candidates join to the result's.
    """

    text: str
    tokens: list[int]
    scores: dict[str, float]
    utility: float
    probability: float  # of being selected, given the K candidates
    finish_reason: FinishReason | None
    logp_base: float = 0.0


@dataclass
class Block:
    """One selection: `start` response tokens were committed before it."""

    start: int
    candidates: list[Candidate]
    chosen: int

    @property
    def ranks(self) -> list[int]:
        """Of each candidate by the base policy's log-probability, 1 for the likeliest."""
        return [1 + sum(other.logp_base > one.logp_base for other in self.candidates) for one in self.candidates]


@dataclass
class Result:
    """One finished response.

    tokens: with the EOS, if one was drawn. rewards: each scorer's score of the whole response, of a transformed one
    what the transforms make of it; reward: their weighted sum (None without a scorer). logp_base, logp_policy:
    log-probability in nats of each token under softmax(logits / T) and under the distribution it was drawn from; for
    block and sequence selection that is the proposal. kl: nats from the base policy; kl_kind "exact" is the sum of
    exact per-token KLs along the response (its mean over samples is the sequence KL), "bound" an upper bound: b(K) for
    each selected block, plus the exact KL of the filters. seed: given in SamplingParams with the same prompt, it gives
    this result again. blocks: every selection with all its candidates; empty for k = 1. stop_reason: the stop string or
    stop token that ended it. logprobs: at each token a list of `Logprob`, where they were asked for; prompt_logprobs:
    the same at each token of the prompt, None at the first.

    text: decode(prompt and response) without decode(prompt), so that a space between them is the response's. prompt: as
    text, by the template where it was a conversation; prompt_ids: its tokens.
    """

    prompt: str
    prompt_ids: list[int]
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    reward: float | None
    rewards: dict[str, float]
    logp_base: list[float]
    logp_policy: list[float]
    kl: float
    kl_kind: Literal["exact", "bound"]
    seed: int
    blocks: list[Block] = field(default_factory=list)
    stop_reason: str | int | None = None
    logprobs: list[list[Any]] | None = None
    prompt_logprobs: list[list[Any] | None] | None = None

    @property
    def drawn_tokens(self) -> int:
        """Tokens of all branches, those that were not kept among them."""
        return sum(len(c.tokens) for block in self.blocks for c in block.candidates) or len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON."""
        return dataclasses.asdict(self)


@dataclass
class Event:
    """Something was committed: a token, or a block of them. `result` comes with the last event."""

    text: str  # new text; characters split over tokens are held back until they are whole
    tokens: list[int]
    block: Block | None = None
    result: Result | None = None
    kl: float = 0.0  # nats from the base policy when this was committed, as in `Result`
    logprobs: list[list[Any]] | None = None  # of these tokens, where they were asked for


def finite(value: Any) -> Any:
    """A record without NaN and Infinity, which are not JSON: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
