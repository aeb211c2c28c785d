"""head_tilt_sample: the fused form, the two steps that it replaces, and what one writes in PyTorch.

The floor is the products alone, which read both heads' weights once. Where the fused form wins is what
`fuses` in pyengine/ops/head_tilt.py says. All threads of the machine.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from pyengine import ops

VOCAB, WIDTH, VALUE_WIDTH = 128_256, 1024, 128
BATCHES = (1, 8, 64, 256)


def problem(batch, vocab=VOCAB, width=WIDTH):
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(batch, width),
        "weight": torch.randn(vocab, width) * 3 * width**-0.5,
        "value_hidden": torch.randn(batch, VALUE_WIDTH),
        "value_weight": torch.randn(1, vocab, VALUE_WIDTH) * VALUE_WIDTH**-0.5,
    }


def ours(given, fused):
    with mock.patch.object(ops.head_tilt, "fuses", return_value=fused):
        return ops.head_tilt_sample(**given, weights=1.0, seed=1)


def products(given):
    """The heads alone."""
    return given["hidden"] @ given["weight"].T, given["value_hidden"] @ given["value_weight"].mT


def pytorch(given):
    logits, values = products(given)
    base, tilted = torch.log_softmax(logits, -1), torch.log_softmax(logits + values[0], -1)
    policy = tilted.exp()
    token = torch.multinomial(policy, 1)
    kl = (policy * (tilted - base)).sum(-1)
    return token[:, 0], base.gather(-1, token)[:, 0], tilted.gather(-1, token)[:, 0], kl


@pytest.mark.parametrize("batch", BATCHES)
def test_peers(race, rows, batch):
    given = problem(batch)
    peers = {
        "the products alone": lambda: products(given),
        "pyengine in two steps": lambda: ours(given, False),
        "PyTorch": lambda: pytorch(given),
    }
    raced = race(lambda: ours(given, True), peers, rounds=9)
    if raced is None:
        return
    times = {"pyengine fused" if name == "pyengine" else name: t for name, t in raced[0].items()}
    rows.append(
        {
            "batch": batch,
            "vocab": VOCAB,
            "width": WIDTH,
            "value_width": VALUE_WIDTH,
            "milliseconds": {name: round(t * 1e3, 2) for name, t in times.items()},
            "fused_over_two_steps": round(times["pyengine fused"] / times["pyengine in two steps"], 3),
            "fraction_of_the_products_rate": round(
                times["the products alone"] / min(times["pyengine fused"], times["pyengine in two steps"]), 3
            ),
            "samples": raced[1],
        }
    )


def test_smoke(benchmark):
    given = problem(3, vocab=5000, width=16)
    fused = benchmark.pedantic(ours, (given, True), rounds=1)
    assert torch.equal(fused.token, ours(given, False).token)
    torch.testing.assert_close(fused.kl, pytorch(given)[3], atol=1e-4, rtol=1e-4)
