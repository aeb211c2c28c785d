"""World D2: preference pairs of another policy, and a reward that falls again beyond what they show.

Each of X prompts has Y one-token candidates with D features; the policy is log-linear in them. The reward rises along
one direction, z, until it is 1 and falls steeply soon after: a policy that extrapolates from pairs which say "more z"
runs past the best. Everything is fp64 with a leading dimension of seeds, which never meet: one training is that of all
seeds at once, and a seed has the same world whatever the others are. Policies are evaluated exactly, by enumeration.

Choices that no source fixes: features are standard normal; the reference policy and the policy that the pairs are
drawn from are log-linear too, with weights .5 N(0, 1); batches hold 32 pairs, in a new order each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyengine.errors import InputError
from pyengine.losses import dpo_loss, pair_weight, weighted
from pyengine.reference import PairedLoss, SequenceMoments

PROMPTS, CANDIDATES, WIDTH, PAIRS = 8, 400, 8, 256
CURVATURE, TURN = 1.5, 1.0  # r = z - CURVATURE relu(z - TURN)^2, standardised over the candidates of all prompts
SPREAD, SHARPNESS = 0.5, 2.0  # of the weights of the two policies; of the labels
LENGTH = 3  # tokens that a candidate counts as: the weight of WPO is p^(1 / LENGTH)
BETA, RATE, BATCH, EPOCHS = 0.01, 0.1, 32, 20


class Bandit(NamedTuple):
    """features [S, X, Y, D], reward [S, X, Y], weights of the reference policy [S, D]; prompt [S, N] and candidates
    [S, N, 2] of the pairs, the preferred one first."""

    features: Tensor
    reward: Tensor
    reference: Tensor
    prompt: Tensor
    pair: Tensor


def concave(seeds: Sequence[int], curvature: float = CURVATURE, pairs: int = PAIRS) -> Bandit:
    """World D2, once for each seed; with a curvature of 0 the reward is linear, and more z is always better."""
    worlds = [_world(seed, curvature, pairs) for seed in seeds]
    if not worlds:
        raise InputError("concave: give at least one seed")
    return Bandit(*(torch.stack(fields) for fields in zip(*worlds, strict=True)))


def _world(seed: int, curvature: float, pairs: int) -> Bandit:
    rng = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=rng, dtype=torch.float64)
    features, direction = normal(PROMPTS, CANDIDATES, WIDTH), normal(WIDTH)
    z = features @ (direction / direction.norm())
    reward = z - curvature * (z - TURN).relu().square()
    reward = (reward - reward.mean()) / reward.std()
    reference, source = SPREAD * normal(WIDTH), SPREAD * normal(WIDTH)
    prompt = torch.randint(PROMPTS, (pairs,), generator=rng)
    pair = torch.multinomial((features @ source).softmax(-1)[prompt], 2, generator=rng)
    first, second = reward[prompt[:, None], pair].T
    flipped = torch.rand(pairs, generator=rng, dtype=torch.float64) >= torch.sigmoid(SHARPNESS * (first - second))
    return Bandit(features, reward, reference, prompt, torch.where(flipped[:, None], pair.flip(-1), pair))


def log_law(world: Bandit, weights: Tensor) -> Tensor:
    """Log-probabilities [S, X, Y] of the candidates under the policies with these weights [S, D]."""
    return torch.einsum("sxyd,sd->sxy", world.features, weights).log_softmax(-1)


def expected(world: Bandit, weights: Tensor) -> Tensor:
    """[S]: expected reward, the mean over prompts, in standard deviations of the reward over all candidates."""
    return (log_law(world, weights).exp() * world.reward).sum(-1).mean(-1)


def divergence(world: Bandit, weights: Tensor) -> Tensor:
    """[S]: KL from the reference policy in nats, the mean over prompts."""
    own, reference = (log_law(world, w) for w in (weights, world.reference))
    return (own.exp() * (own - reference)).sum(-1).mean(-1)


def moments(log_p: Tensor, prompt: Tensor, pair: Tensor, length: int = LENGTH) -> SequenceMoments:
    """Of the candidates pair [S, B, 2] of prompt [S, B] under log_p [S, X, Y]: [S, B, 2], as of `length` tokens."""
    seed = torch.arange(len(log_p))[:, None]
    logp = log_p[seed[:, :, None], prompt[:, :, None], pair]
    known = log_p.detach()
    second, top = (2 * known).logsumexp(-1), known.amax(-1)
    entropy = -(known.exp() * known).sum(-1)
    sampled, greedy, entropy = (x[seed, prompt][:, :, None].expand_as(logp) for x in (second, top, entropy))
    tokens, still = torch.full_like(pair, length), logp.detach()
    return SequenceMoments(logp, tokens, still - sampled, still - greedy, entropy)


def shuffled(loss: PairedLoss, rng: torch.Generator) -> PairedLoss:
    """The control of WPO: each pair's loss times the weight of another pair of its batch and seed."""

    def control(chosen: SequenceMoments, rejected: SequenceMoments, one: Tensor | None, other: Tensor | None) -> Tensor:
        weight = pair_weight(chosen, rejected)
        order = torch.rand(weight.shape, generator=rng).argsort(-1)
        return weight.gather(-1, order) * loss(chosen, rejected, one, other)

    return control


def arms(beta: float = BETA, seed: int = 0) -> dict[str, PairedLoss]:
    """DPO, WPO with sampled alignment and the product clamp, its two halves, and its control."""
    dpo = partial(dpo_loss, beta=beta)
    return {
        "DPO": dpo,
        "WPO": weighted(dpo),
        "WPO_W": weighted(dpo, variant="chosen"),
        "WPO_L": weighted(dpo, variant="rejected"),
        "shuffled": shuffled(dpo, torch.Generator().manual_seed(seed)),
    }


class Trace(NamedTuple):
    """reward, kl: [epochs + 1, S], exact, before training and after each epoch. weights: [S, D], at the end."""

    reward: Tensor
    kl: Tensor
    weights: Tensor


def train(world: Bandit, loss: PairedLoss, epochs: int = EPOCHS, length: int = LENGTH, seed: int = 0) -> Trace:
    """Adam on the mean loss of each batch, from the reference policy on. The order of the pairs depends on `seed`."""
    rng = torch.Generator().manual_seed(seed)
    weights = world.reference.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([weights], lr=RATE)
    reference = log_law(world, world.reference)
    known = [(expected(world, weights.detach()), divergence(world, weights.detach()))]
    for _ in range(epochs):
        for batch in torch.rand(world.prompt.shape, generator=rng).argsort(-1).split(BATCH, -1):
            prompt = world.prompt.gather(1, batch)
            pair = world.pair.gather(1, batch[:, :, None].expand(-1, -1, 2))
            both = moments(log_law(world, weights), prompt, pair, length)
            chosen, rejected = (SequenceMoments(*(field[:, :, i] for field in both)) for i in (0, 1))
            before = moments(reference, prompt, pair, length).logp
            optimiser.zero_grad()
            loss(chosen, rejected, before[:, :, 0], before[:, :, 1]).mean(-1).sum().backward()  # seeds never meet
            optimiser.step()
        known.append((expected(world, weights.detach()), divergence(world, weights.detach())))
    reward, kl = (torch.stack(x) for x in zip(*known, strict=True))
    return Trace(reward, kl, weights.detach())
