"""What is wrong with one request is that request's own: the others end as if it had not been there."""

from __future__ import annotations

import math

import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, Engine, InputError, RequestError, SamplingParams, Tokenwise
from pyengine.rewards import lsc
from pyengine.rewards.references import References
from pyengine.scorers import RewardModel
from pyengine.worlds import reviews

PROMPTS = ["the quick brown fox", "pack my box", "sphinx", "the lazy dog jumps"]
AT_FAULT = 1
STRATEGIES = [None, Tokenwise(0.0), Blockwise(3, 4), BestOfK(3)]


def letters(prompts, completions):
    return [float(c.count("e")) for c in completions]


def raising(prompts, completions):
    if PROMPTS[AT_FAULT] in prompts:
        raise ZeroDivisionError("no such review")
    return letters(prompts, completions)


def spoiling(what):
    """A reward whose answer is spoilt wherever the prompt at fault is among those that are asked for."""

    def reward(prompts, completions):
        scores = letters(prompts, completions)
        return what(scores) if PROMPTS[AT_FAULT] in prompts else scores

    return reward


def others_are_untouched(engine, strategy, message, prompts=PROMPTS, max_tokens=12):
    """One of the prompts fails with this message; what the others give is what they give without it."""
    sampling = [SamplingParams(max_tokens=max_tokens, seed=i) for i in range(len(prompts))]
    found = engine.generate(prompts, strategy, sampling, errors="return")
    failed = found[AT_FAULT]
    assert isinstance(failed, RequestError)
    assert failed.index == AT_FAULT
    assert message in failed.reason
    assert str(failed) == f"prompt {AT_FAULT}: {failed.reason}"
    assert "\n" not in str(failed)
    rest = [i for i in range(len(prompts)) if i != AT_FAULT]
    alone = engine.generate([prompts[i] for i in rest], strategy, [sampling[i] for i in rest])
    for i, want in zip(rest, alone, strict=True):
        assert found[i].tokens == want.tokens
        assert found[i].text == want.text
        assert found[i].kl == pytest.approx(want.kl, abs=1e-5)
        assert found[i].rewards == pytest.approx(want.rewards, abs=1e-5)
        assert [b.chosen for b in found[i].blocks] == [b.chosen for b in want.blocks]
    return failed


@pytest.fixture(scope="module")
def llama(model_dirs):
    return Engine.from_pretrained(model_dirs["llama"])


@pytest.fixture
def endless(engine, monkeypatch):
    """No token ends a response."""
    monkeypatch.setattr(engine, "eos", frozenset())


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_scorer_that_raises(llama, strategy):
    llama.set_scorer([(1.0, letters), (1.0, raising)])
    failed = others_are_untouched(llama, strategy, "'raising'")
    assert "no such review" in failed.reason
    cause = failed
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, ZeroDivisionError)


@pytest.mark.parametrize("strategy", [None, Blockwise(2, 4)], ids=str)
@pytest.mark.parametrize(
    "what",
    [
        lambda scores: None,
        lambda scores: ["good"] * len(scores),
        lambda scores: [*scores, 1.0],
        lambda scores: scores[:-1],
        lambda scores: [10**400] * len(scores),
        lambda scores: [[s] for s in scores],
        lambda scores: {"score": scores},
        lambda scores: 1.0,
    ],
    ids=["None", "strings", "one more", "one fewer", "10**400", "nested", "mapping", "number"],
)
def test_a_scorer_that_returns_something_else(llama, strategy, what):
    llama.set_scorer(spoiling(what))
    others_are_untouched(llama, strategy, "'reward'")


def test_a_scorer_that_is_wrong_for_everybody(llama):
    llama.set_scorer(lambda prompts, completions: 1 / 0)
    failed = llama.generate(PROMPTS, Blockwise(2, 4), SamplingParams(max_tokens=8), errors="return")
    assert [f.index for f in failed] == [0, 1, 2, 3]
    assert all("division by zero" in f.reason for f in failed)
    llama.set_scorer(letters)
    assert llama.generate(PROMPTS, Blockwise(2, 4), SamplingParams(max_tokens=8))


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("strategy", [None, Blockwise(3, 4), BestOfK(2), Tokenwise(2.0)], ids=str)
def test_logits_that_are_not_numbers(model_dirs, strategy, waits, monkeypatch):
    engine = Engine.from_pretrained(model_dirs["llama"])
    engine.set_scorer(pyengine.PrefixScorer(64, 320))
    monkeypatch.setattr(engine._decoder, "waits", waits)
    prompts = [*PROMPTS[:AT_FAULT], "7", *PROMPTS[AT_FAULT + 1 :]]
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[engine.encode("7")] = math.nan
    failed = others_are_untouched(engine, strategy, "NaN or infinite", prompts, max_tokens=4)
    assert "at token 0" in failed.reason
    blamed = "or the scorer" if waits and isinstance(strategy, Tokenwise) else "check the checkpoint"
    assert blamed in failed.reason


def test_values_that_are_not_numbers_are_the_scorers(llama):
    scorer = pyengine.PrefixScorer(64, 320)
    with torch.no_grad():
        scorer.head.bias[7] = math.nan
    llama.set_scorer(scorer)
    with pytest.raises(RequestError, match=r"the scorer gave NaN or infinite values at token 0; check the scorer"):
        llama.generate(PROMPTS[0], Tokenwise(1.0), SamplingParams(max_tokens=2))
    assert llama.generate(PROMPTS[0], Tokenwise(0.0), SamplingParams(max_tokens=2))


@pytest.mark.parametrize("strategy", [None, Blockwise(2, 4), BestOfK(2)], ids=str)
def test_a_prompt_that_the_cache_can_never_hold(model_dirs, strategy):
    engine = Engine.from_pretrained(model_dirs["llama"], letters, cache_gb=0.0002)
    assert engine._decoder.cache.capacity < 4
    engine.codec.context = None  # of 96 tokens
    prompts = [*PROMPTS[:AT_FAULT], "z" * 200, *PROMPTS[AT_FAULT + 1 :]]
    failed = others_are_untouched(engine, strategy, "more memory (cache_gb; ", prompts)
    assert "200 tokens" in failed.reason


@pytest.mark.parametrize("strategy", [None, Blockwise(2, 8), BestOfK(2)], ids=str)
@pytest.mark.parametrize("reader", [True, False])
def test_a_candidate_longer_than_a_reward_model_reads(engine, endless, strategy, reader):
    """Also where it outgrows the model on the way, by its own cache or as text."""
    scorer = RewardModel.from_pretrained(pyengine.embedded("reward-model"))
    prompts = ["Review of the Harbour, a bakery:", "Review of the Kestrel, a desk lamp: " + "wonderful " * 20]
    prompts += ["Review of the Juniper, a kettle:"]
    scorer.longest = len(engine.encode(prompts[1])) + 2
    if not reader:
        scorer.tokenizer.add_tokens(["<another>"])  # no cache of its own where tokens may differ
    engine.set_scorer(scorer)
    assert bool(engine._readers) == reader
    failed = others_are_untouched(engine, strategy, f"reads {scorer.longest} tokens", prompts, max_tokens=6)
    assert "'reward-model'" in failed.reason


@pytest.mark.parametrize("strategy", [Tokenwise(1.0), Blockwise(2, 2), BestOfK(2)], ids=str)
def test_a_response_that_outgrows_a_prefix_model(engine, endless, strategy):
    head = pyengine.PrefixScorer(engine.policy.hidden_size, engine.policy.vocab_size)
    scorer = pyengine.PrefixModel(engine.model.base_model, engine.tokenizer, head, "values")
    prompts = reviews.prompts(3)
    prompts[AT_FAULT] += " wonderful" * 12
    scorer.longest = len(engine.encode(prompts[AT_FAULT])) + 3
    engine.set_scorer(scorer)
    others_are_untouched(engine, strategy, f"'values' reads {scorer.longest} tokens", prompts, max_tokens=6)


@pytest.mark.parametrize("strategy", [None, BestOfK(2)], ids=str)
def test_a_prompt_without_a_reference(llama, strategy):
    known = {p: [0.0, 1.0, 2.0] for i, p in enumerate(PROMPTS) if i != AT_FAULT}
    llama.set_scorer(lsc(letters, References.gaussian(known)))
    others_are_untouched(llama, strategy, "no reference for the prompt")


class TestRaise:
    def test_the_others_are_done_first_and_come_with_it(self, llama):
        llama.set_scorer(raising)
        sampling = SamplingParams(max_tokens=6, seed=1)
        with pytest.raises(RequestError, match=r"prompt 1: .*no such review") as caught:
            llama.generate(PROMPTS, BestOfK(2), sampling)
        assert [type(r).__name__ for r in caught.value.results] == ["Result", "RequestError", "Result", "Result"]
        assert caught.value.results[1] is caught.value
        assert llama.generate(PROMPTS[2], BestOfK(2), sampling)[0] == caught.value.results[2]

    def test_what_is_known_before_is_raised_before_any_is_decoded(self, llama, monkeypatch):
        llama.set_scorer(letters)
        monkeypatch.setattr(llama, "_outcomes", None)
        for prompts, message in ((["fine", ""], "prompt 1 is empty"), ([3, "fine"], "prompt 0 is not")):
            with pytest.raises(InputError, match=message):
                llama.generate(prompts)

    def test_a_prompt_that_cannot_be_read_is_returned(self, llama):
        llama.set_scorer(None)
        found = llama.generate(["the quick", "", "sphinx"], None, SamplingParams(max_tokens=3, seed=1), errors="return")
        assert "prompt 1 is empty" in str(found[1])
        assert [f.tokens for f in found[::2]] == [
            r.tokens for r in llama.generate(["the quick", "sphinx"], None, SamplingParams(max_tokens=3, seed=1))
        ]

    def test_errors_must_be_known(self, llama):
        with pytest.raises(InputError, match='errors must be "raise" or "return", got \'ignore\''):
            llama.generate("a", errors="ignore")


def test_a_stream_ends_in_its_error(llama):
    late = []

    def reward(prompts, completions):
        late.append(1)
        if len(late) == 3:
            raise ValueError("too late")
        return letters(prompts, completions)

    llama.set_scorer(reward)
    events = []
    with pytest.raises(RequestError, match=r"prompt 0: .*too late"):
        events.extend(llama.stream(PROMPTS[0], Blockwise(2, 4), SamplingParams(max_tokens=40, seed=3)))
    late[:] = [1] * 9
    events = list(llama.stream(PROMPTS[0], Blockwise(2, 4), SamplingParams(max_tokens=40, seed=3)))
    assert events[-1].result is not None


def test_results_come_as_they_are_done(llama):
    llama.set_scorer(raising)
    sampling = [SamplingParams(max_tokens=n, seed=1) for n in (12, 4, 8, 2)]
    llama.eos, eos = frozenset(), llama.eos
    try:
        seen = list(llama.as_completed(PROMPTS, None, sampling))
    finally:
        llama.eos = eos
    assert [index for index, _ in seen] == [3, 1, 2, 0]
    assert isinstance(seen[1][1], RequestError)


def test_every_event_has_its_own_block(engine):
    engine.set_scorer(reviews.sentiment)
    events = list(engine.stream(reviews.prompts(1)[0], Blockwise(3, 4), SamplingParams(max_tokens=16, seed=1)))
    assert len(events) > 2
    for event in events:
        assert event.block.candidates[event.block.chosen].tokens == event.tokens
    assert [e.block for e in events] == events[-1].result.blocks


def test_a_prompt_may_leave_room_for_one_token(model_dirs):
    engine = Engine.from_pretrained(model_dirs["llama"])
    almost = "z" * (engine.context - 1)
    assert len(engine.encode(almost)) == engine.context - 1
    (result,) = engine.generate(almost, None, SamplingParams(max_tokens=5, seed=1))
    assert len(result.tokens) == 1
    with pytest.raises(InputError, match=r"prompt 0 has 96 tokens, .* reads 96 and needs room for one more"):
        engine.generate(almost + "z")
