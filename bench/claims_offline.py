"""Claims O1 and O2, about offline alignment, in world F."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from claims_rig import Row, Sizes, decode

from pyengine.worlds import offline, represent

FIRST = 200  # of world F's seeds; 0 to 5 and 100 to 105 were looked at before
SCORES = (-5.0, -2.5, 0.0, 1.0, 2.5, 5.0)
BETA = 0.3  # of the KL-regularised optimum


@cache
def solved(seed: int, halves: int) -> tuple[offline.Offline, dict[str, np.ndarray]]:
    """World F and the laws that the methods learn in it."""
    world = offline.offline(seed, halves)
    laws = {name: offline.count_fit(world, weight) for name, weight in offline.weights(world).items()}
    fit = offline.conditional(world)
    laws |= {f"CA {score:g}": offline.asked(fit, score) for score in SCORES}
    laws["optimum"] = offline.regularised(world, laws["SFT"], BETA)
    laws["optimum of z"] = offline.regularised(world, laws["SFT"], BETA, standardised=True)
    return world, laws


def over_seeds(sizes: Sizes) -> dict[str, tuple[float, float]]:
    """Mean and standard error over worlds of the exact E[z] of each law."""
    found = [solved(FIRST + i, sizes.halves) for i in range(sizes.offline)]
    z = {name: np.array([offline.mean_z(world, laws[name]) for world, laws in found]) for name in found[0][1]}
    return {name: (float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))) for name, x in z.items()}


def sampled(row: Row, sizes: Sizes, names: list[str]) -> dict[str, str]:
    """E[z] of the first world's laws, decoded by the engine, each law after a prompt of its own."""
    world, laws = solved(FIRST, sizes.halves)
    represented = represent.bigrams(np.stack([laws[name] for name in names]), offline.LENGTH)
    which = np.arange(sizes.responses * len(names) // 2) % len(names)
    results = decode(represented, None, [f"p{x}" for x in which], None, offline.LENGTH)
    tokens = np.array([r.tokens for r in results]) - which[:, None] * offline.VOCAB
    last = np.insert(tokens[:, :-1], 0, offline.VOCAB, axis=1)
    z = np.array(world.statistics.z(world.step[last, tokens].sum(1).tolist()))
    return {name: row.sampled(name, z[which == x], offline.mean_z(world, laws[name])) for x, name in enumerate(names)}


def spelled(found: dict[str, tuple[float, float]], names: list[str]) -> str:
    return ", ".join(f"{name} {found[name][0]:.2f}±{found[name][1]:.2f}" for name in names)


def o1(sizes: Sizes) -> Row:
    row = Row(
        "O1",
        "F: CA > FA > SFT > RWR in E[z]",
        "OA, human rank scores: CA 3.88, PPO 3.79, FA 2.83, SFT 2.37, RWR 2.13",
        asserted="CA at 5 > FA > SFT > RWR; FA .80 ± .06, RWR .20 ± .02 (Gaussian z: .798, .200)",
    )
    found = over_seeds(sizes)
    names = ["CA 5", "FA", "SFT", "RWR", "SFT, all"]
    optima = [spelled(found, [name]) for name in ("optimum", "optimum of z")]
    row.exact = (
        f"{spelled(found, names)}; in PPO's place max E[r] - {BETA} KL: {optima[0]}, or with z for r: {optima[1]} "
        f"({sizes.offline} worlds)"
    )
    row.caveat = (
        "SFT is on the better half, as in the paper; on all data it has 0, below RWR. How CA at 5 and the optimum "
        "compare is a choice of β and of r's unit; z = 5 is beyond the data and extrapolates a log-linear model. These "
        "worlds are fresh; twelve others were looked at while this was written."
    )
    means = [found[name][0] for name in names[:4]]
    row.checks = {
        f"CA > FA > SFT > RWR: {', '.join(f'{m:.3f}' for m in means)}": all(np.diff(means) < 0),
        f"FA {means[1]:.3f} is .80 ± .06": abs(means[1] - 0.8) <= 0.06,
        f"RWR {means[3]:.3f} is .20 ± .02": abs(means[3] - 0.2) <= 0.02,
    }
    elsewhere = {"CA 5": 3.63, "optimum": 4.44, "FA": 0.82, "SFT": 0.66, "RWR": 0.20}
    row.figures = {"E[z]": found, "elsewhere": elsewhere, "KL from SFT": {}}
    for name in ("CA 5", "optimum", "optimum of z"):
        kl = [
            offline.divergence(laws[name], laws["SFT"])
            for _, laws in (solved(FIRST + i, sizes.halves) for i in range(sizes.offline))
        ]
        row.figures["KL from SFT"][name] = float(np.mean(kl))
    parts = sampled(row, sizes, names[:4])
    row.engine = "first world: " + ", ".join(f"{name} {part}" for name, part in parts.items())
    return row


def o2(sizes: Sizes) -> Row:
    row = Row(
        "O2",
        "F: the score that CA is asked for controls E[z]",
        "OA: quality follows the score in the prompt",
        asserted=f"E[z] rises with the score {', '.join(f'{s:g}' for s in SCORES)}, in every world",
    )
    found = over_seeds(sizes)
    names = [f"CA {score:g}" for score in SCORES]
    row.exact = "; ".join(f"{name[3:]}: {found[name][0]:.2f}±{found[name][1]:.2f}" for name in names)
    for i in range(sizes.offline):
        world, laws = solved(FIRST + i, sizes.halves)
        z = [offline.mean_z(world, laws[name]) for name in names]
        row.checks[f"world {FIRST + i}: {', '.join(f'{x:.2f}' for x in z)}"] = bool(np.all(np.diff(z) > 0))
    row.figures = {
        "curve": [(score, *found[name]) for score, name in zip(SCORES, names, strict=True)],
        "elsewhere": [(-5, -3.63), (0, -0.02), (2.5, 2.39), (5, 3.63)],
    }
    parts = sampled(row, sizes, names)
    row.engine = "first world: " + "; ".join(f"{name[3:]}: {part}" for name, part in parts.items())
    return row


CLAIMS: list[Callable[[Sizes], Row]] = [o1, o2]
