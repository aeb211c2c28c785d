"""Budgets, exact draws and sums of scorers on the command line: what the same calls give from Python."""

from __future__ import annotations

import functools
import json
import sys

import pytest

import pyengine
from pyengine import cli
from pyengine.evaluation import rejection
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `pyengine ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def test_a_budget_is_spent_at_every_token_or_on_average(run, engine):
    options = ("--scorer", "prefix", "--strategy", "tokenwise", "--max-tokens", 12, "--json", "--temperature", 1)
    for per, prompts in (("token", [PROMPT]), ("sequence", reviews.prompts(4))):
        budget = ("--kl-budget", 0.4, *(() if per == "token" else ("--per", per)))
        code, out, err = run("generate", *prompts, *options, "--seed", 3, *budget)
        assert (code, err) == (0, "")
        found = sorted((json.loads(line) for line in out.splitlines()), key=lambda r: prompts.index(r["prompt"]))
        with engine.following(pyengine.embedded("prefix")):
            plan = pyengine.Tokenwise(kl_budget=0.4, per=per)
            wanted = engine.generate(prompts, plan, pyengine.SamplingParams(12, seed=3))
        assert [r["tokens"] for r in found] == [r.tokens for r in wanted]
        assert [r["kl"] for r in found] == pytest.approx([r.kl for r in wanted], abs=1e-4)


def test_exact_draws_by_rejection_say_what_they_took(run, engine, monkeypatch):
    options = ("--scorer", "sentiment", "--strategy", "rejection", "--bound", 1, "--beta", 0.5, "--seed", 0)
    code, out, err = run("generate", *reviews.prompts(2), *options, "--max-tokens", 24, "--json")
    assert (code, err) == (0, "")
    with engine.following(reviews.sentiment):
        sampling = pyengine.SamplingParams(24, seed=0)
        wanted = pyengine.rejection_sample(engine, reviews.prompts(2), 1.0, 0.5, sampling=sampling)
    for line, accepted in zip(map(json.loads, out.splitlines()), wanted, strict=True):
        assert (line["tokens"], line["draws"], line["exact"]) == (accepted.result.tokens, accepted.draws, True)
    monkeypatch.setattr(rejection, "rejection_sample", functools.partial(rejection.rejection_sample, max_draws=8))
    code, out, err = run("generate", PROMPT, *options, "--bound", 500, "--max-tokens", 2)
    assert (code, out) == (1, "")
    assert err.startswith("pyengine: prompt 1: prompt 0: none of 8 draws was accepted")


def test_a_sum_on_the_command_line(run):
    code, out, err = run(
        "generate", PROMPT, "--scorer", "2*prefix - 0.1*length", "--block", 4, "--max-tokens", 8, "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["reward"] == pytest.approx(2 * found["rewards"]["prefix"] - 0.1 * found["rewards"]["length"], abs=1e-5)
