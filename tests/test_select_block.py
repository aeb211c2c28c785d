"""select_block: hard and soft selection."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from pyengine import ops


def test_argmax_with_ties_to_the_lowest_index():
    scores = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])[..., None]
    out = ops.select_block(scores)
    assert out.index.tolist() == [1, 0]
    assert out.probability.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert out.utility.tolist() == scores[..., 0].tolist()


def test_weighted_sum_of_scores():
    scores = torch.tensor([[[1.0, 4.0], [2.0, 1.0]]])
    assert ops.select_block(scores, torch.tensor([1.0, 0.0])).index.item() == 1
    assert ops.select_block(scores, torch.tensor([1.0, 1.0])).utility.tolist() == [[5.0, 3.0]]
    assert ops.select_block(scores, torch.tensor([1.0, -1.0])).index.item() == 1


def test_zero_weight_drops_a_score_that_is_not_finite():
    scores = torch.tensor([[[1.0, math.nan], [2.0, -math.inf]]])
    assert ops.select_block(scores, torch.tensor([1.0, 0.0])).utility.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_nan_ranks_as_minus_infinity(bad):
    scores = torch.tensor([[bad, -5.0, bad]])[..., None]
    assert ops.select_block(scores).index.item() == 1
    soft = ops.select_block(scores, beta=1.0)
    assert soft.index.item() == 1
    assert soft.probability.tolist() == [[0.0, 1.0, 0.0]]
    everything = ops.select_block(torch.full((1, 4, 1), bad), beta=1.0)
    assert everything.probability.tolist() == [[0.25] * 4]
    assert ops.select_block(torch.full((1, 4, 1), bad)).index.item() == 0


def test_softmax_draw_follows_its_law():
    scores, n = torch.tensor([0.0, 0.5, 1.0, -2.0]), 50_000
    out = ops.select_block(scores[None, :, None].expand(n, -1, -1), beta=0.7, seed=torch.arange(n), position=3)
    want = (scores.double() / 0.7).softmax(-1)
    torch.testing.assert_close(out.probability[0].double(), want, atol=1e-6, rtol=0)
    assert stats.chisquare(torch.bincount(out.index), want * n).pvalue > 1e-4


def test_selection_does_not_follow_the_token_draw():
    """The same (seed, position) serves both; the streams differ."""
    n = 20_000
    seed = torch.arange(n)
    token = ops.tilt_sample(torch.zeros(n, 10), seed=seed).token
    index = ops.select_block(torch.zeros(n, 10, 1), beta=1.0, seed=seed).index
    table = torch.zeros(10, 10).index_put_((token, index), torch.ones(n), accumulate=True)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_large_beta_is_the_base_policy_and_small_beta_the_argmax():
    scores = torch.randn(1, 6, 1)
    torch.testing.assert_close(ops.select_block(scores, beta=1e6).probability, torch.full((1, 6), 1 / 6))
    assert ops.select_block(scores, beta=1e-6).index.item() == scores.argmax().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": torch.zeros(2, 3)}, r"\[B, K, R\]"),
        ({"scores": torch.zeros(2, 0, 1)}, r"\[B, K, R\]"),
        ({"scores": torch.zeros(2, 3, 1), "beta": -1.0}, "beta"),
        ({"scores": torch.zeros(2, 3, 1), "beta": math.nan}, "beta"),
        ({"scores": torch.zeros(2, 3, 2), "weights": torch.ones(3)}, "weights"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.select_block(**arguments)
