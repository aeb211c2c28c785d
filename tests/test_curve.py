"""Reward-KL curves: the numbers behind them, the picture, the command."""

from __future__ import annotations

import dataclasses
import json
import statistics

import pytest
from matplotlib.figure import Figure

import pyengine
from pyengine import (
    BestOfK,
    Blockwise,
    FunctionScorer,
    InputError,
    SamplingParams,
    Tokenwise,
    cli,
    load_scorer,
)
from pyengine.evaluation import curve
from pyengine.strategies import BASE
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
    reward = 3 * FunctionScorer(reviews.sentiment) + 2 * FunctionScorer(reviews.politeness)
    sampling = SamplingParams(max_tokens=32, seed=3)
    points = curve.measure(embedded_engine, reviews.prompts(12), plans, reward, sampling, progress=False)
    assert points[1].setting == "0.4 nats a sequence"
    assert points[1].kl == pytest.approx(0.4, rel=0.01)
    embedded_engine.set_scorer(scorer)
    results = embedded_engine.generate(reviews.prompts(12), BestOfK(3), sampling)
    want = sum(3 * reviews.sentiment_of(r.text) + 2 * reviews.politeness_of(r.text) for r in results) / 12
    assert points[3].reward == pytest.approx(want, abs=1e-5)
    assert points[2].win + points[2].tie < 1, "the base draws from seeds of its own"


def test_a_point_by_hand(embedded_engine):
    """Every number from the responses themselves; the base's seeds are those of no strategy."""
    prompts = reviews.prompts(7)
    sampling = [SamplingParams(max_tokens=20, seed=60 + i) for i in range(7)]
    base, point = curve.measure(embedded_engine, prompts, [(BestOfK(2), reviews.sentiment)], None, sampling)
    with embedded_engine.following(reviews.sentiment):
        found = embedded_engine.generate(prompts, BestOfK(2), sampling)
        apart = [dataclasses.replace(p, seed=p.seed ^ 1 << 40) for p in sampling]
        before = embedded_engine.generate(prompts, BASE, apart)
    r, b = ([reviews.sentiment_of(result.text) for result in results] for results in (found, before))
    gains = [x - y for x, y in zip(r, b, strict=True)]
    assert base.reward == pytest.approx(statistics.mean(b), abs=1e-6)
    assert point.reward == pytest.approx(statistics.mean(r), abs=1e-6)
    assert point.gain == pytest.approx(statistics.mean(gains), abs=1e-6)
    assert point.error == pytest.approx(statistics.stdev(gains) / 7**0.5, abs=1e-6)
    assert point.normalised == pytest.approx(statistics.mean(gains) / statistics.stdev(b), abs=1e-5)
    assert point.win == sum(g > 0 for g in gains) / 7
    assert point.tie == sum(g == 0 for g in gains) / 7
    assert min(point.win, point.tie, 1 - point.win - point.tie) > 0.1
    assert point.kl == pytest.approx(statistics.mean(result.kl for result in found))
    assert point.tokens_per_second > 0


def test_the_picture_and_the_table_are_of_the_points(tmp_path, monkeypatch, capsys):
    shown = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (shown.append(figure.axes[0]), save(figure, path)))
    numbers = {"normalised": 0.3, "tie": 0.1, "tokens_per_second": 1234.0}
    points = [
        curve.Point("base", "", 0.5, 0.0, 0.0, win=0.0, kl=0.0, kl_kind="exact", **numbers),
        curve.Point("tokenwise", "λ=4", 0.8, 0.3, 0.2, win=0.7, kl=3.0, kl_kind="exact", **numbers),
        curve.Point("tokenwise", "λ=2", 1.0, 0.5, 0.1, win=0.6, kl=1.0, kl_kind="exact", **numbers),
        curve.Point("best-of-K", "K=4", 2.0, 1.5, 0.4, win=0.8, kl=0.7, kl_kind="bound", **numbers),
    ]
    curve.draw(points, tmp_path / "c.png", "title", "sentiment")
    (axis,) = shown
    bars = {bar.get_label(): bar for bar in axis.containers}
    assert list(bars) == ["base", "tokenwise", "best-of-K (KL: upper bound)"]
    dots, _, (spread,) = bars["tokenwise"]
    assert dots.get_xydata().tolist() == [[1.0, 1.0], [3.0, 0.8]]
    assert [segment[:, 1].tolist() for segment in spread.get_segments()] == [
        pytest.approx([0.9, 1.1]),
        pytest.approx([0.6, 1.0]),
    ]
    assert dots.get_markerfacecolor() == curve.COLOURS["tokenwise"]
    assert bars["best-of-K (KL: upper bound)"][0].get_markerfacecolor() == "white"
    lines = [line.get_xydata().tolist() for line in axis.lines if line.get_linestyle() == "-"]
    assert [[0.0, 0.5], [1.0, 1.0], [3.0, 0.8]] in lines, "from the base, by KL"
    assert axis.get_ylabel() == "sentiment"
    curve.report(points)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:] if line.strip()]
    assert rows[0] == ["base", "+0.50", "0.00", "1,234"]
    assert rows[1] == ["tokenwise", "λ=4", "+0.80", "+0.30", "±", "0.20", "+0.30", "70%", "3.00", "1,234"]
    assert rows[3] == ["best-of-K", "K=4", "+2.00", "+1.50", "±", "0.40", "+0.30", "80%", "≤", "0.70", "1,234"]


def test_settings_have_the_names_of_their_numbers():
    assert curve.label(Tokenwise(2.5)) == ("tokenwise", "λ=2.5")
    assert curve.label(Tokenwise(kl_budget=0.2)) == ("tokenwise", "0.2 nats a token")
    assert curve.label(Blockwise(3, 5, "softmax", 0.7)) == ("blockwise", "K=3, M=5, β=0.7")
    assert curve.label(BestOfK(9, "softmax", 2.0)) == ("best-of-K", "K=9, β=2")


def test_a_scorer_that_fails_is_named_and_the_engines_own_is_back(embedded_engine, tmp_path):
    embedded_engine.set_scorer(reviews.politeness)
    broken = FunctionScorer(lambda prompts, completions: [float("nan")] * len(prompts), "broken")
    with pytest.raises(InputError, match="broken is NaN for prompt 0 under Tokenwise"):
        curve.measure(
            embedded_engine, reviews.prompts(2), [(BestOfK(1), reviews.politeness)], broken, SamplingParams(4)
        )
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
