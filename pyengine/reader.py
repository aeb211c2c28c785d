"""Scorers that are models read each prompt once: they have a branching cache of their own beside the base model's."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyengine.cache import LEAF
from pyengine.checkpoint import same_tokenizer
from pyengine.decoder import PREFILL_TOKENS, BranchingDecoder, Frontier, Stem
from pyengine.errors import InputError, first_line
from pyengine.invariance import why_not
from pyengine.modes import states_of
from pyengine.ops.linear import steady as held_steady
from pyengine.scorers import PrefixModel, RewardModel, Scorer

log = logging.getLogger("pyengine")


class Reader(BranchingDecoder):
    """The decoder of a scorer's model. A block costs one pass over its new tokens, where reading the text anew costs
    K times the whole prefix."""

    def __init__(
        self,
        scorer: RewardModel | PrefixModel,
        layers: tuple[int, ...],
        max_rows: int,
        budget: float | None,
        frozen: bool,
        steady: bool = False,
    ) -> None:
        super().__init__(scorer.model, layers, max_rows, budget, frozen, steady)
        self.name, self.label = scorer.name, f"model {scorer.name}"
        self.scorer: RewardModel | PrefixModel = scorer

    @property
    def longest(self) -> float:
        """Tokens that it reads."""
        return self.scorer.longest

    def refuses(self, tokens: int, growth: int, k: int, room: int) -> str | None:
        return self.too_long(tokens + 1) or super().refuses(tokens, growth, 1, 1)

    def too_long(self, tokens: int) -> str | None:
        """Why a candidate of so many tokens, its prompt among them, cannot be read; None where it can."""
        if tokens <= self.longest:
            return None
        return (
            f"scorer {self.name!r} reads {self.longest} tokens, a candidate has {tokens}; shorten max_tokens or "
            "take another scorer"
        )

    def misfit(self, stem: Stem, tails: list[list[int]]) -> str | None:
        """Why one of these branches cannot be read, or None."""
        assert stem.sequence is not None
        return next(filter(None, (self.too_long(stem.sequence.length + len(tail)) for tail in tails)), None)

    def given(self, tails: list[list[int]], eos: Collection[int]) -> list[list[int]]:
        """What the model reads of the tails."""
        return tails

    def most_rows(self, tokens: int) -> int:
        """How many branches of so many tokens can be scored together."""
        return self.cache.leaves // max(1, self.cache.leaves_for(self._columns(tokens)))

    def score(self, stems: list[Stem], tails: list[list[list[int]]]) -> Tensor:
        """fp32 [N] of the branches of these stems at their last tokens, by one pass over all of them.

        They are there until `keep` or `leave`. A stem's `at` is the frontier of its prefix.
        """
        raise NotImplementedError

    def keep(self, winners: list[tuple[Stem, int]]) -> None:
        """One branch of each of these joins its prefix."""
        ends = [stem.state.rows(torch.tensor([branch], device=self.model.device)) for stem, branch in winners]
        self.commit([(stem, branch, stem.lengths[branch]) for stem, branch in winners])
        for (stem, _), end in zip(winners, ends, strict=True):
            stem.at, stem.state = end, None

    def recompute(self, ids: list[int]) -> float:
        """The score of a sequence by the model's own forward pass, to try `score` against."""
        raise NotImplementedError

    def _columns(self, longest: int) -> int:
        """Where a row is not to depend on the others a pass has the same columns whatever their length."""
        return self.cache.leaves_for(longest) * LEAF if self.steady else longest

    def _extend_by(self, stems: list[Stem], tails: list[list[list[int]]]) -> Iterator[tuple[Tensor, Tensor, Frontier]]:
        """The tails in passes of so many columns: (index in it of each row's last token, whether that is in this pass,
        the frontier there). Short tails are padded; nobody looks at what follows their end."""
        flat = [tail for own in tails for tail in own]
        columns = self._columns(max(map(len, flat)))
        device = self.model.device
        for stem, own in zip(stems, tails, strict=True):
            self.fork(stem, len(own), max(1, columns))
        if columns:
            planted = self.plant([(stem, b) for stem, own in zip(stems, tails, strict=True) for b in range(len(own))])
            padded = torch.tensor([tail + [0] * (columns - len(tail)) for tail in flat], device=device)
            last = torch.tensor([len(tail) - 1 for tail in flat], device=device)
            some = LEAF if self.steady else max(1, PREFILL_TOKENS // len(flat))
            for start in range(0, columns, some):
                tokens = padded[:, start : start + some]
                at = last - start
                here = (at >= 0) & (at < tokens.shape[1])
                at = at.clamp(0, tokens.shape[1] - 1)
                yield at, here, self.extend(planted, tokens, at)
        for stem, own in zip(stems, tails, strict=True):
            stem.lengths = [len(tail) for tail in own]

    def _starts(self, stems: list[Stem], tails: list[list[list[int]]]) -> Frontier:
        """The frontier of its prefix for each branch."""
        repeats = torch.tensor([len(own) for own in tails], device=self.model.device)
        index = torch.arange(len(stems), device=self.model.device).repeat_interleave(repeats)
        return Frontier.of([stem.at for stem in stems if stem.at is not None]).rows(index)

    def _note(self, stems: list[Stem], tails: list[list[list[int]]], ends: Frontier) -> None:
        """Each stem keeps the frontiers of its branches."""
        first = 0
        for stem, own in zip(stems, tails, strict=True):
            stem.state = ends.rows(torch.arange(first, first + len(own), device=self.model.device))
            first += len(own)


class RewardReader(Reader):
    """A causal sequence classifier; its "logits" are those of its head [N, labels] at each prefix."""

    scorer: RewardModel

    def __init__(
        self, scorer: RewardModel, max_rows: int, budget: float | None, frozen: bool, steady: bool = False
    ) -> None:
        super().__init__(scorer, (), max_rows, budget, frozen, steady)
        self._embedded = scorer.model.get_input_embeddings().weight.shape[0]

    def _read(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Frontier:
        ids = ids.clamp(max=self._embedded - 1)  # as PrefixReader's
        hidden = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        return Frontier(self.model.score(hidden if rows is None else hidden[rows]), {})

    def given(self, tails: list[list[int]], eos: Collection[int]) -> list[list[int]]:
        return [[token for token in tail if token not in eos] for tail in tails]  # as text, it is not there

    @torch.inference_mode()
    def score(self, stems: list[Stem], tails: list[list[list[int]]]) -> Tensor:
        scores = self._starts(stems, tails).logits  # of tails that add nothing
        for _, here, frontier in self._extend_by(stems, tails):
            scores = torch.where(here[:, None], frontier.logits, scores)
        self._note(stems, tails, Frontier(scores, {}))
        return self.scorer.value(scores)

    def recompute(self, ids: list[int]) -> float:
        return self.scorer._batch([(ids, [])]).item()


class PrefixReader(Reader):
    """A prefix model: its frontier carries the hidden states that the head reads, and no logits."""

    scorer: PrefixModel

    def __init__(
        self, scorer: PrefixModel, max_rows: int, budget: float | None, frozen: bool, steady: bool = False
    ) -> None:
        super().__init__(scorer, (scorer.head.layer,), max_rows, budget, frozen, steady)
        self.head, self._states = scorer.head, torch.empty(0)

    def _read(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Frontier:
        # A base policy may draw a row that pads its vocabulary, which this model does not embed.
        ids = ids.clamp(max=self.model.get_input_embeddings().weight.shape[0] - 1)
        output = self.model(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
        self._states = states_of(self.model, output, self.head.layer)[0]
        states = self._states if rows is None else self._states[rows]
        return Frontier(states[:, :0], {self.head.layer: states})

    @torch.inference_mode()
    def score(self, stems: list[Stem], tails: list[list[list[int]]]) -> Tensor:
        """V(y^t) = Q[t-1, y_t], from the state before the last token of each branch; no tail is empty."""
        layer, flat = self.head.layer, [tail for own in tails for tail in own]
        before = self._starts(stems, tails).hidden[layer]
        found, ends = before.clone(), before
        row = torch.arange(len(flat), device=before.device)
        for at, here, _ in self._extend_by(stems, tails):
            states = self._states.unflatten(0, (len(flat), -1))
            found = torch.where(here[:, None], torch.cat([before[:, None], states], 1)[row, at], found)
            ends = torch.where(here[:, None], states[row, at], ends)
            before = states[:, -1]
        self._note(stems, tails, Frontier(ends[:, :0], {layer: ends}))
        token = torch.tensor([tail[-1] for tail in flat], device=before.device).clamp(max=self.head.vocab_size - 1)
        with held_steady(self.head) if self.steady else nullcontext():
            return self.head.values_at(found, token).float()

    def recompute(self, ids: list[int]) -> float:
        token = torch.tensor(ids[-1:], device=self.model.device)
        return self.head.values_at(self.scorer.states(ids[:-1])[-1:], token).item()


def reader_of(
    scorer: Scorer,
    tokenizer: Any,
    max_rows: int,
    budget: float | None,
    frozen: bool = False,
    steady: bool = False,
) -> Reader | None:
    """A reader for a scorer whose causal model shares the base model's tokenizer; None where text must be read.

    What it gives is tried against the model's own forward pass first.
    """
    try:
        reader: Reader
        if isinstance(scorer, PrefixModel):
            reader = PrefixReader(scorer, max_rows, budget, frozen, steady)
        elif isinstance(scorer, RewardModel) and scorer.reads_tokens and same_tokenizer(scorer.tokenizer, tokenizer):
            reader = RewardReader(scorer, max_rows, budget, frozen, steady)
        else:
            return None
        with reader.on_trial(20):
            reason = _mismatch(reader)
        if steady and reason is None:
            reason = why_not(reader)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign model raises, its text can still be read
        reason = first_line(error)
    if reason is None:
        return reader
    log.warning("%s: reads every candidate from its start (%s)", scorer.name, reason)
    return None


@torch.inference_mode()
def _mismatch(reader: Reader) -> str | None:
    """Why this reader goes wrong, or None: a fork, ragged tails, a commit and a second block."""
    model = reader.model
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % vocab for i in range(20)]
    tails = [[ids[11], ids[12]], [ids[13]], [ids[16]], [ids[14], ids[15]]]
    try:
        reader.begin()
        stems = []
        for prompt in (ids[:9], ids[3:7]):
            stem = reader.join(prompt, 2)
            assert stem is not None
            ((_, stem.at),) = reader.prefill([stem], len(prompt))
            stems.append(stem)
        found = reader.score(stems, [tails[:2], tails[2:]]).tolist()
        reader.keep([(stems[0], 0), (stems[1], 1)])
        found += reader.score(stems, [[[ids[1]]]] * 2).tolist()
    finally:
        reader.end(whole=False)
    whole = [(ids[:9] if i < 2 else ids[3:7]) + tail for i, tail in enumerate(tails)]
    whole += [[*whole[0], ids[1]], [*whole[3], ids[1]]]
    wanted = [reader.recompute(text) for text in whole]
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * max(1.0, *map(abs, wanted))
    gap = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    return None if gap <= tolerance else f"its scores differ by {gap:.2g} from a recompute"
