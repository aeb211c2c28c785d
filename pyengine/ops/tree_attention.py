"""tree_attention: K branches of a prompt read its cached prefix once."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pyengine._C as _C
from pyengine.ops import flash, leaves
from pyengine.ops.common import (
    DTYPE_CODE,
    check_float,
    fail,
    instruction_set,
    launched,
    library,
    threads,
    traced,
    triton_kernels,
    unit_strides,
)
from pyengine.ops.settings import settings
from pyengine.reference import Tree

OP = "tree_attention"
TILE, TOKENS = 64, 16  # csrc/cpu/tree_attention.h kTileTokens, kTokens

library.define(
    "tree_attention(Tensor query, Tensor? key, Tensor? value, Tensor prefix_key, Tensor prefix_value, "
    "Tensor(a!) tail_key, Tensor(b!) tail_value, Tensor pages, Tensor prefix_len, Tensor first_row, Tensor leaves, "
    "Tensor tail_len, float scale, int window, float softcap, Tensor? sinks) -> Tensor"
)


def tree_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tree: Tree,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the S newest tokens of N branches over their prompts' prefixes and their own tails.

    Row n of prompt b has the sequence prefix b + tail n; its queries are the last S tokens of the tail. The rows
    of a prompt share one read of the prefix, so that the bytes read grow with P + N * tail_len and not with
    N * P (Hydragen, bifurcated attention). A row whose tail_len is 0 is idle: nothing is written for it, and its output
    is 0.

    Args:
        query: [N, S, Hq, D], fp32, bf16 or fp16; rows are grouped by prompt. Query head h reads key head
            h // (Hq / Hkv) (GQA).
        prefix_key, prefix_value: [pages, Hkv, page, D], read only. What lies beyond a prefix is never read into a
            result.
        tail_key, tail_value: [leaves, Hkv, LEAF, D], the tails in pieces of LEAF tokens.
        tree: pages, leaves and lengths; int32 on the device of the tensors.
        key, value: [N, S, Hkv, D] of the new tokens, written to the tails first, at tail_len[n] - S; None: they are
            there already.
        scale: of the logits; None is D^-1/2.
        window: a token sees itself and the window - 1 tokens before it; None is all.
        softcap: softcap * tanh(logit / softcap), before the mask (Gemma 2).
        sinks: [Hq], a logit of each head that takes weight and has no value (gpt-oss).

    Returns:
        [N, S, Hq, D] of the query's dtype, contiguous. A row's bits from the CPU kernel depend neither on the other
        rows, their tails and their number, nor on the leaves that its own tail lies in, nor on the threads. NaN in a
        visible key or value gives NaN; +inf logits give NaN, as a softmax does.

    The CPU kernel wants keys stored with tokens side by side and values with D side by side (`cache.py` does), D a
    multiple of 16, pages of a multiple of 64 tokens and leaves of a multiple of 16; anything else is served by torch's
    scaled_dot_product_attention over a gathered copy of the prefix. On a GPU PYENGINE_ATTENTION=flash sends layers
    without a window to flash-attn 2 in bf16 and fp16; the others run the Triton kernel.

    Raises:
        ValueError: a shape, dtype or parameter is out of range, or an entry of the tree points outside the stores or
            at another row's leaf; the message names it. On a GPU the entries are looked at with PYENGINE_DEBUG=1 only,
            since that reads them back.
    """
    stores = (prefix_key, prefix_value, tail_key, tail_value)
    width, dtype = query.shape[3], query.dtype
    check_float(OP, query, "query")
    new = (query.shape[0], query.shape[1], prefix_key.shape[1], width)
    # One look at what fits, as a model's layers call it: finding out what does not is left to `_complain`.
    if not (
        query.shape[2] % new[2] == 0
        and all(x.dtype == dtype and x.shape[1::2] == new[2:] and x.device == query.device for x in stores)
        and prefix_key.shape == prefix_value.shape
        and tail_key.shape == tail_value.shape
        and all(x.dtype == torch.int32 for x in tree)
        and tree.pages.dim() == tree.leaves.dim() == 2
        and len(tree.pages) == len(tree.prefix_len)
        and len(tree.leaves) == new[0]
        and tree.tail_len.shape == new[:1]
        and tree.first_row.shape[0] == tree.prefix_len.shape[0] + 1
        and (key is None) == (value is None)
        and (key is None or (key.shape == value.shape == new and key.dtype == value.dtype == dtype))  # type: ignore[union-attr]
        and (window is None or window >= 1)
        and (softcap is None or softcap > 0)
        and (sinks is None or sinks.shape == query.shape[2:3])
    ):
        _complain(query, stores, tree, key, value, window, softcap, sinks)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    scale = width**-0.5 if scale is None else scale
    numbers = (scale, window or 0, softcap or 0.0)
    if query.device.type == "cpu" and not traced(query):
        return _tree_attention_cpu(query, key, value, *stores, *tree, *numbers, sinks)
    return torch.ops.pyengine.tree_attention(query, key, value, *stores, *tree, *numbers, sinks)


def _complain(
    query: Tensor,
    stores: tuple[Tensor, ...],
    tree: Tree,
    key: Tensor | None,
    value: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> NoReturn:
    """Name the argument that does not fit."""
    rows, tokens, heads, width = query.shape
    kv_heads = stores[0].shape[1]
    for name, store in zip(("prefix_key", "prefix_value", "tail_key", "tail_value"), stores, strict=True):
        if store.dim() != 4 or store.shape[1] != kv_heads or store.shape[3] != width:
            fail(OP, f"{name} must have shape [*, {kv_heads}, *, {width}], got {list(store.shape)}")
        if store.dtype != query.dtype or store.device != query.device:
            fail(OP, f"{name} is {store.dtype} on {store.device}, query {query.dtype} on {query.device}")
    for name, one, other in (("prefix", stores[0], stores[1]), ("tail", stores[2], stores[3])):
        if one.shape != other.shape:
            fail(OP, f"{name}_key has shape {list(one.shape)}, {name}_value {list(other.shape)}")
    if heads % kv_heads:
        fail(OP, f"{heads} query heads do not divide by {kv_heads} key heads")
    if (key is None) != (value is None):
        fail(OP, "give both key and value, or neither")
    for name, new in (("key", key), ("value", value)):
        if new is not None and (new.shape != (rows, tokens, kv_heads, width) or new.dtype != query.dtype):
            wanted = f"{query.dtype} [{rows}, {tokens}, {kv_heads}, {width}]"
            fail(OP, f"{name} must be {wanted}, got {new.dtype} {list(new.shape)}")
    if window is not None and window < 1:
        fail(OP, f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        fail(OP, f"softcap must be positive, got {softcap}")
    if sinks is not None and sinks.shape != (heads,):
        fail(OP, f"sinks must have shape [{heads}], got {list(sinks.shape)}")
    for name, table in tree._asdict().items():
        if table.dtype != torch.int32:
            fail(OP, f"tree.{name} must be int32, got {table.dtype}")
    fail(
        OP,
        f"tree has leaves {list(tree.leaves.shape)}, tail_len {list(tree.tail_len.shape)}, first_row "
        f"{list(tree.first_row.shape)} and pages {list(tree.pages.shape)} of {len(tree.prefix_len)} prompts for {rows} "
        "rows",
    )


def check_tables(stores: tuple[Tensor, ...], tree: Tree, tokens: int = 0) -> None:
    """ValueError where an entry of the tree points outside the stores, a leaf is there twice, or a tail does not fit
    its leaves or is shorter than its new tokens."""
    tables = [x.cpu().contiguous() for x in tree]
    columns = (tree.pages.shape[1], tree.leaves.shape[1])
    sizes = (stores[0].shape[2], len(stores[0]), stores[2].shape[2], len(stores[2]))
    _C.check_tree((*sizes, *columns, len(tree.prefix_len), len(tree.leaves), tokens), tables)


def kernel_serves(prefix_key: Tensor, prefix_value: Tensor, tail_key: Tensor, tail_value: Tensor) -> bool:
    """Whether the CPU kernel can read tensors of this layout."""
    return (
        prefix_key.stride(2) == tail_key.stride(2) == 1
        and prefix_value.stride(3) == tail_value.stride(3) == 1
        and prefix_key.shape[3] % TOKENS == 0
        and prefix_key.shape[2] % TILE == 0
        and tail_key.shape[2] % TOKENS == 0
    )


def _tree_attention_cpu(
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
    leaf_table: Tensor,
    tail_len: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    stores = (prefix_key, prefix_value, tail_key, tail_value)
    tree = Tree(pages, prefix_len, first_row, leaf_table, tail_len)
    check_tables(stores, tree, query.shape[1])
    if not kernel_serves(*stores):
        return _by_sdpa(query, key, value, stores, tree, scale, window, softcap, sinks)
    rows, tokens, heads, width = query.shape
    isa = instruction_set()
    launched(OP, isa)
    out = query.new_empty(rows, tokens, heads, width)
    new = unit_strides(query, key, value)
    call = _prepare(stores, tree, isa)
    if not call.run(*new, False, heads, tokens, scale, softcap, window, sinks, out, threads()):
        fail(OP, f"query {list(query.shape)} does not fit the stores and the tree")
    return out


def _prepare(stores: tuple[Tensor, ...], tree: Tree, isa: str) -> Any:
    _, kv_heads, page, width = stores[0].shape
    shape = (len(tree.prefix_len), len(tree.leaves), kv_heads, width, page, stores[2].shape[2], tree.leaves.shape[1])
    return _C.TreeCall(shape, DTYPE_CODE[stores[0].dtype], stores, unit_strides(*tree), isa)


def prepare(layers: list[tuple[Tensor, Tensor, Tensor, Tensor]], tree: Tree) -> list[Any]:
    """A call of the CPU kernel for each layer's stores over one tree, to be run by `run_prepared`; none where another
    backend serves them. Good until the tree or the stores are other tensors, or hold other entries than the ones that
    are checked here, but for those of tail_len: each run reads and checks what they are then."""
    if layers[0][0].device.type != "cpu" or not all(kernel_serves(*stores) for stores in layers):
        return []
    if not tree.tail_len.is_contiguous():
        fail(OP, "tree.tail_len must be contiguous, since it is read in place")
    check_tables(layers[0], tree)
    return [_prepare(stores, tree, instruction_set()) for stores in layers]


def run_prepared(
    call: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """`tree_attention` as a model's layer calls it: query [Hq, N * S, D], key, value [Hkv, N * S, D] -> [N * S, Hq, D].

    Of 130 us that `tree_attention` spends on arguments where a model's weights have just gone through the caches, 25
    are left. None where a tensor is not of that shape with unit stride along D, or somebody watches the ops, and
    nothing is done then.
    """
    if traced(query):
        return None
    heads, packed, width = query.shape
    if sinks is not None:
        if sinks.shape != (heads,):
            return None
        sinks = sinks.float().contiguous()
    out = query.new_empty(packed, heads, width)
    numbers = (width**-0.5 if scale is None else scale, softcap or 0.0, window or 0)
    served = call.run(query, key, value, True, heads, tokens, *numbers, sinks, out, threads())
    if not served:
        return None
    launched(OP, instruction_set())
    return out


def _by_sdpa(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    stores: tuple[Tensor, Tensor, Tensor, Tensor],
    tree: Tree,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Prompt by prompt: the prefix is gathered once, all tails follow it under a mask, query heads are folded."""
    launched(OP, "sdpa")
    tokens, device = query.shape[1], query.device
    if key is not None and value is not None:
        leaves.append(stores[2], tree, key)
        leaves.append(stores[3], tree, value)
    step = torch.arange(int(tree.tail_len.max()) if len(query) else 0, device=device)
    unwritten = (step >= tree.tail_len[:, None])[:, None, :, None]
    tails = [leaves.gather(x, tree)[:, :, : len(step)].masked_fill(unwritten, 0) for x in stores[2:]]
    place = tree.tail_len[:, None, None] - tokens + torch.arange(tokens, device=device)[:, None]  # of queries, in tails
    reach = window or torch.iinfo(torch.int32).max // 2
    seen_tail = (step <= place) & (step > place - reach)  # [N, S, longest]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    bounds = tree.first_row.tolist()
    for b, length in enumerate(tree.prefix_len.tolist()):
        rows = slice(bounds[b], bounds[b + 1])
        n = bounds[b + 1] - bounds[b]
        k, v = (
            torch.cat(
                [
                    prefix[tree.pages[b].long()].transpose(0, 1).flatten(1, 2)[:, :length],
                    own[rows].transpose(0, 1).flatten(1, 2),
                ],
                1,
            )
            for prefix, own in zip(stores[:2], tails, strict=True)
        )
        seen_prefix = torch.arange(length, device=device) > length + place[rows] - reach
        same = torch.eye(n, dtype=torch.bool, device=device)
        own_tail = (same[:, None, :, None] & seen_tail[rows, :, None]).flatten(2)  # [n, S, n * longest]
        seen = torch.cat([seen_prefix, own_tail], -1).flatten(0, 1)  # [n * S, T]
        q = query[rows].flatten(0, 1).transpose(0, 1)
        mixed = masked_attention(q, k, v, seen, scale, softcap or None, sinks)
        out[rows] = mixed.transpose(0, 1).unflatten(0, (n, tokens))
    return out.masked_fill_((tree.tail_len == 0)[:, None, None, None], 0)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [Hq, S, D], key and value [Hkv, T, D], seen bool [S, T] -> [Hq, S, D], through torch alone.

    The query heads of a key head are folded into its rows: several times faster than SDPA's enable_gqa on a CPU.
    """
    heads, group = len(key), len(query) // len(key)
    folded = query.unflatten(0, (heads, group)).transpose(1, 2).flatten(1, 2)  # [Hkv, S * G, D]
    seen = seen[:, None].expand(-1, group, -1).flatten(0, 1)
    if softcap is None and sinks is None:
        mixed = scaled_dot_product_attention(folded[None], key[None], value[None], attn_mask=seen, scale=scale)[0]
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = folded.float() @ key.float().transpose(1, 2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(heads, 1, group).expand(-1, query.shape[1], -1).flatten(1)
            logits = torch.cat([logits, sink[:, :, None]], -1)
        mixed = (torch.softmax(logits, -1)[..., : key.shape[1]] @ value.float()).to(query.dtype)
    return mixed.unflatten(1, (-1, group)).transpose(1, 2).flatten(0, 1)


def _tree_attention_gpu(query: Tensor, key: Tensor | None, value: Tensor | None, *rest: Any) -> Tensor:
    """rest: stores, tree, scale, window, softcap, sinks."""
    kernels = None if settings.gpu_backend == "reference" else triton_kernels(OP)
    page, leaf = rest[0].shape[2], rest[2].shape[2]
    stores, tree, (scale, window, softcap, sinks) = rest[:4], Tree(*rest[4:9]), rest[9:]
    if settings.debug:
        check_tables(stores, tree, query.shape[1])
    if settings.attention == "flash" and flash.serves(query, page, window):
        launched(OP, "flash")
        return flash.tree_attention(query, key, value, stores, tree, scale, softcap, sinks)
    if kernels is None or page % TILE or leaf % TOKENS:
        return _by_sdpa(query, key, value, stores, tree, scale, window, softcap, sinks)
    launched(OP, "triton")
    return kernels.tree_attention(*unit_strides(query, key, value), *rest)


def _tree_attention_fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


library.impl("tree_attention", _tree_attention_cpu, "CPU")
library.impl("tree_attention", _tree_attention_gpu, "CUDA")
torch.library.register_fake("pyengine::tree_attention", _tree_attention_fake, lib=library)
