"""What the claims share: sizes, a row of the table with its checks, and the engine over a world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyengine import Engine, SamplingParams

SEED = 0  # of worlds B and C and of the decoding; E has seeds 0, 1, ... of its own
ERRORS = 4  # standard errors that a sampled figure may be off


@dataclass(frozen=True)
class Sizes:
    """responses: decoded for each figure of A and B. prompts, outcomes: of C. train: prompts of E, and its seeds.

    Of the reviews: roll-outs that each scorer is trained on, responses decoded for each figure, pairs for DPO, and the
    settings of the curves, λ of tokenwise and K of blockwise and best-of-K. What is asserted is the last of each.

    confident: prompts of D1. bandits: seeds of D2, and the lengths that W3 counts its responses as. offline: seeds of
    F, and the responses in each of its halves. cost: responses of O3, and how often they are timed.
    labelled: roll-outs that O4 trains on. groups: of five responses to each prompt that W4's pairs come from. epochs:
    of W4. measured: responses of a policy that O4 has trained. conditional: trainings of O4's CA, a seed each.
    """

    responses: int = 480
    prompts: int = 60
    outcomes: int = 4000
    repeats: int = 10  # responses for each prompt of C and E in the engine
    train: int = 464
    seeds: int = 4
    fudge: int = 64_000  # responses for the tabular CD-FUDGE
    rollouts: int = 4096
    reviews: int = 384
    pairs: int = 600
    weights: tuple[float, ...] = (1, 2, 4)
    branches: tuple[int, ...] = (2, 4, 8)
    best: tuple[int, ...] = (2, 4, 8, 16, 50)
    confident: int = 16
    bandits: int = 24
    lengths: tuple[int, ...] = (1, 3, 10)
    offline: int = 6
    halves: int = 5000
    cost: int = 32
    rounds: int = 3
    labelled: int = 4096
    groups: int = 10
    epochs: tuple[int, ...] = (1, 3)
    measured: int = 1024
    conditional: int = 4


SMALL = Sizes(
    responses=60,
    prompts=20,
    outcomes=1000,
    repeats=3,
    train=200,
    seeds=2,
    fudge=16_000,
    rollouts=1024,
    reviews=64,
    pairs=200,
    weights=(4,),
    branches=(8,),
    best=(8,),
    confident=6,
    bandits=8,
    lengths=(3,),
    offline=2,
    halves=1000,
    cost=8,
    rounds=1,
    labelled=256,
    groups=2,
    epochs=(1,),
    measured=128,
    conditional=1,
)


@dataclass
class Row:
    """One line of the table. checks: what was asserted, and whether it holds. reported_only: no failure if not.

    caveat: what the figures must not be read without.
    """

    id: str
    claim: str
    paper: str
    exact: str = ""
    engine: str = ""
    asserted: str = ""
    caveat: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reported_only: bool = False

    @property
    def verdict(self) -> str:
        failed = [name for name, held in self.checks.items() if not held]
        if not self.asserted:
            return "reported only"
        found = f"does not hold: {'; '.join(failed)}" if failed else "holds"
        return f"{found} (reported only)" if self.reported_only else found

    @property
    def failed(self) -> bool:
        return not self.reported_only and not all(self.checks.values())

    def sampled(self, name: str, found: Sequence[float] | np.ndarray, exact: float) -> str:
        """The mean of `found` with its standard error as text; it must agree with the exact figure."""
        x = np.asarray(found, dtype=float)
        # 1e-4 is what fp32 logits and scores may differ by.
        return self._agree(name, float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))), len(x), exact, 1e-4)

    def shares(self, name: str, found: np.ndarray, chances: np.ndarray) -> str:
        """The same for successes of 0 and 1 with known chances; the standard error is the exact one."""
        n, error = len(found), float(np.sqrt((chances * (1 - chances)).sum())) / len(found)
        return self._agree(name, float(found.mean()), error, n, float(chances.mean()), 1 / n)

    def _agree(self, name: str, mean: float, error: float, n: int, exact: float, slack: float) -> str:
        self.figures[f"engine {name}"] = {"mean": mean, "se": error, "n": n, "exact": float(exact)}
        held = abs(mean - exact) <= ERRORS * error + slack
        self.checks[f"the engine's {name}, {mean:.4g} ± {error:.2g}, is {exact:.4g}"] = bool(held)
        return f"{mean:.3f}±{error:.3f}"


def decode(world, scorer, prompts: Sequence[str], strategy, max_tokens: int):
    """Results of the engine, a seed of its own for each prompt."""
    engine = Engine(world.model, world.tokenizer, scorer, max_rows=4096, cache_gb=1)
    sampling = [SamplingParams(max_tokens=max_tokens, seed=SEED + i) for i in range(len(prompts))]
    return engine.generate(list(prompts), strategy, sampling, progress=False)
