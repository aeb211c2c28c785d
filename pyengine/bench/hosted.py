"""vLLM as a contender: `BlockwiseDriver` over its AsyncLLM, or plain sampling where there is one branch."""

from __future__ import annotations

import asyncio
import importlib.util
import tempfile
import time
from typing import Any

from pyengine.bench.contenders import Contender, Run
from pyengine.bench.shapes import RANDOM, config_of, numbered
from pyengine.bench.workload import Ask
from pyengine.errors import InputError
from pyengine.results import SamplingParams
from pyengine.strategies import Strategy


def check() -> None:
    """InputError, which says how to have it, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "--baselines vllm: vLLM is not installed here: pip install 'tilt-engine[vllm]' (on a CPU, `make hosts` has "
            "it in an environment of its own), or leave it out of --baselines"
        )


def longest(prompts: list[str], completions: list[str]) -> list[float]:
    """A host shows no hidden states for a probe: what is kept is the longest text."""
    return [float(len(completion)) for completion in completions]


def by_vllm(model: str, strategy: Strategy, context: int, dtype: str) -> Contender:
    """vLLM with its defaults, on the same weights or, of a shape, random ones of its own. context: tokens at most."""
    check()
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from pyengine.integrations.driver import BlockwiseDriver

    loop, options = asyncio.new_event_loop(), dict[str, Any]()
    if model.endswith(RANDOM):
        config, folder = config_of(model.removesuffix(RANDOM)), tempfile.mkdtemp()
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
        config.save_pretrained(folder)
        numbered(config.vocab_size).save_pretrained(folder)
        model, options = folder, {"load_format": "dummy"}

    async def started() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, dtype=dtype, max_model_len=context, **options))

    driver = BlockwiseDriver(loop.run_until_complete(started()), longest if strategy.k > 1 else None)

    async def one(ask: Ask, seed: int, greedy: bool, began: float) -> tuple[Any, list[tuple[float, int]]]:
        params = SamplingParams(ask.tokens, 0.0 if greedy else 1.0, seed=seed, ignore_eos=True)
        commits: list[tuple[float, int]] = []
        async for event in driver.stream(ask.prompt, strategy, params):
            if event.tokens:
                commits.append((time.perf_counter() - began, len(event.tokens)))
        return event.result, commits

    async def all_of(asks: list[Ask], seed: int, greedy: bool) -> list[Any]:
        began = time.perf_counter()
        return await asyncio.gather(*(one(ask, seed + i, greedy, began) for i, ask in enumerate(asks)))

    def run(asks: list[Ask], seed: int, greedy: bool) -> Run:
        found = loop.run_until_complete(all_of(asks, seed, greedy))
        drawn = sum(result.drawn_tokens for result, _ in found)
        return Run([result.tokens for result, _ in found], [commits for _, commits in found], drawn)

    return run
