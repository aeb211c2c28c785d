"""The linear layers of a decode step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import linear as by_torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pyengine.ops.linear as linear_module
from pyengine.ops import LAUNCHES
from pyengine.ops.linear import FEW, SMALL, lent, linear, patch, quick_forwards, rms_norm, served, unpatch


def launches():
    return sum(n for name, n in LAUNCHES.items() if name.startswith("linear/"))


def problem(rows, outputs, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) for size in ((rows, width), (outputs, width), (outputs,)))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, FEW])
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (2, 15), (25, 64), (97, 200), (300, 77)])
def test_equals_the_product_in_fp64(isa, rows, outputs, width):
    """Sizes that divide no vector, block or part."""
    x, weight, bias = problem(rows, outputs, width)
    before = launches()
    for b in (None, bias):
        found = linear(x[None], weight, b)
        want = by_torch(x.double(), weight.double(), None if b is None else b.double())
        assert found.shape == (1, rows, outputs)
        torch.testing.assert_close(found[0].double(), want, atol=2e-6 * width**0.5, rtol=0)
    assert launches() == before + 2


def test_a_rows_bits_do_not_depend_on_the_batch_or_the_threads(isa):
    x, weight, bias = problem(FEW, 1500, 192)
    whole = linear(x, weight, bias)
    for rows in range(1, FEW):
        assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])
    assert torch.equal(linear(x[5:6], weight, bias), whole[5:6])
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x, weight, bias), whole)
    finally:
        torch.set_num_threads(1)


def test_reads_and_writes_nothing_beside_its_tensors(isa):
    """NaN on all sides; what is asked for ahead of time is not used."""
    for rows, outputs, width in ((3, 5, 19), (9, 49, 64)):
        around = [torch.full((size + 200,), torch.nan) for size in (rows * width, outputs * width)]
        given = list(problem(rows, outputs, width))
        x, weight = (
            store[100 : 100 + part.numel()].view_as(part).copy_(part)
            for store, part in zip(around, given[:2], strict=True)
        )
        assert torch.equal(linear(x, weight), linear(given[0], given[1]))
        given[0][1, width // 2] = torch.nan
        bad = linear(given[0], given[1]).isnan()
        assert bad[1].all()
        assert not bad[0].any()


def test_many_rows_none_and_strided_ones():
    for rows in (0, FEW + 1):
        x, weight, bias = problem(rows, 30, 48)
        before = launches()
        torch.testing.assert_close(linear(x, weight, bias), by_torch(x, weight, bias), atol=1e-5, rtol=1e-5)
        assert launches() == before
    x, weight, _ = problem(4, 30, 48)
    torch.testing.assert_close(linear(x[::2], weight), by_torch(x[::2], weight), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(x, weight[::2]), by_torch(x, weight[::2]), atol=1e-5, rtol=1e-5)


def test_norms_equal_transformers_own(isa):
    for width in (1, 7, 64, 300):
        norm = LlamaRMSNorm(width, eps=1e-5)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(2, 3, width) * torch.tensor([1e-4, 1.0, 1e4])[:, None]
        torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), norm(x), atol=1e-6, rtol=2e-6)
        x[0, 1, -1] = torch.nan
        bad = rms_norm(x, norm.weight, 1e-5).isnan().all(-1)
        assert bad.tolist() == [[False, True, False], [False] * 3]


@pytest.fixture
def any_cpu(monkeypatch):
    """Whoever made this machine's."""
    monkeypatch.setattr(linear_module, "quicker", lambda: True)


@torch.inference_mode()
def test_a_model_is_lent_its_linear_layers(any_cpu):
    layer = torch.nn.Sequential(torch.nn.Linear(48, 33), torch.nn.Linear(33, 20, bias=False))
    other = copy.deepcopy(layer).bfloat16()
    forwards = quick_forwards(layer)
    assert not quick_forwards(other)
    for rows in (7, 40):
        x = torch.randn(1, rows, 48)
        want = layer(x)
        with lent(forwards):
            assert "forward" in vars(layer[0])
            torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(layer(x.bfloat16()).float(), want, atol=0.1, rtol=0.1)
            with pytest.raises(RuntimeError):
                layer(x[..., 1:])
            layer[0].bias.add_(1)
            assert (layer(x) - want).abs().max() > 1e-3, "weights are read when they are used"
        assert "forward" not in vars(layer[0])
    layer.bfloat16()
    with lent(forwards):
        assert "forward" not in vars(layer[0])


def test_a_forward_that_its_owner_gives_between_two_passes_stays(any_cpu):
    layer = torch.nn.Sequential(torch.nn.Linear(48, 33), torch.nn.Linear(33, 20))
    forwards = served(quick_forwards(layer))
    assert len(forwards) == 2
    layer[0].forward = own = lambda x: x[..., :33]
    patch(forwards)
    assert vars(layer[0])["forward"] is own
    assert "forward" in vars(layer[1])
    unpatch(forwards)
    assert vars(layer[0])["forward"] is own
    assert "forward" not in vars(layer[1])


@torch.inference_mode()
def test_norms_are_told_by_what_they_do(any_cpu):
    """Gemma's multiplies by 1 + weight."""
    norm, gemma = LlamaRMSNorm(40, eps=1e-6), Gemma2RMSNorm(40)
    torch.nn.init.normal_(gemma.weight)
    model = torch.nn.ModuleList([norm, gemma, torch.nn.LayerNorm(40)])
    forwards = quick_forwards(model)
    assert [module for module, _ in forwards] == [norm]
    for x in (torch.randn(1, 3, 40), torch.randn(1, SMALL, 40), torch.randn(1, 40, 3).mT, torch.randn(1, 2, 40).half()):
        want = norm(x)
        with lent(forwards):
            torch.testing.assert_close(norm(x), want)
    with lent(forwards), pytest.raises(RuntimeError):
        norm(torch.randn(1, 3, 20))
