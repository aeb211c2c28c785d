"""Prompts that take every step together: the loop without requests, for trials of a decoder and for benches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyengine.cache import LEAF, BranchingCache
from pyengine.decoder import PREFILL_TOKENS, Decoder, Frontier, Rows, Stem, spare_rows


class Group:
    """k branches of at most `room` tokens from each prompt that has joined; rows are prompt-major, then by branch."""

    def __init__(self, decoder: Decoder, k: int = 1, room: int = LEAF) -> None:
        self.decoder, self.k, self.room = decoder, k, room
        self.stems: list[Stem] = []
        self.at: list[Frontier] = []  # one row for each prompt
        self._rows: Rows = []
        decoder.begin()

    def join(self, prompts: Sequence[list[int]]) -> None:
        found: dict[Stem, Frontier] = {}
        for ids in prompts:
            stem = self.decoder.join(list(ids), self.k * BranchingCache.leaves_for(self.room))
            assert stem is not None, "there is no room for this prompt"
            self.stems.append(stem)
            found[stem] = Frontier(torch.empty(0), {})
        new = list(found)
        while waiting := [stem for stem in new if not len(found[stem].logits)]:
            found |= dict(self.decoder.prefill(waiting, PREFILL_TOKENS))
        self.at += [found[stem] for stem in new]

    def fork(self) -> Frontier:
        for stem in self.stems:
            self.decoder.fork(stem, self.k, self.room)
        self._rows = [(stem, b) for stem in self.stems for b in range(self.k)]
        self._steps = 0
        return self._plant(Frontier.of(self.at).rows(torch.arange(len(self.at)).repeat_interleave(self.k)))

    def _plant(self, frontier: Frontier) -> Frontier:
        for stem in self.stems:
            stem.lengths = [self._steps] * self.k
        self.planted, self.frontier = self.decoder.plant(self._rows), frontier
        return frontier

    def append(self, tokens: Tensor) -> Frontier:
        """One token for each row."""
        n = len(self._rows)
        spare = spare_rows(self.decoder, self.planted, n)
        alive = torch.ones(n, dtype=torch.bool, device=tokens.device)
        padded = (torch.nn.functional.pad(x, (0, spare)) for x in (tokens, alive))
        with torch.inference_mode():
            found = self.decoder.step(self.planted, *padded)
        self._steps += 1
        self.frontier = Frontier(found.logits[:n], {layer: h[:n] for layer, h in found.hidden.items()})
        return self.frontier

    def note(self, steps: int, frontier: Frontier) -> None:
        """Somebody else made so many steps of these rows."""
        self._steps, self.frontier = steps, frontier

    def keep(self, rows: Tensor) -> Frontier:
        """These rows go on, the others are not looked at again."""
        self._rows = [self._rows[row] for row in rows.tolist()]
        return self._plant(self.frontier.rows(rows))

    def commit(self, rows: Tensor) -> None:
        """The winners join their prefixes; prompts without one leave."""
        winners = [self._rows[row] for row in rows.tolist()]
        self.decoder.commit([(stem, b, self._steps) for stem, b in winners])
        for stem in self.stems:
            if stem not in [s for s, _ in winners]:
                self.decoder.leave(stem)
        self.stems = [stem for stem, _ in winners]
        self.at = [self.frontier.rows(rows[i : i + 1]) for i in range(len(rows))]

    def close(self, whole: bool = True) -> None:
        self.decoder.end(whole)
