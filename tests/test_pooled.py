"""A classifier of a host as a scorer: an endpoint with vLLM's `/classify` that holds the embedded reward model."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import pytest
import torch
from transformers import AutoTokenizer

import pyengine
from pyengine import Blockwise, InputError, RequestError, RewardModel, SamplingParams
from pyengine.codec import Codec
from pyengine.integrations.driver import BlockwiseDriver
from pyengine.integrations.pooled import PooledScorer
from pyengine.scorers.base import Candidates, as_given

POLICY, JUDGE = pyengine.embedded("policy"), pyengine.embedded("reward-model")
PROMPT = "Review of the Harbour, a bakery:"
STRATEGY, SAMPLING = Blockwise(4, 8), SamplingParams(max_tokens=24, seed=1)


class Classify(BaseHTTPRequestHandler):
    """Answers as vLLM does: texts or token ids in, the outputs of each out, in any order. seen: what it was given."""

    model, shape, seen = None, staticmethod(lambda score: [score]), []

    def do_GET(self):
        self.reply({"data": [{"id": "judge"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, body["model"], body["use_activation"]) == ("/classify", "judge", False)
        type(self).seen += body["input"]
        ids = [self.model.codec.encode(one) if isinstance(one, str) else one for one in body["input"]]
        scores = self.model.score_tokens([""] * len(ids), ids).tolist()
        data = [{"index": i, "probs": self.shape(score)} for i, score in enumerate(scores)]
        self.reply({"data": data[::-1]})

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def classify():
    Classify.model = RewardModel.from_pretrained(JUDGE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Classify)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture
def judge(classify):
    Classify.seen, Classify.shape = [], staticmethod(lambda score: [score])
    return classify


@pytest.fixture(scope="module")
def url(serve):
    return f"{serve('--batch-invariant', scorers=()).url}/v1"


def generate(url, scorer, prompt=PROMPT, sampling=SAMPLING):
    driver = BlockwiseDriver(url, scorer, tokenizer=POLICY, cache_gb=0.05)
    return asyncio.run(driver.generate(prompt, STRATEGY, sampling))[0]


@pytest.mark.parametrize("kind", ["tokens", "text", "text that its tokenizer cuts"])
def test_it_scores_what_the_model_behind_it_scores(kind, url, judge):
    scorer = PooledScorer(judge, tokenizer=None if kind == "text" else JUDGE, name="reward-model")
    if kind == "text that its tokenizer cuts":
        scorer.check = lambda policy: None  # as where the tokenizers differ
    theirs, ours = generate(url, scorer), generate(url, JUDGE)
    assert {type(one) for one in Classify.seen} == {str if kind == "text" else list}
    assert (theirs.text, theirs.tokens) == (ours.text, ours.tokens)
    assert theirs.reward == pytest.approx(ours.reward, abs=1e-4)
    for one, other in zip(theirs.blocks, ours.blocks, strict=True):
        assert one.chosen == other.chosen
        assert [c.utility for c in one.candidates] == pytest.approx([c.utility for c in other.candidates], abs=1e-4)


def test_one_scorer_of_two_policies_reads_the_tokens_of_each(url, judge, monkeypatch):
    scorer, encoded = PooledScorer(judge, tokenizer=JUDGE), []
    encode = scorer.codec.encode
    monkeypatch.setattr(scorer.codec, "encode", lambda *given: encoded.append(given) or encode(*given))
    other = AutoTokenizer.from_pretrained(POLICY)
    other.add_tokens(["qqqq"])
    drivers = [BlockwiseDriver(url, scorer, tokenizer=one, cache_gb=0.05) for one in (other, POLICY)]
    for which, by_text in ((0, True), (1, False), (0, True), (1, False)):
        encoded.clear()
        asyncio.run(drivers[which].generate(PROMPT, STRATEGY, SAMPLING))
        assert bool(encoded) == by_text


def test_of_several_outputs_one_is_named(url, judge):
    Classify.shape = staticmethod(lambda score: [0.0, score, -1.0])
    with pytest.raises(RequestError, match="'pooled' has 3 outputs: give the label"):
        generate(url, PooledScorer(judge))
    with pytest.raises(RequestError, match="label 3 is not among them"):
        generate(url, PooledScorer(judge, label=3))
    result, plain = generate(url, PooledScorer(judge, label=1)), generate(url, JUDGE)
    first, other = ([c.utility for c in r.blocks[0].candidates] for r in (result, plain))
    wanted = torch.tensor([[0.0, score, -1.0] for score in other]).log_softmax(-1)[:, 1]
    assert first == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_chat_is_read_by_the_classifiers_template(url, judge, chat_tokenizer):
    result = generate(url, PooledScorer(judge, tokenizer=chat_tokenizer, form="chat"))
    codec = Codec(chat_tokenizer, "it", len(chat_tokenizer))
    said = {"role": "assistant", "content": result.blocks[0].candidates[0].text}
    assert Classify.seen[0] == codec.converse([{"role": "user", "content": PROMPT}, said], ended=True)
    with pytest.raises(InputError, match="form chat needs its tokenizer"):
        PooledScorer(judge, form="chat")
    with pytest.raises(InputError, match="form must be text or chat"):
        PooledScorer(judge, form="pair")


def test_what_it_cannot_do_is_said(url, judge):
    with pytest.raises(RequestError, match="has no model 'other'; it serves 'judge'"):
        generate(url, PooledScorer(judge, "other"))
    with pytest.raises(RequestError, match=r"refused it \(404\)"):
        generate(url, PooledScorer(url))  # a server without the route
    Classify.shape = staticmethod(lambda score: None)
    with pytest.raises(RequestError, match="answers what is no classification"):
        generate(url, PooledScorer(judge))
    several = count(1)
    Classify.shape = staticmethod(lambda score: [score] * next(several))
    with pytest.raises(RequestError, match="answers what is no classification"):
        generate(url, PooledScorer(judge))
    alone = Candidates([PROMPT], [[1]], {}, {}, as_given([" fine"]))
    with pytest.raises(InputError, match="for BlockwiseDriver alone"):
        PooledScorer(judge).score(alone)
