"""tree_attention through flash-attn 2: one call over the prefixes, one over the tails, and their exact merge.

PYENGINE_ATTENTION=flash asks for it. Two passes and a merge read as little as the Triton kernel does; it stays as a
second opinion on a GPU, and where flash-attn is the faster of the two (bench/gpu.py races them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyengine.ops import leaves
from pyengine.reference import Tree

PAGE = 256  # flash-attn 2 takes pages of a multiple of it
WIDEST = 256  # D


def serves(query: Tensor, page: int, window: int) -> bool:
    """Whether flash-attn can do this layer: half precision, full attention."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and not window and page % PAGE == 0 and query.shape[3] % 8 == 0 and query.shape[3] <= WIDEST


def tree_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    stores: tuple[Tensor, Tensor, Tensor, Tensor],
    tree: Tree,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """As `ops.tree_attention`; reads no length on the host, so that it can be captured in a CUDA graph.

    The tails are copied side by side, as flash-attn takes no pages of the size of a leaf.
    """
    import flash_attn

    rows, tokens, heads, width = query.shape
    prefix_key, prefix_value = (store.transpose(1, 2) for store in stores[:2])
    if key is not None and value is not None:
        leaves.append(stores[2], tree, key)
        leaves.append(stores[3], tree, value)
    tail_key, tail_value = (leaves.gather(store, tree).transpose(1, 2) for store in stores[2:])
    shared: dict[str, Any] = {"softmax_scale": scale, "softcap": softcap}
    prefix_len = tree.prefix_len.contiguous()
    over_prefix, lse_prefix, _ = flash_attn.flash_attn_varlen_func(
        query.reshape(rows * tokens, heads, width),
        prefix_key,
        prefix_value,
        cu_seqlens_q=tree.first_row * tokens,
        cu_seqlens_k=torch.nn.functional.pad(prefix_len.cumsum(0, dtype=torch.int32), (1, 0)),
        max_seqlen_q=rows * tokens,  # bounds: the lengths themselves are on the device
        max_seqlen_k=tree.pages.shape[1] * prefix_key.shape[1],
        causal=False,
        return_attn_probs=True,  # and with them the LSE, [Hq, N * S]
        block_table=tree.pages.contiguous(),
        **shared,
    )
    over_tail, lse_tail = flash_attn.flash_attn_with_kvcache(
        query,
        tail_key,
        tail_value,
        cache_seqlens=tree.tail_len.contiguous(),
        causal=True,
        return_softmax_lse=True,  # [N, Hq, S]
        **shared,
    )
    lse_prefix = lse_prefix.view(heads, rows, tokens).permute(1, 2, 0)
    # A query without keys has LSE +inf in flash-attn 2 (flash-attention#978), where the merge needs log 0.
    lse_prefix = lse_prefix.masked_fill(lse_prefix == torch.inf, -torch.inf)
    lse_tail = lse_tail.transpose(1, 2)
    total = torch.logaddexp(lse_prefix, lse_tail)
    if sinks is not None:
        total = torch.logaddexp(total, sinks)
    mixed = over_prefix.view_as(query) * (lse_prefix - total).exp()[..., None]
    mixed = mixed + over_tail * (lse_tail - total).exp()[..., None]
    return torch.where((tree.tail_len == 0)[:, None, None, None], 0, mixed).to(query.dtype)
