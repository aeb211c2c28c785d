"""What pyengine does in SGLang's scheduler, without a name of SGLang's: who is tilted, by what, and whether it was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine.errors import InputError
from pyengine.integrations.tilting import HostScorers, Tilting, asked_for
from pyengine.results import SamplingParams
from pyengine.vocabulary import FieldError


class Step(NamedTuple):
    """One pass of the model. lengths: of each row, the tokens that it has read. last: the token that each read last."""

    lengths: Sequence[int]
    last: Callable[[], Sequence[int]]


class Row:
    """A request that is tilted. request: with `origin_input_ids` and `output_ids`, which the host may know one token
    later than its sampler. drawn: {place in the response: what says whether the values of that token were finite}."""

    def __init__(self, tilting: Tilting, request: Any) -> None:
        self.tilting = tilting
        self.request = weakref.proxy(request)  # which holds this row
        self.drawn: dict[int, tuple[Tensor, int]] = {}

    def place(self, length: int) -> int | None:
        """Of the token that follows `length` tokens, in the response; None where that one is there, or the prompt goes
        on: SGLang draws a token after every part of a prompt, and throws it away."""
        place = length - len(self.request.origin_input_ids)
        return place if place >= len(self.request.output_ids) else None

    def tokens(self, length: int, last: Callable[[], int]) -> list[int]:
        """All that have been read."""
        known = [*self.request.origin_input_ids, *self.request.output_ids]
        if len(known) == length - 1:
            known.append(last())
        if len(known) != length:
            raise RuntimeError(f"SGLang has read {length} tokens of a request of which it knows {len(known)}")
        return known


class Rows:
    """The tilted requests of one scheduler. capacity: the most rows of a batch, None while it is not known.

    hidden: what the output head read for each row of the pass, at one place in memory: a captured CUDA graph, which
    runs no Python, writes there too. tilted: how many rows have been tilted.
    """

    def __init__(self, scorers: HostScorers, capacity: Callable[[], int | None]) -> None:
        self.scorers, self.capacity = scorers, capacity
        self.hidden: Tensor | None = None
        self.step: Step | None = None
        self.tilted = 0

    def keep(self, states: Tensor) -> None:
        """states: [N, D], of the rows that are drawn from next."""
        most = self.capacity()
        if most is None:  # a pass before there is a cache: nobody draws from it
            return
        if self.hidden is None or self.hidden.dtype != states.dtype or len(self.hidden) < len(states):
            if self.hidden is not None and states.is_cuda:
                raise RuntimeError(f"a pass of {len(states)} rows of {states.dtype}; graphs write {self.hidden.shape}")
            self.hidden = states.new_empty(max(most, len(states)), states.shape[1])
        self.hidden[: len(states)].copy_(states)

    def tilt(self, logits: Tensor, rows: Sequence[Row | None]) -> None:
        """Add to each row's logits, [N, V] before the temperature, what it asks for, and note that this was done."""
        step, hidden = self.step, self.hidden
        if step is None or hidden is None or len(step.lengths) != len(logits):
            raise RuntimeError("pyengine saw nothing of the pass that SGLang draws from")
        going: list[tuple[int, Row, int]] = []
        asked: list[Tilting | None] = [None] * len(rows)
        for i, (row, length) in enumerate(zip(rows, step.lengths, strict=True)):
            place = None if row is None else row.place(length)
            if row is not None and place is not None:
                going.append((i, row, place))
                asked[i] = row.tilting

        def tokens(i: int) -> tuple[Row, list[int]]:
            row = rows[i]
            assert row is not None
            return row, row.tokens(step.lengths[i], lambda: step.last()[i])

        reads = tokens if self.scorers.reads_tokens else None
        self.tilted += self.scorers.add(logits, hidden[: len(logits)], asked, reads)
        if going:
            index = torch.tensor([i for i, _, _ in going], device=logits.device)
            finite = logits[index].amax(1).isfinite()
            # A draw from a row of NaN ends SGLang; this one's token is thrown away.
            logits.index_copy_(0, index, logits[index].masked_fill_(~finite[:, None], 0.0))
            said = _to_host(finite)
            for j, (_, row, place) in enumerate(going):
                row.drawn[place] = said, j

    def fault(self, row: Row) -> str | None:
        """Why the newest token of a request cannot be kept; None where it was drawn from what was asked for."""
        noted = row.drawn.pop(len(row.request.output_ids) - 1, None)
        if noted is None:
            return "a token was drawn past pyengine, from the base policy; nothing of this response can be trusted"
        if not noted[0][noted[1]]:
            return "a scorer's values leave no finite logits for a token"
        return None


def _to_host(flags: Tensor) -> Tensor:
    """On the CPU by the time that the host has the tokens of this step, which it copies later on the same stream."""
    if not flags.is_cuda:
        return flags
    return torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)


def tilts(fields: Any) -> dict[str, Any]:
    """The `tilt_*` among `custom_params`; the others, with keys of whatever kind, are of other processors."""
    named = fields.items() if isinstance(fields, Mapping) else ()
    return {k: v for k, v in named if isinstance(k, str) and k.startswith("tilt_") and v is not None}


def admitted(fields: Any, scorers: HostScorers | None, sampling: Callable[[], SamplingParams]) -> Tilting | None:
    """What a request adds that has these `custom_params`; None where it adds nothing. FieldError names the field."""
    given = tilts(fields)
    tilt = asked_for(given)
    if tilt is None:
        return None
    if scorers is None:
        name = next(iter(given))
        raise FieldError(name, f"{name}: no scorers are named for this server; start it with PYENGINE_SCORERS")
    return scorers.tilting(tilt, sampling())


def check_reading(tilting: Tilting, ids: Sequence[int], most: int, vocab: int) -> None:
    """InputError where a scorer that is a model of its own cannot read a request.

    ids: the prompt. most: the most tokens that prompt and response have. vocab: of the base policy; what stands for
    images and sounds lies beyond it.
    """
    for scorer in tilting.weights:
        longest = getattr(scorer, "longest", None)
        if longest is None:
            continue
        if most > longest:
            raise InputError(f"scorer {scorer.name!r} reads {longest} tokens; prompt and response may have {most}")
        if any(not 0 <= token < vocab for token in ids):
            raise InputError(f"scorer {scorer.name!r} reads text; the prompt has images or sounds")
