"""Models to measure: a directory, or the shape of a real one by its name, with random weights."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from pyengine.cache import free_memory
from pyengine.checkpoint import device_of
from pyengine.engine import Engine
from pyengine.errors import InputError

RANDOM = "@random"


@lru_cache
def shapes() -> dict[str, dict[str, Any]]:
    """Configurations by name, as in the config.json of the published models."""
    return json.loads((Path(__file__).parent / "shapes.json").read_text())


def config_of(name: str) -> Any:
    """transformers' configuration of a shape; nothing ends a response. InputError for a name that is not there."""
    if name not in shapes():
        raise InputError(f"--model {name}{RANDOM}: no such shape; there are {', '.join(shapes())}")
    fields = dict(shapes()[name])
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, **ends)
    config.name_or_path = name
    return config


def parameters_of(config: Any) -> int:
    """How many numbers a model of this configuration has; tied ones once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def made(name: str, device: str, spare: float = 0.0) -> Any:
    """(model, tokenizer) of a shape, on its device from the start: fp32 on a CPU, bf16 elsewhere.

    spare: bytes that must be left beside the weights. InputError where the memory does not suffice, before any is
    taken. The weights are the same whatever else has drawn.
    """
    at, config = device_of(device), config_of(name)
    if at.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: torch finds no GPU")
    dtype = dtype_of(at)
    wanted, free = parameters_of(config) * dtype.itemsize, free_memory(at)
    if wanted + spare > free:
        raise InputError(
            f"--model {name}{RANDOM}: {wanted / 1e9:.3g} GB of {str(dtype)[6:]} weights and {spare / 1e9:.3g} GB of "
            f"cache do not fit: {free / 1e9:.3g} GB are free on {device}"
        )
    with torch.random.fork_rng(devices=[at] if at.type == "cuda" else []), at:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval(), numbered(config.vocab_size)


def numbered(vocab: int) -> Any:
    """A tokenizer whose tokens are words with their numbers: texts of a model that says nothing."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def engine_of(model: str, device: str, cache_gb: float | None) -> Engine:
    """An engine on `NAME@random`, or on a directory or hub id, that follows nothing."""
    if model.endswith(RANDOM):
        made_of, tokenizer = made(model.removesuffix(RANDOM), device, 1e9 * (cache_gb or 0.0))
        return Engine(made_of, tokenizer, cache_gb=cache_gb)
    return Engine.from_pretrained(model, device=device, cache_gb=cache_gb)
