"""Responses with a reward: their tokens, files of them, roll-outs, and a word on every line that cannot be used."""

from __future__ import annotations

import json
import math

import pytest
import transformers

import pyengine
from pyengine import Engine, InputError, SamplingParams
from pyengine.jsonl import read_prompts
from pyengine.training.data import Example, encode, encode_all, read_examples, roll_out, write_examples
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"
SAID = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))(" The bread was lovely.").input_ids


def jsonl(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def record(**changes):
    return {"prompt": PROMPT, "response": " The bread was lovely.", "reward": 0.5} | changes


def test_a_response_is_its_own_tokens_behind_the_prompts_and_one_eos(engine):
    text = " The bread was lovely."
    head, said = (engine.tokenizer(t).input_ids for t in (PROMPT, text))
    eos = engine.tokenizer.eos_token_id
    assert encode(engine, Example(PROMPT, text, 1.0)) == (head + said + [eos], len(head), 1.0, True, PROMPT)
    assert encode(engine, Example(PROMPT, text, 1.0, ended=False)).ids == head + said
    assert encode(engine, Example(PROMPT, text + "<|endoftext|>", 1.0)).ids == head + said + [eos]
    assert encode(engine, Example(PROMPT, text, 1.0, tokens=[*said, eos])).ids == [*head, *said, eos]


def test_nothing_merges_across_the_border(engine):
    """ "bakery" is fewer tokens than "bak" and "ery": the prompt's own ids stay."""
    found = encode(engine, Example("Review of the Harbour, a bak", "ery.", 0.0))
    assert found.ids[: found.start] == engine.tokenizer("Review of the Harbour, a bak").input_ids
    assert engine.tokenizer.decode(found.ids[found.start :], skip_special_tokens=True) == "ery."


def test_sentencepiece_keeps_its_spaces(sentencepiece_tokenizer, model_dirs):
    """A response is spelled behind its prompt as it is, or refused; its first word gets no space of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    engine = Engine(model, sentencepiece_tokenizer)
    found = encode(engine, Example("the quick", " brown fox", 0.0))
    assert found.ids == [*sentencepiece_tokenizer("the quick brown fox").input_ids, 0]
    for prompt, response in (
        ("the qui", "ck brown fox"),
        ("the quick ", "brown fox"),
        ("the quick ", " brown fox"),
        ("the quick", "brown fox"),
    ):
        found = encode(engine, Example(prompt, response, 0.0))
        assert found.ids[: found.start] == sentencepiece_tokenizer(prompt).input_ids
        assert sentencepiece_tokenizer.decode(found.ids, skip_special_tokens=True) == prompt + response
    with pytest.raises(InputError, match="cannot spell this response behind its prompt"):
        encode(engine, Example("the qui", "ck 写", 0.0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "bad.jsonl:2: not JSON"),
        ("[1, 2]", "bad.jsonl:2: must be a JSON object"),
        ({"prompt": PROMPT, "response": " Fine."}, "bad.jsonl:2: lacks 'reward'"),
        ({}, "bad.jsonl:2: lacks 'prompt' and 'response' and 'reward'"),
        (record(response=3), "bad.jsonl:2: 'response' must be a string or one message of the assistant, got 3"),
        (record(reward=math.nan), "bad.jsonl:2: the reward is nan"),
        (record(reward=-math.inf), "bad.jsonl:2: the reward is -inf"),
        (record(reward="high"), "bad.jsonl:2: the reward must be a number, got 'high'"),
        (record(reward=True), "bad.jsonl:2: the reward must be a number, got True"),
        (record(response=""), "bad.jsonl:2: the response is empty"),
        (record(tokens=[]), "bad.jsonl:2: the response is empty"),
        (record(prompt=""), "bad.jsonl:2: the prompt is empty"),
        (record(response=" very" * 600), r"bad.jsonl:2: prompt and response have \d+ \+ \d{3,} tokens, .* reads 512"),
        (record(finish_reason="tired"), "bad.jsonl:2: finish_reason must be"),
        (record(response=" A.<|endoftext|> B."), "bad.jsonl:2: the response has an EOS at token"),
        (record(response=" A.<|endoftext|>", finish_reason="length"), 'is "length", but the response ends with an EOS'),
        (record(tokens=[745]), "token 745 is not in the vocabulary of 745 tokens"),
        (record(tokens=SAID), "bad.jsonl:2: its tokens end without an EOS"),
        (record(tokens=[5, 0]), "its tokens do not spell its response: they are another tokenizer's"),
    ],
)
def test_a_bad_line_is_named(engine, tmp_path, line, message):
    with pytest.raises(InputError, match=message) as error:
        read_examples(jsonl(tmp_path / "bad.jsonl", record(), line, "", record()), engine)
    assert "\n" not in str(error.value)


def test_all_bad_lines_are_told_together(engine, tmp_path):
    lines = [record(), *["{"] * 6, record(reward=math.nan)]
    with pytest.raises(InputError, match=r"^7 of 8 lines cannot be used: .*:2: not JSON.*:6: not JSON.*; and 2 more$"):
        read_examples(jsonl(tmp_path / "bad.jsonl", *lines), engine)
    with pytest.raises(InputError, match=r"^2 of 3 examples cannot be used: a: .*; b: "):
        encode_all(engine, [Example(PROMPT, "", 0.0, where=w) for w in "ab"] + [Example(PROMPT, " Yes.", 0.0)])
    with pytest.raises(InputError, match="no examples"):
        read_examples(jsonl(tmp_path / "empty.jsonl", ""), engine)
    with pytest.raises(InputError, match="No such file"):
        read_examples(tmp_path / "none.jsonl", engine)


def test_tokens_without_an_eos_need_a_finish_reason(engine, tmp_path):
    """An environment may end a response where no EOS stands; that its last token has the reward must be said."""
    lines = [record(tokens=SAID, finish_reason=reason) for reason in ("stop", "length")] + [record(tokens=[*SAID, 0])]
    found = encode_all(engine, read_examples(jsonl(tmp_path / "good.jsonl", *lines), engine))
    assert [i.ended for i in found] == [True, False, True]
    assert [i.ids[i.start :] for i in found] == [SAID, SAID, [*SAID, 0]]


def test_lines_are_read_as_they_are(engine, tmp_path):
    lines = [record(), record(response=" Fine.<|endoftext|>"), record(response=" I went", finish_reason="length")]
    found = read_examples(jsonl(tmp_path / "good.jsonl", *lines), engine)
    assert [(e.response, e.ended) for e in found] == [(r["response"], i < 2) for i, r in enumerate(lines)]
    assert [e.where for e in found] == [f"{tmp_path}/good.jsonl:{i}" for i in (1, 2, 3)]
    assert [i.ids[-1] == engine.tokenizer.eos_token_id for i in encode_all(engine, found)] == [True, True, False]


def test_prompts_from_a_file(tmp_path):
    assert read_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, "", {"prompt": "b"})) == ["a", "b"]
    with pytest.raises(
        InputError, match=r"2 of 3 lines cannot be used: .*:1: needs one of .prompt., .*lacks them all.*:3: not JSON"
    ):
        read_prompts(jsonl(tmp_path / "q.jsonl", {"text": "a"}, {"prompt": "b"}, "}"))


def test_roll_outs_are_the_base_policys_and_survive_the_disk(engine, tmp_path):
    engine.set_scorer(reviews.politeness)
    asked = [*reviews.prompts(2), reviews.prompts(1)[0]]  # one prompt again
    found = roll_out(engine, asked, reviews.sentiment, per_prompt=2, max_tokens=24, seed=3)
    assert [p.name for p in engine.parts] == ["politeness"]
    by_seed = {}
    for prompt in reviews.prompts(2):
        sampling = [SamplingParams(max_tokens=24, seed=3 + j) for j in range(4)]
        by_seed[prompt] = engine.generate([prompt] * 4, sampling=sampling)
    first, second = reviews.prompts(2)
    wanted = by_seed[first][:2] + by_seed[second][:2] + by_seed[first][2:]
    assert [e.tokens for e in found] == [r.tokens for r in wanted]
    assert [e.reward for e in found] == pytest.approx([reviews.sentiment_of(r.text) for r in wanted], abs=1e-6)
    assert [e.ended for e in found] == [r.finish_reason == "stop" for r in wanted]
    assert {e.ended for e in found} == {True, False}
    write_examples(tmp_path / "r.jsonl", found)
    again = read_examples(tmp_path / "r.jsonl", engine)
    assert encode_all(engine, again) == encode_all(engine, found)


def test_a_prompt_that_cannot_be_decoded_is_that_of_the_list(engine):
    with pytest.raises(InputError, match="prompt 1 is empty"):
        roll_out(engine, [PROMPT, ""], reviews.sentiment, per_prompt=3, max_tokens=1)


def test_the_engine_keeps_its_scorer_when_decoding_fails(engine):
    engine.set_scorer(reviews.politeness)
    with pytest.raises(InputError, match="one number for each"):
        roll_out(engine, [PROMPT], lambda prompts, completions: [0.0, 0.0], max_tokens=1)
    assert [p.name for p in engine.parts] == ["politeness"]


def test_a_reward_that_is_not_finite_names_prompt_and_sample(engine):
    def fails_on_the_second(prompts, completions):
        return [math.nan if i else 0.0 for i in range(len(completions))]

    with pytest.raises(InputError, match=r"roll-out 1 of prompt 'Review of the Harbour.*the reward is nan"):
        roll_out(engine, [PROMPT], fails_on_the_second, per_prompt=2, max_tokens=1)
    assert engine.parts == []
