"""What narrow numbers give on a CPU: tokens a second in fp32, bf16 and with int8 weights, beside their KL from fp32.

    python -m bench.narrow MODEL_DIR    # writes bench/results/narrow.json; about four minutes for 135 M parameters

All decode the same prompts in turns, in a new order each round: the base policy of 1 and 8 rows, and blocks of 8 x 16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pyengine import Blockwise, Engine, Probe, SamplingParams
from pyengine.bench import paired, turns
from pyengine.machine import about
from pyengine.quantize import drift, own_text

ROUNDS, TOKENS = 8, 32
KINDS = {"fp32": {}, "bf16": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}


def engines(path):
    """{kind: engine} and what each is said to cost."""
    found, text = {}, None
    for kind, options in KINDS.items():
        engine = Engine.from_pretrained(path, cache_gb=0.5, **options)
        text = text or own_text(engine.model)
        found[kind] = engine, drift(engine.model, *text)._asdict()
    return found


def tasks():
    """{name: what an engine does}"""
    prompts = [f"Write one sentence about the number {i}." for i in range(8)]

    def decode(engine, asked, strategy, seed):
        engine.forget()
        engine.generate(asked, strategy, SamplingParams(TOKENS, ignore_eos=True, seed=seed), progress=False)

    def blocks(engine):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            probe = Probe(engine.policy.hidden_size)
        with engine.following(probe):
            decode(engine, prompts[:1], Blockwise(8, 16), 0)

    return {
        "base, 1 row": (lambda engine: decode(engine, prompts[:1], None, 0), TOKENS),
        "base, 8 rows": (lambda engine: decode(engine, prompts, None, 0), 8 * TOKENS),
        "blockwise 8 x 16": (blocks, TOKENS),
    }


def main(path):
    made = engines(path)
    rows = []
    for name, (work, tokens) in tasks().items():
        runs = {kind: (lambda engine=engine, work=work: work(engine)) for kind, (engine, _) in made.items()}
        for run in runs.values():
            run()
        samples = turns.race(runs, ROUNDS)
        row = {"what": name, "tokens_per_s": {k: round(tokens / t, 2) for k, t in turns.medians(samples).items()}}
        row["times_as_fast_as_fp32"] = {
            k: paired.ratio(samples["fp32"], samples[k])._asdict() for k in runs if k != "fp32"
        }
        rows.append(row | {"samples_s": samples})
        print({k: v for k, v in row.items()}, flush=True)
    kl = {kind: cost for kind, (_, cost) in made.items()}
    print(kl)
    report = {"machine": about(), "model": Path(path).name, "kl_from_fp32": kl, "rows": rows}
    (Path(__file__).parent / "results" / "narrow.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
