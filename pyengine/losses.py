"""Losses as pure functions of what a model gives: Q-Probe's four, preference losses with WPO's weights, offline ones.

Preference and offline losses see a response through its `SequenceMoments`: sums over its tokens, from
`sequence_moments`, or as `ops.linear_preference` hands them to a loss. All arithmetic is in fp32 at least; fp64 stays
fp64. Only log-probabilities of the policy carry a gradient: weights, baselines and references are detached.

A response without tokens has log-probability 0 and weight 1, and its length counts as 1, so that nothing is NaN. A
label with log-probability -inf is an error of the data that no loss looks for, as looking would synchronise with the
device: `check_labels` does. Unchecked, a loss takes its limit there (DPO: inf for a chosen response, 0 for a rejected
one), and the WPO weight is 0, which leaves the pair out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pyengine import reference
from pyengine.errors import InputError, real
from pyengine.reference import PairedLoss, SequenceMoments, TokenLogprob

Alignment = Literal["none", "greedy", "sampled"]
Variant = Literal["both", "chosen", "rejected"]
Clamp = Literal["product", "none"]
Reduction = Literal["sum", "token_mean"]

CERTAIN = 2.0**-23  # fp32's epsilon, the least that a probability near 1 can lack; for fp64 too, to give the same loss


def q_loss(q: Tensor, reward: Tensor) -> Tensor:
    """L_Q: the mean of (Q - r)^2 (Q-Probe, Eq. 2). Both [N]; a scalar."""
    return (q - reward).square().mean()


def ce_loss(q: Tensor, label: Tensor) -> Tensor:
    """L_CE: binary cross-entropy with logits Q; label in [0, 1] (Q-Probe, Eq. 3, which lacks the minus sign)."""
    return binary_cross_entropy_with_logits(q, label)


def pg_loss(q: Tensor, reward: Tensor, baseline: float = 0.0, beta: float = 1.0) -> Tensor:
    """L_PG: -mean_x sum_i (r_i - b) softmax_i(Q / beta) over groups of K samples of a prompt. Both [G, K]; a scalar.

    An unbiased estimate of -(J - b), J the expected reward of the policy that draws K samples and picks one with
    softmax(Q / beta). Eq. 5 of Q-Probe is this divided by K, because pi_K / p_0 = K E[rho] for every K.
    """
    return -((reward - baseline) * torch.softmax(q / beta, -1)).sum(-1).mean()


def qp_loss(chosen: Tensor, rejected: Tensor | float) -> Tensor:
    """L_QP: the mean of -log sigmoid(Q_w - Q_l) over pairs. Both [N]; a scalar."""
    return -logsigmoid(chosen - rejected).mean()


def sequence_moments(tokens: TokenLogprob, kept: Tensor) -> SequenceMoments:
    """Sums over the tokens of each response.

    Args:
        tokens: what `ops.linear_logprob` or `ops.logits_logprob` returned, every field [..., T].
        kept: bool [..., T], True on response tokens, the EOS included, False on prompt and padding. Fields there may
            hold anything, NaN too.

    Returns:
        SequenceMoments of shape [...]: only `.logp` carries a gradient.
    """
    if kept.dtype != torch.bool or kept.shape != tokens.logp.shape:
        shape = list(tokens.logp.shape)
        raise InputError(f"sequence_moments: kept must be bool {shape}, got {kept.dtype} {list(kept.shape)}")
    return reference.sequence_moments(TokenLogprob(*map(_wide, tokens)), kept)


def check_labels(moments: SequenceMoments, name: str = "response") -> None:
    """InputError, naming the first, for responses with a token that the policy forbids. Waits for the device."""
    forbidden = (moments.logp == -math.inf).flatten().nonzero().flatten().tolist()
    if forbidden:
        raise InputError(
            f"{name} {forbidden[0]} holds a token with log-probability -inf ({len(forbidden)} of "
            f"{moments.logp.numel()} do): its logit is masked, so it is no label to train on"
        )


def log_weight(moments: SequenceMoments, alignment: Alignment = "sampled") -> Tensor:
    """log w(y) = (1/|y|) sum_t a_t of WPO, [N], detached; 0 for a response without tokens.

    alignment: what the probability p_y of a token is measured against, hence a_t. "none": log p_y. "greedy":
    log (p_y / max_v p_v). "sampled", the paper's choice: log (p_y / sum_v p_v^2), 1 in the mean for a token drawn
    from p; such a weight can exceed 1.
    """
    _one_of(alignment, "alignment", ("none", "greedy", "sampled"))
    total = moments.logp if alignment == "none" else getattr(moments, alignment)
    return _wide(total).detach() / moments.tokens.clamp(min=1)


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
    _one_of(variant, "variant", ("both", "chosen", "rejected"))
    _one_of(clamp, "clamp", ("product", "none"))
    used = {"both": (chosen, rejected), "chosen": (chosen,), "rejected": (rejected,)}[variant]
    log_w = sum((log_weight(moments, alignment) for moments in used), torch.zeros_like(_wide(chosen.logp.detach())))
    return (log_w.clamp(max=0) if clamp == "product" else log_w).exp()


def class_weight(moments: SequenceMoments, desirable: Tensor, alignment: Alignment = "sampled") -> Tensor:
    """w(y), normalised to sum to 1 within the desirable and within the undesirable of the batch (WPO for KTO).

    desirable: bool [N]. [N], detached. A class without members has no weights. Multiply by `kto_loss` and sum: that
    is the weighted mean over each class, added up.
    """
    _check_desirable("class_weight", desirable, moments)
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
    _one_of(alignment, "alignment", ("none", "greedy", "sampled"))
    _one_of(variant, "variant", ("both", "chosen", "rejected"))
    _one_of(clamp, "clamp", ("product", "none"))
    orpo: Any = loss if getattr(loss, "func", loss) is orpo_loss else None
    if orpo is not None:
        loss = getattr(orpo, "keywords", {}).get("preference", odds_ratio_loss)
    weighing = partial(_weighted, loss, alignment, variant, clamp)
    return weighing if orpo is None else partial(orpo, preference=weighing)


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
    beta, eps = _positive(beta, "dpo_loss: beta"), real(label_smoothing, "dpo_loss: label_smoothing", 0, 0.5)
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
    beta = _positive(beta, "hinge_loss: beta")
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
    beta = _positive(beta, "ipo_loss: beta")
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
    beta, gamma = _positive(beta, "simpo_loss: beta"), real(gamma, "simpo_loss: gamma")
    _check_sides("simpo_loss", chosen, rejected)
    return -logsigmoid(beta * (_mean_logp(chosen) - _mean_logp(rejected)) - gamma)


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
    _one_of(reduction, "reduction", ("sum", "token_mean"))
    return -_wide(chosen.logp) if reduction == "sum" else -_mean_logp(chosen)


def odds_ratio_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
) -> Tensor:
    """-log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), log p = logp/|y| (ORPO, Eq. 7). [P]; no reference."""
    _check_sides("odds_ratio_loss", chosen, rejected)
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def orpo_loss(
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    lam: float = 0.1,
    preference: PairedLoss = odds_ratio_loss,
) -> Tensor:
    """`sft_loss` (per token) + lam * `odds_ratio_loss` (ORPO, Eq. 6). [P]; needs no reference.

    The NLL is of response tokens; the authors' code, and TRL's, takes that of the prompt too.

    preference: the term that lam multiplies; `weighted` puts its weights there.
    """
    lam, nll = real(lam, "orpo_loss: lam", 0), sft_loss(chosen, rejected)
    if lam == 0:
        return nll
    return nll + lam * preference(chosen, rejected, reference_chosen, reference_rejected)


def kto_baseline(policy_logp: Tensor, reference_logp: Tensor) -> Tensor:
    """z0 of KTO: the mean of log pi(y'|x) - log ref(y'|x) over mismatched (x, y'), at least 0. A detached scalar.

    policy_logp, reference_logp: [N] of prompts with the response of another example of the batch. In training on
    several devices gather both first. Raises InputError for fewer than two: one prompt has no other's response.
    """
    if policy_logp.numel() < 2 or policy_logp.shape != reference_logp.shape:
        shapes = f"{list(policy_logp.shape)} and {list(reference_logp.shape)}"
        raise InputError(f"kto_baseline needs log-probabilities [N] of N >= 2 mismatched responses, got {shapes}")
    return (_wide(policy_logp) - _wide(reference_logp)).detach().mean().clamp(min=0)


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
    _check_desirable("kto_loss", desirable, moments)
    beta = _positive(beta, "kto_loss: beta")
    lambdas = [
        real(value, f"kto_loss: {name}", 0)
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight))
    ]
    z0 = baseline.detach() if isinstance(baseline, Tensor) else baseline
    if isinstance(z0, Tensor) and z0.dim():
        raise InputError(f"kto_loss: baseline must be a scalar, got shape {list(z0.shape)}")
    gap = beta * (_log_ratio("kto_loss", moments, reference_logp) - z0)
    return torch.where(desirable, lambdas[0] * torch.sigmoid(-gap), lambdas[1] * torch.sigmoid(gap))


def fa_weight(z: Tensor, threshold: float = 0.0) -> Tensor:
    """1 where the standardised reward z > threshold, else 0 (filtering alignment, 2308.12050). [N]; NaN stays NaN.

    The mean of it is the retained fraction.
    """
    z = _wide(z)
    return torch.where(z.isnan(), z, z > real(threshold, "fa_weight: threshold"))


def rwr_weight(z: Tensor, beta: float = 5.0, cap: float | None = None) -> Tensor:
    """exp(z / beta) of the standardised reward z, in fp32 at least (reward-weighted regression, 2308.12050). [N].

    Not normalised. beta: math.inf gives weights of 1, SFT. cap: the most that a weight may be; a small beta needs one.
    """
    beta = beta if beta == math.inf else _positive(beta, "rwr_weight: beta")
    weight = (_wide(z) / beta).exp()
    return weight if cap is None else weight.clamp(max=_positive(cap, "rwr_weight: cap"))


def weighted_nll(moments: SequenceMoments, weight: Tensor, reduction: Reduction = "sum") -> Tensor:
    """sum_i -weight_i logp_i over the number of responses ("sum") or of all their tokens ("token_mean"). A scalar.

    "sum" has per-sequence sums, as in the equations of 2308.12050. Responses of weight 0 are counted in either number,
    so that the loss of a batch estimates that of the data set. Where all are 0, so is the loss, and its gradient.

    weight: [N], detached here.
    """
    _one_of(reduction, "reduction", ("sum", "token_mean"))
    if weight.shape != moments.logp.shape:
        raise InputError(
            f"weighted_nll: weight must have shape {list(moments.logp.shape)}, got {list(weight.shape)}: one a response"
        )
    weight = weight.detach()
    losses = torch.where(weight == 0, 0.0, -weight * _wide(moments.logp))
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


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _mean_logp(moments: SequenceMoments) -> Tensor:
    return _wide(moments.logp) / moments.tokens.clamp(min=1)


def _log_odds(moments: SequenceMoments) -> Tensor:
    """a - log(1 - exp(a)), a = logp/|y|. At a = 0, an empty or certain response, it would be inf with an inf slope.

    a stops at -CERTAIN, and the gradient with it. Far below, expm1(a) rounds to -1 and the error, exp(a), is less
    than that of a.
    """
    a = _mean_logp(moments).clamp(max=-CERTAIN)
    return a - torch.log(-torch.expm1(a))


def _log_ratio(loss: str, moments: SequenceMoments, reference_logp: Tensor | None) -> Tensor:
    if reference_logp is None:
        raise InputError(f"{loss} needs the reference policy's log-probabilities (reference_logp), got None")
    if reference_logp.shape != moments.logp.shape:
        shapes = f"{list(moments.logp.shape)}, got {list(reference_logp.shape)}"
        raise InputError(f"{loss}: the reference's log-probabilities must have the policy's shape {shapes}")
    return _wide(moments.logp) - _wide(reference_logp).detach()


def _margin(
    loss: str,
    chosen: SequenceMoments,
    rejected: SequenceMoments,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    normalize: bool = False,
) -> Tensor:
    """rho_w - rho_l, of sums or, normalised, of means over tokens."""
    _check_sides(loss, chosen, rejected)
    ratios = _log_ratio(loss, chosen, reference_chosen), _log_ratio(loss, rejected, reference_rejected)
    if normalize:
        ratios = ratios[0] / chosen.tokens.clamp(min=1), ratios[1] / rejected.tokens.clamp(min=1)
    return ratios[0] - ratios[1]


def _check_sides(loss: str, chosen: SequenceMoments, rejected: SequenceMoments) -> None:
    if chosen.logp.shape != rejected.logp.shape:
        sizes = f"{list(chosen.logp.shape)} chosen and {list(rejected.logp.shape)} rejected"
        raise InputError(f"{loss}: a pair has one response of each side, got {sizes}")


def _check_desirable(name: str, desirable: Tensor, moments: SequenceMoments) -> None:
    if desirable.dtype != torch.bool or desirable.shape != moments.logp.shape:
        found = f"{desirable.dtype} {list(desirable.shape)}"
        raise InputError(f"{name}: desirable must be bool {list(moments.logp.shape)}, got {found}")


def _one_of(value: Any, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _positive(value: Any, name: str) -> float:
    number = real(value, name)
    if number <= 0:
        raise InputError(f"{name} must be above 0, got {value!r}")
    return number
