"""Chats over HTTP, through OpenAI's client, with a model that has a template and a BOS."""

from __future__ import annotations

import json

import openai
import pytest
import transformers

from pyengine import Blockwise, Engine, SamplingParams

ASKED = [{"role": "system", "content": "be"}, {"role": "user", "content": "the quick"}]
BLOCKWISE = {"tilt_strategy": "blockwise", "tilt_k": 3, "tilt_block_tokens": 4, "tilt_scorer": "length"}


@pytest.fixture(scope="module")
def directory(model_dirs, chat_tokenizer, tmp_path_factory):
    """Whose tokenizer puts a BOS before every text, and whose template writes one too."""
    directory = tmp_path_factory.mktemp("chat")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    chat_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def client(serve, directory):
    server = serve(str(directory), "--served-model-name", "talker", scorers=("length", "sentiment"))
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def engine(directory):
    return Engine.from_pretrained(directory, cache_gb=0.05)


def ask(client, messages=ASKED, **fields):
    given = {"model": "talker", "messages": messages, "max_completion_tokens": 12, "seed": 4}
    return client.chat.completions.create(**given | fields)


def test_the_same_answer_as_from_python_with_one_bos(client, engine):
    (result,) = engine.generate({"messages": ASKED}, None, SamplingParams(max_tokens=12, seed=4))
    answer = ask(client)
    assert (answer.model, answer.object) == ("talker", "chat.completion")
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", result.text)
    assert result.prompt_ids[:2].count(7) == 1
    assert answer.usage.prompt_tokens == len(result.prompt_ids)
    parts = [ASKED[0] | {"role": "developer"}, ASKED[1] | {"content": [{"type": "text", "text": "the quick"}]}]
    assert ask(client, parts).choices[0].message.content == result.text


def test_a_last_message_of_the_assistant_is_continued(client, engine):
    begun = [*ASKED, {"role": "assistant", "content": "brown fox"}]
    (result,) = engine.generate({"messages": begun}, None, SamplingParams(max_tokens=12, seed=4))
    answer = ask(client, begun, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == result.text
    assert result.prompt.endswith("brown fox")


def test_a_stream_begins_with_the_role(client, engine):
    (result,) = engine.generate({"messages": ASKED}, Blockwise(1, 4), SamplingParams(max_tokens=12, seed=4))
    first, *rest = ask(client, stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == result.text
    assert rest[-1].choices[0].finish_reason == "length"
    *blocks, _ = ask(client, stream=True, extra_body=BLOCKWISE)
    assert len(blocks) == 1 + 3  # the role, and a chunk for each block


def test_top_logprobs(client, engine):
    (result,) = engine.generate({"messages": ASKED}, None, SamplingParams(max_tokens=12, seed=4, logprobs=3))
    content = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [token.logprob for token in content] == pytest.approx(result.logp_policy, abs=1e-5)
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == result.text
    for token, likeliest in zip(content, result.logprobs, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([one.logprob for one in likeliest[:3]])
    assert ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_json_object_and_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    answer = ask(client, response_format=wanted, max_completion_tokens=40, n=3, extra_body=BLOCKWISE)
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content)) == {"a"}
    assert ask(client, response_format={"type": "json_object"}).choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"extra_body": {"chat_template": "{{ messages }}"}}, "chat_template"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"extra_body": {"continue_final_message": True}}, "continue_final_message"),
    ],
)
def test_bad_values_are_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.body["param"] == param
