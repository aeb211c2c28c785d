"""tree_attention: what it refuses, and the calls that a model's layers make over tables that were looked at before."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyengine import ops
from pyengine.ops.tree_attention import prepare, run_prepared


def _tree_problems():
    """tests/test_tree_attention.py, whose problems serve here too."""
    spec = importlib.util.spec_from_file_location("tree_problems", Path(__file__).with_name("test_tree_attention.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TREES = _tree_problems()
problem = TREES.problem


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
    p.tree = p.tree._replace(leaves=p.tree.leaves.long())
    with pytest.raises(ValueError, match=r"tree\.leaves must be int32"):
        p()
    for name in ("leaves", "tail_len"):
        p = problem()
        p.tree = p.tree._replace(**{name: getattr(p.tree, name)[:5]})
        with pytest.raises(ValueError, match=r"tree has leaves \[., 3\], tail_len \[.\], .* for 6 rows"):
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
    "leaf below": (set_entry(leaves=((2, 0), -2)), r"tree\.leaves\[2\] is -2, there are 15 leaves"),
    "leaf above": (set_entry(leaves=((5, 0), 15)), r"tree\.leaves\[5\] is 15, there are 15 leaves"),
    "leaf of another row": (lambda p: set_entry(leaves=((5, 0), int(p.tree.leaves[0, 1])))(p), r"leaves\[5\] .*taken"),
    "leaf twice": (lambda p: set_entry(leaves=((0, 2), int(p.tree.leaves[0, 0])))(p), r"leaves\[0\] is .* taken"),
    "leaf behind the last": (set_entry(leaves=((0, 1), -1)), r"leaves\[0\] is \d+, behind the row's last leaf"),
    "tail without a leaf": (set_entry(tail_len=(1, 3)), r"tail_len\[1\] is 3: .*the row's leaves have room for 0"),
    "tail beyond its leaves": (set_entry(tail_len=(0, 49)), r"tail_len\[0\] is 49: .* room for 48"),
    "tail shorter than its new tokens": (set_entry(tail_len=(4, 1)), r"tail_len\[4\] is 1: it counts the 2 new tokens"),
    "negative tail": (set_entry(tail_len=(4, -3)), r"tail_len\[4\] is -3"),
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
    p = problem(lengths=(100, 40), branches=(4, 2), tokens=2, kernel=kernel)
    assert (p.stores[0].shape[0], p.stores[2].shape[0], tuple(p.tree.pages.shape)) == (6, 15, (2, 2))
    before = [store.clone() for store in p.stores]
    change, message = WRONG_TABLES[wrong]
    p.tree = change(p)
    with pytest.raises(ValueError, match=f"tree_attention: .*{message}"):
        p.appending()
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, p.stores, strict=True))
    if kernel and wrong not in ("too few page rows", "tail shorter than its new tokens"):  # no tables, or a run's fault
        with pytest.raises(ValueError, match="tree_attention: "):
            prepare([p.stores], p.tree)


def test_pages_behind_a_prefix_are_not_looked_at():
    p = problem(lengths=(100, 40), branches=(4, 2))
    want = p()
    p.tree = set_entry(pages=((1, 1), 10**6))(p)
    assert torch.equal(p(), want)


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


@pytest.mark.parametrize("options", TREES.OPTIONS)
@pytest.mark.parametrize("shape", ["decode", "new tokens", "MQA, width 80"])
def test_prepared_calls_give_the_same_bits(shape, options, isa):
    p = problem(**TREES.SHAPES[shape])
    chosen = TREES.with_sinks({"scale": None, "window": None, "softcap": None} | TREES.OPTIONS[options], p)
    (call,) = prepare([p.stores], p.tree)
    run = partial(run_prepared, call, packed(p.query), packed(p.key), packed(p.value), p.query.shape[1])
    before = ops.LAUNCHES.copy()
    found = run(**chosen)
    assert ops.LAUNCHES - before == {f"tree_attention/{isa}": 1}
    assert found.equal(p.appending(**chosen).flatten(0, 1))


def test_prepared_calls_leave_alone_what_they_do_not_serve():
    p = problem()
    assert prepare([problem(kernel=False).stores], p.tree) == []
    (call,) = prepare([p.stores], p.tree)
    query, key, value = packed(p.query), packed(p.key), packed(p.value)
    plain = (None, None, None, None)
    for store in p.stores[2:]:
        store.fill_(0)
    for given in ((query[:, :-1], key, value), (query, key[:, :, :-1], value), (query[:5], key, value)):
        assert run_prepared(call, *given, 1, *plain) is None
    strided = torch.stack((value, value), -1)[..., 0]
    assert run_prepared(call, query, key, strided, 1, *plain) is None
    assert run_prepared(call, query, key, value, 1, None, None, None, torch.zeros(5)) is None
    with Watching():
        assert run_prepared(call, query, key, value, 1, *plain) is None
    assert not any(store.any() for store in p.stores[2:])


def test_prepared_calls_read_the_tails_as_they_are_then():
    p = problem(tokens=2)
    (call,) = prepare([p.stores], p.tree)
    run = partial(run_prepared, call, packed(p.query), packed(p.key), packed(p.value), 2, None, None, None, None)
    before = p.tree.tail_len.clone()
    p.tree.tail_len.sub_((before > 2).int())
    assert run().equal(p.appending().flatten(0, 1))
    for row, wrong, room in ((0, 1, 48), (0, 49, 48), (1, 2, 0), (5, -1, 16 * (p.tree.leaves[5] >= 0).sum())):
        p.tree.tail_len.copy_(before)[row] = wrong
        stores = [store.clone() for store in p.stores]
        with pytest.raises(ValueError, match=rf"tail_len\[{row}\] is {wrong}: it counts the 2 .* room for {room}"):
            run()
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(stores, p.stores, strict=True))
    with pytest.raises(ValueError, match="tail_len must be contiguous"):
        prepare([p.stores], p.tree._replace(tail_len=before.repeat_interleave(2)[::2]))
