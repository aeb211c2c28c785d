"""Weights of eight bits for decoding on a CPU, which is bound by their bytes, and what narrow numbers cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyengine import costs
from pyengine.cache import host_memory
from pyengine.errors import InputError
from pyengine.ops.linear import Int8Linear

ROWS, TOKENS = 8, 24  # of the model's own text, on which its numbers are judged


def quantize_int8(model: Any) -> int:
    """Puts an Int8Linear in the place of every linear layer of a model on a CPU, its output head among them; an
    embedding stays as it is, also where the head shared it, and so do other kinds of layers (GPT-2's Conv1D). Gives the
    bytes of these weights.

    InputError for a model on another device, or without a linear layer of torch's own.
    """
    if model.device.type != "cpu":
        raise InputError(f"quantize: int8 weights are for a CPU, this model is on {model.device}")
    named = model.named_modules(remove_duplicate=False)
    layers = [(name, layer) for name, layer in named if type(layer) is nn.Linear]
    if not layers:
        raise InputError(f"quantize: a {type(model).__name__} has no linear layer of torch's own")
    done: dict[int, Int8Linear] = {}  # two names of one layer stay one
    read = 0
    for name, layer in layers:
        owner, _, last = name.rpartition(".")
        if id(layer) not in done:
            done[id(layer)] = Int8Linear(layer)
            read += layer.weight.numel()
        setattr(model.get_submodule(owner), last, done[id(layer)])
    return read


def check_quantize(quantize: str | None, device: str, dtype: torch.dtype | None) -> None:
    """InputError for what is not there."""
    if quantize is None:
        return
    if quantize != "int8":
        raise InputError(f'quantize must be None or "int8", got {quantize!r}')
    if not str(device).startswith("cpu"):
        raise InputError(f"quantize: int8 weights are for a CPU, device is {device!r}")
    if dtype is not torch.float32:
        raise InputError(f"quantize: all but the int8 weights is fp32, dtype is {dtype}: leave it out")


def narrowed(model: Any, dtype: torch.dtype | None, quantize: str | None) -> str:
    """Makes a model on a CPU what was asked for, in place, and says how far it then is from itself in fp32, where there
    is memory for that."""
    whole, free = 4.0 * sum(p.numel() for p in model.parameters()), host_memory()
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    reference = None
    if kinds == {torch.float32} or whole < free:
        reference = own_text(model.float())
    what = str(dtype).removeprefix("torch.")
    if quantize:
        eighth = quantize_int8(model)
        model.float()
        moved = costs.weights_of(model)
        others = moved.body_bytes + moved.head_bytes - eighth
        what = f"int8 weights, {eighth / 1e6:,.3g} MB, beside {others / 1e6:,.3g} MB of others in fp32"
    else:
        cast(model, dtype)
    model.config.dtype = dtype
    if reference is None:
        return f"{what}; KL from fp32 is not measured: that takes {whole / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
    return f"{what}; {drift(model, *reference)}"


def cast(model: Any, dtype: torch.dtype | None) -> None:
    """As transformers loads it in this dtype: buffers that no checkpoint has stay fp32, RoPE's frequencies among them,
    whose angles, rounded to bf16, are off by .7 at position 4,000."""
    kept = [(m, name, m._buffers[name]) for m in model.modules() for name in m._non_persistent_buffers_set]
    model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer


class Drift(NamedTuple):
    """KL of a model in narrow numbers from the same in fp32, nats a token: the mean, and the most of one token."""

    mean: float
    most: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL from fp32 {self.mean:.2g} nats a token of its own text, {self.most:.2g} at most ({self.tokens} tokens)"
        )


@torch.inference_mode()
def own_text(model: Any) -> tuple[Tensor, Tensor]:
    """(ids [8, 25], log-probabilities [8, 24, V] of each next token): what a model in fp32 draws after eight tokens of
    its vocabulary, always the same."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab, (ROWS, 1), generator=generator)
    for _ in range(TOKENS):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return ids, next_tokens(model, ids)


@torch.inference_mode()
def next_tokens(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T - 1, V] of the tokens after each but the last of ids [B, T]."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def drift(model: Any, ids: Tensor, wanted: Tensor) -> Drift:
    """How far a model's next tokens are from `wanted`, which `own_text` gave of the same in fp32."""
    kl = nn.functional.kl_div(next_tokens(model, ids), wanted, reduction="none", log_target=True).sum(-1)
    return Drift(kl.mean().item(), kl.max().item(), kl.numel())
