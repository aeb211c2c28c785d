"""What was measured as pictures; SVG by matplotlib, the same file from the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyengine.bench.report import Report

COLOURS = ("#1b6ca8", "#c8553d", "#7a7a7a", "#4f8f4f", "#8a5ba6")


def throughput(report: Report, path: Path) -> None:
    """Committed tokens a second: each round a dot, the median a bar."""
    figure, axis = _figure()
    tokens = {one["name"]: one["extra_info"]["committed_tokens_per_s"] for one in report.benchmarks}
    for place, one in enumerate(report.benchmarks):
        seconds = one["stats"]["data"]
        rates = [tokens[one["name"]] * one["extra_info"]["seconds"] / t for t in seconds]
        colour = COLOURS[place % len(COLOURS)]
        axis.barh(place, tokens[one["name"]], color=colour, alpha=0.35, height=0.6)
        axis.plot(rates, [place] * len(rates), "o", color=colour, markersize=3)
        ratio = one["extra_info"].get("times_as_long")
        says = f"  takes {ratio['ratio']:.2f}×" if ratio else ""
        axis.annotate(says, (max(rates), place), va="center", fontsize=7)
    axis.set_yticks(range(len(tokens)), list(tokens))
    axis.invert_yaxis()
    axis.set_xlabel("committed tokens a second, of each round and their median")
    _save(figure, axis, path, f"{report.settings['name']}, {report.settings['strategy']}", report.machine)


def frontier(points: Sequence[dict[str, Any]], path: Path, title: str, unit: str, machine: dict[str, Any]) -> None:
    """Mean reward against seconds a response, a line for each family; bars are 95 % intervals over prompts."""
    figure, axis = _figure()
    for family, colour in zip(dict.fromkeys(p["family"] for p in points), COLOURS, strict=False):
        own = sorted((p for p in points if p["family"] == family), key=lambda p: p["seconds"])
        x, y = [p["seconds"] for p in own], [p["reward"] for p in own]
        spread = [[p["reward"] - p["low"] for p in own], [p["high"] - p["reward"] for p in own]]
        axis.errorbar(x, y, spread, fmt="o-", color=colour, label=family, capsize=2, markersize=4)
        for p in own:
            axis.annotate(
                p["setting"], (p["seconds"], p["reward"]), xytext=(4, -9), textcoords="offset points", fontsize=6
            )
    axis.set_xscale("log")
    axis.set_xlabel("seconds a response")
    axis.set_ylabel(unit)
    axis.legend(frameon=False, fontsize=8)
    _save(figure, axis, path, title, machine)


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6))
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, axis: Any, path: Path, title: str, machine: dict[str, Any]) -> None:
    import matplotlib

    axis.set_title(f"{title}\n{machine['cpu']}, {machine['threads']} threads", fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "pyengine"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
