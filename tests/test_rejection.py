"""Rejection sampling: its law, the draws that it takes, and a bound that does not hold."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import pyengine
from pyengine import InputError, SamplingParams, Scorer
from pyengine.evaluation.rejection import rejection_sample
from pyengine.worlds import reviews


class Levels(Scorer):
    """Utility 0, .7 or 1.4 by the first token's remainder."""

    name = "levels"

    def score(self, candidates):
        return torch.tensor([0.7 * (tokens[0] % 3) for tokens in candidates.tokens])


class TestRejection:
    def test_law_and_number_of_draws_are_exact(self, engine):
        """One token from 745, in three levels of utility: 1,000 draws, standard errors of at most .016 and .085."""
        engine.set_scorer(Levels())
        (prompt,), beta, bound, n = reviews.prompts(1), 0.6, 1.5, 1000
        params = [SamplingParams(max_tokens=1, seed=i) for i in range(n)]
        found = rejection_sample(engine, [prompt] * n, bound, beta, batch=4, sampling=params)
        with torch.inference_mode():
            logits = engine.model(torch.tensor([engine.encode(prompt)])).logits[0, -1].double()
        level = torch.arange(len(logits)) % 3
        base = torch.zeros(3, dtype=torch.float64).index_add(0, level, logits.softmax(-1))
        weight = (0.7 * torch.arange(3, dtype=torch.float64) / beta).exp()
        mean = (base @ weight).item()  # E_p0 exp(Q / beta)
        for i in range(3):
            p = (base[i] * weight[i]).item() / mean
            share = sum(a.result.tokens[0] % 3 == i for a in found) / n
            assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
            assert abs(base[i].item() - p) > 0.02  # the base policy would fail this test
        expected = math.exp(bound / beta) / mean
        error = math.sqrt((1 - 1 / expected) * expected**2 / n)  # of a geometric law's mean
        assert abs(sum(a.draws for a in found) / n - expected) < 4 * error
        assert expected < 0.8 * math.exp(bound / beta)  # not M
        assert all(a.exact and a.highest <= 1.4001 for a in found)

    def test_the_batch_changes_no_response(self, engine):
        engine.set_scorer(pyengine.embedded("probe"))
        prompts, options = reviews.prompts(5), {"bound": 1.0, "beta": 0.5, "sampling": SamplingParams(24, seed=3)}
        runs = [rejection_sample(engine, prompts, batch=batch, **options) for batch in (2, 7)]
        assert [(a.result.tokens, a.draws) for a in runs[0]] == [(a.result.tokens, a.draws) for a in runs[1]]
        alone = rejection_sample(engine, prompts[3], batch=3, **options)
        assert alone[0].result.tokens == runs[0][3].result.tokens

    def test_a_bound_that_is_passed_is_reported(self, engine):
        engine.set_scorer(Levels())
        with pytest.warns(RuntimeWarning, match=r"bound 0.1 \(up to [\d.]+\) at \d of 4 prompts, first at prompt \d"):
            found = rejection_sample(engine, reviews.prompts(4), 0.1, 0.5, sampling=SamplingParams(1, seed=0))
        assert any(not a.exact and a.highest > 0.1 for a in found)

    @pytest.mark.parametrize(("over", "exact"), [(1e-7, True), (0.01, False), (0.2, False)])
    def test_the_bound_holds_to_a_rounding(self, engine, over, exact):
        engine.set_scorer(lambda prompts, completions: [1.0 + over] * len(prompts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = rejection_sample(engine, "The", 1.0, 1.0, sampling=SamplingParams(2, seed=0))
        assert found.exact == exact
        assert found.highest == pytest.approx(1.0 + over, abs=1e-6)

    def test_the_highest_utility_is_that_of_all_draws(self, engine):
        """Those that were decoded beside the accepted one count: a bound that they pass does not hold."""
        seen = []

        def rising(prompts, completions):
            seen.extend(completions)
            return [float(len(seen) - len(completions) + i) for i in range(len(completions))]

        engine.set_scorer(rising)
        with pytest.warns(RuntimeWarning, match="passed the bound"):
            (found,) = rejection_sample(engine, "The", 0.0, 1.0, batch=6, sampling=SamplingParams(2, seed=0))
        assert found.draws == 1
        assert found.result.reward < 5
        assert found.highest == 5.0
        assert not found.exact

    def test_running_out_of_draws_names_the_prompt(self, engine):
        prompts = ["The", "My"]
        engine.set_scorer(lambda prompts, completions: [5.0 if p == "The" else 0.0 for p in prompts])
        with pytest.raises(InputError, match=r"prompt 1: none of 20 draws was accepted \(highest utility 0, bound 5"):
            rejection_sample(engine, prompts, 5.0, 0.1, max_draws=20, sampling=SamplingParams(2, seed=0))

    def test_nan_is_never_accepted(self, engine):
        engine.set_scorer(lambda prompts, completions: [math.nan] * len(prompts))
        with (
            pytest.warns(RuntimeWarning, match="NaN"),
            pytest.raises(InputError, match="none of 5 draws was accepted"),
        ):
            rejection_sample(engine, "The", 0.0, 1.0, max_draws=5, sampling=SamplingParams(2, seed=0))

    def test_parameters(self, engine):
        with pytest.raises(InputError, match="needs a scorer"):
            rejection_sample(engine, "The", 1.0, 1.0)
        engine.set_scorer(Levels())
        with pytest.raises(InputError, match="beta must be above 0"):
            rejection_sample(engine, "The", 1.0, 0.0)
        with pytest.raises(InputError, match="prompt 1 is empty"):  # of those given, not of all draws
            rejection_sample(engine, ["The", ""], 1.0, 1.0)
        with pytest.raises(InputError, match="2 prompts but 1 SamplingParams"):
            rejection_sample(engine, ["The", "My"], 1.0, 1.0, sampling=[SamplingParams()])


def test_a_utility_at_the_bound_is_exact(embedded_engine, recwarn):
    """.1 as fp32 lies above .1."""
    embedded_engine.set_scorer(lambda prompts, completions: [0.1] * len(prompts))
    (found,) = rejection_sample(
        embedded_engine, "Review of the Harbour, a bakery:", 0.1, 1.0, sampling=SamplingParams(8, seed=0)
    )
    assert found.exact
    assert not recwarn.list
