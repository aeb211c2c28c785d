"""TRL's DPO and KTO trainers on pyengine's LM head, with the weights of WPO: `PreferenceTrainer`, `UnpairedTrainer`.

Data sets, PEFT, accelerate, FSDP, metrics, checkpoints and resuming are TRL's. What would be ignored without a word is
refused when a trainer is made. `offline.py` has their sibling for responses with rewards.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import dpo_trainer, kto_trainer

from pyengine import losses
from pyengine.errors import InputError
from pyengine.integrations.trl.head import PairedOutput, Recorder, check_methods, in_place_of, moments_of
from pyengine.integrations.trl.options import (
    BETAS,
    NO_ROOM,
    REFERENCE_FREE,
    check_model,
    check_options,
    check_unpaired,
    first_row,
    paired_loss,
)

log = logging.getLogger("pyengine")

METHODS = ("compute_loss", "_compute_loss", "_prepare_dataset", "compute_ref_log_probs")  # of TRL's DPO and KTO alike


@dataclass
class PreferenceConfig(DPOConfig):
    """TRL's DPOConfig with WPO's weights, SimPO and ORPO.

    loss_type: any of TRL's, or "simpo" or "orpo", which have no reference model and load none. beta: None is 0.01 for
    "sigmoid" (DPO and WPO), 2 for "simpo", 0.1 for the others; of "orpo" it is lambda. label_smoothing: of "sigmoid"
    too (cDPO), where TRL ignores it. simpo_gamma: SimPO's margin. ipo_normalize: a mean over tokens, not their sum.

    weights: what WPO measures the policy's probability of a token against: "none" (against 1), "greedy" (its greatest)
    or "sampled" (sum_v p_v^2); "off" weights nothing. weight_variant: the weights of "both" responses, or of the
    "chosen" (WPO_W) or "rejected" (WPO_L) one alone. weight_clamp: "product" keeps the weight of a pair at or below 1,
    as the authors' code does; "none" is the paper's text and TRL's `use_weighting`.
    """

    beta: float | None = field(default=None, metadata={"help": "None: the loss's own."})  # type: ignore[assignment]
    weights: str = field(default="sampled", metadata={"help": "off, none, greedy or sampled."})
    weight_variant: str = field(default="both", metadata={"help": "both, chosen or rejected."})
    weight_clamp: str = field(default="product", metadata={"help": "product or none."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's margin."})
    ipo_normalize: bool = field(default=True, metadata={"help": "IPO's log-ratios are means over tokens."})

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.beta is None:
            self.beta = BETAS.get(self.loss_type[0], 0.1)
        super().__post_init__()


@dataclass
class UnpairedConfig(KTOConfig):
    """TRL's KTOConfig with WPO's weights.

    weights: as in `PreferenceConfig`, but normalised to sum to 1 within each class of a process's batch: the loss is
    the sum of the weighted means of the two classes. With "off" it is TRL's, the mean over all.
    """

    weights: str = field(default="sampled", metadata={"help": "off, none, greedy or sampled."})


class PreferenceTrainer(DPOTrainer):
    """TRL's DPOTrainer on pyengine's head, with the losses and weights of its `PreferenceConfig` (None: the defaults).

    The losses "sigmoid", "hinge", "ipo", "simpo" and "orpo" have their gradients made in the forward, by three products
    with the head instead of four. TRL's others, lists of losses, ld_alpha and f-divergences run through TRL's code,
    unweighted. Rows may hold prompt_ids, chosen_ids and rejected_ids in place of texts. Pairs whose sides have the same
    tokens teach nothing: they are left out, with a warning that counts them. Besides TRL's metrics it logs
    weights/mean, that of the pairs' weights.

    Raises InputError for options that do not go together.
    """

    args: Any
    model: Any

    def __init__(
        self, model: Any, ref_model: Any = None, args: PreferenceConfig | None = None, *rest: Any, **others: Any
    ) -> None:
        args = args or PreferenceConfig(_directory(model, "WPO"))
        if not isinstance(args, PreferenceConfig):
            raise InputError(f"PreferenceTrainer takes a PreferenceConfig, got a {type(args).__name__}")
        self._paired_loss = paired_loss(args)
        check_options(args)
        check_methods(DPOTrainer, METHODS)
        self._reference_free = args.loss_type[0] in REFERENCE_FREE
        if self._reference_free and ref_model is not None:
            raise InputError(f"ref_model: loss_type {args.loss_type[0]!r} has no reference policy")
        with in_place_of(dpo_trainer, reference=not self._reference_free, loads=isinstance(model, str)):
            super().__init__(model, ref_model, args, *rest, **others)
        check_model(self)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        keep_start = args.truncation_mode == "keep_start"
        if not _tokenised(dataset, dataset_name, "prompt_ids", "chosen_ids", "rejected_ids"):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        elif keep_start:
            dataset = _with_room(dataset, args.max_length)
        first_row(dataset, dataset_name, NO_ROOM)
        read = slice(args.max_length) if keep_start else slice(-(args.max_length or 0), None)

        def distinct(row: Mapping[str, Any]) -> bool:
            chosen, rejected = (row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids"))
            return chosen[read] != rejected[read]

        kept = dataset.filter(distinct)
        if isinstance(dataset, Dataset) and len(kept) < len(dataset):
            same = f"{len(dataset) - len(kept)} of {len(dataset)} pairs have the same tokens on both sides"
            if not len(kept):
                raise InputError(f"the {dataset_name} dataset: {same}; nothing is left")
            log.warning("the %s dataset: %s; they are left out", dataset_name, same)
        return kept

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._paired_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        unread = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        read = {name: value for name, value in inputs.items() if name not in unread} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        reference = self._reference_logp(inputs)
        out: PairedOutput = model(
            **read, labels=labels, fused_lm_head=True, paired_loss=self._paired_loss, reference_logp=reference
        )
        self._note(out, reference, inputs["attention_mask"].sum())
        if not return_outputs:
            return out.loss
        with torch.no_grad():  # for compute_metrics, which TRL has deprecated
            return out.loss, model(**read)

    def _reference_logp(self, inputs: dict[str, Any]) -> Tensor | None:
        """[2P] of the batch, chosen first; None where the loss has no reference."""
        if self._reference_free:
            return None
        if self.precompute_ref_logps:
            return torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        # With PEFT the reference is the model itself, its adapter switched off.
        return torch.cat(self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs))

    @torch.no_grad()
    def _note(self, out: PairedOutput, reference: Tensor | None, read: Tensor) -> None:
        """The metrics that TRL logs, and the weights', from sums over all processes which are fetched at once."""
        sides = chosen, rejected = out.sides()
        rewards = [self.beta * side.logp for side in sides]
        if reference is not None:
            rewards = [r - self.beta * q.to(r) for r, q in zip(rewards, reference.chunk(2), strict=True)]
        if self.args.loss_type == ["simpo"]:  # its implicit reward
            rewards = [r / side.tokens.clamp(min=1) for r, side in zip(rewards, sides, strict=True)]
        assert out.mean_logits is not None
        assert out.top1 is not None
        logits = out.mean_logits.chunk(2)
        sums = {
            "logits/chosen": (logits[0], chosen.tokens),
            "logits/rejected": (logits[1], rejected.tokens),
            "mean_token_accuracy": (out.top1.chunk(2)[0], chosen.tokens),
            "entropy": (chosen.entropy + rejected.entropy, chosen.tokens + rejected.tokens),
        }
        ones = torch.ones_like(chosen.logp)
        means = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": rewards[0] > rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen.logp,
            "logps/rejected": rejected.logp,
        }
        if self.args.weights != "off":
            how = (self.args.weights, self.args.weight_variant, self.args.weight_clamp)
            means["weights/mean"] = losses.pair_weight(chosen, rejected, *how)
        sums |= {name: (value, ones) for name, value in means.items()}
        found = [x.sum().float() for pair in (*sums.values(), (read, read)) for x in pair]
        *total, tokens, _ = self.accelerator.gather(torch.stack(found)[None]).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        for name, of, over in zip(sums, total[::2], total[1::2], strict=True):
            self._metrics[mode][name].append(of / over if over else 0.0)
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


class UnpairedTrainer(KTOTrainer):
    """TRL's KTOTrainer on pyengine's head, with the weights of its `UnpairedConfig` (None: the defaults).

    Rows may hold prompt_ids and completion_ids in place of texts. Raises InputError for options that do not go
    together.
    """

    args: Any
    model: Any

    def __init__(
        self, model: Any, ref_model: Any = None, args: UnpairedConfig | None = None, *rest: Any, **others: Any
    ) -> None:
        args = args or UnpairedConfig(_directory(model, "KTO"))
        if not isinstance(args, UnpairedConfig):
            raise InputError(f"UnpairedTrainer takes an UnpairedConfig, got a {type(args).__name__}")
        check_unpaired(args)
        check_options(args)
        check_methods(KTOTrainer, METHODS)
        given = inspect.signature(KTOTrainer.__init__).bind(self, model, ref_model, args, *rest, **others).arguments
        if args.weights != "off" and {"image", "images"} & {*next(iter(given.get("train_dataset") or ()), ())}:
            raise InputError("weights: those of responses to images are not computed; set weights='off'")
        with in_place_of(kto_trainer):
            super().__init__(model, ref_model, args, *rest, **others)
        check_model(self)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's, but where the last batch is one example, it is not paired with its own response for z0."""
        if _tokenised(dataset, dataset_name, "prompt_ids", "completion_ids"):
            dataset = _with_room(dataset, args.max_length)
            first_row(dataset, dataset_name, NO_ROOM)
            if self.calculate_KL:
                dataset = dataset.map(_turned, batched=True, batch_size=args.per_device_train_batch_size)
        else:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            first_row(dataset, dataset_name, NO_ROOM)
        alone = isinstance(dataset, Dataset) and len(dataset) % args.per_device_train_batch_size == 1
        if not (alone and self.calculate_KL):
            return dataset
        last = len(dataset) - 1
        if not last:
            raise InputError(f"the {dataset_name} dataset holds one example; z0 of KTO needs two")
        other = dataset[last - 1]["completion_ids"]

        def mismatched(row: Mapping[str, Any], index: int) -> dict[str, Any]:
            return {"KL_completion_ids": other if index == last else row["KL_completion_ids"]}

        return dataset.map(mismatched, with_indices=True)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.args.weights == "off":
            return super()._compute_loss(model, inputs, return_outputs)
        known = dict(inputs)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            known["ref_logps"], known["ref_KL_logps"] = self.compute_ref_log_probs(reference, inputs)
        # TRL's code logs its metrics and finds z0 from the reference's numbers as if they had been precomputed; the
        # last forward that it runs is the one with a gradient.
        recorder, before = Recorder(model), self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            plain = super()._compute_loss(recorder, known, return_outputs)
        finally:
            self.precompute_ref_logps = before
        mode = "train" if self.model.training else "eval"
        moments, desirable = moments_of(recorder.fused), known["label"].bool()
        each = losses.kto_loss(
            moments,
            known["ref_logps"],
            desirable,
            self._metrics[mode]["kl"][-1],  # z0; 0 for apo_zero_unpaired, which is KTO without it
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        loss = (each * losses.class_weight(moments, desirable, self.args.weights)).sum()
        return (loss, plain[1]) if return_outputs else loss


def _tokenised(dataset: Any, name: str, *columns: str) -> bool:
    """Whether the rows hold token ids already; TRL 1.16 would tokenise texts again, and knows no rows without them."""
    return {*columns} <= {*first_row(dataset, name)}


def _with_room(dataset: Any, max_length: int | None) -> Any:
    """Rows whose prompt leaves room for a response, as TRL keeps them."""
    return dataset if max_length is None else dataset.filter(lambda row: len(row["prompt_ids"]) < max_length)


def _turned(rows: dict[str, Any]) -> dict[str, Any]:
    """Each prompt of a batch with the response before its own, for z0."""
    ids = rows["completion_ids"]
    return {"KL_completion_ids": ids[-1:] + ids[:-1]}


def _directory(model: Any, suffix: str) -> str:
    """Where a trainer without args writes, as TRL names it."""
    name = model if isinstance(model, str) else model.config.name_or_path
    return f"{Path(name).name}-{suffix}"
