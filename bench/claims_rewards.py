"""Claims L1 to L4, about transformed rewards, in world C; Q1 and Q2, about probes, in world E."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from claims_rig import SEED, Row, Sizes, decode

from pyengine import BestOfK, Tokenwise, lsc
from pyengine.scorers import Probe
from pyengine.worlds import outcomes, represent, simpson

MIXES = np.arange(1, 10) / 10  # weights of the helpful reward in the raw sum


@cache
def world_c(sizes: Sizes, noise):
    return outcomes.two_rewards(sizes.prompts, sizes.outcomes, noise, SEED)


def mixed(proxy, w):
    return w * proxy[0] + (1 - w) * proxy[1]


def joint(sizes: Sizes, noise, k) -> tuple[float, float, float]:
    """Share of the best of k with both gold rewards above their medians: by the best raw mix, its weight, by LSC."""
    gold, proxy = world_c(sizes, noise)
    win = outcomes.both_above_median(gold)
    raw = [outcomes.best_of_k_mean(mixed(proxy, w), win, k).mean() for w in MIXES]
    both = outcomes.best_of_k_mean(outcomes.lsc_sum(proxy), win, k).mean()
    return float(max(raw)), float(MIXES[int(np.argmax(raw))]), float(both)


def answers(sizes: Sizes, scorer, strategy):
    """(prompt, outcome, result) of the engine in world C; `scorer` is made from the world."""
    world = represent.one_token(sizes.prompts, sizes.outcomes)
    prompts = [i % sizes.prompts for i in range(sizes.prompts * sizes.repeats)]
    results = decode(world, scorer(world), [f"p{x}" for x in prompts], strategy, 1)
    return np.array(prompts), np.array([r.tokens[0] for r in results]), results


def choose(row: Row, sizes: Sizes, noise, k: int, w: float | None) -> str:
    """Joint wins of the engine's best-of-k in world C: by LSC, or by two reward functions mixed with w."""
    gold, proxy = world_c(sizes, noise)
    win = outcomes.both_above_median(gold)
    utility = outcomes.lsc_sum(proxy) if w is None else mixed(proxy, w)

    def function(i):
        return lambda prompts, completions: [
            proxy[i, int(p[1:]), int(c.strip()[1:])] for p, c in zip(prompts, completions, strict=True)
        ]

    def scorer(world) -> Any:
        if w is not None:
            return [(w, function(0)), (1 - w, function(1))]
        medians = outcomes.reference(proxy, 0.5)[..., 0].tolist()
        known = [{f"p{x}": m for x, m in enumerate(of_reward)} for of_reward in medians]
        return lsc(function(0), known[0]) & lsc(function(1), known[1])

    prompts, chosen, _ = answers(sizes, scorer, BestOfK(k))
    chances = outcomes.best_of_k_mean(utility, win, k)
    return row.shares(f"{'LSC' if w is None else 'raw'} k={k}", win[prompts, chosen], chances[prompts])


def l1(sizes: Sizes) -> Row:
    row = Row(
        "L1",
        "C, no noise: LSC's sum acts as a logical AND",
        "LSC: all properties at once",
    )
    parts, engine = [], []
    for k in (16, 191):
        raw, w, both = joint(sizes, "none", k)
        row.figures[f"k={k}"] = {"raw": raw, "weight": w, "LSC": both}
        parts.append(f"k={k}: {both:.3f} vs {raw:.3f} (w={w:.1f})")
        engine.append(f"{choose(row, sizes, 'none', k, None)} vs {choose(row, sizes, 'none', k, w)}")
    gap = row.figures["k=16"]["LSC"] - row.figures["k=16"]["raw"]
    row.exact, row.engine, row.asserted = "; ".join(parts), "; ".join(engine), "gap at k=16 at least .15"
    row.checks[f"gap at k=16: {gap:.3f}"] = gap >= 0.15
    row.checks["LSC above raw at k=191"] = row.figures["k=191"]["LSC"] > row.figures["k=191"]["raw"]
    return row


def l2(sizes: Sizes) -> Row:
    row = Row(
        "L2",
        "C, Student-t noise: LSC is hacked less",
        "LSC: less reward hacking",
    )
    raw, both = zip(*(joint(sizes, "t", k)[::2] for k in (16, 191)), strict=True)
    weight = joint(sizes, "t", 16)[1]
    row.exact = f"raw {raw[0]:.3f} -> {raw[1]:.3f}; LSC {both[0]:.3f} -> {both[1]:.3f}"
    row.asserted = "LSC above raw at both k, and its drop is smaller"
    row.checks = {
        "LSC above raw at k=16 and 191": both[0] > raw[0] and both[1] > raw[1],
        f"LSC's drop {both[0] - both[1]:.3f} below raw's {raw[0] - raw[1]:.3f}": both[0] - both[1] < raw[0] - raw[1],
    }
    ks = (1, 2, 4, 8, 16, 32, 64, 128, 191)
    row.figures["curves"] = {
        noise: {"k": ks, "raw, best weight": [x[0] for x in both], "LSC": [x[2] for x in both]}
        for noise in ("none", "gaussian", "t")
        for both in [[joint(sizes, noise, k) for k in ks]]
    }
    found = [[choose(row, sizes, "t", k, w) for k in (16, 191)] for w in (weight, None)]
    row.engine = f"raw {' -> '.join(found[0])}; LSC {' -> '.join(found[1])}"
    return row


def l3(sizes: Sizes) -> Row:
    row = Row(
        "L3",
        "C: centring alone changes nothing, log-sigmoid alone hurts",
        "LSC: both parts are needed",
    )
    gold, proxy = world_c(sizes, "none")
    win = outcomes.both_above_median(gold)
    centred = (proxy - outcomes.reference(proxy, 0.5)).sum(0)
    base = np.full(sizes.outcomes, 1 / sizes.outcomes)
    gap = max(
        np.abs(law(base, a) - law(base, b)).max()
        for a, b in zip(centred, proxy.sum(0), strict=True)
        for law in (lambda p, s: outcomes.best_of_k_law(p, s, 191), lambda p, s: outcomes.gibbs_law(p, s, 1.0))
    )
    plain = outcomes.lsc(proxy, 0.0).sum(0)
    sigma, raw = float(outcomes.best_of_k_mean(plain, win, 191).mean()), joint(sizes, "none", 191)[0]
    noisy_gold, noisy = world_c(sizes, "t")
    noisy_win = outcomes.both_above_median(noisy_gold)
    noisy_sigma = float(outcomes.best_of_k_mean(outcomes.lsc(noisy, 0.0).sum(0), noisy_win, 191).mean())
    noisy_raw = joint(sizes, "t", 191)[0]
    row.exact = (
        f"laws differ by {gap:.0e}; σ only {sigma:.3f} vs raw {raw:.3f}; t noise {noisy_sigma:.3f} vs {noisy_raw:.3f}"
    )
    row.asserted = "1e-9; σ only below raw without noise"
    row.checks = {
        f"laws of the centred and the raw sum differ by {gap:.1e}": gap <= 1e-9,
        "σ only below raw": sigma < raw,
    }
    row.figures = {"gap": float(gap), "σ only": sigma, "raw": raw, "t noise": {"σ only": noisy_sigma, "raw": noisy_raw}}

    def scorer(world):
        return represent.outcome_scorer(plain, world, "log sigmoid")

    prompts, chosen, _ = answers(sizes, scorer, BestOfK(191))
    chances = outcomes.best_of_k_mean(plain, win, 191)
    row.engine = f"σ only {row.shares('σ only k=191', win[prompts, chosen], chances[prompts])}"
    return row


def l4(sizes: Sizes) -> Row:
    row = Row(
        "L4",
        "C, Student-t noise, one reward, KL 2: LSC wins more",
        "LSC: higher win rate at equal KL",
    )
    gold, proxy = (x[0] for x in world_c(sizes, "t"))
    win = (gold > outcomes.reference(gold, 0.85)).astype(float)
    base = np.full(gold.shape, 1 / sizes.outcomes)
    means, parts = {}, {}
    for name, utility in (("LSC", outcomes.lsc(proxy, outcomes.reference(proxy, 0.85))), ("raw", proxy)):
        weight = outcomes.weight_at_kl(base, utility, 2.0)
        chances = outcomes.gibbs_mean(utility, win, weight)
        means[name] = float(chances.mean())
        prompts, chosen, results = answers(
            sizes, lambda world: represent.outcome_scorer(utility, world, name), Tokenwise(weight)
        )
        parts[name] = row.shares(name, win[prompts, chosen], chances[prompts])
        # Each prompt has one next-token law, so the engine's KL has no sampling error.
        kl = float(np.mean([r.kl for r in results]))
        row.checks[f"the engine's KL of {name} is {kl:.4f}"] = abs(kl - 2) < 2e-3
    row.exact = f"{means['LSC']:.3f} vs {means['raw']:.3f}"
    row.engine = f"{parts['LSC']} vs {parts['raw']}"
    row.asserted = "LSC above raw"
    row.checks["LSC above raw"] = means["LSC"] > means["raw"]
    row.figures |= means
    return row


@cache
def probes(train: int, seed: int) -> dict[str, np.ndarray]:
    data = simpson.simpson(train, 2 * seed)
    return {loss: simpson.fit(loss, data) for loss in simpson.LOSSES}


def q1(sizes: Sizes) -> Row:
    row = Row(
        "Q1",
        "E: L_PG beats L_CE and L_Q, more so for larger k",
        "QP, MBPP, k=48: PG .457, CE .397, Q .377",
    )
    ks = (2, 4, 8, 16, 48)
    rates = {
        loss: [
            float(
                np.mean(
                    [
                        simpson.pass_rate(simpson.simpson(500, 2 * s + 1), probes(sizes.train, s)[loss], k).mean()
                        for s in range(sizes.seeds)
                    ]
                )
            )
            for k in ks
        ]
        for loss in ("PG", "CE", "Q")
    }
    gaps = np.array(rates["PG"]) - np.array(rates["CE"])
    row.exact = "; ".join(
        f"k={k} " + "/".join(f"{rates[x][i]:.3f}" for x in rates) for i, k in enumerate(ks) if k in (2, 48)
    )
    row.asserted = "PG above CE and Q, and PG - CE rises with k = 2, 4, 8, 16, 48"
    row.checks = {
        "PG above CE and Q": bool((gaps > 0).all())
        and all(p > q for p, q in zip(rates["PG"], rates["Q"], strict=True)),
        f"PG - CE rises: {', '.join(f'{g:.3f}' for g in gaps)}": bool((np.diff(gaps) > 0).all()),
    }
    row.figures = {"k": ks, "exact pass rate": rates}
    test = simpson.simpson(48, 1)  # fewer prompts: each response is a token
    world = represent.own_responses(test.features)
    prompts = np.arange(48 * sizes.repeats) % 48
    parts = []
    for loss, weight in ((x, probes(sizes.train, 0)[x]) for x in ("PG", "CE", "Q")):
        probe = Probe(world.model.config.n_embd)
        with torch.no_grad():
            probe.head.weight.zero_()[0, world.features] = torch.from_numpy(weight).float()
        for strategy in (BestOfK(2), BestOfK(48)):
            results = decode(world, probe, [f"p{x}" for x in prompts], strategy, 1)
            found = test.reward.reshape(-1)[[r.tokens[0] for r in results]]
            chances = simpson.pass_rate(test, weight, strategy.k)[prompts]
            parts.append(row.shares(f"{loss} k={strategy.k}", found, chances))
    row.engine = f"48 prompts, k=2 {' / '.join(parts[::2])}; k=48 {' / '.join(parts[1::2])}"
    return row


def q2(sizes: Sizes) -> Row:
    row = Row(
        "Q2",
        "E: L_Q and L_CE spend the probe on easiness (slope of score on pass rate)",
        "QP: why L_PG wins",
    )
    slopes = {
        loss: float(
            np.mean(
                [
                    simpson.slope(simpson.simpson(500, 2 * s + 1), probes(sizes.train, s)[loss])
                    for s in range(sizes.seeds)
                ]
            )
        )
        for loss in ("CE", "Q", "PG")
    }
    row.exact = ", ".join(f"{loss} {s:.2f}" for loss, s in slopes.items())
    row.engine = "no decoding: see Q1"
    row.asserted = "PG lowest"
    row.checks = {"PG lowest": slopes["PG"] < min(slopes["CE"], slopes["Q"])}
    row.figures = slopes
    return row


CLAIMS: list[Callable[[Sizes], Row]] = [l1, l2, l3, l4, q1, q2]
