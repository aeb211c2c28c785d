"""Random op calls against a truth of their own; bench/fuzz.py draws as many as one asks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_random_calls_follow_the_docstrings():
    """From the repository root, which must not be on this process's path."""
    command = [sys.executable, "-m", "bench.fuzz", "--cases", "1500", "--seed", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 wrong" in done.stdout
