"""A model on the branching cache, behind the verbs that the engine needs of any decoder.

decoder.open(k, room)                  # until close(): k branches a prompt, of at most `room` tokens
why = decoder.refuses(tokens, growth)  # what keeps a prompt of so many tokens from ever joining, or None
n = decoder.fits(waiting)              # how many of the waiting prompts can join now
decoder.join(prompts)                  # prefill; they come after the prompts that are there
frontier = decoder.fork()              # row b becomes rows b*k .. b*k + k-1
frontier = decoder.append(tokens)      # one token a row
frontier = decoder.keep(rows)          # these branches go on, the others are not looked at again
decoder.commit(rows)                   # the winners join their prefixes; prompts without one leave
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyengine.attention import Decode, Extend, ExtendByPage, Loan, Options, Pass, Span
from pyengine.cache import STEP, BranchingCache, Sequence, budget_for, bytes_of, in_gb
from pyengine.checkpoint import context_of
from pyengine.errors import InputError
from pyengine.ops.linear import Forwards, quick_forwards, steady_forwards
from pyengine.ops.tree_attention import kernel_serves, prepare
from pyengine.reference import Tree
from pyengine.scorers.base import Hidden

PREFILL_TOKENS = 4096  # in one pass


class Frontier(NamedTuple):
    """Next-token logits [N, V] and hidden states {layer: [N, D]} at the last token of each row.

    After a prompt or a token every row carries them, so no score ever misses its last token.
    """

    logits: Tensor
    hidden: Hidden

    def rows(self, index: Tensor) -> Frontier:
        """The rows of `index`, in its order."""
        return Frontier(self.logits[index], {layer: h[index] for layer, h in self.hidden.items()})

    def then(self, other: Frontier) -> Frontier:
        """These rows, and then the other's."""
        hidden = {layer: torch.cat([h, other.hidden[layer]]) for layer, h in self.hidden.items()}
        return Frontier(torch.cat([self.logits, other.logits]), hidden)


class Prompt(NamedTuple):
    """A prompt that wants to join: its tokens, and how many more may be committed to it."""

    ids: list[int]
    growth: int


class Planted(NamedTuple):
    """A block's tree in tensors that stay where they are, padded to a bucket of prompts, and each row's next position.

    Padded prompts are empty; their rows have slots of their own, so that what they write harms nobody.
    """

    tree: Tree
    positions: Tensor


class Decoder(Protocol):
    """What the engine needs of a decoder; see the module's docstring."""

    layers: tuple[int, ...]  # hidden states that every frontier carries
    waits: bool  # reading what a step drew would hold it up; rows that have ended may then go on for nothing
    captured: dict[Hashable, Any]  # what is replayed

    def open(self, k: int, room: int) -> None: ...
    def close(self, whole: bool = True) -> None: ...
    def forget(self) -> None: ...
    def refuses(self, tokens: int, growth: int) -> str | None: ...
    def fits(self, waiting: list[Prompt]) -> int: ...
    def join(self, prompts: list[Prompt]) -> None: ...
    def fork(self) -> Frontier: ...
    def append(self, tokens: Tensor) -> Frontier: ...
    def keep(self, rows: Tensor) -> Frontier: ...
    def commit(self, rows: Tensor) -> None: ...


class BranchingDecoder:
    """Each prefix is kept and read once for all its branches; branches cost their tails.

    layers: the hidden states that every frontier carries. max_rows: most branches at once. budget: bytes of keys and
    values; None is a share of the memory that is free. frozen: nothing about the model changes while this lives, so
    that the pages of prompts and captured graphs outlive a call. steady: a row's bits depend on its own tokens alone,
    as far as `invariance.why_not` finds nothing; on a CPU.
    """

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
        self.steady, self._modules = steady, list(model.modules())
        self._loan = Loan(model, steady)
        self._shapes = _layer_shapes(self._loan)
        self.cache = BranchingCache(self._shapes, bytes_of(budget, model.device), model.dtype, model.device)
        self.waits = model.device.type != "cpu"
        self.context = context_of(model.config) or 2**31
        self._keep_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._quick = [] if steady else quick_forwards(model)
        self._k = 1
        self._sequences: list[Sequence] = []
        self._at = Frontier(torch.empty(0), {})  # of the sequences
        # Of the branches while a block is on its way:
        self._branches = self._at
        self._owner: list[int] = []  # the sequence of each row
        self._slot: list[int] = []
        self._tail_len = 0
        self._tree: Tree | None = None
        self._calls: list[Any] = []
        self._positions = torch.empty(0)
        # Where the device is not to be waited for: trees by the size of their bucket, and what was captured over them.
        self.planted: Planted | None = None
        self._buckets: dict[tuple[int, int], Planted] = {}
        self.captured: dict[Hashable, Any] = {}

    def open(self, k: int, room: int) -> None:
        most = min(max(self.max_rows, k), self.cache.most_slots(room))
        if most < k:
            least = in_gb(budget_for(self.cache.token_bytes, 1, k * self.cache.room_for(room)))
            raise InputError(
                f"{k} branches of {room} tokens need a cache of {least} for their tails alone: give the engine more "
                "memory (cache_gb), or take fewer branches or shorter ones"
            )
        before = (self._k, self.cache.slots, self.cache.room)
        self._k = k
        self.cache.open(most // k * k, room)
        if before != (k, self.cache.slots, self.cache.room):  # other tensors than were captured
            self.captured.clear()
            self._buckets.clear()
        self._loan.renew(self._steady_forwards() if self.steady else self._quick)

    def _steady_forwards(self) -> Forwards:
        """Of every layer that the model has now; InputError where those are not the layers that were tried."""
        if list(self.model.modules()) != self._modules:
            raise InputError("batch_invariant: the model has other modules than when it was tried: make another engine")
        if not kernel_serves(*self.cache.layers[0]):
            raise InputError("batch_invariant: the width of its heads is no multiple of 16")
        return steady_forwards(self.model)

    @contextmanager
    def on_trial(self, tokens: int, prompts: int = 2, rows: int = 4) -> Iterator[None]:
        """Inside, a small cache stands in for the decoder's own: some branches of prompts of so many tokens.

        So a trial asks nothing of the memory and the rows that the engine was given.
        """
        own, most = self.cache, self.max_rows
        budget = budget_for(own.token_bytes, prompts * own.pages_for(tokens), rows * own.room_for(1))
        self.cache, self.max_rows = BranchingCache(self._shapes, budget, self.model.dtype, self.model.device), rows
        try:
            yield
        finally:
            self.cache, self.max_rows = own, most

    def close(self, whole: bool = True) -> None:
        """All prompts leave. whole: nothing was cut short, so that the books balance and pages hold what they are named
        for; safe to call again where it was cut short itself."""
        if whole and self.frozen:
            for sequence in self._sequences:
                self.cache.release(sequence)
        else:
            self.forget()
        self._sequences, self._tree, self._calls = [], None, []

    def forget(self) -> None:
        """Nothing that was read or captured so far is used again; only between calls."""
        self.cache.clear()
        self.captured.clear()

    def refuses(self, tokens: int, growth: int) -> str | None:
        needed = self.cache.pages_for(tokens + growth)
        if needed <= self.cache.capacity:
            return None
        return (
            f"a prompt of {tokens} tokens that may grow by {growth} needs {needed} pages of cache, there are "
            f"{self.cache.capacity}: give the engine more memory (cache_gb; "
            f"{in_gb(budget_for(self.cache.token_bytes, needed, 0))} hold one such prompt)"
        )

    def fits(self, waiting: list[Prompt]) -> int:
        prompts, pages = self.cache.slots // self._k - len(self._sequences), self.cache.pages_free
        for count, prompt in enumerate(waiting):
            pages -= self.cache.pages_for(len(prompt.ids) + prompt.growth)
            if count >= prompts or pages < 0:
                return count
        return len(waiting)

    @torch.inference_mode()
    def join(self, prompts: list[Prompt]) -> None:
        start = 0
        while start < len(prompts):
            stop, tokens = start, 0
            pack: list[Sequence] = []
            try:
                while stop < len(prompts) and (not pack or tokens + len(prompts[stop].ids) <= PREFILL_TOKENS):
                    pack.append(self.cache.add(*prompts[stop]))
                    tokens += pack[-1].length - pack[-1].shared
                    stop += 1
                found = self._prefill(pack, [p.ids for p in prompts[start:stop]])
                self._at = self._at.then(found) if self._sequences else found
            except BaseException:
                for sequence in reversed(pack):
                    self.cache.discard(sequence)
                raise
            self._sequences += pack
            start = stop

    def _prefill(self, pack: list[Sequence], ids: list[list[int]]) -> Frontier:
        """The frontier of new sequences; one that is longer than a pass may be is read in several."""
        spans = [Span(sequence, sequence.shared, sequence.length) for sequence in pack]
        if len(pack) == 1:
            sequence, start, stop = spans[0]
            while stop - start > PREFILL_TOKENS:
                self._read_spans([Span(sequence, start, start + PREFILL_TOKENS)], ids)
                start += PREFILL_TOKENS
            spans = [Span(sequence, start, stop)]
        return self._read_spans(spans, ids)

    def _read_spans(self, spans: list[Span], ids: list[list[int]]) -> Frontier:
        work = (ExtendByPage if self.steady else Extend)(self.cache, spans)
        tokens = [token for (_, start, stop), own in zip(spans, ids, strict=True) for token in own[start:stop]]
        last, end = [], 0
        for span in spans:
            end += span.stop - span.start
            last.append(end - 1)
        tables = (torch.tensor(x, device=self.model.device) for x in (tokens, work.positions(), last))
        return self._forward(work, *tables)

    def fork(self) -> Frontier:
        n = len(self._sequences)
        self._owner = [i for i in range(n) for _ in range(self._k)]
        self._slot = list(range(n * self._k))
        self._tail_len = 0
        self._branches = self._at
        if self._k > 1:
            index = torch.arange(n, device=self.model.device).repeat_interleave(self._k)
            self._branches = self._at.rows(index)
        self._plant()
        return self._branches

    def _plant(self) -> None:
        """The tree of the branches that are left, and the position of their next token."""
        device, n = self.model.device, len(self._sequences)
        longest = max(len(s.pages) for s in self._sequences)
        pages = [s.pages + [0] * (longest - len(s.pages)) for s in self._sequences]
        lengths = [s.length for s in self._sequences]
        counts = [0] * (n + 1)
        for owner in self._owner:
            counts[owner + 1] += 1
        for i in range(n):
            counts[i + 1] += counts[i]
        positions = [lengths[i] + self._tail_len for i in self._owner]
        leaves = [self.cache.leaves_of(slot) for slot in self._slot]
        tables: list[Any] = [pages, lengths, counts, leaves, [self._tail_len] * len(leaves)]
        if not self.waits:
            self._tree = Tree(*(torch.tensor(x, dtype=torch.int32, device=device) for x in tables))
            self._positions = torch.tensor(positions, device=device)
            self._calls = prepare(self.cache.layers, self._tree)
            return
        whole = self.planted = self._bucket(n, longest)
        rows, used = len(self._slot), set(self._slot)
        spare = [slot for slot in range(self.cache.slots) if slot not in used]
        empty = len(whole.tree.prefix_len) - n
        tables[2] = counts + [counts[-1] + self._k * (i + 1) for i in range(empty)]
        tables[3] += [self.cache.leaves_of(slot) for slot in spare[: len(whole.positions) - rows]]
        tables[4] = [self._tail_len] * len(whole.positions)
        for to, x in zip(whole.tree, tables, strict=True):
            found = torch.tensor(x, dtype=torch.int32)
            to.zero_()[tuple(slice(size) for size in found.shape)].copy_(found)
        whole.positions.zero_()[: len(positions)].copy_(torch.tensor(positions))
        tree = whole.tree
        per_prompt = (tree.pages[:n], tree.prefix_len[:n], tree.first_row[: n + 1])
        self._tree = Tree(*per_prompt, tree.leaves[:rows], tree.tail_len[:rows])
        self._positions = whole.positions[:rows]

    def _bucket(self, prompts: int, pages: int) -> Planted:
        """The tensors for so many prompts of so many pages; sizes are powers of two, or all slots that there are."""
        most = self.cache.slots // self._k
        key = (min(power_of_two(prompts), most), power_of_two(pages))
        if key not in self._buckets:
            n, width = key
            zeros = partial(torch.zeros, dtype=torch.int32, device=self.model.device)
            rows, leaves = n * self._k, self.cache.room // STEP
            tree = Tree(zeros(n, width), zeros(n), zeros(n + 1), zeros(rows, leaves), zeros(rows))
            self._buckets[key] = Planted(tree, zeros(rows).long())
        return self._buckets[key]

    def step(self, tokens: Tensor, planted: Planted) -> Frontier:
        """One token for each row of a bucket, on the device alone: it may be captured and replayed. Then `settle`."""
        planted.tree.tail_len.add_(1)
        positions = planted.positions.clamp(max=self.context - 1)
        frontier = self._forward(Decode(self.cache, planted.tree), tokens, positions)
        planted.positions.add_(1)
        return frontier

    def settle(self, steps: int, frontier: Frontier) -> None:
        """So many steps were made, and this is the frontier of the branches."""
        self._tail_len, self._branches = steps, frontier

    def append(self, tokens: Tensor) -> Frontier:
        return self.extend(tokens[:, None])

    @torch.inference_mode()
    def extend(self, tokens: Tensor, last: Tensor | None = None) -> Frontier:
        """S tokens a row [N, S] in one pass; the frontier is at token last[n] of each row, by default the last."""
        assert self._tree is not None
        rows, new = tokens.shape
        self._tail_len += new
        self._tree.tail_len.add_(new)
        step = torch.arange(new, device=tokens.device)
        where = None
        if new > 1:
            where = torch.arange(0, rows * new, new, device=tokens.device) + (new - 1 if last is None else last)
        # Only rows that have ended can come to the end of the context.
        positions = (self._positions[:, None] + step).flatten().clamp(max=self.context - 1)
        work = Decode(self.cache, self._tree, new, self._calls)
        self._branches = self._forward(work, tokens.flatten(), positions, where)
        self._positions = self._positions + new
        return self._branches

    def keep(self, rows: Tensor) -> Frontier:
        kept = rows.tolist()
        self._owner = [self._owner[row] for row in kept]
        self._slot = [self._slot[row] for row in kept]
        self._branches = self._branches.rows(rows)
        self._plant()
        return self._branches

    def rollback(self) -> Frontier:
        """As after `fork`: nothing of the block is left."""
        return self.fork()

    @torch.inference_mode()
    def commit(self, rows: Tensor) -> None:
        kept = rows.tolist()
        stay = [self._sequences[self._owner[row]] for row in kept]
        leaves = [self.cache.leaves_of(self._slot[row]) for row in kept]
        self.cache.commit([(*winner, self._tail_len) for winner in zip(stay, leaves, strict=True)])
        for sequence in self._sequences:
            if sequence not in stay:
                self.cache.release(sequence)
        self._sequences = stay
        self._at = self._branches.rows(rows)

    def _forward(self, work: Pass, ids: Tensor, positions: Tensor, rows: Tensor | None = None) -> Frontier:
        """The frontier of packed tokens [T], or of some of them."""
        return self._loan.run(work, lambda: self._read(ids[None], positions[None], rows))

    def _read(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Frontier:
        """One call of the model."""
        keep = {"logits_to_keep": rows} if rows is not None and self._keep_some else {}
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=bool(self.layers),
            **keep,
        )
        logits = output.logits[0]
        hidden = {layer: output.hidden_states[layer][0] for layer in self.layers}
        if any(h.dim() != 2 for h in hidden.values()):  # Gemma 3n keeps four
            raise InputError(
                f"{self.model.config.model_type}: a token has several hidden states; no scorer reads those"
            )
        if rows is not None:
            logits = logits if keep else logits[rows]
            hidden = {layer: h[rows] for layer, h in hidden.items()}
        return Frontier(logits, hidden)


def _layer_shapes(loan: Loan) -> list[tuple[int, int]]:
    """(key heads, width) of each layer, as one pass over one token shows them."""
    model, device = loan.model, loan.model.device
    found: dict[int, tuple[int, int]] = {}
    windows = []

    class Look:
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


def power_of_two(n: int) -> int:
    """The next power of two, n itself included."""
    return 1 << max(0, n - 1).bit_length()
