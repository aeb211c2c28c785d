"""What the cases of the Triton kernels share; a plugin of the pytest that tests/conftest.py starts for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

COLUMNS = {
    "temperature": (1.0, torch.float32),
    "top_k": (0, torch.int64),
    "top_p": (1.0, torch.float32),
    "min_p": (0.0, torch.float32),
    "seed": (0, torch.int64),
    "position": (0, torch.int64),
}
# One row each: every filter runs in one launch, as mixed batches do.
ROWS = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 8, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write, and workspace that it reads unwritten, shows as NaN or as an absurd number."""
    allocate = torch.Tensor.new_empty

    def poisoned_empty(self, *args, **kwargs):
        out = allocate(self, *args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else True if out.dtype == torch.bool else 2**30 + 7)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)


@pytest.fixture(autouse=True)
def dots_as_on_a_gpu(monkeypatch):
    """The interpreter's: a row is not rounded by where it lies in its tile, as some of BLAS's kernels do."""
    monkeypatch.setattr("numpy.matmul", lambda a, b, dtype=None: np.einsum("ij,jk->ik", a, b, dtype=dtype))


def on_device(*tensors):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors]


def columns(batch, rows=None, **shared):
    """The six parameter columns; a parameter that all rows share has stride 0."""
    out = {}
    for name, (default, dtype) in COLUMNS.items():
        if rows is not None and name not in shared and name not in ("seed", "position"):
            out[name] = torch.tensor([row.get(name, default) for row in rows], dtype=dtype)
        else:
            out[name] = torch.as_tensor(shared.get(name, default), dtype=dtype).expand(batch)
    return out


def assert_same(found, want, tolerance=1e-5):
    assert torch.equal(found.valid, want.valid)
    assert torch.equal(found.token, want.token)
    for name in ("logp_base", "logp_policy", "kl"):
        a, b = getattr(found, name), getattr(want, name)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)


def assert_fields(found, want, tolerance=1e-5):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b.double(), atol=tolerance, rtol=tolerance, equal_nan=True)
