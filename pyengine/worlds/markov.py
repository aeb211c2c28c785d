"""Markov languages whose values, optimal tilts, selection laws and KL are known by dynamic programming.

World A adds up rewards along a response of fixed length, world B rewards the length of a response that may end at
any token; both draw their first token uniformly from the states. Tables are fp64 NumPy over (t, z): t response tokens
were drawn, z is the last of them; for t = 0, z is the prompt. Rewards are in the reward's own unit, KL in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyengine.errors import InputError
from pyengine.worlds.outcomes import best_of_k_ratio, divergence, gibbs_law, levels

Array = NDArray[np.float64]
HAZARDS = (0.01, 0.02, 0.04, 0.10, 0.25, 0.5)  # of world B's states: chance that the next token is the EOS


@dataclass(frozen=True, eq=False)
class Chain:
    """Tokens 0 .. S-1 are states, token S is the EOS; the reward of y is Σ gain[y_t] + final[T, y_T].

    step: [S, S + 1], P(next token | state). cap: the response ends with this many tokens. gain: [S + 1], whole
    numbers >= 0, so that what was gained can be a dimension of a table. final: [cap + 1, S + 1], read at the EOS and
    at the cap. prompts: the states that a prompt can be; averages are over them.
    """

    step: Array
    cap: int
    gain: NDArray[np.intp]
    final: Array
    prompts: tuple[int, ...]

    @property
    def states(self) -> int:
        return len(self.step)

    def reward(self, tokens: Sequence[int]) -> float:
        """Of a whole response; InputError for one that neither ends with the EOS nor reaches the cap."""
        if not tokens or (tokens[-1] != self.states and len(tokens) != self.cap):
            raise InputError(
                f"reward: {len(tokens)} tokens without an EOS are no whole response; the cap is {self.cap}"
            )
        return float(self.gain[list(tokens)].sum() + self.final[len(tokens), tokens[-1]])


class Cost(NamedTuple):
    """Expected reward and KL from the base policy."""

    reward: float
    kl: float


def additive(cap: int = 48, stay: float = 0.9) -> Chain:
    """World A: two states, responses of `cap` tokens, the reward is the number of tokens in state 1."""
    step = np.array([[stay, 1 - stay, 0.0], [1 - stay, stay, 0.0]])
    return _begun(step, cap, np.array([0, 1, 0, 0]), np.zeros(cap + 1))


def length(cap: int = 128, seed: int = 0) -> Chain:
    """World B: six states with their hazards of an EOS, moves .7 I + .3 Dirichlet(.4), reward log(T / cap)."""
    n = len(HAZARDS)
    moves = 0.7 * np.eye(n) + 0.3 * np.random.default_rng(seed).dirichlet([0.4] * n, size=n)
    hazard = np.array(HAZARDS)[:, None]
    reward = np.log(np.maximum(np.arange(cap + 1), 1) / cap)
    return _begun(np.hstack([(1 - hazard) * moves, hazard]), cap, np.zeros(n + 2, dtype=np.intp), reward)


def _begun(step: Array, cap: int, gain: NDArray[np.intp], final: Array) -> Chain:
    """A chain with one more state, the only prompt: it is never drawn, and the first token is any of the others."""
    n = len(step)
    first = np.append(np.full(n, 1 / n), 0.0)
    whole = np.insert(np.vstack([step, first]), n, 0.0, axis=1)
    return Chain(whole, cap, gain, final[:, None].repeat(n + 2, 1), (n,))


def perturbed(chain: Chain, scale: float, seed: int) -> Chain:
    """The chain with scale * N(0, 1) added to the logits of its tokens: another base policy, equal rewards."""
    noisy = chain.step * np.exp(scale * np.random.default_rng(seed).standard_normal(chain.step.shape))
    return replace(chain, step=noisy / noisy.sum(1, keepdims=True))


# Values and tilts


def backup(chain: Chain, table: Array) -> Array:
    """The target of CD-Q (Controlled Decoding) from V [cap + 1, S + 1]: the reward where y ends, else E of V.

    Values are of what is still to come; what was gained before does not count.
    """
    out = chain.final.copy()
    out[:-1, :-1] = (chain.gain + table[1:]) @ chain.step.T
    return out


def values(chain: Chain) -> Array:
    """V* [cap + 1, S + 1] (Controlled Decoding), of what is still to come, by one pass backwards."""
    out = chain.final.copy()
    for t in range(chain.cap - 1, -1, -1):
        out[t, :-1] = chain.step @ (chain.gain + out[t + 1])
    return out


def tilted(chain: Chain, value: Array, weight: float) -> Array:
    """Tokenwise policy [cap, S, S + 1], π ∝ p0 exp(weight V) (Controlled Decoding, Eq. 6), by any value table."""
    utility = (chain.gain + value[1:])[:, None, :]
    return gibbs_law(chain.step[None], utility.repeat(chain.states, 1), weight)


def evaluate(chain: Chain, policy: Array) -> tuple[Array, Array]:
    """Expected reward [S] and sequence KL [S] of a tokenwise policy [cap, S, S + 1], after each state as a prompt."""
    reward, kl = chain.final.copy(), np.zeros_like(chain.final)
    for t in range(chain.cap - 1, -1, -1):
        reward[t, :-1] = policy[t] @ (chain.gain + reward[t + 1])
        kl[t, :-1] = divergence(policy[t], chain.step) + policy[t] @ kl[t + 1]
    return reward[0, :-1], kl[0, :-1]


def visits(chain: Chain, policy: Array | None = None) -> Array:
    """[cap + 1, S + 1]: chance that the t-th token is z, from a random prompt; base policy by default."""
    out = np.zeros_like(chain.final)
    out[0, list(chain.prompts)] = 1 / len(chain.prompts)
    for t in range(chain.cap):
        out[t + 1] = out[t, :-1] @ (chain.step if policy is None else policy[t])
    return out


def tokenwise(chain: Chain, value: Array, weight: float) -> Cost:
    """Reward and KL of Tokenwise(weight), averaged over the prompts."""
    reward, kl = evaluate(chain, tilted(chain, value, weight))
    return Cost(*(float(x[list(chain.prompts)].mean()) for x in (reward, kl)))


# Selection among blocks


def block_law(chain: Chain, tokens: int) -> Array:
    """[S, tokens, S + 1, G]: chance that a block from state s is i + 1 tokens long, ends with z and gains g.

    A block ends with its EOS or when it has all its tokens.
    """
    n, most = chain.states, tokens * int(chain.gain.max()) + 1
    out = np.zeros((n, tokens, n + 1, most))
    alive = np.zeros((n, n, most))
    alive[range(n), range(n), 0] = 1
    for i in range(tokens):
        moved = np.einsum("scg,cz->szg", alive, chain.step)
        for z in np.flatnonzero(chain.gain):
            shifted = np.zeros_like(moved[:, z])
            shifted[:, chain.gain[z] :] = moved[:, z, : most - chain.gain[z]]
            moved[:, z] = shifted
        out[:, i, n] = moved[:, n]
        alive = moved[:, :n]
    out[:, -1, :n] = alive
    return out


@dataclass(frozen=True, eq=False)
class Selection:
    """Blockwise best-of-k, exactly.

    reward, kl: [S], after each state as a prompt. log_ratio: at each block's start t, log π / p0 of a block from state
    s with i + 1 tokens, last token z and gain g: [S, M, S + 1, G].
    """

    chain: Chain
    block_tokens: int
    reward: Array
    kl: Array
    log_ratio: dict[int, Array]

    @property
    def cost(self) -> Cost:
        """Averaged over the prompts."""
        return Cost(*(float(x[list(self.chain.prompts)].mean()) for x in (self.reward, self.kl)))

    def sequence_log_ratio(self, state: int, tokens: Sequence[int]) -> float:
        """log π(y) / p0(y) of a whole response to the prompt `state`; its mean over samples of π is the KL."""
        total = 0.0
        for t in range(0, len(tokens), self.block_tokens):
            block = list(tokens[t : t + self.block_tokens])
            gained = self.chain.gain[block].sum()
            total += self.log_ratio[t][state, len(block) - 1, block[-1], gained]
            state = block[-1]
        return total


def blockwise(chain: Chain, value: Array, k: float, block_tokens: int) -> Selection:
    """Blockwise best-of-k with any value table as its scorer (Controlled Decoding, Eq. 7); the last block may be short.

    A block's utility is what it gains plus the value at its end. k may be real, as in `best_of_k_ratio`.
    """
    n = chain.states
    reward, kl = np.zeros(n), np.zeros(n)
    ratios: dict[int, Array] = {}
    laws: dict[int, Array] = {}
    for t in range((chain.cap - 1) // block_tokens * block_tokens, -1, -block_tokens):
        m = min(block_tokens, chain.cap - t)
        if m not in laws:
            laws[m] = block_law(chain, m)
        base = laws[m]
        gained = np.arange(base.shape[-1])
        ends = chain.final[t + 1 : t + m + 1].copy()  # [m, S + 1]
        further = np.zeros_like(ends)
        if t + m < chain.cap:
            ends[-1, :n], further[-1, :n] = reward, kl
        score = value[t + 1 : t + m + 1, :, None] + gained
        log_ratio = np.zeros_like(base)
        for s in range(n):
            met = base[s] > 0
            log_ratio[s][met] = np.log(best_of_k_ratio(levels(base[s][met], score[met]), k))
        chosen = base * np.exp(log_ratio)
        kl = (chosen * (log_ratio + further[..., None])).sum((1, 2, 3))
        reward = (chosen * (ends[..., None] + gained)).sum((1, 2, 3))
        ratios[t] = log_ratio
    return Selection(chain, block_tokens, reward, kl, ratios)


def best_of_k(chain: Chain, k: float) -> Selection:
    """Best-of-k over whole responses, by their reward."""
    return blockwise(chain, chain.final, k, chain.cap)


def k_at_kl(chain: Chain, value: Array, block_tokens: int, kl: float) -> float:
    """The real k >= 1 at which blockwise best-of-k costs `kl` nats."""
    low, high = 1.0, 2.0
    while blockwise(chain, value, high, block_tokens).cost.kl < kl:
        low, high = high, 2 * high
        if high > 1e6:
            raise InputError(f"k_at_kl: no k costs {kl} nats with blocks of {block_tokens}")
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if blockwise(chain, value, middle, block_tokens).cost.kl < kl else (low, middle)
    return (low + high) / 2


# The frontier of all policies


def reward_law(chain: Chain) -> tuple[Array, Array]:
    """Rewards [N] of whole responses, repeated where paths differ; their base probabilities for each prompt [P, N]."""
    base = block_law(chain, chain.cap)[list(chain.prompts)]
    reward = chain.final[1:, :, None] + np.arange(base.shape[-1])
    met = base.sum(0) > 0
    return reward[met], base[:, met]


def frontier(chain: Chain, weight: float) -> Cost:
    """The KL-regularised optimum p0 exp(weight r) / Z: no policy has more reward at its KL, averaged over prompts."""
    reward, base = reward_law(chain)
    law = gibbs_law(base, np.broadcast_to(reward, base.shape), weight)
    return Cost(float((law @ reward).mean()), float(divergence(law, base).mean()))


def frontier_at_kl(chain: Chain, kl: float) -> float:
    """The most reward that any policy can have at `kl` nats."""
    low, high = 0.0, 1.0
    while frontier(chain, high).kl < kl:
        high *= 2
        if high > 1e6:
            return frontier(chain, high).reward  # all mass is on the best responses
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if frontier(chain, middle).kl < kl else (low, middle)
    return frontier(chain, high).reward


# Learning from roll-outs


def features(chain: Chain) -> Array:
    """[cap + 1, S, 3 S]: 1, t / cap and log((t + 1) / cap) of each state, for linear scorers."""
    t = np.arange(chain.cap + 1)
    clock = np.stack([np.ones(chain.cap + 1), t / chain.cap, np.log((t + 1) / chain.cap)], -1)
    return np.einsum("tc,sz->tszc", clock, np.eye(chain.states)).reshape(chain.cap + 1, chain.states, -1)


class Visited(NamedTuple):
    """Prefixes that have not ended: (t, z) [N] of each, and the reward [N] still to come in the response it is of."""

    t: NDArray[np.intp]
    z: NDArray[np.intp]
    reward: Array


def visited(chain: Chain, responses: Sequence[Sequence[int]]) -> Visited:
    """Every prefix y^t, t >= 1, of whole responses."""
    rows = [
        (t + 1, z, chain.reward(y) - gained)
        for y in responses
        for t, (z, gained) in enumerate(zip(y, np.cumsum(chain.gain[list(y)]), strict=True))
        if z != chain.states and t + 1 < chain.cap
    ]
    t, z, reward = zip(*rows, strict=True)
    return Visited(np.array(t), np.array(z), np.array(reward))


def sample(chain: Chain, count: int, seed: int) -> list[list[int]]:
    """`count` responses of the base policy, prompts taking turns."""
    rng = np.random.default_rng(seed)
    state = np.array(chain.prompts)[np.arange(count) % len(chain.prompts)]
    total = np.cumsum(chain.step, 1)
    total[:, -1] = 1.0
    out: list[list[int]] = [[] for _ in range(count)]
    alive = np.arange(count)
    for _ in range(chain.cap):
        drawn = (rng.random(len(alive))[:, None] >= total[state]).sum(1)
        for i, z in zip(alive.tolist(), drawn.tolist(), strict=True):
            out[i].append(z)
        going = drawn < chain.states
        alive, state = alive[going], drawn[going]
    return out


def fit_fudge(chain: Chain, data: Visited) -> Array:
    """Linear CD-FUDGE: least squares of the realised reward on `features`; V [cap + 1, S + 1]."""
    phi = features(chain)
    weight = np.linalg.lstsq(phi[data.t, data.z], data.reward, rcond=None)[0]
    return _with_ends(chain, phi @ weight)


def fit_cd_q(chain: Chain, data: Visited, sweeps: int = 400) -> Array:
    """Linear CD-Q: least squares on the target of the last sweep, again and again; at ends the true reward."""
    phi = features(chain)
    solve = np.linalg.pinv(phi[data.t, data.z])
    table = _with_ends(chain, np.zeros(phi.shape[:2]))
    for _ in range(sweeps):
        table = _with_ends(chain, phi @ (solve @ backup(chain, table)[data.t, data.z]))
    return table


def tabular_cd_q(chain: Chain, data: Visited) -> Array:
    """CD-Q on a table, V [cap + 1, S + 1]: its target wherever the data went, the mean reward to come elsewhere."""
    met = np.zeros(chain.final.shape, dtype=bool)
    met[data.t, data.z] = True
    table = _with_ends(chain, np.full((chain.cap + 1, chain.states), data.reward.mean()))
    for _ in range(chain.cap + 1):
        table = np.where(met, backup(chain, table), table)
    return table


def mean_reward(chain: Chain, data: Visited) -> Array:
    """Tabular CD-FUDGE, V [cap + 1, S + 1]: the mean reward to come after (t, z); NaN where none went."""
    total, count = np.zeros(chain.final.shape), np.zeros(chain.final.shape)
    np.add.at(total, (data.t, data.z), data.reward)
    np.add.at(count, (data.t, data.z), 1.0)
    with np.errstate(invalid="ignore"):
        return total / count


def _with_ends(chain: Chain, inner: Array) -> Array:
    """V [cap + 1, S + 1] with `inner` [cap + 1, S] where a response goes on."""
    out = chain.final.copy()
    out[:-1, :-1] = inner[:-1]
    return out


def rmse(chain: Chain, table: Array, truth: Array) -> float:
    """Root mean square of table - truth over the prefixes (t >= 1, not ended) as the base policy visits them."""
    weight = visits(chain)[1:-1, :-1]
    gap = (table - truth)[1:-1, :-1]
    return float(np.sqrt((weight * gap**2)[weight > 0].sum() / weight.sum()))
