"""One version's side of `pyengine bench compare`: a process that runs what it is asked for and says what it took.

    python -P worker.py SITE     # a case and a number of calls a line on stdin, an object a line on stdout

It is given to versions that were before it, so that it knows only what they all have, and imports nothing of pyengine
but from SITE.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTROLS = ("a plain sum", "a product")  # of torch alone: they are the same in every version
OPS = ("tilt_sample", "select_block", "linear_logprob")
DECODING = ("decode plain", "decode tokenwise", "decode blockwise")
CASES = (*OPS, *DECODING)


def case(name: str) -> Callable[[], Any]:
    """A call of some milliseconds; what it gives is the same each time."""
    import torch

    torch.manual_seed(0)
    if name == "a plain sum":
        numbers = torch.randn(2**20)
        return numbers.sum
    if name == "a product":
        left, right = torch.randn(128, 256), torch.randn(256, 256)
        return lambda: left @ right
    return decoding(name) if name in DECODING else op(name)


def op(name: str) -> Callable[[], Any]:
    import torch

    from pyengine import ops

    if name == "tilt_sample":
        logits, values = 3 * torch.randn(8, 32_000), torch.randn(1, 8, 32_000)
        return lambda: ops.tilt_sample(logits, values, 1.0, seed=1, position=0).token
    if name == "select_block":
        hidden, probe = torch.randn(16, 16, 1024), torch.randn(1, 1024)
        return lambda: ops.select_block(hidden=hidden, probe=probe).index
    if name != "linear_logprob":
        raise ValueError(f"there is no case {name!r}")
    hidden, weight, target = torch.randn(32, 128), torch.randn(8000, 128) / 12, torch.arange(32)
    return lambda: ops.linear_logprob(hidden, weight, target).logp.round(decimals=3)


def decoding(name: str) -> Callable[[], Any]:
    """On the embedded policy, with seeds."""
    import pyengine
    from pyengine import Blockwise, Engine, SamplingParams, Tokenwise

    engine = Engine.from_pretrained(pyengine.embedded("policy"), cache_gb=0.05)
    strategy: Any = None
    if name != "decode plain":
        engine.set_scorer(pyengine.embedded("prefix" if name == "decode tokenwise" else "probe"))
        strategy = Tokenwise(2.0) if name == "decode tokenwise" else Blockwise(4, 8)
    prompts, sampling = [f"Review of clock {i}:" for i in range(2)], SamplingParams(max_tokens=24, seed=3)
    return lambda: [result.tokens for result in engine.generate(prompts, strategy, sampling, progress=False)]


def digest(result: Any) -> str:
    value = result.tolist() if hasattr(result, "tolist") else result
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def serve(site: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    # An editable install of another version answers for `pyengine` before the path is looked at.
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith(("_editable", "__editable__"))]
    sys.path.insert(0, str(site))
    import torch

    import pyengine

    torch.set_num_threads(1)
    found = Path(pyengine.__file__ or next(iter(pyengine.__path__))).resolve()
    if site.resolve() not in found.parents:
        raise SystemExit(f"pyengine came from {found}, not from {site}")
    runs: dict[str, Callable[[], Any]] = {}
    print(json.dumps({"pyengine": str(found)}), file=answers, flush=True)
    for line in sys.stdin:
        name, calls = json.loads(line)
        try:
            if name not in runs:
                runs[name] = case(name)
                runs[name]()
            took = timed(runs[name], calls)
        except Exception as error:  # noqa: BLE001 an older version may not have it
            took = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(took), file=answers, flush=True)


def timed(run: Callable[[], Any], calls: int) -> dict[str, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        result = run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": cpu / calls, "wall": wall / calls, "digest": digest(result)}


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
