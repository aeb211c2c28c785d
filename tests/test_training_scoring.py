"""Scores of given responses: what the engine gives its own, at the end and at every token before it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import pyengine
from pyengine import InputError, PrefixModel, Probe, SamplingParams, cli, load_scorer
from pyengine.rewards import length, log_sigmoid
from pyengine.scorers import parts_of
from pyengine.training.data import Example, roll_out
from pyengine.training.pairs import build_pairs
from pyengine.training.scoring import score_examples
from pyengine.worlds import reviews

PROMPTS = reviews.prompts(6)
MOST = 40


@pytest.fixture(scope="module")
def drawn(embedded_engine):
    """Responses of the embedded policy, some of them cut off."""
    found = roll_out(embedded_engine, PROMPTS, reviews.sentiment, max_tokens=MOST, seed=4)
    assert {e.ended for e in found} == {True, False}
    return found


def own_model(engine):
    return PrefixModel(engine.model.get_decoder(), engine.tokenizer, load_scorer(pyengine.embedded("prefix")), "own")


SCORERS = {
    "prefix": lambda engine: pyengine.embedded("prefix"),
    "probe": lambda engine: pyengine.embedded("probe"),
    "prefix model": own_model,
    "of the first layer": lambda engine: Probe(128, 1),
    "sum": lambda engine: 0.5 * load_scorer(pyengine.embedded("prefix")) - log_sigmoid(pyengine.embedded("probe")),
}


@pytest.mark.parametrize("name", SCORERS)
def test_every_prefix_has_the_score_that_the_engine_gives_it(engine, drawn, name):
    torch.manual_seed(1)
    scorer = SCORERS[name](engine)
    found = score_examples(engine, parts_of(scorer), drawn)
    assert [len(one.values) for one in found] == [len(e.tokens) for e in drawn]
    assert [one.values[-1] for one in found] == [one.reward for one in found]
    with engine.following(scorer):
        for most in (1, 7, MOST):
            results = engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=most, seed=4))
            for result, one in zip(results, found, strict=True):
                assert one.values[len(result.tokens) - 1] == pytest.approx(result.reward, abs=2e-5)


def test_scorers_of_whole_responses_have_no_values(engine, drawn):
    """Alone and in a sum with one that has them; `length` counts the tokens as they were drawn."""
    for scorer in (reviews.sentiment, length(64), 2 * load_scorer(pyengine.embedded("prefix")) + length(64)):
        found = score_examples(engine, parts_of(scorer), drawn)
        assert all(one.values is None for one in found)
        with engine.following(scorer):
            results = engine.generate(PROMPTS, sampling=SamplingParams(max_tokens=MOST, seed=4))
        assert [one.reward for one in found] == pytest.approx([r.reward for r in results], abs=2e-5)


def test_what_needs_a_model_says_so(engine, drawn):
    def counts(prompts, completions, completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    for scorer, name in ((length(), "length"), (counts, "counts"), (pyengine.embedded("probe"), "probe")):
        with pytest.raises(InputError, match=f"'{name}' reads hidden states or tokens of a language model: give"):
            score_examples(None, parts_of(scorer), drawn)
    found = score_examples(engine, parts_of(counts), drawn)
    assert [one.reward for one in found] == [len(e.tokens) for e in drawn]
    assert score_examples(None, parts_of(reviews.sentiment), drawn)[0].reward == pytest.approx(drawn[0].reward)
    with pytest.raises(InputError, match="reads hidden states of width 99"):
        score_examples(engine, parts_of(Probe(99)), drawn)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def test_the_command_gives_every_token_its_value(run, engine, drawn, tmp_path):
    rows = [{"id": 1, "prompt": PROMPTS[0], "response": " The bread was wonderful."}]
    rows += [{"prompt": PROMPTS[1], "response": drawn[1].response, "tokens": drawn[1].tokens}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("label", tmp_path / "rows.jsonl", "--scorer", "prefix", "--out", tmp_path / "out.jsonl")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    examples = [Example(row["prompt"], row["response"], 0.0, row.get("tokens")) for row in rows]
    wanted = score_examples(engine, parts_of(pyengine.embedded("prefix")), examples)
    for row, line, one in zip(rows, found, wanted, strict=True):
        assert row.items() <= line.items()
        assert line["reward"] == line["values"][-1] == pytest.approx(one.reward)
        assert line["values"] == pytest.approx(one.values)
    assert set(json.loads(out)["of"]) == {"input", "scorer", "model"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0] | {"tokens": [5, 6]}) + "\n")
    code, _, err = run("label", tmp_path / "rows.jsonl", "--scorer", "length", "--out", tmp_path / "no.jsonl")
    assert code == 2
    assert "rows.jsonl:1: its tokens" in err


def test_candidates_of_pairs_are_scored_by_a_probe(engine, tmp_path):
    given = {"prompt": PROMPTS[0], "response": " The bread was wonderful."}
    (tmp_path / "given.jsonl").write_text(json.dumps(given) + "\n")
    options = {"samples": 2, "sampling": SamplingParams(max_tokens=160, seed=0), "candidates": tmp_path / "given.jsonl"}
    report = build_pairs(engine, PROMPTS[:1], pyengine.embedded("probe"), tmp_path / "out.jsonl", **options)
    assert report["given"] == 1
