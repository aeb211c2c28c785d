"""Runs tests/triton_kernels.py in a process of its own: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is imported, so it would seize every other test of this process too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_kernels.py")


def test_kernels_equal_the_reference():
    pytest.importorskip("triton")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
