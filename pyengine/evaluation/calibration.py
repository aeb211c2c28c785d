"""How right a reward model is on labelled examples, and how sure of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pyengine.scorers import Candidates, RewardModel
from pyengine.scorers.base import as_given
from pyengine.training.examples import Labelled, Pair

BINS = 10


@torch.inference_mode()
def evaluate(scorer: RewardModel, examples: Sequence[Pair] | Sequence[Labelled]) -> dict[str, Any]:
    """Accuracy, margin, loss and calibration of a reward model on examples, scored as the engine scores them.

    Pairs: accuracy is the share with r_w > r_l (a tie is wrong), margin the mean of r_w - r_l, and the confidence in
    the preferred side sigmoid(|r_w - r_l|). Labels: accuracy at a logit of 0, margin the difference of the classes'
    mean logits (NaN with one class), confidence likewise in the predicted class.
    """

    def scores(responses: Sequence[str]) -> Tensor:
        prompts, tokens = [e.prompt for e in examples], [[0]] * len(examples)
        return scorer.score(Candidates(prompts, tokens, {}, {}, as_given(responses))).double().cpu()

    if isinstance(examples[0], Pair):
        logit = scores([e.chosen for e in examples]) - scores([e.rejected for e in examples])  # type: ignore[union-attr]
        right, loss, margin = logit > 0, -logsigmoid(logit).mean(), logit.mean()
    else:
        logit = scores([e.response for e in examples])  # type: ignore[union-attr]
        label = torch.tensor([e.label for e in examples], dtype=torch.float64)  # type: ignore[union-attr]
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
