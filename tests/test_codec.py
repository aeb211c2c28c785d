"""Text of tokens, whole and piece by piece, over every kind of tokenizer."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import pyengine
from pyengine import BestOfK, Blockwise, Engine, FunctionScorer, InputError, SamplingParams
from pyengine.codec import BROKEN, Codec

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Grüße, naïve café – 3 € 😀 👩‍👩‍👧",
    "写一首诗：好的 写 春眠不觉晓",
    "don't stop, it's 10.5 % !",
    "  two  spaces\n\tand a tab",
    "здравствуй мир",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>", "<think>"]


def wrapped(tokenizer, **special):
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **special
    )
    fast.add_special_tokens({"additional_special_tokens": ["<think>"]})
    return fast


def trained(tokenizer, kind, **options):
    tokenizer.train_from_iterator(TEXTS * 4, kind(special_tokens=SPECIAL, show_progress=False, **options))
    return wrapped(tokenizer)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer, vocab_size=330, initial_alphabet=alphabet)


def metaspace_bpe():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.BpeTrainer, vocab_size=150)


def llama2():
    """SentencePiece BPE with byte fallback, as Llama 2 has it: only ASCII is in the vocabulary."""
    words = [w for text in TEXTS for w in text.split() if w.isascii()]
    letters = sorted({c for w in words for c in w} | {"▁"})
    vocab, merges = {}, []
    for token in [*SPECIAL, *BYTES, *letters]:
        vocab.setdefault(token, len(vocab))
    for word in sorted(set(words)):
        left = "▁"
        for c in word:
            if left + c not in vocab:
                merges.append((left, c))
                vocab[left + c] = len(vocab)
            left += c
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def unigram(fallback):
    letters = sorted({c for text in TEXTS for c in text if c.isascii() and c not in " \n\t"})
    words = [f"▁{w}" for w in ("the", "quick", "fox", "dog", "don't", "it's", "stop,")]
    vocab = [(token, 0.0) for token in SPECIAL] + [(token, -9.0) for token in (BYTES if fallback else [])]
    vocab += [("▁", -2.0), *((c, -4.0) for c in letters), *((w, -3.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()] if fallback else [decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(parts)
    return wrapped(tokenizer)


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return trained(tokenizer, trainers.WordPieceTrainer, vocab_size=200)


def suffix_bpe():
    """As GPT-1: the end of a word is marked, and the last word's space is left out."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder("</w>")
    return trained(tokenizer, trainers.BpeTrainer, vocab_size=150, end_of_word_suffix="</w>")


def embedded():
    return transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))


KINDS = {
    "byte-level BPE": byte_level,
    "SentencePiece BPE": metaspace_bpe,
    "SentencePiece BPE with bytes": llama2,
    "Unigram": lambda: unigram(False),
    "Unigram with bytes": lambda: unigram(True),
    "WordPiece": word_piece,
    "BPE with suffixes": suffix_bpe,
    "embedded": embedded,
}


@pytest.fixture(scope="module", params=KINDS)
def codec(request):
    tokenizer = KINDS[request.param]()
    return Codec(tokenizer, "a model", len(tokenizer))


def spelled(codec, ids, skip=True):
    """The tokenizer's own text."""
    return codec.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def cases(codec, count, seed=0):
    """(prompt ids, response ids): text cut anywhere, and tokens at random."""
    draw = random.Random(seed)
    for i in range(count):
        if i % 3:
            ids = codec.tokenizer(" ".join(draw.sample(TEXTS, 3))).input_ids
            cut = draw.randrange(1, len(ids))
            yield ids[:cut], ids[cut : draw.randrange(cut, len(ids)) + 1]
        else:
            yield tuple([draw.randrange(codec.rows) for _ in range(n)] for n in (draw.randrange(1, 30), 24))


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_text(codec, skip):
    """Streamed one by one or in blocks, forked or not: decode(prompt + response) without decode(prompt)."""
    draw = random.Random(1)
    for prompt, response in cases(codec, 300):
        whole = codec.between(prompt, response, skip)
        text, pieces, at = codec.after(prompt, skip), [], 0
        while at < len(response):
            step = draw.choice((1, 1, 1, 2, 5))
            last = at + step >= len(response)
            fork = text.copy()
            fork.push([draw.randrange(codec.rows)], last=True)  # which leaves `text` as it is
            pieces.append(text.push(response[at : at + step], last))
            if not last:
                assert not pieces[-1].endswith(BROKEN), "a character that is not whole is held back"
            at += step
        assert "".join(pieces) == whole == text.text
        before, both = codec.decode(prompt, skip), codec.decode([*prompt, *response], skip)
        if not before.endswith(BROKEN):
            assert both == before + whole
        else:
            assert both.endswith(whole)


def test_tokens_have_the_bytes_of_their_part_of_the_text(codec):
    """Also where a character lies in several of them."""
    text = "a naïve 写一首诗 🦊 fox"
    ids = codec.pieces(text)
    if codec.tokenizer.unk_token_id not in ids and "".join(codec.decode(ids).split()) == "".join(text.split()):
        data = b"".join(codec.piece(token)[1] for token in ids)
        assert "".join(data.decode().split()) == "".join(text.split())
    for token in ids:
        shown, data = codec.piece(token)
        assert data.decode(errors="replace") == shown or BROKEN in shown


def test_text_is_the_tokenizers_own_wherever_bytes_make_characters(codec):
    compared = 0
    for prompt, response in cases(codec, 300, seed=2):
        for ids in (prompt, response, [*prompt, *response]):
            for skip in (True, False):
                if BROKEN not in spelled(codec, ids, skip):
                    compared += 1
                    assert codec.decode(ids, skip) == spelled(codec, ids, skip)
    assert compared > 600


def test_bytes_that_are_no_characters_break_nothing_before_them():
    """A decoder turns the whole run of byte tokens into U+FFFD."""
    codec = Codec(tokenizer := llama2(), "a model", len(tokenizer))
    ids = tokenizer("好的，fox").input_ids
    assert "<0xE5>" in tokenizer.convert_ids_to_tokens(ids)
    assert codec.decode(ids) == "好的，fox"
    whole = [len(c.encode()) for c in "好的，"]
    bytes_ = [i for i in ids if tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    for n in range(1, len(bytes_)):
        kept = "好的，"[: sum(sum(whole[: j + 1]) <= n for j in range(3))]
        found = codec.decode(bytes_[:n])
        assert found.rstrip(BROKEN) == kept
        assert found.count(BROKEN) == (len(kept.encode()) != n)
    x, fox = bytes_[1], tokenizer("fox").input_ids
    assert codec.decode([*bytes_[:3], x, *fox]) == f"好{BROKEN} fox"
    assert codec.decode([tokenizer.bos_token_id, x, *fox]) == f"{BROKEN} fox"


def test_a_response_begins_behind_a_prompt_of_bytes():
    """As far back as a few tokens, a prompt may be in the middle of a character."""
    codec = Codec(tokenizer := llama2(), "a model", len(tokenizer))
    prompt = tokenizer("写一首诗：").input_ids
    response = [i for i in tokenizer("好的，fox").input_ids][1:]  # without the space of a first word
    assert codec.between(prompt, response) == "好的，fox"
    text = codec.after(prompt)
    pieces = [text.push([token]) for token in response]
    assert "".join(pieces) == "好的，fox"
    assert [p for p in pieces if p][:3] == ["好", "的", "，"]


def test_a_long_response_is_not_decoded_again_for_every_token(codec):
    decoded = []
    original = codec._decoded
    codec._decoded = lambda ids: decoded.append(len(ids)) or original(ids)
    try:
        ids = codec.tokenizer(" ".join(TEXTS[:1] * 60)).input_ids
        text = codec.after(ids[:300])
        for token in ids[300:400]:
            text.push([token])
    finally:
        del codec._decoded
    assert sum(decoded) < 100 * 40


def test_special_tokens_are_part_of_the_answer_where_they_are_asked_for(model_dirs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    think = tokenizer.convert_tokens_to_ids("<think>")
    first = Engine(model, tokenizer).generate("the quick", None, SamplingParams(max_tokens=1, temperature=0))[0]
    with torch.no_grad():  # likelier than the likeliest
        model.lm_head.weight[think] = 3 * model.lm_head.weight[first.tokens[0]]
    seen = {}

    def plain(prompts, completions):
        seen["plain"] = completions
        return [float(c.count("<think>")) for c in completions]

    def raw(prompts, completions):
        seen["raw"] = completions
        return [float(c.count("<think>")) for c in completions]

    engine = Engine(model, tokenizer, [(1.0, plain), (1.0, FunctionScorer(raw, skip_special_tokens=False))])
    prompt = "the quick"
    for strategy in (None, BestOfK(4), Blockwise(4, 8)):
        for skip in (True, False):
            params = [SamplingParams(max_tokens=40, seed=s, skip_special_tokens=skip) for s in range(4)]
            results = engine.generate([prompt] * 4, strategy, params)
            assert any(think in r.tokens for r in results)
            for r in results:
                assert r.text.count("<think>") == (0 if skip else r.tokens.count(think))
                assert r.text.endswith("<eos>") == (r.finish_reason == "stop" and not skip)
                assert r.rewards == {"plain": 0.0, "raw": float(r.tokens.count(think))}
            events = list(engine.stream(prompt, strategy, params[0]))
            assert "".join(e.text for e in events) == results[0].text
        assert any("<think>" in c for c in seen["raw"])
        assert not any("<think>" in c for c in seen["plain"])
    with pytest.raises(InputError, match="skip_special_tokens must be a bool"):
        SamplingParams(skip_special_tokens="no")


def test_tokens_that_only_look_like_bytes_are_their_own_text():
    """A vocabulary may hold them though its decoder does not fall back to them."""
    tokenizer = unigram(False)
    tokenizer.add_tokens(BYTES)
    codec, ids = Codec(tokenizer, "a model", len(tokenizer)), tokenizer.convert_tokens_to_ids(["<0xE5>", "<0xA5>"])
    assert codec.decode(ids) == spelled(codec, ids)
    assert "<0xE5>" in codec.decode(ids)
