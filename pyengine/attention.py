"""The hook into transformers: while a pass of ours runs, a model's attention layers read and write our cache.

Registered without a mask function: transformers then builds no mask, and causality, windows and the tree are the
business of the pass. Models are called with `use_cache=False`, packed ids [1, T] and explicit positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pyengine import ops
from pyengine.cache import PAGE, BranchingCache, Sequence
from pyengine.ops.tree_attention import masked_attention, run_prepared
from pyengine.reference import Tree

NAME = "pyengine"
QUERIES = 256  # of a long prompt at a time, where its mask or logits are written out


class Options(NamedTuple):
    """What a layer asks of attention."""

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Pass(Protocol):
    """One forward pass over packed tokens: query [Hq, T, D], key and value [Hkv, T, D] -> [T, Hq, D]."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor: ...


_PASS: ContextVar[Pass | None] = ContextVar("pyengine_pass", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    run = _PASS.get()
    if run is None:
        raise RuntimeError("this model is lent to a running Engine.generate or .stream; call it when that has ended")
    options = Options(scaling, sliding_window, softcap, s_aux)
    return run.attend(module.layer_idx, query[0], key[0], value[0], options)[None], None


AttentionInterface.register(NAME, _attention)


# By the id of a config, which a model may share with its body and which lives as long as the hook: how many have hooked
# it, and what its attention was before the first. Whoever ends last gives it back.
_HOOKED: dict[int, tuple[int, str]] = {}


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    """The model's attention is ours inside; ValueError where the model does not let it."""
    count, before = _HOOKED.get(id(model.config), (0, model.config._attn_implementation))
    if count == 0:
        model.set_attn_implementation(NAME)
    _HOOKED[id(model.config)] = (count + 1, before)
    try:
        if model.config._attn_implementation != NAME:
            raise ValueError("its attention does not go through transformers' AttentionInterface")
        yield
    finally:
        count, before = _HOOKED.pop(id(model.config))
        if count > 1:
            _HOOKED[id(model.config)] = (count - 1, before)
        else:
            model.set_attn_implementation(before)


@contextmanager
def unhooked(model: Any) -> Iterator[None]:
    """Inside `hooked`, the model is its own for as long."""
    found = _HOOKED.get(id(model.config))
    if found:
        model.set_attn_implementation(found[1])
    try:
        yield
    finally:
        if found:
            model.set_attn_implementation(NAME)


@contextmanager
def running(work: Pass) -> Iterator[None]:
    """Attention layers that are called inside do the work of this pass."""
    token = _PASS.set(work)
    try:
        yield
    finally:
        _PASS.reset(token)


class Span(NamedTuple):
    """Tokens start .. stop - 1 of a sequence."""

    sequence: Sequence
    start: int
    stop: int


class Extend:
    """Prompts side by side: each span is written to its pages and reads all before it, which is there already."""

    def __init__(self, cache: BranchingCache, spans: list[Span]) -> None:
        self.cache, self.spans = cache, spans
        device = cache.layers[0][0].device
        at = [(s.pages[i // PAGE], i % PAGE) for s, start, stop in spans for i in range(start, stop)]
        self._page, self._offset = torch.tensor(at, device=device).T
        self._tables = [torch.tensor(span.sequence.pages, device=device) for span in spans]

    def positions(self) -> list[int]:
        return [i for span in self.spans for i in range(span.start, span.stop)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        keys, values = self.cache.layers[layer][:2]
        given = query.dtype  # autocast may have another mind than the cache
        query, key, value = (x.to(keys.dtype) for x in (query, key, value))
        keys[self._page, :, self._offset] = key.transpose(0, 1)
        values[self._page, :, self._offset] = value.transpose(0, 1)
        out = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
        first = 0
        for span, table in zip(self.spans, self._tables, strict=True):
            new = slice(first, first + span.stop - span.start)
            first = new.stop
            own, of_own = key[:, new], value[:, new]
            if span.start:
                pages = table[: BranchingCache.pages_for(span.stop)]
                own, of_own = (x[pages].transpose(0, 1).flatten(1, 2)[:, : span.stop] for x in (keys, values))
            out[new] = _causal(query[:, new], own, of_own, options).transpose(0, 1)
        return out.to(given)


def _causal(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """query [Hq, S, D] of the last S of T tokens, key and value [Hkv, T, D] -> [Hq, S, D]."""
    new, length, group = query.shape[1], key.shape[1], len(query) // len(key)
    plain = options.softcap is None and options.sinks is None
    if plain and new == length and (options.window or length) >= length:
        shared = query.is_cuda and group > 1  # on a CPU a copy for each query head is quicker
        if not shared:
            key, value = (x.repeat_interleave(group, 0) for x in (key, value))
        return scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=options.scale, enable_gqa=shared
        )[0]
    at = torch.arange(length, device=query.device)
    parts = []
    for first in range(length - new, length, QUERIES):
        last = min(first + QUERIES, length)
        low = max(0, first + 1 - (options.window or length))
        behind = at[first:last, None] - at[low:last]
        seen = (behind >= 0) & (behind < (options.window or length))
        rows = query[:, first - length + new : last - length + new]
        past = key[:, low:last], value[:, low:last]
        parts.append(masked_attention(rows, *past, seen, options.scale, options.softcap, options.sinks))
    return torch.cat(parts, 1)


class Decode:
    """`new` tokens for each row: they join the row's tail and read that and the prefix of its prompt.

    calls: what `prepare` made for the layers and this tree, if anything; tail_len: then the tree's, on the host.
    """

    def __init__(
        self, cache: BranchingCache, tree: Tree, new: int = 1, calls: list[Any] | None = None, tail_len: int = 0
    ) -> None:
        self.cache, self.tree, self.new, self.calls, self.tail_len = cache, tree, new, calls, tail_len

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        stores, given = self.cache.layers[layer], query.dtype
        if self.calls and given == key.dtype == value.dtype == stores[0].dtype:
            out = run_prepared(self.calls[layer], query, key, value, self.new, self.tail_len, *options)
            if out is not None:
                return out
        query, key, value = (
            x.to(stores[0].dtype).transpose(0, 1).unflatten(0, (-1, self.new)) for x in (query, key, value)
        )
        mixed = ops.tree_attention(query, *stores, tree=self.tree, key=key, value=value, **options._asdict())
        return mixed.flatten(0, 1).to(given)
