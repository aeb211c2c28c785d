"""`pyengine label` and `pyengine pairs`: data for training, from rewards."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pyengine
from pyengine.cli.load import SCORERS, followed, load_engine, ray_module
from pyengine.errors import InputError


def label(
    data: Annotated[Path, typer.Argument(help='JSONL file, {"prompt", "response"} a line.')],
    scorer: Annotated[list[str], typer.Option(help=f"What scores: {SCORERS}.")],
    out: Annotated[Path, typer.Option(help='The same lines with "reward"; a report comes beside it.')],
    model: Annotated[
        str | None,
        typer.Option(
            help="Whose tokens and hidden states a scorer reads that needs some (default: the embedded one's)."
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="On a Ray cluster: its HOST:PORT, auto, or local to start one here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a run into --out that was cut short.")] = False,
    device: Annotated[str, typer.Option(help="Of the scorer and its model: cpu or cuda.")] = "cpu",
) -> None:
    """Score the responses of a file, each once, even if a process is killed on the way. A prefix scorer or a probe also
    gives "values", its score at every token."""
    from pyengine.scorers import parts_of
    from pyengine.training import labelling
    from pyengine.training.scoring import reads_text
    from pyengine.training.shards import vacant

    vacant(out.absolute(), resume)  # before a scorer is loaded
    picked: Any = followed("--scorer", scorer)
    if model is None and not all(map(reads_text, parts_of(picked))):
        model = str(pyengine.embedded("policy"))
    how: dict[str, Any] = {"model": model, "device": device, "resume": resume}
    if ray is None:
        report = labelling.label(data, picked, out, **how)
    else:
        cluster = ray_module()
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints what happens to its workers
            report = cluster.label(data, picked, out, address=ray, **how)
    print(json.dumps(report))


def pairs(
    scorer: Annotated[list[str], typer.Option(help=f"What prefers: {SCORERS}.")],
    out: Annotated[Path, typer.Option(help='JSONL of {"prompt", "chosen", "rejected"}; a report comes beside it.')],
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL file, {"prompt"} a line; default: the embedded reviews.')
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded model.")] = None,
    samples: Annotated[int, typer.Option(help="Responses to each prompt.")] = 5,
    candidates: Annotated[
        Path | None,
        typer.Option(help='Others\' responses beside the samples: JSONL of {"prompt", "response"[, "reward"]}.'),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Reject any that scores lower by this (default: the lowest score).")
    ] = None,
    fixed_horizon: Annotated[
        bool, typer.Option("--fixed-horizon", help="What was cut off makes pairs too, scored as it stands.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens; what is cut off makes no pair.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed and prompt, same pair.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a run into --out that was cut short.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cache_gb: Annotated[
        float | None, typer.Option(help="GB for keys and values (default: a share of what is free).")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Sample responses and keep the best and the worst of each prompt (WPO). No pair at all is exit code 1."""
    from pyengine.results import SamplingParams
    from pyengine.training.pairs import build_pairs
    from pyengine.training.shards import vacant
    from pyengine.worlds import reviews

    if model is not None and prompts is None:
        raise InputError("pairs of another model need --prompts FILE.jsonl")
    sampling = SamplingParams(max_tokens, temperature, top_p=top_p, seed=seed)
    judge: Any = followed("--scorer", scorer)
    vacant(out.absolute(), resume)  # before a model is loaded
    engine = load_engine(model, None, device, cache_gb=cache_gb, trust_remote_code=trust_remote_code)
    report = build_pairs(
        engine,
        reviews.prompts(96) if prompts is None else prompts,
        judge,
        out,
        samples=samples,
        sampling=sampling,
        candidates=candidates,
        margin=margin,
        fixed_horizon=fixed_horizon,
        resume=resume,
    )
    print(json.dumps(report))
    if not report["pairs"]:
        raise typer.Exit(1)
