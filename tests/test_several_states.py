"""Gemma 3n keeps several hidden states for each token: whoever would read one of them says so, in one line."""

from __future__ import annotations

import pytest
import torch
import transformers

from pyengine import Blockwise, Engine, InputError, PrefixModel, Probe, SamplingParams, Tokenwise
from pyengine.decoder import Stem
from pyengine.fallback import RecomputeDecoder, ReplicatedDecoder
from pyengine.scorers import PrefixScorer
from pyengine.scorers.embedding_probe import Embedder
from pyengine.training.data import Encoded
from pyengine.training.values import Batch, collate, read_prefixes

SAID = r"^gemma3n_text: a token has several hidden states; no scorer reads those$"
SIZES = {
    "vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "sliding_window": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
PROMPTS, SAMPLING = ["the quick brown fox", "jugs"], SamplingParams(max_tokens=6, seed=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.Gemma3nTextConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def tokenizer(model_dirs):
    return transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])


@pytest.mark.parametrize(
    ("scorer", "strategy"), [(PrefixScorer(32, 320), Tokenwise(1.0)), (Probe(32), Blockwise(2, 3))], ids=["Q", "probe"]
)
def test_the_engine_refuses_and_decodes_on_as_before(model, tokenizer, scorer, strategy):
    engine = Engine(model, tokenizer)
    want = [r.tokens for r in engine.generate(PROMPTS, sampling=SAMPLING)]
    engine.set_scorer(scorer)
    with pytest.raises(InputError, match=SAID):
        engine.generate(PROMPTS, strategy, SAMPLING)
    engine.set_scorer(lambda prompts, texts: [float(len(text)) for text in texts])  # reads no state
    assert len(engine.generate(PROMPTS, Blockwise(2, 3), SAMPLING)) == 2
    engine.set_scorer(None)
    assert [r.tokens for r in engine.generate(PROMPTS, sampling=SAMPLING)] == want


@pytest.mark.parametrize("kind", [RecomputeDecoder, ReplicatedDecoder])
def test_the_other_decoders_refuse(model, kind):
    with pytest.raises(InputError, match=SAID):
        kind(model, (1,)).prefill([Stem([5, 6, 7])], 4)


def test_scorers_on_a_model_of_their_own_refuse(model, tokenizer):
    scorer = PrefixModel(model.model, tokenizer, PrefixScorer(32, 320), "its own")
    with pytest.raises(InputError, match=SAID):
        scorer.states([5, 6, 7])
    with pytest.raises(InputError, match=SAID):
        Embedder(model, tokenizer)(PROMPTS)
    with pytest.raises(InputError, match=SAID):
        Engine(model, tokenizer).set_scorer(scorer)


def test_training_refuses(model):
    batch = collate([Encoded([5, 6, 7, 8], 2, 1.0, True, "")])
    with pytest.raises(InputError, match=SAID):
        read_prefixes(model, Batch(**batch), -1)
