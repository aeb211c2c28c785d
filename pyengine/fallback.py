"""Decoders for models that the branching cache cannot serve, and the choice between them all.

`ReplicatedDecoder` copies the prefix for each branch through transformers' own cache; `RecomputeDecoder` keeps none
and re-reads each row.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyengine.checkpoint import context_of
from pyengine.decoder import BranchingDecoder, Decoder, Frontier, Rows, Stem
from pyengine.errors import InputError, first_line
from pyengine.group import Group
from pyengine.invariance import why_not
from pyengine.modes import evaluating, states_of
from pyengine.scorers.base import Hidden
from pyengine.timing import timed

log = logging.getLogger("pyengine")

# Architectures whose branching the test suite holds against a full recompute, sliding windows crossed.
TESTED = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "phi3", "olmo2", "gpt_oss"})

SHORT_TRIAL, LONGEST_TRIAL, TRIAL_GROWTH = (
    9,
    256,
    8,
)  # tokens: of a prompt with no window to pass, of any, that it grows by
# Windows that transformers' caches know, and the hook is told of at each call, which `layer_shapes` checks; and what
# only sounds like a window.
TOLD = frozenset({"sliding_window", "attention_chunk_size", "max_window_layers"})


def _layers_of(model: Any, output: Any, layers: tuple[int, ...]) -> Hidden:
    return {layer: states_of(model, output, layer)[:, -1] for layer in layers}


class _Unpaged:
    """What both share: no memory to run out of, and nothing that outlives a call."""

    waits = idles = light = False

    def __init__(self, model: Any, layers: tuple[int, ...], max_rows: int = 256) -> None:
        self.model, self.layers, self.max_rows = model, layers, max_rows
        self.device: torch.device = model.device
        self.captured: dict[Hashable, Any] = {}  # nothing ever is

    def begin(self) -> None:
        pass

    def end(self, whole: bool = True) -> None:
        pass

    def forget(self) -> None:
        pass

    def refuses(self, tokens: int, growth: int, k: int, room: int) -> str | None:
        return None

    def join(self, ids: list[int], leaves: int) -> Stem | None:
        return Stem(ids)

    def pages_short(self, winners: list[tuple[Stem, int, int]]) -> int:
        return 0

    def plant(self, rows: Rows) -> Rows:
        return list(rows)


class RecomputeDecoder(_Unpaged):
    """No cache: every step reads each row from its first token. Slow, and right for any model. A stem's state is its
    branches, whole."""

    def prefill(self, stems: list[Stem], most: int) -> list[tuple[Stem, Frontier]]:
        frontier = self._forward([stem.ids for stem in stems])
        return [(stem, frontier.rows(torch.tensor([i]))) for i, stem in enumerate(stems)]

    def fork(self, stem: Stem, k: int, room: int) -> None:
        stem.state = [list(stem.ids) for _ in range(k)]

    def step(self, planted: Rows, tokens: Tensor, alive: Tensor) -> Frontier:
        for (stem, branch), token, on in zip(planted, tokens.tolist(), alive.tolist(), strict=True):
            if on:
                stem.state[branch].append(token)
        return self._forward([stem.state[branch] for stem, branch in planted])

    def commit(self, winners: list[tuple[Stem, int, int]]) -> None:
        for stem, branch, length in winners:
            stem.ids = stem.state[branch][: len(stem.ids) + length]

    def leave(self, stem: Stem) -> None:
        stem.state = None

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> Frontier:
        parts: dict[int, Frontier] = {}
        for length in {len(row) for row in rows}:  # one batch a length: nothing is padded
            index = [i for i, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[i] for i in index], device=self.model.device)
            with timed("model"), evaluating(self.model):
                output = self.model(input_ids=ids, use_cache=False, output_hidden_states=bool(self.layers))
            logits, hidden = output.logits[:, -1], _layers_of(self.model, output, self.layers)
            for j, i in enumerate(index):
                parts[i] = Frontier(logits[j : j + 1], {layer: h[j : j + 1] for layer, h in hidden.items()})
        return Frontier.of([parts[i] for i in range(len(rows))])


@dataclass(eq=False)
class _Cohort:
    """Prompts that were read together, in one cache of transformers' with a row for each branch, left-padded."""

    rows: Rows  # of the store; branch -1 is a prefix
    store: Any = None
    mask: Tensor = field(default_factory=lambda: torch.empty(0))


class ReplicatedDecoder(_Unpaged):
    """K copies of the prefix in transformers' cache. Prompts that join together keep one of their own, whose rows are
    moved when a step has other rows than the one before; a stem's state is (its cohort, the row of its prefix)."""

    def __init__(self, model: Any, layers: tuple[int, ...], max_rows: int = 256) -> None:
        super().__init__(model, layers, max_rows)
        accepted = inspect.signature(model.forward).parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._cache = "cache" if "cache" in accepted else "past_key_values"  # its name since transformers 5.24, before

    @torch.inference_mode()
    def prefill(self, stems: list[Stem], most: int) -> list[tuple[Stem, Frontier]]:
        longest, device = max(len(stem.ids) for stem in stems), self.model.device
        ids = torch.tensor([[0] * (longest - len(s.ids)) + s.ids for s in stems], device=device)
        cohort = _Cohort([(stem, -1) for stem in stems])
        cohort.mask = torch.tensor([[0] * (longest - len(s.ids)) + [1] * len(s.ids) for s in stems], device=device)
        frontier = self._forward(cohort, ids, (cohort.mask.cumsum(-1) - 1).clamp(min=0))
        for row, stem in enumerate(stems):
            stem.state = (cohort, row)
        return [(stem, frontier.rows(torch.tensor([i], device=device))) for i, stem in enumerate(stems)]

    def fork(self, stem: Stem, k: int, room: int) -> None:
        pass  # rows are moved when they are planted

    def plant(self, rows: Rows) -> Rows:
        cohorts: dict[_Cohort, Rows] = {}
        for stem, branch in rows:
            cohorts.setdefault(stem.state[0], []).append((stem, branch))
        for cohort, wanted in cohorts.items():
            if wanted == cohort.rows:
                continue
            at = {row: i for i, row in enumerate(cohort.rows)}
            # A branch that is new continues its prefix.
            index = [at[row] if row in at else row[0].state[1] for row in wanted]
            if index != list(range(len(cohort.rows))):
                picked = torch.tensor(index, device=self.model.device)
                cohort.store.batch_select_indices(picked)
                cohort.mask = cohort.mask[picked]
            cohort.rows = wanted
        return list(rows)

    @torch.inference_mode()
    def step(self, planted: Rows, tokens: Tensor, alive: Tensor) -> Frontier:
        found: list[Frontier] = []
        order: list[int] = []
        for cohort in dict.fromkeys(stem.state[0] for stem, _ in planted):
            at = [i for i, (stem, _) in enumerate(planted) if stem.state[0] is cohort]
            cohort.mask = torch.cat([cohort.mask, cohort.mask.new_ones(len(at), 1)], -1)
            found.append(self._forward(cohort, tokens[at][:, None], cohort.mask.sum(-1, keepdim=True) - 1))
            order += at
        if order == list(range(len(order))):
            return Frontier.of(found)
        back = torch.tensor(order, device=tokens.device).argsort()
        return Frontier.of(found).rows(back)

    def commit(self, winners: list[tuple[Stem, int, int]]) -> None:
        """The winner's row is the prefix from now on; the other rows go when rows are planted next."""
        for stem, branch, _ in winners:
            cohort, _ = stem.state
            row = cohort.rows.index((stem, branch))
            stem.state = (cohort, row)
            cohort.rows = [(s, -1 if i == row else -2) if s is stem else (s, b) for i, (s, b) in enumerate(cohort.rows)]

    def leave(self, stem: Stem) -> None:
        stem.state = None

    def _forward(self, cohort: _Cohort, ids: Tensor, positions: Tensor) -> Frontier:
        with timed("model"), evaluating(self.model):
            output = self.model(
                input_ids=ids,
                attention_mask=cohort.mask,
                use_cache=True,
                output_hidden_states=bool(self.layers),
                **{self._cache: cohort.store},
                **({"position_ids": positions} if self._positions else {}),
                **self._keep_last,
            )
        cohort.store = output["cache" if "cache" in list(output) else "past_key_values"]
        return Frontier(output.logits[:, -1], _layers_of(self.model, output, self.layers))


def choose_decoder(
    model: Any,
    layers: tuple[int, ...],
    max_rows: int,
    budget: float | None = None,
    frozen: bool = False,
    steady: bool = False,
) -> Decoder:
    """The fastest decoder that is right for this model: unknown architectures are tried against a recompute.

    steady: a row's bits depend on its own tokens alone. Raises InputError where no decoder can promise that, for a
    model that is no decoder, and for a cache that there is no memory for.
    """
    if steady and model.device.type != "cpu":
        raise InputError(f"batch_invariant: not yet on {model.device.type}, whose products sum as the batch has it")
    config = model.config.get_text_config(decoder=True)
    known = config.model_type in TESTED
    if not known and _looks_ahead(model):
        raise InputError(
            f"{config.model_type}: a token's logits change with the tokens after it: this model reads in both "
            "directions and is no decoder; take a causal language model"
        )
    recompute = RecomputeDecoder(model, layers, max_rows)
    reason = _uncachable(config)
    if reason:
        _refuse(steady, config, reason)
        log.warning(
            "%s: %s, so no cache can be kept; every step re-reads the whole sequence, which is right but slow",
            config.model_type,
            reason,
        )
        return recompute
    try:
        reason = _refused(config)
        if reason is None:
            branching = BranchingDecoder(model, layers, max_rows, budget, frozen, steady)
            if not known:
                with branching.on_trial(_trial_tokens(config) + TRIAL_GROWTH):
                    reason = _mismatch(branching, recompute)
            if reason is None:
                _refuse(steady, config, why_not(branching) if steady else None)
                return branching
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign model raises, a slower decoder serves it
        reason = first_line(error)
    _refuse(steady, config, reason)
    return _unpaged(model, recompute, reason)


def _unpaged(model: Any, recompute: RecomputeDecoder, reason: str | None) -> Decoder:
    """The copying decoder where it is right, else the one that re-reads; reason: why the branching one is neither."""
    config = model.config.get_text_config(decoder=True)
    replicated = ReplicatedDecoder(model, recompute.layers, recompute.max_rows)
    log.warning("%s: prefixes are copied for each branch instead of shared (%s)", config.model_type, reason)
    try:
        reason = _mismatch(replicated, recompute)
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason is None:
        return replicated
    log.warning(
        "%s: its cache cannot be branched (%s); every step re-reads the whole sequence, which is right but slow",
        config.model_type,
        reason,
    )
    return recompute


def _refuse(steady: bool, config: Any, reason: str | None) -> None:
    """InputError where a decoder that was to be steady cannot be, for this reason."""
    if steady and reason is not None:
        raise InputError(f"batch_invariant: not with {config.model_type}: {reason}")


def _uncachable(config: Any) -> str | None:
    """Why no cache serves an architecture though a short test would pass."""
    if "longrope" in _rope_types(config):
        return "longrope turns the frequencies of a whole batch with its longest row"
    for name, reach in _reaches(config).items():
        if reach > LONGEST_TRIAL and name not in TOLD:
            return f"its {name} of {reach} tokens reaches further than a trial of a cache"
    return None


def _refused(config: Any) -> str | None:
    """Why the hook cannot serve an architecture though a short test would pass."""
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked, and transformers does not tell the hook where chunks begin"
    return None


def _reaches(config: Any) -> dict[str, int]:
    """Fields of a config that say how far a layer looks back, or how much it keeps, in tokens."""
    words = ("window", "chunk", "kernel")
    return {
        name: value
        for name, value in config.to_dict().items()
        if type(value) is int and any(word in name for word in words)
    }


def _trial_tokens(config: Any) -> int:
    """The longest prompt of a trial: beyond every window that a trial can reach, short of the context."""
    longest = max((reach for reach in _reaches(config).values() if reach <= LONGEST_TRIAL), default=0)
    return min(longest + SHORT_TRIAL, (context_of(config) or sys.maxsize) - TRIAL_GROWTH)


@torch.inference_mode()
def _looks_ahead(model: Any) -> bool:
    """Whether the logits after four tokens change with the four that follow."""
    vocab, device = model.get_input_embeddings().weight.shape[0], model.device
    ids = torch.tensor([[(7 * i + 3) % vocab for i in range(8)]], device=device)
    with evaluating(model):
        whole, half = (model(input_ids=x, use_cache=False).logits[0, :4] for x in (ids, ids[:, :4]))
    tolerance = 1e-4 if whole.dtype == torch.float32 else 5e-2  # of a pass of another length
    return not bool((whole.float() - half.float()).norm() <= tolerance * half.float().norm())


def _rope_types(config: Any) -> set[str]:
    """The rope_type of every layer type that the config names."""
    found = getattr(config, "rope_parameters", None) or {}
    groups = [found, *(v for v in found.values() if isinstance(v, dict))]
    return {g["rope_type"] for g in groups if "rope_type" in g}


@torch.inference_mode()
def _mismatch(decoder: Decoder, recompute: Decoder) -> str | None:
    """Why this decoder goes wrong, or None: two ragged prompts, a fork, a commit, a second block."""
    model = recompute.model  # type: ignore[attr-defined]
    vocab = model.get_input_embeddings().weight.shape[0]
    longest = _trial_tokens(model.config.get_text_config(decoder=True))
    lengths = ((7, 3, longest), (5, 1, 4))
    prompts = [[(a * i + b) % vocab for i in range(n)] for a, b, n in lengths]
    device = model.device
    steps = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]], device=device) % vocab
    seen: list[list[Tensor]] = []
    for each in (decoder, recompute):
        group = Group(each, 2, 2)
        try:
            group.join(prompts)
            logits = [group.fork().logits, group.append(steps[0]).logits]
            group.commit(torch.tensor([0, 3], device=device))
            logits += [group.fork().logits, group.append(steps[1]).logits]
        finally:
            group.close(whole=False)
        seen.append(logits)
    tolerance = 1e-3 if seen[0][0].dtype == torch.float32 else 5e-2
    for a, b in zip(*seen, strict=True):
        gap = (a.float() - b.float()).abs().max().item()
        if not gap <= tolerance * max(b.float().abs().max().item(), 1.0):
            return f"logits differ by {gap:.2g} from a recompute"
    return None
