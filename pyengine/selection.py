"""Scoring the branches of a block, and keeping one of each request."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pyengine import ops
from pyengine.codec import Codec, Text
from pyengine.errors import InputError, RequestError, first_line
from pyengine.proposal import Tail
from pyengine.reader import Reader, reader_of
from pyengine.results import Block, Candidate, FinishReason, SamplingParams
from pyengine.scorers import Candidates, Part, Policy, RewardModel, Scorer
from pyengine.strategies import Strategy, Tokenwise


@dataclass
class Request:
    """One prompt on its way; the lists grow with every commit."""

    index: int
    prompt: str
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    limit: int  # most new tokens that max_tokens and the context allow
    given_seed: int  # `seed` is this one mixed with the prompt
    text: Text  # of the tokens
    messages: list[Any] | None = None  # what the prompt was, if a conversation
    tokens: list[int] = field(default_factory=list)
    logp_base: list[float] = field(default_factory=list)
    logp_policy: list[float] = field(default_factory=list)
    kl_tokens: float = 0.0  # exact KL of the proposals along the response
    blocks: list[Block] = field(default_factory=list)
    committed: int = 0  # blocks
    scores: list[float] | None = None  # of the whole response, one for each part of the scorer
    finish_reason: FinishReason | None = None
    error: RequestError | None = None  # why it cannot go on; it leaves with the block that is on its way

    def fail(self, reason: str, cause: Exception | None = None) -> None:
        """It cannot be finished; the first reason stays."""
        if self.error is None:
            self.error = RequestError(self.index, reason)
            self.error.__cause__ = cause


class Judge:
    """What an engine follows: the weighted parts of its scorer, and readers for those with a cache of their own."""

    def __init__(
        self,
        policy: Policy,
        codec: Codec,
        eos: frozenset[int],
        max_rows: int,
        budget: float | None,
        frozen: bool,
        steady: bool = False,
    ) -> None:
        self._policy, self._codec, self._eos, self._steady = policy, codec, eos, steady
        self._readers_get = (max_rows, budget, frozen, steady)
        self.parts: list[Part] = []
        self.readers: dict[int, Reader] = {}  # of the parts whose scorers have one
        self._reader_of: dict[Scorer, Reader | None] = {}

    def follow(self, parts: list[Part]) -> None:
        """Score with these from now on; InputError, before anything changes, where one does not fit the policy."""
        for part in parts:
            part.scorer.check(self._policy)
            part.scorer.move(self._policy.device)
        # One reader for each scorer, kept as long as the scorer is; the memory of the others goes before any is made.
        # Whatever cuts this short leaves nothing followed.
        kept = {part.scorer: self._reader_of[part.scorer] for part in parts if part.scorer in self._reader_of}
        self.parts, self.readers, self._reader_of = [], {}, kept
        for part in parts:
            if part.scorer not in kept:
                kept[part.scorer] = reader_of(part.scorer, self._codec.tokenizer, *self._readers_get)
        found = {i: kept[part.scorer] for i, part in enumerate(parts)}
        self.parts, self.readers = parts, {i: reader for i, reader in found.items() if reader is not None}

    def forget(self) -> None:
        """Nothing that the readers' models have read so far is used again."""
        for reader in self.readers.values():
            reader.forget()

    def refuse(self, requests: Sequence[Request]) -> None:
        """Fail requests whose prompt a transform cannot serve, as one without a reference, before any is decoded."""
        for part in self.parts:
            self._each(
                lambda at: part.utilities(torch.zeros(len(at)), [requests[i].prompt for i in at]), part.name, requests
            )

    def score(self, tail: Tail, live: list[Request], rows: list[int], k: int) -> Tensor:
        """Transformed scores [len(rows), R] of the prefixes that end with the given rows of the tail; NaN for requests
        that have failed, as those do that a scorer cannot score."""
        owners = [live[row // k] for row in rows]
        scores = []
        raw: dict[Scorer, Tensor] = {}  # one pass for each, however often it is in the sum
        for i, part in enumerate(self.parts):
            if part.scorer not in raw:
                reader = self.readers.get(i)
                if reader is not None and k > 1:
                    raw[part.scorer] = self._read(reader, tail, live, k)[rows]
                else:
                    raw[part.scorer] = self._each(
                        lambda at: self._score(part, reader, tail, owners, rows, at), part.name, owners
                    )
            found = raw[part.scorer]
            scores.append(
                self._each(lambda at: part.utilities(found[at], [owners[j].prompt for j in at]), part.name, owners)
            )
        return torch.stack(scores, -1)

    def _read(self, reader: Reader, tail: Tail, live: list[Request], k: int) -> Tensor:
        """Raw scores [N] of all rows by a scorer that has a cache of its own."""
        for row, reason in reader.misfits(tail.tokens, self._eos).items():
            live[row // k].fail(reason)
        # A request that has failed is in the reader's cache until the commit: its first token stands for the rest.
        tails = [tokens[:1] if live[row // k].error else tokens for row, tokens in enumerate(tail.tokens)]
        return reader.score(tails, self._eos).to(self._policy.device)

    def _score(
        self, part: Part, reader: Reader | None, tail: Tail, owners: list[Request], rows: list[int], at: list[int]
    ) -> Tensor:
        """Raw scores [len(at)] of some of the rows of these requests, each read from its start.

        A reward model that has a reader for k > 1 reads the same tokens here: text leaves special tokens out, and need
        not give the tokens that were drawn.
        """
        some = [owners[i] for i in at]
        if isinstance(part.scorer, RewardModel) and reader is not None:
            drawn = [r.tokens + tail.tokens[rows[i]] for r, i in zip(some, at, strict=True)]
            ids = [r.prompt_ids + own for r, own in zip(some, reader.given(drawn, self._eos), strict=True)]
            return part.scorer.score_tokens([r.prompt for r in some], ids).to(self._policy.device)
        index = torch.tensor([rows[i] for i in at], device=self._policy.device)
        candidates = Candidates(
            prompts=[r.prompt for r in some],
            tokens=[r.tokens + tail.tokens[rows[i]] for r, i in zip(some, at, strict=True)],
            hidden={layer: h[index] for layer, h in tail.hidden.items()},
            previous={layer: h[index] for layer, h in tail.previous.items()},
            decode=lambda tokens, skip_special_tokens=True: [
                self._codec.between(r.prompt_ids, ids, skip_special_tokens) for r, ids in zip(some, tokens, strict=True)
            ],
            prompt_ids=[r.prompt_ids for r in some],
            messages=[r.messages for r in some],
        )
        return part.scorer.score(candidates).to(self._policy.device)

    def _each(self, score: Callable[[list[int]], Tensor], name: str, owners: Sequence[Request]) -> Tensor:
        """score(places) of all places whose requests are sound, fp32 [len(owners)] with NaN for the others.

        Where it raises for all together each request is asked for alone, so that only the one at fault fails; always
        where a request is not to depend on the others.
        """
        out = torch.full((len(owners),), torch.nan, device=self._policy.device)
        sound = [i for i, request in enumerate(owners) if request.error is None]
        alone = [list(own) for _, own in groupby(sound, key=lambda i: owners[i].index)]
        waiting = alone if self._steady else [sound] if sound else []
        while waiting:
            places = waiting.pop()
            try:
                out[places] = score(places).to(out)
            except Exception as error:  # noqa: BLE001 - whatever a caller's function raises
                alone = [list(own) for _, own in groupby(places, key=lambda i: owners[i].index)]
                if len(alone) > 1:
                    waiting += alone
                else:
                    says = first_line(error)
                    ours = isinstance(error, InputError)  # it names the scorer already
                    reason = says if ours else f"scorer {name!r} raised {type(error).__name__}: {says}"
                    owners[places[0]].fail(reason, error)
        return out

    def select(self, tail: Tail, live: list[Request], strategy: Strategy) -> list[int]:
        """The branch that each request keeps; records the block with all its candidates."""
        k = strategy.k
        if isinstance(strategy, Tokenwise) or k == 1:
            return [0] * len(live)
        device = self._policy.device
        scores = self.score(tail, live, list(range(len(live) * k)), k).unflatten(0, (len(live), k))
        sound = torch.tensor([r.error is None for r in live], device=device)
        if scores[sound].isnan().any():
            warnings.warn("a scorer returned NaN; such candidates rank last", RuntimeWarning, stacklevel=2)
        picked = ops.select_block(
            scores,
            torch.tensor([p.weight for p in self.parts], device=device),
            beta=strategy.beta or 0.0,
            seed=torch.tensor([r.seed for r in live], device=device),
            position=torch.tensor([len(r.tokens) for r in live], device=device),
        )
        chosen, utility, probability = picked.index.tolist(), picked.utility.tolist(), picked.probability.tolist()
        for i, (request, row_scores) in enumerate(zip(live, scores.tolist(), strict=True)):
            if request.error:
                continue
            grown = [request.text.copy() for _ in range(k)]
            candidates = [
                Candidate(
                    grown[j].push(tail.tokens[i * k + j], last=tail.finish_reason[i * k + j] is not None),
                    tail.tokens[i * k + j],
                    dict(zip((p.name for p in self.parts), row_scores[j], strict=True)),
                    utility[i][j],
                    probability[i][j],
                    tail.finish_reason[i * k + j],
                )
                for j in range(k)
            ]
            request.text = grown[chosen[i]]
            request.blocks.append(Block(len(request.tokens), candidates, chosen[i]))
            if tail.finish_reason[i * k + chosen[i]]:
                request.scores = row_scores[chosen[i]]
        return chosen

    def score_ended(self, tail: Tail, live: list[Request], winners: list[int], k: int) -> None:
        """Score the responses that end here and that no selection has scored (k = 1)."""
        ended = [
            i for i, r in enumerate(live) if tail.finish_reason[winners[i]] and r.scores is None and r.error is None
        ]
        if ended and self.parts:
            scores = self.score(tail, live, [winners[i] for i in ended], k).tolist()
            for i, row_scores in zip(ended, scores, strict=True):
                live[i].scores = row_scores


def mix(seed: int, words: Sequence[int]) -> int:
    """A seed for (seed, words) as a signed 64-bit number: equal input, equal seed, on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for word in (seed, *words):
        digest.update(word.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little", signed=True)
