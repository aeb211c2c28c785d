"""tree_attention in Triton: one program for (split, key head, prompt), then a merge in the order of the splits.

A row is (branch, new token, query head of the key head's group). Splits are at fixed tokens and the tails have one of
their own, so that a row's sums do not depend on the batch. The grid follows from shapes alone: nothing waits for the
device, and a captured graph serves every length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyengine.kernels.product import upcast

LOG2E = 1.4426950408889634
SPLIT = 256  # tokens of a prefix that one program reads, at least
SPLITS = (
    8  # programs of a prefix, until each reads WIDEST: what they write and read again is an eighth of what they read
)
WIDEST = 1024
TILE = 32  # of them at a time; divides a page
COLUMNS = 16  # tokens of a tail at a time: the least that tensor cores take
MOST_ROWS = 64  # at a time
TOGETHER = tl.constexpr(8)  # parts whose sums are read at once where they are merged


@triton.jit
def append_kernel(
    new,
    new_row,
    new_token,
    new_head,
    tail,
    tail_leaf,
    tail_head,
    tail_token,
    tail_inner,
    leaves,
    leaves_row,
    tail_len,
    width: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEAF: tl.constexpr,
):
    row, token, head = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length, d = tl.load(tail_len + row), tl.arange(0, WIDTH)
    if length == 0:
        return
    x = tl.load(new + row * new_row + token * new_token + head * new_head + d, mask=d < width)
    at = length - TOKENS + token
    leaf = tl.load(leaves + row * leaves_row + at // LEAF).to(tl.int64)
    to = tail + leaf * tail_leaf + head * tail_head + at % LEAF * tail_token
    tl.store(to + d * tail_inner, x, mask=d < width)


@triton.jit
def attend(query, key, value, seen, factor, softcap, top, total, mixed, CAPPED: tl.constexpr, UPCAST: tl.constexpr):
    """The running softmax of rows [R, D], in log2 units, after more keys [D, T] and values [T, D]."""
    if UPCAST:
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    # Three TF32 products keep fp32 inputs at fp32 precision on tensor cores; other types ignore it.
    logits = tl.dot(query, key, input_precision="tf32x3") * factor
    if CAPPED:  # factor is 2 scale log2(e) / softcap: tanh y = 1 - 2 / (1 + 2^(2 y log2(e)))
        logits = (1 - 2 / (1 + tl.exp2(logits))) * softcap
    logits = tl.where(seen, logits, float("-inf"))
    now = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(now == float("-inf"), 0.0, now)
    weight = tl.exp2(logits - shift[:, None])
    scale = tl.exp2(top - shift)
    added = tl.dot(weight.to(value.dtype), value, input_precision="tf32x3")
    return now, total * scale + tl.sum(weight, 1), mixed * scale[:, None] + added


@triton.jit
def span_of(length, SPLIT: tl.constexpr, SPLITS: tl.constexpr, WIDEST: tl.constexpr):
    """Tokens of a prefix that one program reads: by its length alone, so that no batch changes a row's sums."""
    span = tl.full([], SPLIT, tl.int32)
    while (span < WIDEST) & (span * SPLITS < length):
        span *= 2
    return span


@triton.jit
def tree_attention_kernel(
    query,
    query_row,
    query_token,
    query_head,
    prefix_key,
    key_page,
    key_head,
    key_token,
    key_inner,
    prefix_value,
    value_page,
    value_head,
    value_token,
    value_inner,
    tail_key,
    tail_key_leaf,
    tail_key_head,
    tail_key_token,
    tail_key_inner,
    tail_value,
    tail_value_leaf,
    tail_value_head,
    tail_value_token,
    tail_value_inner,
    pages,
    pages_row,
    prefix_len,
    first_row,
    leaves,
    leaves_row,
    tail_len,
    factor,
    softcap,
    window,
    width: tl.constexpr,
    rows_in_all,
    sums,
    tops,
    totals,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    LEAF: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Part 0 is the tail, wherever the longest prefix of a batch ends.
    split, kv_head, prompt = tl.program_id(0) - 1, tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    length = tl.load(prefix_len + prompt)
    first, last = tl.load(first_row + prompt), tl.load(first_row + prompt + 1)
    each: tl.constexpr = TOKENS * GROUP
    count = (last - first) * each
    span = span_of(length, SPLIT, SPLITS, WIDEST)
    d = tl.arange(0, WIDTH)
    inside = d < width
    for start_row in range(0, count, ROWS):
        row = start_row + tl.arange(0, ROWS)
        there = row < count
        branch, token = first + row // each, row // GROUP % TOKENS
        head = kv_head * GROUP + row % GROUP
        at_query = branch.to(tl.int64) * query_row + token * query_token + head * query_head
        q = tl.load(query + at_query[:, None] + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        tail = tl.load(tail_len + branch, mask=there, other=0)
        busy, place = tail > 0, tail - TOKENS + token  # of the query, in its tail
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, WIDTH], tl.float32)
        if split >= 0:
            tile = tl.arange(0, TILE)
            key_cell = tile[None, :] * key_token + d[:, None] * key_inner  # in 32 bits, and the same for every tile
            value_cell = tile[:, None] * value_token + d[None, :] * value_inner
            for start in range(split * span, tl.minimum(length, split * span + span), TILE):
                page = tl.load(pages + prompt * pages_row + start // PAGE).to(tl.int64)
                at = start + tile
                kept = at < length
                keys = prefix_key + (page * key_page + kv_head * key_head + start % PAGE * key_token)
                k = tl.load(keys + key_cell, mask=kept[None, :] & inside[:, None], other=0.0)
                values = prefix_value + (page * value_page + kv_head * value_head + start % PAGE * value_token)
                v = tl.load(values + value_cell, mask=kept[:, None] & inside[None, :], other=0.0)
                seen = kept[None, :] & busy[:, None]
                if WINDOWED:
                    seen &= at[None, :] > (length + place - window)[:, None]
                top, total, mixed = attend(q, k, v, seen, factor, softcap, top, total, mixed, CAPPED, UPCAST)
        else:
            for b in range(start_row // each, tl.cdiv(tl.minimum(start_row + ROWS, count), each)):
                own = tl.load(tail_len + first + b)
                for start in range(0, own, COLUMNS):
                    leaf = tl.load(leaves + (first + b).to(tl.int64) * leaves_row + start // LEAF).to(tl.int64)
                    at = start + tl.arange(0, COLUMNS)
                    kept, held = at < own, start % LEAF + tl.arange(0, COLUMNS)
                    keys = tail_key + leaf * tail_key_leaf + kv_head * tail_key_head
                    k = tl.load(
                        keys + held[None, :] * tail_key_token + d[:, None] * tail_key_inner,
                        mask=kept[None, :] & inside[:, None],
                        other=0.0,
                    )
                    values = tail_value + leaf * tail_value_leaf + kv_head * tail_value_head
                    v = tl.load(
                        values + held[:, None] * tail_value_token + d[None, :] * tail_value_inner,
                        mask=kept[:, None] & inside[None, :],
                        other=0.0,
                    )
                    seen = (branch == first + b)[:, None] & busy[:, None] & (at[None, :] <= place[:, None])
                    if WINDOWED:
                        seen &= at[None, :] > (place - window)[:, None]
                    top, total, mixed = attend(q, k, v, seen, factor, softcap, top, total, mixed, CAPPED, UPCAST)
        to = tl.program_id(0).to(tl.int64) * rows_in_all + (branch.to(tl.int64) * TOKENS + token) * heads + head
        tl.store(tops + to, top, mask=there)
        tl.store(totals + to, total, mask=there)
        used = there & (top > float("-inf"))  # merge_kernel reads no others
        tl.store(sums + to[:, None] * width + d[None, :], mixed, mask=used[:, None] & inside[None, :])


@triton.jit
def merge_kernel(
    sums,
    tops,
    totals,
    sinks,
    tail_len,
    out,
    rows_in_all,
    heads,
    each,
    width: tl.constexpr,
    parts,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    at = part.to(tl.int64) * rows_in_all + row
    top = tl.load(tops + at, mask=part < parts, other=float("-inf"))
    total = tl.load(totals + at, mask=part < parts, other=0.0)
    most = tl.max(top, 0)
    if SINKS:
        sink = tl.load(sinks + row % heads) * 1.4426950408889634
        most = tl.maximum(most, sink)
    scale = tl.where(top == float("-inf"), 0.0, tl.exp2(top - most))
    whole = tl.sum(tl.where(top == float("-inf"), total, total * scale), 0)  # a NaN in `total` stays
    if SINKS:
        whole += tl.exp2(sink - most)
    mixed = tl.zeros([WIDTH], tl.float32)
    for first in range(0, parts, TOGETHER):
        # A part that saw nothing wrote no sums.
        p = first + tl.arange(0, TOGETHER)
        here = tl.load(tops + p.to(tl.int64) * rows_in_all + row, mask=p < parts, other=float("-inf"))
        used = (here > float("-inf"))[:, None] & (d < width)[None, :]
        x = tl.load(sums + (p.to(tl.int64) * rows_in_all + row)[:, None] * width + d[None, :], mask=used, other=0.0)
        mixed += tl.sum(tl.where(used, tl.exp2(here - most)[:, None] * x, 0.0), 0)
    mixed = tl.where(tl.load(tail_len + row // each) == 0, 0.0, mixed / whole)
    tl.store(out + row * width + d, mixed.to(out.dtype.element_ty), mask=d < width)


def warps(query: Tensor, padded: int) -> int:
    """4 where the sums of 64 rows fit their registers: a multiprocessor then holds two programs, with 8 warps one."""
    newest = query.device.type != "cpu" and torch.cuda.get_device_capability(query.device)[0] >= 10
    return 8 if newest or padded > 128 or query.dtype == torch.float32 else 4


def tree_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    pages: Tensor,
    prefix_len: Tensor,
    first_row: Tensor,
    leaves: Tensor,
    tail_len: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """`pyengine.ops.tree_attention` in Triton, on arguments that are already checked.

    query, key and value have unit stride along D; pages hold a multiple of 64 tokens, leaves of 16. window and softcap:
    0 is none.
    """
    rows, tokens, heads, width = query.shape
    kv_heads, padded = prefix_key.shape[1], max(16, triton.next_power_of_2(width))
    out = query.new_empty((rows, tokens, heads, width))
    if rows == 0:
        return out
    for new, tail in ((key, tail_key), (value, tail_value)):
        if new is not None:
            append_kernel[(rows, tokens, kv_heads)](
                new,
                *new.stride()[:3],
                tail,
                *tail.stride(),
                leaves,
                leaves.stride(0),
                tail_len,
                width,
                TOKENS=tokens,
                WIDTH=padded,
                LEAF=tail.shape[2],
                num_warps=1,
            )
    group = heads // kv_heads
    longest = pages.shape[1] * prefix_key.shape[2]
    parts = max(min(triton.cdiv(longest, SPLIT), SPLITS), triton.cdiv(longest, WIDEST)) + 1
    in_all = rows * tokens * heads
    sums = query.new_empty((parts, in_all, width), dtype=torch.float32)
    tops, totals = (query.new_empty((parts, in_all), dtype=torch.float32) for _ in range(2))
    branch_rows = triton.next_power_of_2(rows * tokens * group)
    factor = 2 * LOG2E * scale / softcap if softcap else LOG2E * scale
    tree_attention_kernel[(parts, kv_heads, len(prefix_len))](
        query,
        *query.stride()[:3],
        prefix_key,
        *prefix_key.stride(),
        prefix_value,
        *prefix_value.stride(),
        tail_key,
        *tail_key.stride(),
        tail_value,
        *tail_value.stride(),
        pages,
        pages.stride(0),
        prefix_len,
        first_row,
        leaves,
        leaves.stride(0),
        tail_len,
        factor,
        softcap * LOG2E,
        window,
        width,
        in_all,
        sums,
        tops,
        totals,
        TOKENS=tokens,
        GROUP=group,
        ROWS=max(16, min(MOST_ROWS if query.dtype.itemsize == 2 else MOST_ROWS // 4, branch_rows)),
        WIDTH=padded,
        PAGE=prefix_key.shape[2],
        LEAF=tail_key.shape[2],
        SPLIT=SPLIT,
        SPLITS=SPLITS,
        WIDEST=WIDEST,
        TILE=TILE,
        COLUMNS=COLUMNS,
        WINDOWED=window > 0,
        CAPPED=softcap > 0,
        UPCAST=upcast(query),
        num_warps=warps(query, padded),
        num_stages=2,
    )
    merge_kernel[(in_all,)](
        sums,
        tops,
        totals,
        query if sinks is None else sinks,
        tail_len,
        out,
        in_all,
        heads,
        tokens * heads,
        width,
        parts,
        PARTS=triton.next_power_of_2(parts),
        WIDTH=padded,
        SINKS=sinks is not None,
        num_warps=1,
    )
    return out
