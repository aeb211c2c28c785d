"""Digests of scorers and models: equal for what computes the same, other for what does not."""

from __future__ import annotations

import collections
import functools
import shutil
import threading

import numpy as np
import pytest
import torch
from torch import nn

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
    partial = functools.partial(brevity, scale=3)
    assert identity(partial) == identity(functools.partial(brevity, scale=3))
    assert identity(partial) != identity(functools.partial(brevity, scale=4))
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


def called(body, **held):
    """An object of a class S whose __call__ is this source."""
    names: dict = {"__name__": "made"}
    exec(f"class S:\n    {body}\n", names)
    thing = names["S"]()
    vars(thing).update(held)
    return thing


def test_objects_count_by_the_code_of_their_class():
    plus, minus = "def __call__(self, p, c): return [1.0] * len(c)", "def __call__(self, p, c): return [-1.0] * len(c)"
    assert identity(called(plus)) == identity(called(plus)) != identity(called(minus))
    assert identity(called(plus, scale=1.0)) != identity(called(plus, scale=2.0))
    helped = "{}\n    def __call__(self, p, c): return [self.one(x) for x in c]"
    for form in (
        "def one(self, x): return {}",
        "@staticmethod\n    def one(x): return {}",
        "@property\n    def one(self): return lambda x: {}",
        "factor = {}\n    def one(self, x): return self.factor",
    ):
        assert identity(called(helped.format(form.format(2)))) != identity(called(helped.format(form.format(3))))

    def derived(value):
        class Base:
            def of(self, text):
                return value if value else len(text)

        class Scorer(Base):
            def __call__(self, prompts, completions):
                return [super(Scorer, self).of(c) for c in completions]

        return Scorer()

    assert identity(derived(1)) == identity(derived(1)) != identity(derived(2))  # in a base


def test_arguments_that_change_places_and_handlers_count():
    names: dict = {}
    exec("def f(prompts, completions): return prompts", names)
    one = names["f"]
    exec("def f(completions, prompts): return completions", names)
    assert identity(one) != identity(names["f"])  # they are called by name


def test_slots_count():
    class Slotted:
        __slots__ = ("scale",)

        def __init__(self, scale):
            self.scale = scale

        def __call__(self, prompts, completions):
            return [self.scale] * len(completions)

    class Both(Slotted):
        pass

    for kind in (Slotted, Both):
        assert identity(kind(1.0)) == identity(kind(1.0)) != identity(kind(2.0))
    one, other = (called("x = 1", last=collections.deque(held)) for held in ([1], [2]))
    assert identity(one) != identity(other)


def test_modules_count_by_their_parts():
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    one = nn.Sequential(linear, nn.ReLU())
    assert identity(one) == identity(nn.Sequential(linear, nn.ReLU())) != identity(nn.Sequential(linear, nn.GELU()))
    assert identity(nn.LayerNorm(3, eps=1e-5)) != identity(nn.LayerNorm(3, eps=1e-6))
    assert identity(nn.Sequential(nn.LayerNorm(3))) != identity(nn.Sequential(nn.LayerNorm(3, eps=1e-6)))
    assert identity(one.eval()) == identity(one.train())

    class Scaled(nn.Module):
        def __init__(self, scale, table):
            super().__init__()
            self._scale = scale
            self.register_buffer("table", torch.tensor(table), persistent=False)

    assert identity(Scaled(1.0, 2.0)) == identity(Scaled(1.0, 2.0))
    assert len({identity(Scaled(*pair)) for pair in ((1.0, 2.0), (1.0, 3.0), (2.0, 2.0))}) == 3


def test_what_cannot_be_looked_into_is_refused(tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(InputError, match="cannot tell what decides a score in"):
        identity(called("def __call__(self, p, c): return c", file=file))
    assert identity(called("x = 1", lock=threading.Lock())) == identity(called("x = 1", lock=threading.Lock()))


def test_lists_that_are_none_of_scorers_are_refused():
    for scorer, message in (
        ([("x", reviews.sentiment)], "its weight must be a finite number, got 'x'"),
        ([reviews.sentiment, reviews.politeness], r"holds \(weight, scorer\) pairs, got <function"),
        ([(1.0, "sentimant")], "scorer sentimant: no such directory; a hub id is OWNER/NAME"),
        ("", "scorer '': no such directory"),
    ):
        with pytest.raises(InputError, match=message):
            identity(scorer)
