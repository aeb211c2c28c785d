"""World F: offline alignment of a bigram policy on responses that carry a reward; all of it evaluated exactly.

A response of LENGTH tokens has the sum of a reward for each step. Half of the data, the part that stands for
supervised demonstrations, is from a bigram law tilted towards the reward; the other half, for what a reward model was
trained on, from one tilted away. z is the reward standardised over both halves.

Choices that no source fixes: logits and step rewards are standard normal, the tilts are exp(+-.25 reward), each half
has 5,000 responses, counts are not smoothed, and the KL-regularised optimum has the policy of the supervised half as
its reference and the reward in its own unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyengine.errors import InputError
from pyengine.losses import ca_loss, fa_weight, rwr_weight
from pyengine.reference import SequenceMoments
from pyengine.rewards import Statistics
from pyengine.worlds import bigram

Array = NDArray[np.float64]
VOCAB, LENGTH = 10, 12
TILT = 0.25  # of the halves' laws, in units of 1 / reward


class Offline(NamedTuple):
    """step: [V + 1, V], the reward of a token after another. halves: [2, V + 1, V], the laws of the two halves.

    responses [2 N, LENGTH], the supervised half first; z [2 N].
    """

    step: Array
    halves: Array
    responses: NDArray[np.intp]
    z: Array
    statistics: Statistics

    @property
    def supervised(self) -> Array:
        """[2 N], 1 for the supervised half."""
        return (np.arange(len(self.z)) < len(self.z) // 2).astype(float)


def offline(seed: int, responses: int = 5000) -> Offline:
    """World F with `responses` in each half."""
    if responses < 1:
        raise InputError(f"offline: responses must be at least 1, got {responses}")
    rng = np.random.default_rng(seed)
    logits, step = rng.standard_normal((2, VOCAB + 1, VOCAB))
    halves = bigram.normalised(np.stack([logits + TILT * step, logits - TILT * step]))
    drawn = bigram.sample(halves, LENGTH, responses, int(rng.integers(2**62)))
    reward = bigram.along(np.stack([step, step]), drawn).flatten()
    statistics = Statistics.of(reward.tolist())
    return Offline(step, halves, drawn.reshape(-1, LENGTH), np.array(statistics.z(reward.tolist())), statistics)


def mean_z(world: Offline, law: Array) -> float:
    """Exact E[z] of the bigram law [V + 1, V]."""
    mean, _ = bigram.moments(law[None], world.step[None], LENGTH)
    return (float(mean[0]) - world.statistics.mean) / world.statistics.std


def divergence(law: Array, base: Array) -> float:
    """Exact KL(law || base) of whole responses in nats."""
    ratio = np.where(law > 0, law, 1.0) / np.where(law > 0, base, 1.0)
    return float(bigram.moments(law[None], np.log(ratio)[None], LENGTH)[0][0])


def _steps(world: Offline) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Last and next tokens [2 N, LENGTH] along the responses."""
    return np.insert(world.responses[:, :-1], 0, VOCAB, axis=1), world.responses


def count_fit(world: Offline, weight: Array) -> Array:
    """[V + 1, V]: the most likely bigram law for the responses with these weights [2 N]; uniform where none went."""
    counts = np.zeros((VOCAB + 1, VOCAB))
    np.add.at(counts, _steps(world), np.repeat(weight[:, None], LENGTH, 1))
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.where(total > 0, total, 1.0), 1 / VOCAB)


def weights(world: Offline) -> dict[str, Array]:
    """What each method weighs the responses with: SFT on the supervised half, or on all; FA, t = 0; RWR, beta = 5."""
    z = torch.from_numpy(world.z)
    return {
        "SFT": world.supervised,
        "SFT, all": np.ones(len(z)),
        "FA": fa_weight(z).double().numpy(),
        "RWR": rwr_weight(z).numpy(),
    }


def conditional(world: Offline) -> Array:
    """Conditional alignment, [2, V + 1, V]: intercepts and slopes in z of the logits, by L-BFGS on `losses.ca_loss`.

    Log-linear in z: what is asked for beyond the data's z is an extrapolation by this class of models.
    """
    last, following = (torch.from_numpy(x) for x in _steps(world))
    z = torch.from_numpy(world.z)[:, None, None]
    parameters = torch.zeros(2, VOCAB + 1, VOCAB, dtype=torch.float64, requires_grad=True)
    tokens = torch.full((len(world.z),), LENGTH)

    def loss() -> Tensor:
        logits = parameters[0][last] + z * parameters[1][last]
        logp = logits.log_softmax(-1).gather(-1, following[:, :, None]).sum((1, 2))
        unused = logp.detach()  # moments for weights, of which this loss has none
        return ca_loss(SequenceMoments(logp, tokens, unused, unused, unused)) / LENGTH

    _minimise(loss, parameters)
    return parameters.detach().numpy()


def asked(fit: Array, z: float) -> Array:
    """The law [V + 1, V] of `conditional`'s policy when it is asked for z."""
    return bigram.normalised(fit[0] + z * fit[1])


def regularised(world: Offline, base: Array, beta: float = 0.3, standardised: bool = False) -> Array:
    """The bigram law that maximises E[r] - beta KL(law || base), by L-BFGS on the exact objective.

    It stands in for PPO. r is the reward in its own unit or, standardised, z. What base forbids stays forbidden.
    """
    unit = world.statistics.std if standardised else 1.0
    reward, law = torch.from_numpy(world.step / unit), torch.from_numpy(base)
    allowed = law > 0
    known = torch.where(allowed, law, 1.0).log()
    logits = known.clone().requires_grad_(True)

    def policy() -> Tensor:
        return torch.where(allowed, logits, -torch.inf).log_softmax(-1)

    def loss() -> Tensor:
        logp = policy()
        chance = logp.exp()
        gained = chance * (reward - beta * torch.where(allowed, logp - known, 0.0))
        ahead = torch.zeros(VOCAB + 1, dtype=torch.float64)
        for _ in range(LENGTH):
            ahead = gained.sum(-1) + chance @ ahead[:VOCAB]
        return -ahead[-1]

    _minimise(loss, logits)
    return policy().detach().exp().numpy()


def _minimise(loss: Callable[[], Tensor], parameters: Tensor) -> None:
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
