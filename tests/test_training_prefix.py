"""Runs that train prefix scorers: what they leave, that they repeat and resume, and what the engine makes of it."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyengine
from pyengine import Blockwise, Engine, InputError, PrefixScorer, SamplingParams, Tokenwise, cli, load_scorer
from pyengine.training import prefix
from pyengine.training.data import Example, encode_all, read_examples, roll_out, write_examples
from pyengine.training.prefix import PrefixTraining, Shuffled, held_apart, train_prefix_scorer
from pyengine.training.values import Batch, Student, collate, read_prefixes, regression_loss, targets
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"


@pytest.fixture(scope="module")
def small(model_dirs):
    """An engine on a small random model, and examples in its words."""
    engine = Engine.from_pretrained(model_dirs["llama"])
    return engine, words_examples(40)


def words_examples(count):
    """Examples over the words of the small models' tokenizer, with rewards that the words decide."""
    words = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs", "the")
    rng = random.Random(7)
    out = []
    for i in range(count):
        said = [rng.choice(words) for _ in range(rng.randint(1, 8))]
        reward = statistics.mean(len(w) for w in said) - 4 + said.count("the")
        out.append(Example(f"pack {words[i % 7]}", " " + " ".join(said), reward, where=f"example {i}"))
    return out


def student_of(engine, mean=0.0, width=32, seed=0):
    """A student with random weights everywhere."""
    torch.manual_seed(seed)
    student = Student(PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size, width), mean)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return student


def test_padding_and_company_change_no_loss(small):
    engine, examples = small
    items, student = encode_all(engine, examples[:6]), student_of(engine)

    def loss_of(chosen, method, reduction):
        batch = Batch(**collate(chosen))
        p = read_prefixes(engine.model, batch, -1, method)
        target = targets(method, student, p, batch.reward)
        return regression_loss(student(p.before, p.token), target, p.response, batch.length, reduction).item()

    for method in ("fudge", "cd-q"):
        for reduction in ("sum", "token_mean"):
            alone = [loss_of([item], method, reduction) for item in items]
            assert loss_of(items, method, reduction) == pytest.approx(statistics.mean(alone), rel=1e-4)
    other_eos = [items[0]._replace(ids=[*items[0].ids[:-1], 5])]
    assert loss_of(other_eos, "fudge", "sum") != pytest.approx(loss_of(items[:1], "fudge", "sum"), rel=1e-3)


QUICK = PrefixTraining(epochs=2, batch=8, held_out=0.2, width=16)


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_an_epoch_is_every_example_once_in_whole_batches():
    order = list(Shuffled(10, 4, 1, lambda: 0))
    assert len(order) == 12
    assert sorted(order[:10]) == list(range(10))
    assert order == list(Shuffled(10, 4, 1, lambda: 0)) != list(Shuffled(10, 4, 1, lambda: 1))
    assert len(list(Shuffled(3, 8, 0, lambda: 0))) == 8


def test_whole_prompts_are_held_out(small):
    engine, examples = small
    items = encode_all(engine, examples)
    training, held_out, by = held_apart(items, 0.2, seed=1)
    assert by == "prompt"
    assert len(training) + len(held_out) == 40
    assert held_out
    assert not {i.prompt for i in training} & {i.prompt for i in held_out}
    one = [item for item in items if item.prompt == items[0].prompt]
    training, held_out, by = held_apart(one, 0.3, seed=1)
    assert by == "response"
    assert 0 < len(held_out) < len(training)
    assert held_apart(items, 0.0, 0)[1] == []
    two = [items[0], next(item for item in items if item.prompt != items[0].prompt)]
    assert [len(part) for part in held_apart(two, 0.9, 0)[:2]] == [1, 1]
    assert held_apart(two[:1], 0.9, 0)[:2] == (two[:1], [])


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
def test_accumulation_changes_nothing_and_runs_repeat(small, tmp_path, method):
    engine, examples = small
    for name, parts in (("a", 1), ("b", 1), ("c", 4)):
        settings = PrefixTraining(method, epochs=2, batch=8, held_out=0.0, width=16, accumulate=parts)
        train_prefix_scorer(engine, examples, tmp_path / name, settings)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"), rtol=1e-3, atol=1e-4)


def test_what_a_run_leaves(small, tmp_path):
    engine, examples = small
    settings = PrefixTraining(epochs=30, batch=8, held_out=0.2, width=16, layer=1)
    report = train_prefix_scorer(engine, examples, tmp_path / "scorer", settings)
    assert sorted(f.name for f in (tmp_path / "scorer").iterdir()) == [
        "config.json",
        "model.safetensors",
        "report.json",
    ]
    assert json.loads((tmp_path / "scorer" / "report.json").read_text()) == report
    assert report["held_out"]["responses"] + report["training_responses"] == len(examples)
    assert sum(part["prefixes"] for part in report["held_out"]["calibration"]) == report["held_out"]["prefixes"]
    assert report["held_out"]["correlation"] > 0.3
    scorer = load_scorer(tmp_path / "scorer")
    assert (scorer.layer, scorer.name, scorer.width) == (1, "scorer", 16)
    engine.set_scorer(tmp_path / "scorer")
    try:
        (result,) = engine.generate("pack my", Tokenwise(2.0), SamplingParams(max_tokens=5, seed=0))
    finally:
        engine.set_scorer(None)
    assert math.isfinite(result.reward)


def test_the_report_by_hand(small):
    """A scorer whose Q is a constant of the token; R^2 and calibration recomputed in plain Python."""
    engine, examples = small
    items = encode_all(engine, examples)
    scorer = PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size, 4)
    with torch.no_grad():
        scorer.head.weight.zero_()
        scorer.head.bias.copy_(torch.arange(engine.policy.vocab_size) / 100)
    cut = items[0]._replace(ended=False)
    report = prefix.prefix_report(engine.model, scorer, [*items, cut])
    pairs = [(token / 100, item.reward) for item in items for token in item.ids[item.start :]]
    v, r = zip(*pairs, strict=True)
    assert (report["responses"], report["cut_off"], report["prefixes"]) == (40, 1, len(pairs))
    rest = sum((b - a) ** 2 for a, b in pairs)
    assert report["r2"] == pytest.approx(1 - rest / (statistics.pvariance(r) * len(r)), abs=1e-5)
    assert report["correlation"] == pytest.approx(statistics.correlation(v, r), abs=1e-5)
    assert report["slope"] == pytest.approx(statistics.linear_regression(v, r).slope, abs=1e-5)
    # Ten equal parts by V. Which of equal V fall to either side of a border is open: that bounds a part's reward.
    ranked, parts = sorted(v), report["calibration"]
    sizes = [len(pairs) // 10 + (i < len(pairs) % 10) for i in range(10)]
    assert [part["prefixes"] for part in parts] == sizes
    ends = [sum(sizes[: i + 1]) for i in range(10)]
    for part, start, end in zip(parts, [0, *ends], ends, strict=False):
        assert part["value"] == pytest.approx(statistics.mean(ranked[start:end]), abs=1e-5)
        inside = [b for a, b in pairs if ranked[start] < a < ranked[end - 1]]
        border = [b for a, b in pairs if a in (ranked[start], ranked[end - 1])]
        open_ = part["prefixes"] - len(inside)
        low, high = sum(sorted(border)[:open_]), sum(sorted(border)[len(border) - open_ :])
        total = part["reward"] * part["prefixes"] - sum(inside)
        assert low - 1e-3 <= total <= high + 1e-3
    assert sum(part["reward"] * part["prefixes"] for part in parts) == pytest.approx(sum(r), abs=1e-3)
    distance = sum(part["prefixes"] * abs(part["value"] - part["reward"]) for part in parts) / len(pairs)
    assert report["calibration_error"] == pytest.approx(distance)
    assert distance > 0.1
    mean = statistics.mean(part["value"] * part["prefixes"] for part in report["calibration"]) * 10 / len(pairs)
    assert mean == pytest.approx(statistics.mean(v), abs=1e-5)
    nothing = prefix.prefix_report(engine.model, scorer, [])
    assert (nothing["r2"], nothing["calibration"]) == (None, [])


INTERRUPTED = {"method": "cd-q", "epochs": 3, "batch": 8, "held_out": 0.0, "width": 16, "checkpoint_every": 3}
KILLED = f"""
import os, signal, sys
import torch
from transformers import TrainerCallback
from pyengine import Engine
from pyengine.training.data import read_examples
from pyengine.training.prefix import PrefixTraining, train_prefix_scorer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
engine = Engine.from_pretrained(sys.argv[1])
settings = PrefixTraining(**{INTERRUPTED!r})
train_prefix_scorer(engine, read_examples(sys.argv[2], engine), sys.argv[3], settings, callbacks=[Kill()])
"""


def test_a_killed_run_resumes_to_the_same_bits(small, model_dirs, tmp_path):
    """Killed in the second of three epochs, two steps after a checkpoint; the data goes on where it stopped."""
    engine, out, data = small[0], tmp_path / "killed", tmp_path / "data.jsonl"
    write_examples(data, small[1])
    examples, settings = read_examples(data, engine), PrefixTraining(**INTERRUPTED)
    command = [sys.executable, "-c", KILLED, str(model_dirs["llama"]), str(data), str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (out / "model.safetensors").exists()
    assert sorted(p.name for p in (out / "checkpoints").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    (out / "checkpoints" / "checkpoint-9").mkdir()  # as a run that is killed while it writes one leaves it
    with pytest.raises(InputError, match="holds checkpoints of an earlier run"):
        train_prefix_scorer(engine, examples, out, settings)
    with pytest.raises(InputError, match="of a run with another lr"):
        train_prefix_scorer(engine, examples, out, PrefixTraining(**INTERRUPTED | {"lr": 1.0}), resume=True)
    with pytest.raises(InputError, match="of a run with another data and examples"):
        train_prefix_scorer(engine, examples[1:], out, settings, resume=True)
    report = train_prefix_scorer(engine, examples, out, settings, resume=True)
    assert report["steps"] == 15
    train_prefix_scorer(engine, examples, tmp_path / "whole", settings)
    assert_same(weights(out), weights(tmp_path / "whole"))
    assert not (out / "checkpoints").exists()


def test_two_processes_give_what_one_gives(small, model_dirs, tmp_path, in_two_processes):
    """Through `accelerate launch` on CPUs; 37 examples do not divide into batches of 8."""
    data = tmp_path / "data.jsonl"
    write_examples(data, words_examples(37))
    options = ["--data", data, "--model", model_dirs["llama"], "--epochs", 2, "--batch", 8, "--width", 16]
    in_two_processes("train", "scorer", *options, "--held-out", 0, "--out", tmp_path / "two")
    settings = PrefixTraining(epochs=2, batch=8, width=16, held_out=0.0)
    report = train_prefix_scorer(small[0], read_examples(data, small[0]), tmp_path / "one", settings)
    both = json.loads((tmp_path / "two" / "report.json").read_text())
    assert (both["processes"], both["steps"], both["data"]) == (2, report["steps"], report["data"])
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ppo"}, "method must be fudge or cd-q, got 'ppo'"),
        ({"reduction": "mean"}, "reduction must be sum or token_mean"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"held_out": 1.0}, "held_out must be a finite number in 0 .. 0.9"),
        ({"layer": 9}, r"reads layer 9, .* has 4"),
        ({"batch": 6, "accumulate": 4}, "make it a multiple of 4"),
    ],
)
def test_settings_that_cannot_be(small, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_prefix_scorer(*small, tmp_path / "no", PrefixTraining(**changes))
    assert not (tmp_path / "no").exists()


def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path):
    settings = PrefixTraining(epochs=20, batch=8, lr=1e20, held_out=0.0)
    with pytest.raises(InputError, match=r"a loss of (nan|inf) at step \d+; lower lr"):
        train_prefix_scorer(*small, tmp_path / "no", settings)


def test_bf16_trains_close_to_fp32(small, tmp_path):
    for name, bf16 in (("fp32", False), ("bf16", True)):
        train_prefix_scorer(*small, tmp_path / name, PrefixTraining(**vars(QUICK) | {"bf16": bf16}))
    one, other = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert {w.dtype for w in other.values()} == {torch.float32}
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert_same(one, other, rtol=0.1, atol=0.02)


# The command line, and what the engine makes of it


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


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory, embedded_engine):
    """A file of 1,200 roll-outs of the embedded policy with their exact sentiment."""
    file = tmp_path_factory.mktemp("data") / "rollouts.jsonl"
    prompts = [prompt for prompt in reviews.prompts(96) for _ in range(12)] + reviews.prompts(48)
    write_examples(file, roll_out(embedded_engine, prompts, reviews.sentiment, max_tokens=160))
    return file


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
def test_a_scorer_from_the_command_line_raises_the_exact_sentiment(run, engine, rollouts, tmp_path, method):
    """On 96 prompts the mean paired gain in exact sentiment is over three standard errors."""
    out = tmp_path / "mine"
    code, printed, err = run("train", "scorer", "--method", method, "--data", rollouts, "--epochs", 4, "--out", out)
    assert (code, err) == (0, "")
    assert "R², correlation" in printed
    assert json.loads((out / "report.json").read_text())["held_out"]["r2"] > 0.3
    prompts, sampling = reviews.prompts(96), SamplingParams(seed=5000)
    base = [reviews.sentiment_of(r.text) for r in engine.generate(prompts, sampling=sampling)]
    engine.set_scorer(out)
    for strategy in (Tokenwise(4.0), Blockwise(4, 16)):
        found = [reviews.sentiment_of(r.text) for r in engine.generate(prompts, strategy, sampling)]
        gain = [a - b for a, b in zip(found, base, strict=True)]
        assert statistics.mean(gain) > 3 * statistics.stdev(gain) / len(gain) ** 0.5, strategy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --data FILE.jsonl, or --rollouts N"),
        (("--data", "x.jsonl", "--rollouts", 3), "give --data FILE.jsonl, or --rollouts N"),
        (("--data", "x.jsonl", "--reward", "length"), "--reward is for --rollouts"),
        (("--rollouts", 3), "--rollouts needs --reward"),
        (("--rollouts", 3, "--reward", "length", "--model", "m"), "need --prompts"),
        (
            ("--rollouts", 3, "--reward", "length", "--max-tokens", 0),
            "--max-tokens must be a whole number of at least 1",
        ),
        (("--rollouts", 0, "--reward", "length"), "--rollouts must be a whole number of at least 1"),
        (("--rollouts", 3, "--reward", "/no/such/scorer"), "scorer /no/such/scorer: no such directory"),
        (("--data", "/no/such.jsonl"), "/no/such.jsonl: No such file"),
        (("--data", "x.jsonl", "--method", "ppo"), "method must be fudge or cd-q"),
    ],
)
def test_bad_options_are_one_line(run, tmp_path, options, message):
    code, out, err = run("train", "scorer", "--out", tmp_path / "o", *options)
    assert (code, out) == (2, "")
    assert err.startswith("pyengine: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_embedded_scorers_are_no_worse_for_it():
    """The stored format is unchanged: the embedded prefix scorer still loads and reads the last layer."""
    scorer = load_scorer(pyengine.embedded("prefix"))
    assert (scorer.kind, scorer.layer, scorer.vocab_size) == ("prefix", -1, 745)
