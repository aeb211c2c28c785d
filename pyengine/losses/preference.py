"""Losses of pairs, and of single responses that are liked or not (KTO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyengine.errors import InputError, real
from pyengine.losses.moments import Reduction, check_desirable, check_sides, mean_logp, one_of, positive, wide
from pyengine.reference import PairedLoss, SequenceMoments

CERTAIN = 2.0**-23  # fp32's epsilon, the least that a probability near 1 can lack; for fp64 too, to give the same loss


def dpo_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(h), h = beta * (rho_w - rho_l) of log-ratios rho = logp - reference_logp (DPO, Eq. 7). [P].

    Bind the numbers with functools.partial to make it a PairedLoss, as for all of these. WPO trains with beta = 0.01.

    label_smoothing: eps in [0, 1/2], the probability that a label is flipped: (1 - eps) l(h) + eps l(-h) (cDPO).
    Raises InputError where there are no reference log-probabilities.
    """
    beta, eps = positive(beta, "dpo_loss: beta"), real(label_smoothing, "dpo_loss: label_smoothing", 0, 0.5)
    h = beta * _margin("dpo_loss", chosen, rejected, reference_chosen, reference_rejected)
    if eps == 0:  # 0 times an infinite loss is NaN
        return -logsigmoid(h)
    return -(1 - eps) * logsigmoid(h) - eps * logsigmoid(-h)


def hinge_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *,
    beta: float = 0.1,
) -> Tensor:
    """max(0, 1 - beta * (rho_w - rho_l)) (RSO's normalised form of SLiC). [P]."""
    beta = positive(beta, "hinge_loss: beta")
    return torch.relu(1 - beta * _margin("hinge_loss", chosen, rejected, reference_chosen, reference_rejected))


def ipo_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *,
    beta: float = 0.1,
    normalize: bool = True,
) -> Tensor:
    """(d - 1/(2 beta))^2, d = rho_w - rho_l (IPO, Eq. 17; beta is its tau). [P].

    normalize: rho is the mean over the response's tokens, which the authors advise, and not the sum of the equation.
    """
    beta = positive(beta, "ipo_loss: beta")
    given = (chosen, rejected, reference_chosen, reference_rejected)
    return (_margin("ipo_loss", *given, normalize=normalize) - 1 / (2 * beta)).square()


def simpo_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:
    """-log sigmoid(beta * (logp_w/|w| - logp_l/|l|) - gamma) (SimPO, Eq. 6). [P]; needs no reference.

    The defaults are those of the authors' code, whose gamma_beta_ratio is gamma / beta = 0.25.
    """
    beta, gamma = positive(beta, "simpo_loss: beta"), real(gamma, "simpo_loss: gamma")
    check_sides("simpo_loss", chosen, rejected)
    return -logsigmoid(beta * (mean_logp(chosen) - mean_logp(rejected)) - gamma)


def sft_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
) -> Tensor:
    """-logp of the chosen response, over its tokens ("token_mean") or not ("sum"). [P]; the rejected one is not used.

    Each response counts alike. A mean over all tokens of a batch, as trainers often take, is no function of one
    pair: that is `weighted_nll` with weights of 1.
    """
    one_of(reduction, "reduction", ("sum", "token_mean"))
    return -wide(chosen.logp) if reduction == "sum" else -mean_logp(chosen)


def odds_ratio_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
) -> Tensor:
    """-log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), log p = logp/|y| (ORPO, Eq. 7). [P]; no reference."""
    check_sides("odds_ratio_loss", chosen, rejected)
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


@dataclass(frozen=True)
class OrpoLoss:
    """`sft_loss` (per token) + lam * `odds_ratio_loss` (ORPO, Eq. 6): a PairedLoss, [P]; needs no reference.

    The NLL is of response tokens; the authors' code, and TRL's, takes that of the prompt too.

    preference: the term that lam multiplies; `weighted` puts its weights there.
    """

    lam: float = 0.1
    preference: PairedLoss = odds_ratio_loss

    def __call__(
        self,
        chosen: SequenceMoments,
        rejected: SequenceMoments,
        reference_chosen: Tensor | None = None,
        reference_rejected: Tensor | None = None,
    ) -> Tensor:
        lam, nll = real(self.lam, "OrpoLoss: lam", 0), sft_loss(chosen, rejected)
        if lam == 0:
            return nll
        return nll + lam * self.preference(chosen, rejected, reference_chosen, reference_rejected)


def kto_baseline(policy_logp: Tensor, reference_logp: Tensor) -> Tensor:
    """z0 of KTO: the mean of log pi(y'|x) - log ref(y'|x) over mismatched (x, y'), at least 0. A detached scalar.

    policy_logp, reference_logp: [N] of prompts with the response of another example of the batch. In training on
    several devices gather both first. Raises InputError for fewer than two: one prompt has no other's response.
    """
    if policy_logp.numel() < 2 or policy_logp.shape != reference_logp.shape:
        shapes = f"{list(policy_logp.shape)} and {list(reference_logp.shape)}"
        raise InputError(f"kto_baseline needs log-probabilities [N] of N >= 2 mismatched responses, got {shapes}")
    return (wide(policy_logp) - wide(reference_logp)).detach().mean().clamp(min=0)


def kto_loss(
    moments: SequenceMoments,
    reference_logp: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """lambda_y * (1 - sigmoid(+-beta * (rho - z0))), + for desirable responses, - for others (KTO, Eq. 8). [N].

    desirable: bool [N]. baseline: z0, of `kto_baseline`. desirable_weight, undesirable_weight: lambda_D, lambda_U.

    KTO is its mean. For WPO multiply by `class_weight` and sum.
    """
    check_desirable("kto_loss", desirable, moments)
    beta = positive(beta, "kto_loss: beta")
    lambdas = [
        real(value, f"kto_loss: {name}", 0)
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight))
    ]
    z0 = baseline.detach() if isinstance(baseline, Tensor) else baseline
    if isinstance(z0, Tensor) and z0.dim():
        raise InputError(f"kto_loss: baseline must be a scalar, got shape {list(z0.shape)}")
    gap = beta * (_log_ratio("kto_loss", moments, reference_logp) - z0)
    return torch.where(desirable, lambdas[0] * torch.sigmoid(-gap), lambdas[1] * torch.sigmoid(gap))


def _log_odds(moments: SequenceMoments) -> Tensor:
    """a - log(1 - exp(a)), a = logp/|y|. At a = 0, an empty or certain response, it would be inf with an inf slope.

    a stops at -CERTAIN, and the gradient with it. Far below, expm1(a) rounds to -1 and the error, exp(a), is less
    than that of a.
    """
    a = mean_logp(moments).clamp(max=-CERTAIN)
    return a - torch.log(-torch.expm1(a))


def _log_ratio(loss: str, moments: SequenceMoments, reference_logp: Tensor | None) -> Tensor:
    if reference_logp is None:
        raise InputError(f"{loss} needs the reference policy's log-probabilities (reference_logp), got None")
    if reference_logp.shape != moments.logp.shape:
        shapes = f"{list(moments.logp.shape)}, got {list(reference_logp.shape)}"
        raise InputError(f"{loss}: the reference's log-probabilities must have the policy's shape {shapes}")
    return wide(moments.logp) - wide(reference_logp).detach()


def _margin(
    loss: str,
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    normalize: bool = False,
) -> Tensor:
    """rho_w - rho_l, of sums or, normalised, of means over tokens."""
    check_sides(loss, chosen, rejected)
    ratios = _log_ratio(loss, chosen, reference_chosen), _log_ratio(loss, rejected, reference_rejected)
    if normalize:
        ratios = ratios[0] / chosen.tokens.clamp(min=1), ratios[1] / rejected.tokens.clamp(min=1)
    return ratios[0] - ratios[1]
