"""Log-probabilities of the likeliest tokens, against log_softmax in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from pyengine import ops
from pyengine.decode.logprobs import Logprob, listed, top_logprobs

N, V = 5, 300


def truth(logits, temperature, values=None, weights=None):
    x = logits.double() / temperature
    return (x if values is None else x + (weights.double()[:, None, None] * values.double()).sum(0)).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tilted", [False, True])
def test_they_are_log_softmax(dtype, tilted):
    torch.manual_seed(0)
    raw, bias = (torch.randn(N, V) * 3).to(dtype), torch.randn(N, V)
    logits = raw.float() + bias
    values, weights = (torch.randn(2, N, V).to(dtype), torch.tensor([1.5, -0.7])) if tilted else (None, None)
    heat = torch.tensor([1.0, 0.3, 2.0, 0.7, 0.0])
    token = torch.randint(V, (N,))
    top = top_logprobs(logits, token, 8, raw=raw, values=values, weights=weights, temperature=heat)
    policy = truth(logits, torch.where(heat == 0, 1.0, heat).double()[:, None], values, weights)
    base = raw.double().log_softmax(-1)
    assert torch.equal(top.token[:, 0], token)
    assert torch.equal(top.token[:, 1:], policy.argsort(-1, descending=True)[:, :8])
    torch.testing.assert_close(top.logprob.double(), policy.gather(1, top.token), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(top.base_logprob.double(), base.gather(1, top.token), atol=1e-5, rtol=1e-6)
    assert torch.equal(top.rank[:, 0], (policy > policy.gather(1, token[:, None])).sum(1) + 1)
    assert top.rank[:, 1:].tolist() == [list(range(1, 9))] * N


def test_without_filters_they_are_what_is_drawn_from():
    torch.manual_seed(1)
    logits, values, weights = torch.randn(N, V) * 3, torch.randn(2, N, V), torch.tensor([2.0, 0.0])
    logits[:, :9], values[0, :, 20:30], values[1, 0, 50], values[0, 3] = -math.inf, -math.inf, math.nan, -math.inf
    values[0, :3, 5] = math.inf  # of a token that is forbidden
    heat = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0])
    drawn = ops.tilt_sample(logits, values, weights, temperature=heat, seed=torch.arange(N))
    assert drawn.valid.all()
    top = top_logprobs(logits, drawn.token, V, values=values, weights=weights, temperature=heat)
    torch.testing.assert_close(top.logprob[:, 0], drawn.logp_policy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(top.logprob[:, 1:].exp().sum(1), torch.ones(N))
    plain = top_logprobs(logits, drawn.token, 0, values=values, weights=weights, temperature=heat)
    assert torch.equal(plain.logprob, top.logprob[:, :1])


def test_of_equals_the_lowest_id_comes_first():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, -0.0, 3.0, -2.0, -2.0]])
    top = top_logprobs(logits, torch.tensor([4]), 8)
    assert top.token.tolist() == [[4, 1, 3, 5, 0, 2, 4, 6, 7]]
    assert top.rank[0, 0] == 6


def test_each_row_has_what_it_asks_for():
    logits = torch.tensor([[0.0, 2.0, 1.0, -math.inf]]).repeat(5, 1)
    token = torch.tensor([1, 0, 0, 2, 0])
    rows = listed(top_logprobs(logits, token, 4), [None, 0, 2, 2, -1])
    assert [[(one.token, one.rank) for one in row] for row in rows] == [
        [],
        [(0, 3)],
        [(1, 1), (2, 2), (0, 3)],
        [(1, 1), (2, 2)],
        [(1, 1), (2, 2), (0, 3)],
    ]
    one = rows[3][0]
    assert one == Logprob(1, one.logprob, one.logprob, 1)
    assert math.isclose(one.logprob, 2 - math.log(1 + math.e**2 + math.e), rel_tol=1e-6)
