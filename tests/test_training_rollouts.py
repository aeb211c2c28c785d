"""Roll-outs of `pyengine train scorer`: drawn, kept as they are drawn, and taken up again by the same run only."""

from __future__ import annotations

import json
import math
import sys

import pytest

import pyengine
from pyengine import InputError, cli
from pyengine.training.data import read_examples, roll_out
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"


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


def test_roll_outs_on_the_command_line(run, tmp_path):
    """Drawn, kept, trained on; the scorer decodes; a resumed run wants the same ones."""
    out, asked = tmp_path / "mine", tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in reviews.prompts(5)))
    options = ("--prompts", asked, "--max-tokens", 12, "--epochs", 1, "--out", out)
    code, printed, err = run("train", "scorer", "--rollouts", 20, "--reward", "length", *options)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == reviews.prompts(5) * 4
    assert all(line["reward"] == pytest.approx(math.log(len(line["tokens"]) / 1024), abs=1e-6) for line in lines)
    assert max(len(line["tokens"]) for line in lines) == 12
    code, printed, _ = run("generate", PROMPT, "--scorer", out, "--strategy", "tokenwise", "--max-tokens", 9)
    assert code == 0
    assert "(exact)" in printed
    drawn = (out / "rollouts.jsonl").read_bytes()

    def resume(count=20, *changes, reward="length"):
        return run("train", "scorer", "--rollouts", count, "--reward", reward, *options, *changes, "--resume")

    for changes, reward, named in (
        ((9,), "length", "count"),
        ((20,), "sentiment", "reward"),
        ((20, "--seed", 1), "length", "seed"),
        ((20, "--max-tokens", 13), "sentiment", "reward and max_tokens"),
    ):
        code, _, err = resume(*changes, reward=reward)
        assert (code, err.count("\n")) == (2, 1)
        assert f"exists already, and was made with another {named}; give the same" in err
    asked.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    assert "another prompts;" in resume()[2]
    (out / "rollouts.jsonl.report.json").unlink()
    code, _, err = resume()
    assert (code, err.count("\n")) == (2, 1)
    assert "rollouts.jsonl exists already, and does not say what it was made of" in err
    assert (out / "rollouts.jsonl").read_bytes() == drawn


def test_a_resumed_command_reads_the_roll_outs_that_it_drew(run, tmp_path, monkeypatch):
    """Killed after they were drawn: the same command with --resume draws none again."""
    import pyengine.training.prefix
    import pyengine.training.rollouts

    def killed(*_):
        raise InputError("killed")

    options = ("--rollouts", 12, "--reward", "length", "--max-tokens", 6, "--epochs", 1, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pyengine.training.prefix, "train_prefix_scorer", killed)
        assert "killed" in run("train", "scorer", *options)[2]
    with monkeypatch.context() as patch:
        patch.setattr(pyengine.training.rollouts, "drawn", killed)
        assert run("train", "scorer", *options, "--resume")[0] == 0


def test_roll_outs_are_kept_as_they_are_drawn(run, engine, tmp_path, monkeypatch, caplog):
    """Interrupted after two of four shards, and told so: the others alone are drawn, to the roll-outs of one call."""
    from pyengine.training import rollouts

    draw, drawn = rollouts.drawn, []

    def killing(engine, asked, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(asked))
        return draw(engine, asked, *rest)

    monkeypatch.setattr(rollouts, "AT_ONCE", 5)
    options = ("--rollouts", 18, "--reward", "length", "--max-tokens", 6, "--fixed-horizon", "--epochs", 1)
    options += ("--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "drawn", killing)
        assert run("train", "scorer", *options)[0] == 130
    assert "rollouts.jsonl.shards keeps 2 parts, from which the same run goes on with resume" in caplog.text
    code, _, err = run("train", "scorer", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "rollouts.jsonl.shards holds part of a run that was cut short: resume it, or delete it" in err
    drawn.clear()
    monkeypatch.setattr(
        rollouts, "drawn", lambda engine, asked, *rest: drawn.append(len(asked)) or draw(engine, asked, *rest)
    )
    assert run("train", "scorer", *options, "--resume")[0] == 0
    assert drawn == [5, 3]
    found = read_examples(tmp_path / "out" / "rollouts.jsonl", engine)
    wanted = roll_out(engine, reviews.prompts(18), pyengine.rewards.length(), max_tokens=6)
    assert [(e.prompt, e.tokens) for e in found] == [(e.prompt, e.tokens) for e in wanted]
    assert not (tmp_path / "out" / "rollouts.jsonl.shards").exists()
