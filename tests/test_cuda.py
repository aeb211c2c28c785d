"""On a GPU: the same tokens and numbers as on the CPU. Needs a device; bench/gpu.sh runs it on one."""

from __future__ import annotations

import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, Engine, SamplingParams, Tokenwise, ops
from pyengine.worlds import reviews

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


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
