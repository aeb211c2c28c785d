"""`pyengine train probe` and `pyengine train reward-model`."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pyengine
from pyengine.errors import InputError

train = typer.Typer(help="Train scorers.", no_args_is_help=True)


@train.command()
def probe(
    data: Annotated[Path, typer.Argument(help="Embeddings (.safetensors), or JSONL of responses or pairs.")],
    out: Annotated[Path, typer.Option(help="Directory of the probe.")],
    loss: Annotated[str, typer.Option(help="q, ce or pg on rewards, qp on pairs.")],
    model: Annotated[str | None, typer.Option(help="Reads JSONL; directory or hub id, default: embedded.")] = None,
    layer: Annotated[int, typer.Option(help="Hidden state that the probe reads; -1 is the last.")] = -1,
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer, may be repeated.")] = None,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 5e-5,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 150,
    batch: Annotated[int | None, typer.Option(help="Rows, groups (pg) or pairs (qp) in a step.")] = None,
    beta: Annotated[float, typer.Option(help="Of the softmax in loss pg.")] = 1.0,
    group: Annotated[int | None, typer.Option(help="Samples in a group of loss pg (default: all of a prompt).")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that is not trained on.")] = 0.1,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="Keep the epoch of lowest held-out loss.")] = False,
    device: Annotated[str, typer.Option(help="Of the model that reads JSONL: cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the split, the first weights and the order.")] = 0,
) -> None:
    """Train a probe on hidden states (Q-Probe)."""
    from pyengine.training.embeddings import embed_examples, load_embeddings
    from pyengine.training.examples import read_examples
    from pyengine.training.probe import BATCHES, train_probe

    if loss not in BATCHES:
        raise InputError(f"--loss must be one of {', '.join(BATCHES)}, got {loss!r}")
    if data.suffix == ".safetensors":
        found = load_embeddings(data)
    else:
        examples = read_examples(data)
        path: Any = pyengine.embedded("policy") if model is None else model
        found = embed_examples(pyengine.Engine.from_pretrained(path, device=device), examples, layer)
    fit = train_probe(
        found,
        loss,
        hidden=hidden or (),
        layer=layer,
        lr=lr,
        epochs=epochs,
        batch=batch,
        beta_train=beta,
        group=group,
        held_out=held_out,
        keep_best=keep_best,
        seed=seed,
    )
    fit.save(out)
    print(json.dumps({"epoch": fit.epoch, "train_loss": fit.train_loss[-1], "held_out": fit.held_out}))


@train.command("reward-model")
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
    from pyengine.training.reward_model import default_config, train_reward_model

    changes = {
        "learning_rate": lr,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
    }
    config = default_config(out / "checkpoints", evaluate=held_out > 0, seed=seed, **changes)
    with contextlib.redirect_stdout(sys.stderr):  # transformers prints its log
        report = train_reward_model(model, data, out, args=config, held_out=held_out, seed=seed)
    if config.process_index == 0:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        print(json.dumps({key: value for key, value in report.items() if key != "calibration"}))
