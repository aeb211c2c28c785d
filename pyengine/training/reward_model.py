"""Training of reward models through TRL: Bradley-Terry on pairs, or a pointwise classifier on labels."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from trl import RewardConfig, RewardTrainer

from pyengine.errors import InputError, first_line
from pyengine.scorers import Candidates, RewardModel
from pyengine.training.embeddings import numbered
from pyengine.training.examples import Pair, Scored, read_examples
from pyengine.training.probe import split

REPORT = "reward_model.json"
BINS = 10


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
    data: str | Path | Sequence[Pair] | Sequence[Scored],
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
            {"prompt", "response", "label"}; see `read_examples`. The text prompt + response is read as the scorer
            will read it: no EOS is added, because a classifier that pads with EOS would not see it.
        args: TRL's RewardConfig; None is `default_config`. With args, checkpoints go where they say.
        held_out: share of the prompts for the report and the choice of the checkpoint; seed: of that split.
        trainer: handed to TRL's trainer: peft_config (adapters are merged before saving), callbacks, optimizers.

    Returns the report that is also written to reward_model.json: accuracy, margin, loss and calibration on the
    held-out prompts, of the checkpoint as it was saved.
    Raises InputError, naming file:line, for examples that cannot be used or are longer than the model reads.
    """
    examples: Sequence[Any] = read_examples(data, "label") if isinstance(data, (str, Path)) else list(data)
    if not examples:
        raise InputError("train_reward_model: no examples")
    train, test = split(numbered([e.prompt for e in examples]), held_out, torch.Generator().manual_seed(seed))
    if args is not None and args.center_rewards_coefficient is not None and isinstance(examples[0], Scored):
        raise InputError("train_reward_model: center_rewards_coefficient needs pairs")
    scorer = _start(model, seed, trust_remote_code)
    rows = [_tokens(scorer, e) for e in examples]
    scratch = Path(out) / "checkpoints"  # one that all processes see
    config = args or default_config(scratch, evaluate=len(test) > 0, seed=seed)
    _fit(scorer, [rows[i] for i in train], [rows[i] for i in test], config, Path(out), **trainer)
    report: dict[str, Any] = {
        "kind": "pairwise" if isinstance(examples[0], Pair) else "pointwise",
        "base": str(model),
        "train": len(train),
        "held_out": len(test),
    }
    if config.process_index == 0:
        if args is None:
            shutil.rmtree(scratch, ignore_errors=True)
        if len(test):
            report |= evaluate(RewardModel.from_pretrained(out, trust_remote_code), [examples[i] for i in test])
        (Path(out) / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


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
        "max_length": None,  # TRL would leave longer ones out without a word; here they are refused by line
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
    return RewardModel(model, tokenizer, Path(path).name)


def _tokens(scorer: RewardModel, example: Pair | Scored) -> dict[str, Any]:
    """The columns that the trainer reads, tokenised as RewardModel.score does."""

    def ids(response: str) -> list[int]:
        found = scorer.tokenizer(example.prompt + response, verbose=False).input_ids
        if len(found) > scorer.longest:
            raise InputError(
                f"{example.where}: has {len(found)} tokens, reward model {scorer.name!r} reads {scorer.longest}; "
                "shorten it or leave it out"
            )
        return found

    if isinstance(example, Pair):
        return {"chosen_ids": ids(example.chosen), "rejected_ids": ids(example.rejected)}
    return {"input_ids": ids(example.response), "labels": example.value}


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


@torch.inference_mode()
def evaluate(scorer: RewardModel, examples: Sequence[Pair] | Sequence[Scored]) -> dict[str, Any]:
    """Accuracy, margin, loss and calibration of a reward model on examples, scored as the engine scores them.

    Pairs: accuracy is the share with r_w > r_l (a tie is wrong), margin the mean of r_w - r_l, and the confidence in
    the preferred side sigmoid(|r_w - r_l|). Labels: accuracy at a logit of 0, margin the difference of the classes'
    mean logits (NaN with one class), confidence likewise in the predicted class.
    """

    def scores(responses: Sequence[str]) -> Tensor:
        prompts, tokens = [e.prompt for e in examples], [[0]] * len(examples)
        return scorer.score(Candidates(prompts, tokens, {}, {}, lambda _: list(responses))).double().cpu()

    if isinstance(examples[0], Pair):
        logit = scores([e.chosen for e in examples]) - scores([e.rejected for e in examples])  # type: ignore[union-attr]
        right, loss, margin = logit > 0, -logsigmoid(logit).mean(), logit.mean()
    else:
        logit = scores([e.response for e in examples])  # type: ignore[union-attr]
        label = torch.tensor([e.value for e in examples], dtype=torch.float64)  # type: ignore[union-attr]
        right, loss = (logit > 0) == (label > 0.5), binary_cross_entropy_with_logits(logit, label)
        margin = logit[label > 0.5].mean() - logit[label <= 0.5].mean()
    error, bins = calibration(torch.sigmoid(logit.abs()), right)
    return {
        "accuracy": right.double().mean().item(),
        "margin": margin.item(),
        "loss": loss.item(),
        "expected_calibration_error": error,
        "calibration": bins,
    }


def calibration(confidence: Tensor, right: Tensor, bins: int = BINS) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error: the mean |accuracy - confidence| over equal bins of .5 .. 1, weighted by their rows.

    confidence: fp64 [N] in .5 .. 1, of the predicted side; right: bool [N]. Also returns the bins that hold rows.
    """
    place = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    out, error = [], 0.0
    for i in place.unique().tolist():
        here = place == i
        sure, hit, count = confidence[here].mean().item(), right[here].double().mean().item(), int(here.sum())
        out.append({"confidence": sure, "accuracy": hit, "rows": count})
        error += count / len(place) * abs(hit - sure)
    return error, out
