"""Reward models with a branching cache of their own: the same scores as reading every candidate from its start."""

from __future__ import annotations

import pytest
import torch
import transformers

import pyengine.reader as reader_module
from pyengine import (
    BestOfK,
    Blockwise,
    Engine,
    InputError,
    PrefixModel,
    PrefixScorer,
    RewardModel,
    SamplingParams,
    Tokenwise,
)
from pyengine.reader import reader_of
from pyengine.scorers import Scorer

BUDGET = 8e6
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 1,
    "pad_token_id": 0,
}


def reward_model(tokenizer, config=None, name="judge"):
    torch.manual_seed(3)
    config = config or transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return RewardModel(model, tokenizer, name)


class Recomputed(Scorer):
    """The same model, over all tokens of every candidate, the special ones left out."""

    def __init__(self, inner, engine):
        self.inner, self.engine, self.name = inner, engine, inner.name

    def score(self, candidates):
        ids = [self.engine.encode(p) for p in candidates.prompts]
        texts = [a + [t for t in b if t != 0] for a, b in zip(ids, candidates.tokens, strict=True)]
        return torch.stack([self.inner.model(input_ids=torch.tensor([text])).logits[0, 0] for text in texts])


@pytest.fixture
def engine(model_dirs):
    return Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)


PROMPTS = ["the quick brown fox", "pack my box", "sphinx of quartz " * 9]


@pytest.mark.parametrize("strategy", [Blockwise(4, 5), BestOfK(3), Blockwise(3, 4, selection="softmax", beta=0.5)])
def test_scores_equal_a_recompute(engine, strategy):
    judge = reward_model(engine.tokenizer)
    sampling = [SamplingParams(max_tokens=n, seed=n, temperature=0.7) for n in (17, 9, 12)]
    engine.set_scorer([(2.0, judge)])
    assert len(engine._readers) == 1
    read = []
    reader = next(iter(engine._readers.values()))
    original = reader._read
    reader._read = lambda ids, *rest: read.append(ids.numel()) or original(ids, *rest)
    found = engine.generate(PROMPTS, strategy, sampling)
    engine.set_scorer([(2.0, Recomputed(judge, engine))])
    assert not engine._readers
    want = engine.generate(PROMPTS, strategy, sampling)
    for a, b in zip(found, want, strict=True):
        assert a.tokens == b.tokens
        assert a.reward == pytest.approx(b.reward, abs=1e-3)
        for mine, theirs in zip(a.blocks, b.blocks, strict=True):
            assert mine.chosen == theirs.chosen
            for one, other in zip(mine.candidates, theirs.candidates, strict=True):
                assert one.utility == pytest.approx(other.utility, abs=1e-3)
    prompts = sum(len(engine.encode(prompt)) for prompt in PROMPTS)
    candidates = sum(len(c.tokens) for r in found for block in r.blocks for c in block.candidates)
    assert read[0] == prompts, "each prompt is read once"
    assert sum(read[1:]) >= candidates - len([1 for r in found for block in r.blocks for _ in block.candidates])
    assert reader.cache.pages_in_use == 0
    reader.cache.check_integrity()


def test_a_candidate_beyond_the_judges_context_is_refused(engine):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=24)
    engine.set_scorer(reward_model(engine.tokenizer, config))
    assert engine._readers
    engine.eos = frozenset()
    with pytest.raises(InputError, match="scorer 'judge' reads 24 tokens, a candidate has"):
        engine.generate("the quick", Blockwise(2, 4), SamplingParams(max_tokens=40, seed=1))
    with pytest.raises(InputError, match="reads 24 tokens"):
        engine.generate("sphinx of quartz " * 9, Blockwise(2, 4), SamplingParams(max_tokens=4, seed=1))
    assert next(iter(engine._readers.values())).cache.pages_in_use == engine._decoder.cache.pages_in_use == 0


def test_one_judge_twice_in_a_sum_is_read_once_and_given_back(engine):
    judge = reward_model(engine.tokenizer)
    engine.set_scorer([(1.0, judge), (0.5, judge)])
    assert len(engine._readers) == 1
    result = engine.generate("the quick", Blockwise(2, 4), SamplingParams(max_tokens=8, seed=1))[0]
    assert result.rewards["judge"] == result.rewards["judge-2"]
    assert engine.generate("the quick", None, SamplingParams(max_tokens=2, seed=1))[0].rewards["judge"] is not None
    reader = next(iter(engine._readers.values()))
    engine.set_scorer([(2.0, judge)])
    assert next(iter(engine._readers.values())) is reader, "kept as long as its scorer is"


def test_long_tails_are_read_in_pieces(engine, monkeypatch):
    judge = reward_model(engine.tokenizer)
    engine.set_scorer(judge)
    sampling = [SamplingParams(max_tokens=n, seed=n, temperature=0.7) for n in (17, 9, 12)]
    want = engine.generate(PROMPTS, BestOfK(3), sampling)
    monkeypatch.setattr(reader_module, "PREFILL_TOKENS", 9 * 4)
    for found, result in zip(engine.generate(PROMPTS, BestOfK(3), sampling), want, strict=True):
        assert found.tokens == result.tokens
        assert found.reward == pytest.approx(result.reward, abs=1e-4)


def prefix_model(tokenizer):
    judge = reward_model(tokenizer)
    torch.manual_seed(4)
    return PrefixModel(judge.model.model, tokenizer, PrefixScorer(64, 320, 32))


def joined(reader, prompts):
    """Read to their ends."""
    reader.begin()
    stems = [reader.join(prompt, 0) for prompt in prompts]
    for stem, frontier in reader.prefill(stems, 4096):
        stem.at = frontier
    return stems


@pytest.mark.parametrize("columns", [1, 2, 3, 64])
@pytest.mark.parametrize("make", [reward_model, prefix_model])
def test_each_branch_is_read_at_its_own_last_token(engine, monkeypatch, make, columns):
    """Over passes of so many columns: tails end in each of them, and at the last column of one."""
    reader = reader_of(make(engine.tokenizer), engine.tokenizer, 8, BUDGET)
    draw = torch.Generator().manual_seed(7)

    def tokens(count):
        return torch.randint(1, 320, (count,), generator=draw).tolist()

    prompts, rows = [tokens(9), tokens(5)], []
    monkeypatch.setattr(reader_module, "PREFILL_TOKENS", 8 * columns)
    stems = joined(reader, prompts)
    try:
        for lengths in ((1, 2, 8, 4, 6, 5, 8, 3), (3, 1, 8, 6, 2, 4, 8, 7)):  # whole ones are committed
            tails = [tokens(length) for length in lengths]
            rows += [
                (prompts[i // 4] + tail, score)
                for i, (tail, score) in enumerate(
                    zip(tails, reader.score(stems, [tails[:4], tails[4:]]).tolist(), strict=True)
                )
            ]
            prompts = [prompts[0] + tails[2], prompts[1] + tails[6]]
            reader.keep([(stems[0], 2), (stems[1], 2)])
    finally:
        reader.end()
    wanted = [reader.recompute(ids) for ids, _ in rows]
    assert [score for _, score in rows] == pytest.approx(wanted, abs=1e-4)


def test_a_branch_that_only_ends_has_the_score_of_what_was_there(engine):
    reader = reader_of(reward_model(engine.tokenizer), engine.tokenizer, 8, BUDGET)
    prompts = [[5, 9, 31, 7], [12, 8, 40]]
    stems = joined(reader, prompts)
    try:
        some = reader.score(stems, [reader.given([[0], [17, 0]], {0}), reader.given([[0], [21, 22]], {0})]).tolist()
        reader.keep([(stems[0], 0), (stems[1], 0)])
        none = reader.score(stems, [reader.given([[0]] * 2, {0})] * 2).tolist()
    finally:
        reader.end()
    empty = [reader.recompute(prompt) for prompt in prompts]
    assert some[::2] == pytest.approx(empty, abs=1e-4)
    assert some[1] == pytest.approx(reader.recompute([*prompts[0], 17]), abs=1e-4)
    assert none == pytest.approx([empty[0]] * 2 + [empty[1]] * 2, abs=1e-4)


def test_one_branch_is_scored_on_the_tokens_that_more_would_be(engine):
    """Text leaves special tokens out, and other tokens may spell it."""
    judge = reward_model(engine.tokenizer)
    engine.set_scorer(judge)
    for strategy in (None, Tokenwise(0.0), Blockwise(2, 4)):
        for result in engine.generate(PROMPTS, strategy, SamplingParams(max_tokens=9, seed=1)):
            ids = result.prompt_ids + [token for token in result.tokens if token != 0]
            assert result.reward == pytest.approx(judge._batch([(ids, [])]).item(), abs=1e-3)
            assert engine.tokenizer(result.prompt + result.text).input_ids != ids


def test_another_tokenizer_reads_text(engine):
    other = transformers.AutoTokenizer.from_pretrained(engine.tokenizer.name_or_path)
    other.add_tokens(["sphinx of"])
    assert reader_of(reward_model(other), engine.tokenizer, 8, BUDGET) is None


def test_a_model_that_reads_both_ways_reads_text(engine):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=64)
    assert reader_of(reward_model(engine.tokenizer, config), engine.tokenizer, 8, BUDGET) is None


class Starting(torch.nn.Module):
    """A projection that knows the first token of what it is given: right only where a pass holds the whole text."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 4 * x[:, :1].mean()


def test_a_model_that_no_cache_serves_is_found_out(engine, caplog):
    judge = reward_model(engine.tokenizer)
    attention = judge.model.model.layers[0].self_attn
    attention.o_proj = Starting(attention.o_proj)
    assert reader_of(judge, engine.tokenizer, 8, BUDGET) is None
    assert "judge: reads every candidate from its start (its scores differ by" in caplog.text


@pytest.mark.parametrize("max_rows", [1, 2, 3])
@pytest.mark.parametrize("budget", [4e5, BUDGET])
def test_a_trial_asks_nothing_of_the_readers_own_rows_and_memory(engine, max_rows, budget):
    """One that forks more rows than there are tails writes behind them."""
    reader = reader_of(reward_model(engine.tokenizer), engine.tokenizer, max_rows, budget)
    assert reader is not None
    assert reader.max_rows == max_rows
    assert reader.cache.pages_in_use == 0
