"""`pyengine profile`."""

from __future__ import annotations

import inspect
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from pyengine.cli.generate import STRATEGIES, found_rows, generate, in_loop, strategy_of, usable_rows
from pyengine.cli.load import Complaints, conditioned, dtype_of, followed, load_engine
from pyengine.errors import InputError

LEFT_OUT = ("stream", "as_json", "out", "resume", "ray", "workers")  # of `generate`'s options


def profile(out: Path, **options: Any) -> None:
    """Run `generate` and say where its time went: by phase and op, beside what it must at least take."""
    from pyengine.profiling import profile as run
    from pyengine.profiling import report
    from pyengine.results import Result, SamplingParams

    o, complain = SimpleNamespace(**options), Complaints()
    names = {name for used in STRATEGIES.values() for name in used}
    plan = in_loop(strategy_of(o.strategy, o.scorer, {name: options[name] for name in names}), "profile")
    sampling = SamplingParams(o.max_tokens, o.temperature, o.top_k, o.top_p, o.min_p, o.seed or 0)  # all runs alike
    found = found_rows(o.prompts, o.input, complain)
    loading = {name: options[name] for name in ("quantize", "cache_gb", "trust_remote_code", "batch_invariant")}
    picked = followed("--scorer", o.scorer)
    engine = load_engine(o.model, picked, o.device, dtype=dtype_of(o.dtype), **loading)
    rows = usable_rows(engine, found, conditioned(o.model, o.score), not o.raw and o.score is None, complain)
    prompts = [row.prompt for row in rows]

    def decode() -> list[Result]:
        outcomes = engine.generate(prompts, plan, sampling, errors="return")
        for outcome in outcomes:
            if isinstance(outcome, InputError):
                raise outcome
        return outcomes

    report(run(decode, engine.model.device, out))
    print(f"{out}/profile.json, {out}/trace.json.gz (https://ui.perfetto.dev)")
    for line in _further(engine.model.device.type):
        print(line)
    if complain.made:
        raise typer.Exit(1)


def _further(device: str) -> list[str]:
    """What else to run, of what this machine has."""
    command = shlex.join(["pyengine", *sys.argv[1:]])
    if device == "cuda":
        return [
            f"nsys profile -t cuda,nvtx -o trace {command}",
            f'ncu --nvtx --nvtx-include "tilt_sample/" --set full {command}',
        ]
    return [f"perf record -g {command}"] if shutil.which("perf") else []


_given = inspect.signature(generate, eval_str=True).parameters.values()
_out = inspect.Parameter(
    "out",
    inspect.Parameter.KEYWORD_ONLY,
    default=Path("profile"),
    annotation=Annotated[Path, typer.Option(help="Directory for profile.json and trace.json.gz.")],
)
_kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _given if p.name not in LEFT_OUT]
profile.__signature__ = inspect.Signature([*_kept, _out])  # type: ignore[attr-defined]  # its options are generate's
