"""Reward-KL curves: the numbers behind them, the picture, the command."""

from __future__ import annotations

import json

import pytest

import pyengine
from pyengine import (
    BestOfK,
    Blockwise,
    FunctionScorer,
    InputError,
    SamplingParams,
    Tokenwise,
    cli,
    curve,
    load_scorer,
)
from pyengine.worlds import reviews


def test_points_measure_the_true_reward_and_the_engine_is_as_before(embedded_engine):
    plans = [(Tokenwise(4.0), pyengine.embedded("prefix")), (Blockwise(4, 16), pyengine.embedded("prefix"))]
    plans.append((BestOfK(6), reviews.sentiment))
    sampling = [SamplingParams(max_tokens=48, seed=i) for i in range(24)]
    embedded_engine.set_scorer(reviews.politeness)
    points = curve.measure(embedded_engine, reviews.prompts(24), plans, reviews.sentiment, sampling)
    assert [(p.strategy, p.setting, p.kl_kind) for p in points] == [
        ("base", "", "exact"),
        ("tokenwise", "λ=4", "exact"),
        ("blockwise", "K=4, M=16", "bound"),
        ("best-of-K", "K=6", "bound"),
    ]
    assert [p.name for p in embedded_engine.parts] == ["politeness"]
    assert points[0].kl == points[0].gain == points[0].win == 0
    assert points[0].tie == 1
    for p in points[1:]:
        assert p.gain > 2 * p.error
        assert p.win > 0.5
    results = embedded_engine.generate(reviews.prompts(24), BestOfK(6), sampling)  # another scorer, other choices
    assert points[3].reward != pytest.approx(sum(reviews.sentiment_of(r.text) for r in results) / 24)


def test_a_reward_may_be_a_weighted_sum_and_a_budget_is_calibrated_first(embedded_engine):
    scorer = load_scorer(pyengine.embedded("prefix"))
    plans = [(Tokenwise(kl_budget=0.4, per="sequence"), scorer), (BestOfK(1), scorer), (BestOfK(3), scorer)]
    reward = 3 * FunctionScorer(reviews.sentiment) + 2 * FunctionScorer(reviews.length)
    sampling = SamplingParams(max_tokens=32, seed=3)
    points = curve.measure(embedded_engine, reviews.prompts(12), plans, reward, sampling, progress=False)
    assert points[1].setting == "0.4 nats a sequence"
    assert points[1].kl == pytest.approx(0.4, rel=0.01)
    embedded_engine.set_scorer(scorer)
    results = embedded_engine.generate(reviews.prompts(12), BestOfK(3), sampling)
    want = sum(3 * reviews.sentiment_of(r.text) + 2 * reviews.length_of(r.text) for r in results) / 12
    assert points[3].reward == pytest.approx(want, abs=1e-5)
    assert points[2].win + points[2].tie < 1, "the base draws from seeds of its own"


def test_a_scorer_that_fails_is_named_and_the_engines_own_is_back(embedded_engine, tmp_path):
    embedded_engine.set_scorer(reviews.politeness)
    broken = FunctionScorer(lambda prompts, completions: [float("nan")] * len(prompts), "broken")
    with pytest.raises(InputError, match="broken is NaN for prompt 0 under Tokenwise"):
        curve.measure(embedded_engine, reviews.prompts(2), [(BestOfK(1), reviews.length)], broken, SamplingParams(4))
    assert [p.name for p in embedded_engine.parts] == ["politeness"]
    point = curve.Point("base", "", float("-inf"), 0.0, float("nan"), 0.0, 0.0, 1.0, 0.0, "exact", 1.0)
    curve.save([point], tmp_path / "c.json", about=float("inf"))
    assert json.loads((tmp_path / "c.json").read_text())["points"][0]["reward"] is None


def test_no_strategy_and_no_prompts_are_refused(embedded_engine):
    with pytest.raises(InputError, match="at least one strategy"):
        curve.measure(embedded_engine, ["a"], [])
    with pytest.raises(InputError, match="needs prompts"):
        curve.measure(embedded_engine, [], [(BestOfK(2), reviews.sentiment)])


def test_the_command_writes_picture_and_numbers(monkeypatch, capsys, tmp_path):
    out = tmp_path / "mine"
    options = ["--prompts=4", "--max-tokens=12", "--tokenwise=2", "--blockwise=2x4", "--best-of-k="]
    monkeypatch.setattr("sys.argv", ["pyengine", "curve", "--out", str(out), "--reward=sentiment", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr().err
    report = json.loads((tmp_path / "mine.json").read_text())
    assert [p["strategy"] for p in report["points"]] == ["base", "tokenwise", "blockwise"]
    assert report["reward"] == "sentiment"
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--blockwise", "4"], "--blockwise: '4' is not of the form 4x4"),
        (["--tokenwise", "a"], "--tokenwise: 'a' is not of the form 4"),
        (["--out", "/no/such/place"], "no such directory"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, capsys, options, words):
    monkeypatch.setattr("sys.argv", ["pyengine", "curve", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert words in capsys.readouterr().err
