"""Draws docs/claims*.svg from bench/results/claims.json: python bench/claims_plot.py."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SVG = HERE.parent / "docs" / "claims.svg"
REVIEWS = SVG.with_name("claims_reviews.svg")
TRAINING = SVG.with_name("claims_training.svg")
BLOCKS = ("#f0c9a8", "#e3986b", "#c8553d", "#7d2e1e")  # M = 8, 16, 32, 64
COLOURS = ("#1b6ca8", "#c8553d", "#6fa8d0", "#e3986b", "#2f8f5b")
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


@contextmanager
def panels(report, file: Path):
    """The report's figures by claim, and two axes of the file to draw them on."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    yield {row["id"]: row["figures"] for row in report["claims"]}, axes
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def draw(report) -> Path:
    """Both panels, all of them exact."""
    with panels(report, SVG) as (figures, axes):
        curves(axes[0], figures["C2"]["curves"])
        wins(axes[1], figures["L2"]["curves"])
    return SVG


def sampled(axis, lines):
    """Points with their standard errors, each line from the base policy; hollow where the KL is an upper bound."""
    base = lines["base"][0]
    axis.plot(base["kl"], base["reward"], "o", color="#7a7a7a", label="base policy", markersize=4)
    others = {name: points for name, points in lines.items() if name != "base"}
    for (name, points), colour in zip(others.items(), COLOURS, strict=False):
        bound = points[0]["kl_kind"] == "bound"
        kl, reward = ([p[key] for p in [base, *points]] for key in ("kl", "reward"))
        axis.plot(kl, reward, "-", color=colour, alpha=0.5, linewidth=1.2)
        spread, face = [p["error"] for p in points], "white" if bound else colour
        label = f"{name} (bound)" if bound else name
        axis.errorbar(
            kl[1:], reward[1:], spread, fmt="o", color=colour, markerfacecolor=face, markersize=4, label=label
        )
        for p in points:
            axis.annotate(p["setting"], (p["kl"], p["reward"]), xytext=(3, -8), textcoords="offset points", fontsize=5)
    axis.set_xlabel("KL from the base policy (nats a response)")


def draw_reviews(report) -> Path:
    """Both panels through the engine on the embedded review model."""
    with panels(report, REVIEWS) as (figures, axes):
        for axis, name, reward, title in (
            (axes[0], "R1", "exact sentiment", "Reviews: scorers trained from scratch"),
            (axes[1], "R2", "log(T / 128)", "Reviews: length, K = 6 and best-of-50"),
        ):
            sampled(axis, figures[name]["curves"])
            axis.set_ylabel(reward)
            axis.set_title(title, fontsize=9)
    return REVIEWS


def epochs(axis, lines):
    """World D2: mean reward over seeds after each epoch, with its standard error."""
    names = {"DPO": "DPO", "WPO": "WPO", "shuffled": "WPO, weights shuffled (control)"}
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        mean = [m for m, _ in points]
        low, high = zip(*((m - e, m + e) for m, e in points), strict=True)
        axis.plot(range(len(points)), mean, "o-", color=colour, label=names[name], markersize=3, linewidth=1.2)
        axis.fill_between(range(len(points)), low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("epoch")
    axis.set_ylabel("expected reward (sd over all candidates)")
    axis.set_title("World D2: off-policy pairs of a concave reward", fontsize=9)


def scores(axis, exact, reviews):
    """E[z] against the score in the prompt with standard errors: of World F over worlds, of the reviews by sampling."""
    axis.plot(*[[p[0] for p in exact]] * 2, "--", color="#222222", label="what was asked for", linewidth=1)
    for points, label, colour in (
        (exact, "world F, log-linear policy (exact)", COLOURS[0]),
        (reviews, "review model, trained policy (sampled)", COLOURS[1]),
    ):
        asked, z, error = zip(*points, strict=True)
        axis.errorbar(asked, z, error, fmt="o-", color=colour, label=label, markersize=4, linewidth=1.2)
    axis.set_xlabel("score asked for (standard deviations of the data)")
    axis.set_ylabel("E[z] of what it writes")
    axis.set_title("Conditional alignment", fontsize=9)


def draw_training(report) -> Path:
    """WPO and its control over epochs; what conditional alignment makes of the score."""
    with panels(report, TRAINING) as (figures, axes):
        epochs(axes[0], figures["W2"]["curves"])
        scores(axes[1], figures["O2"]["curve"], figures["O4"]["curve"])
    return TRAINING


PLOTS = (draw, draw_reviews, draw_training)

if __name__ == "__main__":
    found = json.loads((HERE / "results" / "claims.json").read_text())
    print(*(plot(found) for plot in PLOTS))
