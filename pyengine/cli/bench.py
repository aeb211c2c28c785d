"""`pyengine bench`: throughput beside what others do, versions against each other, and the ops' own benches."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pyengine
from pyengine.cli.generate import STRATEGIES, in_loop, make_strategy
from pyengine.cli.load import load_engine, quiet_loading
from pyengine.errors import InputError, real, whole
from pyengine.named import SOURCES, scorer_named

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.strategies import Strategy

BASELINES = "generate,fork,plain"
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
        str | None,
        typer.Option(help="A directory, a hub id, or SHAPE@random, Llama-3.2-1B say; default: the embedded model."),
    ] = None,
    strategy: Annotated[str, typer.Option(help=", ".join(STRATEGIES))] = "blockwise",
    k: Annotated[int | None, typer.Option(help="Branches (default: 8).")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens in a block (default: 16).")] = None,
    weight: Annotated[float | None, typer.Option(help="Strength λ of tokenwise (default: 1).")] = None,
    prompts: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    lengths: Annotated[str, typer.Option(help="fixed, lognormal, chat, or a JSONL file.")] = "fixed",
    prompt_tokens: Annotated[int | None, typer.Option(help="Of fixed, median of lognormal (default: 256).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens, likewise (default: 64).")] = None,
    prefix: Annotated[str, typer.Option(help="shared: prompts begin alike; or unique.")] = "unique",
    baselines: Annotated[str, typer.Option(help="Of generate, fork, plain, vllm.")] = BASELINES,
    rounds: Annotated[int, typer.Option(help="In each, all have their turn.")] = 12,
    max_seconds: Annotated[float, typer.Option(help="No round is begun that would end later.")] = 300.0,
    reward: Annotated[
        str | None, typer.Option(help=f"Follow and measure it: what is won in equal seconds. {SOURCES}.")
    ] = None,
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
    whole(prompts, "--prompts", 1)
    if reward is not None:
        if (lengths, prefix, prompt_tokens) != ("fixed", "unique", None):
            raise InputError("--lengths, --prefix, --prompt-tokens: not used with --reward, whose prompts are texts")
        if baselines != BASELINES or strategy == "base":
            raise InputError(
                "--reward compares a strategy with plain sampling: leave out --baselines, and take no base"
            )
        whole(rounds, "--rounds", 1)
        real(max_seconds, "--max-seconds", 0)
        if model is not None and model.endswith("@random"):
            raise InputError(f"--model {model}: --reward needs a model that says something, not random weights")
        plans = [planned(strategy, *scaled(strategy, k, block, weight, by)) for by in (0.5, 1, 2)]
        engine, tokens = load_engine(model, None, device, cache_gb=cache_gb), 64 if max_tokens is None else max_tokens
        return won(engine, plans, reward, prompts, tokens, rounds, max_seconds, seed, out)
    sizes = workload.lengths(lengths, prompts, prompt_tokens, max_tokens, seed)
    task = Task(
        str(pyengine.embedded("policy")) if model is None else model,
        planned(strategy, k, block, weight),
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
        written(out)


def planned(name: str, k: int | None, block: int | None, weight: float | None) -> Strategy:
    """The strategy with these options; InputError for one that is none of the engine's loop."""
    return in_loop(make_strategy(name, {"k": k, "block": block, "weight": weight}), "bench")


def won(
    engine: Engine,
    plans: list[Strategy],
    reward: str,
    prompts: int,
    tokens: int,
    rounds: int,
    max_seconds: float,
    seed: int,
    out: Path | None,
) -> None:
    """Reward at fixed compute."""
    from pyengine.bench import frontier, pictures, report
    from pyengine.bench.sensors import Watch
    from pyengine.worlds import reviews

    watch = Watch(engine.model.device)
    texts = reviews.prompts(prompts)
    points = frontier.measure(engine, texts, plans, scorer_named(reward), tokens, rounds, max_seconds, seed, say)
    settings = {"name": engine.name, "reward": reward, "prompts": prompts, "max_tokens": tokens, "seed": seed}
    settings |= {"rounds": rounds}
    found = frontier.report(points, settings | {"strategies": list(map(repr, plans))}, watch)
    report.table(found, frontier.COLUMNS)
    if out is not None:
        title = f"{engine.name}, {prompts} prompts, {tokens} tokens, following {reward}"
        report.write(found, out, frontier.COLUMNS)
        pictures.frontier(frontier.rows(points), out.with_suffix(".svg"), title, reward, found.machine)
        written(out)


def written(out: Path) -> None:
    print(f"{out}, {', '.join(out.with_suffix(end).name for end in ('.jsonl', '.md', '.svg'))}")


def scaled(
    name: str, k: int | None, block: int | None, weight: float | None, by: float
) -> tuple[int | None, int | None, float | None]:
    """(k, block, weight) of a strategy that is so much stronger: more branches, or a larger weight."""
    if name == "tokenwise":
        return k, block, by * (1.0 if weight is None else weight)
    return max(2, round(by * (8 if k is None else k))), block, weight


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


@app.command()
def kernels(
    op: Annotated[str | None, typer.Argument(help="One op's bench, tilt say; default: all, half an hour.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for OP.json, OP.jsonl and OP.md.")] = None,
) -> None:
    """The ops beside their peers, from a clone's bench/; of an op whose tests are red nothing is timed."""
    needed()
    from pyengine.bench import report
    from pyengine.bench.kernels import COLUMNS, run

    if out is not None and not out.is_dir():
        raise InputError(f"--out {out}: no such folder")
    with tempfile.TemporaryDirectory() as folder:
        for found in run(op, (out or Path(folder)).absolute()):
            report.table(found, COLUMNS)
            if out is not None:
                report.write_beside(found, out / f"{found.settings['op']}.json", COLUMNS)


def share(text: str) -> float:
    """3% or 0.03 as 0.03."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"--threshold {text}: give a share from 0 to 1 or a percentage, 3% say")
    return value
