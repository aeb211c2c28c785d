"""Launches every CUDA C++ kernel once a filter, at small sizes, for compute-sanitizer to look on; see gpu.sh.

compute-sanitizer --tool memcheck --error-exitcode 1 python bench/sanitize.py
"""

from __future__ import annotations

import itertools
import math

import torch

from pyengine.ops import common, cuda

COLUMNS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5, "position": 2}
FILTERS = (
    {},
    {"temperature": 0.0},
    {"top_k": 7},
    {"top_p": 0.9},
    {"min_p": 0.01},
    {"top_k": 3000, "top_p": 0.99, "min_p": 1e-6},
)
VOCABS = (1, 1000, 5003)  # within a block of 1,024, and blocks that end off the 16-byte grid
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def columns(batch: int, **given: float) -> list[torch.Tensor]:
    device = torch.device("cuda")
    return [common.column("sanitize", given.get(n, default), n, batch, device) for n, default in COLUMNS.items()]


def tilt_sample(vocab: int, dtype: torch.dtype, tilted: bool) -> None:
    """With two heads and a mask, or with neither."""
    batch, heads = 4, 2
    logits = torch.randn(batch, vocab, device="cuda").to(dtype)
    logits[1, 0], logits[2] = math.nan, -math.inf  # rows that are not valid
    values = torch.randn(heads, batch, vocab, device="cuda").to(dtype) if tilted else None
    weights = torch.ones(batch, heads, device="cuda") if tilted else None
    mask = (torch.rand(batch, vocab, device="cuda") > 0.1) if tilted else None
    for parameters, gumbel in itertools.product(FILTERS, (False, True)):
        cuda.tilt_sample(logits, values, weights, mask, *columns(batch, **parameters), gumbel)


def select_block(width: int, dtype: torch.dtype, lsc: bool, beta: float) -> None:
    batch, candidates, heads = 3, 5, 2
    weights, seed = torch.ones(heads, device="cuda"), torch.arange(batch, device="cuda")
    reference = torch.zeros(batch, heads, device="cuda") if lsc else None
    hidden = torch.randn(batch, candidates, width, device="cuda").to(dtype)
    probe = torch.randn(heads, width, device="cuda").to(dtype)
    scores = torch.randn(batch, candidates, heads, device="cuda").to(dtype)
    for given in ((scores, None, None), (None, hidden, probe)):
        cuda.select_block(*given, weights, reference, lsc, beta, seed, seed)


def main() -> None:
    torch.manual_seed(0)
    for case in itertools.product(VOCABS, DTYPES, (False, True)):
        tilt_sample(*case)
    for case in itertools.product((1, 333, 1024), DTYPES, (False, True), (0.0, 0.5)):
        select_block(*case)
    torch.cuda.synchronize()
    print("every kernel was launched")


if __name__ == "__main__":
    main()
