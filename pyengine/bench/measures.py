"""What is said of a contender: waits, rates, and how near its time is to what the task must at least take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from pyengine import costs
from pyengine.bench.contenders import Run
from pyengine.bench.turns import Took


class Sample(NamedTuple):
    """One contender's turn in a round. joules: None where nothing counts them."""

    run: Run
    took: Took
    joules: float | None


def first_commits(run: Run, tokens: int) -> list[float]:
    """Seconds until so many tokens of a request are committed, or all that it asks for."""
    found = []
    for own, answer in zip(run.commits, run.tokens, strict=True):
        left = min(tokens, len(answer))
        for at, count in own:
            left -= count
            if left <= 0:
                found.append(at)
                break
    return found


def gaps(run: Run) -> list[float]:
    """Seconds between a commit and the next of the same request."""
    return [after - before for own in run.commits for (before, _), (after, _) in pairwise(own)]


def row(samples: Sequence[Sample], block: int, least: float | None, prompts: int) -> dict[str, Any]:
    """A contender's figures. block: tokens of a block. least: seconds of the floor. prompts: tokens of a round's.

    Medians over rounds, percentiles over all requests of all rounds; what was not measured is absent.
    """
    seconds = float(np.median([s.took.wall for s in samples]))
    committed = sum(map(len, samples[0].run.tokens))
    found: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": float(np.median([s.took.cpu for s in samples])),
        "committed_tokens_per_s": committed / seconds,
        "drawn_tokens_per_s": float(np.median([s.run.drawn for s in samples])) / seconds,
        "first_token_s": spread([at for s in samples for at in first_commits(s.run, 1)]),
        "first_block_s": spread([at for s in samples for at in first_commits(s.run, block)]),
        "commit_gap_s": spread([gap for s in samples for gap in gaps(s.run)]),
        "prefix_hit_rate": sum(s.run.hits for s in samples) / (len(samples) * prompts),
    }
    if least is not None:
        found["fraction_of_floor"] = least / seconds
    joules = [s.joules for s in samples if s.joules is not None]
    if len(joules) == len(samples):
        found["joules_per_token"] = float(np.median(joules)) / committed
    return {name: value for name, value in found.items() if value is not None}


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {f"p{q}": float(value) for q, value in zip((50, 90, 99), np.percentile(seconds, (50, 90, 99)), strict=True)}


def least_seconds(
    model: Any, sizes: Sequence[tuple[int, int]], shared: int, k: int, block: int | None, rates: costs.Rates
) -> float:
    """What the task takes at a machine's rates if each weight is read once a step, and each prompt's keys and values
    once for all of its K branches; of a beginning that prompts share once for all.

    sizes: (tokens of the prompt, of the answer). block: None is the whole answer. The last token that is drawn needs no
    pass.
    """
    config, weights = model.config.get_text_config(decoder=True), costs.weights_of(model)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads

    def attention(rows: int, keys: float, pairs: float) -> float:
        query = torch.empty(heads, rows, width, dtype=model.dtype, device="meta")
        return layers * costs.floor(costs.attention(query, keys, pairs, width, key_heads), rates)[0]

    fresh = [prompt - shared for prompt, _ in sizes]
    read = shared + sum(fresh)
    seen = shared * (shared + 1) / 2 + sum(shared * own + own * (own + 1) / 2 for own in fresh)
    total = costs.floor(costs.model_pass(weights, read, len(sizes)), rates)[0] + attention(read, read, seen)
    for step in range(1, max(answer for _, answer in sizes)):
        alive = [prompt for prompt, answer in sizes if answer > step]
        tail = step % block if block else step
        rows = k * len(alive)
        keys = shared + sum(prompt - shared + (step - tail) + k * tail for prompt in alive)
        pairs = k * sum(prompt + step for prompt in alive)
        total += costs.floor(costs.model_pass(weights, rows, rows), rates)[0] + attention(rows, keys, pairs)
    return total
