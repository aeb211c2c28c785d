"""One step of all rows: draw, record, append. It runs as it is, or captured in a CUDA graph and replayed.

On a GPU (`decoder.waits`) no step waits for the host: what was drawn is read once, at the end of a horizon. On a CPU
reading is free, and a horizon is one step, or a few of a light model.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyengine import costs, ledger, ops
from pyengine.decode.logprobs import TopLogprobs, top_logprobs
from pyengine.decode.shaping import Shaping
from pyengine.decode.values import token_values
from pyengine.decoder import Decoder, Frontier, Rows, spare_rows
from pyengine.errors import first_line
from pyengine.ops import TiltSample
from pyengine.ops.linear import steady as held_steady
from pyengine.scorers import Hidden, Scorer
from pyengine.timing import timed

log = logging.getLogger("pyengine")

HORIZON = 8  # most steps before the host looks

Blame = Literal["model", "scorer", "either", "request"]


class Draw(NamedTuple):
    """How one row is drawn, and when it ends."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int  # response tokens that are there
    room: int  # most tokens that it may still have in this block
    last: bool  # whether no token follows those
    ends: frozenset[int]  # tokens that end it
    weights: tuple[float, ...]  # λ of each tilt of the step
    budget: float  # nats a token; 0: none, the weights are λ


PADDING = Draw(1.0, 0, 1.0, 0.0, 0, 0, 0, True, frozenset(), (), 0.0)


class Follower(NamedTuple):
    """A scorer that tilts, with the decoder of its own model if it has one."""

    scorer: Scorer
    decoder: Any = None


class Step:
    """The state of N rows between two tokens. Where the device is waited for, its tensors are made anew when the rows
    change; otherwise they are padded to the decoder's bucket and stay where they are, for a graph to replay.

    rows: (stem in the decoder, branch) of each. beside: of each decoder that tilts, the places of the rows that follow
    it, their places there, and its frontier. shaping: what the rows ask of the base policy. top: so many of the
    likeliest tokens are noted, -1 for all.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Rows,
        draws: Sequence[Draw],
        frontier: Frontier,
        tilts: Sequence[Follower] = (),
        beside: Mapping[Any, tuple[list[int], Rows, Frontier]] | None = None,
        steady: bool = False,
        shaping: Shaping | None = None,
        top: int | None = None,
    ) -> None:
        self.decoder, self.tilts, self.steady, self.shaping = decoder, tuple(tilts), steady, shaping
        self.likeliest = top
        self.n, self.fixed = len(rows), decoder.waits and not beside and shaping is None and top is None
        self.device = frontier.logits.device
        self.planted = decoder.plant(rows)
        spare = spare_rows(decoder, self.planted, self.n)
        frontier, draws = _spread(frontier, spare), [*draws, *[PADDING] * spare]
        self.logits, self.hidden = frontier
        # Of each row, at its last token and at the one before; of their own where tensors are written in place.
        self.last: Hidden = {n: h.clone() if self.fixed else h for n, h in self.hidden.items()}
        self.previous: Hidden = {n: h.clone() if self.fixed else h for n, h in self.hidden.items()}
        self.beside = {
            other: _Beside(torch.tensor(index, device=self.device), other.plant(theirs), there)
            for other, (index, theirs, there) in (beside or {}).items()
        }
        self._columns(draws)
        self.alive = torch.tensor([True] * self.n + [False] * spare, device=self.device)
        self.fed = torch.zeros(self.n, dtype=torch.long, device=self.device)  # each row's last token
        self.drawn: list[TiltSample] = []  # since the host has looked; where tensors stay, in `kept` instead
        if self.fixed:
            types = (torch.long, torch.float32, torch.float32, torch.float32, torch.bool)
            zeros = partial(torch.zeros, device=self.device)
            self.kept = TiltSample(*(zeros(HORIZON, len(draws), dtype=dtype) for dtype in types))
            self.at = zeros(1, dtype=torch.long)  # the step
        self.top: list[TopLogprobs] = []  # of each token since the host has looked
        self.bad: dict[int, Blame] = {}  # rows whose numbers were not finite, and whose fault it is

    def _columns(self, draws: Sequence[Draw]) -> None:
        def column(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        fields: Any = Draw(*zip(*draws, strict=True))  # type: ignore[arg-type]  # a column of each
        self.columns: dict[str, Any] = {n: column(getattr(fields, n)) for n in ("temperature", "top_p", "min_p")}
        self.columns |= {n: column(getattr(fields, n), torch.long) for n in ("top_k", "seed", "position")}
        self.room, self.final = column(fields.room, torch.long), column(fields.last, torch.bool)
        kinds = dict.fromkeys(fields.ends)  # most requests end with the same tokens
        most = max(1, *map(len, kinds))
        wide = {ends: (*ends, *[-1] * (most - len(ends))) for ends in kinds}
        self.ends = column([wide[ends] for ends in fields.ends], torch.long)
        none = (0.0,) * len(self.tilts)
        self.weights = column([weights or none for weights in fields.weights]) if self.tilts else None
        self.budget = column(fields.budget) if any(fields.budget) else None

    @property
    def key(self) -> Hashable:
        """Steps of equal keys differ in numbers only: one graph serves them."""
        scorers = tuple(id(scorer) for scorer, _ in self.tilts)
        shapes = tuple(tuple(x.shape) for x in (self.planted.tree.leaves, self.planted.tree.pages, self.ends))
        return (shapes, tuple(self.hidden), scorers, self.budget is not None)

    def _tensors(self) -> list[Tensor]:
        own = [self.logits, *self.hidden.values(), *self.last.values(), *self.previous.values()]
        own += [*self.columns.values(), self.room, self.final, self.ends, self.alive, self.at]
        return own + [x for x in (self.weights, self.budget) if x is not None]

    def take(self, other: Step) -> None:
        """Go on as this step of the same key would, in the tensors that are here."""
        self.n = other.n
        for to, x in zip(self._tensors(), other._tensors(), strict=True):
            to.copy_(x)

    # One step

    def values(self) -> Tensor | None:
        """V of every next token, [R, N, vocab]; a row that does not follow a head has weight 0 there, and anything."""
        if not self.tilts:
            return None
        vocab = self.logits.shape[1]
        found = []
        for i, (scorer, decoder) in enumerate(self.tilts):
            index, hidden = self._followers(i, decoder)
            values = token_values(scorer, hidden, vocab, self.steady)
            if index is not None and len(index) < len(self.logits):
                values = values.new_zeros(len(self.logits), vocab).index_copy_(0, index, values)
            found.append(values)
        return torch.stack(found)

    def _followers(self, tilt: int, decoder: Any) -> tuple[Tensor | None, Hidden]:
        """The rows that follow a tilt, None for all, and what its head reads of them."""
        other = self.beside.get(decoder)
        if other is not None:
            return other.index, {layer: h[: len(other.index)] for layer, h in other.frontier.hidden.items()}
        if self.fixed:  # which rows follow must not be asked of the device
            return None, self.hidden
        assert self.weights is not None
        index = self.weights[:, tilt].nonzero()[:, 0]
        if len(index) == len(self.logits):
            return None, self.hidden
        return index, {layer: h[index] for layer, h in self.hidden.items()}

    def base(self) -> Tensor:
        """The base policy's logits: the model's, shaped as the rows ask."""
        if self.shaping is None:
            return self.logits
        with timed("shaping"):
            shaped = self.shaping.apply(self.logits[: self.n])
        return torch.cat([shaped, self.logits[self.n :].to(shaped)]) if len(self.logits) > self.n else shaped

    def _note(self, logits: Tensor, values: Tensor | None, weights: Tensor | None, token: Tensor) -> None:
        """The likeliest tokens of each row."""
        assert self.likeliest is not None
        n = self.n
        most = logits.shape[1] if self.likeliest == -1 else min(self.likeliest, logits.shape[1])
        tilt = (None, None) if values is None or weights is None else (values[:, :n], weights[:n])
        raw, heat = self.logits[:n], self.columns["temperature"][:n]
        found = top_logprobs(logits[:n], token[:n], most, raw=raw, values=tilt[0], weights=tilt[1], temperature=heat)
        self.top.append(found)

    def lambdas(self, logits: Tensor, values: Tensor | None) -> Tensor | None:
        """λ as `tilt_sample` takes it; where a row has a budget it is solved for, in the proportions of the weights."""
        if self.budget is None or values is None or self.weights is None:
            return self.weights
        with timed("solve_weight"):
            return self._solved(logits, values, self.weights, self.budget)

    def _solved(self, logits: Tensor, values: Tensor, weights: Tensor, budget: Tensor) -> Tensor:
        index = None if self.fixed else budget.nonzero()[:, 0]
        total = weights[:, 0, None] * values[0].float()
        for r in range(1, len(values)):
            total = total + weights[:, r, None] * values[r].float()
        rows = [logits, total, budget, self.columns["temperature"]]
        if index is not None:
            rows = [x[index] for x in rows]
        if self.steady:
            with held_steady():
                each = zip(*(x.split(1) for x in rows), strict=True)
                solved = torch.cat([ledger.solve_weight(*row) for row in each])
        else:
            solved = ledger.solve_weight(*rows)
        if index is None:
            return torch.where(budget > 0, solved, 1.0)[:, None] * weights
        return weights.index_copy(0, index, solved[:, None] * weights[index])

    def step(self) -> None:
        """One token for every row. It is not read by the model where it is the last of them all and nobody reads on."""
        logits, values = self.base(), self.values()
        weights = self.lambdas(logits, values)
        with timed("tilt_sample", lambda: costs.tilt_sample(logits, values)):
            drawn = ops.tilt_sample(logits, values, weights, **self.columns)
        self._keep(drawn)
        if self.likeliest is not None:
            with timed("logprobs"):
                self._note(logits, values, weights, drawn.token)
        if self.shaping is not None:
            self.shaping.advance(drawn.token[: self.n])
        with timed("row_state"):
            more, read = self._going_on(drawn, logits)
        if not read:
            return self._set("alive", more)
        token = drawn.token
        if not self.fixed:  # the host may look later than a row's block ends, and that goes on as if it had not
            self.fed = token = torch.where(self.alive, token, self.fed)
        at = self.decoder.step(self.planted, token, self.alive)
        for other, its in self.beside.items():
            its.append(other, token, self.alive)
        with timed("row_state"):
            self._move_on(at, more)

    def _going_on(self, drawn: TiltSample, logits: Tensor) -> tuple[Tensor, bool]:
        """The rows that have not ended, and whether the model reads what was drawn."""
        if not self.decoder.waits and not bool(drawn.valid.all()):
            for row in (~drawn.valid & self.alive).nonzero()[:, 0].tolist():
                who: Blame = "scorer" if _drawable(logits[row]) else "model"
                self.bad.setdefault(row, "request" if who == "model" and _drawable(self.logits[row]) else who)
        going = self.alive & ~(drawn.token[:, None] == self.ends).any(-1)
        more = going & (self.room > 1)
        return more, self.decoder.waits or bool(self.hidden) or bool((more | (going & ~self.final)).any())

    def _move_on(self, at: Frontier, going: Tensor) -> None:
        """Every row that was alive is at its next token."""
        before, alive = self.hidden, self.alive[:, None]
        self._set("previous", {n: torch.where(alive, before[n], h) for n, h in self.previous.items()})
        self._set("last", {n: torch.where(alive, at.hidden[n], h) for n, h in self.last.items()})
        self._set("hidden", at.hidden)
        self._set("logits", at.logits)
        self.columns["position"].add_(self.alive)
        self.room.sub_(self.alive.long())
        self._set("alive", going)

    def _set(self, name: str, value: Any) -> None:
        if not self.fixed:
            setattr(self, name, value)
        elif isinstance(value, dict):
            for key, x in value.items():
                getattr(self, name)[key].copy_(x)
        else:
            getattr(self, name).copy_(value)

    def _keep(self, drawn: TiltSample) -> None:
        if not self.fixed:
            self.drawn.append(drawn)
            return
        for to, x in zip(self.kept, drawn, strict=True):
            to.index_copy_(0, self.at, x[None])
        self.at.add_(1)

    # What the host reads

    def read(self, steps: int) -> list[list[Any]]:
        """The fields of `TiltSample` of all steps since the last call: a row's behind the one's before, no padding."""
        if self.fixed:
            fields = [x[:steps].T for x in self.kept]
            self.at.zero_()
        else:
            fields, self.drawn = [torch.stack(x, 1) for x in zip(*self.drawn, strict=True)], []
        return [x[: self.n].flatten().tolist() for x in fields]  # one transfer for each

    def frontier(self) -> Frontier:
        """At the last token of each row that is no padding."""
        return Frontier(self.logits[: self.n], {layer: h[: self.n] for layer, h in self.hidden.items()})

    def carry(self, before: Step, sources: list[int]) -> None:
        """The first rows are these of another step: what they know of their last tokens comes with them."""
        index = torch.tensor(sources, dtype=torch.long, device=self.device)
        for own, its in ((self.last, before.last), (self.previous, before.previous)):
            for layer in own.keys() & its.keys():
                own[layer] = torch.cat([its[layer][index], own[layer][len(sources) :]])

    def states(self, rows: list[int]) -> list[tuple[Hidden, Hidden]]:
        """Hidden states [D] at the last token of each of these rows, and at the one before."""
        index = torch.tensor(rows, device=self.device)
        last, previous = ({n: h[index].unbind() for n, h in its.items()} for its in (self.last, self.previous))
        return [({n: h[i] for n, h in last.items()}, {n: h[i] for n, h in previous.items()}) for i in range(len(rows))]


class Graph:
    """A step whose tensors stay, by its key. Its first call runs as it is, which compiles and tunes what has to be; the
    second is captured in a CUDA graph, and all later ones replay that. A model whose pass cannot be captured (some
    mixtures of experts ask the host where their tokens go) runs as it is every time."""

    def __init__(self, step: Step) -> None:
        self.state = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.capturable = step.device.type == "cuda"

    def __call__(self) -> None:
        if self.graph is not None:
            return self.graph.replay()
        if self.warm and self.capturable:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Graphs that never run side by side may share their memory: what outlives a step lies in the state.
                others = (other.graph for other in self.state.decoder.captured.values() if other.graph is not None)
                with torch.cuda.graph(graph, pool=next((other.pool() for other in others), None)):
                    self.state.step()
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # torch leaves the one that it captured on, where ending that fails
                log.warning("this model's step cannot be captured in a CUDA graph (%s)", first_line(error))
                self.capturable = False
            else:
                self.graph = graph
                return graph.replay()
        self.state.step()
        self.warm = True
        return None


@dataclass
class _Beside:
    """Rows that follow a scorer's model, in its decoder."""

    index: Tensor
    planted: Any
    frontier: Frontier

    def append(self, decoder: Decoder, token: Tensor, alive: Tensor) -> None:
        spare = spare_rows(decoder, self.planted, len(self.index))
        token, alive = (torch.nn.functional.pad(x[self.index], (0, spare)) for x in (token, alive))
        self.frontier = decoder.step(self.planted, token, alive)


def _spread(frontier: Frontier, spare: int) -> Frontier:
    """With so many empty rows behind it."""
    if not spare:
        return frontier
    empty = {layer: h.new_zeros(spare, h.shape[1]) for layer, h in frontier.hidden.items()}
    return Frontier.of([frontier, Frontier(frontier.logits.new_zeros(spare, frontier.logits.shape[1]), empty)])


def _drawable(logits: Tensor) -> bool:
    return not bool(logits.isnan().any() | (logits == torch.inf).any()) and bool((logits > -torch.inf).any())
