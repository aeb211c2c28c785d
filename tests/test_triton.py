"""Every kernel in Triton but tree_attention equals the reference; its cases have a file that another worker can run."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("cases", ["tilt.py", "heads.py"])
def test_kernels_equal_the_reference(in_triton, cases):
    in_triton(cases)
