"""The engine: equality with transformers, invariances, strategies, bad input."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers

import pyengine
from pyengine import (
    BestOfK,
    Blockwise,
    Engine,
    InputError,
    PrefixScorer,
    Probe,
    SamplingParams,
    Tokenwise,
    ledger,
)
from pyengine.decode.step import Graph
from pyengine.worlds import reviews

PROMPTS = ["the quick brown fox", "pack my box", "sphinx", "the lazy dog jumps over five dozen jugs of quartz"]


def count_the(prompts, completions):
    return [c.count("e") - 0.1 * len(c) for c in completions]


def random_prefix_scorer(engine, seed=0):
    torch.manual_seed(seed)
    return PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size, name=f"prefix{seed}")


@torch.inference_mode()
def greedy_by_transformers(directory, prompts, max_tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        full = model.generate(**ids, do_sample=False, max_new_tokens=max_tokens)
        out.append(full[0, ids.input_ids.shape[1] :].tolist())
    return out


def test_greedy_equals_generate(model_dir):
    want = greedy_by_transformers(model_dir, PROMPTS, 40)
    engine = Engine.from_pretrained(model_dir)
    results = engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=40, temperature=0))
    assert [r.tokens for r in results] == want
    assert all(r.logp_policy == [0.0] * len(r.tokens) for r in results)


def test_weight_zero_and_one_branch_are_the_base_policy_to_the_bit(model_dir):
    engine = Engine.from_pretrained(model_dir)
    engine.set_scorer(random_prefix_scorer(engine))
    sampling = SamplingParams(max_tokens=30, temperature=0.9, top_p=0.95, seed=3)
    base = engine.generate(PROMPTS, sampling=sampling)
    for strategy in (Tokenwise(0.0), Blockwise(1, 5), BestOfK(1), BestOfK(1, "softmax", 0.5)):
        assert engine.generate(PROMPTS, strategy, sampling) == base


@pytest.mark.parametrize(
    "strategy", [None, Tokenwise(2.0), Blockwise(4, 6), BestOfK(3), BestOfK(4, "softmax", 0.3)], ids=str
)
def test_a_batch_equals_its_rows_run_alone(model_dir, strategy):
    """Only the model's own GEMM rounding may differ, so tokens agree and numbers agree to 1e-3."""
    engine = Engine.from_pretrained(model_dir)
    engine.set_scorer(random_prefix_scorer(engine))
    sampling = SamplingParams(max_tokens=20, seed=11)
    together = engine.generate(PROMPTS, strategy, sampling)
    backwards = engine.generate(PROMPTS[::-1], strategy, sampling)[::-1]
    alone = [engine.generate(p, strategy, sampling)[0] for p in PROMPTS]
    for a, b, c in zip(together, backwards, alone, strict=True):
        assert a.tokens == b.tokens == c.tokens
        assert a.text == b.text == c.text
        assert [x.chosen for x in a.blocks] == [x.chosen for x in b.blocks] == [x.chosen for x in c.blocks]
        for other in (b, c):
            assert a.kl == pytest.approx(other.kl, abs=1e-3)
            assert a.logp_base == pytest.approx(other.logp_base, abs=1e-3)
            assert a.rewards == pytest.approx(other.rewards, abs=1e-3)


@pytest.mark.parametrize("strategy", [None, Blockwise(4, 8), BestOfK(4)], ids=str)
def test_waiting_prompts_change_nothing(engine, monkeypatch, strategy):
    """Two prompts at a time where there is room for two, and others join as they leave."""
    prompts = reviews.prompts(7)
    sampling = [SamplingParams(max_tokens=8 + 5 * i, seed=2) for i in range(7)]
    engine.set_scorer(reviews.sentiment)
    whole = engine.generate(prompts, strategy, sampling)
    small = Engine(engine.model, engine.tokenizer, reviews.sentiment, max_rows=2 * (strategy.k if strategy else 1))
    join, leave, there, counts = small._decoder.join, small._decoder.leave, set(), []

    def joined(ids, leaves):
        stem = join(ids, leaves)
        there.add(stem)
        counts.append(len(there))
        return stem

    monkeypatch.setattr(small._decoder, "join", joined)
    monkeypatch.setattr(small._decoder, "leave", lambda stem: there.remove(stem) or leave(stem))
    found = small.generate(prompts, strategy, sampling)
    assert len(counts) == 7
    assert max(counts) == 2
    assert [r.tokens for r in found] == [r.tokens for r in whole]
    assert [r.rewards for r in found] == [pytest.approx(r.rewards, abs=1e-5) for r in whole]


def test_any_eos_of_the_generation_config_ends_a_response(model_dirs):
    """All of a list, and generation_config before config."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    plain = Engine(model, tokenizer)
    plain.eos = frozenset()
    sampling = [SamplingParams(max_tokens=40, seed=i) for i in range(6)]
    tokens = [r.tokens for r in plain.generate(["the quick"] * 6, None, sampling)]
    ends = [tokens[0][12], tokens[1][5], tokens[2][20]]
    assert model.config.eos_token_id not in ends
    model.generation_config.eos_token_id = ends
    engine = Engine(model, tokenizer)
    assert engine.eos == set(ends)
    for result, drawn in zip(engine.generate(["the quick"] * 6, None, sampling), tokens, strict=True):
        first = next((i for i, token in enumerate(drawn) if token in ends), None)
        assert result.tokens == (drawn if first is None else drawn[: first + 1])
        assert result.finish_reason == ("length" if first is None else "stop")
    model.generation_config.eos_token_id = ends[1]
    assert Engine(model, tokenizer).eos == {ends[1]}
    model.generation_config.eos_token_id = None
    assert Engine(model, tokenizer).eos == {model.config.eos_token_id}
    model.generation_config.eos_token_id = ["0"]
    with pytest.raises(InputError, match="eos_token_id of the model's config must be a whole number"):
        Engine(model, tokenizer)


def test_defaults_of_the_checkpoint_that_are_not_applied_are_named(model_dirs, caplog):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    Engine(model, tokenizer)
    assert not caplog.text
    given = model.generation_config
    given.repetition_penalty, given.suppress_tokens, given.min_new_tokens = 1.3, [5, 6], 4
    given.temperature, given.top_p = 0.6, 0.9
    Engine(model, tokenizer)
    assert caplog.text.count("is not applied") == 1
    for words in (
        "repetition_penalty=1.3 (set SamplingParams.repetition_penalty)",
        "suppress_tokens=[5, 6]",
        "min_new_tokens=4 (set SamplingParams.min_tokens)",
    ):
        assert words in caplog.text
    assert "temperature" not in caplog.text  # `generate` reads it where it samples
    given.do_sample = True
    Engine(model, tokenizer)
    assert "temperature=0.6 (set SamplingParams.temperature)" in caplog.text
    assert "top_p=0.9 (set SamplingParams.top_p)" in caplog.text


def test_a_soft_choice_is_drawn_anew_for_every_block_and_prompt(engine):
    """Equal utilities: the choices of a prompt's blocks, and of two prompts' first blocks, are not one draw."""
    engine.set_scorer(lambda prompts, completions: [0.0] * len(completions))
    strategy = Blockwise(8, 4, "softmax", 1.0)
    results = engine.generate(reviews.prompts(12), strategy, SamplingParams(max_tokens=64, seed=5))
    first = [r.blocks[0].chosen for r in results]
    assert len(set(first)) > 3, "equal seeds, other prompts"
    for result in results:
        chosen = [b.chosen for b in result.blocks]
        assert len(chosen) < 6 or len(set(chosen)) > 2, "one prompt, other blocks"
    every = [b.chosen for r in results for b in r.blocks]
    assert all(0.04 < every.count(i) / len(every) < 0.25 for i in range(8))


def test_branches_of_a_prompt_are_all_different(engine):
    """The first token aside, eight branches of 24 tokens never agree by chance."""
    engine.set_scorer(reviews.sentiment)
    sampling = SamplingParams(max_tokens=24, temperature=3.0, seed=3)
    for result in engine.generate(reviews.prompts(4), BestOfK(8), sampling):
        assert len({tuple(c.tokens) for c in result.blocks[0].candidates}) == 8


@torch.inference_mode()
def test_log_probabilities_and_tokenwise_kl_are_the_models_own(engine):
    """Recomputed from the model's logits by teacher forcing, in fp64."""
    scorer = random_prefix_scorer(engine, seed=4)
    engine.set_scorer([(0.5, scorer)])
    result = engine.generate(
        reviews.prompts(1), Tokenwise(3.0), SamplingParams(max_tokens=30, temperature=0.8, seed=5)
    )[0]
    head = engine.tokenizer(result.prompt).input_ids
    output = engine.model(input_ids=torch.tensor([head + result.tokens]), output_hidden_states=True)
    span = slice(len(head) - 1, len(head) + len(result.tokens) - 1)
    base = (output.logits[0, span].double() / 0.8).log_softmax(-1)
    values = scorer.values({-1: output.hidden_states[-1][0, span]}).double()
    policy = (output.logits[0, span].double() / 0.8 + 1.5 * values).log_softmax(-1)
    tokens = torch.tensor(result.tokens)[:, None]
    torch.testing.assert_close(torch.tensor(result.logp_base).double(), base.gather(1, tokens)[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.tensor(result.logp_policy).double(), policy.gather(1, tokens)[:, 0], atol=1e-4, rtol=0
    )
    assert result.kl == pytest.approx((policy.exp() * (policy - base)).sum().item(), abs=1e-3)
    assert result.kl_kind == "exact"
    final = scorer.values({-1: output.hidden_states[-1][0, span]})[-1, result.tokens[-1]].item()
    assert result.rewards["prefix4"] == pytest.approx(final, abs=1e-4)
    assert result.reward == pytest.approx(0.5 * final, abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("captured", [False, True])
def test_a_budget_for_each_token_is_spent(engine, monkeypatch, captured):
    """Two scorers in their proportions; the same where a step is replayed."""
    one, two = random_prefix_scorer(engine), random_prefix_scorer(engine, 1)
    engine.set_scorer([(1.0, one), (-0.5, two), (0.0, count_the)])
    monkeypatch.setattr(engine._decoder, "waits", captured)
    sampling = SamplingParams(max_tokens=20, temperature=0.9, seed=3)
    for result in engine.generate(PROMPTS, Tokenwise(kl_budget=0.05), sampling):
        assert result.kl_kind == "exact"
        assert result.kl == pytest.approx(0.05 * len(result.tokens), rel=0.01)
        assert set(result.rewards) == {"prefix0", "prefix1", "count_the"}


def test_a_budget_for_the_sequence_is_spent_on_average(engine):
    engine.set_scorer(random_prefix_scorer(engine))
    prompts, sampling = PROMPTS * 8, [SamplingParams(max_tokens=16, seed=i) for i in range(32)]
    results = engine.generate(prompts, Tokenwise(kl_budget=1.5, per="sequence"), sampling)
    assert sum(r.kl for r in results) / 32 == pytest.approx(1.5, rel=0.01)
    found = engine.calibrate(prompts, 1.5, sampling)
    assert engine.generate(prompts, found, sampling) == results
    with pytest.warns(RuntimeWarning, match="comes nearest"):
        engine.calibrate(PROMPTS[0], 200.0, SamplingParams(max_tokens=2, seed=0))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_calibration_takes_few_decodes(engine, monkeypatch, scale):
    """Of 128 prompts: with 32 the mean KL moves by up to 1 % at a time, and the last bits decide how soon it is met."""
    engine.set_scorer([(scale, random_prefix_scorer(engine))])
    outcomes, runs = engine._outcomes, []
    monkeypatch.setattr(engine, "_outcomes", lambda *a: runs.append(a[0][0].plan.strategy.weight) or outcomes(*a))
    prompts, sampling = PROMPTS * 32, [SamplingParams(max_tokens=16, seed=i) for i in range(128)]
    found = engine.calibrate(prompts, 1.5, sampling)
    results = engine.generate(prompts, found, sampling)
    assert sum(r.kl for r in results) / 128 == pytest.approx(1.5, rel=0.01)
    assert 1 < len(runs) - 1 <= 10
    with pytest.raises(InputError, match="calibrate needs prompts"):
        engine.calibrate([], 1.0)
    with pytest.raises(InputError, match="kl_budget needs a temperature above 0"):
        engine.calibrate(PROMPTS, 1.0, SamplingParams(top_k=3))


def test_probe_scores_the_hidden_state_at_the_last_token_of_every_candidate(engine):
    torch.manual_seed(0)
    probe = Probe(engine.policy.hidden_size, layer=1)
    engine.set_scorer(probe)
    result = engine.generate(reviews.prompts(1), Blockwise(5, 12), SamplingParams(max_tokens=40, seed=1))[0]
    head = engine.tokenizer(result.prompt).input_ids
    assert any(c.finish_reason == "stop" for b in result.blocks for c in b.candidates)  # scored at its EOS
    for block in result.blocks:
        for candidate in block.candidates:
            ids = head + result.tokens[: block.start] + candidate.tokens
            hidden = engine.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][:, -1]
            assert candidate.utility == pytest.approx(probe.head(hidden).item(), abs=1e-4)


@pytest.mark.parametrize("waits", [False, True])
def test_a_row_without_room_is_scored_at_its_own_last_token(engine, monkeypatch, waits):
    """While others in the block go on."""
    torch.manual_seed(0)
    probe = Probe(engine.policy.hidden_size, layer=1)
    engine.set_scorer(probe)
    monkeypatch.setattr(engine, "eos", frozenset())
    monkeypatch.setattr(engine._decoder, "waits", waits)
    sampling = [SamplingParams(max_tokens=n, seed=n) for n in (3, 12, 7)]
    for result, params in zip(engine.generate(reviews.prompts(3), BestOfK(3), sampling), sampling, strict=True):
        for candidate in result.blocks[0].candidates:
            assert len(candidate.tokens) == params.max_tokens
            ids = torch.tensor([result.prompt_ids + candidate.tokens])
            with torch.inference_mode():
                hidden = engine.model(input_ids=ids, output_hidden_states=True).hidden_states[1][:, -1]
                want = probe.head(hidden).item()
            assert candidate.utility == pytest.approx(want, abs=1e-4)


def test_candidates_that_end_early_stop_at_their_eos(engine):
    engine.set_scorer(lambda prompts, completions: [-float(len(c)) for c in completions])
    results = engine.generate(reviews.prompts(16), Blockwise(8, 32), SamplingParams(max_tokens=96, seed=3))
    ended = [c for r in results for b in r.blocks for c in b.candidates if c.finish_reason == "stop"]
    assert ended
    for candidate in ended:
        assert [t for t in candidate.tokens if t in engine.eos] == candidate.tokens[-1:]
    for result in results:
        assert result.finish_reason == "stop"
        block = result.blocks[-1]
        assert block.chosen == max(range(8), key=lambda j: (block.candidates[j].utility, -j))
        assert result.tokens == [t for b in result.blocks for t in b.candidates[b.chosen].tokens]


@pytest.mark.parametrize("strategy", [Blockwise(4, 16), BestOfK(4), Tokenwise(1.5)])
def test_a_block_that_is_read_at_its_end_is_the_same_block(engine, monkeypatch, strategy):
    """As on a GPU: no step looks at what was drawn, and rows that have ended go on for nothing."""
    prompts = ["Review of the Harbour, a bakery:", "Review of the Kestrel, a desk lamp:"]
    sampling = [SamplingParams(seed=i, max_tokens=n) for i, n in ((3, 200), (4, 60))]  # beyond the context
    engine.set_scorer(pyengine.embedded("prefix"))
    want = engine.generate(prompts, strategy, sampling)
    monkeypatch.setattr(engine._decoder, "waits", True)
    for found, result in zip(engine.generate(prompts, strategy, sampling), want, strict=True):
        assert found.tokens == result.tokens
        assert found.logp_policy == pytest.approx(result.logp_policy, abs=1e-4)
        assert found.rewards == pytest.approx(result.rewards, abs=1e-3)
        assert [block.chosen for block in found.blocks] == [block.chosen for block in result.blocks]


def test_a_step_that_cannot_be_captured_runs_as_it_is(engine, monkeypatch, caplog):
    """A mixture of experts that asks the host where its tokens go, say."""
    sampling, strategy = SamplingParams(seed=5, max_tokens=24), Blockwise(2, 8)
    engine.set_scorer(pyengine.embedded("probe"))
    want = engine.generate("Review of the Harbour, a bakery:", strategy, sampling)[0]
    monkeypatch.setattr(engine._decoder, "waits", True)
    original = Graph.__init__

    def as_on_a_gpu(self, *arguments):
        original(self, *arguments)
        self.capturable = True

    def refuse():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graph, "__init__", as_on_a_gpu)
    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "mine")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: refuse())
    found = engine.generate("Review of the Harbour, a bakery:", strategy, sampling)[0]
    assert found.tokens == want.tokens
    assert caplog.text.count("cannot be captured in a CUDA graph (operation not permitted") == 1
    assert streams == ["mine"]


@pytest.mark.parametrize("strategy", [BestOfK(1), Blockwise(1, 16)])
def test_one_branch_outgrows_the_pages_of_its_prompt(model_dirs, strategy):
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
    engine.eos = frozenset()
    sampling = SamplingParams(max_tokens=85, seed=1)
    (result,) = engine.generate("the quick", strategy, sampling)
    assert len(result.tokens) == 85
    assert result.tokens == engine.generate("the quick", None, sampling)[0].tokens


def test_ended_branches_cost_nothing_more(engine, monkeypatch):
    """Most reviews end long before the longest; their rows leave the cache while the others go on."""
    seen = []
    step = engine._decoder.step
    monkeypatch.setattr(engine._decoder, "step", lambda p, t, a: seen.append(len(t)) or step(p, t, a))
    engine.set_scorer(reviews.sentiment)
    results = engine.generate(reviews.prompts(8), BestOfK(8), SamplingParams(max_tokens=128, seed=0))
    drawn = sum(len(c.tokens) for r in results for c in r.blocks[0].candidates)
    assert len(seen) * 64 > 3 * drawn  # what it would have cost
    assert sum(seen) < 1.6 * drawn


def test_max_tokens_and_context_end_a_response(model_dirs):
    engine = Engine.from_pretrained(model_dirs["llama"], scorer=count_the)
    long_prompt = "the quick brown fox " * 10
    n = len(engine.encode(long_prompt))
    for strategy in (None, Blockwise(2, 7), BestOfK(2)):
        short, cut = engine.generate(["sphinx", long_prompt], strategy, SamplingParams(max_tokens=60, seed=1))
        assert len(short.tokens) <= 60
        assert len(cut.tokens) <= engine.context - n
        for r in (short, cut):
            assert (r.finish_reason == "stop") == (r.tokens[-1] in engine.eos)


@pytest.mark.parametrize("strategy", [BestOfK(2), Blockwise(2, 60)], ids=str)
def test_ended_rows_are_never_fed_beyond_the_context(model_dirs, strategy):
    """GPT-2's positions are a table: one step too far is an IndexError, for the whole batch."""
    engine = Engine.from_pretrained(model_dirs["gpt2"], scorer=count_the)
    engine.eos = frozenset()  # nothing but length ends a row
    prompts = ["sphinx", "pack my", "the quick", "7" * 50]  # a token a digit
    room = engine.context - len(engine.encode(prompts[3]))
    assert 0 < room < 60
    results = engine.generate(prompts, strategy, SamplingParams(max_tokens=60, seed=1))
    assert len(results[3].tokens) <= room
    for prompt, result in zip(prompts, results, strict=True):
        assert engine.generate(prompt, strategy, SamplingParams(max_tokens=60, seed=1))[0].tokens == result.tokens


def test_reported_seed_gives_the_result_again(engine):
    for sampling in (SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, seed=5)):
        (result,) = engine.generate(reviews.prompts(1), sampling=sampling)
        assert engine.generate(result.prompt, sampling=SamplingParams(max_tokens=12, seed=result.seed)) == [result]


def test_a_score_of_weight_zero_does_not_reach_the_reward(engine):
    engine.set_scorer([(0.0, lambda prompts, completions: [-math.inf] * len(completions)), (1.0, reviews.sentiment)])
    result = engine.generate(reviews.prompts(1), BestOfK(3), SamplingParams(max_tokens=20, seed=1))[0]
    assert result.reward == result.rewards["sentiment"]


def test_numbers_of_numpy_are_numbers():
    assert SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.int64(4)).seed == 4
    assert BestOfK(np.int64(4)).k == 4
    assert Tokenwise(np.float64(2)) == Tokenwise(2.0)


def test_branches_differ_and_repeat_with_the_seed(engine):
    engine.set_scorer(reviews.sentiment)
    run = [engine.generate(reviews.prompts(2), BestOfK(8), SamplingParams(seed=s)) for s in (1, 1, 2)]
    assert run[0] == run[1]
    assert run[0] != run[2]
    texts = {c.text for c in run[0][0].blocks[0].candidates}
    assert len(texts) == 8  # vllm#10980: a copied seed makes identical children
    fresh = {engine.generate(reviews.prompts(1))[0].text for _ in range(4)}
    assert len(fresh) > 1


def test_best_of_k_keeps_the_best_and_reports_the_bound(engine):
    engine.set_scorer([(2.0, reviews.sentiment), (-0.5, reviews.politeness)])
    for result in engine.generate(reviews.prompts(6), BestOfK(8), SamplingParams(seed=1)):
        (block,) = result.blocks
        utilities = [2 * reviews.sentiment_of(c.text) - 0.5 * reviews.politeness_of(c.text) for c in block.candidates]
        assert block.chosen == utilities.index(max(utilities))
        assert result.rewards == pytest.approx(
            {"sentiment": reviews.sentiment_of(result.text), "politeness": reviews.politeness_of(result.text)}, abs=1e-6
        )
        assert result.reward == pytest.approx(utilities[block.chosen], abs=1e-5)
        assert result.kl == pytest.approx(ledger.best_of_k_bound(8), abs=1e-6)
        assert result.kl_kind == "bound"


def test_blockwise_bound_counts_committed_blocks_and_filters(engine):
    engine.set_scorer(reviews.sentiment)
    result = engine.generate(reviews.prompts(1), Blockwise(4, 8), SamplingParams(seed=1))[0]
    assert result.kl == pytest.approx(ledger.blockwise_bound(4, len(result.tokens), 8), abs=1e-5)
    filtered = engine.generate(reviews.prompts(1), Blockwise(4, 8), SamplingParams(seed=1, top_p=0.8))[0]
    extra = sum(p - b for p, b in zip(filtered.logp_policy, filtered.logp_base, strict=True))
    assert extra > 0
    assert filtered.kl == pytest.approx(ledger.blockwise_bound(4, len(filtered.tokens), 8) + extra, abs=1e-3)


def test_softmax_selection_follows_its_law(engine):
    """Over many blocks, the chosen candidate's probability sums to the number of times it is chosen."""
    engine.set_scorer(reviews.sentiment)
    sampling = [SamplingParams(max_tokens=24, seed=i) for i in range(200)]
    results = engine.generate(reviews.prompts(200), BestOfK(4, "softmax", 0.3), sampling)
    blocks = [r.blocks[0] for r in results]
    first = sum(b.chosen == 0 for b in blocks)
    mean = sum(b.candidates[0].probability for b in blocks)
    spread = math.sqrt(sum(p * (1 - p) for p in (b.candidates[0].probability for b in blocks)))
    assert abs(first - mean) < 4.5 * spread
    assert all(sum(c.probability for c in b.candidates) == pytest.approx(1, abs=1e-5) for b in blocks)


@pytest.mark.parametrize("strategy", [None, Tokenwise(1.0), Blockwise(3, 5), BestOfK(2)], ids=str)
def test_stream_adds_up_to_generate(engine, strategy):
    engine.set_scorer(pyengine.embedded("prefix"))
    prompt, sampling = reviews.prompts(1)[0], SamplingParams(max_tokens=30, seed=4)
    (whole,) = engine.generate(prompt, strategy, sampling)
    events = list(engine.stream(prompt, strategy, sampling))
    assert "".join(e.text for e in events) == whole.text
    assert [t for e in events for t in e.tokens] == whole.tokens
    assert [e.result for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].result == whole
    assert len(events) == (len(whole.tokens) if strategy is None or strategy.k == 1 else len(whole.blocks))


def test_stream_holds_back_broken_characters(model_dirs):
    """Random bytes: the text streamed must still be the text decoded at once."""
    engine = Engine.from_pretrained(model_dirs["gpt2"])
    for seed in range(5):
        events = list(engine.stream("sphinx", sampling=SamplingParams(max_tokens=40, seed=seed)))
        assert "".join(e.text for e in events) == events[-1].result.text


def test_text_keeps_the_space_between_prompt_and_response(model_dirs, sentencepiece_tokenizer):
    """A decoder in the manner of SentencePiece drops the first space of whatever it decodes."""
    tokenizer = sentencepiece_tokenizer
    engine = Engine(Engine.from_pretrained(model_dirs["llama"]).model, tokenizer, count_the)
    sampling = [SamplingParams(max_tokens=16, seed=i) for i in range(80)]
    results = engine.generate(PROMPTS * 20, Blockwise(3, 4), sampling)
    assert any(r.text.startswith(" ") for r in results)
    for r in results:
        whole = tokenizer.decode(engine.encode(r.prompt) + r.tokens, skip_special_tokens=True)
        assert r.prompt + r.text == whole
        assert "".join(b.candidates[b.chosen].text for b in r.blocks) == r.text


def test_result_is_plain_json(engine):
    engine.set_scorer(reviews.sentiment)
    result = engine.generate(reviews.prompts(1), Blockwise(2, 8), SamplingParams(max_tokens=16, seed=1))[0]
    again = json.loads(json.dumps(result.to_dict()))
    assert again["tokens"] == result.tokens
    assert (
        again["blocks"][0]["candidates"][1]["scores"]["sentiment"] == result.blocks[0].candidates[1].scores["sentiment"]
    )


def test_sampling_for_each_prompt(engine):
    prompts = reviews.prompts(2)
    params = [SamplingParams(max_tokens=5, seed=1), SamplingParams(max_tokens=9, temperature=0)]
    together = engine.generate(prompts, sampling=params)
    alone = [engine.generate(p, sampling=s)[0] for p, s in zip(prompts, params, strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len(together[0].tokens) == 5
    assert together[1].logp_policy == [0.0] * len(together[1].tokens)


def test_nan_score_ranks_last_with_a_warning(engine):
    engine.set_scorer(lambda prompts, completions: [math.nan] + [0.0] * (len(completions) - 1))
    with pytest.warns(RuntimeWarning, match="NaN"):
        result = engine.generate(reviews.prompts(1), BestOfK(3), SamplingParams(max_tokens=8, seed=1))[0]
    assert result.blocks[0].chosen == 1


def test_bfloat16_model(model_dirs):
    engine = Engine.from_pretrained(model_dirs["qwen2"], dtype=torch.bfloat16)
    engine.set_scorer(random_prefix_scorer(engine))
    for strategy in (None, Tokenwise(1.0), Blockwise(2, 4)):
        assert engine.generate("sphinx", strategy, SamplingParams(max_tokens=8, seed=1))[0].tokens


class TestBadInput:
    @pytest.mark.parametrize("max_rows", [0, 1.5, "4", True, -3])
    def test_rows_that_are_no_number(self, model_dirs, max_rows):
        with pytest.raises(InputError, match="Engine: max_rows must be a whole number of at least 1"):
            Engine.from_pretrained(model_dirs["llama"], max_rows=max_rows)

    def test_a_model_in_double_precision(self, model_dirs):
        with pytest.raises(InputError, match=r"this model is torch\.float64"):
            Engine.from_pretrained(model_dirs["llama"], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("cache_gb", "message"),
        [
            (math.nan, "cache_gb must be a finite number"),
            (1e-6, "too small: one page and tail"),
            (0, "too small: one page and tail"),
            (1e6, r"a cache of 1e\+06 GB \(cache_gb\): .* GB of memory are free"),
        ],
    )
    def test_a_cache_that_cannot_be_is_refused(self, model_dirs, cache_gb, message):
        with pytest.raises(InputError, match=message):
            Engine.from_pretrained(model_dirs["llama"], cache_gb=cache_gb)

    def test_pages_are_not_forgotten_under_an_open_stream(self, engine):
        stream = engine.stream("Review of the Harbour, a bakery:", sampling=SamplingParams(seed=0, max_tokens=5))
        next(stream)
        with pytest.raises(InputError, match="close what is open before changing its model"):
            engine.forget()
        stream.close()
        engine.forget()

    def test_missing_model(self):
        with pytest.raises(InputError, match="no such directory"):
            Engine.from_pretrained("/no/such/model")
        with pytest.raises(InputError, match="model nobody/nothing:"):
            Engine.from_pretrained("nobody/nothing")

    def test_pickled_weights_are_refused(self, tmp_path, model_dirs):
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="safetensors"):
            Engine.from_pretrained(tmp_path)

    def test_checkpoint_that_lacks_weights_is_not_filled_with_random_ones(self, tmp_path, model_dirs):
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
        del model.model.norm.weight
        model.save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"lacks 1 of the weights .*'model\.norm\.weight'"):
            Engine.from_pretrained(tmp_path)

    @pytest.mark.parametrize("damage", ["pointer", "truncated", "config", "tokenizer"])
    def test_damaged_checkpoint(self, tmp_path, model_dirs, damage):
        shutil.copytree(model_dirs["qwen2"], tmp_path, dirs_exist_ok=True)
        weights = tmp_path / "model.safetensors"
        if damage == "pointer":  # cloned without git-lfs
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        elif damage == "config":
            (tmp_path / "config.json").write_text("{")
        else:
            for file in tmp_path.glob("tokenizer*"):
                file.unlink()
        with pytest.raises(InputError, match=f"model {tmp_path}: ") as caught:
            Engine.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    def test_remote_code_does_not_run(self, tmp_path, model_dirs):
        config = json.loads((model_dirs["llama"] / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(InputError):
            Engine.from_pretrained(tmp_path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("prompt", ["", [], {"prompt": ""}, {"prompt_ids": []}])
    def test_empty_prompt(self, engine, prompt):
        with pytest.raises(InputError, match=r"prompt 1 is empty|prompt 1: needs token ids"):
            engine.generate(["fine", prompt])

    def test_prompt_longer_than_the_context(self, engine):
        with pytest.raises(InputError, match=r"prompt 0 has \d+ tokens, .* reads 512"):
            engine.generate("wonderful " * 600)

    def test_prompt_with_a_lone_surrogate(self, engine):
        with pytest.raises(InputError, match="prompt 0 is not valid Unicode"):
            engine.generate("caf\ud800")

    def test_prompt_of_the_wrong_type(self, engine):
        with pytest.raises(InputError, match="prompt 1 is not a string, token ids or messages"):
            engine.generate(["fine", 3])

    def test_as_many_sampling_params_as_prompts(self, engine):
        with pytest.raises(InputError, match="1 prompts but 2"):
            engine.generate("a", sampling=[SamplingParams(), SamplingParams()])

    def test_unknown_strategy(self, engine):
        with pytest.raises(InputError, match="not a strategy"):
            engine.generate("a", "beam")

    @pytest.mark.parametrize("strategy", [Tokenwise(1.0), Blockwise(2), BestOfK(2)])
    def test_strategy_without_scorer(self, engine, strategy):
        with pytest.raises(InputError, match="needs a scorer"):
            engine.generate("a", strategy)

    @pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
    def test_a_budget_that_something_else_spends(self, engine, change):
        engine.set_scorer(random_prefix_scorer(engine))
        with pytest.raises(InputError, match="kl_budget needs a temperature above 0, and no top_k"):
            engine.generate(PROMPTS, Tokenwise(kl_budget=0.1), SamplingParams(**change))

    def test_tokenwise_with_a_scorer_of_whole_prefixes(self, engine):
        engine.set_scorer([(1.0, pyengine.embedded("prefix")), (1.0, pyengine.embedded("probe"))])
        with pytest.raises(InputError, match="'probe' scores whole prefixes"):
            engine.generate("a", Tokenwise(1.0))

    @pytest.mark.parametrize("device", ["cuda:77", "abacus"])
    def test_device_that_is_not_there(self, device):
        with pytest.raises(InputError, match=f"device '{device}'") as error:
            Engine.from_pretrained(pyengine.embedded("policy"), device=device)
        assert len(str(error.value)) < 150  # torch names twenty

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Tokenwise("4"),
            lambda: Tokenwise(math.inf),
            lambda: Blockwise(True),
            lambda: Blockwise(2, 2.5),
            lambda: Blockwise(2, 0),
            lambda: BestOfK(0),
            lambda: BestOfK(2, "softmax"),
            lambda: BestOfK(2, "softmax", 0.0),
            lambda: BestOfK(2, "softmax", 1e-300),
            lambda: BestOfK(2, "softmax", 1e300),
            lambda: Tokenwise(1e300),
            lambda: Tokenwise(1e-300),
            lambda: Tokenwise(kl_budget=1e-300),
            lambda: BestOfK(2, beta=1.0),
            lambda: BestOfK(2, "best"),
        ],
    )
    def test_strategy_out_of_range(self, make):
        with pytest.raises(InputError, match=r"Tokenwise|Blockwise|BestOfK"):
            make()

    def test_infinite_logits_name_the_prompt(self, model_dirs):
        engine = Engine.from_pretrained(model_dirs["llama"])
        with torch.no_grad():
            engine.model.lm_head.weight[5] = math.nan
        with pytest.raises(InputError, match=r"prompt 0: .* NaN or infinite logits at token 0"):
            engine.generate("a")

    @pytest.mark.parametrize(
        "change",
        [
            {"max_tokens": 0},
            {"temperature": -1.0},
            {"temperature": 1e-300},
            {"temperature": 1e300},
            {"temperature": math.nan},
            {"top_k": -2},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"min_p": -0.1},
            {"seed": 2**64},
            {"seed": 1.0},
            {"max_tokens": 6.5},
            {"temperature": None},
            {"top_k": "3"},
        ],
    )
    def test_sampling_out_of_range(self, change):
        with pytest.raises(InputError, match=next(iter(change))):
            SamplingParams(**change)
