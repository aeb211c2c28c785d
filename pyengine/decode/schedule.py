"""The one loop: requests are admitted, all of them step together, and what has come to the end of a block is settled.

The schedule is the only writer of requests. It is stepped by one thread at a time; `submit` and `Handle.cancel` may be
called from any.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pyengine.cache import PAGE, BranchingCache
from pyengine.decode.request import Request
from pyengine.decode.rows import Begun, Rows
from pyengine.decode.settle import Judge
from pyengine.decoder import PREFILL_TOKENS, BranchingDecoder, Decoder, Stem
from pyengine.errors import RequestError
from pyengine.reader import Reader
from pyengine.results import Event, Result
from pyengine.timing import timed

BESIDE_TOKENS = 8192  # of prompts that a GPU reads between two steps of others


class Schedule:
    """decoder: the base policy's; name: what messages call it."""

    def __init__(self, decoder: Decoder, judge: Judge, name: str, steady: bool) -> None:
        self.decoder, self.judge = decoder, judge
        self.incoming: deque[Request] = deque()  # the one place where other threads write
        self.waiting: list[Request] = []  # in the order in which they are to be admitted
        self.reading: list[Request] = []  # whose prompts are being read
        self.running: list[Request] = []  # that have rows
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of the steps so far, by phase
        self._begun: list[Decoder] = []  # decoders that have prompts, or had since nobody was there
        self.rows = Rows(decoder, name, steady)
        self._stale = False  # a request with rows has left since they were planted
        self.whole = True  # no step was cut short that `abort` has not seen to the end

    @property
    def idle(self) -> bool:
        return not (self.incoming or self.waiting or self.reading or self.running)

    def requests(self) -> list[Request]:
        return [*self.running, *self.reading, *self.waiting, *self.incoming]

    def stats(self) -> dict[str, int | float]:
        found: dict[str, int | float] = {
            "running": len(self.running) + len(self.reading),
            "waiting": len(self.waiting) + len(self.incoming),
            "rows": len(self.rows.table),
            "captured_graphs": len(self.decoder.captured),
        }
        if isinstance(self.decoder, BranchingDecoder):
            cache = self.decoder.cache
            found |= {"pages_in_use": cache.pages_in_use, "pages": cache.capacity}
            found |= {"leaves_in_use": cache.leaves - cache.leaves_free, "leaves": cache.leaves}
        found |= {f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()}
        return found | dict(self.counts)

    def refuse(self, request: Request) -> None:
        """Fail a request that one of its decoders can never take."""
        plan, tokens = request.plan, len(request.prompt_ids)
        for decoder in self._decoders(request):
            growth = request.limit if plan.grows else 0
            reason = decoder.refuses(tokens, growth, plan.k, request.next_room)
            if reason:
                request.fail(reason)

    # One step

    @torch.inference_mode()
    def step(self, tick: Callable[[], object] = int) -> None:
        """Requests come and go, and those that are there have a few tokens more."""
        self.whole = False
        with self._phase("admit"):
            self._collect()
            self._admit()
        with self._phase("prefill"):
            self._prefill()
            if self._stale:
                self._replant({})
        if self.running:
            with self._phase("sample"):
                self.counts["drawn_tokens"] += self.rows.run(tick)
            with self._phase("select"):
                chosen = self._select()
            with self._phase("commit"):
                self._settle(chosen)
        if self.idle:
            with self._phase("end"):
                self._end(True)
        self.whole = True

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with timed(name):
            yield
        self.seconds[name] += time.perf_counter() - began

    def abort(self, error: BaseException) -> None:
        """A step was cut short: nobody that was on its way can go on, and the memory is whole again."""
        requests = self.requests()
        self.incoming.clear()
        self.waiting, self.reading, self.running = [], [], []
        self.rows.clear()
        self._stale = False
        self._end(False)
        self.whole = True
        for request in requests:
            if not request.handle.done:
                failure = RequestError(request.index, f"decoding was cut short ({type(error).__name__}: {error})")
                failure.__cause__ = error
                request.handle.give(failure)

    def _end(self, whole: bool) -> None:
        for decoder in self._begun or [self.decoder]:
            decoder.end(whole)
        self._begun, self.decoder.layers = [], ()

    # Coming

    def _collect(self) -> None:
        if self.incoming:
            while self.incoming:
                self.waiting.append(self.incoming.popleft())
            self.waiting.sort(key=lambda r: r.priority)  # stable: equals in the order of their coming
        now, over = time.monotonic(), list[Request]()
        for request in (*self.waiting, *self.reading, *self.running):
            if request.deadline is not None and now > request.deadline and not request.over:
                request.fail("its deadline has passed")
            if request.over:
                over.append(request)
        for request in over:
            self._leave(request)

    def _admit(self) -> None:
        """Those at the head of the queue, while there are rows and memory for them."""
        rows = sum(r.plan.k for r in [*self.reading, *self.running])
        while self.waiting:
            request = self.waiting[0]
            if rows and rows + request.plan.k > self.decoder.max_rows:
                return
            if not self._join(request):
                return
            rows += request.plan.k
            if request.admitted is None:
                request.admitted = time.monotonic()
            self.reading.append(self.waiting.pop(0))

    def _join(self, request: Request) -> bool:
        """A stem for it in each decoder that follows it, or none in any."""
        ids = request.prompt_ids + request.tokens
        for decoder in self._decoders(request):
            if decoder not in self._begun:
                decoder.begin()
                self._begun.append(decoder)
            stem = self._place(decoder, ids, _leaves(request) if request.steps(decoder) else 0)
            if stem is None:
                for there, own in request.stems.items():
                    there.leave(own)
                request.stems = {}
                return False
            request.stems[decoder] = stem
        self.counts["prefix_hit_tokens"] += request.stems[self.decoder].filled
        layers = {layer for part in request.plan.parts for layer in part.scorer.layers}
        self.decoder.layers = tuple(sorted({*self.decoder.layers, *layers}))
        return True

    def _place(self, decoder: Decoder, ids: list[int], leaves: int) -> Stem | None:
        """Leaves and pages of those that are still being read are spoken for."""
        spoken_for = sum(_leaves(other) for other in self.reading if decoder in other.stems and other.steps(decoder))
        return decoder.join(ids, leaves + spoken_for)

    def _decoders(self, request: Request) -> list[Decoder]:
        return [self.decoder, *request.plan.follows()]

    def _prefill(self) -> None:
        if not self.reading:
            return
        most = self._beside() if self.running else PREFILL_TOKENS
        for decoder in dict.fromkeys(d for r in self.reading for d in r.stems):
            theirs = [r.stems[decoder] for r in self.reading if decoder in r.stems]
            pending = [stem for stem in theirs if stem.at is None]
            for stem, frontier in decoder.prefill(pending, most) if pending else []:
                stem.at = frontier
        ready = [r for r in self.reading if all(stem.at is not None for stem in r.stems.values())]
        if ready:
            self.reading = [r for r in self.reading if r not in ready]
            self.running += ready
            self._replant(dict.fromkeys(ready))

    def _beside(self) -> int:
        """Tokens of prompts that are read between two runs of others. A CPU takes as long for a prompt's token as for a
        row's: as many as there are rows, for each step of a run, hold those up by about as many steps more."""
        return BESIDE_TOKENS if self.decoder.device.type != "cpu" else max(PAGE, len(self.rows.table)) * self.rows.steps

    def _replant(self, begun: Begun) -> None:
        self._stale = False
        with timed("replant"):
            self.rows.replant(self.running, begun)

    # The ends of blocks

    def _select(self) -> dict[Request, int]:
        """The branch that is kept of each request whose block has ended."""
        ended = [r for r in self.running if not r.error and all(branch.ended for branch in r.branches)]
        self.rows.note_states()
        blocks = [r for r in ended if r.plan.selects]
        chosen = self.judge.select(blocks) if blocks else {}
        singles = [r for r in ended if not r.plan.selects]
        self.judge.score_ended([r for r in singles if r.branches[0].finish_reason])
        chosen |= dict.fromkeys(singles, 0)
        return {r: b for r, b in chosen.items() if r.error is None}

    def _settle(self, chosen: dict[Request, int]) -> None:
        begun = self._commit(chosen)
        with timed("text"):
            for request in self.running:
                self._tell(request)
        over = [r for r in self.running if r.over]
        for request in sorted(over, key=lambda r: r.ended_at):  # several steps may have been made
            self._leave(request)
        there = set(self.running)
        dead = sum(
            request.branches[b].ended for request, b in self.rows.table if request in there and request not in begun
        )
        drop = 2 * dead > len(self.rows.table) if self.decoder.idles else dead
        if begun or drop or self._stale:
            self._replant(begun)

    def _commit(self, chosen: dict[Request, int]) -> Begun:
        """The winners' tokens join their requests, and where these go on their prefixes. Those that begin a block, with
        the row that they go on from."""
        at = {row: i for i, row in enumerate(self.rows.table)}
        begun: Begun = {}
        moves: dict[Decoder, list[tuple[Request, int, int]]] = {}
        for request, b in chosen.items():
            branch = request.branches[b]
            request.tokens += branch.tokens
            request.logp_base += branch.logp_base
            request.logp_policy += branch.logp_policy
            request.kl_tokens += branch.kl
            request.logprobs += branch.logprobs
            if branch.text is not None:
                request.text = branch.text
            request.finish_reason = branch.finish_reason
            if request.finish_reason is None and not self._outgrown(request):
                begun[request] = at[request, b]
                for decoder in request.stems:
                    moves.setdefault(decoder, []).append((request, b, len(branch.tokens)))
            request.branches = []
        for decoder, some in moves.items():
            self._make_room(decoder, some, begun)
        for decoder, some in moves.items():
            stay = [(r, b, n) for r, b, n in some if r in begun]
            read = [(r.stems[decoder], b) for r, b, _ in stay if not r.steps(decoder)]
            stepped = [(r.stems[decoder], b, n) for r, b, n in stay if r.steps(decoder)]
            if read and isinstance(decoder, Reader):
                decoder.keep(read)
            if stepped:
                decoder.commit(stepped)
        return begun

    def _outgrown(self, request: Request) -> bool:
        """Fail a request that a reader cannot follow any further."""
        for decoder in request.stems:
            if isinstance(decoder, Reader):
                reason = decoder.too_long(len(request.prompt_ids) + len(request.tokens) + 1)
                if reason:
                    request.fail(reason)
        return request.error is not None

    def _make_room(self, decoder: Decoder, moves: list[tuple[Request, int, int]], begun: Begun) -> None:
        """While there are not the pages, the youngest of the least urgent gives up its own, and is read again later."""
        while decoder.pages_short([(r.stems[decoder], b, n) for r, b, n in moves if r in begun]) > 0:
            there = [r for r in [*self.running, *self.reading] if decoder in r.stems and not r.over]
            self._preempt(max(there, key=lambda r: (r.priority, r.number)))
            for request in [r for r in begun if not r.stems]:
                del begun[request]

    def _preempt(self, request: Request) -> None:
        """It gives back its memory, goes on with the same tokens once it is admitted again, and is first in line."""
        self.counts["preempted"] += 1
        self._stale = True
        (self.running if request in self.running else self.reading).remove(request)
        for decoder, stem in request.stems.items():
            decoder.leave(stem)
        for branch in request.branches:
            if branch.text is not None:  # what a stream has shown is drawn again, and not shown twice
                request.text.shown = max(request.text.shown, branch.text.shown)
        request.stems, request.branches = {}, []
        first = next((i for i, r in enumerate(self.waiting) if r.priority >= request.priority), len(self.waiting))
        self.waiting.insert(first, request)

    # Going

    def _tell(self, request: Request) -> None:
        """Events of what is new, to whoever listens; what nobody listened to is one event at the end."""
        handle, over = request.handle, request.finish_reason is not None and request.error is None
        if not handle.listening and not over:
            return
        events: list[Event] = []
        if request.plan.selects:
            for block in request.blocks[request.told :]:
                request.told += 1
                picked = block.candidates[block.chosen]
                logprobs = request.logprobs[block.start :][: len(picked.tokens)] or None
                events.append(Event(picked.text, picked.tokens, block, kl=request.kl(request.told), logprobs=logprobs))
        elif request.error is None:
            new = [*request.tokens, *(t for branch in request.branches for t in branch.tokens)][request.told :]
            likeliest = [*request.logprobs, *(one for branch in request.branches for one in branch.logprobs)]
            kl = request.kl(0) + sum(branch.kl for branch in request.branches)
            state = next((branch.text for branch in request.branches), None) or request.text
            pieces = [[token] for token in new] if handle.listening else [new] if new else []
            for piece in pieces:
                if not request.text.ends.strings:
                    state.push(piece)
                logprobs = likeliest[request.told :][: len(piece)] or None
                request.told += len(piece)
                events.append(Event(state.show(), piece, kl=kl, logprobs=logprobs))
        if over:  # kept here too: whoever listens may have taken the event before the request has left
            request.outcome = events[-1].result = request.result()
        handle._events += events

    def _leave(self, request: Request) -> None:
        """What it holds is free, and its caller has the outcome."""
        for where in (self.waiting, self.reading, self.running):
            if request in where:
                where.remove(request)
                self._stale |= where is self.running
        for decoder, stem in request.stems.items():
            decoder.leave(stem)
        request.stems = {}
        self._finish(request)

    def _finish(self, request: Request) -> None:
        outcome: Result | Exception
        if request.error is not None:
            outcome = request.error
        elif request.outcome is not None:
            outcome = request.outcome
        else:
            outcome = RequestError(request.index, "it was cancelled")
        self.counts["error" if request.error else request.finish_reason or "cancelled"] += 1
        request.handle.give(outcome)


def _leaves(request: Request) -> int:
    """Of the branches of its next block."""
    return request.plan.k * BranchingCache.leaves_for(request.next_room)
