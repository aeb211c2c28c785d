"""Losses of responses with rewards: filtering, reward-weighted and conditional alignment (arXiv:2308.12050)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyengine.errors import InputError, real
from pyengine.losses.moments import Reduction, one_of, positive, wide
from pyengine.reference import SequenceMoments


def fa_weight(z: Tensor, threshold: float = 0.0) -> Tensor:
    """1 where the standardised reward z > threshold, else 0 (filtering alignment, 2308.12050). [N]; NaN stays NaN.

    The mean of it is the retained fraction.
    """
    z = wide(z)
    return torch.where(z.isnan(), z, z > real(threshold, "fa_weight: threshold"))


def rwr_weight(z: Tensor, beta: float = 5.0, cap: float | None = None) -> Tensor:
    """exp(z / beta) of the standardised reward z, in fp32 at least (reward-weighted regression, 2308.12050). [N].

    Not normalised. beta: math.inf gives weights of 1, SFT. cap: the most that a weight may be; a small beta needs one.
    """
    beta = beta if beta == math.inf else positive(beta, "rwr_weight: beta")
    weight = (wide(z) / beta).exp()
    return weight if cap is None else weight.clamp(max=positive(cap, "rwr_weight: cap"))


def weighted_nll(moments: SequenceMoments, weight: Tensor, reduction: Reduction = "sum") -> Tensor:
    """sum_i -weight_i logp_i over the number of responses ("sum") or of all their tokens ("token_mean"). A scalar.

    "sum" has per-sequence sums, as in the equations of 2308.12050. Responses of weight 0 are counted in either number,
    so that the loss of a batch estimates that of the data set. Where all are 0, so is the loss, and its gradient.

    weight: [N], detached here.
    """
    one_of(reduction, "reduction", ("sum", "token_mean"))
    if weight.shape != moments.logp.shape:
        raise InputError(
            f"weighted_nll: weight must have shape {list(moments.logp.shape)}, got {list(weight.shape)}: one a response"
        )
    weight = weight.detach()
    losses = torch.where(weight == 0, 0.0, -weight * wide(moments.logp))
    count = moments.tokens.sum().clamp(min=1) if reduction == "token_mean" else max(1, weight.numel())
    return losses.sum() / count


def fa_loss(moments: SequenceMoments, z: Tensor, threshold: float = 0.0, reduction: Reduction = "sum") -> Tensor:
    """Filtering alignment: the NLL of responses whose standardised reward z [N] is above the threshold. A scalar."""
    return weighted_nll(moments, fa_weight(z, threshold), reduction)


def rwr_loss(
    moments: SequenceMoments, z: Tensor, beta: float = 5.0, cap: float | None = None, reduction: Reduction = "sum"
) -> Tensor:
    """Reward-weighted regression: the NLL weighted by exp(z / beta), z [N] the standardised reward. A scalar."""
    return weighted_nll(moments, rwr_weight(z, beta, cap), reduction)


def ca_loss(moments: SequenceMoments, reduction: Reduction = "sum") -> Tensor:
    """Conditional alignment: the NLL of responses, given prompts that state their reward. A scalar.

    The prompts are those of `pyengine.rewards.conditioning`, which, with the reward in them, are not in the moments.
    """
    return weighted_nll(moments, torch.ones_like(moments.logp), reduction)
