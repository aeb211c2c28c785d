"""Claims O4 and W4: offline and preference alignment through the real trainers, on the embedded review model.

The engine draws the responses and, after training, those that are measured; the reward is the exact sentiment, and z
is standardised by the statistics of the training responses. Training has 64 of the 96 prompts, what is reported the
others. TRL is imported where it is used: it takes seconds.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims_reviews import (
    CAP,
    ERRORS,
    TEST,
    TRAIN,
    copy_trained_by,
    log_ratios,
    on_one_thread,
    policy,
    rollouts,
    settings,
)
from claims_rig import SEED, Row, Sizes

from pyengine import Engine, SamplingParams
from pyengine.losses import fa_weight, rwr_weight
from pyengine.results import Result
from pyengine.rewards import Statistics
from pyengine.rewards.conditioning import Conditioning
from pyengine.training.examples import read_preferences
from pyengine.training.pairs import build_pairs
from pyengine.worlds import reviews

FITTING = 0.05  # z that a trained policy may be off the mean of its weighted data, beside the standard errors
TEMPLATE = Conditioning("{instruction} <rm_score> {score}{response}")  # the embedded policy knows no User and Assistant
SCORES = (-5.0, 0.0, 5.0)
MEASURED, PAIRS = 20_000, 30_000  # first seeds: of what is reported, and of the responses that pairs are made from
# Of Adam, with a cosine. Conditional alignment has to learn what a digit is, as the policy has seen none. Ten settings
# were tried: with half as many steps or half the rate policies followed the sign alone or nothing.
SORTED = {"train_sampling_strategy": "group_by_length"}
# Of sums over tokens nothing is clipped, as their gradients differ with the length.
LIKELIHOOD = SORTED | {"learning_rate": 5e-4, "per_device_train_batch_size": 16, "max_grad_norm": 0.0}
CONDITIONAL = SORTED | {"learning_rate": 2e-3, "per_device_train_batch_size": 4, "num_train_epochs": 2}
CONDITIONAL |= {"reduction": "token_mean"}
PREFERENCE = {"learning_rate": 5e-4, "per_device_train_batch_size": 16, "beta": 0.1}


def drawn(engine: Engine, count: int, score: float | None = None) -> list[Result]:
    """`count` responses to the test prompts in turn, asked for the score where there is one; a seed for each."""
    prompts = [TEST[i % len(TEST)] for i in range(count)]
    if score is not None:
        prompts = [TEMPLATE.prompt(prompt, score) for prompt in prompts]
    sampling = [SamplingParams(max_tokens=CAP, seed=MEASURED + i) for i in range(count)]
    return engine.generate(prompts, sampling=sampling, progress=False)


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


@on_one_thread
def o4(sizes: Sizes) -> Row:
    row = Row(
        "O4",
        "reviews: CA follows the score, FA and RWR land at the means of their weighted data",
        "OA: quality follows the score in the prompt; CA > FA > SFT > RWR",
        asserted=(
            f"z rises over {ERRORS} s.e. (over {sizes.conditional} trainings) from -5 asked for to 0 and to 5; FA and "
            f"RWR within {ERRORS} s.e. + {FITTING} of the prediction and over {ERRORS} s.e. above the base"
        ),
        caveat=(
            "No order is asserted: the data are the policy's own responses, so SFT on them is the base. The policy has "
            "seen no digit before and its z end at 1.9: 5 and -5 are extrapolations, by the last of ten settings "
            "tried. From 0 to 5 a training may gain little, and that rise is reported, not asserted. FA and RWR: sums "
            "over tokens, a rate of 5e-4, batches of 16, one epoch, one training; CA: token means, 2e-3, 4, two epochs "
            "(the paper: sums, 5e-6, 128, one)."
        ),
    )
    from datasets import Dataset

    from pyengine.integrations.trl import OfflineConfig, OfflineTrainer

    examples, _ = rollouts(sizes.rollouts)
    examples = examples[:: sizes.rollouts // sizes.labelled]
    statistics = Statistics.of([e.reward for e in examples])
    z = torch.tensor(statistics.z([e.reward for e in examples]), dtype=torch.float64)
    data = Dataset.from_list(
        [
            {"prompt": e.prompt, "completion": e.response, "reward": e.reward, "tokens": e.tokens, "ended": e.ended}
            for e in examples
        ]
    )

    def trained(method: str, seed: int = SEED) -> Engine:
        def make(model: Any, directory: str) -> Any:
            chosen = CONDITIONAL if method == "ca" else LIKELIHOOD
            return OfflineTrainer(
                model,
                OfflineConfig(method=method, **(settings(directory) | chosen | {"seed": seed})),
                train_dataset=data,
                processing_class=policy().tokenizer,
                statistics=statistics,
                conditioning=TEMPLATE if method == "ca" else None,
            )

        engine, row.figures[f"{method} seconds"] = copy_trained_by(make)
        return engine

    def ca(seed: int) -> Engine:
        return trained("ca", seed)

    def standardised(results: list[Result]) -> np.ndarray:
        return np.array(statistics.z([reviews.sentiment_of(r.text) for r in results]))

    def measured(name: str, results: list[Result]) -> tuple[float, float]:
        found = mean_and_error(standardised(results))
        row.figures[name] = {"z": found[0], "se": found[1], "n": len(results)}
        return found

    base = measured("base", drawn(policy(), sizes.measured))
    parts = [f"base {base[0]:+.2f}±{base[1]:.2f}"]
    predictions = []
    for method, weight in (("fa", fa_weight(z)), ("rwr", rwr_weight(z))):
        predicted = float((weight * z).sum() / weight.sum())
        # Of a weighted mean, by its linearisation.
        spread = float(((weight * (z - predicted)).square().sum()).sqrt() / weight.sum())
        mean, error = measured(method.upper(), drawn(trained(method), sizes.measured))
        row.figures[method.upper()] |= {"predicted": predicted, "se predicted": spread}
        allowed = ERRORS * math.hypot(error, spread) + FITTING
        name = f"{method.upper()} {mean:.3f} is {predicted:.3f}, within {allowed:.3f}"
        row.checks[name] = abs(mean - predicted) <= allowed
        above, error = mean - base[0], math.hypot(error, base[1])
        row.checks[f"{method.upper()} above the base: {above:+.3f} ± {error:.3f}, over {ERRORS} s.e."] = (
            above > ERRORS * error
        )
        parts.append(f"{method.upper()} {mean:+.2f}±{row.figures[method.upper()]['se']:.2f}")
        predictions.append(f"{method.upper()} {predicted:.3f}±{spread:.3f}")
    seeds = [SEED + i for i in range(sizes.conditional)]
    each = np.array([[standardised(drawn(engine, sizes.measured, s)) for s in SCORES] for engine in map(ca, seeds)])
    # Over trainings where there are several: they differ by more than their responses do.
    several = each.mean(-1).T if len(seeds) > 1 else each[0]  # [score, training], or of one [score, response]
    found = [mean_and_error(z) for z in several]
    for score, (mean, error) in zip(SCORES, found, strict=True):
        row.figures[f"CA {score:g}"] = {
            "z": mean,
            "se": error,
            "trainings": each[:, SCORES.index(score)].mean(-1).tolist(),
        }
    for high in (1, 2):
        gap, error = mean_and_error(several[high] - several[0])
        name = f"CA, {SCORES[0]:g} to {SCORES[high]:g}: {gap:+.3f} ± {error:.3f}"
        row.checks[f"{name}, over {ERRORS} s.e."] = gap > ERRORS * error
    gap, error = mean_and_error(several[2] - several[1])
    row.figures["CA 0 to 5"] = {"rise": gap, "se": error}
    shown = ", ".join(f"{s:g}: {m:+.2f}±{e:.2f}" for s, (m, e) in zip(SCORES, found, strict=True))
    row.exact = f"predicted z from {len(examples)} responses: {', '.join(predictions)} (Gaussian z: .798, .200)"
    row.engine = f"z: {', '.join(parts)}; CA at {shown}; 0 to 5 {gap:+.2f}±{error:.2f}"
    row.figures["curve"] = [(s, *f) for s, f in zip(SCORES, found, strict=True)]
    return row


@cache
def pairs(groups: int) -> list[dict[str, str]]:
    """The best and the worst of five of the policy's responses, `groups` times for each training prompt."""
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(groups):
            out, sampling = Path(scratch) / f"{i}.jsonl", SamplingParams(max_tokens=CAP, seed=PAIRS + 5 * i)
            build_pairs(policy(), TRAIN, reviews.sentiment, out, samples=5, sampling=sampling, progress=False)
            rows += [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in read_preferences(out)]
    return rows


@on_one_thread
def w4(sizes: Sizes) -> Row:
    row = Row(
        "W4",
        "reviews: DPO and WPO on pairs that the engine made",
        "WPO: above DPO at equal settings",
        asserted=f"both raise the exact sentiment over {ERRORS} s.e.; which is better is reported",
        caveat=(
            "The pairs are on-policy at first and grow off-policy as the policy moves; one seed of training, so the "
            "errors are those of sampling alone. Both train with beta .1, a rate of 5e-4 and batches of 16 (the paper: "
            ".01, 5e-7, 128), WPO with sampled weights and the product clamp."
        ),
    )
    from datasets import Dataset

    from pyengine.integrations.trl import PreferenceConfig, PreferenceTrainer

    rows, n = pairs(sizes.groups), sizes.reviews
    base = mean_and_error(np.array([reviews.sentiment_of(r.text) for r in drawn(policy(), n)]))
    parts = []
    for epochs in sizes.epochs:
        for name, weights in (("DPO", "off"), ("WPO", "sampled")):

            def make(model: Any, directory: str) -> Any:
                options = settings(directory) | PREFERENCE | {"num_train_epochs": epochs, "logging_steps": 1}
                return PreferenceTrainer(
                    model,
                    None,
                    PreferenceConfig(weights=weights, **options),
                    train_dataset=Dataset.from_list(rows),
                    processing_class=policy().tokenizer,
                )

            engine, seconds = copy_trained_by(make)
            results = drawn(engine, n)
            reward = mean_and_error(np.array([reviews.sentiment_of(r.text) for r in results]))
            kl = mean_and_error(log_ratios(results))
            gap, error = reward[0] - base[0], math.hypot(reward[1], base[1])
            held = gap > ERRORS * error
            row.checks[f"{name}, {epochs} epochs: {gap:+.3f} ± {error:.3f}, over {ERRORS} s.e."] = held
            row.figures[f"{name}, {epochs} epochs"] = {"sentiment": reward, "kl": kl, "seconds": seconds, "n": n}
            parts.append(f"{name}, {epochs}×: {reward[0]:.3f}±{reward[1]:.3f} @ {kl[0]:.1f}±{kl[1]:.1f}")
    row.exact = f"{len(rows)} pairs, best and worst of 5; base {base[0]:+.2f}±{base[1]:.2f}"
    row.engine = f"sentiment @ KL: {'; '.join(parts)}"
    row.figures["base"] = base
    return row


CLAIMS: list[Callable[[Sizes], Row]] = [w4, o4]
