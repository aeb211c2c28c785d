"""KL bounds against enumerated laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyengine import InputError
from pyengine.ledger import best_of_k_bound, blockwise_bound


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def best_of_k_law(base, k):
    """Exact law of best-of-k where outcome i is better than all before it."""
    cdf = list(itertools.accumulate(base))
    return [c**k - (c - p) ** k for c, p in zip(cdf, base, strict=True)]


def soft_selection_law(base, utility, k, beta):
    """Exact law of softmax selection among k iid draws, by enumeration."""
    law = [0.0] * len(base)
    for draw in itertools.product(range(len(base)), repeat=k):
        chance = math.prod(base[i] for i in draw)
        weight = torch.tensor([utility[i] / beta for i in draw]).softmax(-1).tolist()
        for i, w in zip(draw, weight, strict=True):
            law[i] += chance * w
    return law


def test_values_of_the_specification():
    printed = {1: 0.0, 2: 0.1931, 6: 0.9584, 8: 1.2044, 16: 1.8351, 50: 2.9320, 191: 4.2575}
    for k, value in printed.items():
        assert best_of_k_bound(k) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("base", [[0.5, 0.5], [0.9, 0.1], [0.1, 0.2, 0.3, 0.4], [0.02] * 50])
def test_enumerated_best_of_k_stays_below_its_bound(base, k):
    assert kl(best_of_k_law(base, k), base) <= best_of_k_bound(k) + 1e-12


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 10.0])
def test_enumerated_soft_selection_stays_below_the_same_bound(beta):
    base, utility = [0.2, 0.5, 0.1, 0.2], [0.0, 0.4, 1.0, 2.0]
    assert kl(soft_selection_law(base, utility, 4, beta), base) <= best_of_k_bound(4)


def test_printed_blockwise_bound_is_false_and_ceil_holds():
    """Two one-token responses, K = 2, M = 4."""
    exact = kl(best_of_k_law([0.5, 0.5], 2), [0.5, 0.5])
    assert exact == pytest.approx(0.1308, abs=5e-5)
    assert blockwise_bound(2, 1, 4, blocks="paper") == pytest.approx(0.0483, abs=5e-5)
    assert blockwise_bound(2, 1, 4) == pytest.approx(0.1931, abs=5e-5)
    assert blockwise_bound(2, 1, 4, blocks="paper") < exact <= blockwise_bound(2, 1, 4)


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 4, 5])
def test_ceil_bound_over_ragged_blocks(block_tokens):
    """iid binary tokens, four of them, reward the number of ones: blocks are selected independently."""
    bits, length, k = [0.7, 0.3], 4, 3
    total, left = 0.0, length
    while left:
        m = min(block_tokens, left)
        outcomes = sorted(itertools.product((0, 1), repeat=m), key=sum)
        base = [math.prod(bits[b] for b in o) for o in outcomes]
        total += kl(best_of_k_law(base, k), base)
        left -= m
    assert total <= blockwise_bound(k, length, block_tokens)


def test_bad_input():
    with pytest.raises(InputError, match="k must be at least 1"):
        best_of_k_bound(0)
    with pytest.raises(InputError, match="block_tokens >= 1"):
        blockwise_bound(2, 4, 0)
