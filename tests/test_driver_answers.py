"""What `BlockwiseDriver` makes of an endpoint that is busy, knows less than it should, or answers nonsense."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import pyengine
from pyengine import BestOfK, InputError, RequestError, SamplingParams, lsc
from pyengine.integrations import hosts
from pyengine.integrations.driver import BlockwiseDriver
from pyengine.integrations.hosts import TRIES
from pyengine.ledger import best_of_k_bound

POLICY, JUDGE = pyengine.embedded("policy"), pyengine.embedded("reward-model")
PROMPT = "Review of the Harbour, a bakery:"


def driver(url, scorer, tokenizer=None):
    return BlockwiseDriver(url, scorer, tokenizer=tokenizer, cache_gb=0.05)


def generate(driver, *arguments):
    return asyncio.run(driver.generate(*arguments))


def ties(prompts, completions):
    return [0.0] * len(completions)


class Flaky(BaseHTTPRequestHandler):
    """Answers a completion after it has been asked `busy` times in vain."""

    busy, asked, answer, status, models = 0, 0, {}, 503, {}

    def do_GET(self):
        self.reply(200, self.models)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        self.reply(self.status if self.asked <= self.busy else 200, self.answer)

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr(hosts, "WAIT", 0.001)
    Flaky.asked, Flaky.busy, Flaky.status, Flaky.models = 0, 0, 503, {"data": [{"id": "flaky"}]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_host_that_stays_busy_is_given_up(flaky):
    text = {"text": " fine", "finish_reason": "stop"}
    Flaky.answer, Flaky.busy = {"choices": [text], "usage": {"completion_tokens": 2}}, 3
    (result,) = generate(driver(flaky, None), PROMPT, None, SamplingParams(max_tokens=8))
    assert (result.text, result.finish_reason, result.tokens, Flaky.asked) == (" fine", "stop", [-1, -1], 4)
    assert all(map(math.isnan, result.logp_base))
    Flaky.asked, Flaky.busy = 0, 10**6
    with pytest.raises(RequestError, match=r"refused it \(503\)"):
        generate(driver(flaky, None), PROMPT, None, SamplingParams(max_tokens=8))
    assert Flaky.asked == TRIES
    Flaky.asked, Flaky.status = 0, 400  # asking again helps nobody
    with pytest.raises(RequestError, match=r"refused it \(400\)"):
        generate(driver(flaky, None), PROMPT, None, SamplingParams(max_tokens=8))
    assert Flaky.asked == 1


def said(usage=None, **fields):
    """An answer by text."""
    choice = {"text": "a", "finish_reason": "stop"} | fields
    return {"choices": [choice], "usage": usage or {"completion_tokens": 1}}


@pytest.mark.parametrize(
    "models", [{}, {"data": None}, {"data": [{}]}, {"data": [7]}, {"data": [{"id": "a", "max_model_len": "9"}]}]
)
def test_a_list_of_models_that_is_none_is_refused(flaky, models):
    Flaky.models = models
    with pytest.raises(InputError, match=r"127.0.0.1:\d+/v1/ answers what is no list of models"):
        generate(driver(flaky, None, POLICY), PROMPT, None, SamplingParams(max_tokens=8))


@pytest.mark.parametrize("tokens", [[10**9], [-1]])
def test_a_token_that_the_tokenizer_lacks_is_refused(flaky, tokens):
    Flaky.answer = said(token_ids=tokens)
    with pytest.raises(
        RequestError, match=rf"127.0.0.1:\d+/v1/ gave token {tokens[0]}, which is none of the .* 745: give"
    ):
        generate(driver(flaky, None, POLICY), PROMPT, None, SamplingParams(max_tokens=8))


TOKENS = [267, 660, 270]
TEXT = pyengine.RewardModel.from_pretrained(JUDGE).codec
TEXT = TEXT.between(TEXT.encode(PROMPT), TOKENS)


@pytest.mark.parametrize(
    ("text", "finish", "stop", "sure"),
    [
        (TEXT, "length", None, True),
        (TEXT, "stop", None, True),
        (TEXT[:-2] + "\ufffd", "length", None, False),
        (TEXT[:-4], "stop", TEXT[-4:], False),
        ("", "stop", TEXT[:2], False),
        ("other", "length", None, None),
        ("other", "stop", None, None),
        (TEXT + " more", "stop", None, None),
        (TEXT[:2], "stop", None, None),
        ("other\ufffd", "length", None, None),
        ("other", "stop", TEXT[-2:], None),
    ],
)
def test_a_tokenizer_of_another_model_is_seen_however_an_answer_ends(flaky, text, finish, stop, sure):
    """sure: whether the answer shows that the tokenizer is the model's; None where it shows that it is not."""
    inside, sampling = driver(flaky, None, POLICY), SamplingParams(max_tokens=3, seed=0, stop=stop)
    other = r"reads .* where the tokenizer reads .*: give that of 'flaky'"
    Flaky.answer = said(token_ids=TOKENS, text=text, finish_reason=finish)
    if sure is not None:
        generate(inside, PROMPT, None, sampling)
        Flaky.answer = said(token_ids=TOKENS, text="other", finish_reason="length")
    if sure:
        assert generate(inside, PROMPT, None, sampling)[0].tokens == TOKENS
    else:
        with pytest.raises(RequestError, match=other):
            generate(inside, PROMPT, None, sampling)


def test_by_text_what_lies_behind_a_stop_string_is_neither_kept_nor_charged(flaky):
    pieces, sampling = [" a b", "<end>", " was", " c"], SamplingParams(max_tokens=8, top_k=3, stop=" wa", seed=0)
    shown = {"tokens": pieces, "token_logprobs": [-9.0] * 4}
    fields = {
        "text": " a b was c",
        "logprobs": shown,
        "tilt": {"logp_base": [-2.0] * 4, "logp_policy": [-1.9, -1.8, -1.6, -1.2]},
    }
    Flaky.answer = said({"completion_tokens": 4}, **fields)
    (result,) = generate(driver(flaky, ties), PROMPT, BestOfK(2), sampling)
    assert (result.text, result.tokens) == (" a b", [-1] * 3)
    assert (result.logp_base, result.logp_policy) == ([-2.0] * 3, [-1.9, -1.8, -1.6])
    assert result.kl == pytest.approx(best_of_k_bound(2) + 0.7)
    pieces[2] = "bytes:"  # which of them the text has cannot be told
    (result,) = generate(driver(flaky, ties), PROMPT, BestOfK(2), sampling)
    assert (result.text, result.tokens) == (" a b", [-1] * 4)
    assert result.kl == pytest.approx(best_of_k_bound(2) + 1.5)
    with pytest.raises(RequestError, match="the KL that top_k costs cannot be known"):
        generate(driver(flaky, None), PROMPT, None, sampling)  # of one branch it is exact or not told


@pytest.mark.parametrize(
    ("shown", "fields", "told"),
    [
        ([-1.0, -2.0], {}, [-1.0, -2.0]),
        ([-1.0, -2.0], {"temperature": 0}, [-1.0, -2.0]),
        ([-1.0, -2.0], {"temperature": 0, "top_k": 5}, [-1.0, -2.0]),
        ([-1.0, -2.0], {"top_p": 0.9}, None),  # it may have the filters in it
        ([-1.0, -2.0], {"temperature": 0.7}, None),
        ([None, None], {}, None),
        ([-1.0], {}, None),
        ([-1.0, 7.5], {}, None),  # a logit
    ],
)
def test_a_base_policy_that_cannot_be_known_is_not_told(flaky, shown, fields, told):
    Flaky.answer = said({"completion_tokens": 2}, logprobs={"token_logprobs": shown})
    (result,) = generate(driver(flaky, ties), PROMPT, BestOfK(2), SamplingParams(max_tokens=8, seed=0, **fields))
    assert result.logp_base == (told or pytest.approx([math.nan] * 2, nan_ok=True))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"choices": []}, "answers what is no completion"),
        (said(text=None), r"127.0.0.1:\d+/v1/ answers what is no completion"),
        (said(stop_reason=[1]), "answers what is no completion"),
        (said(logprobs=[1.0]), "answers what is no completion"),
        (said(logprobs={"token_logprobs": [True]}), "answers what is no completion"),
        (said(logprobs={"tokens": [None]}), "answers what is no completion"),
        (said(usage={"completion_tokens": "1"}), "answers what is no completion"),
        (said(usage={"completion_tokens": -1}), "and gave -1"),
        ({"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 9}}, "at most 8 tokens"),
        ({"choices": [{"text": "a", "finish_reason": "abort"}], "usage": {"completion_tokens": 1}}, "'abort'"),
        (
            {"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"completion_tokens": 1}},
            "for their length",
        ),
    ],
)
def test_an_answer_that_is_none_is_not_taken_for_one(flaky, answer, says):
    Flaky.answer = answer
    with pytest.raises(RequestError, match=says):
        generate(driver(flaky, None), PROMPT, None, SamplingParams(max_tokens=8))


def test_a_host_that_shows_no_ids_or_no_kl_is_not_trusted_with_them(flaky):
    Flaky.answer = {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    with pytest.raises(RequestError, match=r"shows no token ids \(return_token_ids\): leave tokenizer out"):
        generate(driver(flaky, None, POLICY), PROMPT, None, SamplingParams(max_tokens=8))
    for name, value in (("top_k", 3), ("min_p", 0.1), ("temperature", 0)):
        sampling = SamplingParams(max_tokens=8, **{name: value})
        with pytest.raises(RequestError, match=f"the KL that {name} costs cannot be known"):
            generate(driver(flaky, ties), PROMPT, BestOfK(2), sampling)
    sampling = SamplingParams(max_tokens=8, top_p=0.9, seed=0)
    (result,) = generate(driver(flaky, ties), PROMPT, BestOfK(2), sampling)
    assert result.kl == pytest.approx(best_of_k_bound(2) - math.log(0.9))  # at least .9 of the mass was kept


def test_an_end_that_only_the_host_knows_is_one(flaky):
    choice = {"text": " The", "token_ids": [267, 660], "finish_reason": "stop", "stop_reason": 660}  # an EOS of its own
    Flaky.answer = {"choices": [choice]}
    sampling = SamplingParams(max_tokens=8, seed=0)
    (result,) = generate(driver(flaky, None, POLICY), PROMPT, None, sampling)
    assert (result.tokens, result.finish_reason, result.stop_reason) == ([267, 660], "stop", None)
    choice["stop_reason"] = "end"
    with pytest.raises(RequestError, match="ended a branch with the stop string 'end', which its tokens do not have"):
        generate(driver(flaky, None, POLICY), PROMPT, None, replace(sampling, stop="end"))


def test_a_prompt_without_a_reference_is_refused_before_any_is_drawn(flaky):
    inside = driver(flaky, lsc(JUDGE, {PROMPT: 0.0}), POLICY)
    with pytest.raises(InputError, match=r"prompt 1: .*reference"):
        generate(inside, [PROMPT, "Review"], BestOfK(2), SamplingParams(max_tokens=8))
    assert Flaky.asked == 0


def test_where_one_sibling_fails_the_others_are_cancelled():
    ended = []

    async def slow():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    async def fails():
        await asyncio.sleep(0)
        raise ValueError("it does")

    async def run():
        with pytest.raises(ValueError, match="it does"):
            await hosts.together([slow(), fails(), slow()])
        return len(ended)

    assert asyncio.run(run()) == 2
