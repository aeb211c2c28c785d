"""Rewards that compose: LSC and its neighbours, the algebra of scorers, references, and all of it in the engine."""

from __future__ import annotations

import dataclasses
import json
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
    Engine,
    FunctionScorer,
    InputError,
    LearnedReference,
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
from pyengine.references import prompt_embeddings
from pyengine.rewards import length, sample_rewards
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
            (lambda a, b, c: a + [(3.0, b)], [(1, "a"), (3, "b")]),
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


REWARDS = {"a": [0.3, -1.0, 2.5, 0.0, 1.0], "b": [4.0], "c": [0.1, 0.1, 0.1]}


class TestReferences:
    @pytest.mark.parametrize("quantile", [0.0, 0.5, 0.85, 0.95, 1.0])
    def test_empirical_is_numpys_quantile(self, quantile):
        found = References.empirical(REWARDS, quantile, scorer="judge")
        assert found.values == pytest.approx({p: np.quantile(r, quantile) for p, r in REWARDS.items()})
        assert (found.scorer, found.method, found.quantile, found.samples) == ("judge", "empirical", quantile, 1)

    @pytest.mark.parametrize(("quantile", "score"), [(0.5, 0.0), (0.75, 0.6745), (0.85, 1.0364), (0.95, 1.6449)])
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_gaussian_is_mean_plus_quantile_times_std(self, quantile, score, ddof):
        found = References.gaussian(REWARDS, quantile, ddof)
        r = REWARDS["a"]
        assert found.values["a"] == pytest.approx(np.mean(r) + scipy.stats.norm.ppf(quantile) * np.std(r, ddof=ddof))
        assert found.values["a"] == pytest.approx(np.mean(r) + score * np.std(r, ddof=ddof), abs=1e-4)
        assert found.values["b"] == 4.0
        assert found.values["c"] == pytest.approx(0.1, abs=1e-15)
        assert (found.method, found.quantile, found.ddof, found.samples) == ("gaussian", quantile, ddof, 1)

    def test_statistics(self):
        r = REWARDS["a"]
        for ddof in (0, 1):
            found = Statistics.of(r, ddof)
            assert (found.mean, found.std) == pytest.approx((np.mean(r), np.std(r, ddof=ddof)))
            assert (found.ddof, found.count) == (ddof, 5)
        assert Statistics.of([0.1] * 3, 1).std == Statistics.of([2.0], 1).std == 0.0

    def test_files_hold_all_of_it(self, tmp_path):
        for made in (
            References.gaussian(REWARDS, 0.9, 1, "judge"),
            References.empirical(REWARDS),
            References({"caf\ud800": 1.5}),
        ):
            made.save(tmp_path / "new" / "references.json")
            assert References.load(tmp_path / "new" / "references.json") == made
        assert score(lsc(Given(1.5), tmp_path / "new" / "references.json"), ["caf\ud800"]).item() == pytest.approx(
            -math.log(2)
        )
        statistics = Statistics.of(REWARDS["a"], 1)
        statistics.save(tmp_path / "statistics.json")
        assert Statistics.load(tmp_path / "statistics.json") == statistics
        standard = normalised(Given(statistics.mean), tmp_path / "statistics.json")
        assert score(standard).item() == pytest.approx(0.0, abs=1e-7)

    def test_canned_responses_are_drawn_by_the_prompt(self):
        prompts = [f"prompt {i}" for i in range(400)]
        refusals = [" I cannot.", " No.", " Sorry, that is not for me."]
        seen = []

        def asked(prompts, completions):
            seen.extend(zip(prompts, completions, strict=True))
            return [float(len(p) + 100 * len(c)) for p, c in zip(prompts, completions, strict=True)]

        found = References.canned(asked, prompts, refusals)
        assert found.values == {p: float(len(p) + 100 * len(c)) for p, c in seen}
        assert (found.scorer, found.method) == ("asked", "canned")
        backwards = References.canned(asked, prompts[::-1] + prompts[:1], refusals)
        assert backwards.values == found.values
        assert References.canned(asked, prompts, refusals, seed=1).values != found.values
        counts = [sum(c == refusal for _, c in seen[:400]) for refusal in refusals]
        assert min(counts) > 133 - 4 * 9.4  # standard error of a third of 400 draws

    def test_canned_responses_to_a_reward_model(self):
        judge = RewardModel.from_pretrained(pyengine.embedded("reward-model"))
        found = References.canned(judge, [PROMPT], [" The bread was lovely."])
        ids = judge.tokenizer(PROMPT + " The bread was lovely.", return_tensors="pt")
        with torch.inference_mode():
            assert found.values[PROMPT] == pytest.approx(judge.model(**ids).logits.item(), abs=1e-4)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: References.empirical({}), "at least one prompt"),
            (lambda: References.empirical({"a": [1.0], "b" * 50: []}), r"prompt 'b{40}'\.\.\. has no rewards"),
            (lambda: References.gaussian({"a": [1.0, math.nan]}), "prompt 'a': reward 1 must be a finite number"),
            (lambda: References.empirical({"a": [None]}), "prompt 'a': reward 0 must be"),
            (lambda: References.empirical(REWARDS, 1.5), "quantile must be a finite number in 0 .. 1"),
            (lambda: References.gaussian(REWARDS, 1.0), "must lie between 0 and 1"),
            (lambda: References.gaussian(REWARDS, ddof=-1), "ddof must be a whole number"),
            (lambda: References({"a": math.nan}), "the reference of 'a' must be a finite number"),
            (lambda: References.canned(reviews.length, [], ["no"]), "at least one prompt and one response"),
            (lambda: References.canned(pyengine.embedded("probe"), ["a"], ["no"]), "'probe' reads the base policy's"),
            (lambda: References.canned(length(), ["a"], ["no"]), "'length' counts tokens"),
            (lambda: Statistics.of([]), "at least one reward"),
            (lambda: Statistics.of([0.0, math.inf]), "reward 1 must be a finite number"),
            (lambda: lsc(Given(0.0), Given(0.0)), "neither References, a mapping nor a path must be"),
            (lambda: lsc(Given(0.0), "/no/such/file.json"), "references /no/such/file.json"),
            (lambda: lsc(Given(0.0), pyengine.embedded("policy")), r"use LearnedReference\.load"),
            (lambda: lsc(Given(0.0), References({"a": 1.0}, scorer="judge")), "made with scorer 'judge', not with 'gi"),
            (lambda: normalised(Given(0.0), 3.0), "takes Statistics"),
        ],
    )
    def test_bad_input(self, make, message):
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text", ["{", "[1]", "{}", '{"values": [1]}', '{"values": {"a": "x"}}', '{"values": {}, "colour": 1}']
    )
    def test_damaged_files(self, tmp_path, text):
        path = tmp_path / "references.json"
        path.write_text(text)
        for load in (References.load, Statistics.load):
            with pytest.raises(InputError, match=rf"(references|statistics) {path}: ") as caught:
                load(path)
            assert "\n" not in str(caught.value)

    def test_a_prompt_without_a_reference_is_named(self):
        known = References({"a": 1.0})
        assert known.lookup(["a", "a"]) == [1.0, 1.0]
        with pytest.raises(InputError, match=r"no reference for the prompt 'x{40}'\.\.\.: .*sample_rewards"):
            lsc(Given(0.0), known).score(candidates(1, ["x" * 99]))


class TestLearnedReference:
    def world(self, count=60, width=5):
        """Prompts whose mean and log std are affine in an embedding, with two samples that have exactly these."""
        torch.manual_seed(0)
        x = {f"prompt {i}": torch.randn(width, dtype=torch.float64) for i in range(count)}
        direction, tilt = torch.randn(2, width, dtype=torch.float64)
        mean = {p: (direction @ v).item() + 3.0 for p, v in x.items()}
        std = {p: math.exp(0.3 * (tilt @ v).item() - 1.0) for p, v in x.items()}
        rewards = {p: [mean[p] - std[p], mean[p] + std[p]] for p in x}
        return lambda prompts: torch.stack([x[p] for p in prompts]), mean, std, rewards

    def test_recovers_a_linear_truth_on_unseen_prompts(self):
        embed, mean, std, rewards = self.world()
        seen = dict(list(rewards.items())[:40])
        known = LearnedReference.fit(seen, embed, quantile=0.85, ridge=1e-10)
        known.bounds = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
        for prompt in rewards:
            want = mean[prompt] + scipy.stats.norm.ppf(0.85) * std[prompt]
            assert known.lookup([prompt])[0] == pytest.approx(want, abs=1e-6)

    def test_the_spread_stays_within_what_was_seen(self):
        embed, mean, std, rewards = self.world()
        known = LearnedReference.fit(rewards, embed, ridge=1e-10)
        known.embed = lambda prompts: 1e3 * embed(prompts)
        score = scipy.stats.norm.ppf(0.85)
        for prompt, found in zip(rewards, known.lookup(list(rewards)), strict=True):
            direction = 1e3 * (mean[prompt] - 3.0) + 3.0
            assert score * min(std.values()) - 1e-4 <= found - direction <= score * max(std.values()) + 1e-4

    def test_ridge_is_that_of_the_normal_equations(self):
        embed, mean, _, rewards = self.world(12)
        x = embed(list(rewards)).numpy()
        centre = x - x.mean(0)
        y = np.array(list(mean.values()))
        penalty = 0.5 * (centre**2).sum() / x.shape[1]
        w = np.linalg.solve(centre.T @ centre + penalty * np.eye(5), centre.T @ (y - y.mean()))
        known = LearnedReference.fit(rewards, embed, ridge=0.5)
        np.testing.assert_allclose(known.weight[0], w, atol=1e-12)
        assert known.bias[0].item() == pytest.approx(y.mean() - x.mean(0) @ w)
        assert LearnedReference.fit(rewards, lambda p: 7 * embed(p), ridge=0.5).lookup(list(rewards)) == pytest.approx(
            known.lookup(list(rewards))
        )

    def test_rewards_without_spread_and_prompts_without_difference(self):
        embed, mean, _, _ = self.world(20)
        flat = LearnedReference.fit({p: [m, m] for p, m in mean.items()}, embed, ridge=1e-10)
        assert flat.lookup(list(mean)) == pytest.approx(list(mean.values()))
        equal = LearnedReference.fit({"a": [0.0, 2.0], "b": [2.0, 4.0]}, lambda p: torch.ones(len(p), 3), quantile=0.5)
        assert equal.lookup(["a", "c"]) == pytest.approx([2.0, 2.0])

    def test_survives_the_disk_and_embeds_each_prompt_once(self, tmp_path):
        embed, _, _, rewards = self.world()
        made = LearnedReference.fit(rewards, embed, 0.75, scorer="given")
        made.save(tmp_path / "learned")
        asked = []
        again = LearnedReference.load(tmp_path / "learned", lambda p: asked.extend(p) or embed(p))
        prompts = list(rewards)[:3]
        assert again.lookup(prompts * 2) == made.lookup(prompts * 2)
        again.lookup(prompts)
        assert asked == prompts
        assert (again.quantile, again.scorer) == (0.75, "given")
        u = score(lsc(Given(0.0, 1.0, 2.0), again), prompts)
        want = scipy.special.log_expit(np.array([0.0, 1.0, 2.0]) - made.lookup(prompts))
        assert u.tolist() == pytest.approx(want, rel=1e-5)

    def test_bad_input(self, tmp_path):
        embed, _, _, rewards = self.world()
        made = LearnedReference.fit(rewards, embed)
        made.save(tmp_path)
        for wrong, message in (
            (lambda p: torch.zeros(len(p), 4), "of width 5, embed gives 4"),
            (lambda p: torch.zeros(3), r"embed must give finite \[1, D\]"),
            (lambda p: torch.full((len(p), 5), math.nan), r"embed must give finite \[1, D\]"),
        ):
            with pytest.raises(InputError, match=message):
                LearnedReference.load(tmp_path, wrong).lookup(["a"])
        with pytest.raises(InputError, match="ridge must be"):
            LearnedReference.fit(rewards, embed, ridge=0.0)
        with pytest.raises(InputError, match="prompt 'a': reward 0"):
            LearnedReference.fit({"a": [math.nan]}, embed)
        (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
        with pytest.raises(InputError, match=f"learned reference {tmp_path}: "):
            LearnedReference.load(tmp_path, embed)
        with pytest.raises(InputError, match="learned reference /no/such"):
            LearnedReference.load("/no/such", embed)

    def test_prompt_embeddings_are_those_of_each_prompt_alone(self, engine):
        prompts = [*reviews.prompts(33), "Review", "A much longer prompt than the others, with many words in it:"]
        for layer in (-1, 1):
            found = prompt_embeddings(engine.model, engine.tokenizer, prompts, layer)
            assert found.shape == (35, engine.policy.hidden_size)
            assert found.dtype == torch.float32
            for i in (0, 7, 33, 34):
                ids = engine.tokenizer(prompts[i], return_tensors="pt").input_ids
                with torch.inference_mode():
                    want = engine.model(ids, output_hidden_states=True).hidden_states[layer][0, -1]
                torch.testing.assert_close(found[i], want, atol=1e-4, rtol=1e-4)
        with pytest.raises(InputError, match="layer 9 is not there"):
            prompt_embeddings(engine.model, engine.tokenizer, prompts, 9)
        with pytest.raises(InputError, match="no tokens"):
            prompt_embeddings(engine.model, engine.tokenizer, ["fine", ""])


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
        assert list(engine._readers) == [0]
        read = []
        reader = engine._readers[0]
        original = reader.score
        reader.score = lambda tails: read.append(len(tails)) or original(tails)
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
            with pytest.raises(InputError, match="no reference for the prompt 'Who is this?'"):
                engine.generate([*self.prompts, "Who is this?"], strategy, SamplingParams(max_tokens=4))
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

    def test_samples_are_the_base_policys_and_the_engine_keeps_its_scorer(self, engine, judge, known, monkeypatch):
        engine.set_scorer(0.5 * lsc(judge, known[0]) - FunctionScorer(reviews.length))
        before = engine.parts
        sampling = SamplingParams(max_tokens=24, seed=7)
        monkeypatch.setattr("pyengine.rewards.AT_ONCE", 8)  # one group for each prompt, then two
        found = sample_rewards(engine, [*self.prompts, self.prompts[0]], reviews.sentiment, 5, sampling)
        assert engine.parts == before
        assert {p: len(r) for p, r in found.items()} == {p: 5 for p in self.prompts}
        engine.set_scorer(None)
        for prompt, rewards in found.items():
            params = [dataclasses.replace(sampling, seed=7 + j) for j in range(5)]
            results = engine.generate([prompt] * 5, None, params)
            assert rewards == pytest.approx([reviews.sentiment_of(r.text) for r in results], abs=1e-6)
        assert json.loads(json.dumps(found)) == found
        assert len(References.gaussian(found).values) == 3

    def test_samples_refuse_bad_input_and_put_the_scorer_back(self, engine):
        engine.set_scorer(reviews.sentiment)
        before = engine.parts
        for prompts, scorer, samples, message in (
            (["fine", ""], reviews.length, 2, "prompt 1 is empty"),
            (["fine"], None, 2, "needs a scorer"),
            (["fine"], reviews.length, 0, "samples must be a whole number"),
            (["fine"], pyengine.Probe(64), 2, "width 64"),
            (["fine"], lambda p, c: [1.0], 2, "one number for each"),
        ):
            with pytest.raises(InputError, match=message):
                sample_rewards(engine, prompts, scorer, samples, SamplingParams(max_tokens=3, seed=1))
            assert engine.parts == before

    def test_a_learned_reference_embeds_with_the_engines_own_model(self, engine):
        """Also while the engine decodes: its model is lent then, so all prompts are embedded before."""
        sampling = SamplingParams(max_tokens=24, seed=7)
        rewards = sample_rewards(engine, reviews.prompts(12), reviews.sentiment, 4, sampling)
        known = LearnedReference.fit(
            rewards, lambda p: prompt_embeddings(engine.model, engine.tokenizer, p), scorer="sentiment"
        )
        engine.set_scorer(lsc(reviews.sentiment, known))
        prompts = reviews.prompts(20)[12:]
        for result in engine.generate(prompts, Blockwise(2, 8), sampling):
            want = scipy.special.log_expit(reviews.sentiment_of(result.text) - known.lookup([result.prompt])[0])
            assert result.reward == pytest.approx(want, abs=1e-5)

    def test_copies_of_the_prefix_serve_transforms_too(self, model_dirs):
        engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
        engine.set_scorer(lsc(lambda p, c: [float(len(x)) for x in c], {"sphinx": 3.0}))
        result = engine.generate("sphinx", BestOfK(2), SamplingParams(max_tokens=6, seed=1))[0]
        assert result.reward == pytest.approx(scipy.special.log_expit(len(result.text) - 3.0), abs=1e-5)
