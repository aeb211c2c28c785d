"""Draws docs/branching.svg and docs/tree_attention.svg from bench/results/*.json: python bench/plots.py."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
COLOURS = ("#1b6ca8", "#c8553d", "#7a7a7a")
matplotlib.rcParams["svg.hashsalt"] = "pyengine"  # the same file from the same numbers


def load(stem):
    report = json.loads((HERE / "results" / f"{stem}.json").read_text())
    machine = report["machine"]
    return report["rows"], f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu']}"


def curves(axis, rows, x, values, colours=COLOURS):
    """One line for each name in values(row), in the order of x."""
    rows = sorted(rows, key=lambda row: row[x])
    for name, colour in zip(values(rows[0]), colours, strict=False):
        axis.plot([row[x] for row in rows], [values(row)[name] for row in rows], "o-", color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks([row[x] for row in rows], [f"{row[x]:,}" for row in rows])
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def save(figure, axes, name, title):
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(DOCS / f"{name}.svg")


def branching():
    rows, where = load("branching")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)

    def rate(row):
        return row["branch_tokens_per_second"]

    curves(axes[0], [row for row in rows if row["branches"] == 8], "prefix", rate)
    curves(axes[1], [row for row in rows if row["prefix"] == 1024], "branches", rate)
    axes[0].set_xlabel("prompt tokens (K = 8)")
    axes[1].set_xlabel("branches K (1,024 prompt tokens)")
    axes[0].set_ylabel("branch tokens a second")
    save(figure, axes, "branching", f"Blockwise decoding, Llama of 125 M parameters, fp32, blocks of 16\n{where}")


def tree_attention():
    rows, where = load("tree_attention")
    chosen = [row for row in rows if row["dtype"] == "fp32" and row["threads"] == 2]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)

    def milliseconds(row):
        return {name: t / 1e3 for name, t in row["microseconds"].items()}

    names = ("pyengine", *(name for name in chosen[0]["microseconds"] if name != "pyengine"))

    def ordered(row):
        return {name: milliseconds(row)[name] for name in names}

    curves(axes[0], [row for row in chosen if row["branches"] == 16], "prefix", ordered)
    curves(axes[1], [row for row in chosen if row["prefix"] == 2048], "branches", ordered)
    axes[0].set_xlabel("prefix tokens P (K = 16)")
    axes[1].set_xlabel("branches K (P = 2,048)")
    axes[0].set_ylabel("milliseconds")
    save(figure, axes, "tree_attention", f"One layer of Llama 3.1 8B, one decode step, fp32\n{where}")


if __name__ == "__main__":
    branching()
    tree_attention()
