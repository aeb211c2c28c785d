"""Rows spread over threads: the same bits, and no thread that another process or a fork could strand."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from pyengine import ops


def test_results_do_not_depend_on_the_threads():
    torch.manual_seed(14)
    logits, values = torch.randn(37, 60_000), torch.randn(1, 37, 60_000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for parameters in ({}, {"top_p": 0.9}, {"method": "gumbel"}):
                results.append(ops.tilt_sample(logits, values, 0.7, seed=3, **parameters))
    finally:
        torch.set_num_threads(threads)
    for i in range(3):
        for other in (results[i + 3], results[i + 6]):
            assert all(torch.equal(a, b) for a, b in zip(results[i], other, strict=True))


def test_callers_of_their_own_threads_do_not_meet():
    """The pool serves one of them at a time; the others work alone."""
    torch.manual_seed(15)
    logits = torch.randn(40, 30_000)
    want = ops.tilt_sample(logits, seed=1).token
    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda _: ops.tilt_sample(logits, seed=1).token, range(60)))
    assert all(torch.equal(token, want) for token in found)


def test_works_in_a_forked_child():
    """The pool's workers do not survive fork(); a child that waited for them would hang."""
    program = """
import os, torch
from pyengine import ops
torch.set_num_threads(2)
logits = torch.randn(40, 30_000)
want = ops.tilt_sample(logits, seed=1).token
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.tilt_sample(logits, seed=1).token, want) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ops.tilt_sample(logits, seed=1).token, want)
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=120)
