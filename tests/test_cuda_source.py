"""The CUDA sources, compiled as C++ against tests/cuda_shim and run on the CPU, against the fp64 reference."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch

from pyengine import reference
from pyengine.ops import cuda

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests" / "cuda_shim"
KERNELS = [ROOT / "csrc" / "cuda" / f"{stem}.cu" for stem in ("tilt", "select_block")]
# Reinterpreted storage and unfused products are what nvcc compiles, too.
FLAGS = ["-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "top_k+top_p": {"top_k": 8, "top_p": 0.7},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    "wide": {"top_k": 3000, "top_p": 0.9999},
}


def build(sources, out, *flags):
    """Compiles each source with g++, both at a time, and links them."""

    def run(*command):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compile_one(source):
        target = out.parent / f"{out.name}.{source.name}.o"
        includes = [f"-I{SHIM}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        run("g++", *FLAGS, *flags, *includes, "-c", "-x", "c++", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    run("g++", *flags, *objects, "-o", out, "-lpthread")
    return out


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    sources = [*KERNELS, ROOT / "csrc" / "cuda" / "bindings_cuda.cpp", SHIM / "runtime.cpp", SHIM / "module.cpp"]
    out = build(sources, tmp_path_factory.mktemp("shim") / "cuda_shim.so", "-O1", "-fvisibility=hidden", "-shared")
    spec = importlib.util.spec_from_file_location("cuda_shim", out)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def on_the_shim(shim, monkeypatch):
    """pyengine.ops.cuda calls the shim, on CPU tensors; what it allocates starts as NaN."""
    empty = torch.empty

    def poisoned(*shape, **options):
        out = empty(*shape, **options)
        out.view(torch.uint8).fill_(0xFF)
        return out

    monkeypatch.setattr(cuda, "_C", shim)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", poisoned)


COLUMNS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
INTEGERS = ("top_k", "seed", "position")


def arguments(logits, values=None, weights=None, mask=None, gumbel=False, **parameters):
    """What pyengine.ops hands to torch.library."""
    batch = len(logits)
    columns = {
        name: torch.as_tensor(value, dtype=torch.int64 if name in INTEGERS else torch.float32).expand(batch)
        for name, value in (COLUMNS | parameters).items()
    }
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float32).expand(batch, len(values))
    if mask is not None:
        mask = mask.expand(logits.shape)
    return (logits, values, weights, mask), columns, gumbel


def sample(*args, **parameters):
    tensors, columns, gumbel = arguments(*args, **parameters)
    return cuda.tilt_sample(*tensors, *columns.values(), gumbel)


def expected(*args, **parameters):
    (logits, values, weights, mask), columns, gumbel = arguments(*args, **parameters)
    method = "gumbel" if gumbel else "inverse"
    return reference.tilt_sample(logits, values, weights, mask=mask, method=method, **columns)


def check(*args, atol=1e-5, **parameters):
    """Equal tokens, and numbers to 1e-5; returns what the kernel gave."""
    found, want = sample(*args, **parameters), expected(*args, **parameters)
    assert torch.equal(found.valid, want.valid)
    assert torch.equal(found.token, want.token)
    for name in ("logp_base", "logp_policy", "kl"):
        torch.testing.assert_close(
            getattr(found, name), getattr(want, name), atol=atol, rtol=1e-5, equal_nan=True, msg=lambda m: f"{name} {m}"
        )
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 50, 1024, 1025, 3001])
@pytest.mark.parametrize("heads", [0, 1, 3])
def test_equals_the_reference(dtype, vocab, heads):
    """Odd vocabularies put rows off the 16-byte grid; the temperature of one row makes it greedy."""
    torch.manual_seed(vocab + heads)
    batch = 3
    logits = (torch.randn(batch, vocab) * 4).to(dtype)
    values = torch.randn(heads, batch, vocab).to(dtype) if heads else None
    weights = torch.randn(batch, heads) if heads else None
    temperature = torch.tensor([0.7, 0.0, 1.3])
    names = FILTERS if (dtype, heads) == (torch.float32, 1) else ["none", ["top_k+top_p", "top_p", "all"][heads % 3]]
    for name in names:
        parameters = FILTERS[name] | {"temperature": temperature, "seed": torch.arange(batch) + 9, "position": 4}
        check(logits, values, weights, **parameters)
