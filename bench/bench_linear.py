"""The linear layers of one decode step, beside torch's and oneDNN's: Llama of 100 M parameters, fp32, all threads.

Each run goes once through 400 MB of weights, as a step does, so that none is found in a cache.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import linear as by_torch

from pyengine.ops.linear import linear

LAYER = ((768, 768), (256, 768), (256, 768), (768, 768), (2048, 768), (2048, 768), (768, 2048))
LAYERS, HEAD = 12, (32_000, 768)


def problem(layers=LAYERS, head=HEAD):
    torch.manual_seed(0)
    return [torch.randn(shape) * shape[1] ** -0.5 for shape in (*LAYER * layers, head)]


def by_onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def step(product, weights, rows):
    given = {width: torch.ones(1, rows, width) for width in {weight.shape[1] for weight in weights}}
    with torch.inference_mode():
        return [product(given[weight.shape[1]], weight) for weight in weights]


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32])
def test_peers(race, rows, batch):
    weights = problem()
    peers = {"torch": partial(step, by_torch, weights, batch), "oneDNN": partial(step, by_onednn, weights, batch)}
    raced = race(partial(step, linear, weights, batch), peers | {"a plain sum": lambda: [w.sum() for w in weights]}, 15)
    if raced is None:
        return
    times = raced[0]
    size = sum(weight.nbytes for weight in weights)
    rows.append(
        {
            "rows": batch,
            "threads": torch.get_num_threads(),
            "milliseconds": {name: round(t * 1e3, 2) for name, t in times.items()},
            "times_slower": {name: round(t / times["pyengine"], 2) for name, t in times.items()},
            "gigabytes_per_second": {name: round(size / t / 1e9, 1) for name, t in times.items()},
        }
    )


def test_smoke(benchmark):
    weights = problem(1, (100, 768))
    found = benchmark.pedantic(step, (linear, weights, 3), rounds=1)
    for ours, theirs in zip(found, step(by_onednn, weights, 3), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
