"""Scorers in one line of text: it means what the same line of Python does, and what is wrong has a place."""

from __future__ import annotations

import pytest

import pyengine
from pyengine import InputError, References, RewardModel, lsc
from pyengine.expression import scorer_of
from pyengine.rewards import centred, length, log_sigmoid
from pyengine.scorers import Candidates, parts_of, score_texts
from pyengine.scorers.base import FunctionScorer, as_given
from pyengine.worlds import reviews

PROMPTS = reviews.prompts(3)
TEXTS = [" The bread was wonderful. Thank you.", " The cake was awful, idiots.", " Please try the coffee."]
OWN = """
def brief(prompts, completions):
    return [-len(c) for c in completions]

def trl(prompts, completions, completion_ids, **kwargs):
    return [len(ids) + len(c) for ids, c in zip(completion_ids, completions)]
"""


def scores(scorer):
    """Of three responses of 1, 2 and 3 tokens, and the parts' names."""
    parts = parts_of(scorer)
    given = Candidates(PROMPTS, [[5] * n for n in (1, 2, 3)], {}, {}, as_given(TEXTS))
    return score_texts(parts, given).tolist(), [part.name for part in parts]


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Python's side of the lines below, and the files that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    References(dict.fromkeys(PROMPTS, 0.25)).save("refs.json")
    s, p = FunctionScorer(reviews.sentiment), FunctionScorer(reviews.politeness)
    return s, p, FunctionScorer(lambda prompts, completions: [-len(c) for c in completions], "brief")


@pytest.mark.parametrize(
    ("line", "python"),
    [
        ("0.7*sentiment + politeness", lambda s, p, b: 0.7 * s + p),
        ("sentiment-politeness-sentiment", None),
        ("sentiment - politeness - sentiment", lambda s, p, b: s - p - s),
        ("sentiment -politeness", lambda s, p, b: s - p),
        ("-2 * 1e-1 * (sentiment - 3*politeness) + length", lambda s, p, b: -2 * 1e-1 * (s - 3 * p) + length()),
        ("own.py:brief", lambda s, p, b: b),
        (".5*own.py:brief+sentiment", lambda s, p, b: 0.5 * b + s),
        ("own.py:brief + 0.5*sentiment", lambda s, p, b: b + 0.5 * s),
        ("lsc(sentiment, refs.json) & lsc(politeness, -0.5)", lambda s, p, b: lsc(s, 0.25) & lsc(p, -0.5)),
        ("lsc(sentiment, 1) & log_sigmoid(politeness) + own.py:brief", None),
        ("2*centred(sentiment, 'refs.json')", lambda s, p, b: 2 * centred(s, 0.25)),
        ("log_sigmoid(centred(sentiment, .5))", lambda s, p, b: log_sigmoid(centred(s, 0.5))),
        ("reward-model", lambda s, p, b: RewardModel.from_pretrained(pyengine.embedded("reward-model"))),
    ],
)
def test_a_line_means_what_it_means_in_python(named, line, python):
    if python is None:  # a name with minus signs; `+` binds tighter than `&`, and a raw reward is no log-probability
        with pytest.raises(InputError, match=r"no scorer|& joins log-probabilities"):
            scorer_of(line)
        return
    wanted = python(*named)
    assert scores(scorer_of(line)) == scores(wanted)


def test_names_with_marks_in_them(named, tmp_path):
    for name in ("a + b", "my dir"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(OWN)
        assert scores(scorer_of(f"{name}/own.py:brief"))[0] == scores(named[2])[0]
        assert scores(scorer_of(f"2*'{name}/own.py:brief'"))[0] == scores(2 * named[2])[0]
    assert scorer_of(str(tmp_path / "a + b")) == str(tmp_path / "a + b")


def test_the_form_of_trl_and_a_module(named, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text(OWN)
    for source in ("own.py:trl", "rewards_of_mine:trl"):
        assert scores(scorer_of(source))[0] == [n + len(text) for n, text in enumerate(TEXTS, 1)]
    assert scores(scorer_of("length")) == scores(length())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sentiment politeness", "expected + - & or the end, found 'politeness' at character 11"),
        ("sentiment +", "expected a scorer, found 'the end' at character 12"),
        ("+ sentiment", "expected a scorer, found '+' at character 1"),
        ("(sentiment", "expected ')', found 'the end' at character 11"),
        ("sentiment)", "found ')' at character 10"),
        ("sentiment*0.5", "a weight stands before its scorer, as in 0.7*a: unexpected '*' at character 10"),
        ("0.5*", "expected a scorer, found 'the end' at character 5"),
        ("sentiment + 'a b", "the quote at character 13 is not closed"),
        ("1 + exec(sentiment)", "at character 1: no scorer '1'"),
        ("exec(sentiment)", "unknown function 'exec', known are lsc, centred, normalised, log_sigmoid"),
        ("lsc(sentiment)", "lsc takes a scorer and its references: expected them at character 14"),
        ("log_sigmoid(sentiment, 3)", "expected ')' of log_sigmoid, found ',' at character 22"),
        ("2*nope + sentiment", "at character 3: no scorer 'nope'"),
        ("sentiment & politeness", "at character 11: & joins log-probabilities"),
        ("normalised(sentiment, /no.json)", "at character 1: statistics /no.json: "),
        ("lsc(2*sentiment, 1)", "at character 1: lsc takes one scorer of weight 1"),
        (" ", "expected a scorer, found 'the end' at character 2"),
        ("", "no scorer ''"),
        ("(" * 51 + "sentiment" + ")" * 51, "more than 50 brackets are open at character 52"),
    ],
)
def test_what_is_wrong_has_a_place(line, message):
    with pytest.raises(InputError) as caught:
        scorer_of(line)
    assert message in str(caught.value)
