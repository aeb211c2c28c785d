"""Scorers: loading, composition, fit with the base policy, what they read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers

import pyengine
from pyengine import BestOfK, FunctionScorer, InputError, PrefixScorer, Probe, RewardModel, SamplingParams, load_scorer
from pyengine.scorers import Candidates, parts_of
from pyengine.worlds import reviews


def candidates(texts, prompt="Review of the Harbour, a bakery:"):
    return Candidates([prompt] * len(texts), [[1]] * len(texts), {}, {}, lambda tokens: list(texts))


@pytest.mark.parametrize("make", [lambda: PrefixScorer(16, 40, width=8, layer=1), lambda: Probe(16, layer=-2)])
def test_heads_survive_the_disk(tmp_path, make):
    torch.manual_seed(0)
    scorer = make()
    scorer.save(tmp_path)
    again = load_scorer(tmp_path)
    assert type(again) is type(scorer)
    assert again.config() == scorer.config()
    assert all(
        torch.equal(a, b) for a, b in zip(scorer.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_values_at_is_a_column_of_values():
    torch.manual_seed(0)
    scorer, hidden, tokens = PrefixScorer(16, 40), torch.randn(7, 16), torch.arange(7) * 5
    torch.testing.assert_close(scorer.values_at(hidden, tokens), scorer.values({-1: hidden})[torch.arange(7), tokens])


def test_a_weighted_list_is_a_scorer():
    a, b = FunctionScorer(reviews.sentiment), FunctionScorer(reviews.sentiment)
    parts = parts_of([(0.5, a), (2.0, [(3.0, b), (1.0, reviews.politeness)])])
    assert [(p.weight, p.name) for p in parts] == [(0.5, "sentiment"), (6.0, "sentiment-2"), (2.0, "politeness")]
    assert (a.name, b.name) == ("sentiment", "sentiment")


def test_names_are_unique_whatever_they_are():
    named = [(1.0, FunctionScorer(reviews.politeness, name)) for name in ("a", "a-2", "a", "a")]
    assert [p.name for p in parts_of(named)] == ["a", "a-2", "a-3", "a-4"]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions: [float(len(c)) for c in completions],
        lambda completions, prompts: [float(len(c)) for c in completions],
        lambda completions, **kwargs: [float(len(c)) for c in completions],
        lambda asked, answers: [float(len(a)) for a in answers],
    ],
)
def test_functions_are_called_as_their_arguments_are_named(function):
    with torch.inference_mode():
        assert FunctionScorer(function).score(candidates(["four", "seven!!"])).tolist() == [4.0, 7.0]


def test_ids_that_nobody_has_are_not_given_as_empty_ones():
    """Texts of a file, say, which no tokenizer has read: a reward of ids would be that of an empty response."""

    def ids(prompts, completions, **kwargs):
        return [float(len(one)) for one in kwargs["completion_ids"]]

    texts = Candidates(["Review"], [()], {}, {}, lambda tokens: ["four"])
    with pytest.raises(InputError, match=r"scorer 'ids' raised KeyError: 'completion_ids'"):
        FunctionScorer(ids).score(texts)


def test_none_is_nan():
    assert FunctionScorer(lambda p, c: [None, 1.0]).score(candidates(["a", "b"])).isnan().tolist() == [True, False]


def test_reward_model_whose_positions_start_late(tmp_path, model_dirs):
    """RoBERTa: 66 positions hold 64 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 66}
    config = transformers.RobertaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=1, **sizes)
    scorer = RewardModel(transformers.RobertaForSequenceClassification(config), tokenizer)
    assert scorer.longest == 64


def test_reward_model_scores_text_one_by_one_as_in_a_batch():
    scorer = RewardModel.from_pretrained(pyengine.embedded("reward-model"))
    texts = [" The bread was lovely.", " The bread was awful and the coffee was dreadful.", " I went there."]
    with torch.inference_mode():
        together = scorer.score(candidates(texts))
        alone = torch.cat([scorer.score(candidates([t])) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert together[0] > together[1]


def test_reward_model_with_another_tokenizer(engine, model_dirs, tmp_path):
    """trl#1674: scored on text, so its own tokenizer reads it, whatever the policy's is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine.set_scorer(tmp_path)
    result = engine.generate(reviews.prompts(1), BestOfK(4), SamplingParams(max_tokens=20, seed=1))[0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for candidate in result.blocks[0].candidates:
        ids = tokenizer(result.prompt + candidate.text, return_tensors="pt")
        with torch.inference_mode():
            assert candidate.utility == pytest.approx(model(**ids).logits.item(), abs=1e-4)


class TestBadInput:
    def test_vocabulary_of_another_size(self, engine):
        with pytest.raises(InputError, match=r"a vocabulary of 99 tokens.* has 745"):
            engine.set_scorer(PrefixScorer(128, 99))

    @pytest.mark.parametrize("make", [lambda: PrefixScorer(64, 745), lambda: Probe(64)])
    def test_hidden_size_of_another_model(self, engine, make):
        with pytest.raises(InputError, match=r"width 64.* has 128"):
            engine.set_scorer(make())

    def test_layer_that_is_not_there(self, engine):
        with pytest.raises(InputError, match=r"reads layer 7.* has 3"):
            engine.set_scorer(Probe(128, layer=7))

    def test_a_refused_scorer_leaves_the_old_one(self, engine):
        engine.set_scorer(reviews.sentiment)
        with pytest.raises(InputError):
            engine.set_scorer(Probe(64))
        assert [p.name for p in engine.parts] == ["sentiment"]

    @pytest.mark.parametrize("thing", [3, [1.0, "x"], [("a", "b")], [(1.0, None, 2)]])
    def test_not_a_scorer(self, thing):
        with pytest.raises(InputError, match="scorer"):
            parts_of(thing)

    @pytest.mark.parametrize("weight", [math.nan, math.inf])
    def test_weight_that_is_not_finite(self, weight):
        with pytest.raises(InputError, match="its weight must be a finite number"):
            parts_of([(weight, reviews.sentiment)])

    @pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, torch.tensor])
    def test_weights_of_other_libraries_are_numbers(self, kind):
        (part,) = parts_of([(kind(2), reviews.sentiment)])
        assert (part.weight, type(part.weight)) == (2.0, float)

    def test_missing_directory(self):
        with pytest.raises(InputError, match="no such directory"):
            load_scorer("/no/such/scorer")

    def test_unknown_kind_and_damaged_files(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"pyengine_scorer": "crystal-ball"}))
        with pytest.raises(InputError, match="unknown kind 'crystal-ball'"):
            load_scorer(tmp_path)
        Probe(8).save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": 9}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"size mismatch|Error"):
            load_scorer(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(InputError):
            load_scorer(tmp_path)

    def test_reward_model_with_several_outputs(self, tmp_path, model_dirs):
        """vllm#8967: a vector where a score was meant."""
        config = transformers.BertConfig(
            vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="is a classifier with 3 labels"):
            load_scorer(tmp_path)

    def test_language_model_in_place_of_a_reward_model(self, model_dirs):
        """Its scoring head would be random numbers."""
        with pytest.raises(InputError, match=r"lacks 1 of the weights of a LlamaForSequenceClassification"):
            RewardModel.from_pretrained(model_dirs["llama"])

    def test_text_longer_than_the_reward_model_reads(self):
        scorer = RewardModel.from_pretrained(pyengine.embedded("reward-model"))
        with pytest.raises(InputError, match="reads 512 tokens, a candidate has"):
            scorer.score(candidates([" wonderful" * 600]))

    def test_callable_that_returns_too_few_scores(self, engine):
        engine.set_scorer(lambda prompts, completions: [1.0])
        with pytest.raises(InputError, match="one number for each of 3 completions"):
            engine.generate("The", BestOfK(3), SamplingParams(max_tokens=4))
