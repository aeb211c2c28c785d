"""The server through OpenAI's own client, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import math
import time

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyengine
from pyengine import Blockwise, Engine, SamplingParams, Tokenwise
from pyengine.serve.limits import Refused
from pyengine.serve.link import Link
from pyengine.serve.wire import CoreOptions, Job

PROMPT = "Review of the Harbour, a bakery:"
SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}
BOUND = math.log(4) - 3 / 4  # nats of a block of four
BLOCKWISE = {"tilt_strategy": "blockwise", "tilt_k": 4, "tilt_block_tokens": 8}


@pytest.fixture(scope="module")
def server(serve):
    return serve("--api-key", "secret", "--max-k", "16", "--max-n", "8", "--max-tokens", "300")


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(pyengine.embedded("policy"), pyengine.embedded("prefix"), cache_gb=0.05)


def complete(client, **fields):
    return client.completions.create(**{"model": "policy", "prompt": PROMPT, "max_tokens": 24, "seed": 3} | fields)


def test_the_same_seed_gives_the_same_answer_as_from_python(client, engine):
    for strategy, fields in (
        (None, {}),
        (Tokenwise(3.0), {"tilt_strategy": "tokenwise", "tilt_weight": 3.0}),
        (Tokenwise(kl_budget=0.1), {"tilt_strategy": "tokenwise", "tilt_kl_budget": 0.1}),
        (Blockwise(4, 8), BLOCKWISE),
    ):
        (result,) = engine.generate(PROMPT, strategy, SamplingParams(max_tokens=24, seed=3))
        choice = complete(client, extra_body=fields).choices[0]
        assert (choice.text, choice.finish_reason) == (result.text, result.finish_reason)
        tilt = choice.tilt
        assert tilt["kl"] == pytest.approx(result.kl)
        assert (tilt["kl_kind"], tilt["seed"], tilt["drawn_tokens"]) == (result.kl_kind, 3, result.drawn_tokens)
        assert tilt["reward"] == (pytest.approx(result.reward) if fields else None)


def test_usage_counts_committed_tokens_and_all_branches(client, engine):
    (result,) = engine.generate(PROMPT, Blockwise(4, 8), SamplingParams(max_tokens=24, seed=3))
    usage = complete(client, extra_body=BLOCKWISE).usage
    assert usage.prompt_tokens == len(result.prompt_ids)
    assert usage.completion_tokens == len(result.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.tilt_drawn_tokens == result.drawn_tokens > len(result.tokens)


def test_token_ids_are_shown_where_asked_for(client, engine):
    (result,) = engine.generate(PROMPT, Blockwise(4, 8), SamplingParams(max_tokens=24, seed=3))
    fields = BLOCKWISE | {"return_token_ids": True}
    assert complete(client, extra_body=fields).choices[0].token_ids == result.tokens
    *chunks, _ = complete(client, stream=True, extra_body=fields)
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == result.tokens
    assert not hasattr(complete(client).choices[0], "token_ids")


def test_a_stream_joins_to_the_answer(client):
    whole = complete(client, extra_body=BLOCKWISE).choices[0]
    shown = BLOCKWISE | {"tilt_candidates": True}
    *chunks, last, usage = complete(client, stream=True, stream_options={"include_usage": True}, extra_body=shown)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert last.choices[0].finish_reason == whole.finish_reason
    assert last.choices[0].tilt["reward"] == whole.tilt["reward"]
    blocks = [chunk.choices[0].tilt["block"] for chunk in chunks]
    assert sum(len(c["tokens"]) for block in blocks for c in block["candidates"]) == whole.tilt["drawn_tokens"]
    assert [block["candidates"][block["chosen"]]["text"] for block in blocks] == [c.choices[0].text for c in chunks]
    for block in blocks:
        best = max(block["candidates"], key=lambda c: c["utility"])
        assert block["candidates"][block["chosen"]]["utility"] == best["utility"]
        for c in block["candidates"]:
            assert c["rank"] == 1 + sum(other["base_logprob"] > c["base_logprob"] for other in block["candidates"])
    assert chunks[-1].choices[0].tilt["kl"] == pytest.approx(whole.tilt["kl"])
    assert usage.usage.completion_tokens_details.tilt_drawn_tokens == whole.tilt["drawn_tokens"]
    told = {"include_usage": True, "continuous_usage_stats": True}
    *tokens, usage = complete(client, stream=True, stream_options=told)
    count = complete(client).usage.completion_tokens  # a chunk for each token, and the end
    assert [chunk.usage.completion_tokens for chunk in tokens] == [*range(1, count + 1), count]
    assert tokens[0].usage.total_tokens == usage.usage.prompt_tokens + 1


def test_candidates_of_a_whole_answer(client):
    tilt = complete(client, extra_body=BLOCKWISE | {"tilt_candidates": True}).choices[0].tilt
    assert [len(block["candidates"]) for block in tilt["candidates"]] == [4] * len(tilt["candidates"])
    assert "candidates" not in complete(client, extra_body=BLOCKWISE).choices[0].tilt


def test_several_prompts_and_samples(client):
    answer = complete(client, prompt=[PROMPT, "Review of the Old Mill, a tea room:"], n=4)
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert len({choice.text for choice in answer.choices[:4]}) > 1
    assert answer.choices[0].text == complete(client).choices[0].text
    streamed = [""] * 8
    for chunk in complete(client, prompt=[PROMPT, "Review of the Old Mill, a tea room:"], n=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_token_ids_as_a_prompt(client, server):
    ids = server.post("/tokenize", {"prompt": PROMPT})[1]["tokens"]
    assert complete(client, prompt=ids).choices[0].text == complete(client).choices[0].text
    assert complete(client, prompt=[ids, ids]).choices[1].text == complete(client).choices[0].text
    assert server.post("/detokenize", {"tokens": ids}) == (200, {"prompt": PROMPT})
    assert server.post("/detokenize", {"tokens": [10**6]})[0] == 400
    found = server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})[1]
    assert "".join(found["token_strs"]).strip() == PROMPT
    assert found["count"] == len(ids)


def test_stop_across_two_tokens_and_a_list(client):
    text = complete(client, temperature=0).choices[0].text
    middle = len(text) // 2
    stop = text[middle - 3 : middle + 3]
    choice = complete(client, temperature=0, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert complete(client, temperature=0, stop=["never said", stop]).choices[0].text == choice.text
    pieces = complete(client, temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == choice.text


def test_greedy_logprobs_are_the_models(client):
    choice = complete(client, temperature=0, logprobs=5, echo=True, max_tokens=8).choices[0]
    tokenizer = AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    model = AutoModelForCausalLM.from_pretrained(pyengine.embedded("policy"), dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    logp = model(out).logits[0, :-1].log_softmax(-1)
    wanted = logp.gather(1, out[0, 1:, None])[:, 0].tolist()
    assert choice.text == tokenizer.decode(out[0], skip_special_tokens=True)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    likeliest = logp.topk(5).values.tolist()
    for found, each in zip(choice.logprobs.top_logprobs[1:], likeliest, strict=True):
        assert sorted(found.values(), reverse=True)[:5] == pytest.approx(each, abs=1e-4)
    for text, at in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[at:].startswith(text) or text == tokenizer.eos_token
    only = complete(client, temperature=0, logprobs=0, echo=True, max_tokens=0)
    assert only.choices[0].text == PROMPT
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(wanted[: ids.shape[1] - 1], abs=1e-4)
    assert only.usage.completion_tokens == 0


def test_streamed_logprobs_are_those_of_the_whole(client):
    for fields in ({}, BLOCKWISE):
        whole = complete(client, logprobs=2, extra_body=fields).choices[0].logprobs
        chunks = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True, extra_body=fields)]
        pieces = [p for p in chunks if p is not None]
        assert [t for p in pieces for t in p.tokens] == whole.tokens
        assert [x for p in pieces for x in p.token_logprobs] == pytest.approx(whole.token_logprobs)
        assert [at for p in pieces for at in p.text_offset] == whole.text_offset


def test_logprobs_are_the_policys_with_the_bases_beside(client, engine):
    (result,) = engine.generate(PROMPT, Tokenwise(4.0), SamplingParams(max_tokens=24, seed=3))
    tilted = {"tilt_strategy": "tokenwise", "tilt_weight": 4.0}
    logprobs = complete(client, logprobs=1, extra_body=tilted).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(result.logp_policy, abs=1e-5)
    (filtered,) = engine.generate(PROMPT, Tokenwise(4.0), SamplingParams(max_tokens=24, seed=3, top_k=5))
    shown = complete(client, logprobs=0, extra_body=tilted | {"top_k": 5}).choices[0]
    assert shown.tilt["logp_policy"] == pytest.approx(filtered.logp_policy, abs=1e-5)
    assert shown.tilt["logp_base"] == pytest.approx(filtered.logp_base, abs=1e-5)
    assert shown.logprobs.token_logprobs != pytest.approx(filtered.logp_policy, abs=1e-2)
    assert "logp_policy" not in complete(client, extra_body=tilted).choices[0].tilt
    assert logprobs.base_token_logprobs == pytest.approx(result.logp_base, abs=1e-5)
    assert result.logp_policy != pytest.approx(result.logp_base, abs=1e-2)


def test_bias_and_penalties(client, server):
    greedy = complete(client, temperature=0, logprobs=0).choices[0]
    first = greedy.logprobs.tokens[0]
    (banned,) = server.post("/tokenize", {"prompt": first, "add_special_tokens": False})[1]["tokens"]
    assert not complete(client, temperature=0, logit_bias={str(banned): -100}).choices[0].text.startswith(first)
    long = {"temperature": 0, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    assert complete(client, **long, frequency_penalty=2.0).choices[0].text != complete(client, **long).choices[0].text
    assert complete(client, **long, presence_penalty=2.0).choices[0].text != complete(client, **long).choices[0].text


def test_a_json_schema_holds_for_every_candidate(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}}
    fields = BLOCKWISE | {"response_format": wanted, "tilt_scorer": "sentiment=1,length=.01"}
    choice = complete(client, max_tokens=100, extra_body=fields).choices[0]
    assert set(json.loads(choice.text)) == {"good", "stars"}
    assert set(choice.tilt["rewards"]) == {"sentiment", "length"}


def test_async_client(server):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            fields = {"model": "policy", "prompt": PROMPT, "max_tokens": 24}
            whole = await asyncio.gather(*(client.completions.create(**fields, seed=i) for i in range(8)))
            stream = await client.completions.create(**fields, seed=5, stream=True)
            pieces = [chunk.choices[0].text async for chunk in stream]
            return [answer.choices[0].text for answer in whole], "".join(pieces)

    texts, streamed = asyncio.run(all_of_them())
    assert streamed == texts[5]
    assert len(set(texts)) > 1


REFUSED = {
    "temperature": ({"temperature": -1}, "temperature"),
    "type": ({"max_tokens": "many"}, "max_tokens"),
    "max_tokens": ({"max_tokens": 301}, "max_tokens"),
    "n": ({"n": 9}, "n"),
    "k": ({"extra_body": {"tilt_strategy": "best_of_k", "tilt_k": 17}}, "tilt_k"),
    "logprobs": ({"logprobs": 21}, "logprobs"),
    "unknown field": ({"extra_body": {"temprature": 1}}, "temprature"),
    "unknown tilt field": ({"extra_body": {"tilt_wieght": 1}}, "tilt_wieght"),
    "unknown strategy": ({"extra_body": {"tilt_strategy": "greedy"}}, "tilt_strategy"),
    "unused field": ({"extra_body": {"tilt_strategy": "tokenwise", "tilt_k": 4}}, "tilt_k"),
    "without a strategy": ({"extra_body": {"tilt_k": 4}}, "tilt_k"),
    "unknown scorer": ({"extra_body": BLOCKWISE | {"tilt_scorer": "/etc/passwd"}}, "tilt_scorer"),
    "wrong scorer": ({"extra_body": {"tilt_strategy": "tokenwise", "tilt_scorer": "length"}}, "tilt_scorer"),
    "greedy budget": (
        {"temperature": 0, "extra_body": {"tilt_strategy": "tokenwise", "tilt_kl_budget": 1}},
        "tilt_kl_budget",
    ),
    "best_of": ({"best_of": 3}, "best_of"),
    "suffix": ({"suffix": "the end"}, "suffix"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "long prompt": ({"prompt": "word " * 600}, "prompt"),
    "token": ({"prompt": [1, 10**6]}, "prompt"),
    "stop token": ({"extra_body": {"stop_token_ids": [10**6]}}, "stop_token_ids"),
    "logit_bias": ({"logit_bias": {"word": 1}}, "logit_bias"),
    "long logit_bias": ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    "format": ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format"),
    "schema": ({"extra_body": {"response_format": {"type": "json_schema", "json_schema": {}}}}, "response_format"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "chat template": ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_values_are_named(client, name):
    fields, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error"


def test_what_is_nested_too_deeply_is_refused_and_leaves_nothing_under_way(server):
    deep = json.loads('{"a":' * 900 + "1" + "}" * 900)
    wanted = {"type": "json_schema", "json_schema": {"schema": deep}}
    status, body = server.post("/v1/completions", {"prompt": PROMPT, "response_format": wanted})
    assert (status, body["error"]["code"]) == (400, "invalid_body")
    link = Link(CoreOptions())
    with pytest.raises(Refused, match="nested too deeply"):
        link.ask(Job, [PROMPT], None, SamplingParams(grammar={"json": deep}), None, False, False)
    assert link.live == link.waiting == 0


def test_a_refusal_says_limit_value_and_field(client):
    with pytest.raises(openai.BadRequestError, match=r"max_tokens is 301, this server's limit is 300 \(--max-tokens\)"):
        complete(client, max_tokens=301)


def test_other_errors_have_their_types(client, server):
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0))
    with pytest.raises(openai.NotFoundError, match="this server has 'policy'"):
        complete(client, model="gpt-4")
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object)
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, prompt="word " * 10**6)
    assert caught.value.status_code == 413
    with pytest.raises(openai.InternalServerError, match="it always does"):
        complete(client, extra_body=BLOCKWISE | {"tilt_scorer": "raises"})
    assert complete(client).choices[0].text
    assert [model.id for model in client.models.list()] == ["policy"]
    assert client.models.retrieve("policy").max_model_len == 512


def test_what_is_not_json_is_a_400(server):
    assert server.post("/v1/completions", b"{not json")[0] == 400
    assert server.post("/v1/completions", b"[1, 2]")[0] == 400
    status, body = server.post("/v1/completions", b"{}", {"Content-Type": "text/plain"})
    assert status == 400
    assert "Content-Type: application/json" in body["error"]["message"]


def test_a_stream_that_fails_says_so(client):
    with pytest.raises(openai.APIError, match="it always does"):
        list(complete(client, stream=True, extra_body=BLOCKWISE | {"tilt_scorer": "raises"}))


def test_metrics_tell_what_was_done(client, server):
    before = server.metrics()
    answer = complete(client, extra_body=BLOCKWISE, n=2)
    assert list(complete(client, stream=True))
    time.sleep(0.3)  # the core says it ten times a second
    after = server.metrics()

    def more(name):
        return after[name] - before.get(name, 0)

    usage = answer.usage
    assert more("pyengine_prompt_tokens_total") == 2 * usage.prompt_tokens
    assert more("pyengine_drawn_tokens_total") >= usage.completion_tokens_details.tilt_drawn_tokens
    assert more('pyengine_kl_nats_total{kind="bound"}') == pytest.approx(sum(c.tilt["kl"] for c in answer.choices))
    assert more("pyengine_kept_rank_count") == pytest.approx(more('pyengine_kl_nats_total{kind="bound"}') / BOUND)
    assert more("pyengine_time_to_first_token_seconds_count") == 1
    assert more("pyengine_queue_seconds_count") == 3
    assert more('pyengine_http_responses_total{route="/v1/completions",status="200"}') == 2
    for phase in ("admit", "prefill", "sample", "select", "commit"):
        assert more(f'pyengine_step_seconds_total{{phase="{phase}"}}') > 0


def test_health_needs_no_key_and_the_rest_does(server):
    for path, status in (("/health", 200), ("/ready", 200), ("/", 200), ("/metrics", 401), ("/v1/models", 401)):
        assert server.get(path, {})[0] == status


def test_who_has_no_key_is_refused_before_the_body_is_read(server):
    status, body = server.ask("POST", "/v1/completions", b"{not json", {"Authorization": "Bearer wrong"})
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert server.ask("POST", "/tokenize", {"prompt": "a"}, {"Authorization": "bearer secret"})[0] == 200
    assert server.get("/openapi.json")[0] == 404


def test_the_prompt_at_fault_is_named_and_one_that_is_far_too_long_is_not_cut_up(client):
    with pytest.raises(openai.BadRequestError, match="prompt 1 has"):
        complete(client, prompt=[PROMPT, "word " * 600], n=2)
    with pytest.raises(openai.BadRequestError, match="characters"):
        complete(client, prompt="word " * 100_000)
    with pytest.raises(openai.BadRequestError, match="characters"):
        client.post("/../tokenize", cast_to=object, body={"prompt": "word " * 100_000})


def test_an_echo_alone_shows_no_token(client):
    (only,) = complete(client, echo=True, max_tokens=0, n=1).choices
    assert (only.text, only.logprobs) == (PROMPT, None)
    assert "".join(c.choices[0].text for c in complete(client, echo=True, max_tokens=0, stream=True)) == PROMPT
    both = complete(client, echo=True, logprobs=2, max_tokens=4, n=2).choices
    ids = len(both[0].logprobs.tokens) - 4
    assert both[0].logprobs.token_logprobs[:ids] == both[1].logprobs.token_logprobs[:ids]
    for found in both[1].logprobs.top_logprobs[1:]:
        assert list(found.values()) == sorted(found.values(), reverse=True)
