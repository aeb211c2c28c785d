"""Whether a result depends on what is decoded beside it, with `batch_invariant` and without, and what the option costs.

    python -m bench.batch_invariance [draws] [large] [cost]

draws: 100,500 draws of a small Llama in fp32 and as many in bf16, each prompt alone, among 200 others, in another order
and with another number of threads; tokens, log-probabilities and KL are compared to the bit. large: the same with
fewer draws on a Llama of 135 M random parameters (SmolLM2's shape). cost: its tokens a second with the option and
without, in turns. Writes bench/results/batch_invariance.json, part by part.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import pyengine
from pyengine import Blockwise, Engine, SamplingParams
from pyengine.machine import about
from pyengine.scorers import Probe

OUT = Path(__file__).parent / "results" / "batch_invariance.json"
COUNT, TOKENS = 201, 500
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LARGE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
FIELDS = ("tokens", "logp_base", "logp_policy", "kl")


def engine_of(sizes, dtype, invariant, vocab=49_152, scale=1.0, scorer=None):
    """Random weights; `scale` makes logits of a small model as far apart as a trained one's."""
    torch.manual_seed(0)
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **ends, vocab_size=vocab, max_position_embeddings=2048)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    return Engine(model, tokenizer, scorer, cache_gb=1.0, batch_invariant=invariant)


def prompts_of(count, vocab):
    """Of 3 to 160 tokens; each fifth begins with a page and a half of one and the same text."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(1, vocab, (96,), generator=generator).tolist()
    own = [torch.randint(1, vocab, (3 + 37 * i % 158,), generator=generator).tolist() for i in range(count)]
    return [shared + ids[:20] if i % 5 == 0 else ids for i, ids in enumerate(own)]


def sampling_of(count, tokens):
    return [SamplingParams(max_tokens=tokens, seed=i) for i in range(count)]


def compare(alone, other):
    """How many draws of each field differ, and in how many results any does."""
    differ = {name: 0 for name in FIELDS}
    for a, b in zip(alone, other, strict=True):
        for name in FIELDS:
            x, y = getattr(a, name), getattr(b, name)
            differ[name] += sum(p != q for p, q in zip(x, y, strict=True)) if isinstance(x, list) else int(x != y)
    results = sum(
        any(getattr(a, name) != getattr(b, name) for name in FIELDS) for a, b in zip(alone, other, strict=True)
    )
    return differ | {"results": results}


def settings(engine, prompts, sampling, of):
    """The results of the prompts in `of`, each alone; and compared with them, the same among all the others."""
    start, threads = time.monotonic(), torch.get_num_threads()
    alone = [engine.generate(prompts[i : i + 1], sampling=sampling[i : i + 1], progress=False)[0] for i in of]
    found = {}

    def among(order):
        results = engine.generate([prompts[i] for i in order], None, [sampling[i] for i in order], progress=False)
        return [results[order.index(i)] for i in of]

    there = list(range(len(prompts)))
    found["among the others"] = compare(alone, among(there))
    found["in another order"] = compare(alone, among(there[::-1]))
    found["among 32 others"] = compare(alone[:1], among_few(engine, prompts, sampling, of[0]))
    torch.set_num_threads(threads + 1)
    try:
        found[f"{threads + 1} threads, not {threads}"] = compare(alone, among(there))
    finally:
        torch.set_num_threads(threads)
    draws = sum(len(r.tokens) for r in alone)
    return {"prompts": len(of), "others": len(prompts) - 1, "draws": draws, "differ": found} | {
        "seconds": round(time.monotonic() - start, 1)
    }


def among_few(engine, prompts, sampling, i):
    order = [j for j in range(len(prompts)) if j != i][:31]
    return engine.generate([prompts[j] for j in [i, *order]], None, [sampling[j] for j in [i, *order]])[:1]


def draws():
    """All prompts of a small model; without the option fewer tokens show what holds."""
    for dtype in (torch.float32, torch.bfloat16):
        for invariant, tokens in ((True, TOKENS), (False, 50)):
            prompts, sampling = prompts_of(COUNT, 2000), sampling_of(COUNT, tokens)
            engine = engine_of(SMALL, dtype, invariant, 2000, 4.0)
            about = {"dtype": str(dtype)[6:], "batch_invariant": invariant}
            yield about | settings(engine, prompts, sampling, range(COUNT))


def large():
    for dtype in (torch.float32, torch.bfloat16):
        for invariant in (True, False):
            prompts, sampling = prompts_of(COUNT, 49_152), sampling_of(COUNT, 24)
            engine = engine_of(LARGE, dtype, invariant, scale=2.0)
            about = {"dtype": str(dtype)[6:], "batch_invariant": invariant}
            yield about | settings(engine, prompts, sampling, range(0, COUNT, 34))


def cost():
    """Tokens a second: medians of runs in turns."""
    ids = torch.randint(1, 49_152, (512,), generator=torch.Generator().manual_seed(2)).tolist()
    for dtype in (torch.float32, torch.bfloat16):
        probe = Probe(LARGE["hidden_size"])
        engines = {name: engine_of(LARGE, dtype, name == "with", scorer=probe) for name in ("without", "with")}
        tasks = {f"base, {n} rows": ([ids[i : i + 32] for i in range(n)], None, 16) for n in (1, 8, 64)}
        tasks["blockwise 8x16"] = ([ids[:256]], Blockwise(8, 16), 32)
        tasks["prompts of 512 tokens"] = ([[i, *ids[1:]] for i in range(1, 3)], None, 1)
        for what, (prompts, strategy, tokens) in tasks.items():
            times: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(6):
                for name, engine in engines.items():
                    start = time.perf_counter()
                    engine.generate(prompts, strategy, SamplingParams(max_tokens=tokens, seed=0), progress=False)
                    times[name].append(time.perf_counter() - start)
            made = sum(map(len, prompts)) if tokens == 1 else len(prompts) * tokens * (strategy.k if strategy else 1)
            rate = {name: made / statistics.median(t[1:]) for name, t in times.items()}
            yield {
                "dtype": str(dtype)[6:],
                "what": what,
                "tokens_per_second": {name: round(x, 1) for name, x in rate.items()},
                "times_as_long": round(rate["without"] / rate["with"], 2),
            }


def main() -> None:
    logging.getLogger("pyengine").setLevel(logging.ERROR)
    parts = {"draws": draws, "large": large, "cost": cost}
    report = json.loads(OUT.read_text()) if OUT.is_file() else {}
    report["machine"] = about("transformers")
    for name in sys.argv[1:] or parts:
        report[name] = []
        for row in parts[name]():
            print(name, json.dumps(row), flush=True)
            report[name].append(row)
            OUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
