"""The memory of the branching cache: prefixes in pages that sequences can share, and branches' tails in leaves.

    sequence = cache.add(tokens)                      # pages for these; equal prefixes share theirs
    leaves = cache.take_leaves(n)                     # the memory of a tail: LEAF tokens each
    cache.grow(sequence, length)                      # pages for so many tokens in all
    cache.commit([(sequence, leaves, length)])        # a tail joins its sequence: the only copy there is
    cache.release(sequence)

Everything is allocated once, from a budget, and taken as it is needed: whoever calls makes room where it runs out. The
keys and values themselves are written by `attention.py` and read by `ops.tree_attention`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyengine import costs
from pyengine.errors import InputError, first_line
from pyengine.ops import flash
from pyengine.ops.settings import settings
from pyengine.timing import timed

# Tokens of a page; csrc/cpu/tree_attention.h kTileTokens divides it.
PAGE = flash.PAGE if settings.attention == "flash" else 64
LEAF = 16  # tokens of a leaf; csrc/cpu/tree_attention.h kTokens divides it
HOST_SHARE, GPU_SHARE = 0.25, 0.6  # of the memory that is free, where no budget is given
UNKNOWN_MEMORY = 16e9  # bytes, on a host that does not say
TAIL_SHARE = 0.25  # of the budget; K = 16 tails of 16 tokens are an eighth of a prefix of 2,048


@dataclass(eq=False)
class Sequence:
    """A prefix in the cache. `length` tokens are in its pages, the first `shared` of them from others."""

    pages: list[int]
    length: int
    shared: int = 0
    fresh: list[bytes] = field(default_factory=list)  # names of the pages that it is the first to fill


def token_bytes(layers: list[tuple[int, int]], dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, (key heads, width) each."""
    return sum(2 * heads * width * dtype.itemsize for heads, width in layers)


def budget_for(token_bytes: int, pages: int, tail_tokens: int) -> int:
    """The bytes of which a cache has so many pages, and tails of so many tokens in all."""
    return 4 * math.ceil(max(pages * PAGE / (1 - TAIL_SHARE), tail_tokens / TAIL_SHARE) * token_bytes / 4)


def in_gb(size: float) -> str:
    """Bytes as the GB that `cache_gb` takes, never fewer: three digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(size)) - 2)
    return f"{math.ceil(size / step) * step / 1e9:.3g} GB"


class BranchingCache:
    """Pages, tails and who owns them.

    layers: (key heads, width) of each layer. budget: bytes for keys and values, all layers together. On a CPU keys
    lie in memory with tokens side by side, as its kernel wants them; every view is [.., Hkv, tokens, D] all the same.

    Raises InputError where the budget does not hold one page and one tail.
    """

    def __init__(self, layers: list[tuple[int, int]], budget: float, dtype: torch.dtype, device: torch.device) -> None:
        self.token_bytes = token_bytes(layers, dtype)
        self.capacity = int(budget * (1 - TAIL_SHARE)) // (PAGE * self.token_bytes)  # pages
        self.leaves = int(budget * TAIL_SHARE) // (LEAF * self.token_bytes)
        if self.capacity < 1 or self.leaves < 1:
            least = in_gb(budget_for(self.token_bytes, 1, LEAF))
            raise InputError(
                f"a cache of {budget / 1e9:.3g} GB is too small: one page and tail take {least} (cache_gb)"
            )
        shapes = sorted(set(layers))
        self._pages: list[tuple[Tensor, Tensor]] = []  # one stack of layers for each shape
        self._tails: list[tuple[Tensor, Tensor]] = []

        def stores(n: int, count: int, heads: int, width: int, tokens: int) -> tuple[Tensor, Tensor]:
            """Keys and values; on a CPU a key's tokens lie side by side."""
            empty = partial(torch.empty, dtype=dtype, device=device)
            value = empty(n, count, heads, tokens, width)
            if device.type != "cpu":
                return empty(n, count, heads, tokens, width), value
            return empty(n, count, heads, width, tokens).transpose(-1, -2), value

        try:
            for shape in shapes:
                n = layers.count(shape)
                self._pages.append(stores(n, self.capacity, *shape, PAGE))
                self._tails.append(stores(n, self.leaves, *shape, LEAF))
        except (RuntimeError, MemoryError) as error:
            raise InputError(
                f"a cache of {budget / 1e9:.3g} GB cannot be allocated ({first_line(error)}): give a smaller cache_gb"
            ) from error
        # Of each layer: keys and values of the prefixes [pages, Hkv, PAGE, D] and of the tails [leaves, Hkv, LEAF, D].
        # Made once, since slicing four tensors for every layer and token costs 2 % of a small model's step.
        of_layer = [(shapes.index(shape), layers[:i].count(shape)) for i, shape in enumerate(layers)]
        self.layers = [
            (self._pages[s][0][i], self._pages[s][1][i], self._tails[s][0][i], self._tails[s][1][i])
            for s, i in of_layer
        ]
        self._free_leaves = list(range(self.leaves))
        self._free = list(range(self.capacity))  # the last one goes first: it is the warmest
        self._owners: Counter[int] = Counter()  # page -> sequences
        self._named: dict[bytes, int] = {}  # what a page of a prompt holds, and all before it -> page
        self._name_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named pages that nobody owns, oldest first
        self._sequences: set[Sequence] = set()

    # Tails

    @property
    def leaves_free(self) -> int:
        return len(self._free_leaves)

    @staticmethod
    def leaves_for(tokens: int) -> int:
        return -(-tokens // LEAF)

    def take_leaves(self, count: int) -> list[int]:
        """Leaves of the caller's alone, until they are given back; InputError where there are not so many."""
        if count > len(self._free_leaves):
            raise InputError(f"the cache has {len(self._free_leaves)} free leaves of {LEAF} tokens, {count} are needed")
        taken = self._free_leaves[len(self._free_leaves) - count :]
        del self._free_leaves[len(self._free_leaves) - count :]
        return taken

    def give_leaves(self, leaves: list[int]) -> None:
        self._free_leaves += leaves

    # Sequences

    @property
    def pages_in_use(self) -> int:
        return len(self._owners)

    @property
    def pages_free(self) -> int:
        """Pages that a new sequence can have; those kept for prompts to come count, as they can be given up."""
        return self.capacity - self.pages_in_use

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE)

    def add(self, tokens: list[int], growth: int = 0) -> Sequence:
        """A sequence that starts with `tokens`, with pages for `growth` more.

        Whole pages of a prefix that an earlier prompt had are shared; `shared` says how many tokens need no
        prefill. The last token is never shared, since its logits are wanted. The caller fills the rest before any
        other sequence reads them, or calls `discard`.
        """
        names = _names(tokens)
        found = []
        for name in names:
            if name not in self._named:
                break
            found.append(self._named[name])
        for page in found:
            self._own(page)
        try:
            pages = found + self._take(self.pages_for(len(tokens) + growth) - len(found))
        except InputError:
            self._disown(found)
            raise
        fresh = names[len(found) :]
        for name, page in zip(fresh, pages[len(found) :], strict=False):
            self._forget(name)  # a later page of a prefix whose first was given up
            self._named[name], self._name_of[page] = page, name
        sequence = Sequence(pages, len(tokens), len(found) * PAGE, fresh)
        self._sequences.add(sequence)
        return sequence

    def grow(self, sequence: Sequence, length: int) -> None:
        """Pages for so many tokens in all."""
        sequence.pages += self._take(max(0, self.pages_for(length) - len(sequence.pages)))

    def commit(self, winners: list[tuple[Sequence, list[int], int]]) -> None:
        """(sequence, leaves of a tail, length): so many tokens of each tail join the sequence, which has the pages."""
        pages, offsets, leaves, steps = list[int](), list[int](), list[int](), list[int]()
        for sequence, tail, length in winners:
            at = range(sequence.length, sequence.length + length)
            pages += [sequence.pages[i // PAGE] for i in at]
            offsets += [i % PAGE for i in at]
            leaves += [tail[i // LEAF] for i in range(length)]
            steps += [i % LEAF for i in range(length)]
            sequence.length += length
        device = self._pages[0][0].device
        page, offset, leaf, step = torch.tensor([pages, offsets, leaves, steps], dtype=torch.long, device=device)
        with timed("cache_commit", lambda: costs.moved(len(pages), self.token_bytes)):
            for stacks, tails in zip(self._pages, self._tails, strict=True):
                for stack, tail_store in zip(stacks, tails, strict=True):
                    stack[:, page, :, offset] = tail_store[:, leaf, :, step]

    def release(self, sequence: Sequence) -> None:
        """Give the pages back; those of a prompt stay known until their memory is wanted."""
        self._sequences.remove(sequence)
        self._disown(reversed(sequence.pages))

    def discard(self, sequence: Sequence) -> None:
        """Release a sequence that was never filled: nobody may share its pages."""
        for name in sequence.fresh:
            self._forget(name)
        self.release(sequence)

    def clear(self) -> None:
        """No sequence is left and no page is known: right whatever was cut short, and again where this is."""
        self._named, self._name_of, self._idle = {}, {}, OrderedDict()
        self._sequences, self._owners = set(), Counter()
        self._free, self._free_leaves = list(range(self.capacity)), list(range(self.leaves))

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not balance: every page has one state, every owner is alive."""
        owned = Counter(page for sequence in self._sequences for page in sequence.pages)
        assert owned == self._owners, f"owners {self._owners} but sequences hold {owned}"
        states = sorted([*owned, *self._free, *self._idle])
        assert states == list(range(self.capacity)), "a page is lost, or free and in use at once"
        assert self._named == {name: page for page, name in self._name_of.items()}, "names and pages disagree"
        assert set(self._idle) <= set(self._name_of), "a page without a name is kept"
        for sequence in self._sequences:
            assert len(set(sequence.pages)) == len(sequence.pages), "a page twice in one sequence"
            assert sequence.length <= len(sequence.pages) * PAGE, "a sequence outgrew its pages"
        assert len(set(self._free_leaves)) == len(self._free_leaves), "a leaf is free twice"

    def _own(self, page: int) -> None:
        self._owners[page] += 1
        self._idle.pop(page, None)

    def _disown(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                del self._owners[page]
                if page in self._name_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _forget(self, name: bytes) -> None:
        """Nobody new shares the page of this name."""
        page = self._named.pop(name, None)
        if page is not None:
            del self._name_of[page]
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _take(self, count: int) -> list[int]:
        if count > len(self._free) + len(self._idle):
            raise InputError(
                f"the cache has {len(self._free) + len(self._idle)} free pages of {PAGE} tokens, {count} are needed"
            )
        taken = []
        for _ in range(count):
            if not self._free:
                self._forget(self._name_of[next(iter(self._idle))])
            taken.append(self._free.pop())
            self._own(taken[-1])
        return taken


def _names(tokens: list[int]) -> list[bytes]:
    """A name for each whole page before the last token, of its tokens and of all before them."""
    digest = hashlib.blake2b(digest_size=16)
    names = []
    for start in range(0, len(tokens) - PAGE, PAGE):
        for token in tokens[start : start + PAGE]:
            digest.update(token.to_bytes(8, "little"))
        names.append(digest.digest())
    return names


def bytes_of(budget: float | None, device: torch.device) -> float:
    """The bytes of a cache; InputError for a budget that is not there."""
    free = free_memory(device)
    if budget is None:
        return free * (GPU_SHARE if device.type == "cuda" else HOST_SHARE)
    if budget > free:
        raise InputError(f"a cache of {budget / 1e9:.3g} GB (cache_gb): {free / 1e9:.3g} GB of memory are free")
    return budget


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_memory()


def host_memory() -> float:
    """Bytes of the host's memory that are free for this process."""
    return min(_available(), _allowed())


def _available() -> float:
    """What the host can give without swapping; caches of files count as free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return UNKNOWN_MEMORY
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), UNKNOWN_MEMORY)


def _allowed() -> float:
    """What a container's limit leaves; infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        return max(0.0, float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    except (OSError, ValueError):  # none, or "max"
        return float("inf")
