"""The tails of tree_attention through torch alone; reads no length on the host, so that it can be captured."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine.reference import Tree


def append(tail: Tensor, tree: Tree, new: Tensor) -> None:
    """The S new tokens [N, S, Hkv, D] of each row join its leaves in `tail` [leaves, Hkv, LEAF, D]."""
    tokens, leaf = new.shape[1], tail.shape[2]
    if not tree.leaves.numel():
        return
    # An idle row writes what the longest row does, in the same place; where all are idle, what is there already.
    rows = torch.arange(len(new), device=new.device)
    source = torch.where(tree.tail_len > 0, rows, tree.tail_len.argmax())
    at = (tree.tail_len[source, None] - tokens + torch.arange(tokens, device=new.device)).clamp(min=0).long()
    own, inside = tree.leaves[source].clamp(min=0).long().gather(1, at // leaf), at % leaf
    tail[own, :, inside] = torch.where(tree.tail_len.any(), new[source], tail[own, :, inside])


def gather(tail: Tensor, tree: Tree) -> Tensor:
    """[N, Hkv, L * LEAF, D], a copy; what lies beyond a row's tail is anything."""
    return tail[tree.leaves.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)
