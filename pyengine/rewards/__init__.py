"""Rewards that compose: transforms of a scorer's raw score, made so that their weighted sum means something.

Each function takes anything that is a scorer (a Scorer, a directory, a callable) and returns a scorer that serves every
strategy but Tokenwise. Results then hold the transformed score u, under a name such as "lsc(reward-model)".
LSC is "Transforming and Combining Rewards for Aligning Large Language Models" (arXiv:2402.00742).
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from pyengine.codec import PromptLike, as_prompts, key_of
from pyengine.errors import InputError, whole
from pyengine.results import SamplingParams
from pyengine.rewards.references import ReferenceLike, Statistics, reference_of
from pyengine.scorers import Candidates, Scorer, ScorerLike, Transform, Transformed, parts_of

if TYPE_CHECKING:
    from pyengine.engine import Engine

AT_ONCE = 1024  # samples whose results are held at a time


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
    name = "length"

    def __init__(self, longest: int) -> None:
        self.longest = whole(longest, "length: longest", 1)

    def score(self, candidates: Candidates) -> Tensor:
        counts = [len(tokens) for tokens in candidates.tokens]
        if 0 in counts:
            raise InputError(f"scorer {self.name!r} counts tokens, candidate {counts.index(0)} comes without any")
        return torch.tensor([math.log(min(n, self.longest) / self.longest) for n in counts])


def sample_rewards(
    engine: Engine,
    prompts: PromptLike | Sequence[PromptLike],
    scorer: ScorerLike,
    samples: int = 64,
    sampling: SamplingParams | None = None,
    progress: bool | None = None,
) -> dict[str, list[float]]:
    """Rewards of `samples` responses of the base policy to each prompt's text, which the makers of references take.

    The j-th sample of a prompt has the seed sampling.seed + j. The engine follows its own scorer again afterwards.
    progress: a bar on stderr after two seconds; None shows it on a terminal only.
    """
    given = as_prompts(prompts)
    for i, prompt in enumerate(given):
        engine.encode(prompt, f"prompt {i}")
    asked = list(dict.fromkeys(map(key_of, given)))
    samples = whole(samples, "sample_rewards: samples", 1)
    sampling = sampling or SamplingParams()
    seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
    params = [replace(sampling, seed=seed + j) for j in range(samples)]
    group = max(1, AT_ONCE // samples)
    rewards: dict[str, list[float]] = {}
    hide = None if progress is None else not progress
    with engine.following(scorer):
        if not engine.parts:
            raise InputError("sample_rewards needs a scorer")
        with tqdm(total=len(asked) * samples, unit="sample", delay=2, disable=hide, leave=False) as bar:
            for start in range(0, len(asked), group):
                some = asked[start : start + group]
                repeated = [prompt for prompt in some for _ in range(samples)]
                for result in engine.generate(repeated, sampling=params * len(some), progress=False):
                    assert result.reward is not None  # there is a scorer
                    rewards.setdefault(result.prompt, []).append(result.reward)
                bar.update(len(repeated))
    return rewards


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
