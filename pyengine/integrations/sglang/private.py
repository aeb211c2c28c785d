"""The private names of SGLang 0.5.23 that pyengine needs, all of them, checked when this is imported.

InputError on import where SGLang has another version or lacks one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import pkgutil
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.entrypoints.http_server import app
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.sampling.sampling_batch_info import ProcessorEntry, SamplingBatchInfo
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from starlette.middleware import Middleware

from pyengine.errors import InputError
from pyengine.integrations.sglang import SCORERS
from pyengine.integrations.sglang.routes import Lift
from pyengine.integrations.sglang.rows import Row, Rows, Step, admitted, check_reading, tilts
from pyengine.integrations.tilting import HostScorers, asked_for
from pyengine.named import scorer_named
from pyengine.results import SamplingParams
from pyengine.scorers import Policy

SUPPORTED = "0.5.23"
KEY = "pyengine"  # of the rows in a batch's custom parameters, and of the entry among its processors

# Each setting, the values that pyengine has been tried with, and why not another.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "speculative_algorithm": ((None,), "SGLang does not show every drafted token to processors"),
    "dllm_algorithm": ((None,), "a diffusion model draws many tokens at once"),
    "tp_size": ((1,), "tensor parallelism has not been tried"),
    "pp_size": ((1,), "pipeline parallelism has not been tried"),
    "dp_size": ((1,), "data parallelism has not been tried; start a server for each replica"),
    "attn_cp_size": ((1,), "context parallelism has not been tried"),
    "enable_dp_attention": ((False,), "its logits are of other rows than its hidden states"),
    "disaggregation_mode": (("null",), "prefill and decoding draw in different processes"),
    "enable_pdmux": ((False,), "prefill and decoding run at the same time"),
    "enable_two_batch_overlap": ((False,), "two batches run at the same time"),
    "enable_single_batch_overlap": ((False,), "it has not been tried"),
    "enable_mixed_chunk": ((False,), "it has not been tried"),
    "enable_torch_compile": ((False,), "the hook for hidden states has not been tried in a compiled model"),
    "tokenizer_worker_num": ((1,), "its further HTTP processes load no plugins, and drop tilt_* beside custom_params"),
    "enable_watermark": ((False,), "a watermark draws tokens past processors"),
    "is_embedding": ((False,), "an embedding model draws no tokens"),
    "device": (("cpu", "cuda"), "other devices have samplers of their own"),
}

_sources: Mapping[str, str] = {}
_cache_gb = 0.0
_rows: Rows | None = None  # of this process, once it has a model


def _check() -> None:
    version = importlib.metadata.version("sglang")
    if version != SUPPORTED:
        raise InputError(f"SGLang {version}: this pyengine knows SGLang {SUPPORTED}; install sglang=={SUPPORTED}")
    for target in (*HOOKS, f"{_SCHEDULER}.retire_unadmitted_request"):
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            raise InputError(f"SGLang {version} has no {target}: {error}") from None
    fields = {
        SamplingBatchInfo: {"custom_params", "custom_logit_processor", "has_custom_logit_processor", "device"},
        ProcessorEntry: {"processor", "rows", "indices"},
        ForwardBatch: {"seq_lens", "seq_lens_cpu", "input_ids", "forward_mode"},
    }
    for kind, names in fields.items():
        missing = names - {field.name for field in dataclasses.fields(kind)}
        if missing:
            raise InputError(f"SGLang {version}: {kind.__name__} has no {', '.join(sorted(missing))}")
    held = {"origin_input_ids", "output_ids", "to_finish", "lora_id", "input_embeds", "sampling_params"}
    missing = held - set(Req.__init__.__code__.co_names) | {"set_finish_with_abort", "finished"} - set(dir(Req))
    if missing:
        raise InputError(f"SGLang {version}: Req has no {', '.join(sorted(missing))}")


def install(sources: Mapping[str, str], cache_gb: float) -> None:
    """Hook pyengine into this process. sources: {name: source} of the scorers; where there are none, SGLang stays as
    it is, but refuses requests with `tilt_*`. cache_gb: 10⁹ bytes for each scorer that is a model of its own."""
    for source in sources.values():
        scorer_named(source)  # that it can be one is said before a model is loaded
    for target, (kind, hook, always) in HOOKS.items():
        if sources or always:
            HookRegistry.register(target, hook, kind)
    global _sources, _cache_gb
    _sources, _cache_gb = sources, cache_gb


# Start: what is refused, and the scorers on the model's device.


def check_settings(original: Callable[..., None], settings: Any) -> None:
    """Around ServerArgs.check_server_args. InputError for a setting under which a tilt could be lost."""
    original(settings)
    missing = HOOKS.keys() - HookRegistry._patched
    if missing:
        raise InputError(f"SGLang did not take pyengine's hook for {', '.join(sorted(missing))}; its log says why")
    decided = resolving_view(settings)
    for name, (values, why) in ONLY.items():
        value = getattr(decided, name)
        if value not in values:
            raise InputError(f"pyengine does not tilt with {name}={value!r}: {why}. Leave it out, or unset {SCORERS}")


def load_scorers(result: None, runner: Any) -> None:
    """After ModelRunner.load_model, before memory is taken for the cache and graphs are captured."""
    global _rows
    check_settings(lambda settings: None, runner.server_args)
    found = [m for m in runner.model.modules() if isinstance(m, LogitsProcessor)]
    if len(found) != 1 or type(found[0]).forward is not LogitsProcessor.forward:
        raise InputError(
            f"{type(runner.model).__name__} has no logits processor of SGLang's own kind, whose hidden states pyengine "
            "could read"
        )
    config, settings = runner.model_config, resolving_view(runner.server_args)
    tokenizer = None
    if not settings.skip_tokenizer_init:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            settings.tokenizer_path, trust_remote_code=settings.trust_remote_code, revision=settings.revision
        )
    policy = Policy(
        name=f"model {os.path.basename(settings.model_path)!r}",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers + 1,
        device=next(runner.model.parameters()).device,
        tokenizer=tokenizer,
    )
    scorers = HostScorers({name: scorer_named(s) for name, s in _sources.items()}, policy, cache_gb=_cache_gb)
    _rows = Rows(
        scorers, lambda: None if runner.req_to_token_pool is None else len(runner.req_to_token_pool.req_to_token)
    )


# Requests: what they ask for is checked where they enter the queue, whatever they came by.


def admit(original: Callable[..., None], scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Around Scheduler._add_request_to_queue. A request that asks for what cannot be ends with an error of its own
    (400; 500 where the fault is pyengine's), before anything is drawn for it; one that comes back after a preemption
    has been here."""
    if not hasattr(req, "pyengine_row") and req.to_finish is None:
        try:
            scorers = None if _rows is None else _rows.scorers
            tilting = admitted(req.sampling_params.custom_params, scorers, lambda: _sampling(req))
            if tilting is not None:
                _check_request(tilting, req)
            req.pyengine_row = None if tilting is None else Row(tilting, req)
        except InputError as error:
            req.set_finish_with_abort(str(error))
        except Exception as error:  # noqa: BLE001 - past here it would end the scheduler, and with it every request
            said = f"pyengine: {type(error).__name__}: {error}"
            req.set_finish_with_abort(said, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
        if req.to_finish is not None:
            scheduler.retire_unadmitted_request(req)
            return
    original(scheduler, req, *args, **kwargs)


def refuse_beams(original: Callable[..., str | None], beams: Any, req: Any, received: Any) -> str | None:
    """Around BeamCoordinator.validate_and_init, which replaces the request's parameters."""
    try:
        tilted = asked_for(tilts(received.sampling_params.custom_params)) is not None
    except Exception as error:  # noqa: BLE001 - as in `admit`
        return str(error) if isinstance(error, InputError) else f"pyengine: {type(error).__name__}: {error}"
    if tilted:
        return "tilt_weight: beam search selects by the base policy's logits; leave beam_width out"
    return original(beams, req, received)


def _sampling(req: Any) -> SamplingParams:
    params = req.sampling_params
    heat = params.temperature if params.max_new_tokens else 1.0  # of scores alone SGLang does not divide by it
    top_k = 0 if params.top_k == TOP_K_ALL else params.top_k
    return SamplingParams(temperature=heat, top_k=top_k, top_p=params.top_p, min_p=params.min_p)


def _check_request(tilting: Any, req: Any) -> None:
    assert _rows is not None
    if req.lora_id is not None:
        raise InputError(
            "tilt_weight: a scorer reads the hidden states of the model that it was trained on, not a LoRA's"
        )
    if _rows.scorers.reads_tokens and req.input_embeds is not None:
        raise InputError("tilt_weight: input_embeds are no tokens, which a scorer of this server reads")
    most = len(req.origin_input_ids) + req.sampling_params.max_new_tokens
    check_reading(tilting, req.origin_input_ids, most, _rows.scorers.vocab_size)


def guard(original: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
    """Around Req.update_finish_state: a token that was not tilted as asked ends its request with an error."""
    row = getattr(req, "pyengine_row", None)
    if row is not None and not (req.finished() or req.to_finish) and req.sampling_params.max_new_tokens:
        assert _rows is not None
        fault = _rows.fault(row)
        if fault is not None:
            req.to_finish = FINISH_ABORT(fault, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
            req.finished_len = len(req.output_ids) - 1  # that token is not shown
    original(req, *args, **kwargs)
    if row is not None and req.finished() and _rows is not None:
        _rows.scorers.forget(row)


# Steps: hidden states, lengths, and the rows of the batch.


class Tilt:
    """Stands among a batch's custom logit processors, so that SGLang keeps its rows in step with the batch's."""

    def __call__(self, logits: Any, params: Any = None) -> Any:
        raise RuntimeError("SGLang asked pyengine for logits past its hook")


TILT = Tilt()


def enter_batch(info: Any, kind: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """After SamplingBatchInfo.from_schedule_batch: tilted requests take part with no processor named by them."""
    rows = [getattr(req, "pyengine_row", None) for req in batch.reqs]
    places = [i for i, row in enumerate(rows) if row is not None]
    if not places:
        return
    params = info.custom_params or [None] * len(rows)
    info.custom_params = [p if row is None else {**(p or {}), KEY: row} for p, row in zip(params, rows, strict=True)]
    entry = ProcessorEntry(processor=TILT, rows=places, indices=torch.tensor(places, device=info.device))
    info.custom_logit_processor = {**(info.custom_logit_processor or {}), KEY: entry}
    info.has_custom_logit_processor = True


def keep_hidden(result: tuple[Any, ...], *args: Any, **kwargs: Any) -> None:
    """After LogitsProcessor._get_pruned_states: the rows that are drawn from, as the output head reads them."""
    states, _, _, sampled, _, _ = result
    if _rows is not None:
        _rows.keep(states if sampled is None else states[sampled])


def begin_step(runner: Any, logits_output: Any, batch: Any) -> None:
    """Before ModelRunner.sample and compute_logprobs_only."""
    if _rows is None:
        return
    lengths = (batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu).tolist()

    @functools.cache
    def last() -> list[int]:
        if not batch.forward_mode.is_decode():
            raise RuntimeError("SGLang has read tokens of a prompt that it does not know")
        found: list[int] = batch.input_ids.tolist()
        return found

    _rows.step = Step(lengths, last)


def apply(original: Callable[..., None], logits: Any, info: Any, num_tokens_in_batch: int = 1) -> None:
    """Around apply_custom_logit_processor: behind penalties, biases and grammars, before the temperature."""
    entries = info.custom_logit_processor
    others = {key: entry for key, entry in entries.items() if key != KEY}
    if others:
        original(logits, dataclasses.replace(info, custom_logit_processor=others), num_tokens_in_batch)
    if KEY not in entries:
        return
    assert _rows is not None
    if num_tokens_in_batch != 1:
        raise RuntimeError("SGLang drafts tokens, which pyengine refused when it started")
    tilted = set(entries[KEY].rows)
    _rows.tilt(logits, [info.custom_params[i][KEY] if i in tilted else None for i in range(len(logits))])


def report(result: Any, *args: Any, **kwargs: Any) -> None:
    """After get_internal_state, which `Engine.get_server_info()` and /server_info show."""
    if _rows is not None:
        result.internal_state[KEY] = {"scorers": list(_rows.scorers.parts), "tilted_tokens": _rows.tilted}


def read_bodies(*args: Any, **kwargs: Any) -> None:
    """Before the HTTP server starts: innermost, where bodies are decompressed and clients known."""
    app.user_middleware.append(Middleware(Lift))


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_STATE = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
# {what is hooked: (how, by what, whether also where no scorers are named)}
HOOKS: dict[str, tuple[HookType, Callable[..., Any], bool]] = {
    "sglang.srt.server_args.ServerArgs.check_server_args": (HookType.AROUND, check_settings, False),
    "sglang.srt.entrypoints.http_server._setup_and_run_http_server": (HookType.BEFORE, read_bodies, True),
    f"{_RUNNER}.load_model": (HookType.AFTER, load_scorers, False),
    f"{_SCHEDULER}._add_request_to_queue": (HookType.AROUND, admit, True),
    "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init": (HookType.AROUND, refuse_beams, True),
    "sglang.srt.managers.schedule_batch.Req.update_finish_state": (HookType.AROUND, guard, False),
    f"{_INFO}.from_schedule_batch": (HookType.AFTER, enter_batch, False),
    "sglang.srt.layers.logits_processor.LogitsProcessor._get_pruned_states": (HookType.AFTER, keep_hidden, False),
    f"{_RUNNER}.sample": (HookType.BEFORE, begin_step, False),
    f"{_RUNNER}.compute_logprobs_only": (HookType.BEFORE, begin_step, False),
    "sglang.srt.layers.sampler.apply_custom_logit_processor": (HookType.AROUND, apply, False),
    f"{_STATE}.get_internal_state": (HookType.AFTER, report, False),
}
_check()
