"""Blockwise over vLLM: its `AsyncLLM` in this process and its server, with our scorers and with a pooling model."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from vllm import AsyncEngineArgs
from vllm.config import PoolerConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.reader import get_metrics_snapshot

import pyengine
from pyengine import BestOfK, Blockwise, Engine, InputError, RequestError, SamplingParams, ops
from pyengine.decode.request import mix
from pyengine.integrations.driver import BlockwiseDriver
from pyengine.integrations.pooled import PooledScorer

PROMPT = "Review of the Harbour, a bakery:"
LONGER = 1024  # tokens that the tests' models read
COMMON = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": LONGER,
    "gpu_memory_utilization": 0.05,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
    "block_size": 32,
}


def longer(name, directory):
    """An embedded model that may read more."""
    shutil.copytree(pyengine.embedded(name), directory)
    config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": LONGER}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The embedded policy, and a judge on its body with a head drawn at random; vLLM has no kernel on a CPU for heads
    as narrow as the embedded reward model's."""
    root = tmp_path_factory.mktemp("models")
    policy, judge = longer("policy", root / "policy"), root / "judge"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(judge)
    AutoTokenizer.from_pretrained(policy).save_pretrained(judge)
    return {"policy": policy, "judge": judge}


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    for task in asyncio.all_tasks(loop):  # vLLM leaves its own
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0.1))
    loop.close()


def started(loop, **arguments):
    async def start():
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**COMMON | arguments))

    return loop.run_until_complete(start())


@pytest.fixture(scope="module")
def llm(loop, models):
    llm = started(loop, model=str(models["policy"]), disable_log_stats=False)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def pool(loop, models):
    model = str(models["judge"])
    llm = started(loop, model=model, runner="pooling", pooler_config=PoolerConfig(task="classify"))
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def our_engine(models):
    return Engine.from_pretrained(models["policy"], models["judge"], cache_gb=0.05)


@pytest.fixture(scope="module")
def serve_vllm(tmp_path_factory):
    """Starts vLLM's server of a model under a name with these flags, once for each name, and gives its address."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in COMMON.items() if not isinstance(value, bool)]
    flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
    running = []

    @functools.cache
    def start(model, name, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
        log = tmp_path_factory.mktemp("server") / "log"
        with log.open("w") as file:
            own = [*command, f"--served-model-name={name}", *flags, *more]
            running.append(subprocess.Popen(own, stdout=file, stderr=subprocess.STDOUT))
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return url
            except OSError:
                assert running[-1].poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(0.5)

    yield start
    for process in running:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def server(serve_vllm, models):
    return serve_vllm(models["policy"], "policy")


def by_select_block(result, strategy):
    """The choices that `ops.select_block` makes of the recorded scores."""
    seed = mix(result.seed, result.prompt_ids)
    found = []
    for block in result.blocks:
        scores = torch.tensor([[[c.utility] for c in block.candidates]])
        found.append(int(ops.select_block(scores, beta=strategy.beta or 0.0, seed=seed, position=block.start).index))
    return found


@pytest.mark.parametrize(
    ("strategy", "fields"),
    [
        (Blockwise(4, 8), {}),
        (Blockwise(6, 5, "softmax", 0.6), {"stop": ["ook", "as a"]}),
        (BestOfK(4), {"stop": ". ", "include_stop_str_in_output": True}),
        (Blockwise(2, 8), {"temperature": 0, "ignore_eos": True}),
        (Blockwise(4, 8), {"temperature": 0.7, "top_p": 0.9, "stop_token_ids": [14], "min_tokens": 9}),
    ],
)
def test_from_the_same_candidates_it_keeps_what_the_engine_keeps(
    strategy, fields, loop, llm, models, our_engine, as_the_engine
):
    inside = BlockwiseDriver(llm, models["judge"], cache_gb=0.05)
    sampling = SamplingParams(**{"max_tokens": 40, "seed": 3} | fields)
    (result,) = loop.run_until_complete(inside.generate(PROMPT, strategy, sampling))
    assert [block.chosen for block in result.blocks] == by_select_block(result, strategy)
    assert len({tuple(c.tokens) for c in result.blocks[0].candidates}) > 1 or sampling.temperature == 0
    if "top_p" in fields:
        assert all(x != x for x in result.logp_base)
    else:
        ids = result.prompt_ids + result.tokens
        model = AutoModelForCausalLM.from_pretrained(models["policy"], dtype=torch.float32)
        logits = model(torch.tensor([ids])).logits[0, len(result.prompt_ids) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(len(result.tokens)), result.tokens].tolist()
        assert result.logp_base == pytest.approx(wanted, abs=1e-3)
    as_the_engine(result, our_engine, PROMPT, strategy, sampling, bound="top_p" in fields)


def test_the_same_call_gives_the_same_result_and_streams_it(loop, llm, models):
    inside, sampling = BlockwiseDriver(llm, models["judge"], cache_gb=0.05), SamplingParams(max_tokens=40, seed=5)

    async def collect():
        return [event async for event in inside.stream(PROMPT, Blockwise(4, 8), sampling)]

    events = loop.run_until_complete(collect())
    result = events[-1].result
    assert "".join(event.text for event in events) == result.text
    assert [event.block for event in events] == result.blocks
    (again,) = loop.run_until_complete(inside.generate(PROMPT, Blockwise(4, 8), sampling))
    assert (again.text, [b.chosen for b in again.blocks]) == (result.text, [b.chosen for b in result.blocks])


def counters():
    """Tokens that were asked of the prefix cache, and that were there."""
    found = {metric.name: metric.value for metric in get_metrics_snapshot() if "prefix_cache" in metric.name}
    return found["vllm:prefix_cache_queries"], found["vllm:prefix_cache_hits"]


def test_four_blocks_hit_the_prefix_cache(loop, llm):
    ids = [7 + (i * i) % 700 for i in range(600)]
    inside = BlockwiseDriver(llm, lambda prompts, completions: [float(len(c)) for c in completions])
    sampling = SamplingParams(max_tokens=64, seed=0, ignore_eos=True)
    rates = []

    async def run():
        before = counters()
        async for _ in inside.stream(ids, Blockwise(8, 16), sampling):
            now = counters()
            rates.append((now[1] - before[1]) / (now[0] - before[0]))
            before = now

    loop.run_until_complete(run())
    print("hit rates", rates)
    assert len(rates) == 4
    assert min(rates[1:]) > 0.9


def test_cancelling_aborts_the_siblings(loop, llm):
    inside = BlockwiseDriver(llm, lambda prompts, completions: [0.0] * len(completions))
    long = SamplingParams(max_tokens=900, seed=0, ignore_eos=True)

    async def run():
        task = asyncio.ensure_future(inside.generate(PROMPT, BestOfK(8), long))
        while llm.output_processor.get_num_unfinished_requests() < 8:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return llm.output_processor.get_num_unfinished_requests()

    assert loop.run_until_complete(run()) == 0
    (result,) = loop.run_until_complete(inside.generate(PROMPT, BestOfK(2), SamplingParams(max_tokens=4, seed=0)))
    assert result.tokens
    running = {m.name: m.value for m in get_metrics_snapshot() if m.name == "vllm:num_requests_running"}
    assert running == {"vllm:num_requests_running": 0}


@pytest.mark.parametrize("kind", ["tokens", "text", "tokens for a server", "text for a server"])
def test_a_pooling_model_is_the_reward_model_that_it_serves(kind, loop, llm, pool, serve_vllm, models):
    if "server" in kind:
        url = serve_vllm(models["judge"], "judge", "--runner=pooling", '--pooler-config={"task": "classify"}')
        scorer = PooledScorer(f"{url}/v1", tokenizer=models["judge"] if "tokens" in kind else None, name="judge")
    else:
        scorer = PooledScorer(pool, name="judge")
        if kind == "text":
            scorer.check = lambda policy: None  # as where the tokenizers differ
    inside = BlockwiseDriver(llm, scorer)
    strategy, sampling = Blockwise(4, 8), SamplingParams(max_tokens=32, seed=4)
    (theirs,) = loop.run_until_complete(inside.generate(PROMPT, strategy, sampling))
    ours = BlockwiseDriver(llm, models["judge"], cache_gb=0.05)
    (local,) = loop.run_until_complete(ours.generate(PROMPT, strategy, sampling))
    assert (theirs.text, len(theirs.blocks)) == (local.text, len(local.blocks))
    for one, other in zip(theirs.blocks, local.blocks, strict=True):
        assert one.chosen == other.chosen
        wanted = [c.utility for c in other.candidates]
        assert [c.utility for c in one.candidates] == pytest.approx(wanted, abs=1e-3)
    assert max(wanted) - min(wanted) > 0.01


def test_what_the_engine_refuses_is_that_requests_own(loop, llm, pool):
    inside = BlockwiseDriver(llm, lambda prompts, completions: [0.0] * len(completions))
    sampling = [SamplingParams(max_tokens=4, allowed_token_ids=[10**6]), SamplingParams(max_tokens=4)]
    bad, good = loop.run_until_complete(inside.generate([PROMPT] * 2, BestOfK(2), sampling, errors="return"))
    assert isinstance(bad, RequestError)
    assert "vLLM could not answer" in bad.reason
    assert good.tokens
    with pytest.raises(InputError, match="only one that generates"):
        BlockwiseDriver(pool)
    with pytest.raises(InputError, match='runner="pooling"'):
        PooledScorer(llm)
    with pytest.raises(RequestError, match="the KL that top_k costs"):
        loop.run_until_complete(inside.generate(PROMPT, BestOfK(2), SamplingParams(max_tokens=4, top_k=3)))


def test_a_cpu_engine_that_a_seed_would_kill_is_refused(llm, monkeypatch):
    monkeypatch.setattr(llm.vllm_config.scheduler_config, "enable_chunked_prefill", True)
    with pytest.raises(InputError, match="enable_chunked_prefill=False"):
        BlockwiseDriver(llm)


def test_the_server_through_openais_client(loop, server, models, our_engine, as_the_engine):
    inside = BlockwiseDriver(f"{server}/v1", models["judge"], tokenizer=models["policy"], cache_gb=0.05)
    for strategy, fields in ((Blockwise(4, 8), {}), (BestOfK(4, "softmax", 0.5), {"stop": "ook", "temperature": 0.8})):
        sampling = SamplingParams(**{"max_tokens": 40, "seed": 3} | fields)
        (result,) = loop.run_until_complete(inside.generate(PROMPT, strategy, sampling))
        assert [block.chosen for block in result.blocks] == by_select_block(result, strategy)
        as_the_engine(result, our_engine, PROMPT, strategy, sampling)
    with pytest.raises(InputError, match="has no model 'gpt'; it serves 'policy'"):
        loop.run_until_complete(BlockwiseDriver(f"{server}/v1", model="gpt").generate(PROMPT))
    words = BlockwiseDriver(f"{server}/v1", models["judge"])
    (result,) = loop.run_until_complete(words.generate(PROMPT, Blockwise(4, 8), SamplingParams(max_tokens=24, seed=1)))
    assert result.text.startswith(" ")
    assert set(result.tokens) == {-1}


def test_cancelling_aborts_the_siblings_at_the_server(loop, server):
    inside = BlockwiseDriver(f"{server}/v1", lambda prompts, completions: [0.0] * len(completions))
    long = SamplingParams(max_tokens=900, seed=0, ignore_eos=True)

    def running():
        with urllib.request.urlopen(f"{server}/metrics") as answer:
            return float(re.search(r"^vllm:num_requests_running\{.*\} (\S+)", answer.read().decode(), re.MULTILINE)[1])

    async def run():
        task = asyncio.ensure_future(inside.generate(PROMPT, BestOfK(8), long))
        while await asyncio.to_thread(running) < 8:
            assert not task.done()
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(50):
            if await asyncio.to_thread(running) == 0:
                return True
            await asyncio.sleep(0.1)
        return False

    assert loop.run_until_complete(run())
