"""Claims W1 to W3, about WPO's weights: W1 in the language D1, W2 and W3 in the bandit D2."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from claims_rig import SEED, Row, Sizes, decode

from pyengine import ops
from pyengine.losses import log_weight, sequence_moments
from pyengine.reference import TokenLogprob
from pyengine.worlds import bandit, bigram, represent

ALIGNMENTS = ("none", "greedy", "sampled")
# D2's seeds of W2, and of W3: no other seed was ever tried together with a setting that is reported.
FRESH, OTHERS = 1000, 2000


@cache
def world_d1(prompts: int):
    law = bigram.confident(prompts, SEED)
    return law, {name: bigram.alignments(law, name) for name in ALIGNMENTS}


@torch.inference_mode()
def engine_weights(law, responses: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The prompt of each of the engine's responses and their log w, by the model's own logits."""
    world = represent.bigrams(law, bigram.LENGTH)
    prompts = np.arange(responses) % len(law)
    results = decode(world, None, [f"p{x}" for x in prompts], None, bigram.LENGTH)
    ids = torch.tensor([[len(law) * law.shape[2] + x, *r.tokens] for x, r in zip(prompts, results, strict=True)])
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ALIGNMENTS}
    for some in ids.split(64):  # [64, 32] tokens have 9 MB of logits
        logits = world.model(input_ids=some).logits[:, :-1]
        tokens = ops.logits_logprob(logits.flatten(0, 1), some[:, 1:].flatten())
        whole = TokenLogprob(*(field.unflatten(0, (len(some), -1)) for field in tokens))
        moments = sequence_moments(whole, torch.ones_like(some[:, 1:], dtype=torch.bool))
        for name in ALIGNMENTS:
            found[name].append(log_weight(moments, name))
    return prompts, {name: torch.cat(x).double().numpy() for name, x in found.items()}


def w1(sizes: Sizes) -> Row:
    row = Row(
        "W1",
        "D1: alignment concentrates the weights of on-policy responses",
        "WPO, Figure 2: sampled alignment makes on-policy weights alike",
        asserted="sd of log w: none > greedy > sampled; no weight but the sampled exceeds 1",
    )
    law, tables = world_d1(sizes.confident)
    spread = {name: bigram.spread(law, table, bigram.LENGTH) for name, table in tables.items()}
    over = bigram.share_above(law, tables["sampled"], bigram.LENGTH)
    share = float(over.mean())
    row.exact = f"sd {' / '.join(f'{spread[name]:.3f}' for name in ALIGNMENTS)}; {share:.1%} exceed 1"
    row.checks = {
        "sd: none > greedy > sampled": spread["none"] > spread["greedy"] > spread["sampled"],
        "no weight exceeds 1 but the sampled": bool(
            share > 0 and max(tables["none"].max(), tables["greedy"].max()) < 1e-12
        ),
    }
    row.figures = {
        "sd of log w": spread,
        "share above 1": share,
        "elsewhere": {"sd": (1.246, 0.431, 0.25), "share above 1": 0.026},
    }
    prompts, found = engine_weights(law, sizes.responses)
    parts = []
    for name, log_w in found.items():
        mean, variance = (
            m / bigram.LENGTH**power for power, m in enumerate(bigram.moments(law, tables[name], bigram.LENGTH), 1)
        )
        pooled = mean.mean()
        row.sampled(f"mean log w, {name}", log_w - mean[prompts], 0.0)
        expected = (variance + (mean - pooled) ** 2)[prompts]
        row.sampled(f"variance of log w over the exact one, {name}", (log_w - pooled) ** 2 - expected, 0.0)
        parts.append(f"{np.sqrt(((log_w - pooled) ** 2).mean()):.3f}")
    above = row.shares("share above 1", (found["sampled"] > 0).astype(float), over[prompts])
    row.engine = f"sd {' / '.join(parts)}; {above} exceed 1, n={len(prompts)}"
    return row


@cache
def world_d2(first: int, seeds: int, curvature: float = bandit.CURVATURE):
    return bandit.concave(range(first, first + seeds), curvature)


def mean_and_error(x: torch.Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


def text(x: torch.Tensor) -> str:
    mean, error = mean_and_error(x)
    return f"{mean:+.2f}±{error:.2f}"


def w2(sizes: Sizes) -> Row:
    row = Row(
        "W2",
        "D2, off-policy pairs of a concave reward: DPO collapses, WPO is more stable",
        "WPO: higher win rates than DPO from off-policy pairs",
        asserted="epoch 20: WPO above DPO by more than .5; the control with shuffled weights is reported",
    )
    world = world_d2(FRESH, sizes.bandits)
    arms = bandit.arms(seed=SEED)
    traces = {name: bandit.train(world, arms[name], seed=SEED) for name in ("DPO", "WPO", "shuffled")}
    reward = {name: trace.reward for name, trace in traces.items()}
    start, last = reward["DPO"][0], {name: x[-1] for name, x in reward.items()}
    gain, magnitude, assignment = (
        last[one] - last[other] for one, other in (("WPO", "DPO"), ("shuffled", "DPO"), ("WPO", "shuffled"))
    )
    share = float(magnitude.mean() / gain.mean())
    peaks = {name: float(x.mean(1).max()) for name, x in reward.items()}
    straight = world_d2(FRESH, sizes.bandits, 0.0)
    linear = [bandit.train(straight, arms[name], seed=SEED).reward[-1] for name in ("WPO", "DPO")]
    row.exact = (
        f"start {text(start)}; peaks DPO {peaks['DPO']:+.2f}, WPO {peaks['WPO']:+.2f}; epoch 20 DPO "
        f"{text(last['DPO'])}, WPO {text(last['WPO'])}, shuffled weights {text(last['shuffled'])}; paired WPO - DPO "
        f"{text(gain)}, {int((gain > 0).sum())} of {len(gain)} seeds; shuffled - DPO (magnitude) {text(magnitude)}, "
        f"{share:.0%} of the gain; WPO - shuffled (assignment) {text(assignment)}"
    )
    row.caveat = (
        "D2 is selected: the third design tried for this claim, and one of 8 concave settings that were swept; in the "
        "first two designs DPO did not collapse and ended above WPO, as it does here where the reward is linear (WPO - "
        f"DPO {text(linear[0] - linear[1])}). What was open in it was set after four trials on other seeds (pairs from "
        "a uniform or a log-linear policy, batches of 8, 32 and 128: gains of .9 to 2.7). Claimed is only that WPO "
        "limits the damage where extrapolating off-policy pairs does harm."
    )
    row.checks = {f"WPO - DPO at epoch 20, {text(gain)}, over .5": bool(gain.mean() > 0.5)}
    row.figures = {
        "curves": {name: [mean_and_error(x) for x in trace] for name, trace in reward.items()},
        "KL at the end": {name: mean_and_error(trace.kl[-1]) for name, trace in traces.items()},
        "paired": {
            "WPO - DPO": [*mean_and_error(gain), int((gain > 0).sum())],
            "magnitude": mean_and_error(magnitude),
            "assignment": mean_and_error(assignment),
            "linear reward, WPO - DPO": mean_and_error(linear[0] - linear[1]),
        },
        "seeds": [FRESH, FRESH + sizes.bandits],
        "elsewhere": {"start": -0.12, "DPO": -1.62, "WPO": -0.12, "shuffled": -0.72, "paired": 1.5},
    }
    parts = []
    for name in ("DPO", "WPO"):
        parts.append(f"{name} {drawn(row, name, world, traces[name].weights, sizes.responses)}")
    row.engine = f"first seed, drawn by the engine: {', '.join(parts)}"
    return row


def drawn(row: Row, name: str, world, weights, responses: int) -> str:
    """Reward of the first seed's policy, decoded by the engine."""
    law, reward = (x[0].numpy() for x in (bandit.log_law(world, weights).exp(), world.reward))
    represented = represent.one_token(*law.shape, law)
    prompts = np.arange(responses) % len(law)
    results = decode(represented, None, [f"p{x}" for x in prompts], None, 1)
    found = reward[prompts, [r.tokens[0] for r in results]]
    return row.sampled(f"{name} reward", found, float((law * reward).sum(-1)[prompts].mean()))


BETAS = (0.01, 0.05)


def w3(sizes: Sizes) -> Row:
    row = Row("W3", "D2: WPO_L does as well as WPO, and better than WPO_W", "WPO, ablation: WPO_L ≈ WPO > WPO_W")
    parts = []
    for name, curvature in (("linear reward", 0.0), ("concave reward", bandit.CURVATURE)):
        world = world_d2(OTHERS, sizes.bandits // 2, curvature)
        cells, better = {}, 0
        for length in sizes.lengths:
            for beta in BETAS:
                arms = bandit.arms(beta, SEED)
                last = {
                    arm: bandit.train(world, arms[arm], length=length, seed=SEED).reward[-1]
                    for arm in ("WPO", "WPO_L", "WPO_W")
                }
                last["L - W"] = last["WPO_L"] - last["WPO_W"]
                better += int(last["L - W"].mean() > 0)
                cells[f"n={length}, beta={beta}"] = {arm: mean_and_error(x) for arm, x in last.items()}
        row.figures[name] = cells
        shown = cells["n=3, beta=0.05"]
        parts.append(
            f"{name}, n=3, β=.05: WPO {shown['WPO'][0]:.2f}, L {shown['WPO_L'][0]:.2f}, W {shown['WPO_W'][0]:.2f}; "
            f"L above W in {better} of {len(cells)} (n, β)"
        )
    row.exact, row.engine = "; ".join(parts), "one-token responses: see W2"
    row.caveat = "It depends on the setting, so nothing is asserted."
    row.figures["elsewhere"] = {"linear, n=3, beta=.05": (0.93, 0.65, 0.22), "L above W": ("6 of 6", "3 of 8, 1 tie")}
    return row


CLAIMS: list[Callable[[Sizes], Row]] = [w1, w2, w3]
