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

    busy, asked, answer, status = 0, 0, {}, 503

    def do_GET(self):
        self.reply(200, {"data": [{"id": "flaky"}]})

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
    Flaky.asked, Flaky.busy, Flaky.status = 0, 0, 503
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


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"choices": []}, "answers what is no completion"),
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
    choice = {"text": "", "token_ids": [267, 660], "finish_reason": "stop", "stop_reason": 660}  # an EOS of its own
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
