"""The table of claims at reduced sizes: every claim holds, or says why not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def load():
    """bench/claims.py as a module; it finds its neighbours by itself."""
    path, before = ROOT / "bench" / "claims.py", list(sys.path)
    spec = importlib.util.spec_from_file_location("claims", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


claims = load()
EXACT = ["C1", "C2", "C3", "C4", "C5", "C6", "L1", "L2", "L3", "L4", "Q1", "Q2", "W1", "W2", "O1", "O2"]


@pytest.fixture(scope="module")
def rows():
    return {row.id: row for row in claims.run(claims.SMALL)}


def test_every_claim_is_there(rows):
    assert list(rows) == [*EXACT[:14], "W3", *EXACT[14:], "O3", "W4", "O4", "R1", "R2", "R3"]


@pytest.mark.parametrize("name", EXACT)
def test_claim(rows, name):
    row = rows[name]
    assert row.verdict == "holds", row.checks
    assert row.exact
    assert row.engine
    assert row.checks


def test_wpo_comes_with_its_control_and_what_was_selected(rows):
    row = rows["W2"]
    assert set(row.figures["curves"]) == {"DPO", "WPO", "shuffled"}
    assert "third design" in row.caveat
    gain, magnitude, assignment = (row.figures["paired"][x][0] for x in ("WPO - DPO", "magnitude", "assignment"))
    assert gain == pytest.approx(magnitude + assignment)
    assert row.figures["paired"]["linear reward, WPO - DPO"][0] < 0
    assert rows["W3"].verdict == "reported only"


def test_cost_is_counted_and_timed(rows):
    """Seconds depend on the machine's mood: only what is counted is asserted here."""
    row = rows["O3"]
    assert row.figures["ratio"]["model"] == pytest.approx(4 / 11)
    assert 0.3 < row.figures["ratio"]["counted"] < 0.5
    assert row.figures["ratio"]["measured"] > 0
    assert "9 %" in row.caveat
    seconds, forwards = row.figures["seconds"], row.figures["forwards"]
    assert {method: set(pieces) for method, pieces in seconds.items()} == {m: set(f) for m, f in forwards.items()}


def test_preference_trainers_raise_the_sentiment(rows):
    """At these sizes the gains are two standard errors and more."""
    row = rows["W4"]
    assert set(row.figures) == {"base", "DPO, 1 epochs", "WPO, 1 epochs"}
    for name in ("DPO", "WPO"):
        found = row.figures[f"{name}, 1 epochs"]
        assert found["sentiment"][0] > row.figures["base"][0]
        assert abs(found["kl"][0]) < 2  # an estimate from 64 responses


def test_offline_trainers_are_measured_beside_their_predictions(rows):
    """At these sizes nothing is learnt well: FA comes part of its way."""
    figures, sizes = rows["O4"].figures, claims.SMALL
    examples, _ = claims.claims_reviews.rollouts(sizes.rollouts)
    reward = np.array([e.reward for e in examples[:: sizes.rollouts // sizes.labelled]])
    z = (reward - reward.mean()) / reward.std()
    assert figures["FA"]["predicted"] == pytest.approx(z[z > 0].mean())
    assert figures["RWR"]["predicted"] == pytest.approx(np.average(z, weights=np.exp(z / 5)))
    assert figures["base"]["z"] < figures["FA"]["z"] < figures["FA"]["predicted"]
    assert [asked for asked, *_ in figures["curve"]] == [-5, 0, 5]
    assert len(rows["O4"].checks) == 6


def raised(row):
    """The gains of a row that ought to be above zero; by chance one that is right is not in less than 1 in 10^4.

    At these sizes the least stand over 4 standard errors above zero: politeness between w = +1 and w = -1
    (.19 ± .04) and CD-Q tokenwise (.33 ± .07). What stands nearer, politeness for each w alone, is left out.
    """
    apart = ("over best-of-K", "DPO alone", "w=+1, politeness", "w=-1, politeness")
    gains = {name: f for name, f in row.figures.items() if isinstance(f, dict) and "gain" in f}
    return {name: f["gain"] for name, f in gains.items() if not any(x in name for x in apart)}


def test_scorers_trained_from_scratch_raise_the_sentiment(rows):
    gains = raised(rows["R1"])
    assert len(gains) == 5  # two scorers in two strategies, and best-of-K
    assert all(gain > 0 for gain in gains.values()), gains
    assert {p["kl_kind"] for name, line in rows["R1"].figures["curves"].items() for p in line if "block" in name} == {
        "bound"
    }


def test_length_is_reported_with_how_far_it_is(rows):
    """Blockwise with M = 16 reached 1.0 ± .05 of best-of-50's gain, M = 32 .64 ± .06."""
    row = rows["R2"]
    assert row.verdict.endswith("(reported only)")
    assert not row.failed
    reached = row.figures["reached"]
    assert 0.3 < reached[32]["share"] < 1
    assert 0.7 < reached[16]["share"] < 1.3
    assert row.figures["best-of-50 KL"]["law"] <= row.figures["best-of-50 KL"]["bound"]
    assert all(r["kl bound"] >= claims.claims_reviews.best_of_k_bound(6) for r in reached.values())


def test_scorers_steer_a_tuned_base(rows):
    gains = raised(rows["R3"])
    assert len(gains) == 8, gains
    assert all(gain > 0 for gain in gains.values()), gains
    for name in ("blockwise 8×16", "tokenwise λ=4"):
        total = rows["R3"].figures[f"KL from the original, {name}"]
        assert total["averaged"] > 0 < total["approximate"]


def test_only_some_rows(capsys):
    with pytest.raises(SystemExit):
        claims.main(["--only", "C6,R9"])
    assert "no claim R9; there are C1, C2" in capsys.readouterr().err
    assert [row.id for row in claims.run(claims.SMALL, ["C6"])] == ["C6"]


def test_it_runs_as_a_module():
    """From the repository root, which is then on the path; `load` above is the way of `python bench/claims.py`."""
    command = [sys.executable, "-m", "bench.claims", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--small" in done.stdout


def test_a_failure_is_printed_as_one():
    row = claims.Row("X", "claim", "paper", asserted="more", checks={"more": False, "less": True})
    assert row.verdict == "does not hold: more"
    row.checks = {}
    assert row.sampled("mean", [0.0, 0.1, 0.2], 5.0) == "0.100±0.058"
    assert row.verdict.startswith("does not hold: the engine's mean, 0.1 ± 0.058, is 5")
    assert row.failed
    row.reported_only = True
    assert row.verdict.endswith("(reported only)")
    assert not row.failed
    assert claims.Row("X", "claim", "paper").verdict == "reported only"


def test_figures_are_plain_json_and_can_be_drawn(rows, tmp_path, monkeypatch):
    report = json.loads(json.dumps(claims.report(list(rows.values()), claims.SMALL)))
    assert all(row["verdict"] == "holds" for row in report["claims"] if row["id"] in EXACT)
    assert all(row["seconds"] for row in report["claims"])
    monkeypatch.setattr(claims.claims_plot, "REVIEWS", tmp_path / "reviews.svg")
    assert claims.claims_plot.draw_reviews(report).read_text().startswith("<?xml")
    monkeypatch.setattr(claims.claims_plot, "SVG", tmp_path / "claims.svg")
    assert claims.claims_plot.draw(report).read_text().startswith("<?xml")
    monkeypatch.setattr(claims.claims_plot, "TRAINING", tmp_path / "training.svg")
    assert claims.claims_plot.draw_training(report).read_text().startswith("<?xml")
