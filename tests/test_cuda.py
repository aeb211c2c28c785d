"""On a GPU: the same tokens and numbers as on the CPU. Needs a device; bench/gpu.sh runs it on one."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, Engine, SamplingParams, Tokenwise, ops, reference
from pyengine.ops import cuda, flash
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


@pytest.mark.parametrize("strategy", [Blockwise(4, 8), BestOfK(4), Tokenwise(1.5)])
def test_replayed_steps_equal_launched_ones(strategy, monkeypatch):
    """Twice with graphs, of which the second replays from its first step on; then without."""
    prompts = ["Review of the Harbour, a bakery:", "Review of the Kestrel, a desk lamp:"]
    policy, scorer = pyengine.embedded("policy"), pyengine.embedded("prefix")
    engine = Engine.from_pretrained(policy, scorer, "cuda", cache_gb=0.1, frozen=True)
    sampling = [SamplingParams(seed=i, max_tokens=60) for i in range(2)]
    replayed = [engine.generate(prompts, strategy, sampling) for _ in range(2)]
    assert any(loop.graph is not None for loop in engine._decoder.captured.values())
    for loop in engine._decoder.captured.values():
        loop.graph, loop.capturable = None, False
    launched = engine.generate(prompts, strategy, sampling)
    for results in replayed:
        assert [r.tokens for r in results] == [r.tokens for r in launched]
        assert [r.logp_policy for r in results] == [pytest.approx(r.logp_policy, abs=1e-4) for r in launched]


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


VOCAB, WIDTH = 5000, 64
needs_triton = pytest.mark.skipif(ops.common.triton_kernels("tilt") is None, reason="Triton is not installed")


def heads(rows, dtype=torch.float32):
    """Hidden states, an LM head and its bias, on the GPU."""
    torch.manual_seed(rows)
    given = torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH) * 0.3, torch.randn(VOCAB)
    return [t.cuda().to(dtype) for t in given]


def leaves(tensors, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def assert_near(found, want, dtype):
    """Half types: what the rounding of the logits and of their gradients leaves."""
    tolerance = 3e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), want.double(), atol=tolerance, rtol=tolerance)


def assert_gradients(found, want, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(found, want, strict=True):
        assert (a.grad.double() - b.grad).norm() <= tolerance * b.grad.norm()


def wpo(chosen, rejected, *_):
    weight = ((chosen.sampled / chosen.tokens + rejected.sampled / rejected.tokens) / 9).exp().clamp(max=1)
    return -weight * torch.nn.functional.logsigmoid(0.1 * (chosen.logp - rejected.logp))


@needs_kernels
@needs_triton
def test_each_op_runs_its_kernel(monkeypatch):
    """The backend that is first in line serves each op, and one that is asked for is not passed over."""
    hidden, weight, _ = heads(4, torch.bfloat16)
    target = torch.randint(0, VOCAB, (4,), device="cuda")
    logits, pairs = hidden @ weight.T, hidden.view(2, 2, WIDTH)
    calls = {
        "tilt_sample": lambda: ops.tilt_sample(logits),
        "select_block": lambda: ops.select_block(hidden=pairs, probe=weight[:3]),
        "linear_logprob": lambda: ops.linear_logprob(hidden, weight, target),
        "logits_logprob": lambda: ops.logits_logprob(logits, target),
        "linear_preference": lambda: ops.linear_preference(pairs, weight, target.view(2, 2), wpo),
        "head_tilt_sample": lambda: ops.head_tilt_sample(hidden, weight),
    }
    in_cuda = ("tilt_sample", "select_block")
    for forced in (None, "triton", "reference"):
        monkeypatch.setattr(ops.settings.settings, "gpu_backend", forced)
        for op, call in calls.items():
            before = ops.LAUNCHES.copy()
            call()
            kernel = (forced or "cuda") if op in in_cuda else forced or "triton"
            if op == "head_tilt_sample" and kernel != "triton":
                assert ops.LAUNCHES - before == {f"{op}/in two steps": 1, f"tilt_sample/{kernel}": 1}
            else:
                assert ops.LAUNCHES - before == {f"{op}/{kernel}": 1}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_logprob_and_its_gradients(dtype):
    """More tokens than a tile has, ignored ones, a bias; a bad target is NaN there and nowhere else."""
    given = heads(ops.logit_tiles.TOKENS_GPU + 3, dtype)
    target = torch.randint(0, VOCAB, (len(given[0]),), device="cuda")
    target[::5], target[-1] = -100, VOCAB - 1
    options = {"temperature": 0.8, "softcap": 12.0}
    mine, theirs = leaves(given, dtype), leaves(given, torch.float64)
    found = ops.linear_logprob(*mine[:2], target, bias=mine[2], **options)
    want = reference.linear_logprob(*theirs[:2], target, bias=theirs[2], **options)
    for a, b in zip(found, want, strict=True):
        assert_near(a, b, dtype)
        assert (a[::5] == 0).all()
    coefficients = torch.randn(2, len(target), device="cuda")
    for out in (found, want):
        (out.logp * coefficients[0] + out.entropy * coefficients[1]).sum().backward()
    assert_gradients(mine, theirs, dtype)
    assert (mine[0].grad[::5] == 0).all()
    target[7] = VOCAB
    for field, right in zip(ops.linear_logprob(*mine[:2], target, bias=mine[2], **options), found, strict=True):
        assert field.isnan().nonzero().tolist() == [[7]]
        assert torch.equal(field[8:], right[8:])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_logprob_and_its_gradient(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(33, VOCAB + 3, device="cuda") * 4).to(dtype)[:, :VOCAB]
    target = torch.randint(0, VOCAB, (33,), device="cuda")
    target[2] = -100
    (mine,), (theirs,) = leaves([logits], dtype), leaves([logits], torch.float64)
    found, want = ops.logits_logprob(mine, target), reference.logits_logprob(theirs, target)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)  # the logits are given: nothing rounds
    for out in (found, want):
        (out.logp - 0.5 * out.entropy).sum().backward()
    assert_gradients([mine], [theirs], dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [2**30, 40 * VOCAB, VOCAB], ids=["one chunk", "chunks", "recomputed"])
def test_linear_preference_and_its_gradients(monkeypatch, kept, dtype):
    monkeypatch.setattr(sys.modules["pyengine.ops.linear_preference"], "KEPT_LOGITS", kept)
    hidden, weight, bias = heads(8 * 10, dtype)
    target = torch.randint(0, VOCAB, (8, 10), device="cuda")
    target[0, :4] = target[6, 7:] = -100
    mine = leaves([hidden.view(8, 10, WIDTH), weight, bias], dtype)
    theirs = leaves([hidden.view(8, 10, WIDTH), weight, bias], torch.float64)
    found = ops.linear_preference(*mine[:2], target, wpo, bias=mine[2])
    want = reference.linear_preference(*theirs[:2], target, wpo, bias=theirs[2])
    for a, b in zip((found.losses, *found.moments), (want.losses, *want.moments), strict=True):
        assert_near(a, b, dtype)
    found.loss.backward()
    want.loss.backward()
    assert_gradients(mine, theirs, dtype)


@needs_triton
@pytest.mark.parametrize("batch", [1, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_tilt_sample_equals_the_reference(dtype, batch):
    """Products that round differently may turn one near tie of 64; what is drawn alike has the same numbers."""
    hidden, weight, bias = heads(batch, dtype)
    value_weight = (torch.randn(2, VOCAB, WIDTH, device="cuda") * 0.1).to(dtype)
    mask, seed = torch.rand(VOCAB, device="cuda") > 0.1, torch.arange(batch, device="cuda")
    weights = torch.tensor([1.0, -0.5], device="cuda")
    found = ops.head_tilt_sample(hidden, weight, value_weight, weights, bias=bias, mask=mask, seed=seed)
    columns = {
        name: ops.common.column("test", default, name, batch, hidden.device) for name, default in COLUMNS.items()
    }
    want = reference.head_tilt_sample(
        hidden,
        weight,
        hidden,
        value_weight,
        weights.expand(batch, -1),
        bias=bias,
        value_bias=None,
        softcap=None,
        mask=mask.expand(batch, -1),
        **columns | {"seed": seed},
    )
    same = found.token == want.token
    assert (~same).sum() <= 1
    assert found.valid.all()
    for name in ("logp_base", "logp_policy", "kl"):
        torch.testing.assert_close(*(getattr(out, name)[same] for out in (found, want)), atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_select_block_of_every_backend_equals_the_reference(monkeypatch, backend, beta):
    if backend == "cuda" and not ops.common.cuda_built():
        pytest.skip("built without CUDA kernels")
    monkeypatch.setattr(ops.settings.settings, "gpu_backend", backend)
    torch.manual_seed(1)
    hidden, probe = torch.randn(64, 16, 4096, device="cuda").bfloat16(), torch.randn(2, 4096, device="cuda") / 64
    weights, seed = torch.tensor([1.0, -0.3], device="cuda"), torch.arange(64, device="cuda")
    found = ops.select_block(None, weights, hidden=hidden, probe=probe, beta=beta, seed=seed)
    scores, drawn = hidden.double() @ probe.double().T, {"transform": "identity", "beta": beta}
    want = reference.select_block(scores, weights, **drawn, seed=seed, position=torch.zeros_like(seed))
    assert torch.equal(found.index, want.index)
    torch.testing.assert_close(found.utility, want.utility, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.probability, want.probability, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", [1, 5])
def test_flash_attention_equals_the_reference(tokens):
    """The double of tests/test_flash.py, and what it is a double of."""
    pytest.importorskip("flash_attn")
    spec = importlib.util.spec_from_file_location("flash_problems", Path(__file__).with_name("test_flash.py"))
    problems = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(problems)
    query, stores, tree, key, value = problems.problem(tokens)
    on_gpu = [x.cuda() for x in (query, key, value)]
    stores_on_gpu, tree_on_gpu = tuple(s.cuda() for s in stores), ops.Tree(*(x.cuda() for x in tree))
    found = flash.tree_attention(*on_gpu, stores_on_gpu, tree_on_gpu, 32**-0.5, 0.0, None)
    problems.append(stores, tree, key, value)
    want = reference.tree_attention(query, *stores, tree)
    torch.testing.assert_close(found.cpu(), want, atol=0.03, rtol=0.02)
