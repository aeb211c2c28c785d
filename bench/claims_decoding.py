"""Claims C1 to C6, about decoding with values, in the Markov worlds A and B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from claims_rig import SEED, Row, Sizes, decode

from pyengine import BestOfK, Blockwise, Tokenwise
from pyengine.ledger import best_of_k_bound, blockwise_bound
from pyengine.worlds import markov, represent


def follow(chain, strategy, responses: int, scorer=None):
    """(prompt, tokens, result) of the engine, prompts in turn; scored by V* unless `scorer(world)` is given."""
    world = represent.markov(chain)
    states = [chain.prompts[i % len(chain.prompts)] for i in range(responses)]
    scorer = represent.value_scorer(chain, world) if scorer is None else scorer(world)
    results = decode(world, scorer, [f"s{s}" for s in states], strategy, chain.cap)
    return [(s, r.tokens, r) for s, r in zip(states, results, strict=True)]


def select(row: Row, name: str, chain, selection, strategy, responses: int, scorer=None) -> str:
    """Reward and KL of a block selection through the engine; KL by the exact log-ratios of what it chose."""
    found = follow(chain, strategy, responses, scorer)
    reward = row.sampled(f"{name} reward", [chain.reward(y) for _, y, _ in found], selection.cost.reward)
    ratios = [selection.sequence_log_ratio(s, y) for s, y, _ in found]
    return f"{reward} @ {row.sampled(f'{name} KL', ratios, selection.cost.kl)}"


def at(cost) -> str:
    return f"{cost.reward:.3f} @ {cost.kl:.3f}"


def first_value(chain) -> float:
    """The base policy's expected reward."""
    return float(markov.values(chain)[0, list(chain.prompts)].mean())


@cache
def world_b():
    chain = markov.length(seed=SEED)
    return chain, markov.values(chain)


def c1(sizes: Sizes) -> Row:
    row = Row(
        "C1",
        "A, M=16: blockwise K=6 is as good as best-of-50",
        "CD: K=6 on par with best-of-50",
    )
    chain = markov.additive()
    block = markov.blockwise(chain, markov.values(chain), 6, 16)
    best = markov.best_of_k(chain, 50)
    bound = blockwise_bound(6, chain.cap, 16)
    row.exact = f"{at(block.cost)} (bound {bound:.3f}) vs {at(best.cost)}"
    row.asserted = "reward within 2 %, KL within 10 %, KL below b(K) ceil(L/M)"
    row.checks = {
        "reward within 2 %": abs(block.cost.reward / best.cost.reward - 1) <= 0.02,
        "KL within 10 %": abs(block.cost.kl / best.cost.kl - 1) <= 0.10,
        "both KL below their bounds": block.cost.kl <= bound and best.cost.kl <= best_of_k_bound(50),
    }
    row.engine = " vs ".join(
        select(row, name, chain, exact, strategy, sizes.responses)
        for name, exact, strategy in (("blockwise", block, Blockwise(6, 16)), ("best-of-50", best, BestOfK(50)))
    )
    return row


def c2(sizes: Sizes) -> Row:
    row = Row(
        "C2",
        "B: tilts, blocks and best-of-K stay under the Gibbs frontier",
        "CD: close to the best trade-off",
    )
    chain, value = world_b()
    tilt, block, best = (
        markov.tokenwise(chain, value, 1.0),
        markov.blockwise(chain, value, 6, 16),
        markov.best_of_k(chain, 50),
    )
    costs = strategy_costs(chain, value)
    gaps = [markov.frontier_at_kl(chain, c.kl) - c.reward for name in costs if name != "frontier" for c in costs[name]]
    optimum = markov.frontier_at_kl(chain, best.cost.kl)
    row.exact = f"BoK-50 {at(best.cost)}, optimum there {optimum:.3f}; least gap {min(gaps):.0e}"
    row.asserted = "no point above the frontier"
    row.checks = {"never above the frontier": min(gaps) >= -1e-9}
    curves = {name: [(round(c.kl, 5), round(c.reward, 5)) for c in points] for name, points in costs.items()}
    row.figures = {"curves": curves, "least gap": min(gaps)}
    parts = [select(row, "best-of-50", chain, best, BestOfK(50), sizes.responses)]
    parts.append(select(row, "blockwise", chain, block, Blockwise(6, 16), sizes.responses))
    found = follow(chain, Tokenwise(1.0), sizes.responses)
    reward = row.sampled("tokenwise reward", [chain.reward(y) for _, y, _ in found], tilt.reward)
    kl = row.sampled("tokenwise KL", [r.kl for *_, r in found], tilt.kl)
    ratios = [sum(r.logp_policy) - sum(r.logp_base) for *_, r in found]
    row.sampled("tokenwise KL by log-ratios", ratios, tilt.kl)
    row.engine = f"BoK-50 {parts[0]}; block 6×16 {parts[1]}; tokenwise λ=1 {reward} @ {kl}"
    return row


def strategy_costs(chain, value) -> dict[str, list[markov.Cost]]:
    """Reward and KL of each strategy over its parameter, and the frontier."""
    weights, ks = np.geomspace(0.05, 6, 24), (2, 3, 4, 6, 8, 12, 16, 24, 32, 50)
    out = {"frontier": [markov.frontier(chain, w) for w in weights]}
    out["tokenwise"] = [markov.tokenwise(chain, value, w) for w in weights]
    for m in (8, 16, 32, 64):
        costs = [markov.blockwise(chain, value, k, m).cost for k in ks]
        out[f"blockwise M={m}"] = [c for c in costs if c.kl < 4]
    out["best-of-K"] = [markov.best_of_k(chain, k).cost for k in ks]
    return out


PAIRS = (((8, 3), (16, 5)), ((16, 6), (32, 12)), ((32, 16), (64, 28)))  # (M, K) and what dominates it


def c3(sizes: Sizes) -> Row:
    row = Row(
        "C3",
        "B: smaller blocks worsen the trade-off",
        "CD: larger M is better at equal KL",
    )
    chain, value = world_b()
    matched = {}
    for kl in (1.0, 1.5, 2.0, 2.5):
        ks = {m: markov.k_at_kl(chain, value, m, kl) for m in (8, 16, 32, 64)}
        matched[kl] = [markov.blockwise(chain, value, k, m).cost.reward for m, k in ks.items()]
        row.checks[f"monotone in M at KL {kl}: {', '.join(f'{r:.3f}' for r in matched[kl])}"] = bool(
            np.all(np.diff(matched[kl]) > 0)
        )
    row.figures["reward for M = 8, 16, 32, 64 at matched KL"] = matched
    pairs = [[markov.blockwise(chain, value, k, m).cost for m, k in pair] for pair in PAIRS]
    row.figures["pairs"] = [[tuple(c) for c in pair] for pair in pairs]
    row.exact = (
        "; ".join(f"{a[0]}×{a[1]} {at(x)} < {b[0]}×{b[1]} {at(y)}" for (a, b), (x, y) in zip(PAIRS, pairs, strict=True))
        + f"; KL 2: {', '.join(f'{r:.3f}' for r in matched[2.0])}"
    )
    row.asserted = "reward rises with M = 8, 16, 32, 64 at equal KL 1, 1.5, 2, 2.5 (real K)"
    row.engine = " < ".join(
        f"{m}×{k} "
        + select(row, f"{m}×{k}", chain, markov.blockwise(chain, value, k, m), Blockwise(k, m), sizes.responses)
        for m, k in PAIRS[0]
    )
    return row


def c4(sizes: Sizes) -> Row:
    row = Row(
        "C4",
        "B: CD-Q takes off-policy data, FUDGE learns the value of the data's policy μ",
        "CD: CD-Q may learn off-policy",
    )
    chain, value = world_b()
    other = markov.perturbed(chain, 1.0, SEED + 1)  # the policy μ that the data is from
    other_value = markov.values(other)
    table = np.random.default_rng(SEED).standard_normal(value.shape)
    for _ in range(chain.cap + 1):
        table = markov.backup(chain, table)
    fixed = float(np.abs(table - value).max())
    apart = markov.rmse(other, other_value, value)
    errors, off_policy = [], []
    for n in (sizes.fudge // 16, sizes.fudge):
        data = markov.visited(other, markov.sample(other, n, SEED))
        off_policy.append(markov.rmse(other, markov.tabular_cd_q(chain, data), value))
        learned = markov.mean_reward(other, data)
        met = np.where(np.isnan(learned), other_value, learned)
        errors.append((markov.rmse(other, met, other_value), markov.rmse(other, met, value)))
    row.exact = (
        f"tabular CD-Q {fixed:.1e} from V* at its fixed point, {off_policy[0]:.4f} -> {off_policy[1]:.4f} from μ's "
        f"responses; FUDGE from V^μ {errors[0][0]:.4f} -> {errors[1][0]:.4f} for 16× the data, "
        f"from V* {errors[1][1]:.3f} (V^μ: {apart:.3f})"
    )
    row.asserted = (
        "CD-Q: fixed point 1e-6; from μ's data its error to V* falls, below FUDGE's. FUDGE: to V^μ as n^-1/2, to V* "
        "it stays"
    )
    row.checks = {
        "CD-Q's fixed point is V* to 1e-6": fixed <= 1e-6,
        "CD-Q's error to V* from μ's responses falls, and is below FUDGE's": (
            off_policy[1] < off_policy[0] and off_policy[1] < errors[1][1]
        ),
        "FUDGE's error to V^μ falls 3 to 5 times for 16 times the data": 3 <= errors[0][0] / errors[1][0] <= 5,
        "FUDGE keeps its distance from V*": errors[1][1] >= 0.9 * apart > errors[1][0],
    }
    row.figures = {"fixed point": fixed, "CD-Q from μ": off_policy, "FUDGE to V^μ and V*": errors, "V^μ to V*": apart}
    n, found = 2 * sizes.responses, {}
    for name, source in (("off", other), ("on", chain)):
        # Both sets hold responses of `source`; the values that they are to estimate are the base policy's.
        responses = [y for _, y, _ in follow(source, None, n, scorer=lambda _: None)]
        row.sampled(f"mean reward, {name}-policy", [source.reward(y) for y in responses], first_value(source))
        data = markov.visited(chain, responses)
        fits = (markov.fit_cd_q(chain, data), markov.fit_fudge(chain, data))
        found[name] = [markov.rmse(chain, fit, value) for fit in fits]
    row.figures["engine linear RMSE of CD-Q and FUDGE"] = found
    row.engine = (
        f"linear features, n={n}: off-policy CD-Q {found['off'][0]:.3f}, FUDGE {found['off'][1]:.3f}; on-policy "
        + (f"{found['on'][0]:.3f}, {found['on'][1]:.3f} (reported)")
    )
    return row


def c5(sizes: Sizes) -> Row:
    row = Row(
        "C5",
        "B: a scorer serves another base model",
        "CD: the scorer transfers",
    )
    chain, value = world_b()
    base = markov.perturbed(chain, 0.5, SEED + 2)
    own = markov.values(base)
    plain = first_value(base)
    kept = {}
    for name, cost in (
        ("blockwise 6×16", lambda v: markov.blockwise(base, v, 6, 16).cost),
        ("tokenwise λ=1", lambda v: markov.tokenwise(base, v, 1.0)),
    ):
        kept[name] = (cost(value).reward - plain) / (cost(own).reward - plain)
    row.exact = ", ".join(f"{name} {share:.1%}" for name, share in kept.items())
    row.asserted = "at least 80 %"
    row.checks = {f"{name}: {share:.1%} of the gain": share >= 0.8 for name, share in kept.items()}
    row.figures = {"share of the gain": kept, "base reward": plain}
    lent = markov.blockwise(base, value, 6, 16)
    scorer = lambda world: represent.value_scorer(base, world, value)  # noqa: E731
    row.engine = f"lent {select(row, 'lent scorer', base, lent, Blockwise(6, 16), sizes.responses, scorer)}; own " + (
        select(row, "own scorer", base, markov.blockwise(base, own, 6, 16), Blockwise(6, 16), sizes.responses)
    )
    return row


def c6(sizes: Sizes) -> Row:
    row = Row(
        "C6",
        "B: V of a weighted sum is the weighted sum of V",
        "CD: exact, as V is linear in r",
        asserted="1e-10; the engine's tokens equal",
    )
    chain, first = world_b()
    late = np.random.default_rng(SEED).standard_normal(chain.final.shape)  # another reward of (T, last token)
    weights = (0.7, -0.4)
    second = markov.values(replace(chain, final=late))
    both = markov.values(replace(chain, final=weights[0] * chain.final + weights[1] * late))
    gap = float(np.abs(both - weights[0] * first - weights[1] * second).max())
    row.exact = f"largest gap {gap:.1e}"
    row.checks = {"identity to 1e-10": gap <= 1e-10}

    def apart(world):
        return [(w, represent.value_scorer(chain, world, v)) for w, v in zip(weights, (first, second), strict=True)]

    equal = {}
    for strategy in (Tokenwise(1.5), Blockwise(4, 8)):
        runs = [
            follow(chain, strategy, sizes.responses, scorer)
            for scorer in (apart, lambda world: represent.value_scorer(chain, world, both))
        ]
        same = np.mean([a[1] == b[1] for a, b in zip(*runs, strict=True)])
        equal[type(strategy).__name__] = float(same)
        # A draw on the edge between two tokens may fall on either side in fp32.
        row.checks[f"{type(strategy).__name__}: {same:.1%} of the responses equal, 99 % wanted"] = bool(same >= 0.99)
    row.figures = {"gap": gap, "equal responses": equal}
    row.engine = f"equal responses: {', '.join(f'{n} {s:.1%}' for n, s in equal.items())}, n={sizes.responses}"
    return row


CLAIMS: list[Callable[[Sizes], Row]] = [c1, c2, c3, c4, c5, c6]
