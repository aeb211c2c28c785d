"""Decoders for models that the branching cache cannot serve, and the choice between them all.

`ReplicatedDecoder` copies the prefix for each branch through transformers' own cache; `RecomputeDecoder` keeps none
and re-reads each row. Both take a group of prompts at a time: nobody joins before the last has left.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from pyengine.decoder import BranchingDecoder, Decoder, Frontier, Prompt
from pyengine.errors import InputError, first_line
from pyengine.scorers.base import Hidden

log = logging.getLogger("pyengine")

# Architectures whose branching the test suite holds against a full recompute, sliding windows crossed.
TESTED = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "phi3", "olmo2", "gpt_oss"})


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

    def close(self) -> None:
        self._frontier = Frontier(torch.empty(0), {})

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

    def close(self) -> None:
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
            output = self.model(input_ids=ids, use_cache=False, output_hidden_states=bool(self.layers))
            logits, hidden = output.logits[:, -1], _layers_of(output, self.layers)
            for j, i in enumerate(index):
                parts[i] = Frontier(logits[j], {layer: h[j] for layer, h in hidden.items()})
        rows = [parts[i] for i in range(len(self._rows))]
        hidden = {layer: torch.stack([r.hidden[layer] for r in rows]) for layer in self.layers}
        self._frontier = Frontier(torch.stack([r.logits for r in rows]), hidden)
        return self._frontier


def choose_decoder(model: Any, layers: tuple[int, ...], max_rows: int, budget: float | None = None) -> Decoder:
    """The fastest decoder that is right for this model: unknown architectures are tried against a recompute.

    Raises InputError for a model whose results could not be repeated.
    """
    config = model.config.get_text_config(decoder=True)
    rope = _rope_types(config)
    if "dynamic" in rope:
        raise InputError(
            f"{config.model_type} with dynamic RoPE: its frequencies depend on earlier calls, so no result "
            "could be repeated; set another rope_type in its config.json"
        )
    recompute = RecomputeDecoder(model, layers, max_rows)
    if "longrope" in rope:
        log.warning(
            "%s: longrope turns the frequencies of a whole batch with its longest row, so no cache can be kept; every "
            "step re-reads the whole sequence, which is right but slow",
            config.model_type,
        )
        return recompute
    try:
        reason = _refused(config)
        if reason is None:
            branching = BranchingDecoder(model, layers, max_rows, budget)
            reason = None if config.model_type in TESTED else _mismatch(branching, recompute)
            if reason is None:
                return branching
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a foreign model raises, a slower decoder serves it
        reason = first_line(error)
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


def _refused(config: Any) -> str | None:
    """Why the hook cannot serve an architecture though a short test would pass."""
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked, and transformers does not tell the hook where chunks begin"
    return None


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
    prompts = [Prompt([(7 * i + 3) % vocab for i in range(9)], 8), Prompt([(5 * i + 1) % vocab for i in range(4)], 8)]
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
