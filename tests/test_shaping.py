"""The base policy that a request asks for, against transformers' own processors and counts by hand."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as peers

import pyengine
from pyengine import InputError, SamplingParams
from pyengine.codec import Codec
from pyengine.decode.shaping import Shape, Shaping, resolve

VOCAB = 40
ENDS = (3, 17)


def after(shape, prompt, response=(), device="cpu"):
    shaping = Shaping.start(shape, prompt, device)
    for token in response:
        shaping.advance(torch.tensor([token], device=device))
    return shaping


def counted(logits, response, frequency, presence):
    """Frequency and presence penalties in fp64, a token at a time."""
    out = logits.double().clone()
    for token, times in Counter(response).items():
        out[0, token] -= frequency * times + presence
    return out


def expected(shape, prompt, response, logits):
    """One row [V] by transformers' processors in their order; penalties by counts, which it lacks, by hand."""
    ids, out = torch.tensor([[*prompt, *response]]), logits[None].double()
    if shape.bias:
        out = peers.SequenceBiasLogitsProcessor({(i,): value for i, value in shape.bias.items()})(ids, out)
    if shape.penalties:
        repetition, frequency, presence = shape.penalties
        out = peers.RepetitionPenaltyLogitsProcessor(repetition)(ids, out)
        out = counted(out, response, frequency, presence)
    if shape.words:
        out = peers.NoBadWordsLogitsProcessor([list(word) for word in shape.words])(ids, out)
    if shape.min_tokens:
        out = peers.MinNewTokensLengthLogitsProcessor(len(prompt), shape.min_tokens, list(shape.ends))(ids, out)
    if shape.allowed is not None:
        rest = [i for i in range(len(logits)) if i not in shape.allowed]
        out = peers.SuppressTokensLogitsProcessor(rest)(ids, out)
    return out[0]


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)


PARTS = {
    "bias": lambda draw: {"bias": {draw.randrange(VOCAB): draw.uniform(-9, 9) for _ in range(4)}},
    "bad word of one token": lambda draw: {"bias": {5: 1.5, draw.randrange(VOCAB): -math.inf}},
    "repetition": lambda draw: {"penalties": (draw.choice([0.6, 1.3]), 0.0, 0.0)},
    "frequency": lambda draw: {"penalties": (1.0, draw.choice([-0.4, 0.7]), 0.0)},
    "presence": lambda draw: {"penalties": (1.0, 0.0, draw.choice([-0.4, 0.7]))},
    "all penalties": lambda draw: {"penalties": (1.7, 0.3, 0.9)},
    "min_tokens": lambda draw: {"min_tokens": draw.randrange(1, 8), "ends": ENDS},
    "allowed": lambda draw: {"allowed": tuple(draw.sample(range(VOCAB), draw.randrange(1, 20)))},
    "bad words": lambda draw: {
        "words": tuple(tuple(draw.randrange(3) for _ in range(draw.randrange(2, 5))) for _ in range(9))
    },
}


def shapes(draw):
    """What a request asks: nothing, one thing, several or all."""
    names = draw.sample(list(PARTS), draw.choice([0, 0, 1, 1, 3, len(PARTS)]))
    return Shape(**{key: value for name in names for key, value in PARTS[name](draw).items()})


@pytest.mark.parametrize("part", PARTS)
def test_each_field_is_its_processors(part):
    draw, differ = random.Random(part), 0
    for _ in range(40):
        shape = Shape(**PARTS[part](draw))
        prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
        response = [draw.randrange(3) for _ in range(draw.randrange(10))]
        logits = torch.randn(1, VOCAB) * 4
        found, wanted = after(shape, prompt, response).apply(logits), expected(shape, prompt, response, logits[0])
        close(found[0], wanted)
        differ += not torch.equal(found, logits)
    assert differ > 10, "and it does something"


def test_bias_comes_before_the_penalties():
    """As in both peers: a token that a bias lifts above zero is divided, not multiplied."""
    shape, logits = Shape(bias={2: 8.0}, penalties=(2.0, 0.5, 0.25)), torch.full((1, VOCAB), -4.0)
    found = after(shape, [2], [2]).apply(logits)[0]
    assert found[2] == (-4 + 8) / 2 - 0.5 - 0.25
    assert found[3] == -4


def test_rows_join_fork_leave_and_roll_back_apart_from_each_other():
    """Whatever happened on the way, every row is what its own tokens make it."""
    draw, compared = random.Random(0), 0
    rows, shaping, saved = [], Shaping(0), ([], Shaping(0))
    for _ in range(150):
        what = draw.choice(["join", "take", "advance", "advance", "advance", "save", "roll back"])
        if what == "join" and len(rows) < 12:
            new = [(shapes(draw), [draw.randrange(6) for _ in range(draw.randrange(1, 9))], []) for _ in range(3)]
            shaping = Shaping.join([shaping, *(Shaping.start(shape, prompt) for shape, prompt, _ in new)])
            rows = rows + new
        elif what == "take" and rows:
            index = [draw.randrange(len(rows)) for _ in range(draw.randrange(13))]
            rows, shaping = [(*rows[i][:2], list(rows[i][2])) for i in index], shaping.take(index)
        elif what == "advance":
            tokens = [draw.randrange(6) for _ in rows]
            shaping.advance(torch.tensor(tokens, dtype=torch.long))
            rows = [
                (shape, prompt, [*response, token])
                for (shape, prompt, response), token in zip(rows, tokens, strict=True)
            ]
        elif what == "save":
            saved = rows, shaping.take(range(len(rows)))
        elif what == "roll back":
            rows, shaping = saved[0], saved[1].take(range(len(saved[0])))
        logits = torch.randn(len(rows), VOCAB) * 4
        before, found = logits.clone(), shaping.apply(logits)
        assert torch.equal(logits, before), "the model's logits are drawn from again by the next fork"
        assert shaping.n == len(rows) == len(found)
        for row, x, y in zip(rows, logits, found, strict=True):
            close(y, expected(*row, x))
            compared += 1
            if row[0].__dict__ == Shape().__dict__:
                assert torch.equal(x, y)
    assert compared > 600


def test_who_asks_for_nothing_pays_nothing():
    logits = torch.randn(3, VOCAB, dtype=torch.bfloat16)
    plain = Shaping.join([Shaping.start(Shape(), [1, 2]) for _ in range(3)]).take([0, 2, 2])
    plain.advance(torch.tensor([4, 5, 6]))
    assert plain.apply(logits) is logits
    one = Shaping.join([plain.take([0, 1]), Shaping.start(Shape(bias={1: 1.0}), [1])])
    assert one.apply(logits).dtype == torch.float32
    assert torch.equal(one.take([1, 0]).apply(logits[:2]), logits[:2]), "the row that asked has left"


def test_no_step_waits_for_the_device():
    """On `meta` nothing can be read: what asked the host for a value would raise."""
    asked = Shape(bias={1: 1.0}, penalties=(1.2, 0.1, 0.1), min_tokens=3, ends=ENDS, allowed=(1, 2, 3))
    shaping = Shaping.join([after(Shape(), [1], device="meta"), after(asked, [1, 2], device="meta")]).take([1, 0, 1])
    for _ in range(4):
        assert shaping.apply(torch.empty(3, VOCAB, device="meta")).shape == (3, VOCAB)
        shaping.advance(torch.empty(3, dtype=torch.long, device="meta"))


@pytest.fixture(scope="module")
def codec():
    tokenizer = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    return Codec(tokenizer, "a model", len(tokenizer))


def test_params_become_tokens(codec):
    eos = {codec.tokenizer.eos_token_id}
    assert resolve(SamplingParams(), codec, codec.rows, eos).__dict__ == Shape(ends=tuple(eos)).__dict__
    spelled = [codec.pieces(text) for text in ("the kettle", " the kettle", "e", " e")]
    shape = resolve(
        SamplingParams(
            logit_bias={7: 2, 8: -3.5},
            bad_words=["the kettle", " e"],
            allowed_token_ids=np.array([4, 9, 4]),
            stop_token_ids=[11],
            min_tokens=2,
            repetition_penalty=1.5,
            presence_penalty=-1,
        ),
        codec,
        codec.rows,
        eos,
    )
    assert shape.bias == {7: 2.0, 8: -3.5, **{ids[0]: -math.inf for ids in spelled if len(ids) == 1}}
    assert set(shape.words) == {tuple(ids) for ids in spelled if len(ids) > 1}
    assert len(shape.words) + len(shape.bias) == 6
    assert (shape.allowed, shape.ends, shape.min_tokens) == ((4, 9), (0, 11), 2)
    assert shape.penalties == (1.5, 0.0, -1.0)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"logit_bias": {745: 1.0}}, "token 745 of logit_bias is beyond the 745 of a model"),
        ({"allowed_token_ids": [1, 800]}, "token 800 of allowed_token_ids is beyond"),
        ({"stop_token_ids": [10**6]}, "token 1000000 of stop_token_ids is beyond"),
        ({"bad_words": ["x", "\ud800"]}, "bad word .* is not valid Unicode"),
        ({"allowed_token_ids": [0], "min_tokens": 1}, "leave no token to draw"),
    ],
)
def test_what_the_model_lacks_is_refused(codec, params, says):
    with pytest.raises(InputError, match=says):
        resolve(SamplingParams(**params), codec, codec.rows, {0})


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 2, "temperature": 0}, "n is 2 at temperature 0"),
        ({"top_k": -2}, "top_k must be a whole number of at least -1"),
        ({"stop": ["a", ""]}, "stop must hold strings that are not empty, got ''"),
        ({"stop": 3}, "stop must be a list of strings, got 3"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": [1, -1]}, "a token of stop_token_ids must be a whole number of at least 0"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be a bool"),
        ({"ignore_eos": None}, "ignore_eos must be a bool"),
        ({"min_tokens": 129}, "min_tokens must be a whole number in 0 .. 128, got 129"),
        ({"logprobs": -2}, "logprobs must be a whole number of at least -1"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be a whole number"),
        ({"logit_bias": [1, 2]}, "logit_bias must be a mapping"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be a finite number in -100 .. 100, got 101"),
        ({"logit_bias": {"a": 1}}, "a token of logit_bias must be a whole number"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"bad_words": [1]}, "bad_words must hold strings"),
        ({"presence_penalty": 2.5}, "presence_penalty must be a finite number in -2 .. 2, got 2.5"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a finite number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number"),
        ({"grammar": {"xml": "a"}}, "grammar must be a mapping with one of json, regex, ebnf, json_object"),
        ({"grammar": {"regex": "a", "json": {}}}, "grammar must be a mapping with one of"),
        ({"grammar": {"regex": ""}}, "grammar regex must be a pattern that is not empty, got ''"),
        ({"grammar": {"json_object": False}}, "grammar json_object must be True"),
        (
            {"grammar": {"regex": "a"}, "ignore_eos": True},
            "grammar says where a response ends; leave out ignore_eos and min_tokens",
        ),
    ],
)
def test_params_name_what_is_wrong(params, says):
    with pytest.raises(InputError, match=f"SamplingParams: {says}"):
        SamplingParams(**params)


def test_params_are_plain_values():
    params = SamplingParams(
        top_k=-1, stop="end", stop_token_ids=np.array([1, 2]), logit_bias={np.int64(3): np.float32(1)}, bad_words=["a"]
    )
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ("end",), (1, 2))
    assert params.logit_bias == {3: 1.0}
    assert params.bad_words == ("a",)
    assert all(type(token) is int for token in (*params.stop_token_ids, *params.logit_bias))
    assert dataclasses.replace(params, seed=1) == dataclasses.replace(params, seed=1), "checked again as they are"
