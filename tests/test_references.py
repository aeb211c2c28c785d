"""References: quantiles, files, canned responses, regressors on embeddings, and samples of the base policy."""

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
    Blockwise,
    FunctionScorer,
    InputError,
    LearnedReference,
    References,
    RewardModel,
    SamplingParams,
    Statistics,
    lsc,
    normalised,
)
from pyengine.evaluation.sampling import sample_rewards
from pyengine.rewards import length
from pyengine.rewards.references import prompt_embeddings
from pyengine.scorers import Candidates, Scorer
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"


class Given(Scorer):
    """The numbers that it was made with."""

    name = "given"

    def __init__(self, *scores):
        self.scores = torch.tensor(scores, dtype=torch.float32)

    def score(self, candidates):
        return self.scores


def score(scorer, prompts=(PROMPT,)):
    """Utilities of one transformed scorer."""
    return scorer.score(Candidates(prompts, [[1]] * len(prompts), {}, {}, lambda tokens: [""] * len(prompts)))


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

    def test_canned_responses_to_a_weighted_sum(self):
        def width(prompts, completions):
            return [float(len(c)) for c in completions]

        def depth(prompts, completions):
            return [float(len(p)) for p in prompts]

        found = References.canned([(0.5, width), (-3.0, depth)], ["abc"], [" No."])
        assert (found.values, found.scorer) == ({"abc": 0.5 * 4 - 3.0 * 3}, "")

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
            (lambda: References({7: math.nan}), "the reference of 7 must be"),
            (lambda: References({"a": math.nan}), "the reference of 'a' must be a finite number"),
            (lambda: References.canned(reviews.politeness, [], ["no"]), "at least one prompt and one response"),
            (
                lambda: References.canned(pyengine.embedded("probe"), ["a"], ["no"]),
                "'probe' reads hidden states or tokens",
            ),
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
            score(lsc(Given(0.0), known), ["x" * 99])


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

    @pytest.mark.parametrize("ddof", [0, 1])
    def test_the_std_is_that_of_ddof(self, ddof):
        """Two samples d apart: a std of d / 2, and of d / sqrt 2 with ddof 1."""
        embed, mean, std, rewards = self.world()
        known = LearnedReference.fit(rewards, embed, quantile=0.85, ridge=1e-10, ddof=ddof)
        for prompt in list(rewards)[:5]:
            want = mean[prompt] + scipy.stats.norm.ppf(0.85) * std[prompt] * (2**0.5 if ddof else 1)
            assert known.lookup([prompt])[0] == pytest.approx(want, abs=1e-5)

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
        with pytest.raises(InputError, match=r"must be \[2, D\], \[2\] and \[2\], got"):
            LearnedReference(made.bias, made.bias, made.bounds, embed)
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
        with pytest.raises(InputError, match="has 3 hidden states, layer 9"):
            prompt_embeddings(engine.model, engine.tokenizer, prompts, 9)
        with pytest.raises(InputError, match="the model: prompt 1 is empty"):
            prompt_embeddings(engine.model, engine.tokenizer, ["fine", ""])
        with pytest.raises(InputError, match=r"the model reads 512 tokens, prompt 1 has \d+; shorten it"):
            prompt_embeddings(engine.model, engine.tokenizer, ["fine", " wonderful" * 600])


class TestSamples:
    prompts = reviews.prompts(3)

    def test_samples_are_the_base_policys_and_the_engine_keeps_its_scorer(self, engine, monkeypatch):
        judge = pyengine.load_scorer(pyengine.embedded("reward-model"))
        engine.set_scorer(0.5 * lsc(judge, 0.2) - FunctionScorer(reviews.politeness))
        before = engine.parts
        sampling = SamplingParams(max_tokens=24, seed=7)
        monkeypatch.setattr("pyengine.evaluation.sampling.AT_ONCE", 8)  # one prompt of 5 samples at a time
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
            (["fine", ""], reviews.politeness, 2, "prompt 1 is empty"),
            (["fine"], None, 2, "needs a scorer"),
            (["fine"], reviews.politeness, 0, "samples must be a whole number"),
            (["fine"], pyengine.Probe(64), 2, "width 64"),
            (["fine"], lambda p, c: [1.0, *map(len, c)], 2, "one number for each"),
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
