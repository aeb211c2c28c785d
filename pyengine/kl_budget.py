"""A KL budget for whole sequences, turned into the weight that spends it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pyengine.decode.request import Request
from pyengine.errors import InputError
from pyengine.plan import Plan
from pyengine.results import Result, SamplingParams, seeded
from pyengine.strategies import Strategy, Tokenwise

RUNS = 12  # decodes at most; 3 to 5 are usual


def calibrate(
    generate: Callable[..., list[Result]],
    prompts: Sequence[Any],
    kl_budget: float,
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    progress: bool | None,
) -> Tokenwise:
    """`Engine.calibrate` over its `generate`: a search for the root of the mean KL."""
    if not prompts:
        raise InputError("calibrate needs prompts")
    params = seeded(prompts, sampling)
    check_budget(params)
    wanted = math.sqrt(Tokenwise(kl_budget=kl_budget).kl_budget or 0)
    weight, low, high = 1.0, 0.0, math.inf
    best, gap, above = 0.0, math.inf, 0
    for _ in range(RUNS):
        results = generate(prompts, Tokenwise(weight), params, progress)
        root = math.sqrt(max(0.0, sum(r.kl for r in results) / len(results)))
        if abs(root**2 / wanted**2 - 1) < gap:
            best, gap = weight, abs(root**2 / wanted**2 - 1)
        if gap <= 0.01:
            break
        low, high = (weight, high) if root < wanted else (low, weight)
        # The root of the KL is nearly linear in λ, the more so the smaller it is; far above it has a ceiling.
        factor = min(wanted / root, 10.0 if root > 1e-2 else 1e6) if root else 1e3
        above = above + 1 if low == 0 and root > wanted else 0
        guess = weight * min(factor, 10.0 ** (1 - above) if above else math.inf)
        weight = guess if low < guess < high else math.sqrt(max(low, 1e-6 * high) * high)
    else:
        warnings.warn(
            f"no λ spends {kl_budget:g} nats on these {len(prompts)} prompts: {best:.4g} comes nearest, "
            f"{100 * gap:.1f} % off; give more prompts, or a budget that the scorer can spend",
            RuntimeWarning,
            stacklevel=3,
        )
    return Tokenwise(best)


def spend_budgets(
    generate: Callable[..., list[Result]], prompts: Sequence[Any], requests: Sequence[Request], progress: bool | None
) -> None:
    """A budget for whole sequences becomes a weight: one for all that have the same."""
    alike: dict[Strategy, list[Request]] = {}
    for request in requests:
        strategy = request.plan.strategy
        if isinstance(strategy, Tokenwise) and strategy.kl_budget is not None:
            check_budget([request.params])
            if strategy.per == "sequence":
                alike.setdefault(strategy, []).append(request)
    for strategy, some in alike.items():
        assert isinstance(strategy, Tokenwise) and strategy.kl_budget is not None  # noqa: PT018
        own = [prompts[request.index] for request in some]
        found = calibrate(generate, own, strategy.kl_budget, [request.params for request in some], progress)
        for request in some:
            request.plan = Plan(found, request.plan.parts, request.plan.readers, request.params)


def check_budget(sampling: Sequence[SamplingParams]) -> None:
    """InputError for filters, whose KL no weight undoes."""
    for p in sampling:
        if p.temperature == 0 or p.top_k or p.top_p < 1 or p.min_p:
            raise InputError("Tokenwise: kl_budget needs a temperature above 0, and no top_k, top_p or min_p")
