"""`pyengine train scorer`, `pyengine train probe`, `pyengine train reward-model`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import pyengine
from pyengine.cli.load import SCORERS, followed, quiet_loading, said
from pyengine.errors import InputError, real, whole
from pyengine.expression import scorer_of
from pyengine.named import SOURCES

app = typer.Typer(help="Train scorers for a frozen model, or a policy.")


@contextlib.contextmanager
def packages() -> Iterator[None]:
    """An import that fails inside becomes an InputError that names the package which training needs."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"training needs {error.name}: pip install 'tilt-engine[train]'") from error


@app.callback()
def _group() -> None:
    """Train scorers for a frozen model, or a policy."""


@app.command()
def scorer(
    out: Annotated[Path, typer.Option(help="Directory for the scorer, its report and its checkpoints.")],
    method: Annotated[str, typer.Option(help="fudge (responses of the model itself) or cd-q (of anyone).")] = "fudge",
    data: Annotated[
        Path | None, typer.Option(help='JSONL file, {"prompt", "response", "reward"} a line; or --rollouts.')
    ] = None,
    rollouts: Annotated[int | None, typer.Option(help="Responses that the model draws and --reward scores.")] = None,
    reward: Annotated[list[str] | None, typer.Option(help=f"What scores them: {SCORERS}.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL file, {"prompt"} a line, for --rollouts; default: the embedded reviews.')
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a roll-out (default: 160).")] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded model.")] = None,
    layer: Annotated[int, typer.Option(help="Hidden state that is read; -1 is the last.")] = -1,
    trunk: Annotated[
        str, typer.Option(help="Whose states are read: frozen (the model's), copy (which learns too), or a checkpoint.")
    ] = "frozen",
    trunk_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the trunk (default: 1e-5).")] = None,
    width: Annotated[int, typer.Option(help="Width of the scorer.")] = 128,
    epochs: Annotated[int, typer.Option(help="Passes over the responses.")] = 3,
    lr: Annotated[float, typer.Option(help="Peak learning rate; cosine decay.")] = 3e-3,
    batch: Annotated[int, typer.Option(help="Responses in a step, over all processes.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Parts that a step is computed in.")] = 1,
    reduction: Annotated[str, typer.Option(help="Tokens of a response: sum or token_mean.")] = "sum",
    held_out: Annotated[float, typer.Option(help="Share of the prompts that only the report uses.")] = 0.05,
    fixed_horizon: Annotated[
        bool, typer.Option("--fixed-horizon", help="The reward of a response that was cut off counts as it stands.")
    ] = False,
    patience: Annotated[
        int | None, typer.Option(help="End after so many epochs without a lower held-out loss; --epochs is the most.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    seed: Annotated[int, typer.Option(help="Of the roll-outs, the split, the weights and the order.")] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps (default: an epoch).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cache_gb: Annotated[float | None, typer.Option(help="GB for keys and values of roll-outs.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Train a prefix scorer: V of every next token, on the model's hidden states or with a trunk of its own."""
    from pyengine.engine import Engine
    from pyengine.jsonl import read_prompts
    from pyengine.training.data import read_examples
    from pyengine.training.identity import identity
    from pyengine.training.rollouts import kept_roll_outs
    from pyengine.worlds import reviews

    with packages():
        from pyengine.training.checkpoints import fresh
        from pyengine.training.prefix import PrefixTraining, train_prefix_scorer
    quiet_loading()
    scored = said("--reward", reward)
    settings = PrefixTraining(
        method=method,  # type: ignore[arg-type]
        layer=layer,
        width=width,
        epochs=epochs,
        lr=lr,
        batch=batch,
        accumulate=accumulate,
        reduction=reduction,  # type: ignore[arg-type]
        bf16=bf16,
        seed=seed,
        held_out=held_out,
        fixed_horizon=fixed_horizon,
        patience=patience,
        checkpoint_every=checkpoint_every,
        trunk=trunk,
        trunk_lr=1e-5 if trunk_lr is None else trunk_lr,
    )
    if trunk == "frozen" and trunk_lr is not None:
        raise InputError("--trunk-lr is for --trunk copy or another checkpoint; a frozen trunk does not learn")
    if (data is None) == (rollouts is None):
        raise InputError("give --data FILE.jsonl, or --rollouts N with --reward")
    for option, value in (("--reward", scored), ("--prompts", prompts), ("--max-tokens", max_tokens)):
        if data is not None and value is not None:
            raise InputError(f"{option} is for --rollouts; the responses of --data are there already")
    if max_tokens is not None:
        whole(max_tokens, "--max-tokens", 1)
    if rollouts is not None:
        whole(rollouts, "--rollouts", 1)
    if rollouts is not None and scored is None:
        raise InputError(f"--rollouts needs --reward: {SOURCES}")
    if model is not None and rollouts is not None and prompts is None:
        raise InputError("--rollouts of another model need --prompts FILE.jsonl")
    fresh(out, resume)
    main = int(os.environ.get("RANK", "0")) == 0
    kept = out / "rollouts.jsonl"
    if main and rollouts is not None and not resume and kept.exists():  # the other processes may come after the first
        raise InputError(f"{kept} is of an earlier run: resume it, give it as --data, or remove it")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    path: Any = pyengine.embedded("policy") if model is None else model
    engine = Engine.from_pretrained(path, device=device, cache_gb=cache_gb, trust_remote_code=trust_remote_code)
    if data is not None:
        examples = read_examples(data, engine)
    else:
        assert rollouts is not None
        assert scored is not None
        judge = scorer_of(scored)
        examples = kept_roll_outs(
            engine,
            reviews.prompts(96) if prompts is None else read_prompts(prompts),
            judge,
            kept,
            count=rollouts,
            max_tokens=max_tokens or 160,
            seed=seed,
            said={"model": identity(path, "model"), "reward": identity(judge)},
            resume=resume,
            keeps=main,
        )
    report = train_prefix_scorer(engine, examples, out, settings, resume)
    if main:
        _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    """The report as a table."""
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    found, settings = report["held_out"], report["settings"]
    table = Table(box=None, show_header=False)
    own = "" if settings["trunk"] == "frozen" else f"trunk {settings['trunk']}, for "
    table.add_row("prefix scorer", f"{out} ({settings['method']}, layer {settings['layer']} of {own}{report['model']})")
    table.add_row(
        "trained on",
        f"{report['training_responses']:,} responses, {report['tokens']:,} tokens, {report['cut_off']:,} cut off; "
        f"{report['steps']:,} steps in {report['seconds']:.0f} s",
    )
    table.add_row(
        "held out", f"{found['responses']:,} responses, {found['prefixes']:,} prefixes, by {report['held_out_by']}"
    )
    table.add_row("R², correlation", f"{number(found['r2'])}, {number(found['correlation'])}")
    table.add_row("calibration", f"error {number(found['calibration_error'])}, slope {number(found['slope'])}")
    for name in ("value", "reward"):
        table.add_row(f"  mean {name}", " ".join(f"{part[name]:+.2f}" for part in found["calibration"]))
    Console().print(table)


@app.command()
def probe(
    data: Annotated[
        Path, typer.Argument(help="Embeddings (.safetensors), or JSONL: responses with a reward, or pairs (qp).")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the probe.")],
    loss: Annotated[str, typer.Option(help="q, ce or pg on rewards, qp on pairs.")],
    reward: Annotated[
        list[str] | None, typer.Option(help=f"Scores responses that come without a reward: {SCORERS}.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Reads JSONL; directory or hub id, default: embedded.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="Hidden state that the probe reads (default: -1, the last; or that embedded).")
    ] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer, may be repeated.")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate (default: 5e-5, more for fewer rows).")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 150,
    batch: Annotated[
        int | None, typer.Option(help="Rows, groups (pg) or pairs (qp) in a step (default: the paper's, or a ninth).")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of the softmax in loss pg (default: 1).")] = None,
    group: Annotated[int | None, typer.Option(help="Samples in a group of loss pg (default: all of a prompt).")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that is not trained on.")] = 0.1,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="Keep the epoch of lowest held-out loss.")] = False,
    device: Annotated[str, typer.Option(help="Of the model that reads JSONL: cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the split, the first weights and the order.")] = 0,
) -> None:
    """Train a probe on hidden states (Q-Probe)."""
    from pyengine.scorers import parts_of
    from pyengine.training.data import read_examples
    from pyengine.training.embeddings import embed_examples, load_embeddings
    from pyengine.training.examples import Pair, read_preferences
    from pyengine.training.probe import probe_settings, train_probe
    from pyengine.training.scoring import rewarded
    from pyengine.training.shards import unused

    settings: dict[str, Any] = {
        "lr": lr,
        "epochs": epochs,
        "batch": batch,
        "beta_train": beta,
        "group": group,
        "held_out": held_out,
        "keep_best": keep_best,
        "seed": seed,
    }
    probe_settings(loss, loss == "qp", **settings)  # type: ignore[arg-type]
    scored: Any = followed("--reward", reward)
    if scored is not None and (loss == "qp" or data.suffix == ".safetensors"):
        raise InputError("--reward scores responses of JSONL lines; pairs and embeddings have their labels")
    for width in hidden or ():
        whole(width, "--hidden", 1)
    quiet_loading()
    unused(out)
    if data.suffix == ".safetensors":
        found = load_embeddings(data)
    else:
        examples: Any = read_preferences(data) if loss == "qp" else None
        if examples and not isinstance(examples[0], Pair):
            raise InputError(f"{data}: --loss qp needs pairs, lines {{'prompt', 'chosen', 'rejected'}}")
        path: Any = pyengine.embedded("policy") if model is None else model
        engine = pyengine.Engine.from_pretrained(path, device=device)
        examples = examples or read_examples(data, engine, rewarded=scored is None)
        if scored is not None:
            examples = rewarded(engine, parts_of(scored), examples)
        found = embed_examples(engine, examples, -1 if layer is None else layer)
    fit = train_probe(found, loss, hidden=hidden or (), layer=layer, **settings)  # type: ignore[arg-type]
    fit.save(out)
    for doubt in fit.warnings:
        print(f"pyengine: {doubt}", file=sys.stderr)
    print(json.dumps({"epoch": fit.epoch, "train_loss": fit.train_loss[-1], "held_out": fit.held_out}))


@app.command("reward-model")
def reward_model(
    data: Annotated[Path, typer.Argument(help="JSONL of prompt, chosen, rejected or of prompt, response, label.")],
    model: Annotated[str, typer.Option(help="Directory or hub id of a language model or classifier to start from.")],
    out: Annotated[Path, typer.Option(help="Directory of the reward model.")],
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 9e-6,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Examples on a device in one pass.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Passes in one step.")] = 16,
    held_out: Annotated[float, typer.Option(help="Share of the prompts for the report.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split, the new head and the order.")] = 0,
) -> None:
    """Train a reward model on preferences or labels, through TRL."""
    whole(batch, "--batch", 1)
    whole(accumulate, "--accumulate", 1)
    whole(seed, "--seed", 0, 2**32 - 1)
    real(lr, "--lr", 1e-12)
    real(epochs, "--epochs", 1e-12)
    with packages():
        from pyengine.integrations.trl.reward_model import default_config, scratch, train_reward_model

    changes = {
        "learning_rate": lr,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
    }
    with scratch(out) as directory:
        config = default_config(directory, evaluate=held_out > 0, seed=seed, **changes)
        with contextlib.redirect_stdout(sys.stderr):  # transformers prints its log
            report = train_reward_model(model, data, out, args=config, held_out=held_out, seed=seed)
    if config.process_index == 0:
        print(json.dumps({key: value for key, value in report.items() if key != "calibration"}))
