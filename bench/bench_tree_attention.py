"""tree_attention beside torch's SDPA over replicated keys and values: one decode step of one layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pyengine import ops

HEADS, KEY_HEADS, WIDTH, TAIL, PAGE, LEAF = 32, 8, 128, 16, 64, 16  # Llama 3.1 8B
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def problem(
    prefix,
    branches,
    dtype,
    kernel=True,
    heads=HEADS,
    key_heads=KEY_HEADS,
    width=WIDTH,
    prompts=1,
    device="cpu",
    page=PAGE,
    tail=TAIL,
):
    """(query, prefix and tail stores, tree) of prompts * branches rows, as `pyengine.cache` lays them out."""
    torch.manual_seed(0)
    each, rows, leaves = -(-prefix // page), prompts * branches, -(-tail // LEAF)

    def store(count, inner, dense):
        shape = (count, key_heads, width, inner) if dense else (count, key_heads, inner, width)
        out = torch.randn(shape, device=device).to(dtype)
        return out.transpose(2, 3) if dense else out

    stores = tuple(
        store(n, i, dense) for n, i in ((prompts * each, page), (rows * leaves, LEAF)) for dense in (kernel, False)
    )
    tree = (
        torch.randperm(prompts * each).view(prompts, each),
        torch.full((prompts,), prefix),
        torch.arange(0, rows + 1, branches),
        torch.randperm(rows * leaves).view(rows, leaves),
        torch.full((rows,), tail),
    )
    tree = ops.Tree(*(x.to(device=device, dtype=torch.int32) for x in tree))
    return torch.randn(rows, 1, heads, width, device=device).to(dtype), stores, tree


def replicated(query, stores, tree):
    """Every branch's keys and values in one piece, [B * K, Hkv, P + S, D], as a cache that copies them holds them."""
    prefix, branches, tail = int(tree.prefix_len[0]), len(query) // len(tree.prefix_len), int(tree.tail_len[0])
    return tuple(
        torch.cat(
            [
                pages[tree.pages.long()].transpose(1, 2).flatten(2, 3)[:, :, :prefix].repeat_interleave(branches, 0),
                tails[tree.leaves.long()].transpose(1, 2).flatten(2, 3)[:, :, :tail],
            ],
            2,
        ).contiguous()
        for pages, tails in ((stores[0], stores[2]), (stores[1], stores[3]))
    )


def by_enable_gqa(query, key, value):
    return scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=True).transpose(1, 2)


def by_folding(query, key, value):
    """The query heads of a key head as rows of one query."""
    rows, _, heads, width = query.shape
    folded = query.view(rows, key.shape[1], heads // key.shape[1], width)
    return scaled_dot_product_attention(folded, key, value).view(query.shape)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branches", [1, 4, 16])
@pytest.mark.parametrize("prefix", [512, 2048, 8192])
def test_peers(race, rows, prefix, branches, dtype, threads):
    query, stores, tree = problem(prefix, branches, DTYPES[dtype])
    key, value = replicated(query, stores, tree)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    peers = {
        "SDPA, enable_gqa, replicated": lambda: by_enable_gqa(query, key, value),
        "SDPA, folded, replicated": lambda: by_folding(query, key, value),
    }
    raced = race(lambda: ops.tree_attention(query, *stores, tree), peers, rounds=15 if prefix > 4096 else 40)
    torch.set_num_threads(before)
    if raced is None:
        return
    times = raced[0]
    size = DTYPES[dtype].itemsize
    floor = 2 * KEY_HEADS * WIDTH * size * (prefix + branches * TAIL)
    slower = {name: round(t / times["pyengine"], 2) for name, t in times.items()}
    rows.append(
        {
            "prefix": prefix,
            "branches": branches,
            "dtype": dtype,
            "threads": threads,
            "microseconds": {name: round(t * 1e6, 1) for name, t in times.items()},
            "times_slower": slower,
            "best_peer": min(s for name, s in slower.items() if name != "pyengine"),
            "gigabytes_per_second_of_floor": round(floor / times["pyengine"] / 1e9, 1),
            "gigaflops": round(4 * branches * HEADS * WIDTH * (prefix + TAIL) / times["pyengine"] / 1e9, 1),
        }
    )


def test_smoke(benchmark):
    query, stores, tree = problem(200, 3, torch.float32, heads=4, key_heads=2, width=32, tail=40)
    key, value = replicated(query, stores, tree)
    found = benchmark.pedantic(ops.tree_attention, (query, *stores, tree), rounds=1)
    for peer in (by_enable_gqa, by_folding):
        torch.testing.assert_close(found, peer(query, key, value), atol=1e-5, rtol=1e-5)
