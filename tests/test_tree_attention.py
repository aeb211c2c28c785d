"""tree_attention: the kernel and the fallback against the reference, and what must not change a row."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pyengine import ops, reference

PAGE, LEAF = 64, 16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative to values of size 1


@dataclass
class Problem:
    """Everything that `tree_attention` takes; what no row may read is NaN."""

    query: torch.Tensor
    stores: tuple[torch.Tensor, ...]
    tree: ops.Tree
    key: torch.Tensor
    value: torch.Tensor

    def __call__(self, op=ops.tree_attention, **options):
        return op(self.query, *self.stores, self.tree, **options)

    def appending(self, **options):
        return self(key=self.key, value=self.value, **options)


def ragged(rows, tokens, longest, g):
    """Tail lengths, the new tokens among them: the first is the longest, and of many rows the second is idle."""
    tails = torch.randint(tokens, longest + 1, (rows,), generator=g)
    tails[0] = longest
    if rows > 2:
        tails[1] = 0
    return tails.tolist()


def laid(contents, table, size, count, dense):
    """A store [count, Hkv, size, D] of sequences [Hkv, T, D] in the pages or leaves of a table. dense: with tokens side
    by side in memory."""
    heads, _, width = contents[0].shape
    store = torch.full((count, heads, width, size) if dense else (count, heads, size, width), math.nan).mT
    store = (store if dense else store.mT).to(contents[0].dtype)
    for own, content in zip(table, contents, strict=True):
        for piece, at in zip(content.split(size, 1), own, strict=False):
            store[at, :, : piece.shape[1]] = piece
    return store


def problem(
    lengths=(150, 64, 5),
    branches=(3, 1, 2),
    tokens=1,
    tail=39,
    heads=(6, 2),
    width=32,
    dtype=torch.float32,
    kernel=True,
    leaf=LEAF,
):
    """tail: the longest. Leaves are shuffled, every other row has one to spare, an idle row has none. kernel: keys lie
    with tokens side by side, as the CPU kernel reads them; else with width side by side."""
    g = torch.Generator().manual_seed(sum(lengths) + 10 * tail + tokens)
    rows, most = sum(branches), max(-(-n // PAGE) for n in lengths)
    tails = ragged(rows, tokens, tail, g)
    query = 2 * torch.randn(rows, tokens, heads[0], width, generator=g)
    query[[row for row in range(rows) if not tails[row]]] = math.nan
    keys, values = (
        [torch.randn(heads[1], n, width, generator=g).to(dtype) for n in (*lengths, *tails)] for _ in range(2)
    )
    pages = torch.randperm(most * len(lengths) + 2, generator=g)[:-2].view(len(lengths), most)
    each = [(-(-n // leaf) + row % 2) * (n > 0) for row, n in enumerate(tails)]
    pool = torch.randperm(sum(each) + 2, generator=g).split([*each, 2])[:-1]
    leaves = torch.nn.utils.rnn.pad_sequence(pool, batch_first=True, padding_value=-1)
    b = len(lengths)
    stores = (
        *(laid(x[:b], pages, PAGE, pages.numel() + 2, dense) for x, dense in ((keys, kernel), (values, False))),
        *(laid(x[b:], leaves, leaf, sum(each) + 2, dense) for x, dense in ((keys, kernel), (values, False))),
    )
    tables = (pages, lengths, [0, *itertools.accumulate(branches)], leaves, tails)
    tree = ops.Tree(*(torch.as_tensor(x, dtype=torch.int32) for x in tables))
    new = [torch.full((rows, tokens, heads[1], width), math.nan, dtype=dtype) for _ in range(2)]
    for to, contents in zip(new, (keys, values), strict=True):
        for row, content in enumerate(contents[b:]):
            to[row, : content.shape[1]] = content[:, -tokens:].transpose(0, 1)
    return Problem(query.to(dtype), stores, tree, *new)


def sequence(p, b, row, which):
    """Keys (0) or values (1) of a row's prefix and tail, [Hkv, T, D]."""
    parts = (
        (p.stores[which], p.tree.pages[b], int(p.tree.prefix_len[b])),
        (p.stores[2 + which], p.tree.leaves[row], int(p.tree.tail_len[row])),
    )
    return torch.cat([torch.cat([store[i] for i in table if i >= 0], 1)[:, :n] for store, table, n in parts if n], 1)


def new_places(p):
    """(row, new token, leaf, offset in it) of what is to be written."""
    leaf, tokens = p.stores[2].shape[2], p.query.shape[1]
    places = [
        (row, s, int(p.tree.leaves[row, (tail - tokens + s) // leaf]), (tail - tokens + s) % leaf)
        for row, tail in enumerate(p.tree.tail_len.tolist())
        for s in range(tokens)
        if tail
    ]
    return torch.tensor(places).T


SHAPES = {
    "decode": {},
    "long, several splits": {"lengths": (1300, 520), "branches": (4, 2)},
    "new tokens": {"tokens": 5},
    "long tails": {"tail": 300, "tokens": 3, "branches": (4, 1, 3)},
    "a whole tail of new tokens": {"tokens": 70, "tail": 70, "lengths": (70, 200), "branches": (2, 1), "heads": (2, 1)},
    "no prefix": {"lengths": (0, 3), "branches": (1, 2)},
    "MHA": {"heads": (4, 4)},
    "MQA, width 80": {"heads": (5, 1), "width": 80},
    "width 256": {"width": 256, "lengths": (90,), "branches": (5,)},
    "more rows than a unit": {"branches": (40, 1, 2), "heads": (8, 2)},
    "a prompt without branches": {"branches": (2, 0, 1)},
    "leaves of a page": {"leaf": 64, "tail": 90},
    "leaves that straddle tiles": {"leaf": 48, "tail": 150, "tokens": 4},
}
OPTIONS = {
    "plain": {},
    "window": {"window": 40},
    "window shorter than the tail": {"window": 3},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 5.0, "sinks": True, "scale": 0.3},
}


def with_sinks(options, p):
    sinks = torch.linspace(-1, 4, p.query.shape[2]) if options.get("sinks") else None
    return options | {"sinks": sinks}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_and_the_fallback_equal_the_reference(shape, options, isa):
    for kernel in (True, False):
        p = problem(**SHAPES[shape], kernel=kernel)
        chosen = with_sinks(OPTIONS[options], p)
        before = ops.LAUNCHES.copy()
        found = p(**chosen)
        assert ops.LAUNCHES - before == {f"tree_attention/{isa if kernel else 'sdpa'}": 1}
        assert not found[p.tree.tail_len == 0].any()
        torch.testing.assert_close(found, p(reference.tree_attention, **chosen), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_the_reference_is_attention_over_each_row_alone(window):
    p = problem(tokens=3, heads=(4, 2))
    found = p(reference.tree_attention, window=window)
    for b, rows in enumerate(itertools.pairwise(p.tree.first_row.tolist())):
        for row in range(*rows):
            if not p.tree.tail_len[row]:
                assert torch.equal(found[row], torch.zeros(3, 4, 32))
                continue
            key, value = (sequence(p, b, row, which).repeat_interleave(2, 0) for which in (0, 1))
            seen = torch.ones(3, key.shape[1], dtype=torch.bool).tril(key.shape[1] - 3)
            seen &= ~seen.new_ones(seen.shape).tril(key.shape[1] - 3 - (window or key.shape[1]))
            want = scaled_dot_product_attention(p.query[row].transpose(0, 1), key, value, attn_mask=seen)
            torch.testing.assert_close(found[row].transpose(0, 1), want, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, kernel, isa):
    p = problem(dtype=dtype, kernel=kernel, tokens=2)
    want = p(reference.tree_attention).float()
    assert (p().float() - want).abs().max() <= (TOLERANCE[dtype] if kernel else 3 * TOLERANCE[dtype])


def test_fp16_rounds_as_torch_does():
    """One key: the output is the value itself, over the whole range of the type."""
    p = problem(lengths=(0,), branches=(1,), tail=1, heads=(1, 1), width=256, dtype=torch.float16)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(-1, 256)
    for row in bits:
        p.stores[3][p.tree.leaves[0, 0], 0, 0] = row
        want = torch.where(row.isfinite(), row, torch.nan)  # inf * 1 / 1 is inf; NaN stays NaN
        found = p()[0, 0, 0]
        assert torch.equal(found[row.isfinite()], want[row.isfinite()])
        assert (found[row.isnan()]).isnan().all()


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_halves_are_rounded_to_the_nearest(dtype, digits, isa):
    """Two tokens of equal weight: half a unit in the last place from the mean of their values, not one."""
    p = problem(lengths=(0,), branches=(1,), tail=2, heads=(1, 1), width=256, dtype=dtype)
    p.query.zero_()
    values = (torch.rand(2, 256, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    p.stores[3][p.tree.leaves[0, 0], 0, :2] = values
    p.stores[2][p.tree.leaves[0, 0], 0, :2] = 0
    mean = values.double().mean(0)
    unit = 2.0 ** (mean.abs().log2().floor() - digits)
    off = (p()[0, 0, 0].double() - mean).abs() / unit
    assert off.max() <= 0.51
    assert off.mean() > 0.1, "nothing was rounded"


@pytest.mark.parametrize("kernel", [True, False])
def test_new_keys_and_values_join_the_tails(kernel, isa):
    """In their places, of which some rows have two leaves; and nothing else is written, for an idle row neither."""
    p = problem(tokens=20, tail=39, kernel=kernel)
    want = p()
    row, token, leaf, inside = new_places(p)
    before = [store.clone() for store in p.stores]
    for store in p.stores[2:]:
        store[leaf, :, inside] = math.nan
    assert torch.equal(p.appending(), want)
    for store, new in zip(p.stores[2:], (p.key, p.value), strict=True):
        assert torch.equal(store[leaf, :, inside], new[row, token])
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, p.stores, strict=True))


@pytest.mark.parametrize("kernel", [True, False])
def test_rows_that_are_all_idle_write_nothing(kernel):
    p = problem(kernel=kernel)
    p.tree = p.tree._replace(tail_len=torch.zeros_like(p.tree.tail_len))
    before = [store.clone() for store in p.stores]
    assert torch.equal(p.appending(), torch.zeros_like(p.query))
    p.tree = p.tree._replace(leaves=p.tree.leaves[:, :0])
    assert torch.equal(p.appending(), torch.zeros_like(p.query))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, p.stores, strict=True))


def only(p, b):
    """Prompt b alone."""
    rows = slice(*p.tree.first_row[b : b + 2].tolist())
    tree = ops.Tree(
        p.tree.pages[b : b + 1],
        p.tree.prefix_len[b : b + 1],
        torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        p.tree.leaves[rows],
        p.tree.tail_len[rows],
    )
    return Problem(p.query[rows], p.stores, tree, p.key[rows], p.value[rows]), rows


@pytest.mark.parametrize("window", [None, 90])
def test_a_row_depends_on_nothing_but_itself(window, isa):
    """Bit for bit: alone, with its branches in another order, or on several threads."""
    p = problem(lengths=(1300, 70, 600), branches=(5, 2, 3), heads=(8, 2), width=64, tail=100, tokens=2)
    want, before = p(window=window), torch.get_num_threads()
    for b in range(3):
        alone, rows = only(p, b)
        assert torch.equal(alone(window=window), want[rows])
        order = torch.randperm(rows.stop - rows.start, generator=torch.Generator().manual_seed(b))
        tree = alone.tree
        alone.query = alone.query[order]
        alone.tree = tree._replace(leaves=tree.leaves[order], tail_len=tree.tail_len[order])
        assert torch.equal(alone(window=window), want[rows][order])
    torch.set_num_threads(3)
    try:
        assert torch.equal(p(window=window), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 30, 90])
def test_a_row_does_not_depend_on_the_tails_of_others(window, isa):
    """Bit for bit: the others have shorter tails, tails of the new tokens alone, or none."""
    p = problem(lengths=(1100,), branches=(6,), heads=(4, 2), tail=150, tokens=2)
    want, tails = p(window=window), p.tree.tail_len
    assert len(set(tails.tolist())) > 4
    for row in range(6):
        for others in (tails // 2 + (tails > 0), torch.full_like(tails, 2) * (tails > 0), torch.zeros_like(tails)):
            changed = others.clone()
            changed[row] = tails[row]
            p.tree = p.tree._replace(tail_len=changed)
            assert torch.equal(p(window=window)[row], want[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_leaves(dtype, isa):
    """Bit for bit: one leaf for all of a tail, or many, which straddle the tiles of the kernel or do not."""
    shape = {"tail": 150, "tokens": 3, "heads": (4, 2), "dtype": dtype}
    want = problem(**shape, leaf=160)(window=100)
    for leaf in (16, 48, 64):
        assert torch.equal(problem(**shape, leaf=leaf)(window=100), want)


def test_a_strided_query_as_the_models_give_it():
    p = problem(tokens=1)
    heads_first = p.query[:, 0].transpose(0, 1).contiguous()  # [Hq, N, D]
    want = p()
    p.query = heads_first.transpose(0, 1)[:, None]
    assert torch.equal(p(), want)


def test_a_nan_in_a_visible_key_shows():
    p = problem()
    p.stores[2][p.tree.leaves[0, 1], 0, 2] = math.nan
    found = p()
    assert found[0, :, :3].isnan().all()
    assert found[1:].isfinite().all()
    assert found[0, :, 3:].isfinite().all()


def test_opcheck_and_fullgraph():
    p = problem()
    arguments = (p.query, p.key, p.value, *p.stores, *p.tree, 0.2, 0, 0.0, None)
    torch.library.opcheck(torch.ops.pyengine.tree_attention, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda: p.appending(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), p.appending())


def test_a_scale_of_zero_is_zero():
    """All visible tokens then weigh alike, whatever served them."""
    for options in ({}, {"softcap": 3.0}, {"sinks": torch.zeros(6)}):
        found = [problem(kernel=kernel)(scale=0.0, **options) for kernel in (True, False)]
        want = problem()(reference.tree_attention, scale=0.0, **options)
        for x in found:
            torch.testing.assert_close(x, want, atol=5e-6, rtol=1e-5)
