"""From a file of examples to the directory of a policy: the runs behind `pyengine train preference` and `offline`."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from pyengine.checkpoint import load_checkpoint
from pyengine.codec import PromptKey
from pyengine.errors import InputError, first_line, real, whole
from pyengine.integrations.trl import PreferenceConfig, PreferenceTrainer, UnpairedConfig, UnpairedTrainer
from pyengine.integrations.trl.offline import OfflineConfig, OfflineTrainer, weights_of
from pyengine.integrations.trl.options import REFERENCE_FREE
from pyengine.jsonl import raise_all, read_file
from pyengine.losses import Clamp, Variant
from pyengine.rewards import Statistics
from pyengine.rewards.conditioning import OPENRLHF, Conditioning
from pyengine.training.checkpoints import FREE, checkpoint_of, finished, fresh, interruptible
from pyengine.training.data import Example, encode, read_examples, split
from pyengine.training.examples import Labelled, Pair, read_preferences
from pyengine.training.prefix import Shuffled
from pyengine.training.shards import digest_of
from pyengine.training.texts import Texts

log = logging.getLogger("pyengine")

Loss = Literal["dpo", "ipo", "hinge", "simpo", "orpo", "kto"]
EVAL_BATCH = 8  # of a process; one that followed from `accumulate` would change the means over batches
NOT_SAVED = ("training_args.bin",)  # a pickle


class _WholeBatches:
    """Goes through the data as `Shuffled` does, so that a step is the same for any number of processes and parts.

    TRL's own last batch would have parts of unequal size, which count alike, and rows twice where processes share it.
    """

    args: Any
    state: Any
    train_dataset: Any

    def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.Sampler:
        args, epoch = self.args, lambda: int(self.state.epoch or 0)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return Shuffled(len(self.train_dataset), batch, args.seed, epoch)


class _Preference(_WholeBatches, PreferenceTrainer):
    pass


class _Offline(_WholeBatches, OfflineTrainer):
    pass


@dataclass(frozen=True)
class PolicyTraining:
    """How a policy is trained.

    batch: pairs or responses in an optimiser step, over all processes and the `accumulate` parts of it; an epoch's last
    is made up from its beginning (but for KTO, whose order and z0 hang on the parts). max_length:
    tokens of prompt and response that are read, at most the model's context; what is longer is cut at its end.
    lora: rank of adapters on all linear layers but the head, scaled by 2 (alpha = 2 rank); None trains all weights.
    held_out: the share of the prompts that only the report uses. checkpoint_every: optimiser steps; None is an epoch.
    bf16: mixed precision.
    """

    lr: float
    epochs: float = 1.0
    batch: int = 128
    accumulate: int = 16
    max_length: int = 1024
    lora: int | None = None
    held_out: float = 0.05
    bf16: bool = False
    seed: int = 0
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        real(self.lr, "lr", 1e-12)
        real(self.epochs, "epochs", 1e-12)
        real(self.held_out, "held_out", 0, 0.9)
        for name in ("batch", "accumulate"):
            whole(getattr(self, name), name, 1)
        whole(self.max_length, "max_length", 2)
        whole(self.seed, "seed", 0, 2**32 - 1)
        for name in ("lora", "checkpoint_every"):
            if getattr(self, name) is not None:
                whole(getattr(self, name), name, 1)


def train_preference(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    loss: Loss = "dpo",
    weights: str = "sampled",
    variant: str | None = None,
    clamp: str | None = None,
    beta: float | None = None,
    training: PolicyTraining = PolicyTraining(lr=5e-7),
    resume: bool = False,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a policy on preferences into `out`, by default as WPO does; the report, which is out/report.json too.

    model: directory or hub id, safetensors only; it is the reference policy as well. The directory of an adapter is
    merged with its base, and all weights are trained; with training.lora it is refused. data: JSONL, a line
    {"prompt", "chosen", "rejected"}, or for "kto" {"prompt", "response", "label"} too; a pair of equal texts is refused
    as `read_preferences` does, one whose tokens are equal within max_length is left out and counted. weights, variant,
    clamp: as in `PreferenceConfig` ("kto" takes weights alone). beta: None is the default of the loss there.

    `out` gets the weights, config and tokenizer, or with training.lora the adapter. Until it is finished,
    out/checkpoints holds what `resume` goes on from; of a finished run it returns the report. An `out` that holds a
    model without checkpoints is refused. held_out of the report has means over batches of 8 of each process, in which
    an incomplete batch counts as a whole one and, with several processes, up to a batch of rows comes twice; z0 of kto
    is of each such batch. Under `accelerate launch` every process calls this with the same
    arguments.

    Raises InputError for options and files that cannot be used, naming file and line.
    """
    if loss not in get_args(Loss):
        raise InputError(f"loss must be one of {', '.join(get_args(Loss))}, got {loss!r}")
    if loss == "kto" and not (variant is None and clamp is None):
        raise InputError(f"{'variant' if clamp is None else 'clamp'} is of pairs; kto has weights of single responses")
    for name, value, known in (("variant", variant, get_args(Variant)), ("clamp", clamp, get_args(Clamp))):
        if value is not None and value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if value is not None and weights == "off":
            raise InputError(f"{name} (--{name}) is read only with weights, which are off: leave one of the two out")
    details = {"weight_variant": variant, "weight_clamp": clamp}
    options: dict[str, Any] = {"weights": weights, "beta": beta} | details
    options = {name: value for name, value in options.items() if value is not None}
    kind: Any = UnpairedConfig if loss == "kto" else PreferenceConfig
    if loss != "kto":
        options["loss_type"] = ["sigmoid" if loss == "dpo" else loss]
    examples = read_preferences(data)
    if loss != "kto" and not isinstance(examples[0], Pair):
        raise InputError(f"{data}: loss {loss!r} needs pairs, lines {{'prompt', 'chosen', 'rejected'}}")
    run = _Run(model, data, out, training, {"loss": loss} | options, resume, trust_remote_code)
    if run.finished is not None:
        return run.finished
    texts = Texts.of(run.policy, run.tokenizer, Path(model).name)
    texts.codec.context = None  # what is longer is cut
    rows, faults = [], []
    for example in examples:
        try:
            rows.append(_tokens(texts, example, run.limit, loss == "kto"))
        except InputError as error:
            faults.append(str(error))
    raise_all(faults, len(examples), "lines")
    train, test = split([e.prompt for e in examples], training.held_out, training.seed)
    parts = [[row for i in part for row in rows[i]] for part in (train, test)]
    if loss == "kto":  # its trainer goes through them in the order in which they come
        for part in parts:
            random.Random(training.seed).shuffle(part)
        if len(parts[1]) == 1:
            raise InputError(
                "held_out (--held-out): a single response would be held out, and z0 of kto needs two: give 0, or a "
                "greater share"
            )
    config = run.config(kind, **options)
    needs_reference = training.lora is None and loss not in REFERENCE_FREE
    trainer_kind: Any = UnpairedTrainer if loss == "kto" else _Preference
    trainer = trainer_kind(
        run.policy,
        run.load()[0] if needs_reference else None,
        config,
        train_dataset=Dataset.from_list(parts[0]),
        eval_dataset=Dataset.from_list(parts[1]) if parts[1] else None,
        processing_class=run.tokenizer,
        peft_config=run.adapter(),
        callbacks=list(callbacks),
    )
    responses = ("completion_ids",) if loss == "kto" else ("chosen_ids", "rejected_ids")
    kept = trainer.train_dataset
    report = {
        "examples": len(examples),
        "train": len(kept),
        "same_tokens": len(parts[0]) - len(kept),
        "cut": sum(len(row["prompt_ids"]) + max(len(row[key]) for key in responses) > run.limit for row in kept),
        "beta": config.beta,
    }
    return run.finish(trainer, report, ("checkpoint_every",) if loss == "kto" else FREE)


def _tokens(texts: Any, example: Pair | Labelled, limit: int, single: bool) -> list[dict[str, Any]]:
    """The example's rows in the engine's tokens: TRL drops a prompt's last token where one would span the border."""

    def ids(response: str) -> tuple[list[int], list[int]]:
        found = encode(texts, Example(example.prompt, response, 0.0, where=example.where))
        return found.ids[: found.start], found.ids[found.start :]

    if isinstance(example, Labelled):
        responses = [(example.response, example.label > 0.5)]
    else:
        responses = [(example.chosen, True), (example.rejected, False)]
    known = [ids(text) for text, _ in responses]
    prompt = known[0][0]
    if len(prompt) >= limit:
        raise InputError(
            f"{example.where}: the prompt has {len(prompt)} tokens, which leaves no room for a response within {limit}"
        )
    if not single:
        return [{"prompt_ids": prompt, "chosen_ids": known[0][1], "rejected_ids": known[1][1]}]
    return [
        {"prompt_ids": prompt, "completion_ids": response, "label": label}
        for (_, response), (_, label) in zip(known, responses, strict=True)
    ]


def train_offline(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    method: str = "rwr",
    beta: float | None = None,
    threshold: float | None = None,
    cap: float | None = None,
    template: str | None = None,
    reduction: str = "sum",
    training: PolicyTraining = PolicyTraining(lr=5e-6),
    resume: bool = False,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a policy on responses with rewards into `out` (2308.12050); the report, which is out/report.json too.

    data: JSONL, a line {"prompt", "response", "reward"}, as `read_examples` takes it; "sft" reads no reward. method,
    beta, threshold, cap, reduction: as in `OfflineConfig`; gradients are clipped to a norm of 1 with "token_mean", and
    not with "sum". template: of "ca", "paper" (the default), "openrlhf" or a file that `Conditioning.save` wrote. The
    statistics of the training rewards, and the template, lie in `out` as reward_statistics.json and conditioning.json.
    The rest is as for `train_preference`.
    """
    for name, value, reader in (("template", template, "ca"), ("cap", cap, "rwr")):
        if value is not None and method != reader:
            raise InputError(f"{name} is read by method {reader!r}, not by {method!r}")
    options: dict[str, Any] = {"method": method, "beta": beta, "threshold": threshold, "weight_cap": cap}
    options = {name: value for name, value in options.items() if value is not None} | {"reduction": reduction}
    conditioning = _conditioning(template) if method == "ca" else None
    settings = options if conditioning is None else options | {"template": asdict(conditioning)}
    run = _Run(model, data, out, training, settings, resume, trust_remote_code)
    if run.finished is not None:
        return run.finished
    # A sum over a response's tokens is large at every step: clipped to a norm of 1, all steps would be equally long.
    config = run.config(OfflineConfig, max_grad_norm=0.0 if reduction == "sum" else 1.0, **options)
    texts: Any = Texts.of(run.policy, run.tokenizer, Path(model).name)
    examples = read_examples(data, texts, rewarded=method != "sft")
    train, test = split([e.prompt for e in examples], training.held_out, training.seed)
    statistics = None if method == "sft" else Statistics.of([examples[i].reward for i in train])
    parts = [
        [
            {
                "prompt": e.prompt,
                "keyed": isinstance(e.prompt, PromptKey),
                "completion": e.response,
                "reward": e.reward,
                "tokens": e.tokens,
                "ended": e.ended,
                "where": e.where,
            }
            for e in (examples[i] for i in part)
        ]
        for part in (train, test)
    ]
    trainer: Any = _Offline(
        run.policy,
        config,
        train_dataset=Dataset.from_list(parts[0]),
        eval_dataset=Dataset.from_list(parts[1]) if parts[1] else None,
        statistics=statistics,
        conditioning=conditioning,
        processing_class=run.tokenizer,
        peft_config=run.adapter(),
        callbacks=list(callbacks),
    )
    report: dict[str, Any] = {
        "examples": len(examples),
        "train": len(trainer.train_dataset),
        "prompts_too_long": len(train) - len(trainer.train_dataset),
        "cut": trainer.cut,
    }
    if statistics is not None:
        z = torch.tensor(statistics.z([examples[i].reward for i in train]))
        weight = weights_of(z, method, config.beta, config.threshold, config.weight_cap)
        report |= {
            "statistics": asdict(statistics),
            "retained": (weight > 0).double().mean().item(),
            "mean_z": (weight * z).sum().item() / max(weight.sum().item(), 1e-12),
            "effective_share": (weight.sum() ** 2 / weight.square().sum().clamp(min=1e-12)).item() / len(weight),
        }
    return run.finish(trainer, report)


def _conditioning(template: str | None) -> Conditioning:
    if template in (None, "paper"):
        return Conditioning()
    assert template is not None
    return OPENRLHF if template == "openrlhf" else Conditioning.load(template)


class _Run:
    """What both runs share: the policy, TRL's settings, the checkpoint to go on from, and what is left in `out`."""

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        out: str | Path,
        training: PolicyTraining,
        options: Mapping[str, Any],
        resume: bool,
        trust_remote_code: bool,
    ) -> None:
        self.started = time.perf_counter()
        # Absolute: an adapter stores where its base is, and is not always loaded from the same directory.
        self.model = Path(model).resolve() if Path(model).is_dir() else model
        self.out, self.training, self.resume = Path(out), training, resume
        self.trust_remote_code = trust_remote_code
        self.about = {
            "model": str(self.model),
            "data": digest_of(read_file(data)),
            "settings": asdict(training) | dict(options),
        }
        self.finished = self._finished()
        if self.finished is not None:
            return
        self.policy, self.tokenizer = self.load()
        if self.tokenizer.eos_token is None:
            raise InputError(f"model {model}: its tokenizer has no EOS token, and a response must end with one")
        context = getattr(self.policy.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.limit = min(training.max_length, context or training.max_length)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()

    def _finished(self) -> dict[str, Any] | None:
        """The report of this very run, if `out` holds it whole; InputError for what training there would overwrite."""
        if self.out.resolve() == self.model:
            raise InputError(f"{self.out} is the model that is trained: give another directory for the result")
        return None if fresh(self.out, self.resume) else finished(self.out, self.about)

    def load(self) -> tuple[Any, Any]:
        """In fp32: an update at these rates is lost in bf16, whose steps near 0.1 are 5e-4. Adapters are merged."""
        how: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "dtype": torch.float32}
        adapted = f"model {self.model}: an adapter"
        config = Path(self.model) / "adapter_config.json"
        if not config.is_file():
            model, tokenizer = load_checkpoint(AutoModelForCausalLM, "model", self.model, **how)
            if getattr(model, "_hf_peft_config_loaded", False):
                raise InputError(f"{adapted}; download it, and give its directory")
            return model, tokenizer
        if self.training.lora is not None:
            raise InputError(
                f"{adapted}, and another would be stored without it: merge it into its base first (peft: "
                "merge_and_unload, then save_pretrained), or train all weights, without lora"
            )
        if not config.with_name("adapter_model.safetensors").is_file():
            raise InputError(f"{adapted} without adapter_model.safetensors")
        try:
            base = str(json.loads(config.read_bytes())["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{adapted}, whose {config.name} names no base") from error
        model, tokenizer = load_checkpoint(AutoModelForCausalLM, f"{adapted}; its base", base, **how)
        if config.with_name("tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)
        try:
            merged: Any = PeftModel.from_pretrained(model, str(self.model)).merge_and_unload()
        except Exception as error:  # of another shape, of a kind that cannot be merged, of another peft
            raise InputError(f"{adapted} that does not go into {base}: {first_line(error)}") from error
        return merged.requires_grad_(True), tokenizer  # peft has frozen the base

    def config(self, kind: Any, **options: Any) -> Any:
        """TRL's settings; the batch is shared by processes and accumulation, so that any number does the same."""
        training, gpu = self.training, torch.cuda.is_available()
        settings: dict[str, Any] = {
            "output_dir": str(self.out / "checkpoints"),
            "learning_rate": training.lr,
            "num_train_epochs": training.epochs,
            "gradient_accumulation_steps": training.accumulate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,  # a share of all steps
            "bf16": training.bf16,
            "gradient_checkpointing": gpu,
            "max_length": self.limit,
            "logging_steps": 0.1,
            "logging_nan_inf_filter": False,
            "save_strategy": "steps" if training.checkpoint_every else "epoch",
            "save_steps": training.checkpoint_every or 500,
            "save_total_limit": 2,  # a run that is killed while it writes one goes on from the other
            "disable_tqdm": not sys.stderr.isatty(),
            "report_to": "none",
            "dataloader_pin_memory": gpu,
            "seed": training.seed,
        }
        config = kind(**settings | options)
        shares = config.world_size * training.accumulate
        each = training.batch // shares
        if training.batch % shares:
            raise InputError(
                f"a batch of {training.batch} cannot be shared by {config.world_size} processes that accumulate "
                f"{training.accumulate} parts each; make it a multiple of {shares}"
            )
        if issubclass(kind, UnpairedConfig) and each < 2:
            raise InputError(
                f"batch (--batch): {training.batch} in {shares} parts leaves one response a part, and z0 of kto needs "
                f"two: give at least {2 * shares}, or fewer parts (--accumulate)"
            )
        config.per_device_train_batch_size = each
        config.per_device_eval_batch_size = EVAL_BATCH
        config._n_gpu = 1  # one process, one device; more need `accelerate launch`
        return config

    def adapter(self) -> LoraConfig | None:
        rank = self.training.lora
        if rank is None:
            return None
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def finish(self, trainer: Any, report: dict[str, Any], free: tuple[str, ...] = FREE) -> dict[str, Any]:
        """Train, evaluate, save and report; free: settings with which a run may go on."""
        trainer.remove_callback(PrinterCallback)  # stdout is for results
        checkpoint = checkpoint_of(self.out, self.about, self.resume, free)
        with interruptible(self.out):
            outcome = trainer.train(resume_from_checkpoint=checkpoint)
        held_out = trainer.evaluate() if trainer.eval_dataset is not None else {}
        trainer.save_model(str(self.out))
        speeds = ("runtime", "samples_per_second", "steps_per_second")
        report = self.about | report
        report |= {
            "steps": outcome.global_step,
            "training_loss": outcome.training_loss,
            "held_out": {k.removeprefix("eval_"): v for k, v in held_out.items() if not k.endswith((*speeds, "epoch"))},
            "processes": trainer.args.world_size,
            "seconds": time.perf_counter() - self.started,
        }
        if trainer.is_world_process_zero():
            for name in NOT_SAVED:
                (self.out / name).unlink(missing_ok=True)
            (self.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        PartialState().wait_for_everyone()
        return report
