"""Responses inside a grammar: what the mask admits can always be completed, whatever forks and rolls back."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import weakref

import jsonschema
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers

import pyengine
from pyengine import InputError, SamplingParams
from pyengine.codec import Codec
from pyengine.decode import grammar as module
from pyengine.decode.shaping import Shaping, resolve

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "stars": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["good", "go", "bad"]}, "minItems": 1},
        "open": {"type": "boolean"},
    },
    "required": ["name", "stars", "tags"],
    "additionalProperties": False,
}
PATTERN = r"(good|go|bad)(, [A-Z][a-z]{2,5})*: \d{1,3}€"
GRAMMARS = {
    "json": {"json": SCHEMA},
    "json text": {"json": json.dumps(SCHEMA)},
    "json_object": {"json_object": True},
    "regex": {"regex": PATTERN},
    "ebnf": {"ebnf": 'root ::= "(" (root | [a-c]+) ")"'},
}
CLOSING = ['"', "}", "]", ")", "0", ":", ","]  # what ends a document soonest


def bytes_of_sentencepiece():
    """SentencePiece BPE with byte fallback, as Llama 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁"]
    tokens += ["▁go", "od", "▁good", "go", '▁"', '":', '"name', "▁{"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=["byte-level", "SentencePiece"])
def codec(request):
    if request.param == "byte-level":
        tokenizer = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    else:
        tokenizer = bytes_of_sentencepiece()
    return Codec(tokenizer, "a model", len(tokenizer))


def started(codec, grammar, vocab=None):
    """One row inside a grammar, and the codec's EOS token."""
    eos, vocab = codec.tokenizer.eos_token_id, vocab or codec.rows
    return Shaping.start(resolve(SamplingParams(grammar=grammar), codec, vocab, {eos}), [5]), eos


def admitted(shaping, vocab):
    """The tokens that each row may draw."""
    logits = shaping.apply(torch.zeros(shaping.n, vocab))
    return [row.nonzero()[:, 0].tolist() for row in logits == 0]


def valid(kind, text):
    if kind.startswith("json"):
        found = json.loads(text)
        return isinstance(found, dict) if kind == "json_object" else jsonschema.validate(found, SCHEMA) is None
    return re.fullmatch(PATTERN if kind == "regex" else r"(\(+)([abc]+)(\)+)", text) is not None


@pytest.mark.parametrize("kind", GRAMMARS)
def test_whatever_the_mask_admits_can_be_completed(codec, kind):
    """Four branches draw what they like, fork and roll back; then each closes what is open."""
    draw, texts = random.Random(kind), set()
    tokens = map(codec.tokenizer.convert_tokens_to_ids, CLOSING)
    closing = [codec.tokenizer.eos_token_id, *(i for i in tokens if i is not None)]
    for _ in range(12):
        shaping, eos = started(codec, GRAMMARS[kind])
        rows: list[list[int]] = [[]] * 4
        shaping = shaping.take([0] * 4)
        saved = rows, shaping.take(range(4))
        for step in range(200):
            over = [eos in row for row in rows]
            if all(over):
                break
            tokens = []
            for row, can in zip(rows, admitted(shaping, codec.rows), strict=True):
                assert can, f"{codec.decode(row)!r} cannot be completed"
                tokens.append(next((t for t in closing if step > 20 and t in can), draw.choice(can)))
            shaping.advance(torch.tensor(tokens))
            rows = [row if done else [*row, token] for row, token, done in zip(rows, tokens, over, strict=True)]
            if step < 20 and draw.random() < 0.2:
                index = [draw.randrange(4) for _ in range(4)]
                rows, shaping = [rows[i] for i in index], shaping.take(index)
            elif step == 12:
                rows, shaping = saved
        assert all(over), "closed by then"
        for row in rows:
            text = codec.after([]).push(row, last=True)
            texts.add(text)
            assert valid(kind, text), text
    assert len(texts) > (10 if kind != "ebnf" else 4)


def test_the_mask_is_exactly_the_language(codec):
    """Over a language that can be listed: a token is admitted if and only if a word of it begins so."""
    pattern, draw = r"(yes|no|yet)( [01]{1,3})?", random.Random(0)
    bits = ["", *(f" {n:0{w}b}" for w in (1, 2, 3) for n in range(2**w))]
    words = [word + more for word in ("yes", "no", "yet") for more in bits]
    vocab = codec.rows + 40  # as models pad it
    shaping, eos = started(codec, {"regex": pattern}, vocab)
    start, before = shaping.take([0]), [codec.pieces("x")[-1]]
    for _ in range(8):
        shaping, row = start.take([0]), []
        while eos not in row:
            text = codec.between(before, row)
            (can,) = admitted(shaping, vocab)
            texts = {i: codec.between(before, [*row, i], skip_special_tokens=False) for i in range(codec.rows)}
            begin = [i for i, longer in texts.items() if longer != text and any(w.startswith(longer) for w in words)]
            assert can == sorted(begin + [eos] * (text in words))
            row.append(draw.choice(can))
            shaping.advance(torch.tensor(row[-1:]))


def test_the_end_of_a_response(codec):
    """Only EOS ends a document, and only a whole one; special tokens are no text; nothing is asked of an ended row."""
    shaping, eos = started(codec, {"json": {"type": "string"}})
    quote = codec.tokenizer.convert_tokens_to_ids('"')
    shaping.advance(torch.tensor([quote]))
    (can,) = admitted(shaping, codec.rows)
    assert quote in can
    assert not set(can) & codec.special
    shaping.advance(torch.tensor([quote]))
    ended = shaping.take([0, 0])
    assert admitted(shaping, codec.rows) == [[eos]]
    for token in (eos, quote, eos):
        ended.advance(torch.tensor([token, eos]))
        assert admitted(ended, codec.rows) == [list(range(codec.rows))] * 2
    assert admitted(shaping, codec.rows) == [[eos]], "its forks have ended, it has not"


def test_rows_without_a_grammar_keep_their_logits(codec):
    plain = Shaping.start(resolve(SamplingParams(), codec, codec.rows, {0}), [1])
    shaping = Shaping.join([plain, *(started(codec, {"regex": "a"})[0] for _ in range(2))]).take([1, 0, 2])
    letters = [i for i in range(codec.rows) if codec.between(codec.pieces("x"), [i]) == "a"]
    assert admitted(shaping, codec.rows) == [letters, list(range(codec.rows)), letters]


def test_a_grammar_is_compiled_once(codec):
    one, eos = Codec(codec.tokenizer, "another", codec.rows), codec.tokenizer.eos_token_id
    module.compile_grammar({"json": SCHEMA}, one, one.rows, {eos})
    ((compiler),) = module._compilers[one].values()
    size = compiler.get_cache_size_bytes()
    assert size > 0
    module.compile_grammar({"json": SCHEMA}, one, one.rows, [eos])
    assert [c.get_cache_size_bytes() for c in module._compilers[one].values()] == [size]
    module.compile_grammar({"regex": "abc"}, one, one.rows, {eos})
    assert compiler.get_cache_size_bytes() > size
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None, "what was compiled holds no codec"


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ({"json": "{"}, r"grammar json '{' does not compile: .*Failed to parse JSON"),
        ({"json": {"type": "nonsense"}}, 'grammar json .* does not compile: Unsupported type "nonsense"'),
        ({"json": {"type": {1, 2}}}, "does not compile: Object of type set is not JSON serializable"),
        ({"regex": "(a"}, r"grammar regex '\(a' does not compile: .*parenthesis is not closed"),
        ({"ebnf": "root ::= nope"}, 'grammar ebnf .* does not compile: .*"nope" is not defined'),
        ({"ebnf": "root ::= root"}, "grammar ebnf .*: no token of a model can begin it"),
    ],
)
def test_a_grammar_that_is_none_is_refused(codec, grammar, says):
    with pytest.raises(InputError, match=says) as refused:
        started(codec, grammar)
    assert "\n" not in str(refused.value)
    assert ".cc" not in str(refused.value)


def test_what_grammars_need(codec, sentencepiece_tokenizer, monkeypatch):
    other = Codec(sentencepiece_tokenizer, "a model", len(sentencepiece_tokenizer))
    with pytest.raises(InputError, match=r"grammar needs a tokenizer whose tokens are bytes; for a model, token \d+"):
        started(other, {"regex": "a"})
    with pytest.raises(InputError, match="grammar needs an EOS token, a model has none"):
        resolve(SamplingParams(grammar={"regex": "a"}), codec, codec.rows, ())
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(InputError, match=r"pip install 'tilt-engine\[grammar\]'"):
        started(codec, {"regex": "a"})
