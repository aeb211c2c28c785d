"""Decoders for models that the branching cache cannot serve, and the choice between them all.

`ReplicatedDecoder` copies the prefix for each branch through transformers' own cache; `RecomputeDecoder` keeps none
and re-reads each row. Both take a group of prompts at a time: nobody joins before the last has left.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from pyengine.checkpoint import context_of
from pyengine.decoder import BranchingDecoder, Decoder, Frontier, Prompt
from pyengine.errors import InputError, first_line
from pyengine.invariance import why_not
from pyengine.modes import evaluating
from pyengine.scorers.base import Hidden

log = logging.getLogger("pyengine")

# Architectures whose branching the test suite holds against a full recompute, sliding windows crossed.
TESTED = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "phi3", "olmo2", "gpt_oss"})

SHORT_TRIAL, LONGEST_TRIAL, TRIAL_GROWTH = (
    9,
    256,
    8,
)  # tokens: of a prompt with no window to pass, of any, that it grows by
# Windows that transformers' caches know, and the hook is told of at each call, which `_layer_shapes` checks; and what
# only sounds like a window.
TOLD = frozenset({"sliding_window", "attention_chunk_size", "max_window_layers"})


def _layers_of(output: Any, layers: tuple[int, ...]) -> Hidden:
    return {layer: output.hidden_states[layer][:, -1] for layer in layers}


class _Grouped:
    """What both share: a group of prompts joins when nobody is there."""

    waits = False

    def __init__(self, model: Any, layers: tuple[int, ...], max_rows: int) -> None:
        self.model, self.layers, self.max_rows = model, layers, max_rows
        self._k = 1
        self.captured: dict[Hashable, Any] = {}  # nothing ever is
        self._frontier = Frontier(torch.empty(0), {})

    def open(self, k: int, room: int) -> None:
        self._k = k

    def close(self, whole: bool = True) -> None:
        self._frontier = Frontier(torch.empty(0), {})

    def forget(self) -> None:
        pass  # nothing outlives a call

    def refuses(self, tokens: int, growth: int) -> str | None:
        return None

    def fits(self, waiting: list[Prompt]) -> int:
        return 0 if len(self._frontier.logits) else min(len(waiting), max(1, self.max_rows // self._k))

    def join(self, prompts: list[Prompt]) -> None:
        self.prefill([prompt.ids for prompt in prompts])

    def prefill(self, prompts: list[list[int]]) -> Frontier:
        raise NotImplementedError

    def keep(self, rows: Tensor) -> Frontier:
        raise NotImplementedError

    def commit(self, rows: Tensor) -> None:
        if len(rows):
            self.keep(rows)
        else:
            self.close()


class ReplicatedDecoder(_Grouped):
    """K copies of the prefix in transformers' cache. Rows are left-padded, so that all end together."""

    def __init__(self, model: Any, layers: tuple[int, ...], max_rows: int = 256) -> None:
        super().__init__(model, layers, max_rows)
        accepted = inspect.signature(model.forward).parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._mask = torch.empty(0)
        self._store: Any = None

    def close(self, whole: bool = True) -> None:
        super().close()
        self._store = None

    def prefill(self, prompts: list[list[int]]) -> Frontier:
        longest = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        self._mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self._store = None
        return self._forward(ids, (self._mask.cumsum(-1) - 1).clamp(min=0))

    def fork(self) -> Frontier:
        if self._k > 1:
            self._store.batch_repeat_interleave(self._k)
            self._mask = self._mask.repeat_interleave(self._k, 0)
            index = torch.arange(len(self._frontier.logits), device=self._mask.device).repeat_interleave(self._k)
            self._frontier = self._frontier.rows(index)
        return self._frontier

    def append(self, tokens: Tensor) -> Frontier:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], -1)
        return self._forward(tokens[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> Frontier:
        if len(rows) != len(self._mask) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self._store.batch_select_indices(rows)
            self._mask = self._mask[rows]
            self._frontier = self._frontier.rows(rows)
        return self._frontier

    def _forward(self, ids: Tensor, positions: Tensor) -> Frontier:
        with evaluating(self.model):
            output = self.model(
                input_ids=ids,
                attention_mask=self._mask,
                past_key_values=self._store,
                use_cache=True,
                output_hidden_states=bool(self.layers),
                **({"position_ids": positions} if self._positions else {}),
                **self._keep_last,
            )
        self._store = output.past_key_values
        self._frontier = Frontier(output.logits[:, -1], _layers_of(output, self.layers))
        return self._frontier


class RecomputeDecoder(_Grouped):
    """No cache: every step reads each row from its first token. Slow, and right for any model."""

    def __init__(self, model: Any, layers: tuple[int, ...], max_rows: int = 256) -> None:
        super().__init__(model, layers, max_rows)
        self._rows: list[list[int]] = []

    def prefill(self, prompts: list[list[int]]) -> Frontier:
        self._rows = [list(p) for p in prompts]
        return self._forward()

    def fork(self) -> Frontier:
        return self.keep(torch.arange(len(self._rows), device=self.model.device).repeat_interleave(self._k))

    def append(self, tokens: Tensor) -> Frontier:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._forward()

    def keep(self, rows: Tensor) -> Frontier:
        self._rows = [list(self._rows[i]) for i in rows.tolist()]
        self._frontier = self._frontier.rows(rows)
        return self._frontier

    def _forward(self) -> Frontier:
        parts: dict[int, Frontier] = {}
        for length in {len(row) for row in self._rows}:  # one batch a length: nothing is padded
            index = [i for i, row in enumerate(self._rows) if len(row) == length]
            ids = torch.tensor([self._rows[i] for i in index], device=self.model.device)
            with evaluating(self.model):
                output = self.model(input_ids=ids, use_cache=False, output_hidden_states=bool(self.layers))
            logits, hidden = output.logits[:, -1], _layers_of(output, self.layers)
            for j, i in enumerate(index):
                parts[i] = Frontier(logits[j], {layer: h[j] for layer, h in hidden.items()})
        rows = [parts[i] for i in range(len(self._rows))]
        hidden = {layer: torch.stack([r.hidden[layer] for r in rows]) for layer in self.layers}
        self._frontier = Frontier(torch.stack([r.logits for r in rows]), hidden)
        return self._frontier


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
    replicated = ReplicatedDecoder(model, layers, max_rows)
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
    prompts = [Prompt([(a * i + b) % vocab for i in range(n)], TRIAL_GROWTH) for a, b, n in lengths]
    device = model.device
    steps = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]], device=device) % vocab
    seen: list[list[Tensor]] = []
    for each in (decoder, recompute):
        each.open(2, 2)
        try:
            each.join(prompts)
            logits = [each.fork().logits, each.append(steps[0]).logits]
            each.commit(torch.tensor([3, 0], device=device))
            logits += [each.fork().logits, each.append(steps[1]).logits]
        finally:
            each.close()
        seen.append(logits)
    tolerance = 1e-3 if seen[0][0].dtype == torch.float32 else 5e-2
    for a, b in zip(*seen, strict=True):
        gap = (a.float() - b.float()).abs().max().item()
        if not gap <= tolerance * max(b.float().abs().max().item(), 1.0):
            return f"logits differ by {gap:.2g} from a recompute"
    return None
