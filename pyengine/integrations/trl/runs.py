"""From a file of examples to the directory of a policy: the runs behind `pyengine train preference` and `offline`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from transformers import TrainerCallback

from pyengine.codec import PromptKey
from pyengine.errors import InputError
from pyengine.integrations.trl import PreferenceConfig, PreferenceTrainer, UnpairedConfig, UnpairedTrainer
from pyengine.integrations.trl.offline import OfflineConfig, OfflineTrainer, weights_of
from pyengine.integrations.trl.options import REFERENCE_FREE
from pyengine.integrations.trl.run import PolicyTraining, Run
from pyengine.jsonl import raise_all
from pyengine.losses import Clamp, Variant
from pyengine.rewards import Statistics
from pyengine.rewards.conditioning import OPENRLHF, Conditioning
from pyengine.training.checkpoints import FREE
from pyengine.training.data import Example, encode, read_examples, split
from pyengine.training.examples import Labelled, Pair, read_preferences
from pyengine.training.prefix import Shuffled
from pyengine.training.texts import Texts

AS_WPO, AS_OFFLINE = PolicyTraining(lr=5e-7), PolicyTraining(lr=5e-6)
Loss = Literal["dpo", "ipo", "hinge", "simpo", "orpo", "kto"]


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


def train_preference(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    loss: Loss = "dpo",
    weights: str = "sampled",
    variant: str | None = None,
    clamp: str | None = None,
    beta: float | None = None,
    training: PolicyTraining = AS_WPO,
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
    run = Run(model, data, out, training, {"loss": loss} | options, resume, trust_remote_code)
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
    training: PolicyTraining = AS_OFFLINE,
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
    run = Run(model, data, out, training, settings, resume, trust_remote_code)
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
