"""The table of claims at reduced sizes: every claim holds, or says why not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="module")
def rows():
    return {row.id: row for row in claims.run(claims.SMALL)}


def test_every_claim_is_there(rows):
    assert list(rows) == ["C1", "C2", "C3", "C4", "C5", "C6", "L1", "L2", "L3", "L4", "Q1", "Q2"]


@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4", "C5", "C6", "L1", "L2", "L3", "L4", "Q1", "Q2"])
def test_claim(rows, name):
    row = rows[name]
    assert row.verdict == "holds", row.checks
    assert row.exact
    assert row.engine
    assert row.checks


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
    assert claims.Row("X", "claim", "paper").verdict == "reported only"


def test_figures_are_plain_json_and_can_be_drawn(rows, tmp_path, monkeypatch):
    report = json.loads(json.dumps(claims.report(list(rows.values()), claims.SMALL)))
    assert all(row["verdict"] == "holds" and row["seconds"] for row in report["claims"])
    monkeypatch.setattr(claims.claims_plot, "SVG", tmp_path / "claims.svg")
    assert claims.claims_plot.draw(report).read_text().startswith("<?xml")
