"""select_block beside the bare probe and the PyTorch forms of what it does. All threads of the machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from pyengine import ops

BATCH, CANDIDATES, WIDTH = 64, 16, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(heads, dtype, batch=BATCH, width=WIDTH):
    torch.manual_seed(0)
    hidden, probe = torch.randn(batch, CANDIDATES, width), torch.randn(heads, width) * width**-0.5
    return hidden.to(dtype), probe.to(dtype), torch.randn(heads)


def ours(hidden, probe, reference):
    return ops.select_block(hidden=hidden, probe=probe, transform="lsc", reference=reference, beta=0.1, seed=1)


def einsum(hidden, probe, reference):
    """The probe alone: no LSC, no aggregation, no choice."""
    return torch.einsum("bkd,rd->bkr", hidden, probe)


def pytorch(hidden, probe, reference):
    utility = logsigmoid(einsum(hidden, probe, reference).float() - reference).sum(-1)
    probability = torch.softmax(utility / 0.1, -1)
    return torch.multinomial(probability, 1)[:, 0], probability, utility


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 4])
def test_peers(race, rows, heads, dtype, threads):
    given, before = problem(heads, DTYPES[dtype]), torch.get_num_threads()
    torch.set_num_threads(threads)
    peers = {"einsum (the probe alone)": lambda: einsum(*given), "PyTorch": lambda: pytorch(*given)}
    raced = race(lambda: ours(*given), peers, rounds=200, warm=True)
    torch.set_num_threads(before)
    if raced is None:
        return
    times = raced[0]
    rows.append(
        {
            "batch": BATCH,
            "candidates": CANDIDATES,
            "width": WIDTH,
            "heads": heads,
            "dtype": dtype,
            "threads": threads,
            "microseconds": {name: round(t * 1e6, 1) for name, t in times.items()},
            "times_slower": {name: round(t / times["pyengine"], 3) for name, t in times.items()},
            "gigabytes_per_second": round(given[0].nbytes / times["pyengine"] / 1e9, 1),
        }
    )


def test_smoke(benchmark):
    given = problem(2, torch.float32, batch=3, width=100)
    found = benchmark.pedantic(ours, given, rounds=1)
    torch.testing.assert_close(found.utility, pytorch(*given)[2], atol=1e-5, rtol=1e-5)
