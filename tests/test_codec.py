"""Text of tokens piece by piece over every kind of tokenizer, and prompts of every form."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import pyengine
from pyengine import BestOfK, Blockwise, Engine, FunctionScorer, InputError, SamplingParams
from pyengine.codec import BROKEN, Codec, PromptKey, as_prompts
from pyengine.jsonl import prompt_of, read_file, read_prompts, response_of
from pyengine.scorers import Candidates
from pyengine.training.data import Example, encode, read_examples, roll_out, write_examples
from pyengine.training.examples import read_preferences

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


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{% if not loop.last or add_generation_prompt %} / {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED = [{"role": "user", "content": "the quick"}]


@pytest.fixture
def chat(model_dirs):
    """An engine whose tokenizer has a BOS, which it puts before every text, and a chat template that writes one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    bos = tokenizer.convert_ids_to_tokens(7)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 7)])
    tokenizer.chat_template = TEMPLATE
    return Engine(transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), tokenizer)


class TestPrompts:
    sampling = SamplingParams(max_tokens=6, seed=2)

    def test_messages_go_through_the_template_with_one_bos(self, chat):
        text = chat.tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
        ids = chat.tokenizer(text, add_special_tokens=False).input_ids
        assert ids[0] == 7
        assert ids[1] != 7
        assert chat.encode("the quick")[:2] == [7, chat.tokenizer("the", add_special_tokens=False).input_ids[0]]
        forms = [ASKED, {"messages": ASKED}, text, {"prompt": text}, ids, {"prompt_ids": ids}, PromptKey(ASKED)]
        results = [chat.generate(form, None, self.sampling)[0] for form in forms]
        for form, result in zip(forms, results, strict=True):
            assert result.prompt_ids == ids, form
            assert result.tokens == results[0].tokens
            assert result.text == results[0].text
        assert results[0].prompt == text
        assert [r.tokens for r in chat.generate(forms, None, self.sampling)] == [results[0].tokens] * len(forms)
        (event, *_) = chat.stream(ASKED, None, self.sampling)
        assert event.tokens == results[0].tokens[:1]

    def test_a_last_message_of_the_assistant_is_continued(self, chat):
        given = [*ASKED, {"role": "assistant", "content": "brown"}]
        (result,) = chat.generate(given, None, self.sampling)
        assert result.prompt.endswith("[assistant] brown")

    def test_one_prompt_or_several(self):
        assert as_prompts("a") == ["a"]
        assert as_prompts([1, 2]) == [[1, 2]]
        assert as_prompts(ASKED) == [ASKED]
        assert as_prompts({"messages": ASKED}) == [{"messages": ASKED}]
        several = ["a", [1, 2], ASKED, {"prompt": "b"}]
        assert as_prompts(several) == several
        assert as_prompts([{"prompt": "a"}, {"prompt": "b"}]) == [{"prompt": "a"}, {"prompt": "b"}]
        assert as_prompts(iter(["a", "b"])) == ["a", "b"]
        assert as_prompts([]) == []

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ({"messages": ASKED, "prompt": "a"}, 'give one of "prompt", "prompt_ids" and "messages"'),
            ({"text": "a"}, r'give one of .* got \["text"\]|\[\'text\'\]'),
            ([1, 320], r"prompt 0 has token 320, model .* embeds 320 tokens"),
            ([-1], "prompt 0 has token -1, "),
            ([True], "a message is"),
            ([["a"]], "a message is|not a string"),
            ([{"role": "judge", "content": "a"}], "chat template of model .* refuses it: no judges"),
            ([{"role": "user"}], "a message is"),
            (b"bytes", "not a string, token ids or messages"),
        ],
    )
    def test_a_prompt_that_is_none_is_named(self, chat, prompt, message):
        with pytest.raises(InputError, match=message):
            chat.generate([prompt], None, self.sampling)

    def test_messages_without_a_template(self, model_dirs):
        with pytest.raises(InputError, match="prompt 0: the tokenizer of model 'llama' has no chat template"):
            Engine.from_pretrained(model_dirs["llama"]).generate(ASKED)

    def test_a_token_that_the_model_does_not_embed_is_refused_where_it_is_used(self, model_dirs):
        """As CodeLlama's tokenizer has one more than its 34b."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
        tokenizer.add_tokens([f"<more{i}>" for i in range(321 - len(tokenizer))])
        engine = Engine(transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), tokenizer)
        assert len(tokenizer) == 321
        assert engine.generate("the quick", None, self.sampling)
        last = tokenizer.convert_ids_to_tokens(320)
        with pytest.raises(InputError, match=rf"prompt 1 has token 320 '{last}', model 'llama' embeds 320 tokens"):
            engine.generate(["the quick", f"the {last}"], None, self.sampling)

    def test_white_space_is_a_prompt(self, chat):
        for prompt in (" ", "\n\n", "\t"):
            assert chat.generate(prompt, None, self.sampling)[0].tokens


class TestFiles:
    def jsonl(self, path, *records):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def test_prompts_of_every_form(self, tmp_path, chat):
        file = self.jsonl(
            tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt_ids": [5, 6]}, {"messages": ASKED}, {"prompt": ASKED}
        )
        found = read_prompts(file)
        assert found[0] == "a"
        assert [p.form for p in found[1:]] == [[5, 6], ASKED, ASKED]
        assert chat.encode(found[1]) == [5, 6]
        assert chat.encode(found[2]) == chat.encode(ASKED) == chat.encode(found[3])

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({}, "lacks them all"),
            ({"prompt": "a", "messages": ASKED}, "has 'prompt' and 'messages'"),
            ({"prompt": 3}, "needs a string or messages"),
            ({"prompt_ids": ["a"]}, "needs token ids under"),
            ({"prompt_ids": []}, "needs token ids under"),
            ({"messages": []}, "needs messages"),
            ({"messages": "a"}, "needs messages"),
        ],
    )
    def test_a_record_without_a_prompt(self, record, message):
        with pytest.raises(InputError, match=f"x:1: .*{message}"):
            prompt_of(record, "x:1")

    def test_a_response_may_be_a_message(self):
        assert response_of({"chosen": [{"role": "assistant", "content": "a"}]}, "chosen", "x:1") == "a"
        for wrong in ([{"role": "user", "content": "a"}], [], 3, [{"role": "assistant", "content": 3}]):
            with pytest.raises(InputError, match="x:1: 'chosen' must be a string or one message"):
                response_of({"chosen": wrong}, "chosen", "x:1")

    def test_byte_order_marks(self, tmp_path):
        file = tmp_path / "p.jsonl"
        file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
        assert read_prompts(file) == ["a", "b"]
        file.write_bytes('{"prompt": "a"}'.encode("utf-16"))
        with pytest.raises(InputError, match="is UTF-16, JSONL is UTF-8"):
            read_file(file)

    def test_training_rows_as_conversations(self, chat, tmp_path):
        answer = [{"role": "assistant", "content": "brown fox"}]
        ids = chat.encode(ASKED)
        rows = [
            {"prompt": ASKED, "completion": answer, "reward": 1.0},
            {"messages": ASKED, "response": "brown fox", "reward": 1.0},
            {"prompt_ids": ids, "response": "brown fox", "reward": 1.0},
        ]
        found = read_examples(self.jsonl(tmp_path / "e.jsonl", *rows), chat)
        encoded = [encode(chat, example) for example in found]
        assert all(e.ids == encoded[0].ids for e in encoded)
        assert encoded[0].ids[: encoded[0].start] == ids
        assert encoded[0].ids[-1] == 0
        assert chat.codec.between(ids, encoded[0].ids[len(ids) : -1]) == "brown fox"
        write_examples(tmp_path / "again.jsonl", found)
        assert [encode(chat, e).ids for e in read_examples(tmp_path / "again.jsonl", chat)] == [e.ids for e in encoded]
        pairs = self.jsonl(
            tmp_path / "pairs.jsonl",
            {"prompt": ASKED, "chosen": answer, "rejected": [{"role": "assistant", "content": "dog"}]},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        )
        first, second = read_preferences(pairs)
        assert (first.prompt.form, first.chosen, first.rejected) == (ASKED, "brown fox", "dog")
        assert second[:3] == ("a", "b", "c")

    def test_roll_outs_keep_the_form_of_their_prompts(self, chat, tmp_path):
        examples = roll_out(chat, [ASKED, "the lazy"], lambda p, c: [1.0] * len(c), 2, max_tokens=5, seed=1)
        assert [getattr(e.prompt, "form", e.prompt) for e in examples] == [ASKED, ASKED, "the lazy", "the lazy"]
        assert encode(chat, examples[0]).ids[: len(chat.encode(ASKED))] == chat.encode(ASKED)
        write_examples(tmp_path / "r.jsonl", examples)
        assert [encode(chat, e).ids for e in read_examples(tmp_path / "r.jsonl", chat)] == [
            encode(chat, e).ids for e in examples
        ]

    def test_a_function_gets_messages_as_messages(self):
        seen = []
        scorer = FunctionScorer(lambda prompts, completions: seen.extend(prompts) or [0.0] * len(prompts))
        scorer.score(Candidates([PromptKey(ASKED), "a"], [[1], [1]], {}, {}, lambda tokens: ["x", "y"]))
        assert seen == [ASKED, "a"]


def test_an_example_of_text_that_begins_with_the_bos_gets_no_second_one(chat):
    text = chat.tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    found = encode(chat, Example(text, "brown fox", 1.0))
    assert found.ids[: found.start] == chat.encode(ASKED)
    assert found.ids[:2].count(7) == 1
