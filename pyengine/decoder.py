"""A model on the branching cache, behind the verbs that the engine needs of any decoder.

decoder.begin()                          # until end(): the model is asked for passes
why = decoder.refuses(tokens, growth)    # what keeps a prompt of so many tokens from ever joining, or None
stem = decoder.join(ids, leaves)         # a prompt's place, if there is room for it and such branches; else None
frontier = decoder.prefill(stems, most)  # read on in these prompts, at most so many tokens: those that are read
decoder.fork(stem, k, room)              # k empty branches of at most `room` tokens
planted = decoder.plant(rows)            # (stem, branch) in the order of the rows of a step, a stem's side by side
frontier = decoder.step(planted, tokens, alive)   # one token a row; rows that are not alive may get anything
decoder.commit([(stem, branch, length)]) # the winners join their prefixes; their branches are gone
decoder.leave(stem)                      # it needs no more
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyengine import costs
from pyengine.attention import Decode, Extend, ExtendByPage, Loan, Pass, Span, layer_shapes
from pyengine.cache import LEAF, PAGE, BranchingCache, Sequence, budget_for, bytes_of, in_gb
from pyengine.checkpoint import context_of
from pyengine.errors import InputError
from pyengine.modes import states_of
from pyengine.ops.linear import Forwards, quick_forwards, steady_forwards
from pyengine.ops.settings import settings
from pyengine.ops.tree_attention import kernel_serves, prepare
from pyengine.reference import Tree
from pyengine.scorers.base import Hidden
from pyengine.timing import timed

PREFILL_TOKENS = 4096  # in one pass
LIGHT = 4_000_000  # parameters: at 10 million rows that idle cost more than looks do


class Frontier(NamedTuple):
    """Next-token logits [N, V] and hidden states {layer: [N, D]} at each row's last token: no score misses it."""

    logits: Tensor
    hidden: Hidden

    def rows(self, index: Tensor) -> Frontier:
        """The rows of `index`, in its order."""
        return Frontier(self.logits[index], {layer: h[index] for layer, h in self.hidden.items()})

    @staticmethod
    def of(parts: list[Frontier]) -> Frontier:
        """All rows of these, one after the other."""
        if len(parts) == 1:
            return parts[0]
        hidden = {layer: torch.cat([part.hidden[layer] for part in parts]) for layer in parts[0].hidden}
        return Frontier(torch.cat([part.logits for part in parts]), hidden)


@dataclass(eq=False)
class Stem:
    """A request's place in a decoder: its prefix, and while a block is on its way its branches."""

    ids: list[int]  # read, or to be read
    sequence: Sequence | None = None
    filled: int = 0  # tokens of ids that are in the pages
    leaves: list[list[int]] = field(default_factory=list)  # of each branch
    lengths: list[int] = field(default_factory=list)  # tokens of each branch when it is planted
    at: Frontier | None = None  # of the prefix, where a reader keeps it
    state: Any = None  # what a kind of decoder keeps besides


class Planted(NamedTuple):
    """The tables of the rows of a step, and each row's next position; on a GPU in tensors that stay where they are.

    Rows that pad a bucket have no leaves and tails of no tokens: nothing is read or written for them.
    """

    tree: Tree
    positions: Tensor
    calls: list[Any]  # what `prepare` made for the layers and this tree, if anything


Rows = list[tuple[Stem, int]]  # (stem, branch); the branches of a stem lie side by side


class Decoder(Protocol):
    """What the engine needs of a decoder; see the module's docstring."""

    layers: tuple[int, ...]  # hidden states that every frontier carries
    device: torch.device
    max_rows: int
    waits: bool  # reading what a step drew would hold it up; rows that have ended may then go on for nothing
    idles: bool  # rows that have ended may stay: they do no harm, wherever they stand in the context
    light: bool  # a step takes hardly longer than the host's look at it, so that rows may idle until the next
    captured: dict[Hashable, Any]  # what is replayed

    def begin(self) -> None: ...
    def end(self, whole: bool = True) -> None: ...
    def forget(self) -> None: ...
    def refuses(self, tokens: int, growth: int, k: int, room: int) -> str | None: ...
    def join(self, ids: list[int], leaves: int) -> Stem | None: ...
    def prefill(self, stems: list[Stem], most: int) -> list[tuple[Stem, Frontier]]: ...
    def fork(self, stem: Stem, k: int, room: int) -> None: ...
    def plant(self, rows: Rows) -> Any: ...
    def step(self, planted: Any, tokens: Tensor, alive: Tensor) -> Frontier: ...
    def commit(self, winners: list[tuple[Stem, int, int]]) -> None: ...
    def leave(self, stem: Stem) -> None: ...
    def pages_short(self, winners: list[tuple[Stem, int, int]]) -> int: ...


class BranchingDecoder:
    """Each prefix is kept and read once for all its branches; branches cost their tails.

    layers: the hidden states that every frontier carries. max_rows: most branches at once. budget: bytes of keys and
    values; None is a share of the memory that is free. frozen: nothing about the model changes while this lives, so
    that the pages of prompts and captured graphs outlive `end`. steady: a row's bits depend on its own tokens alone,
    as far as `invariance.why_not` finds nothing; on a CPU.
    """

    idles = True
    label = "model"  # of a pass, for whoever records spans

    def __init__(
        self,
        model: Any,
        layers: tuple[int, ...],
        max_rows: int,
        budget: float | None = None,
        frozen: bool = False,
        steady: bool = False,
    ) -> None:
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise ValueError("its layers are on several devices")
        self.model, self.layers, self.max_rows, self.frozen = model, layers, max_rows, frozen
        self.device: torch.device = model.device
        self.steady, self._modules = steady, list(model.modules())
        self._loan = Loan(model, steady)
        self._shapes = layer_shapes(self._loan)
        self.cache = BranchingCache(self._shapes, bytes_of(budget, model.device), model.dtype, model.device)
        self.waits = model.device.type != "cpu"
        self.light = sum(parameter.numel() for parameter in model.parameters()) <= LIGHT
        self.context = context_of(model.config) or 2**31
        self._keep_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._quick = [] if steady else quick_forwards(model)
        self._weights = costs.weights_of(model)
        self._stems: list[Stem] = []  # that have joined, oldest first
        # Where the device is not to be waited for: tables by the size of their bucket, and what was captured over them.
        self._buckets: dict[tuple[int, ...], Planted] = {}
        self.captured: dict[Hashable, Any] = {}

    # Between calls

    def begin(self) -> None:
        self._loan.renew(self._steady_forwards() if self.steady else self._quick)

    def _steady_forwards(self) -> Forwards:
        """Of every layer that the model has now; InputError where those are not the layers that were tried."""
        if list(self.model.modules()) != self._modules:
            raise InputError("batch_invariant: the model has other modules than when it was tried: make another engine")
        if not kernel_serves(*self.cache.layers[0]):
            raise InputError("batch_invariant: the width of its heads is no multiple of 16")
        return steady_forwards(self.model)

    def end(self, whole: bool = True) -> None:
        """All prompts leave. whole: nothing was cut short, so that the books balance and pages hold what they are named
        for; safe to call again where it was cut short itself."""
        if whole and self.frozen:
            for stem in list(self._stems):
                self.leave(stem)
        else:
            self.forget()
        self._stems = []

    def forget(self) -> None:
        """Nothing that was read or captured so far is used again; only while no prompt is there."""
        self.cache.clear()
        self.captured.clear()
        self._buckets.clear()

    @contextmanager
    def on_trial(self, tokens: int, prompts: int = 2, rows: int = 4) -> Iterator[None]:
        """Inside, a small cache stands in for the decoder's own: some branches of prompts of so many tokens.

        So a trial asks nothing of the memory and the rows that the engine was given.
        """
        own, most = self.cache, self.max_rows
        budget = budget_for(own.token_bytes, prompts * own.pages_for(tokens), rows * LEAF)
        self.cache, self.max_rows = BranchingCache(self._shapes, budget, self.model.dtype, self.model.device), rows
        try:
            yield
        finally:
            self.cache, self.max_rows = own, most

    # Prompts

    def refuses(self, tokens: int, growth: int, k: int, room: int) -> str | None:
        leaves = k * self.cache.leaves_for(room)
        if leaves > self.cache.leaves:
            least = in_gb(budget_for(self.cache.token_bytes, 1, leaves * LEAF))
            return (
                f"{k} branches of {room} tokens need a cache of {least} for their tails alone: give the engine more "
                "memory (cache_gb), or take fewer branches or shorter ones"
            )
        needed = self.cache.pages_for(tokens + growth)
        if needed <= self.cache.capacity:
            return None
        return (
            f"a prompt of {tokens} tokens that may grow by {growth} needs {needed} pages of cache, there are "
            f"{self.cache.capacity}: give the engine more memory (cache_gb; "
            f"{in_gb(budget_for(self.cache.token_bytes, needed, 0))} hold one such prompt)"
        )

    def join(self, ids: list[int], leaves: int) -> Stem | None:
        if self.cache.leaves_free < leaves or self.cache.pages_free < self.cache.pages_for(len(ids)):
            return None
        sequence = self.cache.add(ids)
        stem = Stem(ids, sequence, sequence.shared)
        self._stems.append(stem)
        return stem

    @torch.inference_mode()
    def prefill(self, stems: list[Stem], most: int) -> list[tuple[Stem, Frontier]]:
        """In the order in which they joined, as a prompt may share pages of one before it."""
        spans, ids, done = list[Span](), list[int](), list[tuple[Stem, int]]()
        for stem in stems:
            stop = min(len(stem.ids), stem.filled + most - len(ids))
            if self.steady and stop < len(stem.ids):
                stop = stop // PAGE * PAGE
            if stop <= stem.filled:
                break
            assert stem.sequence is not None
            spans.append(Span(stem.sequence, stem.filled, stop))
            ids += stem.ids[stem.filled : stop]
            if stop == len(stem.ids):
                done.append((stem, len(ids) - 1))
        if not spans:
            return []
        work = (ExtendByPage if self.steady else Extend)(self.cache, spans)
        last = [at for _, at in done] or [len(ids) - 1]
        tables = (torch.tensor(x, device=self.model.device) for x in (ids, work.positions(), last))
        frontier = self._forward(work, *tables)
        for stem, span in zip(stems, spans, strict=False):
            stem.filled = span.stop
        return [(stem, frontier.rows(torch.tensor([i], device=self.model.device))) for i, (stem, _) in enumerate(done)]

    def leave(self, stem: Stem) -> None:
        """A prompt that was not read to its end leaves what is missing to those that share its pages."""
        sequence = stem.sequence
        assert sequence is not None
        self._stems.remove(stem)
        self._drop(stem)
        if stem.filled < sequence.length:
            for other in self._stems:
                page = stem.filled // PAGE
                theirs = other.sequence
                assert theirs is not None
                if other.filled > stem.filled and theirs.pages[: page + 1] == sequence.pages[: page + 1]:
                    other.filled, theirs.fresh = stem.filled, [*sequence.fresh, *theirs.fresh]
                    self.cache.release(sequence)
                    break
            else:
                self.cache.discard(sequence)
        else:
            self.cache.release(sequence)
        stem.sequence = None

    # Branches

    def fork(self, stem: Stem, k: int, room: int) -> None:
        self._drop(stem)  # a block that was begun and not committed
        each = self.cache.leaves_for(room)
        taken = self.cache.take_leaves(k * each)
        stem.leaves = [taken[i * each : (i + 1) * each] for i in range(k)]
        stem.lengths = [0] * k

    def _drop(self, stem: Stem) -> None:
        for leaves in stem.leaves:
            self.cache.give_leaves(leaves)
        stem.leaves, stem.lengths = [], []

    def plant(self, rows: Rows) -> Planted:
        """The tree of these rows as their branches are: tails of `lengths` tokens."""
        first = [i for i, (stem, _) in enumerate(rows) if i == 0 or rows[i - 1][0] is not stem]
        sequences = [s for i in first if (s := rows[i][0].sequence) is not None]
        first.append(len(rows))
        wide, deep = max(len(s.pages) for s in sequences), max(len(stem.leaves[b]) for stem, b in rows)
        lengths = [stem.lengths[b] for stem, b in rows]
        tables: list[Any] = [
            [s.pages + [0] * (wide - len(s.pages)) for s in sequences],
            [s.length for s in sequences],
            first,
            [stem.leaves[b] + [-1] * (deep - len(stem.leaves[b])) for stem, b in rows],
            lengths,
        ]
        positions = [stem.sequence.length + n for (stem, _), n in zip(rows, lengths, strict=True) if stem.sequence]
        if not self.waits:
            tree = Tree(*(torch.tensor(x, dtype=torch.int32, device=self.model.device) for x in tables))
            return Planted(tree, torch.tensor(positions), prepare(self.cache.layers, tree))
        planted = self._bucket(len(rows), wide, deep)
        # The first prompt that pads the bucket has all the rows that do.
        tables[2] += [len(planted.positions)] * (len(planted.tree.first_row) - len(first))
        planted.tree.leaves.fill_(-1)
        for to, x in zip(planted.tree, tables, strict=True):
            found = torch.tensor(x, dtype=torch.int32)
            if to is not planted.tree.leaves:
                to.zero_()
            to[tuple(slice(size) for size in found.shape)].copy_(found)
        planted.positions.zero_()[: len(positions)].copy_(torch.tensor(positions))
        return planted

    def _bucket(self, *sizes: int) -> Planted:
        """The tensors for so many rows, pages and leaves: the next powers of two, and as many prompts as rows."""
        key = tuple(map(power_of_two, sizes))
        if key not in self._buckets:
            rows, wide, deep = key
            zeros = partial(torch.zeros, dtype=torch.int32, device=self.model.device)
            tree = Tree(zeros(rows, wide), zeros(rows), zeros(rows + 1), zeros(rows, deep), zeros(rows))
            self._buckets[key] = Planted(tree, zeros(rows).long(), [])
        return self._buckets[key]

    def step(self, planted: Planted, tokens: Tensor, alive: Tensor) -> Frontier:
        """On the device alone: it may be captured and replayed. A row that is not alive reads its last token again, if
        that is what it is given."""
        planted.tree.tail_len.add_(alive)
        planted.positions.add_(alive)
        positions = (planted.positions - 1).clamp_(min=0)  # of a row that pads a bucket
        return self._forward(Decode(self.cache, planted.tree, 1, planted.calls), tokens, positions)

    @torch.inference_mode()
    def extend(self, planted: Planted, tokens: Tensor, last: Tensor) -> Frontier:
        """S tokens a row [N, S] in one pass; the frontier is at token last[n] of each row."""
        rows, new = tokens.shape
        planted.tree.tail_len.add_(new)
        step = torch.arange(new, device=tokens.device)
        where = torch.arange(0, rows * new, new, device=tokens.device) + last
        positions = (planted.positions[:, None] + step).flatten().clamp(max=self.context - 1)
        work = Decode(self.cache, planted.tree, new, planted.calls)
        planted.positions.add_(new)
        return self._forward(work, tokens.flatten(), positions, where)

    @torch.inference_mode()
    def commit(self, winners: list[tuple[Stem, int, int]]) -> None:
        """InputError, before anything is moved, where there are not the pages."""
        moves = []
        for stem, branch, length in winners:
            assert stem.sequence is not None
            self.cache.grow(stem.sequence, stem.sequence.length + length)
            moves.append((stem.sequence, stem.leaves[branch], length))
        self.cache.commit(moves)
        for stem, _, length in winners:
            stem.filled += length
            self._drop(stem)
        if settings.debug:
            self.check_integrity()

    def check_integrity(self) -> None:
        """AssertionError where the cache's books do not balance, or a leaf is neither free nor a branch's."""
        self.cache.check_integrity()
        taken = sum(len(leaves) for stem in self._stems for leaves in stem.leaves)
        assert taken + self.cache.leaves_free == self.cache.leaves, f"{taken} leaves are branches', not all others free"

    def pages_short(self, winners: list[tuple[Stem, int, int]]) -> int:
        """How many pages more than there are the commit of these needs."""
        needed = 0
        for stem, _, length in winners:
            assert stem.sequence is not None
            needed += max(0, self.cache.pages_for(stem.sequence.length + length) - len(stem.sequence.pages))
        return needed - self.cache.pages_free

    # The model

    def _forward(self, work: Pass, ids: Tensor, positions: Tensor, rows: Tensor | None = None) -> Frontier:
        """The frontier of packed tokens [T], or of some of them."""
        kept = ids if rows is None else rows
        with timed(self.label, lambda: costs.model_pass(self._weights, len(ids), len(kept))):
            return self._loan.run(work, lambda: self._read(ids[None], positions[None], rows))

    def _read(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Frontier:
        """One call of the model."""
        keep: dict[str, Any] = {"logits_to_keep": rows} if rows is not None and self._keep_some else {}
        states = bool(self.layers)
        output = self.model(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=states, **keep)
        hidden = {layer: states_of(self.model, output, layer)[0] for layer in self.layers}
        if rows is None:
            return Frontier(output.logits[0], hidden)
        logits = output.logits[0] if keep else output.logits[0, rows]
        return Frontier(logits, {layer: h[rows] for layer, h in hidden.items()})


def spare_rows(decoder: Decoder, planted: Any, rows: int) -> int:
    """How many rows pad the bucket in which so many are planted."""
    return len(planted.positions) - rows if decoder.waits else 0


def power_of_two(n: int) -> int:
    """The next power of two, n itself included."""
    return 1 << max(0, n - 1).bit_length()
