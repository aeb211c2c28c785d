"""The likeliest tokens at a place, with their log-probabilities under the policy and under the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine.modes import evaluating


class Logprob(NamedTuple):
    """A token at a place. logprob, base_logprob: nats, as `top_logprobs` says. rank: 1 is the policy's likeliest."""

    token: int
    logprob: float
    base_logprob: float
    rank: int


class TopLogprobs(NamedTuple):
    """[N, 1 + n] each: the drawn token, then the n likeliest from the first on, the drawn one among them or not."""

    token: Tensor  # int64
    logprob: Tensor  # fp32
    base_logprob: Tensor  # fp32
    rank: Tensor  # int64


def top_logprobs(
    logits: Tensor,
    token: Tensor,
    n: int,
    *,
    raw: Tensor | None = None,
    values: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: Tensor | float = 1.0,
) -> TopLogprobs:
    """The drawn tokens [N] and the `n` likeliest of each row, on the device and without waiting for it.

    logprob is under the policy before top-k, top-p and min-p: log softmax(logits / T + Σ λ V), with the base policy's
    logits [N, V], values [R, N, V] and weights [R] or [N, R] as `tilt_sample` takes them; temperature [N] or a number,
    where 0, which is greedy, counts as 1. base_logprob is under the model itself, log softmax(raw), before temperature
    and whatever shapes the base policy: vLLM's logprobs_mode "raw_logprobs". raw [N, V]: `logits` by default. Of
    equally likely tokens the lowest id comes first, as in `tilt_sample`.
    """
    base = logits.float()
    heat = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    policy = base / torch.where(heat == 0, 1.0, heat).reshape(-1, 1)
    if values is not None and weights is not None:
        policy = _tilted(policy, values, weights)
    policy = policy.log_softmax(-1)
    keys = _keys(policy)
    drawn = keys.gather(1, token[:, None])
    top = keys.topk(n).indices
    tokens = torch.cat([token[:, None], top], 1)
    ranks = torch.arange(1, n + 1, device=logits.device).expand(len(logits), n)
    return TopLogprobs(
        tokens,
        policy.gather(1, tokens),
        (base if raw is None else raw.float()).log_softmax(-1).gather(1, tokens),
        torch.cat([(keys > drawn).sum(1, keepdim=True) + 1, ranks], 1),
    )


def _tilted(policy: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """policy + Σ λ V by the rules of `tilt_sample`: a head of weight 0 is skipped, no value revives a forbidden token,
    and where the values forbid all the base decides."""
    each = weights.float().reshape(-1, len(values)).T[:, :, None]
    delta = torch.where(each == 0, 0.0, each * values.float()).sum(0)
    tilted = torch.where(policy == -math.inf, policy, policy + delta)
    return torch.where((tilted == -math.inf).all(1, keepdim=True), policy, tilted)


def _keys(x: Tensor) -> Tensor:
    """int64 [N, V] in the order of fp32 numbers and, where those are equal, from the lowest id down."""
    bits = x.view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (rising << 32) - torch.arange(x.shape[1], device=x.device)


def prompt_logprobs(model: Any, ids: Sequence[int], count: int) -> list[list[Logprob] | None]:
    """At each token of a prompt but the first, by a pass of the model's own; `count` as `listed` takes it."""
    with torch.inference_mode(), evaluating(model):
        logits = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, :-1]
    token = torch.tensor(list(ids[1:]), device=logits.device)
    top = top_logprobs(logits, token, logits.shape[1] if count == -1 else min(count, logits.shape[1]))
    return [None, *listed(top, [count] * len(token))]


def listed(top: TopLogprobs, counts: Sequence[int | None]) -> list[list[Logprob]]:
    """As `SamplingParams.logprobs` asks it of each row: None is nothing, 0 the drawn token, -1 every token there is.

    By rank; the drawn token is always there, last if it is not among the likeliest. Forbidden tokens are left out.
    """
    out: list[list[Logprob]] = []
    for row, count in zip(zip(*(x.tolist() for x in top), strict=True), counts, strict=True):
        drawn, *likeliest = (Logprob(*one) for one in zip(*row, strict=True))
        some = likeliest[: None if count == -1 else count]
        some = [one for one in some if one.logprob > -math.inf]
        out.append([] if count is None else some if drawn in some else [*some, drawn])
    return out
