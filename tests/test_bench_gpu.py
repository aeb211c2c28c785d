"""bench/gpu.py walks all its sections without a GPU, so that what is written here runs there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.py"
SECTIONS = ["floors", "tilt", "linear_logprob", "linear_preference", "head_tilt", "tree_attention", "filters"]
SECTIONS += ["logits_logprob", "select_block", "graph", "decode", "tiles", "tilt, V = 151,936"]


def walk(out, *arguments):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--out", out, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_every_section_runs_and_is_recorded(tmp_path):
    report, printed = walk(tmp_path / "gpu.json", "--step", "build=0", "--step", "tests=1")
    assert list(report["sections"]) == SECTIONS
    assert report["steps"] == {"build": 0, "tests": 1}
    assert "steps that failed: ['tests']" in printed
    for name, section in report["sections"].items():
        assert "error" not in section, name
        assert section["rows"] or section["skipped"] == "CUDA graphs need a GPU", name
        for row in section["rows"]:
            assert all(len(times) == 3 for times in row["samples_ms"].values())
            assert all(gap < 1e-3 for gap in row["differs"].values()), row["differs"]  # peers sum in fp32
            for run, reason in row["failed"].items():
                # a peer may be missing, or be installed and find no device
                expected = ("Skipped: needs a GPU", "No module named", "active drivers")
                assert any(word in reason for word in expected), (run, reason)


def test_what_there_is_no_time_for_is_named(tmp_path):
    report, _ = walk(tmp_path / "gpu.json", "--budget", "0")
    assert [section["skipped"] for section in report["sections"].values()] == ["the time was up"] * len(SECTIONS)


def test_a_fresh_process_keeps_what_was_measured(tmp_path):
    out = tmp_path / "gpu.json"
    rates = {"copy_bytes_per_s": 1e12, "gemm_flop_per_s": 1e14}
    kept = {name: {"rows": [], "error": "the device was lost"} for name in SECTIONS if name != "select_block"}
    out.write_text(json.dumps({"rates": rates, "sections": kept}))
    report, _ = walk(out, "--resume")
    assert report["rates"] == rates
    assert [section["rows"] for name, section in report["sections"].items() if name in kept] == [[]] * len(kept)
    (row,) = report["sections"]["select_block"]["rows"]
    assert row["fraction_of_floor"]
