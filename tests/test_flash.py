"""flash-attn 2 as a backend of tree_attention, without a GPU: against a double that keeps its documented contract.

What only flash-attn itself can show runs in tests/test_cuda.py where it is installed.
"""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch

from pyengine import ops, reference
from pyengine.ops import flash
from pyengine.ops.settings import settings


def attention(query, key, value, scale, softcap, causal):
    """query [S, Hq, D], key and value [T, Hkv, D] -> output, LSE [Hq, S]; +inf where there is no key."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    logits = torch.einsum("shd,thd->hst", query.double(), key) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:  # aligned to the bottom right corner
        seen = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
        logits = logits.masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp() if len(key) else logits
    out = torch.einsum("hst,thd->shd", weights, value).to(query.dtype)
    return out, torch.where(lse == -math.inf, math.inf, lse).float()


def pool(cache, table, length):
    """The first `length` tokens of a page table."""
    return cache[table.long()].flatten(0, 1)[:length]


class Double(types.ModuleType):
    """flash_attn's two functions by their docstrings; what they would refuse is an assertion."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, softcap,
        return_attn_probs, block_table,
    ):  # fmt: skip
        assert q.dtype == torch.bfloat16
        assert return_attn_probs
        assert k.shape[1] % 256 == 0
        assert k.stride(-1) == v.stride(-1) == block_table.stride(-1) == 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        outs, lses = [], []
        for b, length in enumerate(cu_seqlens_k.diff().tolist()):
            own = q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]
            past = (pool(x, block_table[b], length) for x in (k, v))
            out, lse = attention(own, *past, softmax_scale, softcap, causal)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1), None

    @staticmethod
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, softcap, return_softmax_lse
    ):  # fmt: skip
        assert return_softmax_lse
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert cache_seqlens.dtype == torch.int32
        assert cache_seqlens.is_contiguous()
        assert cache_seqlens.shape == k_cache.shape[:1] == v_cache.shape[:1] == q.shape[:1]
        outs, lses = [], []
        for row, length in enumerate(cache_seqlens.tolist()):
            out, lse = attention(q[row], k_cache[row, :length], v_cache[row, :length], softmax_scale, softcap, causal)
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)


def problem(tokens=1, lengths=(300, 0, 512), branches=(3, 2, 1), tails=(7, 39, 0, 16, 33, 5)):
    """What no row may read is NaN; the new tokens are not in the tails yet, the third row is idle."""
    g = torch.Generator().manual_seed(0)
    heads, key_heads, width, rows = 4, 2, 32, sum(branches)
    pages = torch.tensor([[4, 1], [0, 0], [2, 5]], dtype=torch.int32)
    stores = [torch.full((6, key_heads, 256, width), math.nan) for _ in range(2)]
    for row, length in zip(pages.tolist(), lengths, strict=True):
        for i in range(length):
            for store in stores:
                store[row[i // 256], :, i % 256] = torch.randn(key_heads, width, generator=g)
    stores += [torch.full((16, key_heads, 16, width), math.nan) for _ in range(2)]
    leaves = torch.full((rows, 4), -1, dtype=torch.int32)
    pool = torch.randperm(16, generator=g).tolist()
    for row, tail in enumerate(tails):
        for at in range(tail):
            if at % 16 == 0:
                leaves[row, at // 16] = pool.pop()
            for store in stores[2:]:
                if at < tail - tokens:
                    store[leaves[row, at // 16], :, at % 16] = torch.randn(key_heads, width, generator=g)
    stores = tuple(store.bfloat16() for store in stores)
    first = torch.tensor([0, *torch.tensor(branches).cumsum(0)], dtype=torch.int32)
    tree = reference.Tree(pages, torch.tensor(lengths).int(), first, leaves, torch.tensor(tails).int())
    query = torch.randn(rows, tokens, heads, width, generator=g).bfloat16()
    key, value = torch.randn(2, rows, tokens, key_heads, width, generator=g).bfloat16()
    return query, stores, tree, key, value


def append(stores, tree, key, value):
    """The new tokens join the tails, one by one."""
    for row, tail in enumerate(tree.tail_len.tolist()):
        for s in range(key.shape[1] if tail else 0):
            at = tail - key.shape[1] + s
            for store, new in zip(stores[2:], (key, value), strict=True):
                store[tree.leaves[row, at // 16], :, at % 16] = new[row, s]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 4, 4)}, {"scale": 0.3}])
def test_two_calls_and_their_merge_equal_the_reference(monkeypatch, tokens, options):
    """A prompt without a prefix is among them: flash-attn's LSE of no keys is +inf (flash-attention#978)."""
    monkeypatch.setitem(sys.modules, "flash_attn", Double("flash_attn"))
    query, stores, tree, key, value = problem(tokens)
    own = tuple(store.clone() for store in stores)
    append(own, tree, key, value)
    want = reference.tree_attention(query, *own, tree, **options)
    scale, softcap, sinks = options.get("scale", 32**-0.5), options.get("softcap", 0.0), options.get("sinks")
    assert flash.serves(query, 256, 0)
    found = flash.tree_attention(query, key, value, stores, tree, scale, softcap, sinks)
    torch.testing.assert_close(found, want, atol=0.03, rtol=0.02)
    for store, x in zip(stores, own, strict=True):
        assert torch.equal(store.nan_to_num(9), x.nan_to_num(9)), (
            "the new keys and values are in the tails, and only they"
        )
    again = flash.tree_attention(query, None, None, stores, tree, scale, softcap, sinks)
    assert torch.equal(again, found)


@pytest.mark.parametrize(
    ("dtype", "width", "page", "window", "served"),
    [
        (torch.float16, 128, 256, 0, True),
        (torch.float32, 128, 256, 0, False),
        (torch.float16, 128, 64, 0, False),
        (torch.float16, 128, 256, 40, False),
        (torch.float16, 320, 256, 0, False),
        (torch.float16, 36, 256, 0, False),
    ],
)
def test_what_it_cannot_serve_goes_elsewhere(dtype, width, page, window, served):
    assert flash.serves(torch.empty(1, 1, 1, width, dtype=dtype), page, window) is served


def test_the_dispatcher_sends_full_attention_layers_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", Double("flash_attn"))
    monkeypatch.setattr(settings, "attention", "flash")
    query, stores, tree, key, value = problem()
    run = ops.tree_attention.__globals__["_tree_attention_gpu"]
    sinks = torch.linspace(-1, 4, 4)
    before = ops.LAUNCHES.copy()
    found = run(query, key, value, *stores, *tree, 0.3, 0, 3.0, sinks)
    assert ops.LAUNCHES - before == {"tree_attention/flash": 1}
    want = reference.tree_attention(query, *stores, tree, scale=0.3, softcap=3.0, sinks=sinks)
    torch.testing.assert_close(found, want, atol=0.03, rtol=0.02)


@pytest.mark.parametrize(("asked", "word"), [("flash", "not installed"), ("best", "must be")])
def test_asking_for_what_is_not_there_is_an_error(asked, word):
    code = (
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'flash_attn' else find(name, *a)\n"
        "from pyengine import ops"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={"PYENGINE_ATTENTION": asked}, capture_output=True, text=True
    )
    assert ran.returncode != 0
    assert word in ran.stderr
