"""Prefix scorers trained by regression on responses with a reward: CD-FUDGE and CD-Q (Controlled Decoding).

The base model is frozen. A scorer reads its hidden states, and only the scorer learns; or it has a trunk of its own
that learns with it, and becomes a `PrefixModel`. transformers' Trainer does the rest: processes, accumulation, bf16,
checkpoints and resume.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pyengine.engine import Engine
from pyengine.errors import InputError, real, whole
from pyengine.scorers import PrefixModel, PrefixScorer
from pyengine.training.checkpoints import checkpoint_of, finished, fresh, interruptible
from pyengine.training.data import Encoded, Example, encode_all, split
from pyengine.training.states import collate_read, read_once
from pyengine.training.trunk import TrunkStudent, grouped, load_trunk
from pyengine.training.values import Batch, Method, Prefixes, Student, collate, read_prefixes, regression_loss, targets

log = logging.getLogger("pyengine")
BINS = 10  # of the calibration


@dataclass(frozen=True)
class PrefixTraining:
    """How a prefix scorer is trained.

    method: "fudge" regresses every prefix on the reward of its whole response, which wants responses of the base
    policy itself; "cd-q" on the value that the scorer expects one token later, which takes responses from anywhere.
    layer: hidden state of the model that is read, as in transformers' hidden_states. width: of the scorer.
    batch: responses in an optimiser step, over all processes and the `accumulate` parts of it. reduction: "sum" adds
    up the tokens of a response, as in the paper; "token_mean" takes their mean, so that long responses weigh no more
    than short ones. held_out: the share of the prompts (of the responses, if there is one prompt) that only the report
    uses. fixed_horizon: the reward of a response that was cut off counts as it stands, as that of its first tokens;
    without it that is no reward yet, and "fudge" takes the expected value at the cut. patience: epochs is the most, and
    training ends after so many epochs without a lower held-out loss, with the weights of the lowest; None: all epochs,
    the last weights. checkpoint_every: optimiser steps; None is an epoch. bf16: mixed precision.

    trunk: whose hidden states are read. "frozen": the base model's. "copy": a copy of the base model's decoder, which
    learns with the scorer at the learning rate trunk_lr. A directory or hub id: that checkpoint's, likewise; it needs
    the base model's vocabulary, safetensors and no code of its own.
    """

    method: Method = "fudge"
    layer: int = -1
    width: int = 128
    epochs: int = 3
    lr: float = 3e-3
    batch: int = 32
    accumulate: int = 1
    weight_decay: float = 0.01
    reduction: Literal["sum", "token_mean"] = "sum"
    bf16: bool = False
    seed: int = 0
    held_out: float = 0.05
    fixed_horizon: bool = False
    patience: int | None = None
    checkpoint_every: int | None = None
    trunk: str = "frozen"
    trunk_lr: float = 1e-5

    def __post_init__(self) -> None:
        for name, choices in (("method", ("fudge", "cd-q")), ("reduction", ("sum", "token_mean"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("width", "epochs", "batch", "accumulate"):
            whole(getattr(self, name), name, 1)
        whole(self.layer, "layer", -(2**31))
        whole(self.seed, "seed", 0, 2**32 - 1)
        if self.checkpoint_every is not None:
            whole(self.checkpoint_every, "checkpoint_every", 1)
        if self.patience is not None:
            whole(self.patience, "patience", 1)
            if not self.held_out or self.checkpoint_every is not None:
                raise InputError(
                    "patience looks at the held-out loss of each epoch: it needs held_out, no checkpoint_every"
                )
        if not isinstance(self.trunk, str) or not self.trunk:
            raise InputError(f"trunk must be frozen, copy, a directory or a hub id, got {self.trunk!r}")
        real(self.lr, "lr", 1e-12)
        real(self.trunk_lr, "trunk_lr", 1e-12)
        real(self.weight_decay, "weight_decay", 0)
        real(self.held_out, "held_out", 0, 0.9)


class Shuffled(torch.utils.data.Sampler[int]):
    """Every example once an epoch in an order that (seed, epoch) fixes, made up to whole batches by its beginning.

    Whole batches make the steps the same for any number of processes, which take turns within a batch.
    """

    def __init__(self, count: int, batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch) * self.batch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        random.Random(f"{self.seed}/{self.epoch()}").shuffle(order)
        return islice(cycle(order), len(self))


class PrefixTrainer(Trainer):
    """transformers' Trainer for a `Student` beside the frozen model that it reads, or for a `TrunkStudent`."""

    def __init__(self, base: Any, settings: PrefixTraining, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.base, self.settings = base, settings

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        # The state knows the epoch in a resumed run as well; samplers that resuming has wrapped are not told.
        epoch = lambda: int(self.state.epoch or 0)  # noqa: E731
        return Shuffled(len(self.train_dataset), self.settings.batch, self.settings.seed, epoch)  # type: ignore[arg-type]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        own = getattr(self.model, "trunk", None)
        return optimizer if own is None else grouped(optimizer, own, self.settings.trunk_lr)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        settings, student = self.settings, self.accelerator.unwrap_model(model)
        # Held-out responses have ended, and are judged by their reward: a constant bootstraps itself without a loss.
        method: Method = settings.method if model.training else "fudge"
        reward, length = inputs["reward"], inputs["length"]
        if "before" in inputs:  # read once
            p = Prefixes(**{name: inputs[name] for name in Prefixes._fields})
            value = model(p.before, p.token)
        elif isinstance(student, TrunkStudent):
            batch = Batch(**inputs)
            value, p = model(batch)
            student = student.student
            if method == "cd-q" or not bool(batch.ended.all()):
                base = read_prefixes(self.base, batch, -1, method)
                p = p._replace(ahead=base.ahead, logits=base.logits)
        else:
            p = read_prefixes(self.base, Batch(**inputs), settings.layer, method)
            value = model(p.before, p.token)
        target = targets(method, student, p, reward)
        loss = regression_loss(value, target, p.response, length, settings.reduction)
        if not bool(loss.isfinite()):
            rates = "lr" if settings.trunk == "frozen" else "lr or trunk_lr"
            raise InputError(f"training gave a loss of {loss.item()} at step {self.state.global_step}; lower {rates}")
        return loss


def train_prefix_scorer(
    engine: Engine,
    examples: Sequence[Example],
    out: str | Path,
    settings: PrefixTraining = PrefixTraining(),
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a prefix scorer for the engine's model into `out`, which `load_scorer` and the engine read; its report.

    `out` is a `PrefixScorer`, or with a trunk of its own a `PrefixModel` (config.json, head/ and model/).
    Beside it lies report.json: what was trained on what, and on held-out responses R^2, correlation and calibration
    (see `prefix_report`). Until it is finished, `out`/checkpoints holds what `resume` goes on from, to the same
    weights; of a finished run it returns the report. Under `accelerate launch` every process calls this with the same
    arguments.

    Raises InputError for examples or a trunk that cannot be used, responses that were all cut off, a layer that is not
    there, a batch that the processes cannot share, and an `out` that cannot be written or holds a scorer or checkpoints
    of an earlier run that `resume` does not ask for.
    """
    out = Path(out)
    started = time.perf_counter()
    new = fresh(out, resume)
    training, held_out, by = held_apart(encode_all(engine, examples), settings.held_out, settings.seed)
    run = {"model": engine.name, "settings": asdict(settings), "examples": len(examples), "data": _digest(training)}
    if not new:
        return finished(out, run)
    cut = sum(not item.ended for item in training)
    if settings.fixed_horizon:
        training, held_out = ([item._replace(ended=True) for item in side] for side in (training, held_out))
    known = [item.reward for item in training if item.ended]
    if not known:
        raise InputError(
            f"all {len(training)} responses to train on were cut off, and a reward counts where a response ends: let "
            "them be longer (--max-tokens), give some that ended, or count the rewards as they stand (--fixed-horizon)"
        )
    if settings.patience is not None and not any(item.ended for item in held_out):
        raise InputError("patience needs held-out responses that ended: give more, or longer ones")
    trunk, read = engine.model, engine.policy
    if settings.trunk != "frozen":
        trunk, read = load_trunk(engine, settings.trunk, [*training, *held_out])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sizes = (read.hidden_size, read.vocab_size, settings.width, settings.layer)
        scorer = PrefixScorer(*sizes, name=out.absolute().name)
        scorer.check(read)
        drawn = torch.tensor(sorted({token for item in training for token in item.ids[item.start :]}))
        student = Student(scorer, sum(known) / len(known), drawn)
    arguments = _arguments(engine, settings, out / "checkpoints")
    checkpoint = checkpoint_of(out, run, resume)
    reads = None
    if settings.trunk == "frozen" and settings.method == "fudge" and settings.epochs > 1:
        there = [*training, *held_out]
        reads = read_once(engine.model, there, settings.layer, arguments.process_index, arguments.world_size)
    data: Any = [*training, *held_out] if reads is None else reads
    judged = [one for one, item in zip(data[len(training) :], held_out, strict=True) if item.ended]
    plateau = [] if settings.patience is None else [EarlyStoppingCallback(settings.patience)]
    trainer = PrefixTrainer(
        engine.model,
        settings,
        model=student if settings.trunk == "frozen" else TrunkStudent(trunk, student),
        args=arguments,
        train_dataset=data[: len(training)],
        eval_dataset=judged if plateau else None,
        data_collator=collate if reads is None else collate_read,
        callbacks=[*plateau, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    with interruptible(out):
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    scorer = student.finished()
    report = run | {
        "cut_off": cut,
        "tokens": sum(len(item.ids) - item.start for item in training),
        "training_responses": len(training),
        "steps": outcome.global_step,
        "training_loss": outcome.training_loss,
        "epoch": _epoch_kept(trainer.state, settings),
        "held_out_by": by,
        "held_out": prefix_report(trunk, scorer, held_out),
        "processes": arguments.world_size,
        "seconds": time.perf_counter() - started,
    }
    report["warnings"] = doubted = doubts(report)
    if trainer.is_world_process_zero():
        for doubt in doubted:
            log.warning("%s", doubt)
        if settings.trunk == "frozen":
            scorer.save(out)
        else:
            PrefixModel(trunk, engine.tokenizer, scorer, scorer.name).save(out)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    PartialState().wait_for_everyone()
    return report


def _epoch_kept(state: Any, settings: PrefixTraining) -> int:
    """The epoch whose weights are kept, from 1."""
    epochs = [entry for entry in state.log_history if "eval_loss" in entry]
    if settings.patience is None or not epochs:
        return settings.epochs
    return round(min(epochs, key=lambda entry: entry["eval_loss"])["epoch"])


def doubts(report: dict[str, Any]) -> list[str]:
    """What speaks against a scorer with this report, in words; nothing of one that predicts."""
    found, said = report["held_out"], []
    cut, trained = report["cut_off"], report["training_responses"]
    if 2 * cut > trained and not report["settings"]["fixed_horizon"]:
        said.append(
            f"{cut} of {trained} responses were cut off, and only the rewards of the others are learned from: let them "
            "be longer (--max-tokens), or count the rewards as they stand (--fixed-horizon)"
        )
    if found["r2"] is not None and found["r2"] < 0:
        said.append(
            f"held-out R² is {found['r2']:.2f}: the mean reward predicts better than this scorer; draw more responses, "
            "train for fewer epochs (--patience), or read another layer"
        )
    elif found["responses"] and found["r2"] is None:
        said.append("held-out R² is unknown: the rewards, or the values, are all equal")
    elif found["cut_off"] and not found["responses"]:
        said.append("held-out R² is unknown: every held-out response was cut off")
    return said


def held_apart(items: Sequence[Encoded], share: float, seed: int) -> tuple[list[Encoded], list[Encoded], str]:
    """(training, held out, "prompt" or "response"): a share of the prompts, or of the responses to a single prompt."""
    if not items:
        raise InputError("no examples to train on")
    by = "prompt" if len({item.prompt for item in items}) > 1 else "response"
    keys: Sequence[Any] = [item.prompt for item in items] if by == "prompt" else range(len(items))
    training, held_out = split(keys, share if len(items) > 1 else 0.0, seed)
    return [items[i] for i in training], [items[i] for i in held_out], by


@torch.no_grad()
def prefix_report(model: Any, scorer: PrefixScorer, items: Sequence[Encoded], batch: int = 32) -> dict[str, Any]:
    """How well V(y^t) predicts the reward of y, over all prefixes of the responses that ended.

    r2, correlation; calibration: in ten equal parts of the prefixes by V, the mean V and the mean reward;
    calibration_error: the mean distance of the two; slope: of the reward on V, 1 if it is calibrated. None where there
    is nothing to say: no responses, or rewards that are all equal.
    """
    ended = [item for item in items if item.ended]
    report: dict[str, Any] = {"responses": len(ended), "cut_off": len(items) - len(ended)}
    values, rewards = [torch.empty(0)], [torch.empty(0)]
    for start in range(0, len(ended), batch):
        b = Batch(**{k: v.to(model.device) for k, v in collate(ended[start : start + batch]).items()})
        p = read_prefixes(model, b, scorer.layer)
        values.append(scorer.values_at(p.before, p.token).float().cpu())
        rewards.append(b.reward[p.response].cpu())
    v, r = torch.cat(values).double(), torch.cat(rewards).double()
    report["prefixes"] = len(v)
    varied = len(v) > 1 and r.std() > 0 and v.std() > 0
    report["r2"] = 1 - float((r - v).square().sum() / (r - r.mean()).square().sum()) if varied else None
    covariance = float(((v - v.mean()) * (r - r.mean())).sum()) if varied else 0.0
    report["correlation"] = covariance / float((len(v) - 1) * v.std() * r.std()) if varied else None
    report["slope"] = covariance / float((v - v.mean()).square().sum()) if varied else None
    parts = [part for part in v.argsort().tensor_split(BINS) if len(part)]
    report["calibration"] = [
        {"value": float(v[i].mean()), "reward": float(r[i].mean()), "prefixes": len(i)} for i in parts
    ]
    distance = sum(len(i) * abs(float(v[i].mean() - r[i].mean())) for i in parts)
    report["calibration_error"] = distance / len(v) if len(v) else None
    return report


def _arguments(engine: Engine, settings: PrefixTraining, directory: Path) -> TrainingArguments:
    """What Trainer is told; the batch is shared by processes and accumulation, so that any number does the same."""
    cpu = engine.policy.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(directory),
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        restore_callback_states_from_checkpoint=True,  # how many epochs the plateau has lasted
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0,  # a sum over tokens is large at every step; AdamW does not mind its scale
        bf16=settings.bf16,
        logging_steps=0.1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.checkpoint_every else "epoch",
        eval_strategy="no" if settings.patience is None else "epoch",
        per_device_eval_batch_size=settings.batch,
        load_best_model_at_end=settings.patience is not None,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_steps=settings.checkpoint_every or 500,
        save_total_limit=2,  # a run that is killed while it writes one goes on from the other
        disable_tqdm=not sys.stderr.isatty(),
        report_to=[],
        use_cpu=cpu,
        ddp_find_unused_parameters=settings.trunk != "frozen",  # those above the layer that is read
        dataloader_pin_memory=not cpu,
        seed=settings.seed,
        remove_unused_columns=False,
    )
    if (arguments.device.type != "cpu") if cpu else (arguments.device != engine.policy.device):
        raise InputError(f"this process trains on {arguments.device}, the model is on {engine.policy.device}")
    shares = arguments.world_size * settings.accumulate
    if settings.batch % shares:
        raise InputError(
            f"a batch of {settings.batch} responses cannot be shared by {arguments.world_size} processes that "
            f"accumulate {settings.accumulate} parts each; make it a multiple of {shares}"
        )
    arguments.per_device_train_batch_size = settings.batch // shares
    arguments._n_gpu = 1  # one process, one device; more need `accelerate launch`
    return arguments


def _digest(items: Sequence[Encoded]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr((item.ids, item.start, item.reward, item.ended)).encode())
    return digest.hexdigest()
