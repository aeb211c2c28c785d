"""One run that trains a policy: its settings, its model, what TRL is told, and what is left where it ends."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from pyengine.checkpoint import load_checkpoint
from pyengine.errors import InputError, first_line, real, whole
from pyengine.integrations.trl import UnpairedConfig
from pyengine.jsonl import read_file
from pyengine.training.checkpoints import FREE, checkpoint_of, finished, fresh, interruptible
from pyengine.training.shards import digest_of

EVAL_BATCH = 8  # of a process; one that followed from `accumulate` would change the means over batches
NOT_SAVED = ("training_args.bin",)  # a pickle


@dataclass(frozen=True)
class PolicyTraining:
    """How a policy is trained.

    batch: pairs or responses in an optimiser step, over all processes and the `accumulate` parts of it; an epoch's last
    is made up from its beginning (but for KTO, whose order and z0 depend on the parts). max_length:
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


class Run:
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
