"""The weights of WPO: how likely the policy itself is to write a response."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pyengine.losses.moments import check_desirable, one_of, wide
from pyengine.losses.preference import OrpoLoss
from pyengine.reference import PairedLoss, SequenceMoments

Alignment = Literal["none", "greedy", "sampled"]
Variant = Literal["both", "chosen", "rejected"]
Clamp = Literal["product", "none"]


def log_weight(moments: SequenceMoments, alignment: Alignment = "sampled") -> Tensor:
    """log w(y) = (1/|y|) sum_t a_t of WPO, [N], detached; 0 for a response without tokens.

    alignment: what the probability p_y of a token is measured against, hence a_t. "none": log p_y. "greedy":
    log (p_y / max_v p_v). "sampled", the paper's choice: log (p_y / sum_v p_v^2), 1 in the mean for a token drawn
    from p; such a weight can exceed 1.
    """
    one_of(alignment, "alignment", ("none", "greedy", "sampled"))
    total = moments.logp if alignment == "none" else getattr(moments, alignment)
    return wide(total).detach() / moments.tokens.clamp(min=1)


def pair_weight(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    alignment: Alignment = "sampled",
    variant: Variant = "both",
    clamp: Clamp = "product",
) -> Tensor:
    """W of WPO's Eq. 2 for each pair [P], detached.

    variant: w(y_w) w(y_l) ("both"), or of one response: WPO_W ("chosen"), WPO_L ("rejected"). clamp: "product" keeps W
    at or below 1, as the authors' code does; "none" is the paper's text.
    """
    one_of(variant, "variant", ("both", "chosen", "rejected"))
    one_of(clamp, "clamp", ("product", "none"))
    used = {"both": (chosen, rejected), "chosen": (chosen,), "rejected": (rejected,)}[variant]
    log_w = sum((log_weight(moments, alignment) for moments in used), torch.zeros_like(wide(chosen.logp.detach())))
    return (log_w.clamp(max=0) if clamp == "product" else log_w).exp()


def class_weight(moments: SequenceMoments, desirable: Tensor, alignment: Alignment = "sampled") -> Tensor:
    """w(y), normalised to sum to 1 within the desirable and within the undesirable of the batch (WPO for KTO).

    desirable: bool [N]. [N], detached. A class without members has no weights. Multiply by `kto_loss` and sum: that
    is the weighted mean over each class, added up.
    """
    check_desirable("class_weight", desirable, moments)
    log_w = log_weight(moments, alignment)
    good, bad = (torch.where(members, log_w, -math.inf).softmax(-1) for members in (desirable, ~desirable))
    # Of a class whose members all have weight 0, the softmax is 0 / 0.
    return torch.where(log_w == -math.inf, 0.0, torch.where(desirable, good, bad))


def weighted(
    loss: PairedLoss, alignment: Alignment = "sampled", variant: Variant = "both", clamp: Clamp = "product"
) -> PairedLoss:
    """The paired loss, each pair's multiplied by its `pair_weight` (WPO). Auxiliary terms, ORPO's NLL, are not.

    A pair of weight 0 has loss 0 and no gradient, whatever its log-probabilities are.
    """
    one_of(alignment, "alignment", ("none", "greedy", "sampled"))
    one_of(variant, "variant", ("both", "chosen", "rejected"))
    one_of(clamp, "clamp", ("product", "none"))
    if isinstance(loss, OrpoLoss):
        return replace(loss, preference=weighted(loss.preference, alignment, variant, clamp))
    return partial(_weighted, loss, alignment, variant, clamp)


def _weighted(
    loss: PairedLoss,
    alignment: Alignment,
    variant: Variant,
    clamp: Clamp,
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
) -> Tensor:
    weight = pair_weight(chosen, rejected, alignment, variant, clamp)
    dead = weight == 0

    def live(x: Tensor) -> Tensor:  # what is masked behind a loss has 0 * inf = NaN in its gradient; before, it has 0
        return torch.where(dead, 0.0, x)

    chosen, rejected = (side._replace(logp=live(side.logp)) for side in (chosen, rejected))
    references = [None if x is None else live(x) for x in (reference_chosen, reference_rejected)]
    return live(weight * loss(chosen, rejected, *references))
