"""What a probe is trained on: embeddings of responses with their rewards, or of preferred and rejected ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyengine.engine import Engine
from pyengine.errors import InputError, first_line
from pyengine.results import Result
from pyengine.scorers.embedding_probe import last_states
from pyengine.training.examples import Pair, Scored

ROWS = 4096  # read at once where a temporary copy is made


@dataclass(frozen=True)
class _Stored:
    """Tensors of equal length that live in one safetensors file."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            matrix = field.name not in ("reward", "prompt")
            if not isinstance(value, Tensor) or value.dim() != 1 + matrix or (matrix and 0 in value.shape):
                shape = f"a tensor of shape {'[N, D]' if matrix else '[N]'}"
                raise InputError(f"{field.name} must be {shape}, got {list(getattr(value, 'shape', [])) or value!r}")
            if value.device.type != "cpu" or (matrix and not value.is_floating_point()):
                raise InputError(
                    f"{field.name} must be floats in the host's memory, got {value.dtype} on {value.device}"
                )
            if len(value) != len(self.prompt):  # type: ignore[attr-defined]
                raise InputError(f"{field.name} has {len(value)} rows, prompt has {len(self.prompt)}")  # type: ignore[attr-defined]
            if field.name == "prompt":
                if value.is_floating_point():
                    raise InputError(f"prompt must hold whole numbers, got {value.dtype}")
            else:
                bad = not_finite(value)
                if bad is not None:
                    raise InputError(f"{field.name} has NaN or infinity in row {bad}")
        object.__setattr__(self, "prompt", self.prompt.long())  # type: ignore[attr-defined]

    def save(self, file: str | Path) -> None:
        """Write one safetensors file, in the types that the tensors have."""
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, file)


@dataclass(frozen=True)
class Samples(_Stored):
    """N scored responses: embeddings [N, D] in fp32, bf16 or fp16, reward [N], prompt [N] (equal for one prompt)."""

    embeddings: Tensor
    reward: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class Pairs(_Stored):
    """N preferences: embeddings chosen and rejected [N, D] in fp32, bf16 or fp16, prompt [N]."""

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen.shape != self.rejected.shape:
            raise InputError(f"chosen is {list(self.chosen.shape)}, rejected {list(self.rejected.shape)}")


def not_finite(values: Tensor) -> int | None:
    """The first row of [N, ...] that holds NaN or infinity."""
    for start in range(0, len(values), ROWS):
        bad = ~values[start : start + ROWS].isfinite()
        if bad.any():
            return start + int(bad.flatten(1).any(1).nonzero()[0] if bad.dim() > 1 else bad.nonzero()[0])
    return None


def load_embeddings(file: str | Path) -> Samples | Pairs:
    """What `save` wrote, or any safetensors file with tensors of these names."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {first_line(error)}") from error
    kind: Any = Pairs if "chosen" in found else Samples
    names = [f.name for f in fields(kind)]
    if set(found) != set(names):
        raise InputError(f"{file}: holds {sorted(found)}; it must hold {', '.join(names)}")
    try:
        return kind(**found)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def embed(
    engine: Engine, responses: Sequence[Result | tuple[str, str]], layer: int = -1, progress: bool | None = None
) -> Tensor:
    """fp32 [N, D] on the CPU: hidden state `layer` of the engine's model at the last token of each response.

    responses: results as they were decoded, or (prompt, response) texts, which get the model's EOS: a probe in the
    engine reads a whole response at its EOS. Raises InputError, naming the response, if the model cannot read it.
    """
    layers = engine.policy.layers
    if not -layers <= layer < layers:
        raise InputError(f"{engine.policy.name} has {layers} hidden states, layer {layer} is not among them")
    own = engine.tokenizer.eos_token_id
    end = [own] if own in engine.eos else sorted(engine.eos)[:1]
    ids = []
    for i, response in enumerate(responses):
        if isinstance(response, Result):
            tokens = engine.encode(response.prompt, f"prompt of response {i}") + response.tokens
        else:
            prompt, text = response
            if not text.strip():
                raise InputError(f"response {i} is empty")
            tokens = engine.tokenizer(prompt + text, verbose=False).input_ids + end
        if engine.context is not None and len(tokens) > engine.context:
            raise InputError(
                f"response {i} has {len(tokens)} tokens with its prompt, {engine.policy.name} reads {engine.context}"
            )
        ids.append(tokens)
    return last_states(engine.model.base_model, ids, layer, progress)


def numbered(prompts: Sequence[str]) -> Tensor:
    """int64 [N]: equal prompts get equal numbers, in the order in which they come."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(prompt, len(known)) for prompt in prompts])


def samples_of(
    engine: Engine,
    results: Sequence[Result],
    reward: Callable[[list[str], list[str]], Sequence[float]],
    layer: int = -1,
    progress: bool | None = None,
) -> Samples:
    """Decoded responses as training data; reward: a function of prompts and completions, as scorers take it."""
    prompts = [r.prompt for r in results]
    rewards = torch.tensor(list(reward(prompts, [r.text for r in results])), dtype=torch.float32)
    return Samples(embed(engine, results, layer, progress), rewards, numbered(prompts))


def embed_examples(
    engine: Engine, examples: Sequence[Pair] | Sequence[Scored], layer: int = -1, progress: bool | None = None
) -> Samples | Pairs:
    """Examples read from JSONL as training data."""
    prompt = numbered([e.prompt for e in examples])
    pairs = [e for e in examples if isinstance(e, Pair)]
    if pairs:
        chosen = embed(engine, [(e.prompt, e.chosen) for e in pairs], layer, progress)
        return Pairs(chosen, embed(engine, [(e.prompt, e.rejected) for e in pairs], layer, progress), prompt)
    scored = [e for e in examples if isinstance(e, Scored)]
    states = embed(engine, [(e.prompt, e.response) for e in scored], layer, progress)
    return Samples(states, torch.tensor([e.value for e in scored]), prompt)
