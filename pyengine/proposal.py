"""Drawing a block: k branches of each live request, a token a step, without asking the device how it goes.

On a GPU (`decoder.waits`) no step waits for the host: what was drawn is read once, when the block is whole. On a CPU
reading is free, so that branches which have ended can be dropped on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyengine import ledger, ops
from pyengine.decoder import BranchingDecoder, Decoder, Frontier, Planted, power_of_two
from pyengine.errors import first_line
from pyengine.ops import TiltSample
from pyengine.ops.linear import steady as held_steady
from pyengine.results import FinishReason, SamplingParams
from pyengine.scorers import Hidden, Part, PrefixModel, PrefixScorer, Scorer

log = logging.getLogger("pyengine")

Blame = Literal["model", "scorer", "either"]


@dataclass(frozen=True)
class Tilt:
    """Prefix scorers with their weights λ; with a budget, λ is solved for anew at every token, in their proportions."""

    parts: Sequence[tuple[float, Part]] = ()
    budget: float | None = None  # nats a token
    beside: Mapping[int, Decoder] = field(default_factory=dict)  # of the parts that are models of their own
    steady: bool = False  # what a row is tilted by depends on that row alone, to the bit

    def read(self, move: Callable[[Decoder], Frontier], hidden: Hidden) -> list[Hidden]:
        """What each part reads: the base policy's hidden states or, after a `move`, those of its own model."""
        own = {decoder: move(decoder).hidden for decoder in dict.fromkeys(self.beside.values())}
        return [own[self.beside[i]] if i in self.beside else hidden for i in range(len(self.parts))]

    def values(self, read: Sequence[Hidden], vocab: int) -> Tensor | None:
        """V of every next token, [R, N, vocab]; what pads a vocabulary in one model and not in another has the mean."""
        if not self.parts:
            return None
        found = []
        for (_, part), hidden in zip(self.parts, read, strict=True):
            with held_steady(*_heads(part.scorer)) if self.steady else nullcontext():
                if self.steady and not _heads(part.scorer):  # whatever it does, a row at a time
                    rows = [{layer: h[i : i + 1] for layer, h in hidden.items()} for i in range(_rows(hidden))]
                    values = torch.cat([part.scorer.values(row) for row in rows])[:, :vocab]
                else:
                    values = part.scorer.values(hidden)[:, :vocab]
                if values.shape[1] < vocab:
                    rest = values.mean(1, keepdim=True).expand(-1, vocab - values.shape[1])
                    values = torch.cat([values, rest], 1)
                found.append(values)
        return torch.stack(found)

    def weights(
        self, logits: Tensor, values: Tensor | None, given: Tensor | None, temperature: Tensor
    ) -> Tensor | None:
        """λ as `tilt_sample` takes it, from the `given` weights [R]: those, or a row for each of the logits'."""
        if self.budget is None or values is None or given is None:
            return given
        total = given[0] * values[0].float()
        for weight, more in zip(given[1:], values[1:], strict=True):
            total = total + weight * more.float()
        if not self.steady:
            return ledger.solve_weight(logits, total, self.budget, temperature)[:, None] * given
        with held_steady():
            each = zip(logits.split(1), total.split(1), temperature.split(1), strict=True)
            solved = [ledger.solve_weight(z, v, self.budget, t) for z, v, t in each]
        return torch.cat(solved)[:, None] * given


def _heads(scorer: Scorer) -> list[PrefixScorer]:
    """The head of a scorer that consists of one, whose layers can be held steady."""
    head = scorer.head if type(scorer) is PrefixModel else scorer
    return [head] if type(head) is PrefixScorer else []


def _rows(hidden: Hidden) -> int:
    return len(next(iter(hidden.values())))


class Row(NamedTuple):
    """One branch to be drawn."""

    params: SamplingParams
    seed: int
    position: int  # response tokens that are there
    room: int  # most tokens it may have; the row ends with the last of them
    context: float  # tokens until the model's context is full


@dataclass
class Tail:
    """What one block drew: N rows (request-major, then branch) of at most M tokens."""

    tokens: list[list[int]]
    logp_base: list[list[float]]
    logp_policy: list[list[float]]
    kl: list[float]  # summed over the row's tokens
    finish_reason: list[FinishReason | None]
    # Rows that could not be drawn from: at which step first, and whose numbers were not finite.
    bad: dict[int, tuple[int, Blame]] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)  # the row that each of the decoder's rows belongs to, at the end
    hidden: Hidden = field(default_factory=dict)  # at each row's last token
    previous: Hidden = field(default_factory=dict)  # at the token before


def propose(
    decoder: Decoder,
    rows: Sequence[Row],
    steps: int,
    eos: Collection[int],
    tilt: Tilt,
    tick: Callable[[], object],
) -> Tail:
    """Fork the decoder and draw up to `steps` tokens for each row."""
    frontier, n = decoder.fork(), len(rows)
    if isinstance(decoder, BranchingDecoder) and decoder.waits and not tilt.beside:
        return _replayed(decoder, frontier, rows, steps, eos, tilt, tick)
    device = frontier.logits.device
    columns = _columns(rows, device)
    given = torch.tensor([weight for weight, _ in tilt.parts], device=device) if tilt.parts else None
    ends = torch.tensor(sorted(eos), dtype=torch.long, device=device)
    room = torch.tensor([row.room for row in rows], device=device)

    slots = torch.arange(n, device=device)  # the row that each of the decoder's rows belongs to
    alive = torch.ones(n, dtype=torch.bool, device=device)
    drawn: list[tuple[Tensor, TiltSample]] = []
    blame: dict[int, Blame] = {}
    hidden: Hidden = {}
    previous: Hidden = {}
    read = tilt.read(lambda other: other.fork(), frontier.hidden)
    for step in range(steps):
        tick()
        before = frontier.hidden
        values = tilt.values(read, frontier.logits.shape[1])
        weights = tilt.weights(frontier.logits, values, given, columns["temperature"])
        drawn.append((slots, ops.tilt_sample(frontier.logits, values, weights, **columns)))
        for c in (~drawn[-1][1].valid).nonzero()[:, 0].tolist():
            blame.setdefault(int(slots[c]), "scorer" if _drawable(frontier.logits[c]) else "model")
        token = drawn[-1][1].token
        going = alive & ~torch.isin(token, ends) & (step + 1 < room[slots])
        over = not going.any()
        if over and not before:
            break  # nobody reads the hidden state of the last tokens
        frontier = decoder.append(token)
        read = tilt.read(lambda other: other.append(token), frontier.hidden)
        previous, hidden = (
            _kept(old, new, slots, alive) for old, new in ((previous, before), (hidden, frontier.hidden))
        )
        alive = going
        if over:
            break
        columns["position"] = columns["position"] + 1
        if step + 1 == steps:
            break  # the block's commit drops what has ended
        # Ended branches are never read again: they go once they are half of the rows, or before the model would be
        # asked for a position beyond its context.
        full = any(not a and step + 1 >= rows[i].context for a, i in zip(alive.tolist(), slots.tolist(), strict=True))
        if full or 2 * int(alive.sum()) <= len(slots):
            index = alive.nonzero()[:, 0]
            frontier = decoder.keep(index)
            read = tilt.read(lambda other: other.keep(index), frontier.hidden)
            columns = {name: column[index] for name, column in columns.items()}
            slots, alive = slots[index], alive[index]
    steps_drawn = [(here.tolist(), [x.tolist() for x in sample]) for here, sample in drawn]
    tail = _read(steps_drawn, rows, eos, blame)
    tail.slots, tail.hidden, tail.previous = slots.tolist(), hidden, previous
    return tail


def _columns(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """What each row is drawn with, as `tilt_sample` takes it."""
    columns = {
        name: torch.tensor([getattr(row.params, name) for row in rows], device=device)
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    columns["seed"] = torch.tensor([row.seed for row in rows]).to(device)
    columns["position"] = torch.tensor([row.position for row in rows], device=device)
    return columns


def _replayed(
    decoder: BranchingDecoder,
    frontier: Frontier,
    rows: Sequence[Row],
    steps: int,
    eos: Collection[int],
    tilt: Tilt,
    tick: Callable[[], object],
) -> Tail:
    """The block where reading would hold the device up: one captured step, replayed; rows that have ended go on."""
    planted, n = decoder.planted, len(rows)
    assert planted is not None
    scorers = tuple(id(part.scorer) for _, part in tilt.parts)
    key = (id(planted), decoder.layers, scorers, tilt.budget, tuple(eos), power_of_two(steps))
    if key not in decoder.captured:
        decoder.captured[key] = Loop(decoder, planted, frontier, power_of_two(steps), eos, tilt)
    loop: Loop = decoder.captured[key]
    loop.start(frontier, rows, [weight for weight, _ in tilt.parts])
    for _ in range(steps):
        tick()
        loop()
    decoder.settle(steps, Frontier(loop.logits[:n], {layer: h[:n] for layer, h in loop.hidden.items()}))
    every, fields = list(range(n)), [x[:steps, :n].tolist() for x in loop.record]  # one transfer for each
    who: Blame = "either" if tilt.parts else "model"  # looking would read every row of logits once more
    tail = _read([(every, sample) for sample in zip(*fields, strict=True)], rows, eos, dict.fromkeys(every, who))
    tail.slots = every
    tail.hidden, tail.previous = ({layer: h[:n] for layer, h in kept.items()} for kept in (loop.last, loop.previous))
    return tail


class Loop:
    """The step of a bucket of rows over tensors that stay where they are.

    Its first call runs as it is, which compiles and tunes what has to be; the second is captured in a CUDA graph, and
    all later ones replay that. A model whose pass cannot be captured (some mixtures of experts ask the host where
    their tokens go) runs as it is every time.
    """

    def __init__(
        self,
        decoder: BranchingDecoder,
        planted: Planted,
        frontier: Frontier,
        steps: int,
        eos: Collection[int],
        tilt: Tilt,
    ) -> None:
        n, device = len(planted.positions), frontier.logits.device
        self.decoder, self.planted, self.tilt = decoder, planted, tilt
        self.weights = torch.zeros(len(tilt.parts), device=device) if tilt.parts else None
        self.ends = torch.tensor(sorted(eos), dtype=torch.long, device=device)
        self.logits = frontier.logits.new_zeros(n, frontier.logits.shape[1])
        self.hidden: Hidden = {layer: h.new_zeros(n, h.shape[1]) for layer, h in frontier.hidden.items()}
        self.last = {layer: torch.zeros_like(h) for layer, h in self.hidden.items()}  # of rows that have not ended
        self.previous = {layer: torch.zeros_like(h) for layer, h in self.hidden.items()}
        self.columns = _columns([Row(SamplingParams(), 0, 0, 0, 0.0)] * n, device)
        self.room = torch.zeros(n, dtype=torch.long, device=device)
        self.alive = torch.zeros(n, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # the step
        types = (torch.long, torch.float32, torch.float32, torch.float32, torch.bool)
        self.record = TiltSample(*(torch.zeros(steps, n, dtype=dtype, device=device) for dtype in types))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.capturable = device.type == "cuda"

    def start(self, frontier: Frontier, rows: Sequence[Row], weights: list[float]) -> None:
        """A block of these rows begins; those that pad the bucket have ended already."""
        n = len(rows)
        if self.weights is not None:
            self.weights.copy_(torch.tensor(weights))
        self.logits[:n] = frontier.logits
        for layer, h in frontier.hidden.items():
            self.hidden[layer][:n] = h
        for name, column in _columns(rows, self.logits.device).items():
            self.columns[name][:n] = column
        self.room[:n] = torch.tensor([row.room for row in rows])
        self.alive.fill_(False)[:n] = True
        self.at.zero_()

    def __call__(self) -> None:
        if self.graph is not None:
            return self.graph.replay()
        if self.warm and self.capturable:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Graphs that never run side by side may share their memory: what outlives a step lies in this object.
                others = (loop.graph for loop in self.decoder.captured.values() if loop.graph is not None)
                with torch.cuda.graph(graph, pool=next((other.pool() for other in others), None)):
                    self.step()
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # torch leaves the one that it captured on, where ending that fails
                log.warning("this model's step cannot be captured in a CUDA graph (%s)", first_line(error))
                self.capturable = False
            else:
                self.graph = graph
                return graph.replay()
        self.step()
        self.warm = True

    def step(self) -> None:
        """Draw, record, append; everything stays on the device."""
        values = self.tilt.values([self.hidden] * len(self.tilt.parts), self.logits.shape[1])
        weights = self.tilt.weights(self.logits, values, self.weights, self.columns["temperature"])
        drawn = ops.tilt_sample(self.logits, values, weights, **self.columns)
        for to, x in zip(self.record, drawn, strict=True):
            to.index_copy_(0, self.at, x[None])
        frontier = self.decoder.step(drawn.token, self.planted)
        for layer, h in frontier.hidden.items():
            self.previous[layer].copy_(torch.where(self.alive[:, None], self.hidden[layer], self.previous[layer]))
            self.last[layer].copy_(torch.where(self.alive[:, None], h, self.last[layer]))
            self.hidden[layer].copy_(h)
        self.logits.copy_(frontier.logits)
        self.at.add_(1)
        ended = (drawn.token[:, None] == self.ends).any(-1) | (self.at >= self.room)
        self.alive.logical_and_(~ended)
        self.columns["position"].add_(1)


def _kept(old: Hidden, new: Hidden, slots: Tensor, alive: Tensor) -> Hidden:
    """`old` [N, D] with the states `new` of rows that are alive in their slots."""
    if not old:
        return dict(new)
    out = {}
    for layer, states in new.items():
        chosen = torch.where(alive[:, None], states, old[layer][slots])
        out[layer] = chosen if len(slots) == len(old[layer]) else old[layer].index_copy(0, slots, chosen)
    return out


def _drawable(logits: Tensor) -> bool:
    """Whether a softmax of these logits [V] is a distribution."""
    return not bool(logits.isnan().any() | (logits == torch.inf).any() | (logits == -torch.inf).all())


def _read(
    drawn: Sequence[tuple[list[int], Sequence[list[Any]]]],
    rows: Sequence[Row],
    eos: Collection[int],
    blame: Mapping[int, Blame],
) -> Tail:
    """The tokens of each row up to its end, from (slots, fields of a TiltSample) of every step.

    blame: whose numbers it was, should a row be invalid.
    """
    n = len(rows)
    tail = Tail([[] for _ in rows], [[] for _ in rows], [[] for _ in rows], [0.0] * n, [None] * n)
    for step, (here, (tokens, base, policy, kl, valid)) in enumerate(drawn):
        for c, i in enumerate(here):
            if tail.finish_reason[i] is not None:
                continue
            if not valid[c]:
                tail.bad.setdefault(i, (step, blame[i]))
            tail.tokens[i].append(tokens[c])
            tail.logp_base[i].append(base[c])
            tail.logp_policy[i].append(policy[c])
            tail.kl[i] += kl[c]
            if tokens[c] in eos:
                tail.finish_reason[i] = "stop"
            elif step + 1 >= rows[i].room:
                tail.finish_reason[i] = "length"
    return tail
