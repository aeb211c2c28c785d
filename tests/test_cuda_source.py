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


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_gumbel_equals_the_reference(filters):
    torch.manual_seed(1)
    logits, values = torch.randn(4, 1300) * 2, torch.randn(1, 4, 1300)
    check(logits, values, 0.7, gumbel=True, temperature=0.8, seed=torch.arange(4), **filters)


def test_gumbel_noise_reaches_the_tails():
    """flashinfer#2438, vllm#43150: 24-bit noise never lets a token 20 nats down win."""
    batch = 1500
    _, _, words, _ = reference.philox(
        torch.zeros(batch, dtype=torch.int64), torch.arange(batch), reference.GUMBEL_STREAM, 0
    )
    rare = words.argsort()[:2]  # where token 2's exponential is smallest: about 2^-11 and 2^-10
    logits = torch.zeros(2, 4) + torch.tensor([0.0, -50.0, -5.0, -50.0])
    found = check(logits, gumbel=True, position=rare)
    assert (found.token == 2).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", [*FILTERS.values(), {"temperature": 0.0}, {"gumbel": True}], ids=str)
def test_mask_and_forbidden_tokens(dtype, parameters):
    """vllm#22180: temperature 0 next to -inf; every row, and the shared mask, in both alignments."""
    torch.manual_seed(9)
    logits, values = (torch.randn(2, 1040) * 3).to(dtype), torch.randn(1, 2, 1040)
    values[0, 0, 100:] = -math.inf
    values[0, 1, ::3] = -math.inf
    logits[1, 200:900] = -math.inf
    for mask in (torch.rand(1040) > 0.3, torch.rand(2, 1040) > 0.3, torch.rand(2, 1041)[:, 1:] > 0.3):
        found = check(logits, values, 0.5, mask=mask, seed=3, **parameters)
        assert mask.expand(2, -1)[[0, 1], found.token].all()


@pytest.mark.parametrize("parameters", [*FILTERS.values(), {"temperature": 0.0}, {"gumbel": True}], ids=str)
def test_values_that_forbid_every_token_leave_the_base_policy(parameters):
    torch.manual_seed(3)
    logits, values = torch.randn(2, 1500), torch.full((1, 2, 1500), -math.inf)
    values[0, 1, 1200:] = 0.0  # one row's first block is forbidden, not all of it
    found = check(logits, values, 1.0, seed=5, **parameters)
    assert torch.equal(found.token[:1], sample(logits[:1], seed=5, **parameters).token)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "parameters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"gumbel": True}], ids=str
)
def test_bad_rows_are_reported(bad, parameters):
    """vllm#50843, #53029: an id >= V from a row of -inf or NaN; flashinfer#2402, #1049: illegal access, hangs."""
    logits = torch.randn(3, 1500)
    good = sample(logits, seed=1, **parameters)
    logits[1] = bad
    logits[2, 7] = bad
    found = check(logits, seed=1, **parameters)
    assert found.valid.tolist() == [True, False, bad == -math.inf]
    assert found.token[0] == good.token[0]
    assert found.token[1] == 0
    assert found.kl[1].isnan()


def test_infinite_and_nan_values():
    logits, values = torch.randn(4, 1100), torch.zeros(1, 4, 1100)
    values[0, 1, 5], values[0, 2, 5] = math.inf, math.nan
    values[0, 3, 5] = math.nan
    logits[3, 5] = -math.inf  # no value revives a forbidden token, and none makes its row bad
    assert check(logits, values, 1.0).valid.tolist() == [True, False, False, True]


def test_zero_weight_is_the_base_policy_to_the_bit():
    torch.manual_seed(5)
    logits, values = torch.randn(3, 1500), torch.full((1, 3, 1500), math.nan)
    for parameters in FILTERS.values():
        base, tilted = sample(logits, seed=1, **parameters), sample(logits, values, 0.0, seed=1, **parameters)
        assert all(torch.equal(a, b) for a, b in zip(base, tilted, strict=True))


def test_negative_logits_never_draw_padding():
    """verl#2656, mirage#751, tt-metal#47021: rows past the end add exp(0), or win, when all logits are negative."""
    found = check(torch.randn(20, 1030) - 500, seed=torch.arange(20), atol=1e-4)
    assert found.token.max() < 1030
    assert found.logp_base.max() < 0


def test_one_allowed_token():
    """TensorRT-LLM#18893, vllm#53665: a grammar leaves one token, wherever it is."""
    logits = torch.full((5, 3000), -math.inf)
    logits[torch.arange(5), torch.tensor([0, 5, 1023, 1024, 2999])] = torch.randn(5)
    for parameters in ({}, {"top_k": 4}, {"top_p": 0.3}, {"min_p": 0.5}, {"temperature": 0.0}, {"gumbel": True}):
        assert check(logits, **parameters).token.tolist() == [0, 5, 1023, 1024, 2999]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_at_a_filters_edge_are_cut_by_id(dtype):
    """FreeToken#329: bf16 ties; vllm#59785: top-p drops a token that it needs."""
    torch.manual_seed(2)
    batch = 6
    logits = (torch.randn(batch, 1500) * 2).round().to(dtype)
    for parameters in ({"top_k": 7}, {"top_k": 40, "top_p": 0.5}, {"top_p": 0.37}, {"top_p": 0.0}, {"min_p": 1.0}):
        check(logits, seed=torch.arange(batch), **parameters)
    zero = torch.zeros(batch, 1500, dtype=dtype)
    zero[:, ::2] *= -1  # -0 and 0 are ties
    for k in (1, 3, 1499):
        assert check(zero, top_k=k, seed=torch.arange(batch)).token.max() < k


def test_kept_sets_too_long_for_the_list():
    """A filter that keeps more than 16,384 candidates reads the row again instead."""
    torch.manual_seed(4)
    logits = torch.randn(1, 20_000) * 0.5
    for parameters in ({"top_p": 0.99}, {"top_k": 17_000, "top_p": 0.95}, {"min_p": 1e-4}):
        check(logits, seed=8, **parameters)


def test_logits_of_any_magnitude():
    """flashinfer#769: flushed subnormals must stall no search."""
    torch.manual_seed(6)
    logits = torch.randn(6, 2500)
    logits[0] *= 1e4
    logits[1, 2000:] += 500
    logits[2, :1024] = -math.inf
    logits[3, 1024:] -= 1e30
    logits[4] = 1e-42
    logits[5] *= 1e-40
    for parameters in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        check(logits, seed=2, atol=1e-3, **parameters)


def test_greedy_takes_the_lowest_of_equals():
    logits, values = torch.zeros(3, 2100), torch.zeros(1, 3, 2100)
    logits[0, [1500, 700, 2000]] = 2.0
    values[0, 1, 2050] = 3.0
    assert check(logits, values, 0.5, temperature=0.0).token.tolist() == [700, 2050, 0]
    close = torch.full((1, 300), 14.0)
    close[0, 200] = torch.nextafter(torch.tensor(14.0), torch.tensor(15.0))
    assert sample(close, temperature=0.0).token.item() == 200


@pytest.mark.parametrize("parameters", [{}, {"top_p": 0.9}, {"gumbel": True}], ids=str)
def test_a_row_does_not_depend_on_batch_slot_or_alignment(parameters):
    """vllm#51226: mixed batches; misaligned rows and strided ones give the same bits as any other."""
    torch.manual_seed(7)
    logits, seed = torch.randn(5, 1501).bfloat16(), torch.arange(5)
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.0, 2.0])
    together = sample(logits, seed=seed, temperature=temperature, **parameters)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = sample(logits[order], seed=seed[order], temperature=temperature[order], **parameters)
    assert all(torch.equal(a[order], b) for a, b in zip(together, shuffled, strict=True))
    wide = torch.zeros(5, 1600).bfloat16()
    for offset in range(3, 9):
        wide[:, offset : offset + 1501] = logits
        row = sample(wide[:, offset : offset + 1501], seed=seed, temperature=temperature, **parameters)
        assert all(torch.equal(a, b) for a, b in zip(together, row, strict=True))


def test_every_id_of_a_large_vocabulary_can_be_drawn():
    """vllm#59786: a noise table made half of a 152k vocabulary unreachable. Rows and heads repeat with stride 0."""
    rows = torch.zeros(1).expand(12, 151_936)
    found = check(rows.contiguous()[:1].expand(12, -1), seed=torch.arange(12))
    assert len(set((found.token // 1024).tolist())) > 8


def test_empty_batch():
    assert [len(x) for x in sample(torch.zeros(0, 10))] == [0] * 5


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("lsc", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_block_equals_the_reference(dtype, lsc, beta):
    torch.manual_seed(1)
    batch, heads = 7, 3
    for branches in (1, 5, 130):
        weights = torch.tensor([1.0, 0.0, -0.5])
        seed, position = torch.arange(batch), torch.full((), 3).expand(batch)
        scores = torch.randn(batch, branches, heads).to(dtype)
        scores[1, :, 1], scores[2, 0, 0], scores[3, :, 0], scores[4, :, 0] = math.nan, math.nan, -math.inf, math.inf
        against = torch.randn(heads).expand(batch, heads) if lsc else None
        hidden, probe = torch.randn(batch, branches, 70).to(dtype), torch.randn(heads, 70)
        for given in ((scores, None, None), (None, hidden, probe)):
            found = cuda.select_block(*given, weights, against, lsc, beta, seed, position)
            scored = scores if given[0] is not None else hidden.double() @ probe.double().T
            transform = "lsc" if lsc else "identity"
            want = reference.select_block(
                scored, weights, against, transform=transform, beta=beta, seed=seed, position=position
            )
            assert torch.equal(found.index, want.index)
            torch.testing.assert_close(found.probability, want.probability, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.utility, want.utility, atol=1e-4, rtol=1e-5)


def test_no_race_between_the_threads_of_a_block(tmp_path):
    """flashinfer#3624: a shared-memory race gave ids out of range. ThreadSanitizer sees the barriers, and only them."""
    sources = [*KERNELS, SHIM / "runtime.cpp", SHIM / "race.cpp"]
    program = build(sources, tmp_path / "race", "-O1", "-fsanitize=thread", "-DSHIM_THREADS")
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
