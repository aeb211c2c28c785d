"""On a GPU: the same tokens and numbers as on the CPU. Needs a device; bench/gpu.sh runs it on one."""

from __future__ import annotations

import math

import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, Engine, SamplingParams, Tokenwise, ops, reference
from pyengine.ops import cuda
from pyengine.worlds import reviews

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
needs_kernels = pytest.mark.skipif(not ops.common.cuda_built(), reason="built without CUDA kernels")

COLUMNS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
FILTERS = [
    {},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 2000, "top_p": 0.95},
    {"top_p": 0.9999},
    {"temperature": 0.0},
    {"gumbel": True},
    {"gumbel": True, "top_k": 50},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tilt_sample_equals_the_cpu(dtype):
    torch.manual_seed(0)
    logits, values = torch.randn(16, 5000).to(dtype), torch.randn(2, 16, 5000).to(dtype)
    weights, seed = torch.tensor([1.0, -0.5]), torch.arange(16)
    for parameters in ({}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 0.0}):
        cpu = ops.tilt_sample(logits, values, weights, seed=seed, **parameters)
        gpu = ops.tilt_sample(logits.cuda(), values.cuda(), weights.cuda(), seed=seed.cuda(), **parameters)
        assert torch.equal(cpu.token, gpu.token.cpu())
        for name in ("logp_base", "logp_policy", "kl"):
            torch.testing.assert_close(getattr(cpu, name), getattr(gpu, name).cpu(), atol=1e-5, rtol=1e-5)


def test_engine_equals_the_cpu():
    prompts, sampling = reviews.prompts(8), SamplingParams(max_tokens=32, seed=1)
    engines = [
        Engine.from_pretrained(pyengine.embedded("policy"), device=d, dtype=torch.float32) for d in ("cpu", "cuda")
    ]
    for scorer in ("prefix", "probe", "reward-model"):
        strategies = [Blockwise(4, 8), BestOfK(4, "softmax", 0.1)] + ([Tokenwise(4.0)] if scorer == "prefix" else [])
        for strategy in strategies:
            runs = []
            for engine in engines:
                engine.set_scorer(pyengine.embedded(scorer))
                runs.append([r.tokens for r in engine.generate(prompts, strategy, sampling)])
            same = sum(a == b for a, b in zip(*runs, strict=True))
            assert same >= 7, (scorer, strategy)  # a GEMM's rounding may turn one near tie


def reference_of(logits, values=None, weights=None, mask=None, gumbel=False, **parameters):
    """The fp64 reference, on the GPU: large rows would take minutes on the CPU."""
    columns = {
        name: ops.common.column("test", parameters.get(name, default), name, len(logits), logits.device)
        for name, default in COLUMNS.items()
    }
    if weights is not None:
        weights = ops.common.head_weights("test", weights, len(values), len(logits), logits.device)
    method = "gumbel" if gumbel else "inverse"
    return reference.tilt_sample(logits, values, weights, mask=mask, method=method, **columns)


def sample(logits, values=None, weights=None, mask=None, gumbel=False, **parameters):
    """The CUDA kernels themselves, whichever backend pyengine.ops would choose."""
    columns = [
        ops.common.column("test", parameters.get(name, default), name, len(logits), logits.device)
        for name, default in COLUMNS.items()
    ]
    if weights is not None:
        weights = ops.common.head_weights("test", weights, len(values), len(logits), logits.device)
    return cuda.tilt_sample(logits, values, weights, mask, *columns, gumbel)


def assert_same(found, want):
    """One row in a call may differ by a token: sums are off by 1e-8, and a uniform falls that near a boundary
    between 50,000 kept tokens once in two thousand draws."""
    assert torch.equal(found.valid, want.valid)
    same = found.token == want.token
    assert (~same).sum() <= 1
    torch.testing.assert_close(found.kl, want.kl, atol=1e-5, rtol=1e-5, equal_nan=True)
    for name in ("logp_base", "logp_policy"):
        pair = (getattr(out, name)[same] for out in (found, want))
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [50_257, 128_256, 151_936])
@pytest.mark.parametrize("heads", [0, 1, 2])
def test_kernels_equal_the_reference(dtype, vocab, heads):
    """50,257 tokens put most rows off the 16-byte grid."""
    torch.manual_seed(vocab + heads)
    batch = 5
    logits = (torch.randn(batch, vocab, device="cuda") * 3).to(dtype)
    values = torch.randn(heads, batch, vocab, device="cuda").to(dtype) if heads else None
    weights = torch.randn(batch, heads, device="cuda") if heads else None
    mask = torch.rand(vocab, device="cuda") > 0.1
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.0, 1.3], device="cuda")
    seed = torch.arange(batch, device="cuda")
    for parameters in FILTERS:
        arguments = {"temperature": temperature, "seed": seed, "position": 4} | parameters
        for given in (None, mask.expand(batch, -1)):
            found = sample(logits, values, weights, given, **arguments)
            assert_same(found, reference_of(logits, values, weights, given, **arguments))


@needs_kernels
def test_bad_rows_are_reported_and_harm_no_other():
    """vllm#50843, #53029, flashinfer#2402, #1049: ids >= V, illegal access, hangs."""
    logits = torch.randn(6, 128_256, device="cuda")
    good = {str(p): sample(logits, **p) for p in FILTERS}
    logits[1], logits[2], logits[3, 7], logits[4, 9] = math.nan, -math.inf, math.nan, math.inf
    for parameters in FILTERS:
        found = sample(logits, **parameters)
        torch.cuda.synchronize()
        assert found.valid.tolist() == [True, False, False, False, False, True]
        assert found.token[1:5].tolist() == [0, 0, 0, 0]
        assert found.kl[1:5].isnan().all()
        assert torch.equal(found.token[[0, 5]], good[str(parameters)].token[[0, 5]])


@needs_kernels
def test_a_row_does_not_depend_on_batch_or_slot():
    torch.manual_seed(7)
    logits, seed = torch.randn(300, 50_257, device="cuda").bfloat16(), torch.arange(300, device="cuda")
    for parameters in FILTERS:
        everything = sample(logits, seed=seed, **parameters)
        for rows in ([17], [299, 3, 150]):
            alone = sample(logits[rows], seed=seed[rows], **parameters)
            assert all(torch.equal(a[rows], b) for a, b in zip(everything, alone, strict=True))


@needs_kernels
@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("parameters", [{}, {"top_k": 20}], ids=str)
def test_graph_replay_draws_anew(gumbel, parameters):
    """Megatron#5697, #5791: a replayed graph repeated its random numbers. The positions are read when it runs."""
    logits = torch.randn(8, 32_000, device="cuda")
    position = torch.zeros(8, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(logits, gumbel=gumbel, position=position, **parameters)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, gumbel=gumbel, position=position, **parameters)
    seen = []
    for step in range(4):
        position.fill_(step)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, sample(logits, gumbel=gumbel, position=position, **parameters))
        seen.append(captured.token.clone())
    assert len({tuple(tokens.tolist()) for tokens in seen}) == 4


@needs_kernels
def test_rows_past_32_bits():
    """sglang#35571, pytorch#111484: B * V overflows 32 bits; the last rows must be the first ones' equals."""
    batch, vocab = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.empty(batch, vocab, dtype=torch.bfloat16, device="cuda")
    logits[:] = torch.randn(vocab, device="cuda")
    assert logits.numel() > 2**31
    for parameters in ({}, {"top_p": 0.9}, {"temperature": 0.0}):
        found = sample(logits, seed=3, **parameters)
        assert found.valid.all()
        for field in found:
            assert (field == field[0]).all()


@needs_kernels
def test_runs_on_the_stream_of_the_caller():
    logits = torch.randn(64, 128_256, device="cuda")
    want = sample(logits * 2, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = sample(logits * 2, seed=1)  # the product is still under way when this is called
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@needs_kernels
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_select_block_kernel_equals_the_reference(beta):
    torch.manual_seed(2)
    batch, branches, width, heads = 64, 32, 4096, 3
    hidden = torch.randn(batch, branches, width, device="cuda").bfloat16()
    probe = torch.randn(heads, width, device="cuda") / 64
    weights, against = torch.tensor([1.0, 0.0, 0.5], device="cuda"), torch.randn(batch, heads, device="cuda")
    seed = torch.arange(batch, device="cuda")
    scores = hidden.double() @ probe.double().T
    found = cuda.select_block(None, hidden, probe, weights, against, True, beta, seed, seed)
    want = reference.select_block(scores, weights, against, transform="lsc", beta=beta, seed=seed, position=seed)
    assert torch.equal(found.index, want.index)
    torch.testing.assert_close(found.utility, want.utility, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.probability, want.probability, atol=1e-4, rtol=0)
