"""The loop between requests and results: prompts join and fork, and one branch of each is committed, block by block."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from pyengine import ledger
from pyengine.codec import Codec
from pyengine.decoder import Decoder, Prompt
from pyengine.errors import InputError, RequestError
from pyengine.proposal import Row, Tail, Tilt, propose
from pyengine.reader import Reader
from pyengine.results import Result
from pyengine.scorers import Part, Policy, PrefixModel
from pyengine.selection import Judge, Request, mix
from pyengine.strategies import BestOfK, Blockwise, Strategy, Tokenwise

Tick = Callable[[], object]
# A request, its new tokens, and its result when it is done or why it never will be.
Commit = tuple[int, list[int], Result | RequestError | None]


class Loop:
    """What decodes requests: an engine without its calls. One call at a time holds it."""

    policy: Policy
    codec: Codec
    eos: frozenset[int]
    max_rows: int
    batch_invariant: bool
    _decoder: Decoder
    _judge: Judge
    _guard: Any  # a threading.RLock
    _holder: object  # the call that decodes

    @property
    def parts(self) -> list[Part]:
        """The scorer that is followed, as its weighted parts."""
        return self._judge.parts

    @property
    def context(self) -> int | None:
        """Tokens that the model reads, None for any number."""
        return self.codec.context

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """No call begins or is decoding inside; InputError where one is."""
        with self._guard:
            if self._holder is not None:
                raise InputError(f"this engine is decoding: end or close the stream that is open before {what}")
            yield

    def _check(self, strategy: Strategy) -> None:
        if not isinstance(strategy, (Tokenwise, Blockwise, BestOfK)):
            raise InputError(f"not a strategy: {strategy!r}; use Tokenwise, Blockwise or BestOfK")
        if isinstance(strategy, Tokenwise):
            if strategy.weight == 0:
                return
            for part in self.parts:
                if not part.weight:
                    continue
                if part.transforms:
                    raise InputError(
                        f"Tokenwise cannot follow {part.name!r}: the transform of a value is not the value of the "
                        "transformed reward; train a prefix scorer on the transformed reward instead"
                    )
                if not part.scorer.scores_tokens:
                    raise InputError(
                        f"Tokenwise needs scorers that score every next token; {part.name!r} scores whole prefixes "
                        "only: use a prefix scorer, or Blockwise or BestOfK"
                    )
            for i, part in enumerate(self.parts):
                if part.weight and isinstance(part.scorer, PrefixModel) and i not in self._judge.readers:
                    raise InputError(
                        f"Tokenwise cannot follow {part.name!r}: its model has no branching cache (see the log); use "
                        "Blockwise or BestOfK"
                    )
        if not self.parts and (strategy.k > 1 or isinstance(strategy, Tokenwise)):
            raise InputError(f"{strategy} needs a scorer: Engine.from_pretrained(..., scorer=...)")

    @torch.inference_mode()
    def _decode(self, waiting: deque[Request], strategy: Strategy, tick: Tick = int) -> Generator[Commit, None, None]:
        """Commits of all requests as they are made, while nobody else decodes.

        However it ends, the engine is free and its decoders are whole again. `tick` is called for every token of a
        block.
        """
        me, whole = object(), False
        # Ended once more where an interrupt cuts the first time short.
        try:
            try:
                with self._alone("another call"):
                    self._holder = me
                self._check(strategy)  # its scorer may have been changed since it was asked for
                if waiting:
                    yield from self._commits(waiting, strategy, tick)
                whole = True
            except GeneratorExit:  # between two blocks
                whole = True
                raise
            finally:
                self._end(me, whole)
        except BaseException:
            self._end(me, whole)
            raise

    def _end(self, me: object, whole: bool) -> None:
        """The call of this holder is over. whole: nothing was cut short."""
        if self._holder is me:
            for decoder in (self._decoder, *self._judge.readers.values()):
                decoder.close(whole)
            self._holder = None

    def _commits(self, waiting: deque[Request], strategy: Strategy, tick: Tick) -> Generator[Commit, None, None]:
        """The loop: waiting prompts join, every prefix forks into k branches, one of them is committed.

        A request that fails leaves with the block that is on its way, and is yielded with its error.
        """
        k, live = strategy.k, list[Request]()
        tilt, readers = self._tilt(strategy), self._readers(strategy)
        decoders = [self._decoder, *dict.fromkeys(readers.values())]
        longest = max(r.limit for r in waiting)
        growing = not commits_nothing(strategy)
        room = 1 if k == 1 else min(strategy.block_tokens or longest, longest)
        layers = {layer for part in self.parts for layer in part.scorer.layers}
        self._decoder.layers = tuple(sorted(layers))
        for decoder in decoders:
            decoder.open(k, room)
        while waiting or live:
            prompts = [Prompt(r.prompt_ids, r.limit if growing else 0) for r in islice(waiting, self.max_rows)]
            joining = [waiting.popleft() for _ in range(min(d.fits(prompts) for d in decoders))]
            if joining:
                for decoder in decoders:
                    decoder.join(prompts[: len(joining)])
                live += joining
            tail = self._propose(live, strategy, tilt, tick)
            winners = [i * k + c for i, c in enumerate(self._judge.select(tail, live, strategy))]
            self._judge.score_ended(tail, live, winners, k)
            commits = [self._commit(r, tail, row, strategy) for r, row in zip(live, winners, strict=True)]
            for request in live:
                if not (request.finish_reason or request.error) and refuse(request, decoders[1:], 0):
                    commits.append((request.index, [], request.error))
            on = [i for i, r in enumerate(live) if not (r.finish_reason or r.error)]
            kept = [winners[i] for i in on]
            for decoder in decoders:  # the base model's may have dropped ended rows on the way
                rows = [tail.slots.index(row) for row in kept] if decoder is self._decoder else kept
                decoder.commit(torch.tensor(rows, dtype=torch.long, device=self.policy.device))
            live = [live[i] for i in on]
            yield from commits

    def _propose(self, live: list[Request], strategy: Strategy, tilt: Tilt, tick: Tick) -> Tail:
        """Draw k branches of up to block_tokens tokens for each live request."""
        k = strategy.k
        rows = []
        for r in live:
            done = len(r.tokens)
            room, context = r.limit - done, (self.context or math.inf) - len(r.prompt_ids) - done
            rows += [Row(r.params, mix(r.seed, [j]) if j else r.seed, done, room, context) for j in range(k)]
        # k = 1 is the base policy whatever the strategy: token by token, so that it matches to the bit.
        longest = max(row.room for row in rows)
        steps = 1 if k == 1 else min(longest, strategy.block_tokens or longest)
        tail = propose(self._decoder, rows, steps, self.eos, tilt, tick)
        for i, (step, who) in tail.bad.items():
            request = live[i // k]
            at = f"at token {len(request.tokens) + step}"
            if who == "model":
                request.fail(f"{self.policy.name} gave NaN or infinite logits {at}; check the checkpoint and its dtype")
            else:
                either = f"{self.policy.name} or the scorer" if who == "either" else "the scorer"
                request.fail(f"{either} gave NaN or infinite values {at}; check the scorer and its weight")
        return tail

    def _followed(self, strategy: Strategy) -> list[tuple[int, Part]]:
        """The parts that a strategy tilts every token by, with their places."""
        if not isinstance(strategy, Tokenwise) or not strategy.weight:
            return []
        return [(i, part) for i, part in enumerate(self.parts) if part.weight]

    def _readers(self, strategy: Strategy) -> dict[int, Reader]:
        """By part, scorers that are models and follow the base model: block by block, or token by token where they
        tilt. For k = 1 nothing is selected."""
        readers = self._judge.readers
        return readers if strategy.k > 1 else {i: readers[i] for i, _ in self._followed(strategy) if i in readers}

    def _tilt(self, strategy: Strategy) -> Tilt:
        """What a strategy does to every token."""
        if not isinstance(strategy, Tokenwise):
            return Tilt()
        followed, readers = self._followed(strategy), self._judge.readers
        return Tilt(
            [(strategy.weight * part.weight, part) for _, part in followed],
            strategy.kl_budget if followed else None,
            {j: readers[i] for j, (i, _) in enumerate(followed) if i in readers},
            self.batch_invariant,
        )

    def _commit(self, request: Request, tail: Tail, row: int, strategy: Strategy) -> Commit:
        """Append the winning row to the request, unless it has failed."""
        if request.error:
            return request.index, [], request.error
        request.tokens += tail.tokens[row]
        request.logp_base += tail.logp_base[row]
        request.logp_policy += tail.logp_policy[row]
        request.kl_tokens += tail.kl[row]
        request.committed += 1
        request.finish_reason = tail.finish_reason[row]
        result = self._result(request, strategy) if request.finish_reason else None
        return request.index, tail.tokens[row], result

    def _result(self, request: Request, strategy: Strategy) -> Result:
        assert request.finish_reason is not None
        kl, bounded = request.kl_tokens, strategy.k > 1
        if bounded:
            kl += ledger.best_of_k_bound(strategy.k) * request.committed
        scores = request.scores or []
        return Result(
            prompt=request.prompt,
            prompt_ids=request.prompt_ids,
            text=request.text.text
            if request.blocks
            else self.codec.between(request.prompt_ids, request.tokens, request.params.skip_special_tokens),
            tokens=request.tokens,
            finish_reason=request.finish_reason,
            reward=sum(p.weight * s for p, s in zip(self.parts, scores, strict=True) if p.weight) if scores else None,
            rewards={p.name: s for p, s in zip(self.parts, scores, strict=True)},
            logp_base=request.logp_base,
            logp_policy=request.logp_policy,
            kl=kl,
            kl_kind="bound" if bounded else "exact",
            seed=request.given_seed,
            blocks=request.blocks,
        )


def commits_nothing(strategy: Strategy) -> bool:
    """Whether its only block is the whole response, so that no prefix ever grows."""
    return strategy.k > 1 and strategy.block_tokens is None


def refuse(request: Request, decoders: Sequence[Decoder], growth: int) -> bool:
    """Fail a request that one of the decoders can never take, or not go on with."""
    reasons = [decoder.refuses(len(request.prompt_ids) + len(request.tokens), growth) for decoder in decoders]
    for reason in filter(None, reasons):
        request.fail(reason)
    return request.error is not None
