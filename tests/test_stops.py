"""Where a branch ends and what of it can be shown, over byte-level and SentencePiece tokens."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from transformers.generation.stopping_criteria import StopStringCriteria

import pyengine
from pyengine import SamplingParams
from pyengine.codec import BROKEN, Codec
from pyengine.decode.stops import Branch, Ends, Finish, begun, completed, ends_of

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "sphinx of quartz"]


@pytest.fixture(scope="module", params=["byte-level", "SentencePiece"])
def codec(request, sentencepiece_tokenizer):
    bytes_ = request.param == "byte-level"
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy")) if bytes_ else sentencepiece_tokenizer
    )
    return Codec(tokenizer, "a model", len(tokenizer))


def branch(codec, ends, prompt="the quick"):
    return Branch(ends, codec.after(codec.encode(prompt)))


def responses(codec, count, draw):
    """Token ids of texts, some with characters that are several byte tokens, and of tokens at random."""
    more = ["naïve café – 3 €", "aabaabaab"] if len(codec.tokenizer) > 400 else ["aabaabaab"]
    for i in range(count):
        text = " ".join(draw.choices(TEXTS + more, k=3))
        noise = [draw.randrange(1, codec.rows) for _ in range(30)]
        yield noise if i % 4 == 0 else codec.pieces(text)[draw.randrange(4) :][:60]


def strings_of(text, draw):
    """Stop strings, most of them from the text, which overlap and begin like each other."""
    cuts = [(draw.randrange(len(text)), draw.choice([1, 2, 3, 5, 9])) for _ in range(draw.randrange(1, 5))]
    found = [text[at : at + n] for at, n in cuts]
    return tuple(dict.fromkeys([*found, found[0] + "x", "never"]))


def first_end(codec, prompt, ids, ends):
    """(tokens, text, stop string) by looking at the whole text after each token."""
    before = ""
    for i in range(1, len(ids) + 1):
        text = codec.after(prompt)
        text.push(ids[:i], last=i == len(ids))
        if i > ends.min_tokens:
            for end in range(len(before) + 1, len(text.text) + 1):
                ending = [s for s in ends.strings if text.text[:end].endswith(s)]
                if ending:
                    string = max(ending, key=len)
                    return i, text.text[: end if ends.included else end - len(string)], string
        before = text.text
    return len(ids), before, None


def test_stop_strings_end_a_branch_wherever_its_tokens_and_blocks_are_cut(codec):
    draw, stopped = random.Random(0), 0
    prompt = codec.encode("the quick")
    for ids in responses(codec, 150, draw):
        whole = codec.between(prompt, ids)
        strings = strings_of(whole, draw)
        ends = Ends(len(ids), strings=strings, min_tokens=draw.choice([0, 0, 7]), included=draw.random() < 0.5)
        count, text, string = first_end(codec, prompt, ids, ends)
        for steps in ([1], [4], [1, 2, 16], [100]):
            one, at, shown, pushed = branch(codec, ends), 0, "", 0
            while one.finish is None:
                step = draw.choice(steps)
                other = one.fork()
                other.push([draw.randrange(1, codec.rows)])  # which leaves this one as it is
                pushed += one.push(ids[at : at + step])
                at += step
                shown += one.show()
                assert any(s.startswith(one.text[len(shown) :]) for s in strings), "no more is held back than has to be"
            assert (one.count, pushed, one.text, shown) == (count, count, text, text)
            assert one.finish == (Finish("stop", string) if string else Finish("length"))
        stopped += string is not None
    assert 100 < stopped < 150


def test_a_branch_stops_where_transformers_does(codec):
    draw, stopped = random.Random(1), 0
    prompt = codec.encode("the quick")
    for ids in responses(codec, 40, draw):
        text = codec.between(prompt, ids)
        if not text.isascii():
            continue  # transformers compares pieces of characters
        strings = strings_of(text, draw)
        peer = StopStringCriteria(codec.tokenizer, list(strings))
        there = [bool(peer(torch.tensor([ids[: i + 1]]), None)[0]) for i in range(len(ids))]
        one = branch(codec, Ends(len(ids), strings=strings))
        one.push(ids)
        assert one.count == (there.index(True) + 1 if any(there) else len(ids))
        stopped += any(there)
    assert stopped > 15


def test_the_prompts_characters_do_not_count(codec):
    one = branch(codec, Ends(20, strings=("quick brown",)), prompt="the quick")
    one.push(codec.pieces("the quick brown")[len(codec.pieces("the quick")) :])
    assert one.finish is None
    assert one.text == " brown" == one.show()


def test_tokens_that_end_a_branch(codec):
    eos, (a, b, c) = codec.tokenizer.eos_token_id, (codec.pieces(f"the {x}")[-1] for x in "abc")
    ids = [a, b, c, eos]
    before, plain = (codec.between(codec.encode("the quick"), ids[:n]) for n in (2, 3))

    def ended(limit=9, **params):
        one = branch(codec, ends_of(SamplingParams(**params), {eos}, limit))
        one.push([*ids, *ids])
        return one.count, one.finish, one.text

    assert ended() == (4, Finish("stop"), plain)
    assert ended(limit=3) == (3, Finish("length"), plain)
    assert ended(max_tokens=3) == (3, Finish("length"), plain)
    assert ended(stop_token_ids=[c]) == (3, Finish("stop", c), before)
    assert ended(stop_token_ids=[c], limit=3)[1] == Finish("stop", c)
    assert ended(stop_token_ids=[c], include_stop_str_in_output=True) == (3, Finish("stop", c), plain)
    assert ended(min_tokens=3)[:2] == (4, Finish("stop"))
    assert ended(min_tokens=4)[:2] == (8, Finish("stop"))
    assert ended(min_tokens=3, stop_token_ids=[c])[:2] == (4, Finish("stop"))
    assert ended(ignore_eos=True, limit=8)[:2] == (8, Finish("length"))
    assert ended(ignore_eos=True, stop_token_ids=[eos])[:2] == (4, Finish("stop", eos))
    assert ended(stop="c", stop_token_ids=[c])[:2] == (3, Finish("stop", c))
    assert ended(stop=["c"], limit=3) == (3, Finish("stop", "c"), plain[:-1])
    one = branch(codec, Ends(3, eos=frozenset([eos])))
    assert (one.push([a]), one.push(ids), one.push([a])) == (1, 2, 0), "nothing follows the end"


def test_a_character_counts_once_it_is_whole(model_dirs):
    codec = Codec(transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]), "a model", 320)
    ids = [*codec.pieces("jugs"), *codec.pieces("€"), *codec.pieces("fox")]
    one, cut = branch(codec, Ends(9, strings=("s€",))), branch(codec, Ends(2))
    while one.finish is None:
        one.push([ids[one.count]])
    assert (one.count, one.text, one.show()) == (len(codec.pieces("jugs€")), "jug", "jug")
    cut.push(codec.pieces("€")[:1])
    assert cut.show() == ""
    cut.push(codec.pieces("€")[1:])
    assert cut.show() == BROKEN, "nothing will complete it"


def test_what_ends_first_and_what_may_begin():
    assert completed("a STOP b END", 0, ["END", "STOP"]) == (2, "STOP")
    assert completed("a STOP b END", 7, ["END", "STOP"]) == (9, "END")
    assert completed("xabc", 3, ["c", "abc", "bc"]) == (1, "abc")
    assert completed("STOP", 4, ["STOP"]) is None
    assert begun("aab", ["aabaac"]) == 3
    assert begun("xaabaa", ["aabaac", "ac"]) == 5
    assert begun("STOP", ["STOP"]) == 0
    assert begun("abc", []) == 0
