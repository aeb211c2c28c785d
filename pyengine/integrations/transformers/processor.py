"""Tokenwise in `generate` and in continuous batching, as a logits processor that sees the model's hidden states."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from pyengine.decode.panel import policy_of
from pyengine.errors import InputError
from pyengine.integrations.tilting import LARGEST, HostScorers, Tilting
from pyengine.integrations.transformers.private import (
    ASKS_OF_ALL_TOKENS,
    ContinuousBatchingLogitsProcessor,
    GenerationMixin,
    converting,
    preparing,
)
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import Tokenwise
from pyengine.vocabulary import Tilt

NAME = "scorer"
FILTERS = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


@dataclass
class _Call:
    """What the rows of one `generate` need to know of it. samples: of each prompt. padding: tokens on the left of each
    row, none where there is no padding at all. rows: what each adds."""

    number: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samples: int = 1
    padding: list[int] = field(default_factory=list)
    rows: list[Tilting | None] = field(default_factory=list)


class _Seen(threading.local):
    """What a thread's last pass has shown: a manager of continuous batching has a thread of its own."""

    hidden: Tensor | None = None
    where: Tensor | None = None
    call: _Call | None = None


class TiltLogitsProcessor(LogitsProcessor):
    """softmax(l / T + λ V) in transformers' own `generate` (Controlled Decoding, Eq. 6), whatever warps it afterwards.

        with TiltLogitsProcessor(scorer, 2.0).attached(model) as processor:
            model.generate(**inputs, logits_processor=[processor], do_sample=True, temperature=0.7)

    `generate` divides by T afterwards, so λ T V is added, with T from its generation config, and λ V where it does not
    sample. scorer: a prefix scorer, a prefix model, or a weighted sum of them. weight: λ, or one for each prompt of the
    batch; 0 leaves a row's bits alone. kl_budget: nats a token, for which λ is solved at each; it takes no weight and
    no filters. tokenizer: of the model; prefix models need it.

    Attached, it also serves continuous batching (`generate_batch`, `continuous_batching_context_manager`): weight is
    then the default of a request, and `add_request(ids, tilt_weight=2.0)` gives one its own where the manager has
    `per_request_processors`. Prefix models and budgets do not, as no processor is told the requests' tokens there.

    tilted_rows: rows (tokens that were drawn) that were tilted so far.

    Raises InputError for a scorer that does not fit, for what cannot be tilted (beam search, assisted decoding,
    classifier-free guidance), and where it is used without being attached or attached without being used.
    """

    supports_continuous_batching = True

    def __init__(
        self,
        scorer: ScorerLike,
        weight: float | Sequence[float] = 1.0,
        *,
        kl_budget: float | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._one_each = isinstance(weight, (Sequence, Tensor)) and not isinstance(weight, str)
        weights: Any = weight if self._one_each else [weight]
        self.strategies = [Tokenwise(w, kl_budget) for w in weights]
        if not self.strategies:
            raise InputError("TiltLogitsProcessor: weight is empty; give a number, or one for each prompt")
        self.scorer, self.tokenizer = scorer, tokenizer
        self.tilted_rows = 0
        self._scorers: HostScorers | None = None
        self._seen = _Seen()
        self._batching = _Call()  # of the manager of continuous batching that was made last
        self._calls = 0

    # Attached to a model

    @contextmanager
    def attached(self, model: Any) -> Iterator[TiltLogitsProcessor]:
        """Inside, this processor sees what the model's output head reads; nothing of it is left on the model after."""
        head = model.get_output_embeddings()
        if head is None:
            raise InputError(f"{type(model).__name__} has no output head, whose input a scorer reads")
        if self._scorers is not None:
            raise InputError("this processor is attached already")
        policy = replace(policy_of(model, self.tokenizer), device=head.weight.device)
        self._scorers = HostScorers({NAME: self.scorer}, policy)
        inner: list[Any] = [m for m in model.modules() if isinstance(m, GenerationMixin)]  # PEFT's wrapper is none
        if not inner:
            raise InputError(f"{type(model).__name__} has no `generate` of transformers' inside it")
        with ExitStack() as stack:
            stack.callback(self._detach)
            stack.enter_context(head.register_forward_pre_hook(self._see))
            for module in inner:
                stack.enter_context(module.register_forward_pre_hook(self._see_where, with_kwargs=True))
                stack.enter_context(preparing(module, self._prepare))
            stack.enter_context(converting(TiltLogitsProcessor, _Batched))
            yield self

    def _detach(self) -> None:
        self._scorers, self._seen = None, _Seen()

    def _see(self, module: Any, args: tuple[Any, ...]) -> None:
        self._seen.hidden = args[0]

    def _see_where(self, module: Any, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Of which tokens continuous batching needs logits; before 5.13, and in some models, the head makes all."""
        self._seen.where = arguments.get("logits_indices")

    def _take(self) -> Tensor:
        """What the head has read [B, T, D]; once for each pass of the model."""
        hidden, self._seen.hidden = self._seen.hidden, None
        if self._scorers is None:
            raise InputError(
                "TiltLogitsProcessor sees no hidden states: use it inside `with processor.attached(model)`"
            )
        if hidden is None:
            raise InputError(
                "TiltLogitsProcessor was asked for more tokens than the model made passes, as by assisted decoding: it "
                "needs a pass for each"
            )
        return hidden

    def _prepare(self, config: GenerationConfig, given: list[Any], arguments: dict[str, Any]) -> list[Any]:
        """The processors of a call; notes what the rows need to know of it."""
        for name, off, what in (
            ("num_beams", 1, "beam search"),
            ("guidance_scale", 1, "classifier-free guidance"),
            ("prompt_lookup_num_tokens", None, "assisted decoding"),
            ("assistant_early_exit", None, "assisted decoding"),
            ("is_assistant", False, "assisted decoding"),
        ):
            if getattr(config, name, None) not in (None, off):
                raise InputError(f"TiltLogitsProcessor: {name}={getattr(config, name)!r}: {what} cannot be tilted")
        batching = "input_ids_seq_length" not in arguments
        if batching:
            given = [*given, *([] if self in given else [self])]
        elif self not in given:
            raise InputError("the model has a TiltLogitsProcessor attached: pass it as logits_processor=[processor]")
        heat = float(config.temperature if config.temperature is not None else 1.0) if config.do_sample else 0.0
        filters: tuple[Any, ...] = (config.top_k or 0, config.top_p or 1.0, config.min_p or 0.0) if heat else ()
        if self.strategies[0].kl_budget and any(getattr(config, f, None) not in (None, 1.0, 0.0) for f in FILTERS):
            raise InputError(f"TiltLogitsProcessor: kl_budget takes no filters; leave out {', '.join(FILTERS)}")
        self._calls += 1
        call = _Call(self._calls, SamplingParams(1, heat, *filters), config.num_return_sequences or 1)
        if batching:
            self._check_batching(call)
            self._batching = call
            return given
        assert self._scorers is not None
        if self._scorers.reads_tokens and not arguments["input_ids_seq_length"]:
            raise InputError("a prefix model reads tokens, of which inputs_embeds has none: give input_ids")
        mask = (arguments.get("model_kwargs") or {}).get("attention_mask")
        call.padding = [] if mask is None else (mask != 0).int().argmax(1).tolist()
        self._seen.call, self._seen.hidden = call, None
        return given

    # In `generate`

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [N, V] with what each row adds; a copy."""
        packed = input_ids.dim() == 1  # in continuous batching without weights of requests
        hidden = self._packed(scores) if packed else _beside(self._take()[:, -1], scores)
        call = self._batching if packed else self._seen.call
        if call is None or self._scorers is None:
            raise InputError(
                "TiltLogitsProcessor does not know the temperature: it works in generate and in continuous batching, "
                "which say so, and in no other loop"
            )
        if len(call.rows) != len(scores):
            call.rows = self._tiltings(call, len(scores))
        scores = scores.clone()

        def tokens(row: int) -> tuple[tuple[int, int], list[int]]:
            start = call.padding[row] if call.padding else 0
            return (call.number, row), input_ids[row, start:].tolist()

        reads = tokens if self._scorers.reads_tokens else None
        self.tilted_rows += self._scorers.add(scores, hidden, call.rows, reads)
        return scores

    def _tiltings(self, call: _Call, rows: int) -> list[Tilting | None]:
        """Of each row; `generate` puts the samples of one prompt side by side."""
        assert self._scorers is not None
        if self._one_each and rows != len(self.strategies) * call.samples:
            raise InputError(
                f"TiltLogitsProcessor: {len(self.strategies)} weights for {rows // call.samples} prompts: give one for "
                "each, or a number for all"
            )
        own = [self._scorers.tilting(Tilt(strategy), call.sampling) for strategy in self.strategies]
        return [row for row in own for _ in range(rows // len(own))]

    # In continuous batching

    def _check_batching(self, call: _Call) -> None:
        assert self._scorers is not None
        if self._one_each:
            raise InputError("continuous batching: one default weight; give a request its own with tilt_weight")
        if self._scorers.reads_tokens or self.strategies[0].kl_budget:
            raise InputError(
                "continuous batching tells no processor the requests' tokens: prefix models and kl_budget are for "
                "generate and for pyengine.Engine"
            )
        self._scorers.tilting(Tilt(self.strategies[0]), call.sampling)

    def _packed(self, scores: Tensor) -> Tensor:
        """What the head has read for these rows of logits, of all that were packed into one pass."""
        hidden = self._take().flatten(0, 1)
        where = self._seen.where
        return _beside(hidden if len(hidden) == len(scores) or where is None else hidden[where], scores)

    def batched(self, scores: Tensor, factor: Tensor) -> Tensor:
        """Logits [N, V] with V times each row's factor [N] added; nothing passes between host and device."""
        assert self._scorers is not None
        hidden = self._packed(scores)
        tilted = torch.addcmul(scores, self._scorers.values(NAME, hidden, scores.shape[1]), factor[:, None])
        return torch.where(factor[:, None] == 0, scores, tilted)


def _beside(hidden: Tensor, scores: Tensor) -> Tensor:
    if len(hidden) != len(scores):
        raise InputError(
            f"the model's head read {len(hidden)} rows for {len(scores)} rows of logits: which of them belong "
            "together cannot be told"
        )
    return hidden


class _Weight(type):
    """A number that leaves finite logits: transformers asks isinstance of a request's value, and fails it alone."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


class FiniteNumber(metaclass=_Weight):
    """Named so for the error of a request whose tilt_weight is none."""


class _Batched(ContinuousBatchingLogitsProcessor):
    """A weight for each request, in the tensor of 32-bit words that continuous batching has for its arguments."""

    supported_kwargs: dict[str, Any] = {"tilt_weight": FiniteNumber}  # noqa: RUF012 - transformers declares it so
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, processor: TiltLogitsProcessor) -> None:
        self.processor = processor
        self.weight = processor.strategies[0].weight
        self.temperature = processor._batching.sampling.temperature

    def _factor(self, weight: float, temperature: float) -> float:
        """What V is multiplied by, of a request with this λ. Beyond the bound l / T is nothing beside λ V."""
        factor = weight * (temperature if self.temperature else 1.0)
        return max(-LARGEST, min(LARGEST, factor))

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        factor = self._factor(self.weight, self.temperature)
        int32_tensor.copy_(torch.full_like(int32_tensor, factor, dtype=torch.float32).view(torch.int32))

    def prepare_tensor_args(self, requests: list[Any]) -> Tensor:
        factors: list[float] = []
        for request in requests:
            own = request.state.logit_processor_kwargs
            factor = self._factor(
                float(own.get("tilt_weight", self.weight)), float(own.get("temperature", self.temperature))
            )
            factors += [factor] * (request.query_length if ASKS_OF_ALL_TOKENS else 1)
            self.processor.tilted_rows += factor != 0 and request.has_new_token
        return torch.tensor(factors, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return self.processor.batched(scores, tensor_arg[: len(scores)].view(torch.float32))
