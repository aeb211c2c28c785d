"""Which options of TRL's trainers go together with pyengine's head and weights; what would be ignored is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

import torch

from pyengine import losses
from pyengine.errors import InputError, real
from pyengine.reference import PairedLoss, SequenceMoments

WEIGHTS = ("off", "none", "greedy", "sampled")
REFERENCE_FREE = ("simpo", "orpo")
# The losses that `ops.linear_preference` takes, and the beta that each has unless it is given: WPO's, that of the
# authors' code of SimPO and ORPO (where it is lambda), else TRL's.
BETAS = {"sigmoid": 0.01, "hinge": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
# Options that only some of the losses read.
LOSSES_OF = {
    "label_smoothing": ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
    "simpo_gamma": ("simpo",),
    "ipo_normalize": ("ipo",),
}
# Options that are read only where another has this value.
READ_WHERE = {
    "precompute_ref_batch_size": ("precompute_ref_log_probs", True),
    "ref_model_mixup_alpha": ("sync_ref_model", True),
    "ref_model_sync_steps": ("sync_ref_model", True),
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence"),
}
NO_ROOM = "every prompt fills max_length; nothing is left"  # what an empty data set may be due to
BY_LENGTH = ("group_by_length", "batch_rebalance")
REFERENCE_OPTIONS = ("precompute_ref_log_probs", "sync_ref_model")


def given(args: Any, names: Iterable[str]) -> list[str]:
    """Which of these options have another value than their default."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    return [name for name in names if name in defaults and getattr(args, name) != defaults[name]]


def first_row(dataset: Any, name: str, otherwise: str = "it is empty") -> Any:
    """The first row of a data set of this name; InputError where there is none."""
    row = next(iter(dataset), None)
    if row is None:
        raise InputError(f"the {name} dataset: {otherwise}")
    return row


def paired_loss(args: Any) -> PairedLoss | None:
    """The loss that `ops.linear_preference` takes, with its weights, or None where TRL's own code computes it.

    args: a PreferenceConfig. Raises InputError for options that some part would ignore.
    """
    kind, several = args.loss_type[0], len(args.loss_type) > 1 or args.loss_weights is not None
    trl_only = given(args, ("ld_alpha", "f_divergence_type")) + ["several losses, or loss_weights"] * several
    ours = kind in BETAS and not trl_only
    if args.use_weighting:
        raise InputError("use_weighting=True is weights='sampled', weight_clamp='none' here: set those instead")
    check_weights(args, ("weight_variant", "weight_clamp"))
    if args.weights != "off" and not ours:
        if trl_only:
            raise InputError(
                f"{trl_only[0]}: only TRL's code reads that, and it has no weights here; set weights='off'"
            )
        raise InputError(f"loss_type {kind!r} has no weights: {_why_unweighted(kind)}; set weights='off'")
    for kind_of in REFERENCE_FREE:
        if kind_of in args.loss_type and not ours:
            raise InputError(f"{kind_of} goes with no {trl_only[0]}: TRL's code, which reads that, does not know it")
    for option in given(args, LOSSES_OF):
        read = [name for name in args.loss_type if name in LOSSES_OF[option]]
        if not read or (not ours and read == ["sigmoid"]) or (not ours and option in ("simpo_gamma", "ipo_normalize")):
            raise InputError(f"{option} is not read by loss_type {', '.join(args.loss_type)}{_with(trl_only)}")
    if kind in REFERENCE_FREE and (unread := given(args, REFERENCE_OPTIONS)):
        raise InputError(f"{unread[0]}: loss_type {kind!r} has no reference policy")
    if args.padding_free:
        raise InputError("padding_free=True: TRL's DPO trainer would fall back to padding; leave it out")
    order = getattr(args, "train_sampling_strategy", "random")  # transformers 5.10 has it not
    if order in BY_LENGTH:
        raise InputError(f"train_sampling_strategy={order!r}: a pair has two lengths; leave it out")
    return _built(args, kind) if ours else None


def _built(args: Any, kind: str) -> PairedLoss:
    beta: dict[str, Any] = {"beta": args.beta}
    known: dict[str, PairedLoss] = {
        "sigmoid": partial(losses.dpo_loss, **beta, label_smoothing=args.label_smoothing),
        "hinge": partial(losses.hinge_loss, **beta),
        "ipo": partial(losses.ipo_loss, **beta, normalize=args.ipo_normalize),
        "simpo": partial(losses.simpo_loss, **beta, gamma=args.simpo_gamma),
        "orpo": losses.OrpoLoss(args.beta),
    }
    loss = known[kind]
    zero = torch.zeros(1)
    nothing = SequenceMoments(zero, zero.long(), zero, zero, zero)
    loss(nothing, nothing, zero, zero)  # checks the numbers now, not at the first step
    if args.weights == "off":
        return loss
    return losses.weighted(loss, args.weights, args.weight_variant, args.weight_clamp)


def _why_unweighted(kind: str) -> str:
    if kind.startswith("aot"):
        return "it sorts the batch, and a weight would meet another pair"
    if kind == "sft":
        return "it is no preference, and WPO weights the preference alone"
    return f"only {', '.join(BETAS)} have"


def _with(options: list[str]) -> str:
    return f" with {options[0]}" if options else ""


def check_weights(args: Any, details: Iterable[str] = ()) -> None:
    """InputError for an unknown value of `weights`, or for its details where it is off."""
    for name, known in (
        ("weights", WEIGHTS),
        ("weight_variant", ("both", "chosen", "rejected")),
        ("weight_clamp", ("product", "none")),
    ):
        if getattr(args, name, known[0]) not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(args, name)!r}")
    if args.weights == "off" and (unread := given(args, details)):
        raise InputError(f"{unread[0]}: weights are off")


def check_unpaired(args: Any) -> None:
    """InputError for an UnpairedConfig that cannot be trained with."""
    check_weights(args)
    real(args.beta, "beta", 1e-12)
    for name in ("desirable_weight", "undesirable_weight"):
        real(getattr(args, name), name, 0)
    if args.loss_type == "kto" and args.per_device_train_batch_size < 2:
        raise InputError("per_device_train_batch_size must be at least 2: z0 of KTO is of mismatched examples")


def check_options(args: Any) -> None:
    """InputError for what all trainers here would ignore, or cannot do."""
    for option, (other, value) in READ_WHERE.items():
        if given(args, [option]) and getattr(args, other) != value:
            raise InputError(f"{option} is read only with {other}={value!r}")
    if args.use_liger_kernel:
        raise InputError("use_liger_kernel=True: Liger rewrites the model's forward, in which pyengine's head is")
    if args.label_smoothing_factor:
        raise InputError("label_smoothing_factor is not read by these losses; preferences have label_smoothing")
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError("DeepSpeed ZeRO-3 leaves no weight of the head to read: use FSDP, or ZeRO-2")
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
        raise InputError("context and sequence parallelism split a response over devices; these losses need it whole")


def check_model(trainer: Any) -> None:
    """InputError for what only the loaded model tells."""
    if trainer.aux_loss_enabled:
        raise InputError(
            "this mixture of experts has a load-balancing loss, which pyengine's head does not compute: set "
            "router_aux_loss_coef=0.0 to train without it"
        )
    parallel = trainer.accelerator.parallelism_config  # of an accelerate file, which args do not show
    if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
        raise InputError("context and sequence parallelism split a response over devices; these losses need it whole")
