"""Training of reward models through TRL: Bradley-Terry on pairs, or a pointwise classifier on labels."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from trl import RewardConfig, RewardTrainer

from pyengine.errors import InputError, first_line, real
from pyengine.evaluation.calibration import evaluate
from pyengine.scorers import RewardModel
from pyengine.scorers.reward_model import FORM
from pyengine.training.data import split
from pyengine.training.examples import Labelled, Pair, read_preferences
from pyengine.training.shards import unused

REPORT = "reward_model.json"


class PointwiseTrainer(RewardTrainer):
    """TRL's RewardTrainer on single responses: binary cross-entropy of the logit with a label of 0 or 1.

    The utility of such a model is log sigmoid of its logit (Controlled Decoding, the HH reward). Rows hold input_ids
    and labels; everything but the loss is TRL's.
    """

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # tokens already; TRL's own would look for pairs

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "labels"]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels").float()
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, 0].float()
        right = self.accelerator.gather_for_metrics(((logits > 0) == (labels > 0.5)).float())
        self._metrics["train" if model.training else "eval"]["accuracy"].append(right.mean().item())
        loss = binary_cross_entropy_with_logits(logits, labels)
        return (loss, outputs) if return_outputs else loss


def train_reward_model(
    model: str | Path,
    data: str | Path | Sequence[Pair] | Sequence[Labelled],
    out: str | Path,
    *,
    args: RewardConfig | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    trust_remote_code: bool = False,
    **trainer: Any,
) -> dict[str, Any]:
    """Train `model` on preferences or labels; `out` then loads with `pyengine.RewardModel.from_pretrained`.

    Args:
        model: directory or hub id of a sequence classifier with one output, or of a language model, which gets a new
            scoring head. data: examples, or a JSONL file of {"prompt", "chosen", "rejected"} or
            {"prompt", "response", "label"}; see `read_preferences`. The text prompt + response is read as the scorer
            will read it: no EOS is added, because a classifier that pads with EOS would not see it.
        args: TRL's RewardConfig; None is `default_config`. With args, checkpoints go where they say.
        held_out: share of the prompts for the report and the choice of the checkpoint; seed: of that split.
        trainer: handed to TRL's trainer: peft_config (adapters are merged before saving), callbacks, optimizers.

    Returns the report that is also written to reward_model.json: accuracy, margin, loss and calibration on the
    held-out prompts, of the checkpoint as it was saved.
    Raises InputError, naming the example, for examples that cannot be used or are longer than the model or
    args.max_length allows, and where `out` cannot be written, or holds a model or reward-model-checkpoints of an
    earlier run.
    """
    unused(Path(out))
    examples: Sequence[Any] = read_preferences(data) if isinstance(data, (str, Path)) else list(data)
    if not examples:
        raise InputError("train_reward_model: no examples")
    _check(examples)
    train, test = split([e.prompt for e in examples], held_out, seed)
    if args is not None and args.center_rewards_coefficient is not None and isinstance(examples[0], Labelled):
        raise InputError("train_reward_model: center_rewards_coefficient needs pairs")
    scorer = _start(model, seed, trust_remote_code)
    limit = scorer.longest
    if args is not None and args.max_length is not None:  # TRL leaves longer pairs out without a word
        limit = min(limit, args.max_length)
    rows = [_tokens(scorer, e, limit) for e in examples]
    with contextlib.ExitStack() as stack:
        config = args
        if config is None:
            config = default_config(stack.enter_context(scratch(out)), evaluate=len(test) > 0, seed=seed)
        _fit(scorer, [rows[i] for i in train], [rows[i] for i in test], config, Path(out), **trainer)
    report: dict[str, Any] = {
        "kind": "pairwise" if isinstance(examples[0], Pair) else "pointwise",
        "base": str(model),
        "train": len(train),
        "held_out": len(test),
    }
    if config.process_index == 0:
        if len(test):
            report |= evaluate(RewardModel.from_pretrained(out, trust_remote_code), [examples[i] for i in test])
        (Path(out) / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


@contextlib.contextmanager
def scratch(out: str | Path) -> Iterator[Path]:
    """A directory for checkpoints in `out`, which all processes see; it is gone afterwards.

    Raises InputError where it is there already: it may be somebody's.
    """
    directory = Path(out) / "reward-model-checkpoints"
    main = int(os.environ.get("RANK", "0")) == 0  # before TRL has set up the processes
    if main and directory.exists():
        raise InputError(f"{directory} is there already, perhaps of a run that was killed: remove it, or change out")
    try:
        yield directory
    finally:
        if main:
            shutil.rmtree(directory, ignore_errors=True)


def default_config(directory: str | Path, evaluate: bool = True, **changes: Any) -> RewardConfig:
    """One epoch of batches of 128 at a rate of 9e-6; the checkpoint of best held-out accuracy, of ten, is kept.

    A batch is accumulated from eights. `changes` are any of TRL's settings.
    """
    gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "learning_rate": 9e-6,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 16,
        "bf16": gpu,
        "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
        "max_length": None,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": not sys.stderr.isatty(),
    }
    if evaluate:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": 0.1,
            "save_strategy": "steps",
            "save_steps": 0.1,
            "save_total_limit": 1,
            "save_only_model": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_accuracy",
        }
    return RewardConfig(output_dir=str(directory), **settings | changes)


def _start(path: str | Path, seed: int, trust_remote_code: bool) -> RewardModel:
    """The model to be trained in fp32; only a scoring head may be missing from its checkpoint."""
    torch.manual_seed(seed)  # of a new head
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"reward model {path}: {first_line(error)}") from error
    body = f"{model.base_model_prefix}."
    lacking = sorted(key for key in found["missing_keys"] if key.startswith(body) and "pooler" not in key)
    if lacking:
        raise InputError(f"reward model {path}: the checkpoint lacks {len(lacking)} weights, {lacking[0]!r} among them")
    # Pads do not matter to a score, but TRL pads, and transformers' head looks for the last token that is none.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"reward model {path}: its tokenizer has neither a padding nor an EOS token")
    tokenizer.padding_side, model.config.pad_token_id = "right", tokenizer.pad_token_id
    scorer = RewardModel(model, tokenizer, Path(path).name)
    setattr(model.config, FORM, {"form": scorer.form, "final_eos": scorer.final_eos})
    return scorer


def _check(examples: Sequence[Any]) -> None:
    """All examples are of one kind, and labels in 0 .. 1."""
    for i, example in enumerate(examples):
        if not isinstance(example, (Pair, Labelled)):
            raise InputError(f"train_reward_model: example {i} is neither a Pair nor a Labelled: {example!r:.60}")
        if type(example) is not type(examples[0]):
            kinds = [type(e).__name__ for e in (example, examples[0])]
            raise InputError(f"{example.where}: a {kinds[0]} among examples of kind {kinds[1]}; train on one kind")
        if isinstance(example, Labelled):
            real(example.label, f"{example.where}: the label", 0, 1)


def _tokens(scorer: RewardModel, example: Pair | Labelled, limit: float) -> dict[str, Any]:
    """The columns that the trainer reads, tokenised as RewardModel.score does."""

    def ids(response: str) -> list[int]:
        found, segments = scorer.read(example.prompt, response)
        if segments:
            raise InputError(f"reward model {scorer.name!r}: pairs of segments are not trained on: form text or chat")
        if found[-1] == scorer.tokenizer.pad_token_id:
            raise InputError(
                f"{example.where}: ends with the padding token {scorer.tokenizer.pad_token!r}, which training would "
                "take for padding: give the tokenizer a padding token of its own"
            )
        if len(found) > limit:
            whose = f"reward model {scorer.name!r} reads" if limit == scorer.longest else "max_length is"
            raise InputError(f"{example.where}: has {len(found)} tokens, {whose} {limit}; shorten it or leave it out")
        return found

    if isinstance(example, Pair):
        return {"chosen_ids": ids(example.chosen), "rejected_ids": ids(example.rejected)}
    return {"input_ids": ids(example.response), "labels": float(example.label)}


def _fit(
    scorer: RewardModel, train: list[dict], test: list[dict], args: RewardConfig, out: Path, **trainer: Any
) -> None:
    """Run TRL's trainer and save what it made: model.safetensors, config and tokenizer."""
    options: dict[str, Any] = dict(trainer)
    kind = RewardTrainer if "chosen_ids" in train[0] else PointwiseTrainer
    if kind is PointwiseTrainer:
        options.setdefault("data_collator", DataCollatorWithPadding(scorer.tokenizer))
    run = kind(
        model=scorer.model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test) if test else None,
        processing_class=scorer.tokenizer,
        **options,
    )
    run.train()
    trained: Any = run.model
    if hasattr(trained, "merge_and_unload"):  # LoRA
        run.model = trained.merge_and_unload()
    run.save_model(str(out))
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle
