"""What the embedded models must show, and that they can be retrained to the same bits."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, InputError, SamplingParams, Tokenwise
from pyengine.demo import compare
from pyengine.named import scorer_named
from pyengine.training import embedded
from pyengine.worlds import reviews


@pytest.fixture(scope="module")
def rows():
    """The demo's five rows on 64 prompts."""
    return compare(prompts=64, k=8, block=16, weight=4.0, seed=0)


def test_every_strategy_raises_the_exact_sentiment(rows):
    base = rows[0]
    for row in rows[1:]:
        gain = [a - b for a, b in zip(row.sentiments, base.sentiments, strict=True)]
        error = statistics.stdev(gain) / len(gain) ** 0.5
        assert statistics.mean(gain) > 4 * error, row.name


def test_kl_is_reported_for_every_strategy(rows):
    base, tokenwise, blockwise, best, probe = rows
    assert all(r.kl == 0 for r in base.results)
    assert all(0 < r.kl < 10 and r.kl_kind == "exact" for r in tokenwise.results)
    for row in (blockwise, best, probe):
        assert all(0 < r.kl < 10 and r.kl_kind == "bound" for r in row.results)


def test_base_policy_is_mixed_on_all_rewards(rows):
    texts = [r.text for r in rows[0].results]
    assert abs(statistics.mean(map(reviews.sentiment_of, texts))) < 0.3
    for reward in (reviews.sentiment_of, reviews.politeness_of):
        assert statistics.pstdev(map(reward, texts)) > 0.2
    assert statistics.pstdev(math.log(len(r.tokens)) for r in rows[0].results) > 0.2


@pytest.mark.parametrize(("reward", "strategy"), [("politeness", BestOfK(16)), ("length", Blockwise(8, 16))])
def test_exact_rewards_steer_too(engine, reward, strategy):
    prompts, sampling = reviews.prompts(32), SamplingParams(max_tokens=96, seed=1)
    engine.set_scorer(scorer_named(reward))
    base, steered = (
        statistics.mean(r.reward for r in engine.generate(prompts, plan, sampling)) for plan in (None, strategy)
    )
    assert steered > base + 0.25


def test_negative_weight_steers_the_other_way(engine):
    engine.set_scorer([(-1.0, pyengine.embedded("prefix"))])
    results = engine.generate(reviews.prompts(32), Tokenwise(4.0), SamplingParams(seed=0))
    assert statistics.mean(reviews.sentiment_of(r.text) for r in results) < -0.2


def test_unknown_name():
    with pytest.raises(InputError, match="no embedded model 'critic'"):
        pyengine.embedded("critic")


def test_retraining_gives_the_same_bits(tmp_path, monkeypatch):
    """The whole recipe at a fraction of its size, twice: every loop still turns more than once. On one thread: two
    beside other tests wait for each other, three times as long."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(embedded, "THREADS", 1)
    try:
        for run in ("first", "second"):
            embedded.main(tmp_path / run, scale=0.0042)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    files = sorted(f.relative_to(tmp_path / "first") for f in (tmp_path / "first").rglob("*") if f.is_file())
    assert len([f for f in files if f.name == "model.safetensors"]) == 4
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
