"""`pyengine generate`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

import pyengine
from pyengine.cli.load import (
    DTYPES,
    SCORERS,
    Complaints,
    conditioned,
    dtype_of,
    followed,
    load_engine,
    quiet_loading,
    ray_module,
    read_rows,
)
from pyengine.errors import InputError, RequestError, real

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.generation import Row
    from pyengine.results import Event, Result
    from pyengine.strategies import Strategy

# strategy -> the options that it uses
STRATEGIES: dict[str, tuple[str, ...]] = {
    "base": (),
    "tokenwise": ("weight", "kl_budget", "per"),
    "blockwise": ("k", "block", "beta"),
    "best-of-k": ("k", "beta"),
    "q-probe": ("k", "beta"),
    "rejection": ("bound", "beta"),
}


class Rejection(NamedTuple):
    """What `rejection_sample` is told; no strategy of the engine's loop."""

    bound: float
    beta: float


def make_strategy(name: str, options: dict[str, Any]) -> Strategy | Rejection:
    """The named strategy; an option that it does not use is an error, not ignored."""
    from pyengine.strategies import BASE, BestOfK, Blockwise, Tokenwise

    if name not in STRATEGIES:
        raise InputError(f"unknown strategy {name!r}; choose from {', '.join(STRATEGIES)}")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in STRATEGIES[name]:
            users = [s for s, used in STRATEGIES.items() if option in used]
            raise InputError(
                f"--{option.replace('_', '-')} is not used by strategy {name!r} (it is by {', '.join(users)})"
            )
    soft: dict[str, Any] = {"selection": "softmax", "beta": given["beta"]} if "beta" in given else {}
    if name == "base":
        return BASE
    if name == "tokenwise":
        if "per" in given and "kl_budget" not in given:
            raise InputError("--per says what --kl-budget is spent on: give that too")
        return Tokenwise(**given)
    if name == "rejection":
        for option in STRATEGIES[name]:
            if option not in given:
                raise InputError(f"strategy 'rejection' needs --{option}: it accepts with exp((reward - bound) / beta)")
        return Rejection(**{option: real(value, f"--{option}") for option, value in given.items()})
    if name == "blockwise":
        return Blockwise(given.get("k", 8), given.get("block", 16), **soft)
    if name == "q-probe":
        soft = {"selection": "softmax", "beta": given.get("beta", 0.1)}
    return BestOfK(given.get("k", 8), **soft)


def to_json(record: Any) -> str:
    """JSON; a score that is not finite becomes null."""
    from pyengine.results import finite

    return json.dumps(finite(record), allow_nan=False)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; without any, stdin is read.")] = None,
    input: Annotated[
        Path | None, typer.Option(help='JSONL file, a "prompt" (text), "prompt_ids" or "messages" a line.')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory, hub id or FILE.gguf; default: the embedded model.")
    ] = None,
    scorer: Annotated[list[str] | None, typer.Option(help=f"What is followed: {SCORERS}.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGIES)}; default: blockwise with a scorer, else base.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Branches (default: 8).")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens in a block (default: 16).")] = None,
    weight: Annotated[float | None, typer.Option(help="Strength λ of tokenwise (default: 1).")] = None,
    kl_budget: Annotated[
        float | None, typer.Option(help="Nats that tokenwise spends, in the place of --weight; see --per.")
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(help="What the budget is of: token (default), or sequence, on average over the prompts."),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Select from softmax(utility / beta) instead of argmax.")] = None,
    bound: Annotated[float | None, typer.Option(help="No reward is above it; for rejection, which is exact.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed and prompt, same result.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default on a CPU: float32.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights of eight bits, on a CPU; quicker.")] = None,
    cache_gb: Annotated[
        float | None, typer.Option(help="GB for keys and values (default: a share of what is free).")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="A prompt's bits are the same whatever is beside it; slower.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print each token or block as it is committed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with what its row holds.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are, though the model has a chat template.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    score: Annotated[
        float | None, typer.Option(help="Reward to ask a policy of `train offline --method ca` for, in deviations.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL for a large --input: its rows with their results; a report beside it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a run into --out that was cut short.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="On a Ray cluster: its HOST:PORT, auto, or local to start one here.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Engines on the cluster (default: one for each CPU, or GPU).")
    ] = None,
) -> None:
    """Decode prompts with a strategy."""
    from pyengine.results import SamplingParams

    options = {"k": k, "block": block, "weight": weight, "kl_budget": kl_budget, "per": per}
    plan = strategy_of(strategy, scorer, options | {"beta": beta, "bound": bound})
    picked = followed("--scorer", scorer)
    sampling = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed)
    loading = {"dtype": dtype_of(dtype), "quantize": quantize, "cache_gb": cache_gb}
    loading |= {"trust_remote_code": trust_remote_code, "batch_invariant": batch_invariant}
    asking, chat = conditioned(model, score), not raw and score is None
    if out is not None:
        if input is None or prompts or stream or as_json:
            raise InputError("--out takes its rows from --input FILE.jsonl, and leaves out --stream and --json")
        job: dict[str, Any] = {"strategy": in_loop(plan, "--out"), "sampling": sampling, "scorer": picked}
        job |= {"ask": None if score is None else asking, "chat": chat, "device": device, "resume": resume}
        return to_file(input, model, out, job | loading, ray, workers)
    if resume or ray is not None or workers is not None:
        raise InputError("--resume, --ray and --workers are for a job with --input FILE.jsonl and --out FILE.jsonl")
    complain = Complaints()
    found = found_rows(prompts, input, complain)
    engine = load_engine(model, picked, device, **loading)
    usable = usable_rows(engine, found, asking, chat, complain)
    printed = to_screen(engine, usable, plan, sampling, stream, as_json, complain)
    if complain.made:
        if complain.made + printed > 1:
            print(f"pyengine: {complain.made} of {complain.made + printed} prompts failed", file=sys.stderr)
        raise typer.Exit(1)


def strategy_of(name: str | None, scorer: list[str] | None, options: dict[str, Any]) -> Strategy | Rejection:
    """What the options say; blockwise where there is a scorer and no name."""
    return make_strategy(name or ("blockwise" if scorer else "base"), options)


def in_loop(plan: Strategy | Rejection, whose: str) -> Strategy:
    """A plan of the engine's loop; InputError, naming whose it must be, for rejection."""
    if isinstance(plan, Rejection):
        raise InputError(f"strategy 'rejection' draws whole responses until one is accepted: not with {whose}")
    return plan


def found_rows(prompts: list[str] | None, input: Path | None, complain: Complaints) -> list[Row]:
    """All that are asked for; InputError where there are none."""
    found = list(read_rows(list(prompts or []), input, complain))
    if not found:
        raise InputError(f"no usable prompt in {input}" if input else "no prompt on stdin")
    return found


def usable_rows(engine: Engine, rows: list[Row], asking: Any, chat: bool, complain: Complaints) -> list[Row]:
    """Those that the engine can read, as it is asked for them; exit code 2 where it can read none."""
    from pyengine.generation import readable

    usable: list[Row] = []
    for row in readable(engine, rows, asking, chat):
        if isinstance(row, str):
            complain(row)
        else:
            usable.append(row)
    if not usable:
        raise typer.Exit(2)
    return usable


def to_file(
    source: Path, model: str | None, out: Path, job: dict[str, Any], ray: str | None, workers: int | None
) -> None:
    """The job on this machine or a cluster; its report is printed, and what failed is told and is exit code 1."""
    from pyengine import generation

    quiet_loading()
    path = pyengine.embedded("policy") if model is None else model
    if ray is None:
        if workers is not None:
            raise InputError("--workers are a cluster's: give --ray local to start one here")
        report = generation.generate(source, path, out, **job)
    else:
        cluster = ray_module()
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints what happens to its workers
            report = cluster.generate(source, path, out, address=ray, workers=workers, **job)
    print(json.dumps(report))
    if report["failed"]:
        for fault in report["faults"]:
            print(f"pyengine: {fault}", file=sys.stderr)
        print(f'pyengine: {report["failed"]} of {report["rows"]} rows failed: see their "error"', file=sys.stderr)
        raise typer.Exit(1)


def to_screen(
    engine: Engine,
    rows: list[Row],
    plan: Strategy | Rejection,
    sampling: Any,
    stream: bool,
    as_json: bool,
    complain: Any,
) -> int:
    """How many were printed."""
    from pyengine.generation import decoded

    printed = 0
    if stream:
        own = in_loop(plan, "--stream")
        if getattr(own, "kl_budget", None) is not None and own.per == "sequence":  # type: ignore[union-attr]
            raise InputError("--per sequence is an average over all prompts, which --stream takes one by one")
        for row in rows:
            try:
                for event in engine.stream(row.prompt, own, sampling):
                    show_event(event, row, as_json)
            except RequestError as error:
                complain(f"{row.where}: {error.reason}")
            else:
                printed += 1
        return printed
    if isinstance(plan, Rejection):
        return accepted(engine, rows, plan, sampling, as_json, complain)
    for index, outcome in decoded(engine, rows, plan, sampling):
        if isinstance(outcome, str):
            complain(outcome)
        else:
            show_result(outcome, rows[index], as_json)
            printed += 1
    return printed


def accepted(engine: Engine, rows: list[Row], plan: Rejection, sampling: Any, as_json: bool, complain: Any) -> int:
    """How many prompts had a draw that was accepted; each is printed, with what it took."""
    from pyengine.evaluation.rejection import rejection_sample

    printed = 0
    for row in rows:
        try:
            (found,) = rejection_sample(engine, [row.prompt], *plan, sampling=sampling)
        except InputError as error:
            complain(f"{row.where}: {error}")
            continue
        took = {"draws": found.draws, "highest": found.highest, "exact": found.exact}
        show_result(found.result, row._replace(rest=row.rest | took) if as_json else row, as_json)
        printed += 1
    return printed


def show_event(event: Event, row: Row, as_json: bool) -> None:
    if as_json:
        record = {"text": event.text, "tokens": event.tokens}
        print(to_json(record | ({"result": row.kept | event.result.to_dict()} if event.result else {})), flush=True)
    else:
        print(event.text, end="" if event.result is None else "\n", flush=True)


def show_result(result: Result, row: Row, as_json: bool) -> None:
    """A line of JSON keeps what else its row holds, an id say."""
    if as_json:
        print(to_json(row.kept | result.to_dict()), flush=True)
    else:
        reward = "" if result.reward is None else f"reward {result.reward:.3f}, "
        prompt = row.prompt[-1]["content"] + "\n" if isinstance(row.prompt, list) else result.prompt
        print(f"{prompt}{result.text}\n  [{reward}KL {result.kl:.2f} nats ({result.kl_kind})]", flush=True)
