"""Blockwise and best-of-K over an endpoint: the server of the embedded policy, through OpenAI's client."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyengine
from pyengine import BestOfK, Blockwise, InputError, RequestError, SamplingParams, Tokenwise, lsc
from pyengine.integrations import hosts
from pyengine.integrations.driver import BlockwiseDriver
from pyengine.ledger import best_of_k_bound
from pyengine.scorers import Candidates, FunctionScorer, PrefixModel, PrefixScorer
from pyengine.scorers.base import as_given

POLICY, JUDGE = pyengine.embedded("policy"), pyengine.embedded("reward-model")
PROMPT = "Review of the Harbour, a bakery:"
PROMPTS = [PROMPT, "Review of the Old Mill, a tea room:", "Review of the Juniper, a kettle:"]


@pytest.fixture(scope="module")
def server(serve):
    return serve("--batch-invariant", "--max-tokens", "300", "--max-requests", "64", scorers=())


@pytest.fixture(scope="module")
def url(server):
    return f"{server.url}/v1"


def driver(url, scorer=JUDGE, **options):
    return BlockwiseDriver(url, scorer, **{"tokenizer": POLICY, "cache_gb": 0.05} | options)


def collect(driver, *arguments):
    """All events of a stream."""

    async def run():
        return [event async for event in driver.stream(*arguments)]

    return asyncio.run(run())


def generate(driver, *arguments, **options):
    return asyncio.run(driver.generate(*arguments, **options))


def ties(prompts, completions):
    return [float(len(completion) % 2) for completion in completions]


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def nan_where_good(prompts, completions):
    return [math.nan if "good" in c or "the" in c.lower() else float(len(c) % 5) for c in completions]


def prefix_model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    return PrefixModel(model.model, AutoTokenizer.from_pretrained(POLICY), PrefixScorer(128, 745, 16))


CASES = {
    "a model with a cache": (lambda: JUDGE, Blockwise(4, 8), {}),
    "softmax": (lambda: JUDGE, Blockwise(4, 6, "softmax", 0.7), {}),
    "a prefix model": (prefix_model, Blockwise(3, 7), {}),
    "a sum with a transform": (lambda: lsc(JUDGE, 0.3) + 0.1 * FunctionScorer(ties), Blockwise(4, 8), {}),
    "ties": (lambda: ties, Blockwise(6, 5), {}),
    "NaN": (lambda: nan_where_good, Blockwise(6, 5), {}),
    "whole responses": (lambda: JUDGE, BestOfK(4), {}),
    "stop strings over the ends of blocks": (lambda: ties, Blockwise(3, 2), {"stop": ["was a", "e b", "as ", "ook"]}),
    "a stop string in the middle of a block": (lambda: JUDGE, Blockwise(3, 8), {"stop": " was"}),
    "a stop string of whole responses": (lambda: JUDGE, BestOfK(3), {"stop": ". ", "include_stop_str_in_output": True}),
    "stop tokens": (lambda: JUDGE, Blockwise(4, 8), {"stop_token_ids": [14], "min_tokens": 11}),
    "filters and a stop string": (lambda: JUDGE, Blockwise(3, 12), {"stop": " was", "top_k": 5}),
    "filters": (lambda: JUDGE, BestOfK(4), {"top_k": 5, "min_p": 0.02, "temperature": 1.3}),
    # Of a function: which of two equal candidates a model likes better is decided by its last bits.
    "greedy": (lambda: ties, Blockwise(2, 8), {"temperature": 0, "ignore_eos": True}),
    "without special tokens left out": (lambda: JUDGE, Blockwise(4, 8), {"skip_special_tokens": False}),
}


@pytest.mark.filterwarnings("ignore:a scorer returned NaN")
@pytest.mark.parametrize("case", CASES)
def test_from_the_same_candidates_it_keeps_what_the_engine_keeps(case, url, engine, as_the_engine):
    make, strategy, fields = CASES[case]
    scorer = make()
    engine.set_scorer(scorer)
    seen = set()
    for seed in range(2):
        sampling = SamplingParams(**{"max_tokens": 30, "seed": seed, "temperature": 0.9} | fields)
        (result,) = generate(driver(url, scorer), PROMPT, strategy, sampling)
        as_the_engine(result, engine, PROMPT, strategy, sampling)
        seen |= {block.chosen for block in result.blocks} | {result.finish_reason}
    assert len(seen) > 1 or case == "greedy"


def test_a_stream_has_an_event_for_each_block_and_the_result_with_the_last(url):
    strategy, sampling = Blockwise(4, 8), SamplingParams(max_tokens=40, seed=1)
    events = collect(driver(url), PROMPT, strategy, sampling)
    result = events[-1].result
    assert [event.result for event in events[:-1]] == [None] * (len(events) - 1)
    assert "".join(event.text for event in events) == result.text
    assert [token for event in events for token in event.tokens] == result.tokens
    assert [event.block for event in events] == result.blocks
    assert [event.kl for event in events] == pytest.approx([best_of_k_bound(4) * (i + 1) for i in range(len(events))])
    assert len(events) >= 4
    assert collect(driver(url), PROMPT, strategy, sampling)[-1].result == result  # the same call, the same result


def test_siblings_have_seeds_of_their_own_and_log_probabilities_are_the_models(url):
    asked, inside = [], driver(url)
    draw = inside._host.draw

    async def noted(prompt, params, asks):
        asked.append((len(prompt), asks["seed"], asks["max_tokens"]))
        return await draw(prompt, params, asks)

    inside._host.draw = noted
    (result,) = generate(inside, PROMPT, Blockwise(4, 8), SamplingParams(max_tokens=20, seed=2, temperature=0.7))
    assert len({seed for _, seed, _ in asked}) == len(asked) == 4 * len(result.blocks)
    assert {room for _, _, room in asked} <= {8, 4}
    drawn = {tuple(c.tokens) for block in result.blocks for c in block.candidates}
    assert len(drawn) > 2 * len(result.blocks)
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    ids = result.prompt_ids + result.tokens
    logits = model(torch.tensor([ids])).logits[0, len(result.prompt_ids) - 1 : -1] / 0.7
    wanted = logits.log_softmax(-1)[range(len(result.tokens)), result.tokens].tolist()
    assert result.logp_base == result.logp_policy == pytest.approx(wanted, abs=1e-4)


def test_the_base_policy_is_one_branch_whose_response_is_scored(url):
    sampling = SamplingParams(max_tokens=20, seed=5)
    (result,) = generate(driver(url), PROMPT, None, sampling)
    assert (result.kl, result.kl_kind, result.blocks) == (0.0, "exact", [])
    (again,) = generate(driver(url, None), PROMPT, Blockwise(1, 32), sampling)
    assert (again.text, again.reward) == (result.text, None)
    judge = pyengine.RewardModel.from_pretrained(JUDGE)
    left = [token for token in result.tokens if token]
    assert result.reward == pytest.approx(judge.score_tokens([PROMPT], [result.prompt_ids + left]).item(), abs=1e-4)


def test_prompts_of_every_form_and_samples_are_decoded_together(url):
    inside = driver(url)
    (text,) = generate(inside, PROMPT, Blockwise(3, 8), SamplingParams(max_tokens=16, seed=3))
    many = [PROMPT, text.prompt_ids, *PROMPTS[1:]]
    sampling = [SamplingParams(max_tokens=16, seed=3, n=n) for n in (1, 1, 2, 1)]
    results = generate(inside, many, [Blockwise(3, 8)] * 3 + [BestOfK(2)], sampling, progress=False)
    assert results[0] == text
    assert results[1].text == text.text
    assert [len(result.blocks[0].candidates) for result in results] == [3, 3, 3, 3, 2]
    assert results[2].prompt == results[3].prompt == PROMPTS[1]
    assert results[2].tokens != results[3].tokens


def test_whoever_leaves_or_is_cancelled_frees_the_servers_rows(server, url):
    long = SamplingParams(max_tokens=300, seed=1, ignore_eos=True)

    async def cancelled():
        task = asyncio.ensure_future(driver(url).generate(PROMPTS, BestOfK(16), long))
        while server.metrics()["pyengine_rows"] < 16:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asyncio.to_thread(server.metrics)

    before = server.metrics()["pyengine_cancelled_total"]
    asyncio.run(cancelled())
    assert server.idle()
    assert server.metrics()["pyengine_cancelled_total"] > before + 15

    async def left():
        async for _ in driver(url).stream(PROMPT, Blockwise(8, 16), long):
            break

    asyncio.run(left())
    assert server.idle()


def test_a_scorers_cache_is_given_back_after_each_block(url):
    sampling = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
    results = generate(driver(url, cache_gb=0.0005), PROMPTS * 2, Blockwise(4, 8), sampling)
    assert [len(result.blocks) for result in results] == [5] * 6
    with pytest.raises(RequestError, match=r"needs .* pages of cache.*cache_gb"):
        generate(driver(url, cache_gb=0.0002), [[267] * 400], Blockwise(4, 8), sampling)


def test_a_fault_of_one_scorers_is_that_requests_own(url):
    def moody(prompts, completions):
        if "kettle" in prompts[0]:
            raise ValueError("no kettles")
        return [float(len(c)) for c in completions]

    sampling = SamplingParams(max_tokens=16, seed=0)
    found = generate(driver(url, moody), PROMPTS, Blockwise(3, 8), sampling, errors="return")
    assert [isinstance(one, RequestError) for one in found] == [False, False, True]
    assert found[2].reason == "scorer 'moody' raised ValueError: no kettles"
    with pytest.raises(RequestError, match="prompt 2: scorer 'moody' raised ValueError: no kettles") as raised:
        generate(driver(url, moody), PROMPTS, Blockwise(3, 8), sampling)
    assert [result.text for result in raised.value.results[:2]] == [result.text for result in found[:2]]


def test_what_the_server_refuses_is_said_with_its_words(url, monkeypatch):
    with pytest.raises(InputError, match=r"has no model 'gpt'; it serves 'policy': give one as model"):
        collect(driver(url, model="gpt"), PROMPT, BestOfK(2))
    bad = SamplingParams(max_tokens=301)
    results = generate(driver(url), [PROMPT, PROMPT], BestOfK(2), [bad, SamplingParams(max_tokens=4)], errors="return")
    assert "refused it (400): max_tokens is 301, this server's limit is 300" in results[0].reason
    assert results[1].tokens
    with pytest.raises(RequestError, match=r"allowed_token_ids"):
        collect(driver(url), PROMPT, BestOfK(2), SamplingParams(allowed_token_ids=[10**6]))
    monkeypatch.setattr(hosts, "WAIT", 0.001)
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/v1/?: Connection"):
        collect(driver("http://127.0.0.1:9/v1"), PROMPT, BestOfK(2))


def test_a_tokenizer_of_another_model_is_seen(url, model_dirs):
    sampling = SamplingParams(max_tokens=4, seed=1, allowed_token_ids=range(3, 314))
    with pytest.raises(RequestError, match=r"reads .* where the tokenizer reads .*: give that of 'policy'"):
        collect(driver(url, ties, tokenizer=model_dirs["llama"]), [270, 271, 272], BestOfK(2), sampling)
    with pytest.raises(
        RequestError, match=r"gave token \d+, which is none of the tokenizer's 314: give that of 'policy'"
    ):
        collect(
            driver(url, ties, tokenizer=model_dirs["llama"]), [270], BestOfK(2), SamplingParams(max_tokens=40, seed=1)
        )


def test_more_than_a_busy_server_takes_is_asked_for_again(server, url):
    sampling = SamplingParams(max_tokens=12, seed=0, ignore_eos=True)
    results = generate(driver(url), [*PROMPTS, *PROMPTS], BestOfK(16), sampling)  # 96 at once, it takes 64
    assert [result.text for result in results[:3]] == [result.text for result in results[3:]]
    assert server.metrics()['pyengine_http_responses_total{route="/v1/completions",status="429"}'] > 0


def test_by_text_alone(url):
    strategy, sampling = Blockwise(4, 8), SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    words = driver(url, JUDGE, tokenizer=None)
    events = collect(words, PROMPT, strategy, sampling)
    result = events[-1].result
    assert "".join(event.text for event in events) == result.text
    assert set(result.tokens) == {-1}
    judge, before, start = pyengine.RewardModel.from_pretrained(JUDGE), "", 0
    for block in result.blocks:
        texts = [before + c.text for c in block.candidates]
        scores = judge.score(Candidates([PROMPT] * 4, [[1]] * 4, {}, {}, as_given(texts)))
        assert [c.utility for c in block.candidates] == pytest.approx(scores.tolist(), abs=1e-4)
        assert (block.chosen, block.start) == (int(scores.argmax()), start)
        before, start = texts[block.chosen], start + len(block.candidates[block.chosen].tokens)
    assert len(result.blocks) > 2


def test_by_text_a_stop_string_is_found_over_the_ends_of_blocks(url):
    words, sampling = driver(url, length, tokenizer=None), SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    (whole,) = generate(words, PROMPT, Blockwise(2, 4), sampling)
    first, second = (block.candidates[block.chosen].text for block in whole.blocks[:2])
    stop = first[-3:] + second[:3]
    (cut,) = generate(words, PROMPT, Blockwise(2, 4), replace(sampling, stop=stop))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (first[:-3], "stop", stop)
    (kept,) = generate(words, PROMPT, Blockwise(2, 4), replace(sampling, stop=stop, include_stop_str_in_output=True))
    assert kept.text == first + second[:3]
    (early,) = generate(words, PROMPT, BestOfK(1), replace(sampling, stop=whole.text[3:5], top_k=5))
    assert (early.finish_reason, len(early.tokens) < 40) == ("stop", True)  # what lies behind it is not kept


REFUSED = {
    "reads the base policy's hidden states": lambda url: driver(url, pyengine.embedded("prefix")),
    "'probe' reads the base policy's": lambda url: driver(url, 0.5 * pyengine.load_scorer(pyengine.embedded("probe"))),
    "not a client": lambda url: driver(7),
    "give an openai.AsyncOpenAI": lambda url: driver(openai.OpenAI(base_url=url, api_key="x")),
    "needs a scorer": lambda url: collect(driver(url, None), PROMPT, BestOfK(2)),
    "use the vLLM plug-in": lambda url: collect(driver(url), PROMPT, Tokenwise(2.0)),
    "presence_penalty from the first token": lambda url: collect(
        driver(url), PROMPT, Blockwise(2, 8), SamplingParams(presence_penalty=1)
    ),
    "logprobs is not there": lambda url: collect(driver(url), PROMPT, BestOfK(2), SamplingParams(logprobs=1)),
    "grammar is not there": lambda url: collect(
        driver(url), PROMPT, BestOfK(2), SamplingParams(grammar={"regex": "a"})
    ),
    "prompt 0 is empty": lambda url: collect(driver(url), "", BestOfK(2)),
    "prompt 0 is no text": lambda url: collect(driver(url, tokenizer=None), [1, 2], BestOfK(2)),
    "'counted' reads token ids": lambda url: collect(driver(url, counted, tokenizer=None), PROMPT, BestOfK(2)),
    "min_tokens beside stop": lambda url: collect(
        driver(url, tokenizer=None), PROMPT, BestOfK(2), SamplingParams(stop="a", min_tokens=2)
    ),
    "embeds 745 tokens": lambda url: collect(driver(url), [1, 10**6], BestOfK(2)),
    "tokenizer /nowhere": lambda url: collect(driver(url, tokenizer="/nowhere"), PROMPT, BestOfK(2)),
}


def counted(prompts, completion_ids):
    return [len(ids) for ids in completion_ids]


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_driven_is_refused_with_the_reason(says, url):
    with pytest.raises(InputError, match=says):
        REFUSED[says](url)


def test_a_client_of_the_callers_own(url):
    client = openai.AsyncOpenAI(base_url=url, api_key="unused")
    (result,) = generate(driver(client), PROMPT, Blockwise(2, 4), SamplingParams(max_tokens=8, seed=0))
    assert result == generate(driver(url), PROMPT, Blockwise(2, 4), SamplingParams(max_tokens=8, seed=0))[0]
