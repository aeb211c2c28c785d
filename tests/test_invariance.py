"""What is drawn for a prompt does not depend, to the bit, on what is decoded beside it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import pyengine
from pyengine import BestOfK, Blockwise, Engine, InputError, SamplingParams, Tokenwise
from pyengine.decode.values import token_values
from pyengine.decoder import BranchingDecoder
from pyengine.invariance import BY_VECTORS, MAPPED, why_not
from pyengine.ops.linear import VECTORS, steady, steady_linear
from pyengine.scorers import PrefixScorer, Scorer
from pyengine.worlds import reviews

TYPES = (torch.float32, torch.bfloat16, torch.float16)
BUDGET = 8e6
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 321,
    "max_position_embeddings": 512,
}


def llama(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA | sizes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# Products


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_of_any_number_of_rows(isa, dtype, two_threads):
    """Against fp64, and each row against itself alone; sizes that divide no vector, block or part."""
    generator = torch.Generator().manual_seed(0)
    for outputs, width in ((7, 19), (50, 130)):
        x = torch.randn(2, 75, width, generator=generator).to(dtype)
        weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((outputs, width), (outputs,)))
        found = steady_linear(x, weight, bias)
        want = F.linear(x.double(), weight.double(), bias.double())
        assert found.dtype == dtype
        ulp = {torch.float32: 2e-6 * width**0.5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        torch.testing.assert_close(found.double(), want, atol=ulp, rtol=0 if dtype == torch.float32 else ulp)
        for i in (0, 1, 31, 32, 33, 63, 74):
            assert torch.equal(steady_linear(x[1, i : i + 1], weight, bias)[0], found[1, i])
        assert torch.equal(steady_linear(x[:, ::2], weight.t().contiguous().t(), bias), found[:, ::2])
    assert steady_linear(x[:, :0], weight, bias).shape == (2, 0, outputs)
    with pytest.raises(RuntimeError, match="width"):
        steady_linear(x[..., 1:], weight, bias)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_layers_are_steady_inside_and_their_own_again_outside(dtype, two_threads):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 72), nn.SiLU(), Conv1D(30, 72), nn.GELU(approximate="tanh"), nn.Linear(30, 9))
    layers = layers.to(dtype)
    x = torch.randn(1, 90, 40).to(dtype)
    want = layers(x)
    with steady(layers):
        assert torch.get_num_threads() == 1
        whole, alone = layers(x), [layers(x[:, i : i + 1]) for i in range(90)]
    assert torch.get_num_threads() == 2
    assert not any("forward" in vars(layer) for layer in layers)
    assert torch.equal(torch.cat(alone, 1), whole)
    torch.testing.assert_close(whole, want, atol=3e-2 if dtype != torch.float32 else 1e-6, rtol=2e-2)
    with pytest.raises(ZeroDivisionError), steady(layers):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2
    layers[0].forward = lambda x: x
    with pytest.raises(InputError, match="0 has a forward"), steady(layers):
        pass


# Operators


CALLS = {
    "cos": torch.cos,
    "exp": torch.exp,
    "log": lambda x: x.abs().log(),
    "sin": torch.sin,
    "tanh": torch.tanh,
    "elu": F.elu,
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "log_sigmoid_forward": F.logsigmoid,
    "mish": F.mish,
    "pow": lambda x: x.pow(3.0),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", sorted(CALLS))
def test_operators_that_are_trusted(name, dtype):
    """Each row alone and among others: at any width, or at whole vectors."""
    assert set(CALLS) == MAPPED | BY_VECTORS
    generator = torch.Generator().manual_seed(0)
    widths = range(1, 201, 3) if name in MAPPED else (VECTORS, 3 * VECTORS)
    for width in widths:
        x = (4 * torch.randn(1, 9, width, generator=generator)).to(dtype)
        alone = torch.cat([CALLS[name](x[:, i : i + 1]) for i in range(9)], 1)
        assert torch.equal(CALLS[name](x), alone), width


# Models


def test_architectures_are_served_or_refused_by_name(model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    reason = why_not(BranchingDecoder(model, (), 64, BUDGET, steady=True))
    if model.config.model_type == "gpt_oss":
        assert "multiplies matrices by aten::" in reason
    else:
        assert reason is None


class Mixing(nn.Module):
    """Adds to each token what stands first in the pass, by operators that are exact each."""

    def forward(self, x):
        return x + 1e-3 * x[:, :1]


class Cumulative(nn.Module):
    def forward(self, x):
        return x + 1e-3 * x.cumsum(1)


class ByTorch(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


def test_what_is_not_steady_is_refused():
    for module, reason in (
        (Mixing(), "a row changes among"),
        (Cumulative(), "aten::cumsum"),
        (ByTorch(48, 48), "aten::m"),
        (nn.Hardsigmoid(), "aten::hardsigmoid"),
    ):
        model = llama()
        model.model.norm = nn.Sequential(model.model.norm, module)
        found = why_not(BranchingDecoder(model, (), 64, BUDGET, steady=True))
        assert found is not None, module
        assert reason in found


def test_an_engine_refuses_with_the_reason(model_dirs, monkeypatch):
    for name, reason in (("gpt-oss", "not with gpt_oss: it multiplies matrices"),):
        with pytest.raises(InputError, match=reason):
            Engine.from_pretrained(model_dirs[name], batch_invariant=True, cache_gb=0.01)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    with pytest.raises(InputError, match="no multiple of 16"):
        Engine(llama(head_dim=24), tokenizer, batch_invariant=True, cache_gb=0.01)
    with pytest.raises(InputError, match="not yet on meta"):
        Engine(llama().to("meta"), tokenizer, batch_invariant=True, cache_gb=0.01)
    model = llama()
    engine = Engine(model, tokenizer, batch_invariant=True, cache_gb=0.01)
    model.model.norm = nn.Sequential(model.model.norm, Mixing())
    with pytest.raises(InputError, match="other modules"):
        engine.generate([[1, 2]])
    model.model.norm = model.model.norm[0]
    assert engine.generate([[1, 2]], sampling=SamplingParams(max_tokens=2))
    model.lm_head.double()
    with pytest.raises(InputError, match="lm_head has a forward, dtype"):
        engine.generate([[1, 2]])


# Engines


def bits(result):
    return result.tokens, result.logp_base, result.logp_policy, result.kl, result.rewards, result.blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_is_the_same_to_the_bit_alone_and_among_others(dtype, two_threads):
    """Prompts of one page and several, some with an equal beginning, alone on one thread and 40 together on two."""
    torch.manual_seed(1)
    shared = torch.randint(1, 321, (100,)).tolist()
    prompts = [torch.randint(1, 321, (1 + 31 * i % 230,)).tolist() for i in range(36)]
    prompts += [[*shared, i] for i in range(3)] + [shared[:64]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    engine = Engine(llama(dtype), tokenizer, batch_invariant=True, cache_gb=0.1)
    sampling = [SamplingParams(max_tokens=5 + i % 4, seed=i) for i in range(40)]
    among = engine.generate(prompts, sampling=sampling)
    backwards = engine.generate(prompts[::-1], sampling=sampling[::-1])[::-1]
    torch.set_num_threads(1)
    for i in (0, 7, 20, 36, 37, 38, 39):
        (alone,) = engine.generate(prompts[i : i + 1], sampling=sampling[i])
        assert bits(alone) == bits(among[i]) == bits(backwards[i])


STRATEGIES = {
    "prefix": Tokenwise(4.0),
    "kl budget": Tokenwise(kl_budget=0.05),
    "prefix blocks": Blockwise(3, 4),
    "probe": Blockwise(4, 5),
    "reward-model": Blockwise(3, 6),
    "text": BestOfK(3),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scorers_see_a_prompt_alone(name, dtype):
    scorer = {"kl budget": "prefix", "prefix blocks": "prefix", "text": "reward-model"}.get(name, name)
    engine = Engine.from_pretrained(
        pyengine.embedded("policy"), pyengine.embedded(scorer), dtype=dtype, batch_invariant=True, cache_gb=0.1
    )
    if name == "text":
        engine._readers.clear()
    sampling = [SamplingParams(max_tokens=5 + 2 * i % 9, seed=i) for i in range(12)]
    prompts = reviews.prompts(12)
    among = engine.generate(prompts, STRATEGIES[name], sampling)
    for i in (0, 3, 11):
        (alone,) = engine.generate(prompts[i], STRATEGIES[name], sampling[i])
        assert bits(alone) == bits(among[i])


class Jealous(Scorer):
    """Scores that depend on how many rows there are."""

    name, layers, scores_tokens = "jealous", (-1,), True

    def values(self, hidden):
        return hidden[-1].float() @ torch.ones(hidden[-1].shape[1], 900) * 1e-3 * len(hidden[-1])

    def score(self, candidates):
        return torch.full((len(candidates.prompts),), float(len(candidates.prompts)))

    def check(self, policy):
        self.vocab = policy.vocab_size


def test_foreign_scorers_read_a_row_or_a_request_at_a_time():
    engine = Engine.from_pretrained(pyengine.embedded("policy"), Jealous(), batch_invariant=True, cache_gb=0.1)
    prompts = reviews.prompts(4)
    for strategy in (Tokenwise(1.0), Blockwise(2, 3)):
        among = engine.generate(prompts, strategy, SamplingParams(max_tokens=4, seed=0))
        (alone,) = engine.generate(prompts[1], strategy, SamplingParams(max_tokens=4, seed=0))
        assert bits(alone) == bits(among[1])


@torch.inference_mode()
def test_the_head_of_a_prefix_scorer_is_steady_at_any_width():
    torch.manual_seed(0)
    scorer = PrefixScorer(40, 333, width=50)
    hidden = torch.randn(70, 40)
    whole = token_values(scorer, {-1: hidden}, 340, steady=True)
    alone = [token_values(scorer, {-1: hidden[i : i + 1]}, 340, steady=True) for i in range(70)]
    assert torch.equal(torch.cat(alone), whole)
