"""The hook into transformers: while a pass of ours runs, a model's attention layers read and write our cache.

Registered without a mask function: transformers then builds no mask, and causality, windows and the tree are the
business of the pass. Models are called with `use_cache=False`, packed ids [1, T] and explicit positions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pyengine import costs, ops
from pyengine.cache import PAGE, BranchingCache, Sequence
from pyengine.ops.linear import (
    Forwards,
    Threads,
    check_patched,
    hold_threads,
    patch,
    release_threads,
    served,
    threads_held,
    unpatch,
)
from pyengine.ops.tree_attention import masked_attention, run_prepared
from pyengine.reference import Tree
from pyengine.timing import Cost, timed

T = TypeVar("T")
NAME = "pyengine"
QUERIES = 256  # of a long prompt at a time, where its mask or logits are written out


_PASS: ContextVar[Pass | None] = ContextVar("pyengine_pass", default=None)
# One pass at a time in a process, whoever's: models may share modules, and queue here.
_PASSING = threading.RLock()


def let_go(lock: Any = _PASSING) -> None:
    """This thread holds the lock no longer: an interrupt between the last line of a `with` and its exit leaves it held,
    and every other thread waiting for ever. Not within a pass, which holds it rightly."""
    if lock is _PASSING and _PASS.get() is not None:
        return
    try:
        while True:
            lock.release()
    except RuntimeError:  # it is not held any more
        pass


class Options(NamedTuple):
    """What a layer asks of attention."""

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Pass(Protocol):
    """One forward pass over packed tokens: query [Hq, T, D], key and value [Hkv, T, D] -> [T, Hq, D].

    name, cost: of a layer, for whoever records spans."""

    name: str

    def cost(self, query: Tensor, key: Tensor, options: Options) -> Cost: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor: ...


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
        raise RuntimeError("this model is in a pass of an engine in another thread; call it when that has ended")
    options = Options(scaling, sliding_window, softcap, s_aux)
    with timed(run.name, lambda: run.cost(query[0], key[0], options)):
        return run.attend(module.layer_idx, query[0], key[0], value[0], options)[None], None


AttentionInterface.register(NAME, _attention)


class Loan:
    """A model for the time of a pass: its attention is ours, its layers are quick, no module trains.

    What a pass changes is noted before, and given back when it ends, however it ends: between passes the model is its
    owner's, who may call it, train it, or lend it to another engine. ValueError where attention cannot be ours.
    steady: all forwards are needed, torch's own operators run on one thread, and nothing is autocast.
    """

    def __init__(self, model: Any, steady: bool = False) -> None:
        self.model, self.steady = model, steady
        self._modules: list[Any] = []
        self._forwards: Forwards = []
        self._noted: tuple[list[tuple[Any, str]], list[Any], Pass | None, Threads] | None = None
        self._configs = [config for config in _configs(model) if hasattr(config, "_attn_implementation")]
        with _PASSING:
            own = [(config, config._attn_implementation) for config in self._configs]
            try:
                try:
                    model.set_attn_implementation(NAME)
                    self._configs = [config for config in self._configs if config._attn_implementation == NAME]
                finally:
                    _attend(own)
            except BaseException:
                _attend(own)
                raise
        if not any(config is model.config for config in self._configs):
            raise ValueError("its attention does not go through transformers' AttentionInterface")

    def renew(self, forwards: Forwards) -> None:
        """Look at the model anew, as whoever owns it may have changed it; forwards: those of its quick layers."""
        with _PASSING:  # in a pass of another loan its layers would look hooked
            self._modules = list(self.model.modules())
            self._forwards = forwards if self.steady else served(forwards)

    def run(self, work: Pass, call: Callable[[], T]) -> T:
        """call(), a forward pass of the model in which attention layers do this work."""
        with _PASSING:
            # Given back once more where an interrupt cuts the first time short.
            try:
                try:
                    self._noted = (
                        [(config, config._attn_implementation) for config in self._configs],
                        [module for module in self._modules if module.training],
                        _PASS.get(),
                        threads_held(),
                    )
                    _attend([(config, NAME) for config in self._configs])
                    for module in self._noted[1]:
                        module.training = False
                    patch(self._forwards)
                    if self.steady:
                        check_patched(self._forwards)
                        hold_threads()
                    _PASS.set(work)
                    with torch.autocast("cpu", enabled=False) if self.steady else nullcontext():
                        return call()
                finally:
                    self._give_back()
            except BaseException:
                self._give_back()
                raise

    def _give_back(self) -> None:
        if self._noted is not None:
            _PASS.set(self._noted[2])
            unpatch(self._forwards)
            if self.steady:
                release_threads(self._noted[3])
            for module in self._noted[1]:
                module.training = True
            _attend(self._noted[0])
            self._noted = None


def _configs(model: Any) -> list[Any]:
    """Every config that a module of the model reads, each once; configs are not hashable."""
    found = {id(model.config): model.config}
    waiting = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
    while waiting:
        config = waiting.pop()
        found[id(config)] = config
        subs = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
        waiting += [sub for sub in subs if sub is not None and id(sub) not in found]
    return list(found.values())


def _attend(implementations: list[tuple[Any, str]]) -> None:
    """Each config names this attention. Its public setter would set those of sub-configs too."""
    for config, name in implementations:
        config._attn_implementation_internal = name


class Span(NamedTuple):
    """Tokens start .. stop - 1 of a sequence."""

    sequence: Sequence
    start: int
    stop: int


class Extend:
    """Prompts side by side: each span is written to its pages and reads all before it, which is there already."""

    name = "prompt_attention"

    def __init__(self, cache: BranchingCache, spans: list[Span]) -> None:
        self.cache, self.spans = cache, spans
        device = cache.layers[0][0].device
        at = [(s.pages[i // PAGE], i % PAGE) for s, start, stop in spans for i in range(start, stop)]
        self._page, self._offset = torch.tensor(at, device=device).T
        self._tables = [torch.tensor(span.sequence.pages, device=device) for span in spans]

    def cost(self, query: Tensor, key: Tensor, options: Options) -> Cost:
        return costs.causal(query, key, self.spans)

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


class ExtendByPage(Extend):
    """As Extend, page by page through the CPU kernel of tree_attention; spans begin at pages.

    So the bits of a token depend on the tokens before it alone: not on what is read beside it, and not on how much of
    its prompt was there already. A page is a row whose prefix are the pages before it and whose tail it is itself.
    """

    def __init__(self, cache: BranchingCache, spans: list[Span]) -> None:
        super().__init__(cache, spans)
        pages, lengths, index, back, first = list[list[int]](), list[int](), list[list[int]](), list[int](), 0
        longest = max(len(span.sequence.pages) for span in spans)
        for sequence, start, stop in spans:
            last = first + stop - start - 1
            for at in range(start, stop, PAGE):
                own = first + at - start
                back += [len(index) * PAGE + i for i in range(min(PAGE, stop - at))]
                index.append([min(own + i, last) for i in range(PAGE)])  # nobody looks at what follows the last
                pages.append(sequence.pages + [0] * (longest - len(sequence.pages)))
                lengths.append(at)
            first = last + 1
        rows = list(range(len(index) + 1))
        leaves, tails = [[row] for row in rows[:-1]], [PAGE] * len(index)
        self._tree = Tree(*(torch.tensor(x, dtype=torch.int32) for x in (pages, lengths, rows, leaves, tails)))
        self._index, self._back = torch.tensor(index), torch.tensor(back)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        keys, values = self.cache.layers[layer][:2]
        keys[self._page, :, self._offset] = key.transpose(0, 1)
        values[self._page, :, self._offset] = value.transpose(0, 1)
        query, key, value = (x.transpose(0, 1)[self._index] for x in (query, key, value))
        heads, width = key.shape[2:]
        tail_key = key.new_empty(len(key), heads, width, PAGE).transpose(-1, -2)
        tail_value = value.new_empty(len(value), heads, PAGE, width)
        stores = (keys, values, tail_key, tail_value)
        mixed = ops.tree_attention(query, *stores, tree=self._tree, key=key, value=value, **options._asdict())
        return mixed.flatten(0, 1)[self._back]


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

    calls: what `prepare` made for the layers and this tree, if anything.
    """

    name = "tree_attention"

    def __init__(self, cache: BranchingCache, tree: Tree, new: int = 1, calls: list[Any] | None = None) -> None:
        self.cache, self.tree, self.new, self.calls = cache, tree, new, calls

    def cost(self, query: Tensor, key: Tensor, options: Options) -> Cost:
        return costs.tree_attention(query, key, self.tree, self.new, options.window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        stores, given = self.cache.layers[layer], query.dtype
        if self.calls and given == key.dtype == value.dtype == stores[0].dtype:
            out = run_prepared(self.calls[layer], query, key, value, self.new, *options)
            if out is not None:
                return out
        query, key, value = (
            x.to(stores[0].dtype).transpose(0, 1).unflatten(0, (-1, self.new)) for x in (query, key, value)
        )
        mixed = ops.tree_attention(query, *stores, tree=self.tree, key=key, value=value, **options._asdict())
        return mixed.flatten(0, 1).to(given)


def layer_shapes(loan: Loan) -> list[tuple[int, int]]:
    """(key heads, width) of each layer, as one pass over one token shows them."""
    model, device = loan.model, loan.model.device
    found: dict[int, tuple[int, int]] = {}
    windows = []

    class Look:
        name = "look"

        def cost(self, query: Tensor, key: Tensor, options: Options) -> Cost:
            return Cost()

        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
            if value.shape != key.shape:
                raise ValueError("its values are not shaped like its keys")
            if options.window:
                windows.append(layer)
            found[layer] = (key.shape[0], key.shape[2])
            return query.transpose(0, 1)

    def call() -> None:
        zero = torch.zeros(1, 1, dtype=torch.long, device=device)
        model(input_ids=zero, position_ids=zero, use_cache=False)

    loan.renew([])
    with torch.inference_mode():
        loan.run(Look(), call)
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError("its attention layers are not numbered one by one")
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    sliding = types.count("sliding_attention") if types else len(found) * bool(getattr(config, "sliding_window", None))
    if len(windows) < sliding:  # Qwen2-MoE, PhiMoE: transformers puts it into the mask, which the hook does not see
        raise ValueError("its sliding window is told to the mask alone")
    return [found[i] for i in range(len(found))]
