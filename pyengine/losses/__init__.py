"""Losses as pure functions of what a model gives: Q-Probe's four, preference losses with WPO's weights, offline ones.

Preference and offline losses see a response through its `SequenceMoments`: sums over its tokens, from
`sequence_moments`, or as `ops.linear_preference` hands them to a loss. All arithmetic is in fp32 at least; fp64 stays
fp64. Only log-probabilities of the policy carry a gradient: weights, baselines and references are detached.

A response without tokens has log-probability 0 and weight 1, and its length counts as 1, so that nothing is NaN. A
label with log-probability -inf is an error of the data that no loss looks for, as looking would synchronise with the
device: `check_labels` does. Unchecked, a loss takes its limit there (DPO: inf for a chosen response, 0 for a rejected
one), and the WPO weight is 0, which leaves the pair out.
"""

from pyengine.losses.moments import Reduction, check_labels, sequence_moments
from pyengine.losses.offline import ca_loss, fa_loss, fa_weight, rwr_loss, rwr_weight, weighted_nll
from pyengine.losses.preference import (
    OrpoLoss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    odds_ratio_loss,
    sft_loss,
    simpo_loss,
)
from pyengine.losses.probe import ce_loss, pg_loss, q_loss, qp_loss
from pyengine.losses.weights import Alignment, Clamp, Variant, class_weight, log_weight, pair_weight, weighted

__all__ = [
    "Alignment",
    "Clamp",
    "OrpoLoss",
    "Reduction",
    "Variant",
    "ca_loss",
    "ce_loss",
    "check_labels",
    "class_weight",
    "dpo_loss",
    "fa_loss",
    "fa_weight",
    "hinge_loss",
    "ipo_loss",
    "kto_baseline",
    "kto_loss",
    "log_weight",
    "odds_ratio_loss",
    "pair_weight",
    "pg_loss",
    "q_loss",
    "qp_loss",
    "rwr_loss",
    "rwr_weight",
    "sequence_moments",
    "sft_loss",
    "simpo_loss",
    "weighted",
    "weighted_nll",
]
