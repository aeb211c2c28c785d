"""TRL's SFT trainer on pyengine's LM head for responses with rewards: filtering, reward-weighted, conditional, plain.

"Aligning Language Models with Offline Learning from Human Feedback" (arXiv:2308.12050).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.data_utils import is_conversational
from trl.trainer import sft_trainer

from pyengine import losses
from pyengine.codec import PromptKey
from pyengine.errors import InputError, real
from pyengine.integrations.trl.head import Recorder, check_methods, in_place_of, moments_of
from pyengine.integrations.trl.options import NO_ROOM, check_model, check_options, first_row, given
from pyengine.rewards import Statistics
from pyengine.rewards.conditioning import Conditioning
from pyengine.training.data import Example, encode
from pyengine.training.texts import Texts

log = logging.getLogger("pyengine")

METHODS = ("sft", "fa", "rwr", "ca")
METHODS_OF = {"beta": "rwr", "weight_cap": "rwr", "threshold": "fa"}  # options that one method reads
# SFTConfig's that have no meaning for whole responses with a weight each.
REFUSED = {
    "packing": "rows of several responses have no one weight",
    "eval_packing": "rows of several responses have no one weight",
    "padding_free": "rows of several responses have no one weight",
    "assistant_only_loss": "the response is what is trained on",
    "loss_type": "the loss is the method's",
    "dataset_text_field": "rows have a prompt and a completion",
    "dataset_kwargs": "the weights are made while the data set is prepared",
}
METHODS_OF_TRL = ("compute_loss", "_prepare_dataset", "_set_signature_columns_if_needed")
STATISTICS, CONDITIONING = "reward_statistics.json", "conditioning.json"


@dataclass
class OfflineConfig(SFTConfig):
    """TRL's SFTConfig for responses with a reward, z = (reward - mean) / std over the data set.

    method: "fa", the likelihood of responses with z > threshold; "rwr", of all, weighted by exp(z / beta), at most
    weight_cap (None: no cap); "ca", of all, behind prompts that state z; "sft", of all.
    reduction: "sum" is the mean over responses of the sum over their tokens, as in the paper; "token_mean" divides by
    the tokens of all processes' batch, as TRL does. Those of weight 0 count in either.
    """

    method: str = field(default="sft", metadata={"help": "sft, fa, rwr or ca."})
    beta: float = field(default=5.0, metadata={"help": "Temperature of rwr's weights; inf is SFT."})
    threshold: float = field(default=0.0, metadata={"help": "fa keeps z above it."})
    weight_cap: float | None = field(default=None, metadata={"help": "Greatest weight of rwr."})
    reduction: str = field(default="sum", metadata={"help": "sum or token_mean."})


class OfflineTrainer(SFTTrainer):
    """TRL's SFTTrainer on pyengine's head, for the methods of `OfflineConfig`.

    A row of the data sets is {"prompt", "completion", "reward"}; "sft" needs no reward. The loss is of the completion,
    its EOS included. Texts become tokens as the engine reads them: the completion's behind the prompt's, nothing
    merged. "tokens" (the completion's own, or None) and "ended" (False: cut off, no EOS is added) may be given. Rows of
    messages are tokenised by TRL; "ca" takes none.

    statistics: of the rewards; None makes them of the training set. conditioning: the template of "ca". Both are stored
    beside each checkpoint and saved model, as reward_statistics.json and conditioning.json. Besides TRL's metrics it
    logs weights/mean and retained, the share of responses with a weight above 0.

    Raises InputError for options that do not go together, and for rewards that cannot be used.
    """

    args: Any
    model: Any
    _signature_columns: Any
    cut = 0  # training responses longer than max_length

    def __init__(
        self,
        model: Any,
        args: OfflineConfig,
        *,
        train_dataset: Any,
        statistics: Statistics | None = None,
        conditioning: Conditioning | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(args, OfflineConfig):
            raise InputError(f"OfflineTrainer takes an OfflineConfig, got a {type(args).__name__}")
        _check(args, conditioning)
        check_methods(SFTTrainer, METHODS_OF_TRL)
        for name in ("formatting_func", "compute_loss_func"):
            if others.get(name) is not None:
                raise InputError(f"{name}: the rows and the loss are the method's")
        self.conditioning = conditioning or Conditioning()
        self.statistics = statistics or _statistics(train_dataset, args.method)
        with in_place_of(sft_trainer):
            super().__init__(model, args, train_dataset=train_dataset, **others)
        check_model(self)
        self.data_collator = _Weighing(self.data_collator)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        first = first_row(dataset, dataset_name)
        if not {"weight", "input_ids"} <= set(first):
            lacking = [key for key in ("prompt", "completion") if key not in first]
            lacking += ["reward"] * ("reward" not in first and args.method != "sft")
            if lacking:
                raise InputError(f"the {dataset_name} dataset lacks {' and '.join(lacking)}")
            spoken = is_conversational(first)
            if spoken and args.method == "ca":
                raise InputError(f"the {dataset_name} dataset holds messages: ca states the reward in a prompt of text")
            end = self._tokenizer.eos_token_id
            dataset = dataset.map(
                _row,
                with_indices=True,
                fn_kwargs={
                    "name": dataset_name,
                    "texts": None if spoken else Texts(self._tokenizer, frozenset([] if end is None else [end])),
                    "statistics": self.statistics,
                    "conditioning": self.conditioning if args.method == "ca" else None,
                    "settings": (args.method, args.beta, args.threshold, args.weight_cap),
                },
            )
            if isinstance(dataset, Dataset) and dataset_name == "train" and not any(dataset["weight"]):
                raise InputError(f"no response has z > {args.threshold:g}: nothing is left to train on")
            if isinstance(dataset, Dataset) and not spoken and args.max_length is not None:
                cut = sum(len(ids) > args.max_length for ids in dataset["input_ids"])
                if dataset_name == "train":
                    self.cut = cut
                if cut:
                    log.warning("the %s dataset: %d responses are cut at %d tokens", dataset_name, cut, args.max_length)
        before = len(dataset) if isinstance(dataset, Dataset) else 0
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        first_row(dataset, dataset_name, NO_ROOM)
        if isinstance(dataset, Dataset) and (lost := before - len(dataset)) > 0:
            log.warning("the %s dataset: %d prompts fill max_length and are left out", dataset_name, lost)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "weight" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "weight"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight, recorder = inputs.pop("weight"), Recorder(model)
        plain = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)  # logs TRL's metrics
        moments = moments_of(recorder.fused)
        self._note(weight)
        if self.args.reduction == "token_mean" and num_items_in_batch is not None:
            # As TRL counts: the tokens of all processes and of all parts of the step; DDP takes the processes' mean.
            loss = losses.weighted_nll(moments, weight, "sum") * len(weight) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        else:
            loss = losses.weighted_nll(moments, weight, self.args.reduction)
            if self.model.training and num_items_in_batch is not None:  # else Trainer divides
                loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, plain[1]) if return_outputs else loss

    @torch.no_grad()
    def _note(self, weight: Tensor) -> None:
        found = torch.stack([weight.sum(), (weight > 0).sum(), torch.ones_like(weight).sum()])
        total, retained, count = self.accelerator.gather(found[None]).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["weights/mean"].append(total / count)
        metrics["retained"].append(retained / count)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            where = Path(str(output_dir or self.args.output_dir))
            if self.statistics is not None:
                self.statistics.save(where / STATISTICS)
            if self.args.method == "ca":
                self.conditioning.save(where / CONDITIONING)


class _Weighing:
    """A collator that hands on each row's weight, fp32 [N]."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32)}


def weights_of(z: Tensor, method: str, beta: float, threshold: float, cap: float | None) -> Tensor:
    """The weight of each response with standardised reward z [N]."""
    if method == "fa":
        return losses.fa_weight(z, threshold)
    if method == "rwr":
        return losses.rwr_weight(z, beta, cap)
    return torch.ones_like(z)


def _row(
    row: Mapping[str, Any],
    index: int,
    name: str,
    texts: Texts | None,
    statistics: Statistics | None,
    conditioning: Conditioning | None,
    settings: tuple[Any, ...],
) -> dict[str, Any]:
    """A row's weight and, unless it holds messages, its tokens and labels, in which the prompt is masked."""
    where = row.get("where") or f"row {index} of the {name} dataset"
    z = 0.0 if statistics is None else statistics.z([real(row["reward"], f"{where}: the reward")])[0]
    weight = weights_of(torch.tensor([z]), *settings).item()
    if not math.isfinite(weight):
        raise InputError(f"{where}: exp(z / beta) is {weight} at z = {z:g}: give a greater beta, or a cap (weight_cap)")
    if texts is None:
        return {"weight": weight}
    # A column holds texts alone: a PromptKey lies there as its JSON.
    prompt = PromptKey(json.loads(row["prompt"])) if row.get("keyed") else row["prompt"]
    if conditioning is not None:
        if isinstance(prompt, PromptKey):
            raise InputError(f"{where}: ca states the reward in a prompt of text, not in token ids or messages")
        prompt = conditioning.prompt(prompt, z)
    ended = row.get("ended", True)
    example = Example(prompt, row["completion"], 0.0, row.get("tokens"), ended is None or ended, where)
    ids, start, *_ = encode(texts, example)  # type: ignore[arg-type]
    return {"weight": weight, "input_ids": ids, "labels": [-100] * start + ids[start:]}


def _statistics(dataset: Any, method: str) -> Statistics | None:
    """Of a training set's rewards; None where the method needs none."""
    if method == "sft":
        return None
    if not isinstance(dataset, Dataset):
        raise InputError("statistics: a data set that is streamed must come with those of its rewards")
    if "reward" not in dataset.column_names:
        raise InputError("the train dataset lacks reward")
    return Statistics.of(dataset["reward"])


def _check(args: OfflineConfig, conditioning: Conditioning | None) -> None:
    for name, known in (("method", METHODS), ("reduction", ("sum", "token_mean"))):
        if getattr(args, name) not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(args, name)!r}")
    for name in given(args, METHODS_OF):
        if args.method != METHODS_OF[name]:
            raise InputError(f"{name} is read by method {METHODS_OF[name]!r}, not by {args.method!r}")
    if conditioning is not None and args.method != "ca":
        raise InputError(f"conditioning is read by method 'ca', not by {args.method!r}")
    weights_of(torch.zeros(1), args.method, args.beta, args.threshold, args.weight_cap)  # checks the numbers
    for name in given(args, REFUSED):
        if getattr(args, name):
            raise InputError(f"{name}={getattr(args, name)!r}: {REFUSED[name]}")
    if args.completion_only_loss is False:
        raise InputError("completion_only_loss=False: the response alone is trained on")
    check_options(args)
