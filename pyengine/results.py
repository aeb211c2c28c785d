"""What goes in and what comes out of the engine: sampling parameters, results and events."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pyengine.errors import InputError, real, single, whole

FinishReason = Literal["stop", "length"]  # an EOS token; max_tokens or the end of the context


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from the policy.

    max_tokens: most new tokens. temperature: 0 is greedy. top_k: 0 is off; top_p: 1 is off; min_p: 0 is
    off; they apply in this order, to the tilted distribution. seed: the same seed and prompt give the same
    result, whatever else is in the batch; None draws a fresh one. skip_special_tokens: leave special tokens, the EOS
    among them, out of the text; what scorers read is for them to say.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.skip_special_tokens, bool):
            raise InputError(f"SamplingParams: skip_special_tokens must be a bool, got {self.skip_special_tokens!r}")
        checked = {
            "max_tokens": whole(self.max_tokens, "SamplingParams: max_tokens", 1),
            "temperature": single(self.temperature, "SamplingParams: temperature", 0),
            "top_k": whole(self.top_k, "SamplingParams: top_k", 0),
            "top_p": real(self.top_p, "SamplingParams: top_p", 1e-9, 1),
            "min_p": real(self.min_p, "SamplingParams: min_p", 0, 1),
            "seed": None if self.seed is None else whole(self.seed, "SamplingParams: seed", -(2**63)),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # NumPy's numbers become Python's


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

    text is what its tokens add: a character that is split between two blocks belongs to the one that completes it. The
    texts of the chosen candidates join to the result's.
    """

    text: str
    tokens: list[int]
    scores: dict[str, float]
    utility: float
    probability: float  # of being selected, given the K candidates
    finish_reason: FinishReason | None


@dataclass
class Block:
    """One selection: `start` response tokens were committed before it."""

    start: int
    candidates: list[Candidate]
    chosen: int


@dataclass
class Result:
    """One finished response.

    tokens: with the EOS, if one was drawn. rewards: each scorer's score of the whole response, of a transformed one
    what the transforms make of it; reward: their weighted sum (None without a scorer). logp_base, logp_policy:
    log-probability in nats of each token under softmax(logits / T) and under the distribution it was drawn from; for
    block and sequence selection that is the proposal. kl: nats from the base policy; kl_kind "exact" is the sum of
    exact per-token KLs along the response (its mean over samples is the sequence KL), "bound" an upper bound: b(K) for
    each selected block, plus the exact KL of the filters. seed: given in SamplingParams with the same prompt, it gives
    this result again. blocks: every selection with all its candidates; empty for k = 1.

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


def finite(value: Any) -> Any:
    """A record without NaN and Infinity, which are not JSON: a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
