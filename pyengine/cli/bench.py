"""`pyengine bench`: throughput beside what others do, versions against each other, and the ops' own benches."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from pyengine.cli.generate import STRATEGIES, strategy_of
from pyengine.cli.load import quiet_loading
from pyengine.errors import InputError

app = typer.Typer(help="Measure: contenders in turns, intervals of their ratios.", no_args_is_help=True)
NEEDS = ("scipy", "matplotlib", "pytest_benchmark")


def needed() -> None:
    """InputError where what `bench` works with is not installed."""
    import importlib.util

    for package in NEEDS:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"bench needs {package.replace('_', '-')}: pip install 'tilt-engine[bench]'")


def say(line: str) -> None:
    print(f"pyengine: {line}", file=sys.stderr, flush=True)


@app.command()
def throughput(
    model: Annotated[
        str, typer.Option(help="A shape with random weights, SmolLM2-135M@random say, a directory or a hub id.")
    ] = "SmolLM2-135M@random",
    strategy: Annotated[str, typer.Option(help=", ".join(STRATEGIES))] = "blockwise",
    k: Annotated[int | None, typer.Option(help="Branches (default: 8).")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens in a block (default: 16).")] = None,
    weight: Annotated[float | None, typer.Option(help="Strength λ of tokenwise (default: 1).")] = None,
    prompts: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    lengths: Annotated[str, typer.Option(help="fixed, lognormal, chat, or a JSONL file.")] = "fixed",
    prompt_tokens: Annotated[int | None, typer.Option(help="Of fixed, median of lognormal (default: 256).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens, likewise (default: 64).")] = None,
    prefix: Annotated[str, typer.Option(help="shared: prompts begin alike; or unique.")] = "unique",
    baselines: Annotated[str, typer.Option(help="Of generate, fork, plain, vllm.")] = "generate,fork,plain",
    rounds: Annotated[int, typer.Option(help="In each, all have their turn.")] = 12,
    max_seconds: Annotated[float, typer.Option(help="No round is begun that would end later.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and orders.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cache_gb: Annotated[float | None, typer.Option(help="GB for the engine's keys and values.")] = None,
    out: Annotated[Path | None, typer.Option(help="RUN.json; RUN.jsonl, RUN.md and RUN.svg beside it.")] = None,
) -> None:
    """Decoding beside what people do without this engine, in turns, with intervals of the ratios."""
    needed()
    from pyengine.bench import pictures, report, workload
    from pyengine.bench.throughput import Task, run

    quiet_loading()
    if out is not None:
        report.writable(out)
    sizes = workload.lengths(lengths, prompts, prompt_tokens, max_tokens, seed)
    task = Task(
        model,
        strategy_of(strategy, None, k, block, weight, None),
        sizes,
        workload.shared_tokens(sizes, prefix),
        [name.strip() for name in baselines.split(",") if name.strip()],
        rounds,
        max_seconds,
        device,
        cache_gb,
        seed,
    )
    found = run(task, say)
    report.table(found, report.THROUGHPUT)
    if out is not None:
        report.write(found, out, report.THROUGHPUT)
        pictures.throughput(found, out.with_suffix(".svg"))
        print(f"{out}, {out.with_suffix('.jsonl').name}, {out.with_suffix('.md').name}, {out.with_suffix('.svg').name}")


@app.command()
def compare(
    records: Annotated[list[Path] | None, typer.Argument(help="Two records: NEW.json OLD.json.")] = None,
    against: Annotated[str | None, typer.Option(help="A commit: both are built and run in turns.")] = None,
    threshold: Annotated[str, typer.Option(help="By how much slower is a regression: 3% or 0.03.")] = "3%",
    out: Annotated[Path | None, typer.Option(help="RUN.json; RUN.jsonl and RUN.md beside it.")] = None,
) -> None:
    """The working tree against a commit, or a record against another; exit code 1 where something became slower."""
    needed()
    from pyengine.bench import records as two
    from pyengine.bench import report, versions

    limit = share(threshold)
    given = list(records or [])
    if (against is None) == (not given) or len(given) not in (0, 2):
        raise InputError("bench compare: give --against COMMIT, or two records: NEW.json OLD.json")
    if out is not None:
        report.writable(out)
    found = versions.run(against, limit, say) if against is not None else two.compare(given[0], given[1], limit)
    report.table(found, versions.COLUMNS)
    if out is not None:
        report.write(found, out, versions.COLUMNS)
    for name in found.settings["regressions"]:
        print(f"pyengine: {name} became slower by more than {threshold}", file=sys.stderr)
    if found.settings["regressions"]:
        raise typer.Exit(1)


def share(text: str) -> float:
    """3% or 0.03 as 0.03."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"--threshold {text}: give a share from 0 to 1 or a percentage, 3% say")
    return value
