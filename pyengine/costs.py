"""What a call must at least move and compute: the one place where bytes and operations are counted.

Each input is read once and each output written once, at its own size; a product takes two operations for each weight
and row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pyengine.reference import Tree
from pyengine.timing import Cost


class Weights(NamedTuple):
    """Numbers that a pass multiplies with, and their bytes: of the layers, and of the output head."""

    body: int
    head: int
    body_bytes: int
    head_bytes: int


def weights_of(model: Any) -> Weights:
    """Of a model of transformers'. An embedding table is looked up, not multiplied with, unless it is the head too."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    heads = {} if output is None else {id(output.weight): output.weight}
    body = {id(p): p for p in model.parameters() if p is not embedding and id(p) not in heads}
    of = [(sum(p.numel() for p in some.values()), sum(p.nbytes for p in some.values())) for some in (body, heads)]
    return Weights(of[0][0], of[1][0], of[0][1], of[1][1])


def model_pass(weights: Weights, tokens: int, rows: int) -> Cost:
    """All layers for so many tokens and the head for so many rows, without attention over the cache."""
    moved = weights.body_bytes + (weights.head_bytes if rows else 0)
    return Cost(moved, 2.0 * (weights.body * tokens + weights.head * rows))


def attention(query: Tensor, keys: float, pairs: float, width: int, heads: int) -> Cost:
    """One layer. keys: tokens whose keys and values are read; pairs: (new token, token that it sees)."""
    moved = 2.0 * keys * heads * width * query.element_size() + 2.0 * query.numel() * query.element_size()
    return Cost(moved, 4.0 * pairs * query.shape[0] * width, pairs * query.shape[0])


def tree_attention(query: Tensor, key: Tensor, tree: Tree, new: int, window: int | None) -> Cost:
    """query [Hq, T, D] and key [Hkv, T, D] of `new` tokens a row: a prefix is read once for all its rows, as far as a
    window reaches."""
    rows = (tree.first_row[1:] - tree.first_row[:-1]).double()
    prefix, tails = tree.prefix_len.double().clamp(max=window or 2**31), float(tree.tail_len.double().sum())
    pairs = new * (float((rows * prefix).sum()) + tails)
    return attention(query, float(prefix.sum()) + tails, pairs, key.shape[2], key.shape[0])


def causal(query: Tensor, key: Tensor, spans: Any) -> Cost:
    """Prompts that are read: each (…, start, stop) sees all before it."""
    keys = float(sum(stop for _, _, stop in spans))
    pairs = sum((stop * (stop + 1) - start * (start + 1)) / 2 for _, start, stop in spans)
    return attention(query, keys, pairs, key.shape[2], key.shape[0])


def tilt_sample(logits: Tensor, values: Tensor | None) -> Cost:
    """One pass over logits [B, V] and values [R, B, V]; an exponential for the base and one for the policy."""
    moved = logits.numel() * logits.element_size()
    if values is None:
        return Cost(moved, 0.0, logits.numel())
    return Cost(moved + values.numel() * values.element_size(), 0.0, 2.0 * logits.numel())


def select_block(scores: Tensor) -> Cost:
    """Scores [B, K, R] in, utilities and probabilities out."""
    return Cost(scores.numel() * scores.element_size() + 8.0 * scores.shape[0] * scores.shape[1])


def head_values(weights: int, rows: int, vocab: int) -> Cost:
    """The values [rows, vocab] of a head of so many fp32 weights."""
    return Cost(4.0 * (weights + rows * vocab), 2.0 * weights * rows)


def moved(tokens: int, token_bytes: int) -> Cost:
    """Keys and values of so many tokens, read and written."""
    return Cost(2.0 * tokens * token_bytes)


class Rates(NamedTuple):
    """Of a machine, a second: bytes read, operations of a product, exponentials."""

    bytes: float
    flops: float
    exps: float


def floor(cost: Cost, rates: Rates) -> tuple[float, str]:
    """Seconds that a call takes at least, and what sets them."""
    times = {
        "bytes": cost.bytes / rates.bytes,
        "products": cost.flops / rates.flops,
        "exponentials": cost.exps / rates.exps,
    }
    what = max(times, key=lambda name: times[name])
    return times[what], what
