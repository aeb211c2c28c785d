"""tree_attention: the kernel and the fallback against the reference, and what must not change a row."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyengine import ops, reference
from pyengine.ops.tree_attention import prepare, run_prepared

PAGE = 64
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


def problem(
    lengths=(150, 64, 5), branches=(3, 1, 2), tokens=1, tail=7, heads=(6, 2), width=32, dtype=torch.float32, kernel=True
):
    """kernel: keys with tokens side by side, as the CPU kernel reads them; else with width side by side."""
    g = torch.Generator().manual_seed(sum(lengths) + 10 * tail + tokens)
    most, rows = max(-(-n // PAGE) for n in lengths), sum(branches)
    count, slots, room = most * len(lengths) + 2, rows + 2, -(-tail // 16) * 16
    shuffled = torch.randperm(count, generator=g)[: most * len(lengths)].view(len(lengths), most)
    slot = torch.randperm(slots, generator=g)[:rows]

    def store(at, inner, dense):
        out = torch.full((at, heads[1], width, inner) if dense else (at, heads[1], inner, width), math.nan, dtype=dtype)
        return out.transpose(2, 3) if dense else out

    stores = tuple(store(n, i, dense) for n, i in ((count, PAGE), (slots, room)) for dense in (kernel, False))
    for store_ in stores[:2]:
        for table, length in zip(shuffled, lengths, strict=True):
            for start in range(0, length, PAGE):
                n = min(PAGE, length - start)
                store_[table[start // PAGE], :, :n] = torch.randn(heads[1], n, width, generator=g).to(dtype)
    for store_ in stores[2:]:
        store_[slot, :, :tail] = torch.randn(rows, heads[1], tail, width, generator=g).to(dtype)
    tree = ops.Tree(
        shuffled.int(),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(branches)], dtype=torch.int32),
        slot.int(),
        torch.tensor(tail, dtype=torch.int32),
    )
    query = 2 * torch.randn(rows, tokens, heads[0], width, generator=g)
    new = [s[slot, :, tail - tokens : tail].transpose(1, 2).clone() for s in stores[2:]]
    return Problem(query.to(dtype), stores, tree, *new)


SHAPES = {
    "decode": {},
    "long, several splits": {"lengths": (1300, 520), "branches": (4, 2)},
    "new tokens": {"tokens": 5},
    "a whole tail of new tokens": {"tokens": 70, "tail": 70, "lengths": (70, 200), "branches": (2, 2)},
    "no prefix": {"lengths": (0, 3), "branches": (1, 2)},
    "MHA": {"heads": (4, 4)},
    "MQA, width 80": {"heads": (5, 1), "width": 80},
    "width 256": {"width": 256, "lengths": (90,), "branches": (5,)},
    "more rows than a unit": {"branches": (40, 1, 2), "heads": (8, 2)},
    "a prompt without branches": {"branches": (2, 0, 1)},
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
        torch.testing.assert_close(found, p(reference.tree_attention, **chosen), atol=5e-6, rtol=1e-5)


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
        p.stores[3][int(p.tree.slot[0]), 0, 0] = row
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
    p.stores[3][int(p.tree.slot[0]), 0, :2] = values
    p.stores[2][int(p.tree.slot[0]), 0, :2] = 0
    mean = values.double().mean(0)
    unit = 2.0 ** (mean.abs().log2().floor() - digits)
    off = (p()[0, 0, 0].double() - mean).abs() / unit
    assert off.max() <= 0.51
    assert off.mean() > 0.1, "nothing was rounded"


@pytest.mark.parametrize("kernel", [True, False])
def test_new_keys_and_values_join_the_tails(kernel, isa):
    p = problem(tokens=3, kernel=kernel)
    want = p()
    for store in p.stores[2:]:
        store[p.tree.slot.long(), :, 4:7] = math.nan
    assert torch.equal(p.appending(), want)
    for store, new in zip(p.stores[2:], (p.key, p.value), strict=True):
        assert torch.equal(store[p.tree.slot.long(), :, 4:7], new.transpose(1, 2))
    untouched = sorted(set(range(len(p.stores[2]))) - set(p.tree.slot.tolist()))
    assert p.stores[2][untouched].isnan().all()
    assert p.stores[3][untouched].isnan().all()


def only(p, b):
    """Prompt b alone."""
    rows = slice(*p.tree.first_row[b : b + 2].tolist())
    tree = ops.Tree(
        p.tree.pages[b : b + 1],
        p.tree.prefix_len[b : b + 1],
        torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        p.tree.slot[rows].contiguous(),
        p.tree.tail_len,
    )
    return Problem(p.query[rows], p.stores, tree, p.key[rows], p.value[rows]), rows


def test_a_row_depends_on_nothing_but_itself(isa):
    """Bit for bit: alone, with its branches in another order, or on several threads."""
    p = problem(lengths=(1300, 70, 600), branches=(5, 2, 3), heads=(8, 2), width=64)
    want, before = p(), torch.get_num_threads()
    for b in range(3):
        alone, rows = only(p, b)
        assert torch.equal(alone(), want[rows])
        order = torch.randperm(rows.stop - rows.start, generator=torch.Generator().manual_seed(b))
        alone.query, alone.tree = alone.query[order], alone.tree._replace(slot=alone.tree.slot[order])
        assert torch.equal(alone(), want[rows][order])
    torch.set_num_threads(3)
    try:
        assert torch.equal(p(), want)
    finally:
        torch.set_num_threads(before)


def test_a_strided_query_as_the_models_give_it():
    p = problem(tokens=1)
    heads_first = p.query[:, 0].transpose(0, 1).contiguous()  # [Hq, N, D]
    want = p()
    p.query = heads_first.transpose(0, 1)[:, None]
    assert torch.equal(p(), want)


def test_a_nan_in_a_visible_key_shows():
    p = problem()
    p.stores[2][int(p.tree.slot[0]), 0, 2] = math.nan
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"sinks": torch.zeros(5)}, r"sinks must have shape \[6\]"),
        ({"key": torch.zeros(6, 1, 2, 32)}, "both key and value"),
        ({"key": torch.zeros(6, 1, 2, 31), "value": torch.zeros(6, 1, 2, 32)}, "key must be torch.float32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"tree_attention: .*{message}"):
        problem()(**change)


def test_a_tree_that_would_be_read_out_of_bounds_is_refused():
    p = problem()
    p.tree = p.tree._replace(slot=p.tree.slot.long())
    with pytest.raises(ValueError, match=r"tree\.slot must be int32"):
        p()
    for tail in (0, 17):
        p = problem()
        p.tree = p.tree._replace(tail_len=torch.tensor(tail, dtype=torch.int32))
        with pytest.raises(ValueError, match=f"tail_len is {tail}: .* room for 16"):
            p()


def set_entry(**entries):
    """The tree of a problem with entries (table, index) -> value."""

    def change(p):
        tables = p.tree._asdict()
        for name, (index, value) in entries.items():
            tables[name] = tables[name].clone()
            tables[name][index] = value
        return p.tree._replace(**tables)

    return change


WRONG_TABLES = {
    "slot below": (set_entry(slot=(2, -1)), r"tree\.slot\[2\] is -1, there are 8 tails"),
    "slot above": (set_entry(slot=(5, 8)), r"tree\.slot\[5\] is 8, there are 8 tails"),
    "slot twice": (lambda p: p.tree._replace(slot=p.tree.slot[[0, 1, 2, 3, 4, 0]]), r"slot\[5\] is .*another row has"),
    "page below": (set_entry(pages=((0, 1), -1)), r"tree\.pages\[0\] is -1, there are 6 pages"),
    "page above": (set_entry(pages=((1, 0), 6)), r"tree\.pages\[1\] is 6, there are 6 pages"),
    "prefix longer than its pages": (set_entry(prefix_len=(0, 129)), r"prefix_len\[0\] is 129, its pages hold 128"),
    "negative prefix": (set_entry(prefix_len=(1, -1)), r"prefix_len\[1\] is -1"),
    "too few page columns": (lambda p: p.tree._replace(pages=p.tree.pages[:, :1]), r"its pages hold 64 tokens"),
    "too few page rows": (lambda p: p.tree._replace(pages=p.tree.pages[:1]), "tree has .*pages"),
    "first row above": (set_entry(first_row=(1, 7)), r"first_row\[1\] is 7, it must be in 0 \.\. 6"),
    "first row back": (set_entry(first_row=(1, -2)), r"first_row\[1\] is -2, it must be in 0 \.\. 6"),
    "first row not 0": (set_entry(first_row=(0, 1)), r"first_row\[0\] is 1, it must be 0"),
    "rows without a prompt": (set_entry(first_row=(2, 5)), r"first_row\[2\] is 5, there are 6 rows"),
}


@pytest.mark.parametrize("wrong", WRONG_TABLES)
@pytest.mark.parametrize("kernel", [True, False])
def test_a_table_that_points_outside_is_refused_and_named(wrong, kernel):
    p = problem(lengths=(100, 40), branches=(4, 2), kernel=kernel)
    assert (p.stores[0].shape[0], p.stores[2].shape[0], tuple(p.tree.pages.shape)) == (6, 8, (2, 2))
    before = [store.clone() for store in p.stores]
    change, message = WRONG_TABLES[wrong]
    p.tree = change(p)
    with pytest.raises(ValueError, match=f"tree_attention: .*{message}"):
        p.appending()
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, p.stores, strict=True))
    if kernel and wrong != "too few page rows":  # a shape, which the decoder that prepares does not get wrong
        with pytest.raises(ValueError, match="tree_attention: "):
            prepare([p.stores], p.tree)


def test_pages_behind_a_prefix_are_not_looked_at():
    p = problem(lengths=(100, 40), branches=(4, 2))
    want = p()
    p.tree = set_entry(pages=((1, 1), 10**6))(p)
    assert torch.equal(p(), want)


def test_a_scale_of_zero_is_zero():
    """All visible tokens then weigh alike, whatever served them."""
    for options in ({}, {"softcap": 3.0}, {"sinks": torch.zeros(6)}):
        found = [problem(kernel=kernel)(scale=0.0, **options) for kernel in (True, False)]
        want = problem()(reference.tree_attention, scale=0.0, **options)
        for x in found:
            torch.testing.assert_close(x, want, atol=5e-6, rtol=1e-5)


def test_stores_that_do_not_fit_are_named():
    p = problem()
    p.query = p.query.double()
    with pytest.raises(ValueError, match="query must be float32"):
        p()
    p = problem()
    p.stores = (*p.stores[:3], p.stores[3].half())
    with pytest.raises(ValueError, match=r"tail_value is torch\.float16"):
        p()
    p = problem(heads=(5, 2))
    with pytest.raises(ValueError, match="5 query heads"):
        p()


def packed(x):
    """[N, S, H, D] as a model's layer has it: [H, N * S, D]."""
    return x.flatten(0, 1).transpose(0, 1)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, given=(), options=None):
        return function(*given, **(options or {}))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ["decode", "new tokens", "MQA, width 80"])
def test_prepared_calls_give_the_same_bits(shape, options, isa):
    p = problem(**SHAPES[shape])
    chosen = with_sinks({"scale": None, "window": None, "softcap": None} | OPTIONS[options], p)
    (call,) = prepare([p.stores], p.tree)
    run = partial(run_prepared, call, packed(p.query), packed(p.key), packed(p.value), p.query.shape[1])
    before = ops.LAUNCHES.copy()
    found = run(int(p.tree.tail_len), **chosen)
    assert ops.LAUNCHES - before == {f"tree_attention/{isa}": 1}
    assert found.equal(p.appending(**chosen).flatten(0, 1))


def test_prepared_calls_leave_alone_what_they_do_not_serve():
    p = problem()
    assert prepare([problem(kernel=False).stores], p.tree) == []
    (call,) = prepare([p.stores], p.tree)
    query, key, value, tail = packed(p.query), packed(p.key), packed(p.value), int(p.tree.tail_len)
    plain = (None, None, None, None)
    for store in p.stores[2:]:
        store.fill_(0)
    for given in ((query[:, :-1], key, value), (query, key[:, :, :-1], value), (query[:5], key, value)):
        assert run_prepared(call, *given, 1, tail, *plain) is None
    strided = torch.stack((value, value), -1)[..., 0]
    assert run_prepared(call, query, key, strided, 1, tail, *plain) is None
    assert run_prepared(call, query, key, value, 1, tail, None, None, None, torch.zeros(5)) is None
    with Watching():
        assert run_prepared(call, query, key, value, 1, tail, *plain) is None
    assert not any(store.any() for store in p.stores[2:])
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=f"tail_len is {wrong}"):
            run_prepared(call, query, key, value, 1, wrong, *plain)
