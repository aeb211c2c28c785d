"""Rewards of the base policy's own responses, from which references are made."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from pyengine.codec import PromptLike, as_prompts, key_of
from pyengine.engine import Engine
from pyengine.errors import InputError, whole
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike

AT_ONCE = 1024  # samples whose results are held at a time


def sample_rewards(
    engine: Engine,
    prompts: PromptLike | Sequence[PromptLike],
    scorer: ScorerLike,
    samples: int = 64,
    sampling: SamplingParams | None = None,
    progress: bool | None = None,
) -> dict[str, list[float]]:
    """Rewards of `samples` responses of the base policy to each prompt's text: what references are made from.

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
