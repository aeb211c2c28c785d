"""Rewards that compose: LSC and its neighbours, the algebra of scorers, references, and all of it in the engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

import pyengine
from pyengine import (
    BestOfK,
    Blockwise,
    FunctionScorer,
    InputError,
    References,
    RewardModel,
    SamplingParams,
    Statistics,
    Tokenwise,
    centred,
    log_sigmoid,
    lsc,
    normalised,
)
from pyengine.rewards import length
from pyengine.scorers import Candidates, Scorer, Sum, parts_of
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"


class Given(Scorer):
    """The numbers that it was made with."""

    def __init__(self, *scores, name="given"):
        self.scores, self.name = torch.tensor(scores, dtype=torch.float32), name

    def score(self, candidates):
        return self.scores


def candidates(count, prompts=None):
    return Candidates(prompts or [PROMPT] * count, [[1]] * count, {}, {}, lambda tokens: [""] * count)


def score(scorer, prompts=None):
    """Utilities of a scorer or a sum of them, over Given numbers."""
    parts = [(part.weight, part.term()[1]) for part in parts_of(scorer)]
    count = max(len(part.scorer.scores) for part in parts_of(scorer))
    return sum(weight * one.score(candidates(count, prompts)).double() for weight, one in parts)


def logit(p):
    return math.log(p / (1 - p))


class TestLsc:
    def test_worked_example_of_one_reward(self):
        """Odds of .999 over .99: raw 10.0909, transformed only 1.00909."""
        r = Given(logit(0.999), logit(0.99))
        raw, u = score(r), score(lsc(r, 0.0))
        assert math.exp(raw[0] - raw[1]) == pytest.approx(0.999 / 0.001 * 0.01 / 0.99, rel=1e-5)
        assert math.exp(raw[0] - raw[1]) == pytest.approx(10.0909, rel=1e-4)
        assert math.exp(u[0] - u[1]) == pytest.approx(0.999 / 0.99, rel=1e-6)

    def test_worked_example_of_two_rewards(self):
        """(.9, .9) against (.45, .99): the raw sum sees no difference, the AND prefers the first by 20/11."""
        a, b = Given(logit(0.9), logit(0.45)), Given(logit(0.9), logit(0.99))
        raw, u = score(a + b), score(lsc(a, 0.0) & lsc(b, 0.0))
        assert math.exp(raw[0] - raw[1]) == pytest.approx(1.0, rel=1e-5)
        assert math.exp(u[0] - u[1]) == pytest.approx(20 / 11, rel=1e-6)

    def test_limits_and_what_is_not_finite(self):
        reference = 0.5
        r = Given(-1e4, -50.0, reference, 30.5, 1e4, -math.inf, math.inf, math.nan)
        u = lsc(r, reference).score(candidates(8))
        assert u.dtype == torch.float32
        assert u[:3].tolist() == [-1e4 - 0.5, -50.5, pytest.approx(-math.log(2))]
        assert u[3].item() == pytest.approx(-math.exp(-30.0), rel=1e-6)
        assert u[4:7].tolist() == [0.0, -math.inf, 0.0]
        assert u[7].isnan()

    @pytest.mark.parametrize("r", [-9.0, -1.0, 0.25, 1.0, 6.0])
    def test_value_and_slope(self, r):
        """du/dr = sigmoid(r_ref - r), 1/2 at the reference."""
        scores = torch.tensor([r], requires_grad=True)
        (transform,) = lsc(Given(0.0), 0.25).transforms
        u = transform.function(scores, [PROMPT])
        u.sum().backward()
        assert u.item() == pytest.approx(scipy.special.log_expit(r - 0.25), rel=1e-6)
        assert scores.grad.item() == pytest.approx(scipy.special.expit(0.25 - r), rel=1e-6)

    def test_shifts_cancel_and_scales_do_not(self):
        torch.manual_seed(0)
        r, prompts = torch.randn(6), ["a", "b", "c"] * 2
        shift, at = {"a": 3.0, "b": -7.0, "c": 0.5}, {"a": 0.1, "b": 0.2, "c": 0.3}
        plain = lsc(Given(*r), at)
        moved = lsc(Given(*(r + torch.tensor([shift[p] for p in prompts]))), {p: at[p] + shift[p] for p in at})
        torch.testing.assert_close(score(moved, prompts), score(plain, prompts), atol=1e-5, rtol=0)
        doubled = lsc(Given(*(2 * r)), {p: 2 * at[p] for p in at})
        assert (score(doubled, prompts) - score(plain, prompts)).abs().max() > 0.1

    def test_one_reward_ranks_as_before_and_a_sum_does_not(self):
        torch.manual_seed(1)
        a, b = Given(*torch.randn(50) * 3), Given(*torch.randn(50) * 3)
        assert score(lsc(a, 0.7)).argsort().tolist() == score(a).argsort().tolist()
        assert score(centred(a, 0.7) + centred(b, -1.0)).argsort().tolist() == score(a + b).argsort().tolist()
        one, other = Given(9.0, 2.0), Given(-3.0, 2.0)  # sums 6 and 4
        assert score(one + other).argmax() == 0
        assert score(lsc(one, 0.0) & lsc(other, 0.0)).argmax() == 1

    def test_ablations(self):
        r = Given(2.0, -1.0, -math.inf)
        assert score(centred(r, {PROMPT: 0.5})).tolist() == [1.5, -1.5, -math.inf]
        assert score(log_sigmoid(r)).tolist() == pytest.approx(scipy.special.log_expit([2.0, -1.0, -np.inf]))

    def test_normalised(self):
        r = Given(5.0, 1.0, -math.inf, math.nan)
        found = score(normalised(r, Statistics(3.0, 4.0)))
        assert found[:3].tolist() == [0.5, -0.5, -math.inf]
        assert found[3].isnan()
        found = score(normalised(r, Statistics(3.0, 0.0)))
        assert found[:3].tolist() == [0.0, 0.0, -math.inf]
        assert found[3].isnan()

    def test_transforms_nest_in_the_order_written(self):
        nested = lsc(normalised(Given(5.0, name="r"), Statistics(3.0, 4.0)), 0.25)
        assert nested.name == "lsc(normalised(r))"
        assert isinstance(nested.scorer, Given)
        assert score(nested).item() == pytest.approx(scipy.special.log_expit(0.25))

    def test_length_counts_every_token_and_stops_at_the_longest(self):
        counted = Candidates([PROMPT] * 4, [[1], [1] * 7, [1] * 8, [1] * 9], {}, {}, lambda tokens: [])
        assert length(8).score(counted).tolist() == pytest.approx([math.log(1 / 8), math.log(7 / 8), 0.0, 0.0])
        assert length().score(counted)[0].item() == pytest.approx(-math.log(1024))
        with pytest.raises(InputError, match="candidate 1 comes without any"):
            length().score(Candidates([PROMPT] * 2, [[1], []], {}, {}, lambda tokens: []))


class TestAlgebra:
    a, b, c = Given(1.0, name="a"), Given(10.0, name="b"), Given(100.0, name="c")

    @pytest.mark.parametrize(
        ("make", "want"),
        [
            (lambda a, b, c: 0.7 * a, [(0.7, "a")]),
            (lambda a, b, c: a * 0.7, [(0.7, "a")]),
            (lambda a, b, c: np.float64(0.7) * a, [(0.7, "a")]),
            (lambda a, b, c: np.float64(2) * (a + b), [(2, "a"), (2, "b")]),
            (lambda a, b, c: -a, [(-1, "a")]),
            (lambda a, b, c: a + b, [(1, "a"), (1, "b")]),
            (lambda a, b, c: a - b, [(1, "a"), (-1, "b")]),
            (lambda a, b, c: a - (b - c), [(1, "a"), (-1, "b"), (1, "c")]),
            (lambda a, b, c: 0.5 * (a + b) * 4, [(2, "a"), (2, "b")]),
            (lambda a, b, c: -(0.5 * (a - 2 * b)) + c, [(-0.5, "a"), (1, "b"), (1, "c")]),
            (lambda a, b, c: (a + b) + (b + c), [(1, "a"), (1, "b"), (1, "b-2"), (1, "c")]),
            (lambda a, b, c: [(2.0, a + b), (1.0, -c)], [(2, "a"), (2, "b"), (-1, "c")]),
            (lambda a, b, c: a - [(3.0, b)], [(1, "a"), (-3, "b")]),
            (lambda a, b, c: [(3.0, b)] - a, [(3, "b"), (-1, "a")]),
            (lambda a, b, c: 0.1 * a + 0.9 * b, [(0.1, "a"), (0.9, "b")]),
            (lambda a, b, c: a + reviews.sentiment, [(1, "a"), (1, "sentiment")]),
            (lambda a, b, c: reviews.sentiment - 2 * a, [(1, "sentiment"), (-2, "a")]),
            (lambda a, b, c: pyengine.embedded("probe") + a, [(1, "probe"), (1, "a")]),
            (lambda a, b, c: str(pyengine.embedded("probe")) - a, [(1, "probe"), (-1, "a")]),
        ],
    )
    def test_sums(self, make, want):
        parts = parts_of(make(self.a, self.b, self.c))
        assert [part.name for part in parts] == [name for _, name in want]
        assert [part.weight for part in parts] == pytest.approx([weight for weight, _ in want])

    def test_the_algebra_is_that_of_numbers(self):
        a, b, c = self.a, self.b, self.c
        assert score(0.5 * (a - 2 * b) - (c - a) * 3).item() == 0.5 * (1 - 20) - 99 * 3
        assert score(-(a + b) + c - -c).item() == 189

    def test_weighted_sum_of_two_rewards_is_the_baseline_of_lsc(self):
        for w in (0.1, 0.5, 0.9):
            assert score(w * self.a + (1 - w) * self.b).item() == pytest.approx(w + (1 - w) * 10)

    def test_heads_have_operators_too(self):
        probe = pyengine.load_scorer(pyengine.embedded("probe"))
        assert [(p.weight, p.scorer) for p in parts_of(2 * probe - self.a)] == [(2, probe), (-1, self.a)]

    def test_and_is_the_sum_of_log_probabilities(self):
        a, b, c = lsc(self.a, 0.0), log_sigmoid(self.b), lsc(centred(self.c, 1.0), 2.0)
        joint = a & b & c
        assert isinstance(joint, Sum)
        assert [(p.weight, p.name) for p in parts_of(joint)] == [
            (1, "lsc(a)"),
            (1, "log_sigmoid(b)"),
            (1, "lsc(centred(c))"),
        ]
        assert score(joint).item() == pytest.approx(sum(scipy.special.log_expit([1.0, 10.0, 97.0])))
        assert [p.name for p in parts_of(a & (b & c))] == [p.name for p in parts_of(joint)]
        assert [p.weight for p in parts_of(0.5 * (a & b))] == [0.5, 0.5]

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda a, b: a & lsc(b, 0.0), "a"),
            (lambda a, b: lsc(a, 0.0) & b, "b"),
            (lambda a, b: lsc(a, 0.0) & 0.5 * lsc(b, 0.0), r"lsc\(b\)"),
            (lambda a, b: lsc(a, 0.0) & (lsc(a, 0.0) + b), "b"),
            (lambda a, b: lsc(a, 0.0) & centred(b, 0.0), r"centred\(b\)"),
            (lambda a, b: normalised(lsc(a, 0.0), Statistics(0.0, 1.0)) & lsc(b, 0.0), r"normalised\(lsc\(a\)\)"),
            (lambda a, b: reviews.sentiment & lsc(a, 0.0), "sentiment"),
            (lambda a, b: lsc(a, 0.0) & pyengine.embedded("probe"), ".*probe"),
        ],
    )
    def test_and_of_raw_scores_is_refused(self, make, name):
        with pytest.raises(InputError, match=rf"& joins log-probabilities .*{name}'.* lsc\(scorer, reference\)"):
            make(self.a, self.b)

    @pytest.mark.parametrize(
        "make",
        [
            lambda a: a + 1,
            lambda a: 0.5 - a,
            lambda a: a & True,
            lambda a: a + None,
            lambda a: math.nan * a,
            lambda a: a * a,
            lambda a: "0.5" * a,
        ],
    )
    def test_what_is_no_scorer_or_no_number_is_refused(self, make):
        with pytest.raises(InputError, match="scorer") as caught:
            make(self.a)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("transform", [log_sigmoid, lambda s: lsc(s, 0.0), lambda s: centred(s, 0.0)])
    @pytest.mark.parametrize("make", [lambda a, b: 0.5 * a + 0.5 * b, lambda a, b: 2 * a, lambda a, b: None])
    def test_a_transformed_sum_is_refused(self, transform, make):
        with pytest.raises(InputError, match=r"takes one scorer of weight 1, got (0\.5 \* a \+ 0\.5 \* b|2 \* a|none)"):
            transform(make(self.a, self.b))


class Recomputed(Scorer):
    """A reward model that is always asked for text, as one with another tokenizer is."""

    def __init__(self, judge):
        self.judge, self.name = judge, judge.name

    def score(self, candidates):
        return self.judge.score(candidates)


@pytest.fixture(scope="module")
def judge():
    return RewardModel.from_pretrained(pyengine.embedded("reward-model"))


class TestEngine:
    prompts = reviews.prompts(3)

    @pytest.fixture
    def known(self):
        """Different references for every prompt, for the judge and for politeness."""
        values = {p: 0.5 * i - 0.3 for i, p in enumerate(self.prompts)}
        return References(values, "reward-model"), References({p: 0.2 * v for p, v in values.items()}, "politeness")

    @pytest.mark.parametrize("strategy", [Blockwise(4, 12), BestOfK(4), Blockwise(3, 16, "softmax", 0.5)], ids=str)
    def test_two_transformed_rewards_end_to_end(self, engine, judge, known, strategy):
        """The judge's branching reader serves the AND and gives what reading the text anew gives."""
        sampling = SamplingParams(max_tokens=40, seed=4)
        engine.set_scorer(lsc(judge, known[0]) & lsc(FunctionScorer(reviews.politeness), known[1]))
        assert len(engine._readers) == 1
        read = []
        reader = next(iter(engine._readers.values()))
        original = reader.score
        reader.score = lambda tails, eos: read.append(len(tails)) or original(tails, eos)
        found = engine.generate(self.prompts, strategy, sampling)
        assert read
        engine.set_scorer(lsc(Recomputed(judge), known[0]) & lsc(FunctionScorer(reviews.politeness), known[1]))
        assert not engine._readers
        want = engine.generate(self.prompts, strategy, sampling)
        for a, b in zip(found, want, strict=True):
            assert a.tokens == b.tokens
            assert set(a.rewards) == {"lsc(reward-model)", "lsc(politeness)"}
            assert a.rewards == pytest.approx(b.rewards, abs=1e-3)
            assert a.reward == pytest.approx(sum(a.rewards.values()), abs=1e-6)
            for mine, theirs in zip(a.blocks, b.blocks, strict=True):
                assert mine.chosen == theirs.chosen
                for one, other in zip(mine.candidates, theirs.candidates, strict=True):
                    assert one.scores == pytest.approx(other.scores, abs=1e-3)
                    assert one.utility == pytest.approx(sum(one.scores.values()), abs=1e-5)
        # The utilities of a whole response are those of its text.
        for result in found:
            ids = judge.tokenizer(result.prompt + result.text, return_tensors="pt")
            with torch.inference_mode():
                raw = judge.model(**ids).logits.item()
            polite = reviews.politeness_of(result.text)
            assert result.rewards == pytest.approx(
                {
                    "lsc(reward-model)": scipy.special.log_expit(raw - known[0].values[result.prompt]),
                    "lsc(politeness)": scipy.special.log_expit(polite - known[1].values[result.prompt]),
                },
                abs=1e-3,
            )

    def test_one_branch_is_scored_at_its_end(self, engine, judge, known):
        engine.set_scorer(2 * lsc(judge, known[0]) + length(64))
        for strategy in (None, BestOfK(1)):
            (result,) = engine.generate(self.prompts[:1], strategy, SamplingParams(max_tokens=20, seed=1))
            ids = judge.tokenizer(result.prompt + result.text, return_tensors="pt")
            with torch.inference_mode():
                u = scipy.special.log_expit(judge.model(**ids).logits.item() - known[0].values[result.prompt])
            assert result.rewards["lsc(reward-model)"] == pytest.approx(u, abs=1e-4)
            assert result.rewards["length"] == pytest.approx(math.log(len(result.tokens) / 64), abs=1e-6)
            assert result.reward == pytest.approx(2 * u + result.rewards["length"], abs=1e-4)

    def test_one_reward_is_followed_as_without_lsc(self, engine):
        sampling = SamplingParams(max_tokens=40, seed=2)
        engine.set_scorer(reviews.sentiment)
        want = engine.generate(self.prompts, BestOfK(6), sampling)
        engine.set_scorer(lsc(reviews.sentiment, {p: 0.3 for p in self.prompts}))
        found = engine.generate(self.prompts, BestOfK(6), sampling)
        assert [r.tokens for r in found] == [r.tokens for r in want]
        assert [r.kl for r in found] == [r.kl for r in want]

    def test_a_scorer_in_two_terms_is_asked_once(self, engine):
        calls = []

        def asked(prompts, completions):
            calls.append(len(completions))
            return [float(len(c)) for c in completions]

        scorer = FunctionScorer(asked)
        engine.set_scorer(scorer - 2 * lsc(scorer, 30.0))
        (result,) = engine.generate(self.prompts[:1], BestOfK(3), SamplingParams(max_tokens=16, seed=1))
        assert calls == [3]
        for candidate in result.blocks[0].candidates:
            u = scipy.special.log_expit(len(candidate.text) - 30.0)
            assert candidate.scores == pytest.approx({"asked": len(candidate.text), "lsc(asked)": u}, abs=1e-5)
            assert candidate.utility == pytest.approx(len(candidate.text) - 2 * u, abs=1e-4)

    def test_a_prompt_without_a_reference_is_refused_before_any_is_decoded(self, engine, known):
        calls = []
        scorer = FunctionScorer(lambda prompts, completions: calls.append(1) or [0.0] * len(prompts), "politeness")
        engine.set_scorer(lsc(scorer, known[1]))
        for strategy in (None, BestOfK(2)):
            with pytest.raises(InputError, match="no reference for the prompt 'Who are you'"):
                engine.generate([*self.prompts, "Who are you"], strategy, SamplingParams(max_tokens=4))
        assert not calls
        assert engine.generate(self.prompts[:1], BestOfK(2), SamplingParams(max_tokens=4, seed=1))

    def test_tokenwise_refuses_transforms(self, engine):
        engine.set_scorer([(1.0, lsc(pyengine.embedded("prefix"), 0.0))])
        with pytest.raises(InputError, match=r"Tokenwise cannot follow 'lsc\(prefix\)'.*train a prefix scorer on") as e:
            engine.generate(PROMPT, Tokenwise(1.0))
        assert "\n" not in str(e.value)
        result = engine.generate(PROMPT, Tokenwise(0.0), SamplingParams(max_tokens=4, seed=1))[0]
        assert result.rewards["lsc(prefix)"] < 0
        engine.set_scorer(2 * pyengine.load_scorer(pyengine.embedded("prefix")))
        assert engine.generate(PROMPT, Tokenwise(1.0), SamplingParams(max_tokens=4, seed=1))[0].kl > 0

    def test_a_transformed_head_still_fits_or_not(self, engine):
        with pytest.raises(InputError, match="width 64"):
            engine.set_scorer(lsc(pyengine.Probe(64), 0.0))
        engine.set_scorer(lsc(pyengine.embedded("probe"), 0.1))
        found = engine.generate(PROMPT, Blockwise(3, 8), SamplingParams(max_tokens=16, seed=1))[0]
        engine.set_scorer(pyengine.embedded("probe"))
        want = engine.generate(PROMPT, Blockwise(3, 8), SamplingParams(max_tokens=16, seed=1))[0]
        assert found.tokens == want.tokens
        assert found.reward == pytest.approx(scipy.special.log_expit(want.reward - 0.1), abs=1e-5)
