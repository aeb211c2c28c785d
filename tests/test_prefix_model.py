"""Prefix scorers with a model of their own: on any base policy, the same values as a recompute."""

from __future__ import annotations

import pytest
import torch
import transformers

import pyengine.reader as reader_module
from pyengine import BestOfK, Blockwise, Engine, InputError, PrefixModel, PrefixScorer, SamplingParams, Tokenwise
from pyengine.scorers import Candidates, Scorer, load_scorer

PROMPTS = ["the quick brown fox", "pack my box", "sphinx of quartz " * 9]
SIZES = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def prefix_model(engine, name="values", width=48, layer=-1):
    """Narrower than the base policy, with another number of layers."""
    torch.manual_seed(5)
    vocab = engine.policy.vocab_size
    config = transformers.LlamaConfig(**SIZES, vocab_size=vocab, hidden_size=width, pad_token_id=0)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return PrefixModel(model, engine.tokenizer, PrefixScorer(width, vocab, 32, layer), name)


class Recomputed(Scorer):
    """The same scorer where the engine does not see that it is a model."""

    def __init__(self, inner):
        self.inner, self.name = inner, inner.name

    def score(self, candidates):
        return self.inner.score(candidates)


def score_of(scorer, engine, result):
    ids = [engine.encode(result.prompt)]
    return scorer.score(Candidates([result.prompt], [result.tokens], {}, {}, lambda tokens: [""], ids)).item()


@pytest.fixture
def engine(model_dirs):
    return Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01, max_rows=8)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("strategy", [Blockwise(4, 5), BestOfK(3), Blockwise(4, 1)])
def test_scores_of_branches_equal_a_recompute(engine, strategy, layer):
    """More prompts than rows, so that they join and leave."""
    scorer = prefix_model(engine, layer=layer)
    prompts = PROMPTS * 3
    sampling = [SamplingParams(max_tokens=6 + i, seed=i) for i in range(len(prompts))]
    engine.set_scorer(Recomputed(scorer))
    slow = engine.generate(prompts, strategy, sampling)
    engine.set_scorer(scorer)
    assert engine._readers
    quick = engine.generate(prompts, strategy, sampling)
    for a, b in zip(slow, quick, strict=True):
        assert a.tokens == b.tokens
        assert a.reward == pytest.approx(b.reward, abs=1e-4)
        for one, other in zip(a.blocks, b.blocks, strict=True):
            for c, d in zip(one.candidates, other.candidates, strict=True):
                assert c.utility == pytest.approx(d.utility, abs=1e-4)
    assert next(iter(engine._readers.values())).cache.pages_in_use == engine._decoder.cache.pages_in_use == 0


def test_tokenwise_follows_it_beside_a_head_on_the_base(engine):
    """Log-probabilities are those of softmax(logits / T + sum of weights * V), recomputed from the start."""
    torch.manual_seed(0)
    head = PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size)
    scorer = prefix_model(engine)
    engine.set_scorer([(0.5, scorer), (1.0, head), (0.25, scorer)])
    results = engine.generate(PROMPTS * 4, Tokenwise(2.0), [SamplingParams(12, 0.8, seed=i) for i in range(12)])
    for result in results[::5]:
        ids = engine.encode(result.prompt)
        whole = torch.tensor([ids + result.tokens])
        at = slice(len(ids) - 1, -1)
        with torch.inference_mode():
            base = engine.model(input_ids=whole, output_hidden_states=True)
            values = 0.75 * scorer.head.values({-1: scorer.states(whole[0].tolist())[at]})
            values = values + head.values({-1: base.hidden_states[-1][0, at]})
        policy = torch.log_softmax(base.logits[0, at] / 0.8 + 2 * values, -1)
        want = policy.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logp_policy), want, atol=1e-4, rtol=1e-4)
        assert result.rewards["values"] == pytest.approx(score_of(scorer, engine, result), abs=1e-4)
    assert next(iter(engine._readers.values())).cache.pages_in_use == 0
    spent = engine.generate(PROMPTS, Tokenwise(kl_budget=0.02), SamplingParams(8, seed=1))
    assert all(r.kl == pytest.approx(0.02 * len(r.tokens), rel=0.01) for r in spent)


def test_stored_and_loaded_it_serves_another_base(engine, model_dirs, tmp_path):
    scorer = prefix_model(engine)
    scorer.save(tmp_path / "values")
    assert isinstance(load_scorer(tmp_path / "values"), PrefixModel)
    other = Engine.from_pretrained(model_dirs["gpt2"], scorer=tmp_path / "values", cache_gb=0.01)
    found = other.generate(PROMPTS, Tokenwise(1.0), SamplingParams(8, seed=0))
    assert [r.reward for r in found] == pytest.approx([score_of(scorer, other, r) for r in found], abs=1e-4)


@pytest.mark.parametrize("strategy", [Tokenwise(1.0), Blockwise(2, 4), BestOfK(2)])
def test_a_context_that_is_too_short_is_said(engine, strategy):
    scorer = prefix_model(engine)
    scorer.longest = 20
    engine.set_scorer(scorer)
    sampling = SamplingParams(max_tokens=64, seed=1)
    with pytest.raises(InputError, match="'values' reads 20 tokens"):
        engine.generate([PROMPTS[0]] * 4, strategy, [sampling] * 4)
    scorer.longest = 300  # the reader is made anew with its scorer
    engine.set_scorer(None)
    engine.set_scorer(scorer)
    assert engine.generate(PROMPTS[0], strategy, sampling)


@pytest.mark.parametrize("rows", [2, 700])
def test_heads_may_pad_the_vocabulary_otherwise(engine, rows):
    """Fewer and more rows than the base's head: what both lack has the mean value, what the base lacks is cut."""
    scorer, vocab = prefix_model(engine), len(engine.tokenizer)
    scorer.model.resize_token_embeddings(vocab + rows, mean_resizing=False)
    torch.manual_seed(1)
    scorer.head = PrefixScorer(48, vocab + rows, 32).eval()
    with torch.no_grad():
        scorer.head.head.bias += 3  # a mean that is not 0
    engine.set_scorer(scorer)
    (result,) = engine.generate(PROMPTS[0], Tokenwise(1.5), SamplingParams(10, seed=2))
    ids = engine.encode(result.prompt)
    whole = torch.tensor([ids + result.tokens])
    at = slice(len(ids) - 1, -1)
    with torch.inference_mode():
        values = scorer.head.values({-1: scorer.states(whole[0].tolist())[at]})[:, : engine.policy.vocab_size]
        rest = values.mean(1, keepdim=True).expand(-1, engine.policy.vocab_size - values.shape[1])
        logits = engine.model(input_ids=whole).logits[0, at] + 1.5 * torch.cat([values, rest], 1)
    want = torch.log_softmax(logits, -1).gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.logp_policy), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", [Blockwise(3, 6), Blockwise(3, 5), BestOfK(3)])
def test_a_block_may_be_read_in_several_passes(engine, monkeypatch, strategy):
    scorer = prefix_model(engine)
    engine.set_scorer(scorer)
    sampling = SamplingParams(max_tokens=14, seed=5)
    want = engine.generate(PROMPTS, strategy, sampling)
    monkeypatch.setattr(reader_module, "PREFILL_TOKENS", 9 * 2)
    found = engine.generate(PROMPTS, strategy, sampling)
    for a, b in zip(want, found, strict=True):
        assert a.tokens == b.tokens
        for one, other in zip(a.blocks, b.blocks, strict=True):
            utilities = [c.utility for c in other.candidates]
            assert [c.utility for c in one.candidates] == pytest.approx(utilities, abs=1e-4)


def test_the_body_of_the_base_model_can_be_the_trunk(engine):
    """Both share a config, and with it what attention they use."""
    body = PrefixModel(engine.model.model, engine.tokenizer, PrefixScorer(64, engine.policy.vocab_size), "body")
    engine.set_scorer(body)
    (result,) = engine.generate(PROMPTS[0], Tokenwise(1.0), SamplingParams(5, seed=0))
    assert result.reward == pytest.approx(score_of(body, engine, result), abs=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_are_enough_for_a_reader(model_dirs, rows):
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01, max_rows=rows)
    engine.set_scorer(prefix_model(engine))
    assert next(iter(engine._readers.values())).max_rows == rows
    assert len(engine.generate(PROMPTS, Tokenwise(1.0), SamplingParams(4, seed=0))) == 3


@pytest.mark.parametrize("damage", ["head/config.json", "head/model.safetensors", "model/model.safetensors"])
def test_a_damaged_directory_is_named(engine, tmp_path, damage):
    prefix_model(engine).save(tmp_path / "values")
    (tmp_path / "values" / damage).unlink()
    with pytest.raises(InputError, match="values"):
        load_scorer(tmp_path / "values")


def test_what_does_not_fit_is_refused(engine, monkeypatch):
    scorer = prefix_model(engine)
    with pytest.raises(InputError, match="reads a width of 40, its model has 48"):
        PrefixModel(scorer.model, engine.tokenizer, PrefixScorer(40, engine.policy.vocab_size))
    small = PrefixModel(scorer.model, engine.tokenizer, PrefixScorer(48, 99), "small")
    with pytest.raises(InputError, match="'small': its head scores 99 tokens, the tokenizer has"):
        engine.set_scorer(small)
    with pytest.raises(InputError, match="its head reads layer 9, its model has 4"):
        PrefixModel(scorer.model, engine.tokenizer, PrefixScorer(48, engine.policy.vocab_size, layer=9))
    other = transformers.PreTrainedTokenizerFast.from_pretrained(engine.tokenizer.name_or_path)
    other.add_tokens(["thequick"])
    foreign = PrefixModel(scorer.model, other, PrefixScorer(48, engine.policy.vocab_size), "foreign")
    with pytest.raises(InputError, match="'foreign' and model 'llama' have different vocabularies"):
        engine.set_scorer(foreign)
    monkeypatch.setattr(scorer.model, "set_attn_implementation", lambda name: None)
    engine.set_scorer(scorer)
    with pytest.raises(InputError, match="Tokenwise cannot follow 'values': its model has no branching cache"):
        engine.generate(PROMPTS, Tokenwise(1.0))
    (result,) = engine.generate(PROMPTS[0], Blockwise(2, 4), SamplingParams(6, seed=0))
    assert result.reward is not None
