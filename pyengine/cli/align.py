"""`pyengine train preference`, `pyengine train offline`: policies, through TRL."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import pyengine
from pyengine.cli.load import quiet_loading
from pyengine.cli.train import packages

Data = Annotated[Path, typer.Argument(help="JSONL file.")]
Model = Annotated[str | None, typer.Option(help="Directory or hub id to start from; default: the embedded model.")]
Out = Annotated[Path, typer.Option(help="Directory for the policy, its report and its checkpoints.")]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
Batch = Annotated[int, typer.Option(help="Pairs or responses in a step, over all processes.")]
Accumulate = Annotated[int, typer.Option(help="Parts that a step is computed in.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of prompt and response that are read.")]
Lora = Annotated[int | None, typer.Option(help="Rank of LoRA adapters; default: all weights are trained.")]
HeldOut = Annotated[float, typer.Option(help="Share of the prompts that only the report uses.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Mixed precision.")]
Seed = Annotated[int, typer.Option(help="Of the split, the adapters and the order.")]
Every = Annotated[int | None, typer.Option(help="Steps between checkpoints (default: an epoch).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]


def preference(
    data: Data,
    out: Out,
    model: Model = None,
    loss: Annotated[str, typer.Option(help="dpo, ipo, hinge, simpo, orpo (on pairs) or kto (on labels too).")] = "dpo",
    weights: Annotated[
        str, typer.Option(help="WPO's, by the policy's probability against none, greedy or sampled; or off.")
    ] = "sampled",
    variant: Annotated[str | None, typer.Option(help="Whose weights: both (default), chosen or rejected.")] = None,
    clamp: Annotated[str | None, typer.Option(help="product (default): a pair's weight is at most 1; none.")] = None,
    beta: Annotated[
        float | None, typer.Option(help="Default: .01 for dpo, 2 for simpo, else .1; lambda of orpo.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate; cosine decay.")] = 5e-7,
    epochs: Epochs = 1.0,
    batch: Batch = 128,
    accumulate: Accumulate = 16,
    max_length: MaxLength = 1024,
    lora: Lora = None,
    held_out: HeldOut = 0.05,
    bf16: Bf16 = False,
    seed: Seed = 0,
    checkpoint_every: Every = None,
    resume: Resume = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train a policy on preferences: {"prompt", "chosen", "rejected"} a line, for kto also {"prompt", "response",
    "label"}. The defaults are WPO's."""
    with packages():
        from pyengine.integrations.trl.runs import PolicyTraining, train_preference
    training = PolicyTraining(lr, epochs, batch, accumulate, max_length, lora, held_out, bf16, seed, checkpoint_every)
    options = (loss, weights, variant, clamp, beta, training, resume, trust_remote_code)
    _run(lambda start: train_preference(start, data, out, *options), model)  # type: ignore[arg-type]


def offline(
    data: Data,
    out: Out,
    method: Annotated[
        str, typer.Option(help="fa (keeps z above a threshold), rwr (weighs by exp(z/beta)), ca (states z) or sft.")
    ],
    model: Model = None,
    beta: Annotated[float | None, typer.Option(help="Of rwr's weights (default: 5).")] = None,
    threshold: Annotated[float | None, typer.Option(help="fa keeps z above it (default: 0).")] = None,
    cap: Annotated[float | None, typer.Option(help="Greatest weight of rwr (default: none).")] = None,
    template: Annotated[
        str | None, typer.Option(help="How ca states z: paper (default), openrlhf, or a JSON file.")
    ] = None,
    reduction: Annotated[str, typer.Option(help="Tokens of a response: sum or token_mean.")] = "sum",
    lr: Annotated[float, typer.Option(help="Peak learning rate; cosine decay.")] = 5e-6,
    epochs: Epochs = 1.0,
    batch: Batch = 128,
    accumulate: Accumulate = 16,
    max_length: MaxLength = 1024,
    lora: Lora = None,
    held_out: HeldOut = 0.05,
    bf16: Bf16 = False,
    seed: Seed = 0,
    checkpoint_every: Every = None,
    resume: Resume = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train a policy on responses with rewards: {"prompt", "response", "reward"} a line. z is it standardised.
    sft needs no reward."""
    with packages():
        from pyengine.integrations.trl.runs import PolicyTraining, train_offline
    training = PolicyTraining(lr, epochs, batch, accumulate, max_length, lora, held_out, bf16, seed, checkpoint_every)
    options = (method, beta, threshold, cap, template, reduction, training, resume, trust_remote_code)
    _run(lambda start: train_offline(start, data, out, *options), model)


def _run(work: Callable[[Any], dict[str, Any]], model: str | None) -> None:
    """The report on stdout; what libraries print goes to stderr, but not what they tell each other of their future."""
    quiet_loading()
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        report = work(pyengine.embedded("policy") if model is None else model)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({name: value for name, value in report.items() if name != "settings"}))
