"""The LM head of TRL's trainers on pyengine's ops, inside the model's own forward.

TRL gives a model a forward that, called with `fused_lm_head=True`, returns log-probabilities instead of logits. This
one keeps that call and adds another: with `paired_loss` the loss of pairs, whose gradients `ops.linear_preference`
makes in the forward. Either runs inside the model's forward, where DDP and FSDP see each use of a parameter.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import trl
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from pyengine import ops
from pyengine.errors import InputError
from pyengine.ops.logit_tiles import columns
from pyengine.reference import PairedLoss, SequenceMoments, TokenLogprob, is_top1

IGNORED = -100
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # what configs call a factor of the logits


@dataclass
class TokenOutput(FusedCausalLMOutput):
    """TRL's output for each token, and `greedy`, l_y - max l, without gradient. 0 where the label is -100.

    `is_top1` counts a tie as a hit, where TRL's asks for the lowest id: logits in bf16 do tie.
    """

    greedy: Tensor | None = None


@dataclass
class PairedOutput(ModelOutput):
    """Of P pairs: the loss, a scalar with a gradient, and sums over each response's tokens, chosen first, without."""

    loss: Tensor | None = None
    losses: Tensor | None = None  # [P]
    logps: Tensor | None = None  # [2P], as are the rest
    tokens: Tensor | None = None
    sampled: Tensor | None = None
    greedy: Tensor | None = None
    entropy: Tensor | None = None
    top1: Tensor | None = None
    mean_logits: Tensor | None = None

    def sides(self) -> tuple[SequenceMoments, SequenceMoments]:
        """The sums of the chosen and of the rejected responses."""
        fields = (self.logps, self.tokens, self.sampled, self.greedy, self.entropy)
        chosen, rejected = zip(*(field.chunk(2) for field in fields if field is not None), strict=True)
        return SequenceMoments(*chosen), SequenceMoments(*rejected)


class Numbers(NamedTuple):
    """What the ops take so that their logits are a model's."""

    temperature: float
    softcap: float | None


def numbers_of(config: Any) -> Numbers:
    """Of a model with this config, whose logits are c tanh(s z / c), or s z: temperature 1 / s, softcap c / s.

    Raises InputError for a factor s that is not above 0.
    """
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in SCALES)
    scale = next((value for value in found if value is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    scale = 1.0 if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise InputError(f"this {config.model_type} model multiplies its logits by {scale}; that must be above 0")
    softcap = getattr(config, "final_logit_softcapping", None)
    return Numbers(1 / scale, None if softcap is None else softcap / scale)


def add_head(model: Any, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """Give a causal language model of transformers the forward that this module's docstring tells of.

    outputs: as for TRL's `add_fused_lm_head`; all but "mean_logits" come for nothing and are always there. With
    softcap, mean_logits take a product with the head of their own.
    """
    original, numbers = model.forward, numbers_of(model.config)
    _check_logits(model, numbers)

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        paired_loss: PairedLoss | None = None,
        reference_logp: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(*args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        head = _at_head(self, hidden, shift_labels, numbers)
        with torch.autocast(head.hidden.device.type, enabled=False):
            if paired_loss is not None:
                return _paired(head, paired_loss, reference_logp)
            return _tokens(head, "mean_logits" in outputs, num_items_in_batch)

    model.forward = types.MethodType(forward, model)


@contextmanager
def in_place_of(module: types.ModuleType, reference: bool = True, loads: int = 0) -> Iterator[None]:
    """While a trainer of TRL's `module` is made: it gets this head, not TRL's, and without `reference` no reference.

    loads: how many models it loads that are no reference.
    """
    lacking = [name for name in ("add_fused_lm_head", "create_model_from_path") if not hasattr(module, name)]
    if lacking:
        raise InputError(f"TRL {trl.__version__} has no {lacking[0]} to put this head in place of; TRL 1.16 has")
    real, left = module.create_model_from_path, iter(range(loads))

    def policy_only(*args: Any, **kwargs: Any) -> Any:
        return None if next(left, None) is None else real(*args, **kwargs)

    loader = real if reference else policy_only
    with _swapped(module, "add_fused_lm_head", add_head), _swapped(module, "create_model_from_path", loader):
        yield


@contextmanager
def _swapped(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    """While inside, `module.name` is `value`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def check_methods(trainer: type, names: tuple[str, ...]) -> None:
    """InputError unless TRL's trainer has the methods that ours override or call: renamed, they would not be run."""
    lacking = [name for name in names if not hasattr(trainer, name)]
    if lacking:
        raise InputError(f"{trainer.__name__} of TRL {trl.__version__} has no {lacking[0]}; that of TRL 1.16 has")


class Recorder:
    """A model that remembers what its last forward with the fused head gave: to see what TRL's code saw."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fused: Any = None

    def __call__(self, **given: Any) -> Any:
        out = self.model(**given)
        if given.get("fused_lm_head"):
            self.fused = out
        return out


def moments_of(out: TokenOutput) -> SequenceMoments:
    """Sums over the tokens of each response, of `logp` with its gradient."""
    assert out.log_probs is not None
    assert out.log_sum_sq_probs is not None
    assert out.greedy is not None
    assert out.entropy is not None
    assert out.label_mask is not None
    sampled = out.log_probs.detach() - out.log_sum_sq_probs
    detached = (field.sum(-1) for field in (sampled, out.greedy, out.entropy.detach()))
    return SequenceMoments(out.log_probs.sum(-1), out.label_mask.sum(-1), *detached)


class _AtHead(NamedTuple):
    """What the head reads: states [N, T, D], weight [V, D] and bias [V] in one type, labels [N, T], its numbers."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    numbers: Numbers


def _at_head(model: Any, hidden: Tensor, labels: Tensor, numbers: Numbers) -> _AtHead:
    """The head is looked up at each call: FSDP and PEFT replace it."""
    module = model.get_output_embeddings()
    weight, bias = (_whole(parameter) for parameter in (module.weight, getattr(module, "bias", None)))
    assert weight is not None
    device = weight.device  # with device_map, not always that of the last layer
    kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    return _AtHead(hidden.to(device, kind), weight.to(kind), bias, labels.to(device), numbers)


@torch.no_grad()
def _check_logits(model: Any, numbers: Numbers) -> None:
    """InputError unless two tokens' logits are the model's own: an architecture may do what no config tells."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    training, ids = model.training, torch.tensor([[1, 2]], device=model.get_input_embeddings().weight.device)
    try:
        model.eval()
        own = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = _at_head(model, hidden, ids, numbers)
    finally:
        model.train(training)
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias).float()
    temperature, softcap = numbers
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    finest = torch.finfo(head.weight.dtype).eps
    if not (own - z).abs().max() <= max(1e-3, 8 * finest) * own.abs().max().clamp(min=1e-6):
        raise InputError(
            f"the logits of this {model.config.model_type} model are not softcap * tanh(scale * head / softcap) as its "
            "config tells them; train it with TRL's own trainer"
        )


def _whole(parameter: Tensor | None) -> Tensor | None:
    """The parameter, gathered where FSDP2 has sharded it; its gradient is the mean of the processes' own."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter


def _tokens(head: _AtHead, wants_mean: bool, count: Tensor | int | None) -> TokenOutput:
    options: dict[str, Any] = head.numbers._asdict() | {"bias": head.bias}
    found: TokenLogprob = ops.linear_logprob(head.hidden, head.weight, head.labels, **options)
    kept = head.labels != IGNORED
    return TokenOutput(
        loss=-found.logp.sum() / (kept.sum().clamp(min=1) if count is None else count),
        log_probs=found.logp,
        entropy=found.entropy,
        log_sum_sq_probs=found.lse2 - 2 * found.lse,
        mean_logits=_mean_logits(head, kept) if wants_mean else None,
        is_top1=is_top1(found) & kept,
        label_mask=kept,
        greedy=(found.logp.detach() + found.lse - found.max_logit),
    )


def _paired(head: _AtHead, loss: PairedLoss, reference_logp: Tensor | None) -> PairedOutput:
    options: dict[str, Any] = head.numbers._asdict() | {"bias": head.bias, "reference_logp": reference_logp}
    found = ops.linear_preference(head.hidden, head.weight, head.labels, loss, **options)
    means = _mean_logits(head, head.labels != IGNORED).sum(-1)
    return PairedOutput(found.loss, found.losses, *found.moments, found.top1, means)


@torch.no_grad()
def _mean_logits(head: _AtHead, kept: Tensor) -> Tensor:
    """Mean over the vocabulary of each token's logits, fp32 [N, T], 0 where not kept.

    Without softcap the mean logit is the logit of the mean row of the weight, which costs one reading of it.
    """
    temperature, softcap = head.numbers
    if softcap is None:
        row = head.weight.mean(0, dtype=torch.float32)
        offset = 0.0 if head.bias is None else head.bias.mean(dtype=torch.float32)
        return torch.where(kept, (head.hidden.float() @ row + offset) / temperature, 0.0)
    states, vocab = head.hidden[kept], len(head.weight)
    total = states.new_zeros(len(states), dtype=torch.float32)
    for start, end in columns(vocab):
        logits = (states @ head.weight[start:end].T).float()
        if head.bias is not None:
            logits += head.bias[start:end].float()
        total += logits.div_(softcap).tanh_().sum(-1)
    out = total.new_zeros(kept.shape)
    out[kept] = total * (softcap / temperature / vocab)
    return out
