"""Exact draws from the KL-regularised optimum p0 exp(Q / beta) / Z by rejection sampling (Q-Probe)."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyengine.codec import PromptLike, as_prompts
from pyengine.engine import Engine
from pyengine.errors import InputError, real, whole
from pyengine.results import Result, SamplingParams, seeded


@dataclass
class Accepted:
    """A response that was accepted, and what it took.

    result: as the engine drew it from the base policy; its kl is the draw's own (0 without filters), not that of the
    policy sampled here. draws: base responses drawn for it, it included; the rest of its batch is not counted. highest:
    the highest utility seen, in all of the batch. exact: whether that is within the bound; else the law is not the
    optimum's.
    """

    result: Result
    draws: int
    highest: float
    exact: bool


@dataclass
class _Search:
    """One prompt on its way to a draw that is accepted."""

    index: int
    prompt: PromptLike
    sampling: SamplingParams
    rng: random.Random
    draws: int = 0
    highest: float = -math.inf
    accepted: Accepted | None = None
    uniforms: list[float] = field(default_factory=list)


def rejection_sample(
    engine: Engine,
    prompts: PromptLike | Sequence[PromptLike],
    bound: float,
    beta: float,
    *,
    batch: int = 16,
    max_draws: int = 1024,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    progress: bool | None = None,
) -> list[Accepted]:
    """One exact draw for each prompt from p0(y|x) exp(Q(x, y) / beta) / Z(x), p0 what `sampling` draws from.

    A base response is accepted with probability exp((Q - bound) / beta), Q the weighted sum of the engine's scorers.
    Expected draws: M / E_p0[exp(Q / beta)] with M = exp(bound / beta); Q-Probe says M, which is an upper bound of it
    only where that mean is at least 1. The KL from p0 is at most the logarithm of the expected draws.

    bound: no less than any utility. A utility above it is accepted, warned of and reported (`Accepted.exact`).
    batch: responses of a prompt decoded at once, which changes no response. sampling: one for all prompts or one for
    each; its seed, with the prompt, fixes the response.
    Raises InputError, naming the prompt, where none of max_draws is accepted.
    """
    prompts = as_prompts(prompts)
    bound, beta = real(bound, "rejection_sample: bound"), real(beta, "rejection_sample: beta")
    batch, max_draws = whole(batch, "rejection_sample: batch", 1), whole(max_draws, "rejection_sample: max_draws", 1)
    if beta <= 0:
        raise InputError(f"rejection_sample: beta must be above 0, got {beta}")
    if not engine.parts:
        raise InputError("rejection_sample needs a scorer: Engine.from_pretrained(..., scorer=...)")
    given = seeded(prompts, sampling)
    for i, prompt in enumerate(prompts):
        engine.encode(prompt, f"prompt {i}")
    searches = [
        _Search(i, prompt, own, random.Random(f"{own.seed}:{prompt}"))
        for i, (prompt, own) in enumerate(zip(prompts, given, strict=True))
    ]
    while live := [s for s in searches if s.accepted is None]:
        params, owners = [], []
        for s in live:
            count = min(batch, max_draws - s.draws)
            if count == 0:
                raise InputError(
                    f"prompt {s.index}: none of {max_draws} draws was accepted (highest utility {s.highest:g}, bound "
                    f"{bound:g}, beta {beta:g}): lower the bound towards it, or raise beta or max_draws"
                )
            drawn = [(s.rng.getrandbits(63), s.rng.random()) for _ in range(count)]
            s.uniforms = [u for _, u in drawn]
            params += [dataclasses.replace(s.sampling, seed=own) for own, _ in drawn]
            owners += [s] * count
        results = engine.generate([s.prompt for s in owners], sampling=params, progress=progress)
        for s, result in zip(owners, results, strict=True):
            _judge(s, result, bound, beta)
    found = [s.accepted for s in searches if s.accepted is not None]
    loose = [i for i, a in enumerate(found) if not a.exact]
    if loose:
        warnings.warn(
            f"rejection_sample: a utility passed the bound {bound:g} (up to {max(a.highest for a in found):g}) at "
            f"{len(loose)} of {len(found)} prompts, first at prompt {loose[0]}: these draws are not exact; "
            "raise the bound",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _judge(search: _Search, result: Result, bound: float, beta: float) -> None:
    """Accept a draw or not; of those decoded after an accepted one only the utility is looked at."""
    assert result.reward is not None
    utility = -math.inf if math.isnan(result.reward) else result.reward
    if math.isnan(result.reward):
        warnings.warn("a scorer returned NaN; such a draw is not accepted", RuntimeWarning, stacklevel=3)
    search.highest = max(search.highest, utility)
    if search.accepted is None:
        search.draws += 1
        if search.uniforms.pop(0) < math.exp(min((utility - bound) / beta, 0.0)):
            search.accepted = Accepted(result, search.draws, utility, True)
    if search.accepted is not None:
        # Utilities are fp32, so that one at the bound may lie a rounding above it.
        within = search.highest <= bound + 1e-6 * max(1.0, abs(bound))
        search.accepted.highest, search.accepted.exact = search.highest, within
