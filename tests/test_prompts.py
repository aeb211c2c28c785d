"""Prompts of every form: texts, token ids and conversations, in Python, in files and wherever they are kept."""

from __future__ import annotations

import json

import pytest
import transformers

from pyengine import Engine, FunctionScorer, InputError, SamplingParams
from pyengine.codec import PromptKey, as_prompts
from pyengine.evaluation.rejection import rejection_sample
from pyengine.evaluation.sampling import sample_rewards
from pyengine.jsonl import prompt_of, read_file, read_prompts, response_of
from pyengine.rewards.references import References
from pyengine.scorers import Candidates
from pyengine.training.data import Example, encode, read_examples, roll_out, write_examples
from pyengine.training.embeddings import embed, samples_of
from pyengine.training.examples import read_preferences
from pyengine.training.labelling import label
from pyengine.training.pairs import build_pairs

ASKED = [{"role": "user", "content": "the quick"}]


@pytest.fixture
def chat(model_dirs, chat_tokenizer):
    """An engine whose tokenizer has a BOS, which it puts before every text, and a chat template that writes one."""
    return Engine(transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), chat_tokenizer)


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
            ({"messages": ASKED, "prompt": "a"}, "has 'prompt' and 'messages'"),
            ({"text": "a"}, 'needs one of "prompt", "prompt_ids" and "messages", lacks them all'),
            ({"messages": "a"}, 'needs messages.* under "messages"'),
            ({"prompt_ids": "a"}, 'needs token ids under "prompt_ids"'),
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


def rewarding(prompts, completions):
    """Longer is better; a conversation comes as messages."""
    return [len(c) + 100.0 * (p == ASKED) for p, c in zip(prompts, completions, strict=True)]


class TestKept:
    """Where prompts are kept, compared or written, one that is no text stays what it is."""

    def forms(self, chat):
        return [ASKED, {"messages": ASKED}, chat.encode(ASKED), {"prompt_ids": chat.encode(ASKED)}]

    def test_rewards_of_samples_belong_to_the_text_of_the_prompt(self, chat):
        sampling = SamplingParams(max_tokens=4, seed=1)
        (text,) = {r.prompt for r in chat.generate(ASKED, None, sampling)}
        by_text = sample_rewards(chat, ASKED, lambda p, c: [float(len(x)) for x in c], 3, sampling)
        assert list(by_text) == [text]
        assert len(by_text[text]) == 3
        ids = chat.encode(ASKED)
        (found,) = sample_rewards(chat, ids, lambda p, c: [float(len(x)) for x in c], 3, sampling).values()
        assert found == by_text[text]
        twice = sample_rewards(chat, [ASKED, {"messages": ASKED}], rewarding, 3, sampling)
        assert [len(rewards) for rewards in twice.values()] == [3]
        with pytest.raises(InputError, match="canned takes prompts as text"):
            References.canned(rewarding, [ASKED], ["no"])

    def test_rejection_takes_every_form(self, chat):
        chat.set_scorer(lambda prompts, completions: [1.0] * len(completions))
        for form in self.forms(chat):
            (found,) = rejection_sample(chat, form, 1.0, 1.0, sampling=SamplingParams(max_tokens=4, seed=1))
            assert found.result.prompt_ids == chat.encode(ASKED)

    def test_roll_outs_of_objects(self, chat, tmp_path):
        prompts = [{"prompt": "the lazy"}, *self.forms(chat)]
        examples = roll_out(chat, prompts, rewarding, 1, max_tokens=4)
        write_examples(tmp_path / "r.jsonl", examples)
        lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
        ids = chat.encode(ASKED)
        for line, key, form in zip(
            lines,
            ("prompt", "messages", "messages", "prompt_ids", "prompt_ids"),
            ("the lazy", ASKED, ASKED, ids, ids),
            strict=True,
        ):
            assert line[key] == form

    def test_pairs_keep_the_form_of_their_prompts(self, chat, tmp_path):
        ids = [5, 6, 7]
        sampling = SamplingParams(max_tokens=400, temperature=1.5, seed=2)
        (tmp_path / "p.jsonl").write_text(
            json.dumps({"messages": ASKED}) + "\n" + json.dumps({"prompt_ids": ids}) + "\n"
        )
        for source, name in (([ASKED, ids], "a.jsonl"), (tmp_path / "p.jsonl", "b.jsonl")):
            report = build_pairs(chat, source, rewarding, tmp_path / name, samples=12, sampling=sampling)
            assert report["pairs"] == 2
        assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
        spoken, numbered = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
        assert spoken["prompt"] == ASKED
        assert spoken["chosen"][0]["role"] == spoken["rejected"][0]["role"] == "assistant"
        assert numbered["prompt_ids"] == ids
        assert "prompt" not in numbered
        read = read_preferences(tmp_path / "a.jsonl")
        assert [pair.prompt.form for pair in read] == [ASKED, ids]
        assert read[0].chosen == spoken["chosen"][0]["content"]

    def test_what_is_embedded_is_what_was_decoded(self, chat):
        """The text of token ids, read again, may be other tokens."""
        pieces = [chat.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
        assert chat.encode("the")[1:] != pieces
        (result,) = chat.generate(pieces, None, SamplingParams(max_tokens=4, seed=1))
        example = Example(PromptKey(pieces), result.text, 0.0, result.tokens, result.finish_reason == "stop")
        assert embed(chat, [result]).equal(embed(chat, [example]))
        assert not embed(chat, [result]).equal(embed(chat, [Example("the", *list(vars(example).values())[1:5])]))
        seen = []
        samples_of(chat, [result], FunctionScorer(lambda p, c: seen.extend(c) or [0.0], skip_special_tokens=False))
        assert seen == [result.text]

    def test_labels_see_special_tokens_in_texts(self, tmp_path):
        rows = [{"prompt": " ", "response": "<think>a"}, {"messages": ASKED, "response": "b"}]
        seen = []

        def reward(prompts, completions):
            seen.append((prompts, completions))
            return [0.0] * len(completions)

        label(rows, FunctionScorer(reward, skip_special_tokens=False), tmp_path / "l.jsonl")
        assert seen == [([" ", ASKED], ["<think>a", "b"])]


@pytest.mark.parametrize("asked", [ASKED, "the quick"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_row_may_hold_special_tokens(chat, asked, ended):
    """As text, or as tokens that were decoded with or without them."""
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    chat.model.resize_token_embeddings(len(chat.tokenizer), mean_resizing=False)
    chat = Engine(chat.model, chat.tokenizer)
    think = chat.tokenizer.convert_tokens_to_ids("<think>")
    key = asked if isinstance(asked, str) else PromptKey(asked)
    from_text = encode(chat, Example(key, "<think>brown fox", 0.0, ended=ended))
    own = from_text.ids[from_text.start :]
    assert own[0] == think
    assert (own[-1] in chat.eos) == ended
    end = chat.tokenizer.eos_token
    for text in ("<think>brown fox", "brown fox", *(["<think>brown fox" + end] if ended else [])):
        assert encode(chat, Example(key, text, 0.0, own, ended)).ids == from_text.ids
    with pytest.raises(InputError, match="do not spell its response"):
        encode(chat, Example(key, "<think>brown", 0.0, own, ended))
