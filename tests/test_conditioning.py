"""Prompts that state a reward: their bytes, zero's sign, files, and templates that are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from pyengine import Conditioning, InputError, Statistics
from pyengine.rewards.conditioning import OPENRLHF
from pyengine.training.data import Example, encode


def test_the_papers_template():
    assert Conditioning().prompt("Name a bird.", 5.0) == "User:Name a bird. Assistant: <rm_score> 5.0"
    assert Conditioning().prompt("Name a bird.", -1.26) == "User:Name a bird. Assistant: <rm_score> -1.3"
    assert Conditioning(decimals=2).prompt("Hi", 5) == "User:Hi Assistant: <rm_score> 5.00"


def test_openrlhfs_template():
    assert OPENRLHF.prompt("Name a bird.", 5.0) == "Name a bird. <rm_score>: 5.00 "
    assert OPENRLHF.prompt("Name a bird.", -0.126) == "Name a bird. <rm_score>: -0.13 "


@pytest.mark.parametrize(
    ("z", "decimals", "text"),
    [
        (-0.0, 2, "0.00"),
        (-0.004, 2, "0.00"),
        (0.004, 2, "0.00"),
        (-0.006, 2, "-0.01"),
        (-0.04, 1, "0.0"),
        (-0.4, 0, "0"),
        (-10.0, 1, "-10.0"),
        (-0.0, 0, "0"),
    ],
)
def test_zero_has_no_sign(z, decimals, text):
    assert Conditioning(decimals=decimals).score(z) == text


@pytest.mark.parametrize("decimals", [0, 1, 2])
def test_a_printed_score_reads_back(decimals):
    """Within half a unit of the last decimal, and printed again it is the same."""
    for z in np.random.default_rng(0).normal(size=200) * 3:
        text = Conditioning(decimals=decimals).score(z)
        assert abs(float(text) - z) <= 0.5 * 10**-decimals + 1e-12
        assert Conditioning(decimals=decimals).score(float(text)) == text


def test_numbers_of_other_types_print_alike():
    for z in (2, np.float32(2.0), np.int64(2), torch.tensor(2.0)):
        assert Conditioning().score(z) == "2.0"


def test_braces_of_an_instruction_are_text():
    asked = "Fill {score} and {response} {}"
    assert Conditioning().prompt(asked, 1.0) == f"User:{asked} Assistant: <rm_score> 1.0"
    literal = Conditioning("{{{score}}} {instruction}{response}")
    assert literal.prompt(asked, 1.0) == "{1.0} " + asked


def test_a_saved_one_makes_the_same_bytes(tmp_path):
    for i, one in enumerate((Conditioning(), OPENRLHF, Conditioning("¿{instruction}?\n{score}\t{response}", 3))):
        one.save(tmp_path / "new" / f"{i}.json")
        loaded = Conditioning.load(tmp_path / "new" / f"{i}.json")
        assert loaded == one
        assert loaded.prompt("Größe\n", -0.0001) == one.prompt("Größe\n", -0.0001)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "User: {instruction} Assistant: {response}",
        "{score}{response}",
        "{instruction} {score}",
        "{instruction} {score} {response}.",
        "{response} {instruction} {score}",
        "{instruction} {score} {score} {response}",
        "{instruction} {score} {reward} {response}",
        "{instruction} {score:.3f} {response}",
        "{instruction!r} {score} {response}",
        "{instruction} {} {score} {response}",
        "{instruction} {score} {response",
        "{instruction} {score} }{response}",
        None,
    ],
)
def test_a_template_without_its_fields_is_refused(template, tmp_path):
    with pytest.raises(InputError, match="Conditioning: template") as caught:
        Conditioning(template)
    assert "\n" not in str(caught.value)
    (tmp_path / "bad.json").write_text(json.dumps({"template": template, "decimals": 1}))
    with pytest.raises(InputError, match=r"conditioning .*bad\.json: Conditioning: template"):
        Conditioning.load(tmp_path / "bad.json")


def test_other_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match="decimals must be a whole number"):
        Conditioning(decimals=-1)
    for z in (math.nan, math.inf, "5.0", None):
        with pytest.raises(InputError, match="Conditioning: z must be a finite number"):
            Conditioning().prompt("Hi", z)
    with pytest.raises(InputError, match=r"conditioning .*none\.json"):
        Conditioning.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"mean": 1.0}')
    with pytest.raises(InputError, match=r"conditioning .*other\.json"):
        Conditioning.load(tmp_path / "other.json")


def test_z_scores():
    rewards = [0.3, -1.0, 2.5, 0.0, 1.0]
    for ddof in (0, 1):
        found = Statistics.of(rewards, ddof).z(rewards)
        assert found == pytest.approx((np.array(rewards) - np.mean(rewards)) / np.std(rewards, ddof=ddof))
    assert Statistics(1.0, 2.0).z([5.0, 1.0]) == [2.0, 0.0]
    assert Statistics.of([3.0], ddof=1).z([3.0, 9.0]) == [0.0, 0.0]
    assert Statistics(1.0, 0.0).z([]) == []
    with pytest.raises(InputError, match="Statistics: reward 1 must be a finite number"):
        Statistics(1.0, 0.0).z([1.0, math.nan])


@pytest.mark.parametrize("conditioning", [Conditioning(), OPENRLHF], ids=["paper", "openrlhf"])
@pytest.mark.parametrize("response", [" The food was great.", "The food was great."])
def test_reward_tokens_belong_to_the_prompt(embedded_engine, conditioning, response):
    """Training starts with the very tokens that inference starts with, and the loss sees the response only."""
    for z in (5.0, -0.3):
        prompt = conditioning.prompt("Review of the Harbour:", z)
        ids, start, *_ = encode(embedded_engine, Example(prompt, response, z))
        assert ids[:start] == embedded_engine.encode(prompt, "prompt 0")
        assert embedded_engine.tokenizer.decode(ids[start:-1]) == response
        assert ids[-1] in embedded_engine.eos
