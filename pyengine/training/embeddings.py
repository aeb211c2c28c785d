"""What a probe is trained on: embeddings of responses with their rewards, or of preferred and rejected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyengine.codec import PromptKey
from pyengine.engine import Engine
from pyengine.errors import InputError, first_line, whole
from pyengine.results import Result
from pyengine.scorers import Candidates, ScorerLike, parts_of, score_texts
from pyengine.scorers.base import as_given
from pyengine.scorers.embedding_probe import check_layer, last_states
from pyengine.training.data import Example, encode_all
from pyengine.training.examples import Pair

ROWS = 4096  # read at once where a temporary copy is made


@dataclass(frozen=True)
class _Stored:
    """Tensors of equal length that live in one safetensors file, and the hidden state that they are."""

    def __post_init__(self) -> None:
        if self.layer is not None:  # type: ignore[attr-defined]
            whole(self.layer, "layer", -(2**31))  # type: ignore[attr-defined]
        for field in _tensors(self):
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
        tensors = {f.name: getattr(self, f.name).contiguous() for f in _tensors(self)}
        if self.layer is not None:  # type: ignore[attr-defined]
            tensors["layer"] = torch.tensor(self.layer)  # type: ignore[attr-defined]
        save_file(tensors, file)


def _tensors(kind: Any) -> list[Field]:
    """The fields of Samples or Pairs but for `layer`."""
    return [field for field in fields(kind) if field.name != "layer"]


@dataclass(frozen=True)
class Samples(_Stored):
    """N scored responses: embeddings [N, D] in fp32, bf16 or fp16, reward [N], prompt [N] (equal for one prompt).

    layer: the hidden state that the embeddings are, as in transformers' hidden_states; None if nobody said.
    """

    embeddings: Tensor
    reward: Tensor
    prompt: Tensor
    layer: int | None = None


@dataclass(frozen=True)
class Pairs(_Stored):
    """N preferences: embeddings chosen and rejected [N, D] in fp32, bf16 or fp16, prompt [N]; layer as in Samples."""

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor
    layer: int | None = None

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
    """What `save` wrote, or any safetensors file with tensors of these names; `layer`, 0-d, may be missing."""
    try:
        found: dict[str, Any] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {first_line(error)}") from error
    kind: Any = Pairs if "chosen" in found else Samples
    names = [f.name for f in _tensors(kind)]
    if set(found) - {"layer"} != set(names):
        raise InputError(f"{file}: holds {sorted(found)}; it must hold {', '.join(names)}, and may hold layer")
    if "layer" in found:
        if found["layer"].dim() or found["layer"].is_floating_point():
            raise InputError(f"{file}: layer must be one whole number, got {found['layer'].tolist()!r:.40}")
        found["layer"] = int(found["layer"])
    try:
        return kind(**found)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def embed(
    engine: Engine,
    responses: Sequence[Result | Example | tuple[str, str]],
    layer: int = -1,
    progress: bool | None = None,
) -> Tensor:
    """fp32 [N, D] on the CPU: hidden state `layer` of the engine's model at the last token of each response.

    responses: results as they were decoded, examples, or (prompt, response) texts, which are whole. A whole response is
    read at its EOS, as a probe in the engine reads it, one that was cut off at its last token. Raises one InputError
    for all that the model cannot read.
    """
    name = engine.policy.name
    check_layer(engine.model, layer, name)
    examples = [_example(response, f"response {i}") for i, response in enumerate(responses)]
    ids = [e.ids for e in encode_all(engine, examples)]
    return last_states(engine.model.base_model, ids, layer, name, "response", progress)


def _example(response: Result | Example | tuple[str, str], where: str) -> Example:
    if isinstance(response, Example):
        return response
    if isinstance(response, Result):
        ended = response.finish_reason == "stop"
        return Example(PromptKey(response.prompt_ids), response.text, 0.0, response.tokens, ended, where)
    return Example(*response, 0.0, where=where)


def numbered(prompts: Sequence[str]) -> Tensor:
    """int64 [N]: equal prompts get equal numbers, in the order in which they come."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(prompt, len(known)) for prompt in prompts])


def samples_of(
    engine: Engine, results: Sequence[Result], reward: ScorerLike, layer: int = -1, progress: bool | None = None
) -> Samples:
    """Decoded responses as training data.

    reward: anything that the engine takes as a scorer, but for those that read its model's hidden states.
    """
    parts = parts_of(reward)
    if not parts:
        raise InputError("samples_of needs a reward")
    for part in parts:
        part.scorer.check(engine.policy)
        part.scorer.move(engine.policy.device)
    texts, prompts = [r.text for r in results], [r.prompt for r in results]
    heads = [engine.encode(r.prompt_ids, f"the prompt of response {i}") for i, r in enumerate(results)]
    given = Candidates(prompts, [r.tokens for r in results], {}, {}, as_given(texts), heads)
    return Samples(embed(engine, results, layer, progress), score_texts(parts, given).float(), numbered(prompts), layer)


def embed_examples(
    engine: Engine, examples: Sequence[Pair] | Sequence[Example], layer: int = -1, progress: bool | None = None
) -> Samples | Pairs:
    """Examples read from JSONL as training data."""
    prompt = numbered([e.prompt for e in examples])
    pairs = [e for e in examples if isinstance(e, Pair)]
    if pairs:
        chosen = [Example(e.prompt, e.chosen, 0.0, where=f"{e.where}: chosen") for e in pairs]
        rejected = [Example(e.prompt, e.rejected, 0.0, where=f"{e.where}: rejected") for e in pairs]
        better, worse = embed(engine, chosen + rejected, layer, progress).chunk(2)
        return Pairs(better, worse, prompt, layer)
    scored = [e for e in examples if isinstance(e, Example)]
    return Samples(embed(engine, scored, layer, progress), torch.tensor([e.reward for e in scored]), prompt, layer)
