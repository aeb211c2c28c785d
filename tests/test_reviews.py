"""The review world: exact rewards by hand, and a corpus that is mixed on all of them."""

from __future__ import annotations

import statistics

import pytest

from pyengine.worlds import reviews


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        (" It came in a plain box.", 0.0),
        (" The soup was lovely.", 1 / 2),
        (" The soup was not lovely.", -1 / 2),
        (" The soup was not poor, and I loved the view.", 2 / 3),
        (" The soup was AWFUL. The menu was great.", 0.0),
        (" I hated it. I regret it. The view was superb.", -1 / 4),
        (" The unpoorly soup.", 0.0),
    ],
)
def test_sentiment(text, value):
    assert reviews.sentiment_of(text) == pytest.approx(value)
    assert reviews.sentiment(["x"], [text]) == [reviews.sentiment_of(text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0.0), (" Please keep it up. Thank you for it.", 2 / 3), (" What a joke.", -1 / 2), (" Please, idiots.", 0.0)],
)
def test_politeness(text, value):
    assert reviews.politeness_of(text) == pytest.approx(value)


def test_running_sentiment_is_the_sentiment_of_every_whole_word_prefix():
    _, text = next(reviews.corpus(1, seed=3))
    ends = [i for i in range(len(text) + 1) if i == len(text) or not text[i].isalpha()]
    assert reviews.running_sentiment(text, ends) == pytest.approx([reviews.sentiment_of(text[:end]) for end in ends])


def test_corpus_is_reproducible_and_mixed_on_all_three():
    first, second = list(reviews.corpus(2000, seed=1)), list(reviews.corpus(2000, seed=1))
    assert first == second
    assert first != list(reviews.corpus(2000, seed=2))
    for reward in (reviews.sentiment_of, reviews.politeness_of):
        values = [reward(completion) for _, completion in first]
        assert abs(statistics.mean(values)) < 0.1
        assert statistics.pstdev(values) > 0.25
    words = [len(completion.split()) for _, completion in first]
    assert min(words) <= 5
    assert max(words) >= 60


def test_prompts_are_distinct():
    assert len(set(reviews.prompts(96))) == 96
    assert reviews.prompts(100)[96:] == reviews.prompts(4)
