"""Reward at fixed compute: what plain sampling may take, and what is won over it."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from pyengine import Blockwise, InputError, cli
from pyengine.bench import frontier
from pyengine.bench.frontier import PLAIN, Point
from pyengine.bench.sensors import Watch
from pyengine.worlds import reviews


def point(family, setting, price, rewards, kl=1.0):
    return Point(family, setting, [price * 0.9, price, price * 1.2], rewards, [kl] * len(rewards))


PLAINS = [
    point(PLAIN, "n=1", 1.0, [0.0] * 8, 0.0),
    point(PLAIN, "n=2", 1.9, [1.0] * 8),
    point(PLAIN, "n=4", 4.0, [2.0] * 8),
]


def test_plain_sampling_may_take_the_same_seconds():
    def peer(price):
        return frontier.at_equal_seconds(point("blockwise", "K=4", price, [0.0]), PLAINS).setting

    found = {price: peer(price) for price in (0.5, 1.0, 1.72, 1.74, 3.6, 3.65, 60.0)}
    assert found == {0.5: "n=1", 1.0: "n=1", 1.72: "n=1", 1.74: "n=2", 3.6: "n=2", 3.65: "n=4", 60.0: "n=4"}


def test_the_gain_is_over_what_the_same_seconds_buy():
    ours = point("blockwise", "K=4", 2.5, [1.5, 2.5, 1.75, 2.25, 2.0, 2.0, 1.9, 2.1], 6.0)
    *_, row = frontier.rows([*PLAINS, ours])
    assert row["over"] == "n=2"
    assert row["gain"]["mean"] == pytest.approx(1.0)
    assert 0.7 < row["gain"]["low"] < 1.0 < row["gain"]["high"] < 1.3
    assert row["over_one"]["mean"] == pytest.approx(2.0)
    assert (row["seconds"], row["kl_per_s"]) == (2.5, 6.0 / 2.5)
    found = frontier.report([*PLAINS, ours], {"rounds": 6}, Watch(torch.device("cpu")))
    assert found.benchmarks[-1]["stats"]["median"] == 2.5
    assert frontier.COLUMNS[2].text(found.benchmarks[-1]).startswith("+1 (+0.")


def test_rewards_are_of_the_responses_themselves(embedded_engine, monkeypatch):
    monkeypatch.setattr(frontier, "SAMPLES", (1, 2))
    prompts = reviews.prompts(6)
    embedded_engine.set_scorer(reviews.politeness)
    points = frontier.measure(embedded_engine, prompts, [Blockwise(4, 8)], reviews.sentiment, 24, rounds=2)
    assert [part.name for part in embedded_engine.parts] == ["politeness"]
    assert [(p.family, p.setting) for p in points] == [(PLAIN, "n=1"), (PLAIN, "n=2"), ("blockwise", "K=4, M=8")]
    assert all(len(p.seconds) == 2 and len(p.rewards) == 6 for p in points)
    assert points[0].kl == [0.0] * 6
    one, best, ours = (sum(p.rewards) for p in points)
    assert one < best
    assert one < ours


def test_the_command_draws_and_records_it(monkeypatch, tmp_path):
    monkeypatch.setattr(frontier, "SAMPLES", (1, 2))
    out = tmp_path / "won.json"
    asked = ["--reward", "sentiment", "--k", "2", "--block", "8", "--prompts", "6", "--max-tokens", "16"]
    done = CliRunner().invoke(cli.app, ["bench", "throughput", *asked, "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [one["name"] for one in found["benchmarks"]][:3] == [f"{PLAIN} n=1", f"{PLAIN} n=2", "blockwise K=2, M=8"]
    assert found["kind"] == "reward"
    assert {"gain", "over", "kl_per_s"} <= set(found["benchmarks"][-1]["extra_info"])
    assert "gain at equal seconds" in out.with_suffix(".md").read_text()
    assert "<svg" in out.with_suffix(".svg").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "SmolLM2-135M@random"], "--reward needs a model that says something"),
        (["--lengths", "chat"], "--lengths, --prefix, --prompt-tokens: not used with --reward"),
        (["--prompts", "0"], "--prompts must be a whole number of at least 1"),
    ],
)
def test_bad_options_are_named(options, words):
    done = CliRunner().invoke(cli.app, ["bench", "throughput", "--reward", "sentiment", *options])
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)
