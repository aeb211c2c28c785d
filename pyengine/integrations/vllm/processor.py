"""The logits processor that vLLM loads, what configures it, and what is asked of each request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyengine.errors import InputError, real
from pyengine.integrations.vllm.private import (
    ProcessorV1,
    ProcessorV2,
    VLLMValidationError,
    hook,
    hooked,
    process_dict_updates,
    tap_of,
)
from pyengine.vocabulary import FieldError

if TYPE_CHECKING:  # these load transformers' models, which an engine without scorers need not
    from pyengine.integrations.tilting import HostScorers, Tilting
    from pyengine.results import SamplingParams

log = logging.getLogger("vllm.pyengine")  # below vLLM's logger, whose handler prints it

CACHE_GB = 1.0  # of the keys and values of scorers that are models, taken when the engine starts


class Options(NamedTuple):
    """What an engine's `additional_config` says. scorers: {name: what `scorer_named` takes}, the first the default."""

    scorers: Mapping[str, str]
    cache_gb: float


def options_of(config: Any) -> Options:
    """The options of an engine's configuration; InputError for one that is not known or not of its kind."""
    extra = config.additional_config
    given = {k: v for k, v in extra.items() if str(k).startswith("tilt_")} if isinstance(extra, Mapping) else {}
    scorers = given.pop("tilt_scorers", None)
    cache_gb = real(given.pop("tilt_cache_gb", CACHE_GB), "additional_config: tilt_cache_gb", 0)
    if given:
        raise InputError(f"additional_config: unknown {', '.join(given)}; there are tilt_scorers and tilt_cache_gb")
    if scorers is None:
        return Options({}, cache_gb)
    if not (isinstance(scorers, Mapping) and scorers and all(isinstance(x, str) for kv in scorers.items() for x in kv)):
        raise InputError(f"additional_config: tilt_scorers must be {{name: directory}}, got {scorers!r:.80}")
    return Options(dict(scorers), cache_gb)


def refuse(config: Any) -> None:
    """InputError for settings under which a row would go untilted or be scored wrongly."""
    parallel, model = config.parallel_config, config.model_config
    why = None
    if config.speculative_config is not None:
        why = "speculative decoding: vLLM asks no logits processor about drafted tokens (unset speculative_config)"
    elif parallel.tensor_parallel_size > 1:
        why = "tensor parallelism: only one of its workers has the logits (set tensor_parallel_size=1)"
    elif parallel.pipeline_parallel_size > 1:
        why = "pipeline parallelism, untried (set pipeline_parallel_size=1)"
    elif parallel.world_size > 1:
        why = f"a replica of {parallel.world_size} workers, untried (set prefill_context_parallel_size=1)"
    elif config.lora_config is not None:
        why = "LoRA, untried: a scorer would read an adapter's hidden states (set enable_lora=False)"
    elif model.runner_type != "generate":
        why = f"runner={model.runner_type!r}, which draws no tokens"
    elif model.is_diffusion:
        why = "diffusion models, which do not draw token after token"
    if why is not None:
        raise InputError(f"additional_config: tilt_scorers does not go with {why}")


def refuse_reading(config: Any, name: str) -> None:
    """InputError for settings under which a scorer that is a model cannot be told the rows' tokens."""
    model = config.model_config
    why = None
    if model.enable_prompt_embeds:
        why = "prompts given as embeddings have no tokens (unset enable_prompt_embeds)"
    elif model.is_multimodal_model:
        why = "the tokens of an image are none that it knows"
    elif config.scheduler_config.async_scheduling and not config.use_v2_model_runner:
        why = "under asynchronous scheduling the V1 model runner does not know them yet (set async_scheduling=False)"
    if why is not None:
        raise InputError(f"scorer {name!r} reads tokens: {why}")


def register() -> None:
    """vLLM's general plug-in: it runs once in each process of an engine, before anything is configured."""
    hook(admission)


def admission(config: Any) -> Callable[[Any], None]:
    """What an engine's front end asks about the sampling parameters of each request: a VLLMValidationError, 400 over
    HTTP, that names the field. Raises InputError for a configuration that cannot be."""
    options = options_of(config)
    if options.scorers:
        from pyengine.named import scorer_named

        refuse(config)
        tap_of(config).wanted = True
        for source in options.scorers.values():
            scorer_named(source)

    def admit(params: Any) -> None:
        try:
            _tilt_of(params, options, config.use_v2_model_runner)
        except FieldError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None

    return admit


def _tilt_of(params: Any, options: Options, v2: bool) -> Any:
    """The checked Tilt of a request's sampling parameters, None where it asks for none; FieldError."""
    asked = [name for name in params.extra_args or {} if name.startswith("tilt_")]
    if not asked:
        return None
    if not options.scorers:
        raise FieldError(
            asked[0],
            f'{asked[0]}: this engine has no scorers; start it with additional_config={{"tilt_scorers": '
            '{"NAME": "DIRECTORY"}} (--additional-config)',
        )
    from pyengine.integrations.tilting import asked_for, check_request

    tilt = asked_for(params.extra_args)
    if tilt is not None and not v2:
        # This runner asks us before it applies penalties. A subtraction is the same before and after.
        if params.repetition_penalty != 1:
            raise FieldError(
                "repetition_penalty",
                "repetition_penalty does not go with tilt_*: vLLM's V1 model runner would scale the tilt by it",
            )
        if params.extra_args.get("tilt_kl_budget") is not None and (
            params.frequency_penalty or params.presence_penalty
        ):
            raise FieldError(
                "tilt_kl_budget",
                "tilt_kl_budget does not go with penalties: vLLM's V1 model runner applies them afterwards",
            )
    check_request(tilt, list(options.scorers), _sampling_of(params))
    return tilt


def _sampling_of(params: Any) -> SamplingParams:
    from pyengine.results import SamplingParams

    return SamplingParams(
        temperature=params.temperature, top_k=max(0, params.top_k), top_p=params.top_p, min_p=params.min_p
    )


class _Row:
    """One request in the batch, for as long as it is there. params: what vLLM's scheduler knows it by. prompt, output:
    its tokens, the latter still growing."""

    def __init__(self, params: Any, tilting: Tilting, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> None:
        self.params, self.tilting, self.prompt, self.output = params, tilting, prompt, output


class TiltProcessor(ProcessorV1, ProcessorV2):
    """Adds to each row of logits what its request asks for; on vLLM's V1 and V2 model runners.

    Rows that ask for nothing keep their bits. A row that cannot be tilted is an error, never the base policy.
    """

    def __init__(self, config: Any, *place: Any) -> None:
        """place: (device, whether to pin memory) of V1, (the states of the requests,) of V2."""
        self.options, self.v2 = options_of(config), len(place) == 1
        self.tap, self.rows = tap_of(config), {}  # type: ignore[var-annotated]
        self.states = place[0] if self.v2 else None
        self.scorers: HostScorers | None = None
        if self.options.scorers:
            refuse(config)
            if not hooked():
                raise InputError(
                    "VLLM_PLUGINS leaves out the plug-in 'tilt', without which nobody sees hidden states: add it"
                )
            self.scorers = _load(config, self.options, place[0].device if self.v2 else place[0])
            self.tap.wanted = True
            if self.v2:
                self.tap.check_heads()

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """The front end's own check comes from `admission`; without it no request may ask for anything."""
        if not hooked() and any(name.startswith("tilt_") for name in params.extra_args or {}):
            raise VLLMValidationError("tilt_*: VLLM_PLUGINS leaves out the plug-in 'tilt': add it")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests have come, gone or moved."""
        before = set(self.rows.values())
        if process_dict_updates(self.rows, batch_update, self._row):
            self._forget(before.difference(self.rows.values()))

    def add_request(self, req_idx: int, params: Any) -> bool:
        """V2: a request has come into this place; who was there has gone."""
        self._forget({self.rows.pop(req_idx)} if req_idx in self.rows else set())
        row = self._row(params)
        if row is not None:
            self.rows[req_idx] = row
        return row is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """logits [N, V], fp32, before temperature and filters; changed in place. ctx: V2's account of the rows."""
        if not self.rows:
            return logits
        assert self.scorers is not None
        slots = range(len(logits)) if ctx is None else ctx.idx_mapping_np.tolist()
        rows = [self.rows.get(slot) for slot in slots]
        hidden = self._hidden(len(rows), logits)
        tokens = None
        if self.scorers.reads_tokens:
            ids = self._read(rows) if ctx is None else self._read_v2(rows, slots, ctx.pos)
            tokens = lambda i: (rows[i], ids[i])  # noqa: E731
        tilted = self.scorers.add(logits, hidden, [row and row.tilting for row in rows], tokens)
        if tilted:
            self._keep_finite(logits, rows)
        if tilted and not self.tap.rows:
            log.info("pyengine: the first %d rows are tilted", tilted)
        self.tap.rows += tilted
        return logits

    def _keep_finite(self, logits: Tensor, rows: Sequence[_Row | None]) -> None:
        """Note which tilted rows are not finite, for the scheduler to end; their logits become 0, as a draw from NaN
        may be no token at all."""
        asked = torch.tensor([row is not None for row in rows], device=logits.device)
        finite = logits.amax(1).isfinite().logical_or_(~asked)
        logits.masked_fill_(~finite[:, None], 0.0)
        if finite.is_cuda:  # there by the time that the host has the tokens, copied later on this stream
            finite = torch.ones(len(rows), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        self.tap.drawn.append((finite, [row and row.params for row in rows]))
        self.tap.look()  # what can be read of it and of the steps before; the scheduler may be in another process

    def _row(self, params: Any, prompt: Any = None, output: Any = ()) -> _Row | None:
        tilt = _tilt_of(params, self.options, self.v2)
        if tilt is None:
            return None
        assert self.scorers is not None
        self.tap.check_heads()
        tilting = self.scorers.tilting(tilt, _sampling_of(params))
        return None if tilting is None else _Row(params, tilting, prompt or (), output)

    def _forget(self, gone: set[_Row]) -> None:
        for row in gone:
            assert self.scorers is not None
            self.scorers.forget(row)
            self.tap.faulty.pop(id(row.params), None)

    def _hidden(self, rows: int, logits: Tensor) -> Tensor:
        """What the output head read for these logits, once."""
        assert self.scorers is not None
        hidden, self.tap.hidden = self.tap.hidden, None
        wanted = (rows, self.scorers.hidden_size)
        if hidden is None or hidden.shape != wanted or logits.shape != (rows, self.scorers.vocab_size):
            seen = "nothing" if hidden is None else list(hidden.shape)
            raise RuntimeError(
                f"the output head has shown {seen} for {rows} requests with logits {list(logits.shape)}; "
                f"wanted {list(wanted)} and a vocabulary of {self.scorers.vocab_size}"
            )
        return hidden

    def _read(self, rows: Sequence[_Row | None]) -> list[list[int]]:
        """V1: the tokens of each row so far."""
        ids = [[] if row is None else [*row.prompt, *row.output] for row in rows]
        if any(-1 in own for own in ids):
            raise RuntimeError("vLLM has not filled in its last tokens: set async_scheduling=False")
        return ids

    def _read_v2(self, rows: Sequence[_Row | None], slots: Sequence[int], pos: Tensor) -> list[list[int]]:
        """V2: the same, from the device's history; a row with prompt left to read has what is read of it."""
        assert self.states is not None
        lengths = (pos + 1).tolist()
        history = self.states.all_token_ids.gpu
        return [
            [] if row is None else history[slot, :length].tolist()
            for row, slot, length in zip(rows, slots, lengths, strict=True)
        ]


def _load(config: Any, options: Options, device: torch.device) -> HostScorers:
    """The scorers of an engine, on its device, checked against its model."""
    from pyengine.integrations.tilting import HostScorers
    from pyengine.named import scorer_named
    from pyengine.scorers import Policy, PrefixModel, load_scorer

    model = config.model_config
    loaded: dict[str, Any] = {}
    reads = False
    for name, source in options.scorers.items():
        found = scorer_named(source)
        loaded[name] = found if callable(found) else load_scorer(str(found))
        if isinstance(loaded[name], PrefixModel):
            reads = True
            refuse_reading(config, name)
            if loaded[name].longest < model.max_model_len:
                raise InputError(
                    f"scorer {name!r} reads {loaded[name].longest} tokens, requests may have {model.max_model_len}: "
                    "set max_model_len"
                )
    tokenizer = None
    if reads:
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(model)
    policy = Policy(
        name=f"model {model.model!r}",
        vocab_size=model.get_vocab_size(),
        hidden_size=model.get_hidden_size(),
        layers=model.hf_text_config.num_hidden_layers + 1,
        device=torch.device(device),
        tokenizer=tokenizer,
    )
    return HostScorers(loaded, policy, config.scheduler_config.max_num_seqs, options.cache_gb)
