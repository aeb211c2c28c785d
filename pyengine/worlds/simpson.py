"""World E: probes between prompts and within them (Simpson's paradox), for Q-Probe's losses.

A response succeeds by its prompt's easiness and its own quality. One feature reads easiness with noise; one is mixed:
quality minus easiness, so that it rises with success within a prompt and falls with it between prompts; one reads
quality with more noise. Selection only ever compares responses of one prompt: what a loss spends on easiness is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyengine.losses import ce_loss, pg_loss, q_loss
from pyengine.worlds.outcomes import best_of_k_mean

Array = NDArray[np.float64]

SAMPLES, WIDTH = 60, 32
EASINESS, QUALITY, OFFSET = 2.0, 1.5, -1.0  # logit of success
BLUR_EASINESS, BLUR_MIXED, BLUR_QUALITY = 1.0, 0.3, 1.5  # noise of the three features that say something
GROUP = 10  # responses in one softmax of the policy-gradient loss, as in Q-Probe's training
PENALTY = 1e-4  # on the squared weights: separable groups have no finite optimum without it
ROTATION = 1234  # seed of the orthogonal matrix that mixes the features; every draw of the world has the same


class Simpson(NamedTuple):
    """features [X, N, D], reward [X, N] of 0 and 1."""

    features: Array
    reward: Array


def simpson(prompts: int, seed: int, samples: int = SAMPLES, width: int = WIDTH) -> Simpson:
    """World E. Half of the other features are noise of the prompt, half noise of the response."""
    rng = np.random.default_rng(seed)
    easiness = rng.standard_normal((prompts, 1))
    quality = rng.standard_normal((prompts, samples))
    own = rng.standard_normal((3, prompts, samples))
    features = np.empty((prompts, samples, width))
    features[..., 0] = easiness + BLUR_EASINESS * rng.standard_normal((prompts, 1))
    features[..., 1] = quality - easiness + BLUR_MIXED * own[0]
    features[..., 2] = quality + BLUR_QUALITY * own[1]
    shared = (width - 3) // 2
    features[..., 3 : 3 + shared] = rng.standard_normal((prompts, 1, shared))
    features[..., 3 + shared :] = rng.standard_normal((prompts, samples, width - 3 - shared))
    chance = 1 / (1 + np.exp(-(EASINESS * easiness + QUALITY * quality + OFFSET)))
    reward = (rng.random((prompts, samples)) < chance).astype(float)
    turn, _ = np.linalg.qr(np.random.default_rng(ROTATION).standard_normal((width, width)))
    return Simpson(features @ turn, reward)


def l_pg(score: Tensor, reward: Tensor) -> Tensor:
    """`pg_loss` of [X, N] samples, in groups of GROUP, above the data's mean."""
    groups = (x.unflatten(1, (-1, GROUP)).flatten(0, 1) for x in (score, reward - reward.mean()))
    return pg_loss(*groups)


LOSSES = {"Q": q_loss, "CE": ce_loss, "PG": l_pg}


def fit(loss: str, data: Simpson, steps: int = 150) -> Array:
    """Weights [D] of the linear probe that minimises a loss of `LOSSES` over all data at once, by L-BFGS in fp64.

    The offset that L_Q and L_CE need is fitted too and left out: selection does not see it.
    """
    x, r = torch.from_numpy(data.features), torch.from_numpy(data.reward)
    parameters = torch.zeros(x.shape[-1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = LOSSES[loss](x @ parameters[:-1] + parameters[-1], r) + PENALTY * parameters[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(closure)
    return parameters.detach()[:-1].numpy()


def pass_rate(data: Simpson, probe: Array, k: int) -> Array:
    """Exact expected reward [X] of the best of k iid draws from each prompt's responses, by the probe's score."""
    return best_of_k_mean(data.features @ probe, data.reward, k)


def slope(data: Simpson, probe: Array) -> float:
    """Least-squares slope of the standardised score on its prompt's pass rate: what the probe spends on easiness."""
    score = data.features @ probe
    score = (score - score.mean()) / score.std()
    rate = data.reward.mean(1)
    return float(np.cov(rate, score.mean(1))[0, 1] / rate.var(ddof=1))
