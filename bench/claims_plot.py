"""Draws docs/claims.svg from bench/results/claims.json: python bench/claims_plot.py."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SVG = HERE.parent / "docs" / "claims.svg"
BLOCKS = ("#f0c9a8", "#e3986b", "#c8553d", "#7d2e1e")  # M = 8, 16, 32, 64
matplotlib.rcParams["svg.hashsalt"] = "pyengine"  # the same file from the same numbers


def curves(axis, lines):
    """World B: reward against KL."""
    colours = {"frontier": "#222222", "tokenwise": "#1b6ca8", "best-of-K": "#2f8f5b"}
    blocks = iter(BLOCKS)
    for name, points in lines.items():
        kl, reward = zip(*points, strict=True)
        colour = colours.get(name) or next(blocks)
        axis.plot(
            kl, reward, "--" if name == "frontier" else "o-", color=colour, label=name, markersize=3, linewidth=1.2
        )
    axis.set_xlim(0, 4)
    axis.set_xlabel("KL from the base policy (nats)")
    axis.set_ylabel("expected reward, log(T / 128)")
    axis.set_title("World B: a Markov language, length reward", fontsize=9)


def wins(axis, noises):
    """World C: joint win rate against k."""
    for (noise, lines), colour in zip(noises.items(), ("#1b6ca8", "#c8553d", "#7a7a7a"), strict=True):
        for name, style in (("LSC", "o-"), ("raw, best weight", "o--")):
            label = f"{name}, {'no' if noise == 'none' else noise} noise"
            axis.plot(lines["k"], lines[name], style, color=colour, label=label, markersize=3, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("k of best-of-k")
    axis.set_ylabel("both gold rewards above their medians")
    axis.set_title("World C: two rewards at odds", fontsize=9)


def draw(report) -> Path:
    """Both panels, all of them exact."""
    figures = {row["id"]: row["figures"] for row in report["claims"]}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    curves(axes[0], figures["C2"]["curves"])
    wins(axes[1], figures["L2"]["curves"])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(SVG, metadata={"Date": None})
    plt.close(figure)
    return SVG


if __name__ == "__main__":
    print(draw(json.loads((HERE / "results" / "claims.json").read_text())))
