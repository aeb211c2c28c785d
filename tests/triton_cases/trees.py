"""tree_attention in Triton against pyengine.reference, on the problems of tests/test_tree_attention.py."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from rig import BF16, DEVICE, FP16, on_device

from pyengine import reference
from pyengine.kernels import tree_attention

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on log2(0) and inf - inf


def _tree_problems():
    """tests/test_tree_attention.py, whose problems serve here too."""
    spec = importlib.util.spec_from_file_location("tree_problems", Path(__file__).parents[1] / "test_tree_attention.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TREES = _tree_problems()
LARGE = ("more rows than a unit", "width 256")
# The interpreter pays for every 16 tokens of a tail, and seven such tiles show it what nineteen do.
SHORTER = {"long tails": {"tail": 100}, "leaves that straddle tiles": {"tail": 100}} if DEVICE == "cpu" else {}


def run_tree(p, append=False, scale=None, window=None, softcap=None, sinks=None):
    """The wrapper on the device; `append` lets the kernel write the new keys and values."""
    stores = on_device(*p.stores)
    if append:
        _, _, leaf, inside = on_device(*TREES.new_places(p))
        for store in stores[2:]:
            store[leaf, :, inside] = math.nan
    new = on_device(p.key, p.value) if append else (None, None)
    scale = scale or p.query.shape[3] ** -0.5
    query, sinks = on_device(p.query, sinks)
    found = tree_attention.tree_attention(
        query, *new, *stores, *on_device(*p.tree), scale, window or 0, softcap or 0.0, sinks
    )
    for store, given in zip(stores, p.stores, strict=True):
        assert torch.equal(store.cpu().nan_to_num(7), given.nan_to_num(7)), "not only the new tokens were written"
    return found.cpu()


def cases():
    """(shape, options): all pairs on a GPU; interpreted, which is slow, no option, all and one in turn."""
    shapes = [s for s in TREES.SHAPES if s not in LARGE]
    single = [name for name in TREES.OPTIONS if name not in ("plain", "all")]
    for i, shape in enumerate(shapes):
        few = ("all",) if shape == "a whole tail of new tokens" else ("plain", single[i % len(single)], "all")
        for options in TREES.OPTIONS if DEVICE == "cuda" else few:
            yield shape, options


@pytest.mark.parametrize(("shape", "options"), cases())
def test_tree_attention(shape, options):
    p = TREES.problem(**TREES.SHAPES[shape] | SHORTER.get(shape, {}), kernel=options != "plain")
    chosen = TREES.with_sinks(TREES.OPTIONS[options], p)
    found = run_tree(p, append=options in ("plain", "window"), **chosen)
    torch.testing.assert_close(found, p(reference.tree_attention, **chosen), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    itertools.product(LARGE, (BF16, FP16)) if DEVICE == "cuda" else zip(LARGE, (BF16, FP16), strict=True),
)
def test_tree_attention_in_half_precision(shape, dtype):
    p = TREES.problem(**TREES.SHAPES[shape], dtype=dtype)
    want = p(reference.tree_attention).float()
    assert (run_tree(p, append=True).float() - want).abs().max() <= 3 * TREES.TOLERANCE[dtype]


def test_a_branch_of_tree_attention_depends_on_nothing_but_itself():
    """Bit for bit: a prompt alone, its branches in another order, the others with other tails or none."""
    p = TREES.problem(lengths=(300, 70), branches=(4, 2), tail=40)
    want, tails = run_tree(p, window=60), p.tree.tail_len
    for b in range(2):
        alone, rows = TREES.only(p, b)
        tables = {name: getattr(alone.tree, name).flip(0) for name in ("leaves", "tail_len")}
        alone.query, alone.tree = alone.query.flip(0), alone.tree._replace(**tables)
        assert torch.equal(run_tree(alone, window=60).flip(0), want[rows])
    for row in (0, 3):
        for others in (tails.clamp(max=3), torch.zeros_like(tails)):
            others[row] = tails[row]
            p.tree = p.tree._replace(tail_len=others)
            assert torch.equal(run_tree(p, window=60)[row], want[row])


def test_long_prefixes_are_split_by_their_own_length():
    """Eight splits of 256 tokens, then of 512 and of 1,024; a batch changes no bit of a shorter prefix."""
    p = TREES.problem(lengths=(4200, 2100, 2000), branches=(1, 2, 1), tail=5, heads=(2, 1), width=16, kernel=False)
    found = run_tree(p)
    torch.testing.assert_close(found, p(reference.tree_attention), atol=1e-5, rtol=1e-5)
    for b in (1, 2):
        alone, rows = TREES.only(p, b)
        assert torch.equal(run_tree(alone), found[rows])
