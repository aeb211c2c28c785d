"""Selection: what each branch of a block is scored on."""

from __future__ import annotations

import pytest
import torch

from pyengine import BestOfK, Blockwise, Engine, PrefixScorer, Probe, SamplingParams

PROMPTS = ["the quick brown fox", "pack my box", "sphinx", "the lazy dog jumps"]


@pytest.fixture
def engine(model_dirs):
    return Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)


@pytest.mark.parametrize("strategy", [BestOfK(8), Blockwise(8, 5)], ids=str)
@pytest.mark.parametrize("waits", [False, True])
def test_a_branch_is_scored_on_its_own_states_whichever_were_dropped(engine, monkeypatch, strategy, waits):
    """A third of the tokens end a response, so that most of 32 rows go on the way."""
    torch.manual_seed(2)
    prefix, probe = PrefixScorer(64, 320, 32, layer=-1, name="prefix"), Probe(64, layer=2)
    engine.set_scorer([(1.0, prefix), (1.0, probe)])
    engine.eos = frozenset(range(0, 320, 3))
    monkeypatch.setattr(engine._decoder, "waits", waits)
    planted, plant = [], engine._decoder.plant
    monkeypatch.setattr(engine._decoder, "plant", lambda rows: planted.append(len(rows)) or plant(rows))
    results = engine.generate(PROMPTS, strategy, SamplingParams(max_tokens=12, seed=3))
    assert waits or len([n for n in planted if n % 8]) > 1, "no row was dropped"
    for result in results:
        ids = engine.encode(result.prompt)
        for block in result.blocks:
            for candidate in block.candidates:
                whole = torch.tensor([ids + result.tokens[: block.start] + candidate.tokens])
                with torch.inference_mode():
                    states = engine.model(input_ids=whole, output_hidden_states=True).hidden_states
                    want = prefix.values({-1: states[-1][0, -2:-1]})[0, candidate.tokens[-1]]
                    assert candidate.scores["prefix"] == pytest.approx(want.item(), abs=1e-3)
                    assert candidate.scores["probe"] == pytest.approx(probe(states[2][0, -1]).item(), abs=1e-3)


def test_candidates_have_their_base_log_probability(engine):
    engine.set_scorer(lambda prompts, completions: [float(len(c)) for c in completions])
    (result,) = engine.generate("the quick", Blockwise(4, 8), SamplingParams(24, seed=3, top_k=5))
    for block in result.blocks:
        kept = block.candidates[block.chosen]
        own = result.logp_base[block.start : block.start + len(kept.tokens)]
        assert kept.logp_base == pytest.approx(sum(own))
