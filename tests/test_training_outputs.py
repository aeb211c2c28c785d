"""The directory of a run: looked at before anything else, never overwritten, gone on from where it is whole."""

from __future__ import annotations

import errno
import json
import logging
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import pyengine
from pyengine import Engine, InputError, cli
from pyengine.integrations.trl.runs import PolicyTraining, train_preference
from pyengine.training import shards
from pyengine.training.data import Example, write_examples
from pyengine.training.prefix import PrefixTraining, train_prefix_scorer

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs")
SETTINGS = PrefixTraining(epochs=3, batch=8, held_out=0.0, width=8, checkpoint_every=2)


@pytest.fixture(scope="module")
def small(model_dirs):
    """An engine on a small random model, and examples in its words: 9 steps of `SETTINGS`."""
    said = [f" {WORDS[i % 10]} {WORDS[(7 * i) % 10]}" for i in range(24)]
    return Engine.from_pretrained(model_dirs["llama"]), [
        Example(f"pack {WORDS[i % 6]}", text, i % 5 - 1.5) for i, text in enumerate(said)
    ]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `pyengine ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


COMMANDS = {
    "scorer": ("train", "scorer", "--rollouts", 4, "--reward", "length"),
    "probe": ("train", "probe", "DATA", "--loss", "q"),
    "reward-model": ("train", "reward-model", "DATA", "--model", pyengine.embedded("policy")),
    "preference": ("train", "preference", "DATA"),
    "offline": ("train", "offline", "DATA", "--method", "rwr"),
    "label": ("label", "DATA", "--scorer", "length"),
    "pairs": ("pairs", "--scorer", "length"),
    "curve": ("curve", "--prompts", 2),
}


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (command, fault)
        for command in COMMANDS
        for fault in ("a file", "below a file", "not writable", "full")
        if (command, fault) != ("curve", "a file")  # OUT.png and OUT.json lie beside it
    ],
)
def test_an_output_that_cannot_be_is_told_first(run, tmp_path, monkeypatch, command, fault):
    """Before a model is loaded, a response drawn or scored."""

    def late(*_, **__):
        raise AssertionError("the output comes first")

    monkeypatch.setattr(Engine, "from_pretrained", late)
    monkeypatch.setattr("pyengine.integrations.trl.reward_model._start", late)
    monkeypatch.setattr("pyengine.integrations.trl.run.load_checkpoint", late)
    monkeypatch.setattr("pyengine.training.labelling.score_examples", late)
    data, taken = tmp_path / "data.jsonl", tmp_path / "taken"
    row = {"prompt": "a", "response": "b", "reward": 1.0}
    if command in ("reward-model", "preference"):
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data.write_text(json.dumps(row) + "\n")
    taken.write_text("dear")
    out = {"a file": taken, "below a file": taken / "out", "not writable": "/proc/out", "full": tmp_path / "o"}[fault]
    if fault == "full":

        def full(**_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shards, "TemporaryFile", full)
    code, said, err = run(*(data if a == "DATA" else a for a in COMMANDS[command]), "--out", out)
    assert (code, said, err.count("\n")) == (2, "", 1), err
    assert err.startswith("pyengine: error: ")
    assert str(out) in err
    assert taken.read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "taken"]


def test_a_finished_scorer_is_not_overwritten(small, tmp_path, caplog):
    engine, examples = small
    out = tmp_path / "out"
    report = train_prefix_scorer(engine, examples, out, SETTINGS)
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"out holds model.safetensors of an earlier run: give another directory"):
        train_prefix_scorer(engine, examples, out, SETTINGS)
    with caplog.at_level(logging.WARNING, "pyengine"):
        assert train_prefix_scorer(engine, examples, out, SETTINGS, resume=True) == report
    assert "this run is finished" in caplog.text
    with pytest.raises(InputError, match="holds a finished run with another data and examples"):
        train_prefix_scorer(engine, examples[1:], out, SETTINGS, resume=True)
    (out / "report.json").write_text("[]")
    with pytest.raises(InputError, match=r"report.json is no report of such a run"):
        train_prefix_scorer(engine, examples, out, SETTINGS, resume=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["probe", "reward-model"])
def test_no_command_overwrites_a_model(run, tmp_path, left):
    (tmp_path / "model.safetensors").write_text("dear")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    command = [data if a == "DATA" else a for a in COMMANDS[left]]
    command += ["--loss", "qp"] if left == "probe" else []
    code, _, err = run(*command, "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds model.safetensors of an earlier run" in err
    assert (tmp_path / "model.safetensors").read_text() == "dear"


@pytest.mark.parametrize("left", ["rollouts.jsonl", "checkpoints/checkpoint-3/trainer_state.json"])
def test_roll_outs_of_an_earlier_run_are_kept(run, tmp_path, monkeypatch, left):
    monkeypatch.setattr("pyengine.training.rollouts.drawn", lambda *_, **__: pytest.fail("drawn"))
    for name in ("rollouts.jsonl", left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("dear")
    code, _, err = run(*COMMANDS["scorer"], "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path / left.split('/')[0]}" in err
    assert "of an earlier run" in err
    assert (tmp_path / "rollouts.jsonl").read_text() == "dear"


class Stop(TrainerCallback):
    """An interrupt after this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def alter(file):
    """One byte of a tensor."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", lambda file: file.unlink()),
        ("optimizer.pt", cut),
        ("optimizer.pt", alter),
        ("optimizer.pt", lambda file: file.unlink()),
        ("scheduler.pt", cut),
        ("rng_state.pth", cut),
        ("trainer_state.json", cut),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(small, tmp_path, caplog, name, damage):
    """The one before is taken, and the weights are those of a run that nothing stopped."""
    engine, examples = small
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train_prefix_scorer(engine, examples, out, SETTINGS, callbacks=[Stop(5)])
    damage(out / "checkpoints" / "checkpoint-4" / name)
    caplog.clear()
    steps = []

    class Watched(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    with caplog.at_level(logging.WARNING, "pyengine"):
        train_prefix_scorer(engine, examples, out, SETTINGS, resume=True, callbacks=[Watched()])
    assert "checkpoint-4 is damaged: taking an earlier checkpoint" in caplog.text
    assert steps == list(range(3, 10))
    train_prefix_scorer(engine, examples, tmp_path / "whole", SETTINGS)
    assert_same(weights(out), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (5, r"interrupted: .*checkpoint-4 holds step 4, from which the same run goes on with resume"),
        (1, r"interrupted before the first checkpoint in .*: nothing is kept"),
    ],
)
@pytest.mark.parametrize("kind", ["scorer", "policy"])
def test_whoever_interrupts_is_told_what_is_kept(small, model_dirs, tmp_path, caplog, kind, step, said):
    data, out, callbacks = tmp_path / "pairs.jsonl", tmp_path / "out", [Stop(step)]
    rows = [{"prompt": e.prompt, "chosen": e.response, "rejected": " the"} for e in small[1]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = PolicyTraining(1e-3, 3, 8, 1, lora=2, held_out=0, checkpoint_every=2)
    trainings = {
        "scorer": lambda: train_prefix_scorer(*small, out, SETTINGS, callbacks=callbacks),
        "policy": lambda: train_preference(model_dirs["llama"], data, out, training=policy, callbacks=callbacks),
    }
    with caplog.at_level(logging.WARNING, "pyengine"), pytest.raises(KeyboardInterrupt):
        trainings[kind]()
    (found,) = (r.getMessage() for r in caplog.records if "interrupted" in r.getMessage())
    assert re.search(said, found)


def test_an_interrupted_command_says_so_and_ends_with_130(run, small, model_dirs, tmp_path, monkeypatch, caplog):
    from pyengine.training import prefix

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    write_examples(tmp_path / "data.jsonl", small[1])
    monkeypatch.setattr(prefix.PrefixTrainer, "training_step", interrupted)
    options = ("--data", tmp_path / "data.jsonl", "--model", model_dirs["llama"], "--epochs", 1, "--held-out", 0)
    code, said, _ = run("train", "scorer", *options, "--out", tmp_path / "out")
    assert (code, said) == (130, "")
    assert "nothing is kept" in caplog.text
