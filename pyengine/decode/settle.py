"""The end of a block: its branches are scored, one is selected, and what it adds is written into the request."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from pyengine import costs, ops
from pyengine.codec import Codec
from pyengine.decode import stops
from pyengine.decode.request import Branch, Request
from pyengine.errors import InputError, first_line
from pyengine.reader import Reader
from pyengine.results import Block, Candidate
from pyengine.scorers import Candidates, Part, Policy, RewardModel, Scorer
from pyengine.strategies import Tokenwise
from pyengine.timing import timed

Owned = list[tuple[Request, Branch]]


class Judge:
    """Scores branches for whoever follows which scorer. steady: nothing is scored together with another request's."""

    def __init__(self, policy: Policy, codec: Codec, steady: bool) -> None:
        self._policy, self._codec, self._steady = policy, codec, steady

    def refuse(self, requests: Sequence[Request]) -> None:
        """Fail requests whose prompt a transform cannot serve, as one without a reference, before any is decoded."""
        owned = [(request, Branch()) for request in requests]
        zeros = torch.zeros(len(owned))
        self._transformed(owned, {part.scorer: zeros for request in requests for part in request.plan.parts})

    # Scores

    def score(self, owned: Owned, selecting: bool) -> Tensor:
        """Transformed scores [N, R] of these branches, R as many as the longest of their sums has; NaN behind a
        shorter one, and where a request has failed, as one does that a scorer cannot score. selecting: readers follow
        the requests, and keep what they read."""
        followed: dict[Scorer, tuple[str, list[int]]] = {}  # its name, and who follows it, however often in a sum
        for place, (request, _) in enumerate(owned):
            for part in request.plan.parts:
                places = followed.setdefault(part.scorer, (part.name, []))[1]
                if places[-1:] != [place]:
                    places.append(place)
        raw: dict[Scorer, Tensor] = {}
        for scorer, (name, places) in followed.items():
            some = [owned[i] for i in places]
            reader = some[0][0].plan.readers.get(scorer)
            with timed(f"scorer {name}"):
                if reader is not None and selecting:
                    found = self._read(reader, some)
                else:
                    found = self._each(partial(self._score, scorer, reader, some), name, some)
            raw[scorer] = self._none(len(owned))
            raw[scorer][places] = found
        return self._transformed(owned, raw)

    def _none(self, *size: int) -> Tensor:
        return torch.full(size, torch.nan, device=self._policy.device)

    def _transformed(self, owned: Owned, raw: Mapping[Scorer, Tensor]) -> Tensor:
        """What the sums' transforms make of raw scores [N]; a call for all that share a sum."""
        out = self._none(len(owned), max((len(request.plan.parts) for request, _ in owned), default=0))
        for parts in {id(r.plan.parts): r.plan.parts for r, _ in owned}.values():
            places = [i for i, (request, _) in enumerate(owned) if request.plan.parts is parts]
            some, prompts = [owned[i] for i in places], [owned[i][0].prompt for i in places]
            for column, part in enumerate(parts):
                utilities = partial(_utilities, part, raw[part.scorer][places], prompts)
                out[places, column] = self._each(utilities, part.name, some)
        return out

    def _read(self, reader: Reader, owned: Owned) -> Tensor:
        """Raw scores of all branches of these requests by a scorer that has a cache of its own."""
        out = self._none(len(owned))
        waiting: list[tuple[Request, list[int], list[list[int]]]] = []
        for request, branches in groupby(range(len(owned)), key=lambda i: owned[i][0]):
            places = list(branches)
            tails = reader.given([owned[i][1].tokens for i in places], request.ends)
            reason = reader.misfit(request.stems[reader], tails)
            if reason:
                request.fail(reason)
            if request.error is None:
                waiting.append((request, places, tails))
        if waiting:
            scores = reader.score([r.stems[reader] for r, _, _ in waiting], [tails for _, _, tails in waiting])
            out[[i for _, places, _ in waiting for i in places]] = scores.to(out)
        return out

    def _score(self, scorer: Scorer, reader: Reader | None, owned: Owned, at: list[int]) -> Tensor:
        """Raw scores of some of the branches, each read from its start.

        A reward model that has a reader for k > 1 reads the same tokens here: text leaves special tokens out, and need
        not give the tokens that were drawn.
        """
        some = [owned[i] for i in at]
        requests = [request for request, _ in some]
        drawn = [request.tokens + branch.tokens for request, branch in some]
        if isinstance(scorer, RewardModel) and reader is not None:
            ids = [r.prompt_ids + reader.given([own], r.ends)[0] for r, own in zip(requests, drawn, strict=True)]
            return scorer.score_tokens([r.prompt for r in requests], ids).to(self._policy.device)
        candidates = Candidates(
            prompts=[r.prompt for r in requests],
            tokens=drawn,
            hidden={layer: torch.stack([b.hidden[layer] for _, b in some]) for layer in scorer.layers},
            previous={layer: torch.stack([b.previous[layer] for _, b in some]) for layer in scorer.layers},
            decode=lambda tokens, skip_special_tokens=True: [
                self._codec.between(r.prompt_ids, ids, skip_special_tokens)
                for r, ids in zip(requests, tokens, strict=True)
            ],
            prompt_ids=[r.prompt_ids for r in requests],
            messages=[r.messages for r in requests],
        )
        return scorer.score(candidates).to(self._policy.device)

    def _each(self, score: Callable[[list[int]], Tensor], name: str, owned: Owned) -> Tensor:
        """score(places) of all places whose requests are sound, fp32 [len(owned)] with NaN for the others.

        Where it raises for all together each request is asked for alone, so that only the one at fault fails; always
        where a request is not to depend on the others.
        """
        out = self._none(len(owned))
        sound = [i for i, (request, _) in enumerate(owned) if request.error is None]

        def apart(places: Iterable[int]) -> list[list[int]]:
            return [list(own) for _, own in groupby(places, key=lambda i: id(owned[i][0]))]

        waiting = apart(sound) if self._steady else [sound] if sound else []
        while waiting:
            places = waiting.pop()
            try:
                out[places] = score(places).to(out)
            except Exception as error:  # noqa: BLE001 - whatever a caller's function raises
                if len(apart(places)) > 1:
                    waiting += apart(places)
                else:
                    says = first_line(error)
                    ours = isinstance(error, InputError)  # it names the scorer already
                    reason = says if ours else f"scorer {name!r} raised {type(error).__name__}: {says}"
                    owned[places[0]][0].fail(reason, error)
        return out

    # Selection

    def select(self, requests: Sequence[Request]) -> dict[Request, int]:
        """The branch that each keeps whose block has ended; records the block with all its candidates."""
        owned = [(request, branch) for request in requests for branch in request.branches]
        with timed("score"):
            scores = self.score(owned, selecting=True)
        chosen: dict[Request, int] = {}
        first = 0
        # One call for requests of as many branches and the same weights and beta; most of a server's are alike.
        alike: dict[tuple[int, float, tuple[float, ...]], list[tuple[Request, int]]] = {}
        for request in requests:
            if request.error is None:
                strategy, weights = request.plan.strategy, tuple(part.weight for part in request.plan.parts)
                beta = 0.0 if isinstance(strategy, Tokenwise) else strategy.beta or 0.0
                alike.setdefault((strategy.k, beta, weights), []).append((request, first))
            first += len(request.branches)
        for (k, beta, weights), group in alike.items():
            places = [[at + b for b in range(k)] for _, at in group]
            rows = scores[torch.tensor(places, device=scores.device), : len(weights)]
            if rows.isnan().any():
                warnings.warn("a scorer returned NaN; such candidates rank last", RuntimeWarning, stacklevel=2)
            with timed("select_block", lambda: costs.select_block(rows)):
                picked = ops.select_block(
                    rows,
                    torch.tensor(weights, device=rows.device),
                    beta=beta,
                    seed=torch.tensor([r.seeds[0] for r, _ in group], device=rows.device),
                    position=torch.tensor([len(r.tokens) for r, _ in group], device=rows.device),
                )
            fields = picked.index.tolist(), picked.utility.tolist(), picked.probability.tolist(), rows.tolist()
            with timed("text"):
                for (request, _), index, utility, probability, own in zip(group, *fields, strict=True):
                    _record(request, index, utility, probability, own)
                    chosen[request] = index
        return chosen

    def score_ended(self, requests: Sequence[Request]) -> None:
        """Score the responses that have ended and that no selection has scored (k = 1); before they are committed."""
        owned = [(request, request.branches[0]) for request in requests if request.plan.parts]
        if owned:
            with timed("score"):
                scores = self.score(owned, selecting=False).tolist()
            for (request, _), own in zip(owned, scores, strict=True):
                request.scores = own[: len(request.plan.parts)]


def _utilities(part: Part, scores: Tensor, prompts: Sequence[str], at: list[int]) -> Tensor:
    """Some of these raw scores, transformed."""
    return part.utilities(scores[at], [prompts[i] for i in at])


def _grown(request: Request, branch: Branch) -> stops.Branch:
    text = request.text.fork()
    text.push(branch.tokens)
    return text


def _record(
    request: Request, chosen: int, utility: list[float], probability: list[float], scores: list[list[float]]
) -> None:
    grown = [branch.text or _grown(request, branch) for branch in request.branches]
    candidates = [
        Candidate(
            text.show(),
            branch.tokens,
            dict(zip((p.name for p in request.plan.parts), scores[j], strict=True)),
            utility[j],
            probability[j],
            branch.finish_reason,
            sum(branch.logp_base),
        )
        for j, (text, branch) in enumerate(zip(grown, request.branches, strict=True))
    ]
    request.text = grown[chosen]
    request.blocks.append(Block(len(request.tokens), candidates, chosen))
    if request.branches[chosen].finish_reason:
        request.scores = scores[chosen]
