"""Embeddings, and probes that read them: in the engine, from another model, or where only samples are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyengine import BestOfK, InputError, Probe, SamplingParams
from pyengine.scorers import Candidates
from pyengine.scorers.embedding_probe import Embedder, EmbeddingProbe, rerank
from pyengine.training.embeddings import embed
from pyengine.worlds import reviews


def test_rerank_takes_linear_and_mlp_probes():
    torch.manual_seed(0)
    states = torch.randn(200, 6, 16)
    for hidden in ((), (8,)):
        probe = Probe(16, hidden=hidden)
        q = probe(states).detach()
        hard, soft = rerank(probe, states), rerank(probe, states, beta=0.2, seed=torch.arange(200))
        assert torch.equal(hard.index, q.argmax(-1))
        torch.testing.assert_close(hard.utility, q, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(soft.probability, torch.softmax(q / 0.2, -1), atol=1e-5, rtol=1e-4)
        assert 0.1 < (soft.index != hard.index).float().mean() < 0.9
    with pytest.raises(InputError, match=r"\[prompts, samples, 16\], got \[2, 3, 9\]"):
        rerank(Probe(16), torch.zeros(2, 3, 9))


class TestEmbeddings:
    @pytest.mark.parametrize("layer", [-1, 1])
    def test_are_what_a_probe_reads_in_the_engine(self, engine, layer):
        torch.manual_seed(0)
        probe = Probe(engine.policy.hidden_size, layer=layer, hidden=(16,))
        engine.set_scorer(probe)
        results = engine.generate(reviews.prompts(40), sampling=SamplingParams(max_tokens=48, seed=1))
        assert {r.finish_reason for r in results} == {"stop", "length"}
        with torch.no_grad():
            found = probe(embed(engine, results, layer, progress=False))
        torch.testing.assert_close(found, torch.tensor([r.reward for r in results]), atol=1e-4, rtol=1e-4)
        stopped = [r for r in results if r.finish_reason == "stop"]
        texts = embed(engine, [(r.prompt, r.text) for r in stopped], layer)
        again = [engine.tokenizer(r.prompt + r.text).input_ids[1 - len(r.tokens) :] for r in stopped]
        same = [i for i, r in enumerate(stopped) if again[i] == r.tokens[:-1]]  # not every text gives its tokens again
        assert len(same) > len(stopped) // 2
        torch.testing.assert_close(texts[same], embed(engine, [stopped[i] for i in same], layer), atol=1e-4, rtol=1e-4)

    def test_texts_are_encoded_as_training_encodes_them(self, engine):
        """Nothing merges across the border ("bak" + "ery"), and a text that ends in an EOS gets no second one."""
        for prompt, text, given in (
            ("Review of the Harbour, a bak", "ery.", "ery."),
            ("Review of the Harbour, a bakery:", " Lovely.", " Lovely.<|endoftext|>"),
        ):
            ids = [*engine.tokenizer(prompt).input_ids, *engine.tokenizer(text).input_ids, 0]
            assert ids != [*engine.tokenizer(prompt + given).input_ids, 0]
            with torch.inference_mode():
                want = engine.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1]
            torch.testing.assert_close(embed(engine, [(prompt, given)], 1)[0], want, atol=1e-4, rtol=1e-4)

    def test_what_cannot_be_read(self, engine):
        with pytest.raises(InputError, match="response 1: the response is empty"):
            embed(engine, [("a", "b"), ("a", " ")])
        with pytest.raises(InputError, match=r"response 0: prompt and response have \d+ \+ \d+ tokens, .* reads 512"):
            embed(engine, [("a", " wonderful" * 600)])
        with pytest.raises(InputError, match="has 3 hidden states, layer 3"):
            embed(engine, [("a", "b")], layer=3)

    def test_a_probe_on_another_models_embedding_selects_in_the_engine(self, engine, model_dirs):
        torch.manual_seed(0)
        scorer = EmbeddingProbe.from_pretrained(model_dirs["gpt2"], Probe(64, layer=2))
        engine.set_scorer(scorer)
        sampling = SamplingParams(max_tokens=9, seed=1)
        (result,) = engine.generate(reviews.prompts(1), BestOfK(5, "softmax", 0.5), sampling)
        (block,) = result.blocks
        model, tokenizer = scorer.embed.model, scorer.embed.tokenizer
        wanted = []
        for candidate in block.candidates:
            ids = torch.tensor([tokenizer(result.prompt + candidate.text).input_ids])
            with torch.inference_mode():
                state = model(ids, output_hidden_states=True).hidden_states[2][0, -1]
                wanted.append(scorer.probe(state).item())
        assert [c.utility for c in block.candidates] == pytest.approx(wanted, abs=1e-3)
        probability = torch.softmax(torch.tensor(wanted) / 0.5, 0).tolist()
        assert [c.probability for c in block.candidates] == pytest.approx(probability, abs=1e-2)

    def test_embeddings_from_a_call(self):
        probe = Probe(3)
        scorer = EmbeddingProbe(lambda texts: torch.tensor([[len(t), 0.0, 1.0] for t in texts]), probe)
        candidates = Candidates(["ab", "ab"], [[1], [1]], {}, {}, lambda tokens: ["c", "def"])
        with torch.inference_mode():
            torch.testing.assert_close(scorer.score(candidates), probe(torch.tensor([[3.0, 0, 1], [5, 0, 1]])))
            for like in (list, np.array):
                lengths = EmbeddingProbe(lambda texts: like([[len(t), 0.0, 1.0] for t in texts]), probe)
                torch.testing.assert_close(lengths.score(candidates), probe(torch.tensor([[3.0, 0, 1], [5, 0, 1]])))
            with pytest.raises(InputError, match="'embedding-probe': embed gives no matrix: "):
                EmbeddingProbe(lambda texts: [[1.0], [1.0, 2.0]], probe).score(candidates)
            with pytest.raises(InputError, match=r"needs embeddings \[2, 3\], got \[1, 3\]"):
                EmbeddingProbe(lambda texts: torch.zeros(1, 3), probe).score(candidates)

    def test_embedding_models_that_do_not_fit(self, model_dirs):
        embedder = Embedder.from_pretrained(model_dirs["gpt2"], layer=2)
        with pytest.raises(InputError, match=r"width 32, .*'gpt2' gives 64"):
            EmbeddingProbe(embedder, Probe(32, layer=2))
        with pytest.raises(InputError, match="trained on layer -1, not on layer 2"):
            EmbeddingProbe(embedder, Probe(64))
        EmbeddingProbe(embedder, Probe(64, layer=-2))
        with pytest.raises(InputError, match="has 4 hidden states, layer 9"):
            Embedder.from_pretrained(model_dirs["gpt2"], layer=9)
        with pytest.raises(InputError, match=r"reads 96 tokens, text 1 has"):
            embedder(["fox", "quartz " * 300])
