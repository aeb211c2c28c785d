"""Rewards that compose: transforms of a scorer's raw score, made so that their weighted sum means something.

Each function takes anything that is a scorer (a Scorer, a directory, a callable) and returns a scorer that serves every
strategy but Tokenwise. Results then hold the transformed score u, under a name such as "lsc(reward-model)".
LSC is "Transforming and Combining Rewards for Aligning Large Language Models" (arXiv:2402.00742).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyengine.errors import InputError, whole
from pyengine.rewards.references import ReferenceLike, Statistics, reference_of
from pyengine.scorers import Candidates, Scorer, ScorerLike, Transform, Transformed, parts_of


def lsc(scorer: ScorerLike, reference: ReferenceLike) -> Transformed:
    """u = log sigmoid(r - r_ref(x)) = -softplus(r_ref(x) - r): the log-odds score of LSC, in nats, at most 0.

    For a Bradley-Terry reward it is the log-probability of being better than the reference response. It saturates
    above the reference (slope sigmoid(r_ref - r)), is -log 2 at it and r - r_ref far below; -inf stays -inf, NaN NaN.
    A sum of such, `a & b`, is the log-probability that all properties hold.

    reference: References, a LearnedReference, a number for all prompts, a mapping from prompt to number, or the path
    of stored References. Raises InputError for a prompt that has none.
    """
    return _referenced("lsc", scorer, reference, logsigmoid, log_probability=True)


def centred(scorer: ScorerLike, reference: ReferenceLike) -> Transformed:
    """u = r - r_ref(x), in the unit of r. It leaves the choice among one prompt's responses as it is (LSC's ablation).

    reference: as for `lsc`.
    """
    return _referenced("centred", scorer, reference, lambda gap: gap)


def log_sigmoid(scorer: ScorerLike) -> Transformed:
    """u = log sigmoid(r), in nats: the log-probability of the property where r is a pointwise classifier's logit (LSC).

    For a Bradley-Terry reward, whose zero is arbitrary, it is an ablation: use `lsc`.
    """
    transform = Transform("log_sigmoid", lambda scores, prompts: logsigmoid(scores), log_probability=True)
    return Transformed(_single(scorer, "log_sigmoid"), transform)


def normalised(scorer: ScorerLike, statistics: Statistics | str | os.PathLike[str]) -> Transformed:
    """u = (r - mean) / std with frozen statistics, in standard deviations; a std of 0 gives 0 for every finite r.

    statistics: Statistics or the path where they are stored.
    """
    known = Statistics.load(statistics) if isinstance(statistics, (str, os.PathLike)) else statistics
    if not isinstance(known, Statistics):
        raise InputError(f"normalised takes Statistics or their path, got {statistics!r}: Statistics.of(rewards)")

    def standard(scores: Tensor, prompts: Sequence[str]) -> Tensor:
        if known.std == 0:
            return torch.where(scores.isfinite(), 0.0, scores)
        return (scores - known.mean) / known.std

    return Transformed(_single(scorer, "normalised"), Transform("normalised", standard))


def length(longest: int = 1024) -> Scorer:
    """r = log(min(T, longest) / longest) <= 0 of T response tokens, the EOS included (Controlled Decoding's length)."""
    return _Length(longest)


class _Length(Scorer):
    name, reads_ids = "length", True

    def __init__(self, longest: int) -> None:
        self.longest = whole(longest, "length: longest", 1)

    def score(self, candidates: Candidates) -> Tensor:
        counts = [len(tokens) for tokens in candidates.tokens]
        if 0 in counts:
            raise InputError(f"scorer {self.name!r} counts tokens, candidate {counts.index(0)} comes without any")
        return torch.tensor([math.log(min(n, self.longest) / self.longest) for n in counts])


def _referenced(
    kind: str,
    scorer: ScorerLike,
    reference: ReferenceLike,
    function: Callable[[Tensor], Tensor],
    log_probability: bool = False,
) -> Transformed:
    """`function` of r - r_ref(x)."""
    inner, known = _single(scorer, kind), reference_of(reference)
    if known.scorer and known.scorer != inner.name:
        raise InputError(
            f"{kind}: the references were made with scorer {known.scorer!r}, not with {inner.name!r}; make them with "
            "this one, or rename them (dataclasses.replace(references, scorer=...)) if they are the same"
        )

    def apply(scores: Tensor, prompts: Sequence[str]) -> Tensor:
        at = torch.tensor(known.lookup(prompts), dtype=scores.dtype, device=scores.device)
        return function(scores - at)

    return Transformed(inner, Transform(kind, apply, log_probability))


def _single(scorer: ScorerLike, kind: str) -> Scorer:
    """The one scorer of weight 1 that a transform takes: of a sum it would hide which reward saturates."""
    parts = parts_of(scorer)
    if len(parts) != 1 or parts[0].weight != 1:
        given = " + ".join(f"{part.weight:g} * {part.name}" for part in parts)
        raise InputError(
            f"{kind} takes one scorer of weight 1, got {given or 'none'}: transform each, then weight and add them"
        )
    return parts[0].term()[1]
