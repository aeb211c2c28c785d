"""The rows of the step: which branches have one, where they came from, and what was drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import torch

from pyengine.decode.logprobs import listed
from pyengine.decode.request import Branch, Request
from pyengine.decode.shaping import Shaping
from pyengine.decode.step import HORIZON, Draw, Follower, Graph, Step
from pyengine.decoder import Decoder, Frontier
from pyengine.reader import Reader
from pyengine.results import FinishReason
from pyengine.scorers import Scorer
from pyengine.timing import timed

Begun = dict[Request, int | None]  # requests that begin a block: the row of their winner, None for a prompt just read


class Rows:
    """One row for each branch that has not ended, request by request. name: what messages call the base policy."""

    def __init__(self, decoder: Decoder, name: str, steady: bool) -> None:
        self.decoder, self.name, self.steady = decoder, name, steady
        self.device = decoder.device
        self.table: list[tuple[Request, int]] = []  # (request, branch) of each row
        self.step: Step | None = None
        self.steps = 0  # that the last run made
        self.before = 0  # that were made before it
        self._followed: dict[Reader, list[tuple[Request, int]]] = {}  # rows that a reader tilts, in its order

    def clear(self) -> None:
        self.table, self.step, self._followed = [], None, {}

    def replant(self, requests: list[Request], begun: Begun) -> None:
        """The step goes on with these requests; those whose prompt has just been read come last. Branches that have
        ended have no row any more."""
        before, old = self.step, {row: i for i, row in enumerate(self.table)}
        self.table = []
        sources: list[int] = []  # rows of the step before
        fresh: list[tuple[Request, int]] = []  # prompts, and how many rows begin there
        for request in requests:
            if request in begun:
                request.fork()
            going = [b for b, branch in enumerate(request.branches) if not branch.ended]
            for _, stem in request.stepping():
                stem.lengths = [len(branch.tokens) for branch in request.branches]
            self.table += [(request, b) for b in going]
            winner = begun.get(request)
            if request not in begun:
                sources += [old[request, b] for b in going]
            elif winner is not None:
                sources += [winner] * len(going)
            else:
                fresh.append((request, len(going)))
        if not self.table:
            self.clear()
            return
        self.step = self._made(requests, before, sources, fresh)
        if self.step.fixed:
            graph = self.decoder.captured.setdefault(self.step.key, Graph(self.step))
            if graph.state is not self.step:
                graph.state.take(self.step)
                self.step = graph.state

    def _made(
        self, requests: list[Request], before: Step | None, sources: list[int], fresh: list[tuple[Request, int]]
    ) -> Step:
        tilts = list(dict.fromkeys(scorer for request in requests for scorer in request.plan.tilts))
        readers = {s: r for request in requests for s, r in request.plan.readers.items() if s in request.plan.tilts}
        old = None if before is None else before.frontier()
        beside = {}
        followed, self._followed = self._followed, {}
        for reader in dict.fromkeys(readers.values()):
            theirs = [(i, row) for i, row in enumerate(self.table) if reader in row[0].stems and row[0].plan.tilts]
            was, self._followed[reader] = followed.get(reader, []), [row for _, row in theirs]
            there = None if before is None else before.beside.get(reader)
            stay = [was.index(row) for _, row in theirs if row[0].stems[reader].at is None]
            new = [(at, 1) for _, row in theirs if (at := row[0].stems[reader].at) is not None]
            stems = [(row[0].stems[reader], row[1]) for _, row in theirs]
            frontier = _carried(None if there is None else there.frontier, stay, new)
            beside[reader] = ([i for i, _ in theirs], stems, frontier)
        step = Step(
            self.decoder,
            [(request.stems[self.decoder], b) for request, b in self.table],
            [draw for request, own in groupby(self.table, itemgetter(0)) for draw in self._draws(request, own, tilts)],
            _carried(old, sources, [(at, n) for r, n in fresh if (at := r.stems[self.decoder].at) is not None]),
            [Follower(scorer, readers.get(scorer)) for scorer in tilts],
            beside,
            self.steady,
            self._shaped(requests, before, sources, fresh),
            _most([r.params.logprobs for r in requests]),
        )
        if before is not None:  # rows in the middle of a block know the states at their last tokens
            step.carry(before, sources)
        for request, _ in fresh:
            for _, stem in request.stepping():
                stem.at = None  # its rows have it now
        return step

    def _shaped(
        self, requests: list[Request], before: Step | None, sources: list[int], fresh: list[tuple[Request, int]]
    ) -> Shaping | None:
        """What the rows ask of the base policy, if any asks for anything."""
        if not any(request.shape.asks for request in requests):
            return None
        old = None if before is None else before.shaping
        parts = [Shaping(len(sources)) if old is None else old.take(sources)]
        for request, n in fresh:
            one = Shaping.start(request.shape, request.prompt_ids, self.device)
            for token in request.tokens:  # it has been here before
                one.advance(torch.tensor([token], device=self.device))
            parts.append(one.take([0] * n))
        return Shaping.join(parts)

    def _draws(self, request: Request, rows: Iterable[tuple[Request, int]], tilts: Sequence[Scorer]) -> list[Draw]:
        """How the next tokens of its branches are drawn."""
        p, plan, done = request.params, request.plan, len(request.tokens)
        weights = tuple([plan.tilts.get(scorer, 0.0) for scorer in tilts]) if plan.tilts else ()
        same = (done + request.room == request.limit, request.ends, weights, plan.budget or 0.0)
        there = [(b, len(request.branches[b].tokens)) for _, b in rows]
        return [
            Draw(p.temperature, p.top_k, p.top_p, p.min_p, request.seeds[b], done + n, request.room - n, *same)
            for b, n in there
        ]

    # Tokens

    def run(self, tick: Callable[[], object]) -> int:
        """A few tokens for every row; returns how many were drawn in all. They have joined the branches."""
        step = self.step
        assert step is not None
        horizon = self._horizon(step)
        # Rows that idle cost as much as others: where more than half do, the host looks.
        few = (len(self.table) - 1) // 2 if horizon > 1 and not self.decoder.waits else -1
        graph = self.decoder.captured[step.key] if step.fixed else None
        self.before, self.steps = self.before + self.steps, 0
        while self.steps < horizon:
            tick()
            if graph is not None:
                graph()
            else:
                step.step()
            self.steps += 1
            if few >= 0 and int(step.alive.sum()) <= few:
                break
        with timed("read"):
            return self._read(step)

    def _horizon(self, step: Step) -> int:
        """Steps before the host looks, at most: one where somebody waits for each token."""
        host = not self.decoder.waits
        if (host and not self.decoder.light) or any(_looked_at(request) for request, _ in self.table):
            return 1
        if host and step.shaping is None:
            return HORIZON
        # To the nearest end of a block: nothing keeps a graph's row, or what shapes it, as it is there.
        left = min(request.room - len(request.branches[b].tokens) for request, b in self.table)
        return max(1, min(HORIZON, left))

    def _read(self, step: Step) -> int:
        """What was drawn joins the branches, up to their ends; how many tokens those are."""
        likeliest = listed(step.top[0], [r.params.logprobs for r, _ in self.table]) if step.top else []
        step.top.clear()
        ended, count = list[int](), 0
        tokens, logp_base, logp_policy, kl, valid = step.read(self.steps)
        sound = all(valid)
        for row, (request, b) in enumerate(self.table):
            branch, at = request.branches[b], row * self.steps
            if branch.ended or request.error:
                continue
            drawn = tokens[at : at + min(self.steps, request.room - len(branch.tokens))]
            if not request.ends.isdisjoint(drawn):
                del drawn[1 + next(i for i, token in enumerate(drawn) if token in request.ends) :]
            end = at + len(drawn)
            if not sound and False in valid[at:end]:
                self._blame(request, len(branch.tokens) + valid[at:end].index(False), step, row)
                continue
            branch.tokens += drawn
            branch.logp_base += logp_base[at:end]
            branch.logp_policy += logp_policy[at:end]
            for nats in kl[at:end]:
                branch.kl += nats
            if likeliest and request.params.logprobs is not None:
                branch.logprobs.append(likeliest[row])
            count += len(drawn)
            branch.finish_reason = self._finish(request, branch, drawn[-1])
            branch.ended = branch.finish_reason is not None or len(branch.tokens) == request.room
            if branch.ended:
                ended.append(row)
                request.ended_at = max(request.ended_at, self.before + len(drawn))
        if ended:
            step.alive[ended] = False
        return count

    def _finish(self, request: Request, branch: Branch, token: int) -> FinishReason | None:
        """Why a branch ends with the token that it has just got, or None."""
        if branch.text is not None:
            branch.text.push([token])
            return None if branch.text.finish is None else branch.text.finish.reason
        count = len(request.tokens) + len(branch.tokens)
        if token in request.ends and count > request.params.min_tokens:
            return "stop"
        return "length" if count == request.limit else None

    def _blame(self, request: Request, there: int, step: Step, row: int) -> None:
        at = f"at token {len(request.tokens) + there}"
        if step.bad.get(row) == "request":
            request.fail(f"what is forbidden (allowed_token_ids, bad_words, grammar) leaves no token to draw {at}")
            return
        either = "either" if request.plan.tilts else "model"  # looking would read every row of logits once more
        who = step.bad.get(row, either)
        if who == "model":
            request.fail(f"{self.name} gave NaN or infinite logits {at}; check the checkpoint and its dtype")
        else:
            either = f"{self.name} or the scorer" if who == "either" else "the scorer"
            request.fail(f"{either} gave NaN or infinite values {at}; check the scorer and its weight")

    def note_states(self) -> None:
        """Branches that have ended keep the states that their scorers read."""
        step = self.step
        assert step is not None
        ended = [(row, branch) for row, (r, b) in enumerate(self.table) if (branch := r.branches[b]).ended]
        new = [(row, branch) for row, branch in ended if step.hidden and not branch.hidden]
        if new:
            for (_, branch), states in zip(new, step.states([row for row, _ in new]), strict=True):
                branch.hidden, branch.previous = states


def _most(counts: list[int | None]) -> int | None:
    """The most of the likeliest tokens that a row asks for, -1 for all; None where none asks."""
    asked = [count for count in counts if count is not None]
    return None if not asked else -1 if -1 in asked else max(asked)


def _looked_at(request: Request) -> bool:
    """Whether the host has to see each token of a request before the next is drawn."""
    params = request.params
    listens = request.handle.listening and not request.plan.selects
    return listens or bool(params.stop) or params.logprobs is not None


def _carried(old: Frontier | None, sources: list[int], fresh: list[tuple[Frontier, int]]) -> Frontier:
    """Rows of the step before, then so many of each prompt that has been read. A layer that nobody read before is 0."""
    parts = []
    if sources:
        assert old is not None
        same = sources == list(range(len(old.logits)))
        parts.append(old if same else old.rows(torch.tensor(sources, device=old.logits.device)))
    parts += [f if n == 1 else f.rows(torch.zeros(n, dtype=torch.long, device=f.logits.device)) for f, n in fresh]
    shapes = {layer: h for part in parts for layer, h in part.hidden.items()}
    if any(len(part.hidden) < len(shapes) for part in parts):
        parts = [
            Frontier(p.logits, {n: p.hidden.get(n, h.new_zeros(len(p.logits), h.shape[1])) for n, h in shapes.items()})
            for p in parts
        ]
    return Frontier.of(parts)
