"""Digests of scorers and models: equal for what computes the same, other for what does not."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
import torch

import pyengine
from pyengine import FunctionScorer, InputError, LearnedReference, Probe, RewardModel, SamplingParams, lsc
from pyengine.scorers.embedding_probe import EmbeddingProbe
from pyengine.training.identity import identity
from pyengine.worlds import reviews


def brevity(scale):
    def score(prompts, completions):
        return [-len(c) * scale for c in completions]

    return score


def test_a_directory_counts_by_its_files_wherever_it_lies(tmp_path):
    here = pyengine.embedded("reward-model")
    there = tmp_path / "copy"
    shutil.copytree(here, there)
    assert identity(here) == identity(there) == identity(str(there))
    (there / ".cache").write_text("x")
    assert identity(here) == identity(there)
    weights = bytearray((there / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (there / "model.safetensors").write_bytes(weights)
    assert identity(here) != identity(there)


def test_a_model_counts_by_its_weights_and_its_configuration(tmp_path):
    shutil.copytree(pyengine.embedded("reward-model"), tmp_path / "copy")
    one, other = (RewardModel.from_pretrained(p) for p in (pyengine.embedded("reward-model"), tmp_path / "copy"))
    other.name = one.name
    assert identity(one) == identity(other)
    other.model.config.rms_norm_eps *= 2
    assert identity(one) != identity(other)
    other.model.config.rms_norm_eps /= 2
    assert identity(one) == identity(other)
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    assert identity(one) != identity(other)


def test_a_probe_counts_by_its_layer_too():
    torch.manual_seed(0)
    one, same, other = (Probe(4, layer=layer) for layer in (1, 1, 2))
    for probe in (same, other):
        probe.load_state_dict(one.state_dict())
    assert identity(EmbeddingProbe(np.ones, one.eval())) == identity(EmbeddingProbe(np.ones, same))
    assert identity(EmbeddingProbe(np.ones, one)) != identity(EmbeddingProbe(np.ones, other))


def test_functions_count_by_their_code_and_what_they_close_over():
    assert identity(brevity(1.0)) == identity(brevity(1.0)) != identity(brevity(2.0))
    assert identity(reviews.sentiment) != identity(reviews.politeness)
    assert identity(lambda p, c: [1.0] * len(c)) != identity(lambda p, c: [2.0] * len(c))
    partial = functools.partial(reviews.length_of, longest=3)
    assert identity(partial) == identity(functools.partial(reviews.length_of, longest=3))
    assert identity(partial) != identity(functools.partial(reviews.length_of, longest=4))
    assert identity(FunctionScorer(brevity(1.0))) != identity(FunctionScorer(brevity(2.0)))


def test_sums_and_transforms_count_by_weights_and_references():
    known = {"a": 1.0, "b": 2.0}
    assert identity([(1.0, reviews.sentiment)]) != identity([(0.5, reviews.sentiment)])
    scorer = FunctionScorer(reviews.sentiment)
    assert identity(lsc(scorer, known)) == identity(lsc(scorer, {"b": 2.0, "a": 1.0}))
    assert identity(lsc(scorer, known)) != identity(lsc(scorer, known | {"b": 2.5}))
    assert identity(0.5 * lsc(scorer, known)) != identity(0.6 * lsc(scorer, known))


def test_use_changes_nothing(engine):
    before = identity(engine.model), identity(engine.tokenizer)
    engine.generate("Review of the Harbour, a bakery:", sampling=SamplingParams(max_tokens=3, seed=0))
    assert before == (identity(engine.model), identity(engine.tokenizer))
    rewards = {"a": [0.0, 1.0], "b": [1.0, 3.0], "c": [2.0, 2.5]}
    learned = LearnedReference.fit(rewards, lambda prompts: torch.tensor([[len(p), ord(p[0])] for p in prompts]))
    first = identity(lsc(reviews.sentiment, learned))
    learned.lookup(["d"])
    assert identity(lsc(reviews.sentiment, learned)) == first


def test_what_holds_itself_ends():
    ring: list = [1]
    ring.append(ring)
    scorer = FunctionScorer(reviews.sentiment)
    scorer.ring = ring
    assert identity(scorer) == identity(scorer)


def test_what_is_not_there_is_refused():
    for path, message in (
        ("/no/such", "scorer /no/such: no such directory"),
        ("./nothing", "scorer ./nothing: no such directory"),
        ("nobody/nothing", "scorer nobody/nothing: "),
    ):
        with pytest.raises(InputError, match=message):
            identity(path)
