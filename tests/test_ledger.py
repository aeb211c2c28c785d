"""KL bounds and laws against enumeration, win rates, and the weight that a budget buys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyengine import InputError
from pyengine.ledger import (
    best_of_k_bound,
    best_of_k_law,
    blockwise_bound,
    divergence,
    expected_reward,
    solve_weight,
    win_rate,
)


def best_of_k_kl(base, k):
    """KL of best-of-k where outcome i is better than all before it."""
    p = torch.tensor(base, dtype=torch.float64)
    return divergence(best_of_k_law(p, torch.arange(len(base)), k), p)


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
    assert best_of_k_kl(base, k) <= best_of_k_bound(k) + 1e-12


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 10.0])
def test_enumerated_soft_selection_stays_below_the_same_bound(beta):
    base, utility = [0.2, 0.5, 0.1, 0.2], [0.0, 0.4, 1.0, 2.0]
    assert divergence(torch.tensor(soft_selection_law(base, utility, 4, beta)), torch.tensor(base)) <= best_of_k_bound(
        4
    )


def test_printed_blockwise_bound_is_false_and_ceil_holds():
    """Two one-token responses, K = 2, M = 4."""
    exact = best_of_k_kl([0.5, 0.5], 2)
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
        total += best_of_k_kl(base, k)
        left -= m
    assert total <= blockwise_bound(k, length, block_tokens)


def test_bad_input():
    with pytest.raises(InputError, match="k must be a whole number of at least 1"):
        best_of_k_bound(0)
    with pytest.raises(InputError, match="block_tokens >= 1"):
        blockwise_bound(2, 4, 0)
    with pytest.raises(InputError, match="sum to 1, not"):
        best_of_k_law(torch.tensor([0.5, 0.4]), torch.tensor([0.0, 1.0]), 2)
    with pytest.raises(InputError, match="outcome 1 is NaN"):
        best_of_k_law(torch.tensor([0.5, 0.5]), torch.tensor([0.0, math.nan]), 2)
    with pytest.raises(InputError, match="prompt 1: a reward is NaN"):
        win_rate([0.0, math.nan], [0.0, 0.0])
    with pytest.raises(InputError, match="2 prompts against 3"):
        expected_reward([0.0, 1.0], [0.0, 0.0, 1.0])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_law_of_best_of_k_is_the_enumerated_one(k):
    """Ties go to the first of the draws, as the engine's argmax does; an outcome of base mass 0 stays at 0."""
    base, reward = torch.tensor([0.3, 0.0, 0.2, 0.4, 0.1]), torch.tensor([1.0, 9.0, 0.5, 1.0, -2.0])
    law = torch.zeros(5, dtype=torch.float64)
    for draw in itertools.product(range(5), repeat=k):
        law[max(draw, key=lambda i: reward[i].item())] += math.prod(base[i].item() for i in draw)
    torch.testing.assert_close(best_of_k_law(base, reward, k), law, atol=1e-7, rtol=0)


def test_two_equal_outcomes_cost_log_two_where_the_bound_diverges():
    assert best_of_k_kl([0.5, 0.5], 200) == pytest.approx(math.log(2), abs=1e-9)


def test_a_policy_wins_against_itself_where_it_does_not_tie():
    reward = torch.tensor([[0.0, 0.0, 1.0, 2.0]])
    found = win_rate(reward, reward)
    assert found.tie == pytest.approx(6 / 16)
    assert found.win == pytest.approx((1 - found.tie) / 2)


@pytest.mark.parametrize("k", [2, 8])
def test_best_of_k_wins_at_most_k_of_k_plus_one(k):
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(4000, k, generator=g).amax(1), torch.rand(4000, generator=g)
    found = win_rate(ours, theirs)
    assert found.win == pytest.approx(k / (k + 1), abs=4 * found.error)
    assert found.tie == 0


def test_expected_reward_is_in_standard_deviations_of_the_base():
    found = expected_reward([3.0, 5.0], [[0.0, 2.0], [4.0, 6.0]])
    assert (found.mean, found.gain, found.error) == (4.0, 1.0, 1.0)
    assert found.normalised == pytest.approx(1 / torch.tensor([0.0, 2.0, 4.0, 6.0]).std().item())
    assert math.isnan(expected_reward([1.0, 1.0], [0.0, 0.0]).normalised)


def tilted_kl(logits, values, weight, temperature):
    base = torch.log_softmax(logits.double() / temperature, -1)
    shifted = values.double() - values.double().amax(-1, keepdim=True)  # a weight may be 1e9
    tilted = torch.log_softmax(base + (weight.double()[:, None] * shifted), -1)
    return torch.where(tilted > -torch.inf, tilted.exp() * (tilted - base), 0.0).sum(-1)


@pytest.mark.parametrize("budget", [1e-6, 0.01, 0.5, 3.0])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_the_solved_weight_spends_the_budget(budget, scale, spread):
    g = torch.Generator().manual_seed(0)
    logits, values = spread * torch.randn(64, 500, generator=g), scale * torch.randn(64, 500, generator=g)
    temperature = torch.rand(64, generator=g) + 0.5
    found = tilted_kl(logits, values, solve_weight(logits, values, budget, temperature), temperature[:, None])
    most = -torch.log_softmax(logits / temperature[:, None], -1).gather(1, values.argmax(-1, keepdim=True))[:, 0]
    assert (most > budget).sum() > 55
    torch.testing.assert_close(found, most.double().clamp(max=budget), atol=0, rtol=0.01)


def test_the_solver_at_its_edges():
    """Forbidden tokens, padded vocabulary, equal values, a single token, a budget beyond what a tilt can cost."""
    inf = math.inf
    logits = torch.tensor([[0.0, 0.0, 0.0, -inf]] * 4 + [[0.0, -inf, -inf, -inf]])
    values = torch.tensor([[0.0, 1.0, -inf, 5.0], [2.0, 2.0, 2.0, 9.0], [0.0, 1.0, 2.0, 9.0], [-inf] * 4, [1.0] * 4])
    weight = solve_weight(logits, values, torch.tensor([0.5, 0.1, 50.0, 0.1, 0.1]))
    assert weight.isfinite().all()
    assert weight[[1, 3, 4]].tolist() == [0, 0, 0]
    kl = tilted_kl(logits[[0, 2]], torch.where(logits == -inf, -inf, values)[[0, 2]], weight[[0, 2]], 1.0)
    torch.testing.assert_close(kl, torch.tensor([0.5, math.log(3)]).double(), atol=0, rtol=0.01)


@pytest.mark.parametrize("worst", [-1e6, -1e9, torch.finfo(torch.float32).min])
def test_a_finite_mask_among_the_values_leaves_the_budget(worst):
    logits, values = torch.zeros(1, 5), torch.tensor([[0.0, 1.0, 2.0, 3.0, worst]])
    found = tilted_kl(logits, values, solve_weight(logits, values, 0.3), 1.0)
    assert found.item() == pytest.approx(0.3, rel=0.01)


def test_heavy_tails_are_solved():
    """Values over ten orders of magnitude."""
    g = torch.Generator().manual_seed(0)
    logits, values = 4 * torch.randn(500, 200, generator=g), torch.exp(6 * torch.randn(500, 200, generator=g))
    found = tilted_kl(logits, values, solve_weight(logits, values, 0.1), 1.0)
    most = -torch.log_softmax(logits.double(), -1).gather(1, values.argmax(-1, keepdim=True))[:, 0]
    torch.testing.assert_close(found, most.clamp(max=0.1), atol=0, rtol=0.01)


@pytest.mark.parametrize("rest", [[0.0, 0.0], [0.0, 1.0]])
def test_forbidden_tokens_stay_forbidden_where_that_costs_more_than_the_budget(rest):
    logits, values = torch.zeros(1, 4), torch.tensor([[*rest, -math.inf, -math.inf]])
    weight = solve_weight(logits, values, 0.01)
    assert weight.item() > 0
    assert torch.softmax(logits + weight * values, -1)[0, 2:].tolist() == [0, 0]


def test_nothing_is_copied_from_the_host(monkeypatch):
    """A CUDA graph cannot hold a copy: numbers are filled in on the device."""
    monkeypatch.setattr(torch, "as_tensor", None)
    monkeypatch.setattr(torch, "tensor", None)
    assert solve_weight(torch.zeros(1, 3), torch.eye(3)[:1], 0.1, 0.7).item() > 0


def test_equal_rewards_of_the_base_have_no_standard_deviation():
    assert math.isnan(expected_reward([0.2] * 24, [0.1] * 24).normalised)
