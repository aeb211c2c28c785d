"""The replicated cache against a recompute, and the choice between the two."""

from __future__ import annotations

import pytest
import torch
import transformers

from pyengine import Engine, InputError, SamplingParams
from pyengine.cache import TESTED, RecomputeCache, ReplicatedCache, choose_cache

PROMPTS = [[5, 9, 40, 77, 8, 3, 21, 60, 12, 4, 33], [7, 7, 2], [90, 14, 6, 50, 51, 52]]


@torch.inference_mode()
def walk(cache):
    """Prefill, two forks, ragged commits; every frontier on the way."""
    seen = [cache.prefill(PROMPTS), cache.fork(3)]
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(1, 300, (n,), generator=generator)

    seen += [cache.append(tokens(9)) for _ in range(6)]
    seen.append(cache.commit(torch.tensor([2, 3, 7])))
    seen += [cache.fork(2), cache.append(tokens(6)), cache.append(tokens(6))]
    seen.append(cache.commit(torch.tensor([5, 0])))  # one prompt is dropped, the others change places
    seen += [cache.append(tokens(2)) for _ in range(5)]
    return seen


def test_replicated_equals_recompute(model_dir):
    """Sliding windows of 8 (Mistral, Gemma 2) are crossed inside the prompt and inside blocks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    layers = (1, -1)
    for fast, slow in zip(walk(ReplicatedCache(model, layers)), walk(RecomputeCache(model, layers)), strict=True):
        torch.testing.assert_close(fast.logits, slow.logits, atol=2e-4, rtol=1e-4)
        for layer in layers:
            torch.testing.assert_close(fast.hidden[layer], slow.hidden[layer], atol=2e-4, rtol=1e-4)


def test_all_tested_architectures_are_tested(model_dirs):
    assert set(model_dirs) == TESTED


def tiny(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rope(kind, **extra):
    sizes = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return tiny(transformers.LlamaConfig(**sizes, num_attention_heads=4, rope_parameters=parameters | extra))


def test_longrope_is_recomputed_so_that_a_prompt_does_not_feel_its_neighbours(model_dirs, caplog):
    model = rope("longrope", short_factor=[1.0] * 6, long_factor=[4.0] * 6)
    engine = Engine(model, transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]))
    assert "longrope" in caplog.text
    short, long, sampling = "77", "7" * 30, SamplingParams(max_tokens=8, seed=1)
    assert len(engine.encode(short)) + 8 < 16 < len(engine.encode(long))
    both = engine.generate([short, long], sampling=sampling)
    for prompt, result in zip((short, long), both, strict=True):
        assert result.logp_base == pytest.approx(engine.generate(prompt, sampling=sampling)[0].logp_base, abs=1e-4)


def test_dynamic_rope_is_refused():
    with pytest.raises(InputError, match="dynamic RoPE"):
        choose_cache(rope("dynamic"))


def test_unknown_architecture_that_branches_is_accepted():
    config = transformers.OlmoConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    assert choose_cache(tiny(config)) is ReplicatedCache


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8),
        transformers.OpenAIGPTConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    ],
    ids=["recurrent state", "no cache"],
)
def test_model_whose_cache_cannot_branch_is_recomputed(config, model_dirs, caplog):
    model = tiny(config)
    assert choose_cache(model) is RecomputeCache
    assert "cannot be branched" in caplog.text
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    result = Engine(model, tokenizer).generate("the quick")[0]
    assert result.tokens
