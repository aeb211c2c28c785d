"""Every field of SamplingParams through the engine: against transformers' generate and processors, and in blocks."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, Engine, InputError, SamplingParams, Tokenwise
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"
STRATEGIES = [None, Tokenwise(1.5), Blockwise(4, 8), BestOfK(3)]


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(pyengine.embedded("policy"), pyengine.embedded("prefix"), cache_gb=0.05)


def generated(engine, **options):
    """Greedy, by transformers."""
    ids = torch.tensor([engine.encode(PROMPT)])
    out = engine.model.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


def greedy(engine, **fields):
    (result,) = engine.generate(PROMPT, None, SamplingParams(max_tokens=40, temperature=0, **fields))
    return result


def test_greedy_with_each_processor_equals_generate(engine):
    word = engine.tokenizer(" was", add_special_tokens=False).input_ids
    cases = [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"logit_bias": {word[0]: -40.0}}, {"sequence_bias": [[[word[0]], -40.0]]}),
        ({"bad_words": ["was"]}, {"bad_words_ids": [word]}),
    ]
    long = greedy(engine, min_tokens=30).tokens
    assert long == generated(engine, min_new_tokens=30) != greedy(engine).tokens
    for ours, theirs in cases:
        found = greedy(engine, min_tokens=30, **ours)
        assert found.tokens == generated(engine, min_new_tokens=30, **theirs), ours
        assert found.tokens != long, ours


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_what_is_forbidden_is_in_no_branch(engine, strategy):
    words = engine.tokenizer(" service", add_special_tokens=False).input_ids
    allowed = list(range(0, engine.policy.vocab_size, 2))
    for fields in ({"bad_words": ["service", "the"]}, {"allowed_token_ids": allowed}, {"min_tokens": 20}):
        params = [SamplingParams(max_tokens=24, seed=i, **fields) for i in range(6)]
        for result in engine.generate(reviews.prompts(6), strategy, params):
            branches = [c.tokens for block in result.blocks for c in block.candidates] or [result.tokens]
            assert result.tokens
            if "allowed_token_ids" in fields:
                assert all(token % 2 == 0 for tokens in branches for token in tokens)
            if "bad_words" in fields:
                assert not [t for t in branches if str(words)[1:-1] in str(t)[1:-1]]
            if "min_tokens" in fields:
                assert len(result.tokens) > 20
            assert result.kl >= -1e-4


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_stop_string_ends_a_branch_before_it_is_scored(engine, strategy):
    """Across tokens and blocks; the scorer reads nothing behind it, the text ends before it or after it."""
    read = []

    def scorer(prompts, completions):
        read.extend(completions)
        return [float(len(text)) for text in completions]

    followed = pyengine.embedded("prefix") if isinstance(strategy, Tokenwise) else scorer
    stop = "was"
    params = [SamplingParams(max_tokens=60, seed=i, stop=[stop, "zzz"]) for i in range(6)]
    with engine.following(followed):
        cut = engine.generate(reviews.prompts(6), strategy, params)
        kept = engine.generate(
            reviews.prompts(6),
            strategy,
            [SamplingParams(max_tokens=60, seed=i, stop=stop, include_stop_str_in_output=True) for i in range(6)],
        )
    assert any(r.stop_reason == stop for r in cut)
    for short, long in zip(cut, kept, strict=True):
        assert short.tokens == long.tokens
        assert stop not in short.text
        if short.stop_reason == stop:
            assert long.text == short.text + stop
            assert short.finish_reason == "stop"
            assert engine.codec.between(short.prompt_ids, short.tokens).count(stop) == 1
        for block in short.blocks:
            for candidate in block.candidates:
                assert engine.codec.between([], candidate.tokens).count(stop) <= 1
    assert all(text.count(stop) <= 1 for text in read)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_stream_never_shows_what_turns_out_to_be_a_stop_string(engine, strategy):
    for seed in range(4):
        params = SamplingParams(max_tokens=60, seed=seed, stop=["was", " the se"])
        events = list(engine.stream(PROMPT, strategy, params))
        result = events[-1].result
        assert "".join(event.text for event in events) == result.text
        assert "was" not in result.text
        assert [t for event in events for t in event.tokens] == result.tokens
        assert engine.generate(PROMPT, strategy, params)[0].text == result.text


def test_stop_tokens_and_ends(engine):
    plain = greedy(engine)
    at = next(i for i, t in enumerate(plain.tokens) if i > 3 and plain.tokens.index(t) == i)
    found = greedy(engine, stop_token_ids=[plain.tokens[at]])
    assert found.tokens == plain.tokens[: at + 1]
    assert (found.finish_reason, found.stop_reason) == ("stop", plain.tokens[at])
    assert found.text == engine.codec.between(found.prompt_ids, found.tokens[:-1])
    endless = greedy(engine, ignore_eos=True)
    assert (endless.finish_reason, len(endless.tokens)) == ("length", 40)
    assert plain.finish_reason == "stop"
    assert endless.tokens[: len(plain.tokens)] == plain.tokens


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_log_probabilities_of_policy_and_base(engine, strategy):
    params = SamplingParams(max_tokens=20, seed=1, temperature=0.8, logprobs=3, logit_bias={5: 2.0})
    (result,) = engine.generate(PROMPT, strategy, params)
    assert len(result.logprobs) == len(result.tokens)
    whole = torch.tensor([result.prompt_ids + result.tokens])
    with torch.inference_mode():
        raw = engine.model(input_ids=whole, use_cache=False).logits[0, len(result.prompt_ids) - 1 : -1].log_softmax(-1)
    for token, logp, row, base in zip(result.tokens, result.logp_policy, result.logprobs, raw, strict=True):
        (own,) = [entry for entry in row if entry.token == token]
        assert own.logprob == pytest.approx(logp, abs=1e-3)
        assert 3 <= len(row) <= 4
        for entry in row:
            assert entry.base_logprob == pytest.approx(base[entry.token].item(), abs=1e-3)


def test_log_probabilities_of_the_prompt(engine):
    result = greedy(engine, prompt_logprobs=2)
    with torch.inference_mode():
        want = engine.model(input_ids=torch.tensor([result.prompt_ids])).logits[0].log_softmax(-1)
    assert result.prompt_logprobs[0] is None
    for at, row in enumerate(result.prompt_logprobs[1:], 1):
        (own,) = [entry for entry in row if entry.token == result.prompt_ids[at]]
        assert own.logprob == pytest.approx(want[at - 1, own.token].item(), abs=1e-4)
    assert len(result.prompt_logprobs) == len(result.prompt_ids)


def test_n_samples_of_a_prompt(engine):
    params = SamplingParams(max_tokens=12, seed=4, n=3)
    found = engine.generate([PROMPT, reviews.prompts(1)[0]], None, [params, SamplingParams(max_tokens=12, seed=9)])
    assert [r.prompt for r in found] == [PROMPT] * 3 + [reviews.prompts(1)[0]]
    assert len({tuple(r.tokens) for r in found[:3]}) == 3
    assert found[0].seed == 4
    for result in found:  # each is a request like any other
        (alone,) = engine.generate(result.prompt, None, SamplingParams(max_tokens=12, seed=result.seed))
        assert (alone.tokens, alone.text) == (result.tokens, result.text)
    with pytest.raises(InputError, match="n is 3: submit each"):
        engine.submit(PROMPT, None, params)


def test_penalties_in_blocks_count_what_each_branch_has(engine):
    """A token drawn once is out of reach for that branch alone."""
    params = SamplingParams(max_tokens=30, seed=3, presence_penalty=2.0, frequency_penalty=2.0, ignore_eos=True)
    strong = SamplingParams(max_tokens=30, seed=3, repetition_penalty=1e6, ignore_eos=True)
    for result in engine.generate(PROMPT, Blockwise(4, 5), [strong]):
        before = list(result.prompt_ids)
        for block in result.blocks:
            for candidate in block.candidates:
                drawn = before + candidate.tokens
                assert len(set(drawn)) >= len(drawn) - 1 - (len(before) - len(set(before)))
            before += block.candidates[block.chosen].tokens
    assert engine.generate(PROMPT, Blockwise(4, 5), params)[0].tokens


SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("strategy", [None, Blockwise(4, 6), BestOfK(3), Tokenwise(1.0)], ids=str)
def test_a_schema_with_every_strategy(engine, strategy):
    """Every result is in it, every candidate of every block is the beginning of one that is."""
    params = [SamplingParams(max_tokens=120, seed=i, grammar={"json": SCHEMA}) for i in range(4)]
    for result in engine.generate(reviews.prompts(4), strategy, params):
        if result.finish_reason == "stop":
            jsonschema.validate(json.loads(result.text), SCHEMA)
        for block in result.blocks:
            before = engine.codec.between(result.prompt_ids, result.tokens[: block.start])
            for candidate in block.candidates:
                assert (before + candidate.text).lstrip().startswith("{")
        assert result.kl >= -1e-4


def test_what_leaves_nothing_to_draw_is_the_requests_own_fault(engine):
    grammar = SamplingParams(max_tokens=8, seed=0, grammar={"regex": "abc"}, bad_words=["a", "ab", "abc"])
    found = engine.generate([PROMPT, PROMPT], None, [grammar, SamplingParams(max_tokens=8, seed=0)], errors="return")
    assert "leaves no token to draw" in str(found[0])
    assert found[1].tokens


def test_shaped_and_plain_requests_share_steps(engine):
    plain = SamplingParams(max_tokens=20, seed=1)
    shaped = SamplingParams(max_tokens=20, seed=1, presence_penalty=1.0, logit_bias={7: 3.0})
    params, prompts = [plain, shaped] * 3, reviews.prompts(6)
    together = engine.generate(prompts, Blockwise(3, 4), params)
    for prompt, p, result in zip(prompts, params, together, strict=True):
        assert engine.generate(prompt, Blockwise(3, 4), p)[0].tokens == result.tokens
