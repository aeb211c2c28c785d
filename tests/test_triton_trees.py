"""tree_attention in Triton equals the reference."""

from __future__ import annotations


def test_tree_attention_equals_the_reference(in_triton):
    in_triton("trees.py")
