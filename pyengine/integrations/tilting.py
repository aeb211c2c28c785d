"""Tokenwise in a loop that belongs to somebody else: what a request adds to its row of logits.

A host asks its logits processors first and divides by the temperature T afterwards. For a draw from
softmax(l / T + Σ λ V) (Controlled Decoding, Eq. 6) the row gets T Σ λ V, and Σ λ V where the host is greedy: with Σ λ V
alone the argmax is right and every other probability is wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine import ledger
from pyengine.decode.panel import Panel
from pyengine.decode.values import token_values
from pyengine.decoder import PREFILL_TOKENS, Stem
from pyengine.errors import InputError
from pyengine.kl_budget import check_budget
from pyengine.ops.linear import product
from pyengine.plan import Plan
from pyengine.reader import PrefixReader, Reader
from pyengine.results import SamplingParams
from pyengine.scorers import Part, Policy, PrefixScorer, Scorer, ScorerLike, parts_of
from pyengine.strategies import Tokenwise
from pyengine.vocabulary import FieldError, Tilt, tilt_of

LARGEST = 1e30  # of a weight times the temperature; values of 1e8 still fit fp32 beside it


class Tilting(NamedTuple):
    """What one request adds. weights: λ of each scorer; where there is a budget (nats a token; 0: none), their
    proportions. temperature: what the host divides by, 0 where it is greedy."""

    weights: Mapping[Scorer, float]
    budget: float
    temperature: float


def asked_for(fields: Mapping[str, Any]) -> Tilt | None:
    """The `tilt_*` among a request's fields, of a host that draws token by token; None where there are none.

    tilt_weight or tilt_kl_budget alone means tokenwise. FieldError for what `tilt_of` refuses and for what such a host
    cannot do: other strategies, scores of a response, candidates.
    """
    named = {name: value for name, value in fields.items() if isinstance(name, str) and name.startswith("tilt_")}
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        return None
    if "tilt_strategy" not in given and {"tilt_weight", "tilt_kl_budget"} & given.keys():
        given["tilt_strategy"] = "tokenwise"
    tilt = tilt_of(given)
    if tilt.candidates:
        raise FieldError("tilt_candidates", "tilt_candidates: a response that is drawn token by token has none")
    if tilt.strategy is None:
        raise FieldError("tilt_scorer", "tilt_scorer goes with tilt_weight or tilt_kl_budget here")
    if not isinstance(tilt.strategy, Tokenwise):
        raise FieldError(
            "tilt_strategy",
            f"tilt_strategy {given['tilt_strategy']!r}: this host draws token by token; blocks over a host are drawn "
            "by pyengine.integrations.driver.BlockwiseDriver",
        )
    return tilt


def check_request(tilt: Tilt | None, names: Collection[str], sampling: SamplingParams) -> None:
    """What can be said of a request before there are scorers, only their names; the first is the default.

    FieldError for a scorer that is not among them, a weight that leaves no finite logits, and for a budget beside
    filters or at temperature 0.
    """
    if tilt is None:
        return
    strategy = tilt.strategy
    assert isinstance(strategy, Tokenwise)
    for name, weight in (tilt.scorers or {}).items():
        if name not in names:
            raise FieldError("tilt_scorer", f"tilt_scorer: there is no {name!r}; there are {', '.join(names)}")
        _check_weight(strategy.weight * weight, sampling)
    _check_weight(strategy.weight, sampling)
    if strategy.kl_budget:
        try:
            check_budget([sampling])
        except InputError as error:
            raise FieldError("tilt_kl_budget", f"tilt_kl_budget: {error}") from None


def _check_weight(weight: float, sampling: SamplingParams) -> None:
    if abs(weight) * max(1.0, sampling.temperature) > LARGEST:
        raise FieldError("tilt_weight", f"tilt_weight: a weight beyond {LARGEST:g} leaves no finite logits")


class HostScorers:
    """The scorers that a host's requests may follow, checked against its model. The first one is the default.

    policy: the host's model, on whose device the scorers are put. max_rows, cache_gb: of the caches that scorers which
    are models have.

    Raises InputError for a scorer that cannot score every next token, that was trained for another model or
    vocabulary, or that reads another layer than the last: a host shows what its output head reads, nothing before it;
    and for one whose weights are not finite, as a host draws some token from logits that are NaN and says nothing.
    """

    def __init__(
        self,
        scorers: Mapping[str, ScorerLike],
        policy: Policy,
        max_rows: int = 256,
        cache_gb: float | None = None,
    ) -> None:
        if not scorers:
            raise InputError("give at least one scorer to follow")
        self.vocab_size, self.hidden_size = policy.vocab_size, policy.hidden_size
        self.parts: dict[str, list[Part]] = {}
        self._readers: dict[Scorer, Reader] = {}
        panel = Panel(policy, max_rows, None if cache_gb is None else 1e9 * cache_gb, True, False)
        for name, scorer in scorers.items():
            parts = parts_of(scorer)
            panel.check(parts)
            for layer in {layer for part in parts for layer in part.scorer.layers}:
                if layer not in (-1, policy.layers - 1):
                    raise InputError(
                        f"scorer {name!r} reads layer {layer} of {policy.layers}; a host shows the last one only: "
                        "train it there (layer -1), or decode with pyengine.Engine"
                    )
            for part in parts:
                _check_finite(name, part.scorer)
            self._readers |= panel.readers(parts)
            self.parts[name] = parts
            Plan(Tokenwise(), parts, self._readers, SamplingParams())  # refuses what cannot tilt
        self._places = {s: _Places(r) for s, r in self._readers.items() if isinstance(r, PrefixReader)}

    @property
    def reads_tokens(self) -> bool:
        """Whether one of them is a model of its own, which must be told the rows' tokens."""
        return bool(self._places)

    def tilting(self, tilt: Tilt | None, sampling: SamplingParams) -> Tilting | None:
        """What a request adds that asked for `tilt` and is drawn like that; None where it adds nothing.

        FieldError for a scorer that is not there, and for a budget beside filters or at temperature 0.
        """
        check_request(tilt, self.parts, sampling)
        if tilt is None:
            return None
        named = tilt.scorers or {next(iter(self.parts)): 1.0}
        parts = [part._replace(weight=w * part.weight) for name, w in named.items() for part in self.parts[name]]
        assert tilt.strategy is not None
        try:
            plan = Plan(tilt.strategy, parts, self._readers, sampling)
        except InputError as error:
            raise FieldError("tilt_scorer", f"tilt_scorer: {error}") from None
        weights = {scorer: weight for scorer, weight in plan.tilts.items() if weight}
        for weight in weights.values():
            _check_weight(weight, sampling)
        return Tilting(weights, plan.budget or 0.0, sampling.temperature) if weights else None

    @torch.inference_mode()
    def add(
        self,
        logits: Tensor,
        hidden: Tensor,
        rows: Sequence[Tilting | None],
        tokens: Callable[[int], tuple[Hashable, Sequence[int]]] | None = None,
    ) -> int:
        """Add to each row what it asks for, in place, and return how many rows that were; the others keep their bits.

        logits: [N, V], fp32, bf16 or fp16, before the temperature. hidden: [N, D], what the output head read. tokens:
        of a row (whose it is, all its tokens so far); only asked for of rows that follow a scorer which `reads_tokens`.
        """
        tilted = [i for i, row in enumerate(rows) if row is not None]
        if not tilted:
            return 0
        some: list[Any] = [rows[i] for i in tilted]
        everywhere, index = len(tilted) == len(logits), torch.tensor(tilted, device=logits.device)
        own = hidden if everywhere else hidden[index]
        added = self._added_by_one(own, some)
        if added is None:
            added = self._sums(own, some, tilted, tokens, logits.shape[1])
            heat = torch.tensor([[row.temperature] for row in some], device=logits.device)
            asked = [j for j, row in enumerate(some) if row.budget]
            if asked:
                which = torch.tensor(asked, device=logits.device)
                budgets = torch.tensor([some[j].budget for j in asked], device=logits.device)
                solved = ledger.solve_weight(logits[index[which]], added[which], budgets, heat[which, 0])
                added[which] *= solved.float()[:, None]
            added *= torch.where(heat > 0, heat, 1.0)
        if everywhere:
            logits.add_(added)
        else:
            logits.index_copy_(0, index, logits[index].add_(added))
        return len(tilted)

    def _added_by_one(self, hidden: Tensor, rows: Sequence[Tilting]) -> Tensor | None:
        """T λ V, fp32 [N, V], where all rows follow one prefix scorer without a budget: one product with its head, the
        quickest there is, and nothing that passes over the vocabulary but the bias. None where they do not."""
        scorer = next(iter(rows[0].weights))
        if type(scorer) is not PrefixScorer or any(row.budget or row.weights.keys() != {scorer} for row in rows):
            return None
        factors = [row.weights[scorer] * (row.temperature or 1.0) for row in rows]
        factor = torch.tensor(factors, device=hidden.device)
        inner = scorer.features(hidden) * factor[:, None]
        return product(inner, scorer.head.weight).float().addr_(factor, scorer.head.bias)

    def _sums(
        self,
        hidden: Tensor,
        rows: Sequence[Tilting],
        batch: Sequence[int],
        tokens: Callable[[int], tuple[Hashable, Sequence[int]]] | None,
        vocab: int,
    ) -> Tensor:
        """Σ λ V of each row, fp32 [N, vocab]. tokens: of a row by its place in the host's batch."""
        total: Tensor | None = None
        for scorer in dict.fromkeys(scorer for row in rows for scorer in row.weights):
            places = [j for j, row in enumerate(rows) if scorer in row.weights]
            index = torch.tensor(places, device=hidden.device)
            if scorer in self._places:
                assert tokens is not None
                states = self._places[scorer].states([tokens(batch[j]) for j in places])
            else:
                states = {layer: hidden if len(places) == len(rows) else hidden[index] for layer in scorer.layers}
            weights = torch.tensor([[rows[j].weights[scorer]] for j in places], device=hidden.device)
            values = token_values(scorer, states, vocab).mul_(weights)
            if total is None and len(places) == len(rows):
                total = values
                continue
            if total is None:
                total = values.new_zeros(len(rows), vocab)
            total.index_add_(0, index, values)
        assert total is not None
        return total

    @torch.no_grad()
    def values(self, name: str, hidden: Tensor, vocab: int) -> Tensor:
        """Σ weight V of one of the scorers for rows that all follow it, fp32 [N, vocab]; on the device alone."""
        parts = self.parts[name]
        terms = [p.weight * token_values(p.scorer, {layer: hidden for layer in p.scorer.layers}, vocab) for p in parts]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def forget(self, whose: Hashable) -> None:
        """A request has ended: what was read of it is given back."""
        for places in self._places.values():
            places.forget(whose)


def _check_finite(name: str, scorer: Scorer) -> None:
    for module in (scorer, getattr(scorer, "model", None), getattr(scorer, "head", None)):
        if isinstance(module, torch.nn.Module) and not all(bool(p.isfinite().all()) for p in module.parameters()):
            raise InputError(f"scorer {name!r}: some of its weights are NaN or infinite")


class _Places:
    """How far a prefix model has read each request, in its own branching cache; those that were asked for longest ago
    give way where there is no room, and are read anew."""

    def __init__(self, reader: PrefixReader) -> None:
        self.reader = reader
        self.stems: OrderedDict[Hashable, Stem] = OrderedDict()
        reader.begin()

    def states(self, rows: Sequence[tuple[Hashable, Sequence[int]]]) -> dict[int, Tensor]:
        """{the layer of the head: [N, D]} at the last token of each row: one pass over what is new in all of them."""
        self._join(rows)
        self._make_room(rows)
        going = [(self.stems[whose], list(ids)) for whose, ids in rows if whose in self.stems]
        behind = [(stem, ids[_length(stem) :]) for stem, ids in going if len(ids) > _length(stem)]
        while behind:
            most = max(1, self.reader.most_rows(max(len(tail) for _, tail in behind)))
            now, behind = behind[:most], behind[most:]
            self.reader.score([stem for stem, _ in now], [[tail] for _, tail in now])
            self.reader.keep([(stem, 0) for stem, _ in now])
        found = []
        for whose, ids in rows:
            stem = self.stems.get(whose)
            layer = self.reader.head.layer
            if stem is None:  # a sequence that the cache cannot hold beside the others
                found.append(self.reader.scorer.states(list(ids))[-1:])
            else:
                assert stem.at is not None
                found.append(stem.at.hidden[layer])
        return {self.reader.head.layer: torch.cat(found)}

    def _join(self, rows: Sequence[tuple[Hashable, Sequence[int]]]) -> None:
        wanted = {whose for whose, _ in rows}
        fresh: list[Stem] = []
        for whose, ids in rows:
            if not ids:
                raise InputError(f"scorer {self.reader.name!r} reads tokens, and a request has none")
            stem = self.stems.get(whose)
            if stem is not None and _length(stem) > len(ids):  # the host has taken tokens back
                self.forget(whose)
                stem = None
            if stem is not None:
                self.stems.move_to_end(whose)
                continue
            stem = self.reader.join(list(ids), 1)
            while stem is None and self._forget_idle(wanted):
                stem = self.reader.join(list(ids), 1)
            if stem is not None:
                self.stems[whose] = stem
                fresh.append(stem)
        while fresh:
            for stem, at in self.reader.prefill(fresh, PREFILL_TOKENS):
                stem.at = at
                fresh.remove(stem)

    def _make_room(self, rows: Sequence[tuple[Hashable, Sequence[int]]]) -> None:
        """The pages that the new tokens need are there afterwards; the rows that asked last give theirs back first."""
        wanted = {whose for whose, _ in rows}
        there = [(whose, len(ids)) for whose, ids in rows if whose in self.stems]
        while there:
            grown = [(self.stems[whose], 0, length - _length(self.stems[whose])) for whose, length in there]
            if self.reader.pages_short(grown) <= 0:
                return
            if not self._forget_idle(wanted):
                self.forget(there.pop()[0])

    def _forget_idle(self, wanted: Collection[Hashable]) -> bool:
        """Give back the place of one that nobody asks for now; False where there is none."""
        idle = next((whose for whose in self.stems if whose not in wanted), None)
        if idle is None:
            return False
        self.forget(idle)
        return True

    def forget(self, whose: Hashable) -> None:
        stem = self.stems.pop(whose, None)
        if stem is not None:
            self.reader.leave(stem)


def _length(stem: Stem) -> int:
    assert stem.sequence is not None
    return stem.sequence.length
