"""Key-value caches with branches, behind one interface of four verbs: prefill, fork, append, commit.

    frontier = cache.prefill(prompts)         # B rows
    frontier = cache.fork(k)                  # row b becomes rows b*k .. b*k + k-1
    frontier = cache.append(tokens)           # one token a row
    frontier = cache.commit(rows)             # these rows go on, in this order; the others are dropped

`ReplicatedCache` copies the prefix for each branch through transformers' own cache; `RecomputeCache`
keeps none and re-reads each row, for models whose cache cannot branch.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyengine.errors import InputError
from pyengine.scorers.base import Hidden

log = logging.getLogger("pyengine")

# Architectures whose replicated cache the test suite holds against a full recompute.
TESTED = frozenset({"llama", "qwen2", "mistral", "gpt2", "gemma2", "phi3"})


class Frontier(NamedTuple):
    """Next-token logits [N, V] and hidden states {layer: [N, D]} at the last token of each row.

    After a prompt or a token every row carries them, so no score ever misses its last token.
    """

    logits: Tensor
    hidden: Hidden

    def rows(self, index: Tensor) -> Frontier:
        """The rows of `index`, in its order."""
        return Frontier(self.logits[index], {layer: h[index] for layer, h in self.hidden.items()})


class Cache(Protocol):
    """What the engine needs of a cache."""

    def prefill(self, prompts: list[list[int]]) -> Frontier: ...
    def fork(self, k: int) -> Frontier: ...
    def append(self, tokens: Tensor) -> Frontier: ...
    def commit(self, rows: Tensor) -> Frontier: ...


def _layers_of(output: Any, layers: tuple[int, ...]) -> Hidden:
    return {layer: output.hidden_states[layer][:, -1] for layer in layers}


class ReplicatedCache:
    """K copies of the prefix in transformers' cache. Rows are left-padded, so that all end together."""

    def __init__(self, model: Any, layers: tuple[int, ...]) -> None:
        self.model, self.layers = model, layers
        accepted = inspect.signature(model.forward).parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._mask = torch.empty(0)
        self._store: Any = None
        self._frontier = Frontier(torch.empty(0), {})

    def prefill(self, prompts: list[list[int]]) -> Frontier:
        longest = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        self._mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self._store = None
        return self._forward(ids, (self._mask.cumsum(-1) - 1).clamp(min=0))

    def fork(self, k: int) -> Frontier:
        if k > 1:
            self._store.batch_repeat_interleave(k)
            self._mask = self._mask.repeat_interleave(k, 0)
            index = torch.arange(len(self._frontier.logits), device=self._mask.device).repeat_interleave(k)
            self._frontier = self._frontier.rows(index)
        return self._frontier

    def append(self, tokens: Tensor) -> Frontier:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], -1)
        return self._forward(tokens[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def commit(self, rows: Tensor) -> Frontier:
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


class RecomputeCache:
    """No cache: every step reads each row from its first token. Slow, and right for any decoder."""

    def __init__(self, model: Any, layers: tuple[int, ...]) -> None:
        self.model, self.layers = model, layers
        self._rows: list[list[int]] = []
        self._frontier = Frontier(torch.empty(0), {})

    def prefill(self, prompts: list[list[int]]) -> Frontier:
        self._rows = [list(p) for p in prompts]
        return self._forward()

    def fork(self, k: int) -> Frontier:
        return self.commit(torch.arange(len(self._rows), device=self.model.device).repeat_interleave(k))

    def append(self, tokens: Tensor) -> Frontier:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._forward()

    def commit(self, rows: Tensor) -> Frontier:
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


def choose_cache(model: Any) -> type[ReplicatedCache] | type[RecomputeCache]:
    """The fastest cache that is right for this model: unknown architectures are tried against a recompute."""
    rope = _rope_types(model.config.get_text_config(decoder=True))
    if "dynamic" in rope:
        raise InputError(
            f"{model.config.model_type} with dynamic RoPE: its frequencies depend on earlier calls, so no result "
            "could be repeated; set another rope_type in its config.json"
        )
    if "longrope" in rope:
        reason: str | None = "longrope turns the frequencies of a whole batch with its longest row"
    elif model.config.model_type in TESTED:
        return ReplicatedCache
    else:
        reason = _mismatch(model)
    if reason is None:
        return ReplicatedCache
    log.warning(
        "%s: its cache cannot be branched (%s); every step re-reads the whole sequence, which is right but slow",
        model.config.model_type,
        reason,
    )
    return RecomputeCache


def _rope_types(config: Any) -> set[str]:
    """The rope_type of every layer type that the config names."""
    found = getattr(config, "rope_parameters", None) or {}
    groups = [found, *(v for v in found.values() if isinstance(v, dict))]
    return {g["rope_type"] for g in groups if "rope_type" in g}


@torch.inference_mode()
def _mismatch(model: Any) -> str | None:
    """Why branching this model's cache goes wrong, or None: two ragged prompts, a fork, a commit."""
    vocab = model.get_input_embeddings().weight.shape[0]
    prompts = [[(7 * i + 3) % vocab for i in range(9)], [(5 * i + 1) % vocab for i in range(4)]]
    device = model.device
    steps = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]], device=device) % vocab
    rows = torch.tensor([3, 0], device=device)
    try:
        found: list[Tensor] = []
        wanted: list[Tensor] = []
        for cache, out in ((ReplicatedCache(model, ()), found), (RecomputeCache(model, ()), wanted)):
            out.append(cache.prefill(prompts).logits)
            cache.fork(2)
            out.append(cache.append(steps[0]).logits)
            cache.commit(rows)
            out.append(cache.append(steps[1, :2]).logits)
    except Exception as error:  # noqa: BLE001 - whatever the foreign model raises, the slow cache serves it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    tolerance = 1e-3 if found[0].dtype == torch.float32 else 5e-2
    for a, b in zip(found, wanted, strict=True):
        gap = (a.float() - b.float()).abs().max().item()
        if not gap <= tolerance * max(b.float().abs().max().item(), 1.0):
            return f"logits differ by {gap:.2g} from a recompute"
    return None
