"""Gumbel noise: rows that arrive in tiles, and noise that belongs to (seed, position, id) alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from pyengine import ops, reference


@pytest.mark.parametrize("tile", [1024, 700, 37])
@pytest.mark.parametrize("heads", [0, 2])
def test_tiles_fold_into_the_whole_row(isa, tile, heads):
    """What the LM head does: the vocabulary arrives in tiles, here last to first, and no row is ever whole."""
    torch.manual_seed(tile)
    batch, vocab = 8, 2600
    logits = torch.randn(batch, vocab) * 3
    values = torch.randn(heads, batch, vocab) if heads else None
    weights = torch.randn(batch, heads).abs() if heads else None
    mask = torch.rand(batch, vocab) > 0.3
    mask[:, 1024:2100] &= torch.rand(batch, 1) > 0.5  # whole tiles
    temperature, seed = torch.rand(batch) + 0.5, torch.arange(batch)
    temperature[0] = 0.0
    logits[1, 3] = math.nan
    mask[1, 3] = True
    logits[2] -= 4000.0  # far below what an untouched state holds
    mask[3] = False
    if heads:
        values[:, 4] = -math.inf  # the scorer forbids all, the base policy decides
        values[:, 5, :2000] = -math.inf  # ... or all of the first tiles
    columns = {"temperature": temperature, "seed": seed, "position": torch.full((batch,), 7)}
    state = ops.tilt.tilt_state(batch)
    for first in reversed(range(0, vocab, tile)):
        part = slice(first, first + tile)
        tiles = (logits[:, part], None if values is None else values[..., part], weights, first)
        ops.tilt.tilt_fold(state, *tiles, **columns, mask=mask[:, part])
    found = ops.tilt.tilt_finish(state, temperature)
    no_filters = {"top_k": torch.zeros(batch).long(), "top_p": torch.ones(batch), "min_p": torch.zeros(batch)}
    whole = {**columns, **no_filters, "mask": mask, "method": "gumbel"}
    want = reference.tilt_sample(logits, values, weights, **whole)
    assert want.valid.tolist() == [True, False, True, False, True, True, True, True]
    assert torch.equal(found.token, want.token)
    assert torch.equal(found.valid, want.valid)
    for name in ("logp_base", "logp_policy", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), atol=1e-3, rtol=1e-5, equal_nan=True)
    assert torch.equal(ops.tilt_sample(logits, values, weights, **whole).token, found.token)


def test_noise_belongs_to_the_token(isa):
    """Coupling: the same seed and the same logits up to one token give the same draw unless that token wins."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(3)).expand(300, -1).contiguous()
    position = torch.arange(300)
    before = ops.tilt_sample(logits, seed=1, position=position, method="gumbel").token
    logits[:, 4000] += 4.0
    after = ops.tilt_sample(logits, seed=1, position=position, method="gumbel").token
    assert ((after == before) | (after == 4000)).all()
    assert 0 < (after != before).sum() < 100


def test_no_noise_table_hides_tokens(isa):
    """vllm#59786: a table of 2^20 noises leaves half of a large vocabulary unreachable."""
    logits = torch.zeros(2**17)
    tokens = ops.tilt_sample(logits.expand(3000, -1), seed=2, position=torch.arange(3000), method="gumbel").token
    assert stats.chisquare(torch.bincount(tokens // 2**15, minlength=4)).pvalue > 1e-4
    assert tokens.unique().numel() > 2900  # 34 collisions expected
