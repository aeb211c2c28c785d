"""What makes a run cheap and honest: states read once, a plateau, cut-off responses that count, doubts told."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pyengine import Engine, InputError, cli, load_scorer
from pyengine.training import prefix, states
from pyengine.training.data import Example, encode_all, write_examples
from pyengine.training.prefix import PrefixTraining, doubts, held_apart, prefix_report, train_prefix_scorer
from pyengine.training.states import collate_read, read_once
from pyengine.training.values import Batch, Prefixes, collate, read_prefixes

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs")
CUT = {3, 8, 13}


@pytest.fixture(scope="module")
def engine(model_dirs):
    return Engine.from_pretrained(model_dirs["llama"])


def examples(cut=()):
    """40 of four to six words, rewarded by the first."""
    said = [[WORDS[i % 10], *(WORDS[(i * j) % 10] for j in range(3, 6 + i % 3))] for i in range(40)]
    return [
        Example(f"pack {WORDS[i % 7]}", " " + " ".join(words), i % 10 - 4.5, ended=i not in cut, where=f"example {i}")
        for i, words in enumerate(said)
    ]


def weights(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_batch_of_what_was_read_is_that_of_reading_it(engine, layer):
    items = encode_all(engine, examples(CUT))
    reads = read_once(engine.model, items, layer)
    some = [7, 3, 30, 13, 8]
    found, batch = collate_read([reads[i] for i in some]), Batch(**collate([items[i] for i in some]))
    wanted = read_prefixes(engine.model, batch, layer, "fudge")
    assert found["reward"].tolist() == batch.reward.tolist()
    assert found["length"].tolist() == batch.length.tolist()
    assert wanted.ahead.sum() == 3
    for name in Prefixes._fields:
        torch.testing.assert_close(found[name], getattr(wanted, name), rtol=1e-4, atol=1e-4)


def test_long_responses_of_which_some_were_cut_off_are_read_in_parts(engine):
    """One was cut off in the part of the shortest, none in the next."""
    made = [Example("wine", " jugs" * (2 * i + 8), 1.0, ended=i not in (0, 31)) for i in range(32)]
    items = encode_all(engine, made)
    reads = read_once(engine.model, items, -1)
    assert [len(read.logits) for read in reads] == [(0 if item.ended else engine.policy.vocab_size) for item in items]
    batch = Batch(**collate([items[31]]))
    torch.testing.assert_close(
        reads[31].logits[None], read_prefixes(engine.model, batch, -1, "fudge").logits, rtol=1e-4, atol=1e-4
    )


def test_processes_read_their_shares(engine, monkeypatch):
    items, shares = encode_all(engine, examples(CUT)), []
    whole = read_once(engine.model, items, -1)
    monkeypatch.setattr(states, "TOGETHER", 3)
    gathered = lambda found: found if found == [True] else shares.append(found) or found  # noqa: E731 first: do they fit?
    monkeypatch.setattr(states, "gather_object", gathered)
    for rank in range(3):
        read_once(engine.model, items, -1, rank, 3)
    assert max(map(len, shares)) - min(map(len, shares)) <= 3
    everybody_s = [pair for share in shares for pair in share]
    monkeypatch.setattr(states, "gather_object", lambda found: found if found == [True] else everybody_s)
    for one, other in zip(read_once(engine.model, items, -1, 0, 3), whole, strict=True):
        assert one.item == other.item
        torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-4, atol=1e-4)


def test_the_model_is_read_once_whatever_the_epochs(engine, tmp_path, monkeypatch, caplog):
    """Without memory for that in every step, to the same scorer but for rounding."""
    calls = []
    hook = engine.model.register_forward_hook(lambda *_: calls.append(1))
    found = {}
    try:
        for name, epochs, free in (("few", 2, 1e9), ("many", 6, 1e9), ("anew", 6, 0.0)):
            calls.clear()
            monkeypatch.setattr(states, "bytes_of", lambda *_, free=free: free)
            settings = PrefixTraining(epochs=epochs, batch=8, width=16, held_out=0.0)
            train_prefix_scorer(engine, examples(CUT), tmp_path / name, settings)
            found[name] = len(calls)
    finally:
        hook.remove()
    assert found["few"] == found["many"] < found["anew"]
    assert "each step reads its own again" in caplog.text
    one, other = weights(tmp_path / "many"), weights(tmp_path / "anew")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_a_head_of_the_drawn_tokens_is_one_of_all(engine, tmp_path, monkeypatch):
    for name in ("drawn", "all"):
        if name == "all":
            student = prefix.Student
            monkeypatch.setattr(prefix, "Student", lambda scorer, mean, drawn: student(scorer, mean))
        settings = PrefixTraining(epochs=3, batch=8, width=16, held_out=0.0)
        train_prefix_scorer(engine, examples(CUT), tmp_path / name, settings)
    one, other = weights(tmp_path / "drawn"), weights(tmp_path / "all")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


class Stop(TrainerCallback):
    """An interrupt after this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


PLATEAU = PrefixTraining(epochs=60, batch=8, width=16, held_out=0.3, patience=2, lr=0.02)


def test_training_ends_on_a_plateau_with_its_best_epoch(engine, tmp_path):
    """Interrupted and resumed, to the same bits; the loss of what is kept is the lowest that was seen."""
    losses = []

    class Watched(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            losses.append(metrics["eval_loss"])

    report = train_prefix_scorer(engine, examples(), tmp_path / "whole", PLATEAU, callbacks=[Watched()])
    best = losses.index(min(losses)) + 1
    assert (report["epoch"], len(losses)) == (best, best + 2)
    assert report["steps"] == (best + 2) * -(-report["training_responses"] // 8) < 60 * 4
    _, held_out, _ = held_apart(encode_all(engine, examples()), 0.3, 0)
    p = read_prefixes(engine.model, Batch(**collate(held_out)), -1)
    reward = torch.tensor([item.reward for item in held_out])[p.response]
    error = load_scorer(tmp_path / "whole").values_at(p.before, p.token) - reward
    assert (0.5 * error.square().sum() / len(held_out)).item() == pytest.approx(min(losses), rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        train_prefix_scorer(engine, examples(), tmp_path / "cut", PLATEAU, callbacks=[Stop(6)])
    assert train_prefix_scorer(engine, examples(), tmp_path / "cut", PLATEAU, resume=True)["epoch"] == best
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plateau_needs_something_to_look_at(engine, tmp_path):
    for changes in ({"held_out": 0.0}, {"checkpoint_every": 4}):
        with pytest.raises(InputError, match="patience looks at the held-out loss of each epoch"):
            PrefixTraining(patience=2, **changes)
    with pytest.raises(InputError, match="patience needs held-out responses that ended"):
        train_prefix_scorer(engine, examples()[:1], tmp_path / "no", PrefixTraining(patience=2))


def test_cut_off_responses_count_at_a_fixed_horizon(engine, tmp_path):
    cut = examples(range(40))
    settings = {"epochs": 30, "batch": 8, "width": 16, "held_out": 0.2}
    with pytest.raises(InputError, match=r"all \d+ responses to train on were cut off.*--fixed-horizon"):
        train_prefix_scorer(engine, cut, tmp_path / "no", PrefixTraining(**settings))
    report = train_prefix_scorer(engine, cut, tmp_path / "yes", PrefixTraining(**settings, fixed_horizon=True))
    assert report["cut_off"] == report["training_responses"]
    assert (report["held_out"]["cut_off"], report["warnings"]) == (0, [])
    assert report["held_out"]["correlation"] > 0.3
    items = [item._replace(ended=True) for item in encode_all(engine, cut)]
    assert prefix_report(engine.model, load_scorer(tmp_path / "yes"), items)["responses"] == 40


@pytest.mark.parametrize(
    ("found", "cut", "said"),
    [
        ({"r2": 0.2, "responses": 4, "cut_off": 0}, 0, []),
        ({"r2": -0.1, "responses": 4, "cut_off": 0}, 2, ["held-out R² is -0.10: the mean reward predicts better"]),
        ({"r2": None, "responses": 4, "cut_off": 0}, 0, ["R² is unknown: the rewards, or the values, are all equal"]),
        ({"r2": None, "responses": 0, "cut_off": 2}, 9, ["9 of 10 responses were cut off", "every held-out response"]),
        ({"r2": None, "responses": 0, "cut_off": 0}, 5, []),
    ],
)
def test_doubts(found, cut, said):
    report = {"held_out": found, "cut_off": cut, "training_responses": 10, "settings": {"fixed_horizon": False}}
    lines = doubts(report)
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))


def test_the_command_says_what_speaks_against_the_scorer(engine, model_dirs, tmp_path, monkeypatch, caplog):
    """Rewards that are noise, learned by heart; on a fixed horizon."""
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Example(e.prompt, e.response, r, ended=False) for e, r in zip(examples(), noise, strict=True)]
    write_examples(tmp_path / "data.jsonl", rows)
    command = ["train", "scorer", "--data", tmp_path / "data.jsonl", "--model", model_dirs["llama"], "--batch", 8]
    command += ["--epochs", 40, "--lr", 0.03, "--held-out", 0.3, "--fixed-horizon", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, command)])
    with caplog.at_level(logging.WARNING, "pyengine"), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "the mean reward predicts better than this scorer" in caplog.text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["fixed_horizon"] is True
    assert len(report["warnings"]) == 1
