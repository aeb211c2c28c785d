"""A request on its way, and the handle that its caller holds. Only the schedule writes a request."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyengine import ledger
from pyengine.cache import LEAF
from pyengine.decode import stops
from pyengine.decode.logprobs import Logprob
from pyengine.decode.shaping import Shape
from pyengine.decoder import Decoder, Stem
from pyengine.errors import InputError, RequestError
from pyengine.plan import Plan
from pyengine.reader import Reader
from pyengine.results import Block, Event, FinishReason, Result, SamplingParams, seeded
from pyengine.scorers import Hidden
from pyengine.strategies import BASE, Strategy


@dataclass(eq=False)
class Branch:
    """One branch of the block that is on its way."""

    tokens: list[int] = field(default_factory=list)
    logp_base: list[float] = field(default_factory=list)
    logp_policy: list[float] = field(default_factory=list)
    kl: float = 0.0  # summed over its tokens
    finish_reason: FinishReason | None = None
    ended: bool = False  # no token follows in this block
    text: stops.Branch | None = None  # where stop strings are looked for: its text, with what is before it
    logprobs: list[list[Logprob]] = field(default_factory=list)  # at each token, where they are asked for
    hidden: Hidden = field(default_factory=dict)  # [D] at its last token, once its row is gone
    previous: Hidden = field(default_factory=dict)  # at the token before


@dataclass(eq=False)
class Request:
    """One prompt on its way; the lists grow with every commit."""

    index: int  # its place among the prompts of a call
    prompt: str
    prompt_ids: list[int]
    plan: Plan
    limit: int  # most new tokens that max_tokens and the context allow
    given_seed: int
    text: stops.Branch  # of the tokens, and where they end
    shape: Shape  # what it asks of the base policy
    messages: list[Any] | None = None  # what the prompt was, if a conversation
    priority: int = 0
    deadline: float | None = None  # by time.monotonic()
    seeds: list[int] = field(init=False)  # of each branch: given_seed mixed with the prompt, and others made from that
    ends: frozenset[int] = field(init=False)  # tokens that end a branch
    handle: Handle = field(init=False)
    # Where it is:
    stems: dict[Decoder, Stem] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    room: int = 0  # tokens of a branch of the block
    # What it has:
    tokens: list[int] = field(default_factory=list)
    logp_base: list[float] = field(default_factory=list)
    logp_policy: list[float] = field(default_factory=list)
    kl_tokens: float = 0.0  # exact KL of the proposals along the response
    blocks: list[Block] = field(default_factory=list)
    logprobs: list[list[Logprob]] = field(default_factory=list)
    prompt_logprobs: list[list[Logprob] | None] | None = None
    scores: list[float] | None = None  # of the whole response, one for each part of the scorer
    finish_reason: FinishReason | None = None
    outcome: Result | None = None  # once it has ended
    error: Exception | None = None  # why it cannot go on; it leaves at the end of the step
    cancelled: bool = False
    ended_at: int = 0  # the step of the loop with which its last branch ended
    told: int = 0  # tokens, or blocks, of which there have been events
    number: int = 0  # in the order of submission, from 1 on
    arrived: float = 0.0  # by time.monotonic(); when it was submitted
    admitted: float | None = None  # when it was first given memory

    def __post_init__(self) -> None:
        seed = mix(self.given_seed, self.prompt_ids)
        self.seeds = [mix(seed, [b]) if b else seed for b in range(self.plan.k)]
        self.ends = self.text.ends.eos | self.text.ends.tokens

    @property
    def params(self) -> SamplingParams:
        return self.plan.sampling

    @property
    def over(self) -> bool:
        return self.error is not None or self.finish_reason is not None or self.cancelled

    @property
    def next_room(self) -> int:
        """Tokens of a branch of its next block. A single branch has blocks too: where they end must not depend on what
        is decoded beside it, as the split between prefix and tail orders the sums."""
        left = self.limit - len(self.tokens)
        if not self.plan.selects:
            return min(LEAF, left)
        return min(self.plan.strategy.block_tokens or left, left)

    def steps(self, decoder: Decoder) -> bool:
        """Whether it has a row for each branch there; a reader by which it selects sees whole blocks."""
        return not (isinstance(decoder, Reader) and self.plan.selects)

    def stepping(self) -> list[tuple[Decoder, Stem]]:
        """Where it has a row for each branch."""
        return [(decoder, stem) for decoder, stem in self.stems.items() if self.steps(decoder)]

    def fork(self) -> None:
        """The branches of its next block."""
        self.branches, self.room = [Branch() for _ in range(self.plan.k)], self.next_room
        if self.text.ends.strings:
            for branch in self.branches:
                branch.text = self.text.fork()
        for decoder, stem in self.stepping():
            decoder.fork(stem, self.plan.k, self.room)

    def fail(self, reason: str, cause: Exception | None = None) -> None:
        """It cannot be finished; the first reason stays."""
        if self.error is None:
            self.error = RequestError(self.index, reason)
            self.error.__cause__ = cause

    def kl(self, blocks: int) -> float:
        """Nats from the base policy, after so many selections."""
        return self.kl_tokens + (ledger.best_of_k_bound(self.plan.k) * blocks if self.plan.selects else 0.0)

    def result(self) -> Result:
        """Of a request that has ended."""
        assert self.finish_reason is not None
        scores, parts = self.scores or [], self.plan.parts
        return Result(
            prompt=self.prompt,
            prompt_ids=self.prompt_ids,
            text=self.text.text,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            reward=sum(p.weight * s for p, s in zip(parts, scores, strict=True) if p.weight) if scores else None,
            rewards={p.name: s for p, s in zip(parts, scores, strict=True)} if scores else {},
            logp_base=self.logp_base,
            logp_policy=self.logp_policy,
            kl=self.kl(len(self.blocks)),
            kl_kind="bound" if self.plan.selects else "exact",
            seed=self.given_seed,
            blocks=self.blocks,
            stop_reason=None if self.text.finish is None else self.text.finish.stop_reason,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs,
        )


class Handle:
    """A request's caller: events as they are committed, or the result at the end.

    Whoever waits drives the engine, unless it has a thread of its own. Leaving an iterator early cancels the request.
    """

    def __init__(
        self,
        request: Request,
        wait: Callable[[Callable[[], bool], float | None], None],
        tell: Callable[[int], object] | None = None,
    ) -> None:
        self._request, self._wait, self.tell = request, wait, tell
        self._events: deque[Event] = deque()
        self._outcome: Result | Exception | None = None
        self.listening = False  # somebody takes events token by token

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error in its place."""
        return self._outcome is not None

    def give(self, outcome: Result | Exception) -> None:
        """The schedule's alone: it is done."""
        self._outcome = outcome
        if self.tell is not None:
            self.tell(self._request.index)

    def listen(self) -> Handle:
        """From now on each token or block is an event of its own, for `take`."""
        self.listening = True
        return self

    def take(self) -> list[Event]:
        """The events that are there, without waiting: for a host that drives the engine by `Engine.step`."""
        return [self._events.popleft() for _ in range(len(self._events))]

    @property
    def prompt(self) -> str:
        return self._request.prompt

    @property
    def prompt_ids(self) -> list[int]:
        return self._request.prompt_ids

    @property
    def queued(self) -> float | None:
        """Seconds that it waited for memory; None while it waits."""
        admitted = self._request.admitted
        return None if admitted is None else admitted - self._request.arrived

    def cancel(self) -> None:
        """It is not wanted any more: what it holds is free with the next step. Nothing happens where it is done."""
        self._request.cancelled = True

    def outcome(self, timeout: float | None = None) -> Result | Exception:
        """The result, or the error that stands for it; TimeoutError after so many seconds."""
        self._wait(lambda: self._outcome is not None, timeout)
        assert self._outcome is not None
        return self._outcome

    def result(self, timeout: float | None = None) -> Result:
        """The result; raises the request's error, or TimeoutError after so many seconds."""
        found = self.outcome(timeout)
        if isinstance(found, Exception):
            raise found
        return found

    def __iter__(self) -> Generator[Event, None, None]:
        self.listening = True
        try:
            while (event := self._next()) is not None:
                yield event
        finally:
            self.listening = False
            if self._outcome is None:
                self.cancel()

    def _next(self) -> Event | None:
        """The next event; None after the last. Raises the request's error in its place."""
        self._wait(lambda: bool(self._events) or self._outcome is not None, None)
        if self._events:
            return self._events.popleft()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return None

    async def __aiter__(self) -> AsyncIterator[Event]:
        self.listening = True
        try:
            while (event := await asyncio.to_thread(self._next)) is not None:
                yield event
        finally:
            self.listening = False
            if self._outcome is None:
                self.cancel()

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.to_thread(self.result).__await__()


def samples(
    prompts: Sequence[Any],
    strategy: Strategy | Sequence[Strategy | None] | None,
    sampling: SamplingParams | Sequence[SamplingParams] | None,
) -> tuple[list[Any], list[Strategy], list[SamplingParams]]:
    """A prompt, strategy and parameters with a seed for each sample of a call, the n of one prompt side by side: the
    first has the seed that was given, sample i one made of it and i. InputError for another number of strategies or
    parameters than there are prompts."""
    params = seeded(prompts, sampling)
    if not isinstance(strategy, (list, tuple)):
        strategy = [strategy] * len(prompts)  # type: ignore[list-item]
    if len(strategy) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(strategy)} strategies: give one, or one for each")
    found: list[tuple[Any, Strategy, SamplingParams]] = []
    for prompt, own, p in zip(prompts, strategy, params, strict=True):
        each = [p] if p.n == 1 else [replace(p, n=1, seed=mix(p.seed or 0, [i]) if i else p.seed) for i in range(p.n)]
        found += [(prompt, own or BASE, one) for one in each]
    return [prompt for prompt, _, _ in found], [own for _, own, _ in found], [p for _, _, p in found]


def mix(seed: int, words: Sequence[int]) -> int:
    """A seed for (seed, words) as a signed 64-bit number: equal input, equal seed, on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for word in (seed, *words):
        digest.update(word.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little", signed=True)
