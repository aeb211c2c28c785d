"""Requests of every kind, mixed at random: equal to one call each, and how quick they are together.

    python -m bench.mixed record    # one `generate` for each request; writes bench/results/mixed_goldens.json
    python -m bench.mixed check [N] # N requests of each model together, held against what was recorded
    python -m bench.mixed soak [N]  # N steps of joins, cancellations, faults and preemptions in a small cache
    python -m bench.mixed time      # one by one, sorted by kind and mixed; writes bench/results/mixed.json

Three small models with random weights: a Llama, a Mistral whose window is shorter than its prompts, and a GPT-J, which
no branching cache serves. Every request is a function of its number.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import pyengine
import pyengine.cache as cache_module
from pyengine import BestOfK, Blockwise, Engine, SamplingParams, Tokenwise
from pyengine.scorers import PrefixModel, PrefixScorer, Probe, RewardModel, load_scorer
from pyengine.worlds import reviews

RESULTS = Path(__file__).parent / "results"
GOLDENS, TIMES = RESULTS / "mixed_goldens.json", RESULTS / "mixed.json"
COUNT = 140  # requests of each model
SIZE = 3 * 2 * 2 * 16 * 4  # bytes of a token's keys and values
WIDTH, VOCAB = 64, 1024
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=24),
    "gptj": lambda: transformers.GPTJConfig(
        n_embd=WIDTH, n_layer=3, n_head=4, n_positions=512, rotary_dim=16, vocab_size=VOCAB
    ),
}
KINDS = (
    "base", "tokenwise", "budget", "two heads", "prefix model", "blockwise", "probe", "reward model", "soft",
    "function", "two scorers", "best of k",
)  # fmt: skip
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "film",
    "was",
    "good",
    "bad",
    "long",
    "never",
    "again",
]


def seeded(model: Any, seed: int, scale: float) -> Any:
    """Random weights of this spread, so that a small model has opinions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                parameter.zero_()
    return model.eval()


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))


def engine_of(name: str, cache_gb: float = 0.1, **options: Any) -> Engine:
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    config = MODELS[name]()
    for key, value in ends.items():
        setattr(config, key, value)
    model = seeded(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), 1, 0.15)
    model.generation_config.eos_token_id = list(range(24))  # one draw in forty ends a branch
    return Engine(model, tokenizer(), cache_gb=cache_gb, **options)


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]


def scorers() -> dict[str, Any]:
    """By name; the models among them are Llamas of their own with the policy's tokenizer."""
    judge = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 2}, num_labels=1, pad_token_id=0)
    reward = transformers.AutoModelForSequenceClassification.from_config(judge, dtype=torch.float32)
    base = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 2})
    trunk = transformers.AutoModelForCausalLM.from_config(base, dtype=torch.float32)
    heads = {name: seeded(PrefixScorer(WIDTH, VOCAB, name=name), i, 0.3) for i, name in ((5, "one"), (6, "other"))}
    head = seeded(PrefixScorer(WIDTH, VOCAB, name="ahead"), 7, 0.3)
    return heads | {
        "probe": seeded(Probe(WIDTH), 8, 0.3),
        "reward": RewardModel(seeded(reward, 9, 0.15), tokenizer(), "reward"),
        "ahead": PrefixModel(seeded(trunk, 10, 0.15), tokenizer(), head),
        "function": vowels,
    }


def request(number: int, found: dict[str, Any]) -> tuple[str, str, Any, Any, SamplingParams]:
    """(kind, prompt, strategy, scorer, sampling) of a request."""
    draw = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    prompt = " ".join(draw.choice(WORDS) for _ in range(draw.choice([1, 3, 8, 20, 60])))
    sampling = SamplingParams(
        max_tokens=draw.randrange(3, 40),
        temperature=draw.choice([0.7, 1.0, 1.3]),
        top_p=1.0 if kind == "budget" else draw.choice([1.0, 0.9]),
        top_k=0 if kind == "budget" else draw.choice([0, 40]),
        seed=number,
    )
    k, m = draw.randrange(2, 9), draw.randrange(3, 17)
    strategies = {
        "base": None,
        "tokenwise": Tokenwise(draw.choice([0.5, 2.0])),
        "budget": Tokenwise(kl_budget=draw.choice([0.05, 0.3])),
        "two heads": Tokenwise(1.5),
        "prefix model": Tokenwise(1.0) if draw.random() < 0.5 else Blockwise(k, m),
        "soft": Blockwise(k, m, "softmax", 0.5),
        "best of k": BestOfK(k),
    }
    scorer = {
        "base": None,
        "tokenwise": found["one"],
        "budget": found["other"],
        "two heads": [(0.7, found["one"]), (-0.4, found["other"])],
        "prefix model": found["ahead"],
        "probe": found["probe"],
        "reward model": found["reward"],
        "soft": found["probe"],
        "function": found["function"],
        "two scorers": [(1.0, found["reward"]), (0.5, found["probe"])],
        "best of k": found[draw.choice(["reward", "function", "probe"])],
    }.get(kind, found["one"])
    return kind, prompt, strategies.get(kind, Blockwise(k, m)), scorer, sampling


def summary(result: Any) -> dict[str, Any]:
    """What is to be equal, short: candidates as a digest."""
    digest = hashlib.blake2b(digest_size=8)
    for block in result.blocks:
        digest.update(repr([(c.tokens, c.text, c.finish_reason) for c in block.candidates]).encode())
    return {
        "tokens": result.tokens,
        "text": result.text,
        "finish": result.finish_reason,
        "reward": result.reward,
        "kl": result.kl,
        "chosen": [block.chosen for block in result.blocks],
        "candidates": digest.hexdigest(),
    }


def differences(found: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """Fields that are not equal; sums of floats within 1e-4."""
    out = []
    for name, value in want.items():
        if isinstance(value, float) and isinstance(found[name], float):
            if abs(found[name] - value) > 1e-4 * (1 + abs(value)):
                out.append(name)
        elif found[name] != value:
            out.append(name)
    return out


def record() -> None:
    goldens: dict[str, list[Any]] = {}
    for name in MODELS:
        engine, found = engine_of(name), scorers()
        goldens[name] = []
        for number in range(COUNT):
            _, prompt, strategy, scorer, sampling = request(number, found)
            with engine.following(scorer):
                (result,) = engine.generate([prompt], strategy, sampling, progress=False)
            goldens[name].append(summary(result))
    lines = [
        json.dumps(name) + ": [\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for name, rows in goldens.items()
    ]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check(count: int = COUNT) -> None:
    """All requests of a model together: each as it was alone; to the bit where the model can promise it, as another
    product's last bits move a draw in a hundred thousand."""
    goldens = json.loads(GOLDENS.read_text())
    wrong = 0
    for name in MODELS:
        engine, found = engine_of(name, batch_invariant=name != "gptj"), scorers()
        handles = []
        for number in range(min(count, COUNT)):
            _, prompt, strategy, scorer, sampling = request(number, found)
            handles.append(engine.submit(prompt, strategy, sampling, scorer))
        for number, handle in enumerate(handles):
            differ = differences(summary(handle.result()), goldens[name][number])
            if differ:
                wrong += 1
                print(f"{name} {number} ({KINDS[number % len(KINDS)]}): {', '.join(differ)}")
        print(name, {key: value for key, value in engine.stats().items() if value})
    print(f"{wrong} of {min(count, COUNT) * len(MODELS)} differ")
    sys.exit(bool(wrong))


def failing(prompts: list[str], completions: list[str]) -> list[float]:
    raise ValueError("a fault of this request's own")


def soak(steps: int = 10_000, pages: int = 70) -> None:
    """Random joins, cancellations, faults and preemptions in a cache of a few pages, whose books are looked at after
    every step; every request that is not meant to fail is what it was alone."""
    goldens, found, draw = json.loads(GOLDENS.read_text())["llama"], scorers(), random.Random(0)
    cache_module.TAIL_SHARE = 0.75  # so many leaves that it is pages that run out
    engine = engine_of("llama", cache_gb=cache_module.budget_for(SIZE, pages, 1) / 1e9)
    assert engine._decoder.cache.capacity == pages
    core, counts, live = engine._core, Counter[str](), list[tuple[int, str, Any]]()
    numbers = iter(range(10**9))
    for step in range(steps):
        while len(live) < 120 and draw.random() < 0.95:
            number = next(numbers) % COUNT
            if step // 100 % 2 and number % len(KINDS) > 4:  # single branches alone, which need pages more than leaves
                continue
            _, prompt, strategy, scorer, sampling = request(number, found)
            fate = draw.choices(["end", "cancel", "fault"], [0.7, 0.2, 0.1])[0]
            if fate == "fault" and isinstance(strategy, (Blockwise, BestOfK)):
                scorer = failing
            elif fate == "fault":
                fate = "end"
            priority = draw.choice([0, 0, 0, 1])
            live.append((number, fate, engine.submit(prompt, strategy, sampling, scorer, priority=priority)))
        for _, fate, handle in live:
            if fate == "cancel" and draw.random() < 0.03:
                handle.cancel()
        core.turn()
        for decoder in (engine._decoder, *engine._panel._readers.values()):
            decoder.check_integrity()
        for number, fate, handle in [entry for entry in live if entry[2].done]:
            live.remove((number, fate, handle))
            outcome = handle.outcome()
            if isinstance(outcome, Exception):
                expected = {"cancel": "cancelled", "fault": "a fault of this request's own"}.get(fate, "")
                assert expected, f"request {number} failed at step {step}: {outcome}"
                assert expected in str(outcome), outcome
            else:
                assert fate != "fault", number
                differ = differences(summary(outcome), goldens[number])
                counts["differ"] += bool(differ)
                if differ:
                    print(f"step {step}: request {number} ({KINDS[number % len(KINDS)]}): {', '.join(differ)}")
            counts[fate] += 1
    for _, _, handle in live:
        handle.cancel()
    while not core.schedule.idle:
        core.turn()
    cache = engine._decoder.cache
    assert (cache.pages_in_use, cache.leaves_free) == (0, cache.leaves)
    print(f"{steps} steps: {dict(counts)}, {engine.stats()}")
    assert steps < 200 or engine.stats().get("preempted"), "no request gave its memory back: the soak lost its point"
    sys.exit(counts["differ"] > 0)


FOUR = {
    "base": (None, None),
    "tokenwise": (Tokenwise(2.0), "prefix"),
    "8x16": (Blockwise(8, 16), "probe"),
    "best of 4": (BestOfK(4), "reward-model"),
}


def speed(rounds: int = 5, count: int = 256) -> None:
    """Requests a second of the embedded policy by kind, then of four kinds: one by one, sorted and mixed; in turns."""
    found = {name: load_scorer(pyengine.embedded(name)) for name in ("prefix", "probe", "reward-model")}
    engine = Engine.from_pretrained(pyengine.embedded("policy"), cache_gb=1.0)
    prompts, draw = reviews.prompts(count), random.Random(0)
    kinds = [list(FOUR)[i * len(FOUR) // count] for i in range(count)]
    order = draw.sample(range(count), count)

    def run(places: Sequence[int], together: bool) -> float:
        start, handles = time.perf_counter(), []
        for i in places:
            strategy, scorer = FOUR[kinds[i]]
            sampling = SamplingParams(max_tokens=64, seed=i)
            handles.append(engine.submit(prompts[i], strategy, sampling, found.get(scorer or "")))
            if not together:
                handles[-1].result()
        for handle in handles:
            handle.result()
        return time.perf_counter() - start

    def sorted_by_kind(places: Sequence[int]) -> float:
        return sum(run([i for i in places if kinds[i] == kind], True) for kind in FOUR)

    ways: dict[str, Callable[[], float]] = {
        "mixed": lambda: run(order, True),
        "sorted by kind": lambda: sorted_by_kind(order),
        "one by one": lambda: 8 * run(order[::8], False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    best = {name: min(each) for name, each in times.items()}
    report = {
        "requests": count,
        "seconds": best,
        "of sorted": round(best["sorted by kind"] / best["mixed"], 3),
        "of one by one": round(best["one by one"] / best["mixed"], 2),
        "samples": times,
    }
    print(json.dumps(report, indent=1))
    TIMES.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    {"record": record, "check": check, "soak": soak, "time": speed}[sys.argv[1]](*map(int, sys.argv[2:]))


if __name__ == "__main__":
    main()
