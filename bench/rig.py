"""What the benches of gpu.py share: the clock, the rates that fractions are of, the report, the machine."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from pyengine.bench import turns
from pyengine.machine import about
from pyengine.ops.settings import settings

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "flashinfer-python", "flash-attn")


class Skipped(Exception):
    """Why something is not timed here."""


class Rig:
    """A device, its clock and its rates."""

    def __init__(self, device: str, small: bool, budget: float, rates: dict[str, float]) -> None:
        self.device, self.small, self.rates = torch.device(device), small, rates
        self.gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.deadline = time.monotonic() + budget
        if self.gpu:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.scratch = torch.ones(max(2 * cache, 2**27), device=self.device)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(scale)

    def targets(self, vocab: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, vocab, shape, device=self.device)

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def sample(self, run) -> float:
        """Milliseconds of one run."""
        if not self.gpu:
            return turns.seconds_of(run) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.fill_(1.0)
        self.scratch.sum()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def extra_peak(self, run) -> int:
        """Megabytes by which the device's memory rises while `run` runs."""
        return round(turns.extra_peak(run, self.device)[1] / 1e6)

    def race(self, what: str, runs: dict, seconds: float = 1.5, compare=None, **sizes: int) -> dict:
        """A row of the report: samples of all runs, in turns, beside the first run's; what cannot run says why.

        compare(result) is a tensor that all runs should agree on, or None.
        """
        alive, failed, peaks, found, cost = {}, {}, {}, {}, 0.0
        for name, run in runs.items():
            try:
                result = run()  # compiles, tunes, fills the allocator
                if compare is not None and (value := compare(result)) is not None:
                    found[name] = value.detach().double()
                del result
                run()
                self.wait()
                if self.gpu:
                    peaks[name] = self.extra_peak(run)
                cost += self.sample(run) / 1e3 + 1e-3
            except Exception as error:  # noqa: BLE001 whatever a peer does, the others are timed
                failed[name] = f"{type(error).__name__}: {error}"[:400]
                self.wait()  # raises again where the device is lost
            else:
                alive[name] = run
        rounds = 3 if self.small else max(7, min(200, int(seconds / max(cost, 1e-3))))
        samples = turns.race(alive, rounds, sample=self.sample)
        medians = turns.medians(samples)
        first = next(iter(medians.values()), None)
        return {
            "what": what,
            **sizes,
            "ms": {name: round(t, 5) for name, t in medians.items()},
            "ms_20_80": {name: [round(q, 5) for q in quantiles(times)] for name, times in samples.items()},
            "times_slower": {name: round(t / first, 3) for name, t in medians.items()},
            "differs": {name: float((v - next(iter(found.values()))).abs().max()) for name, v in found.items()},
            "extra_peak_mb": peaks,
            "failed": failed,
            "samples_ms": {name: [float(f"{t:.5g}") for t in times] for name, times in samples.items()},
        }

    def against(self, row: dict, moved: float = 0, flops: float = 0, target: float | None = None, of="pyengine"):
        """The row, with each run's fraction of the floor: bytes moved and operations done at this machine's rates."""
        rates = self.rates
        if rates:
            floor = 1e3 * max(moved / rates["copy_bytes_per_s"], flops / rates["gemm_flop_per_s"])
            row["floor_ms"] = round(floor, 5)
            row["fraction_of_floor"] = {name: round(floor / t, 3) for name, t in row["ms"].items()}
            best = max((f for name, f in row["fraction_of_floor"].items() if name.startswith(of)), default=0)
            if target is not None:
                aim(row, "fraction of the floor", best, target)
        return row


def quantiles(times: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(times, n=5)
    return cuts[0], cuts[3]


def aim(row: dict, what: str, measured: float, wanted: float) -> None:
    reached = {"what": what, "measured": round(measured, 3), "wanted": wanted, "met": measured >= wanted}
    row.setdefault("targets", []).append(reached)


def speedup(row: dict, peer: str, wanted: float) -> None:
    """Aim at being `wanted` times as fast as the fastest run whose name begins with `peer`."""
    ours = [t for name, t in row["ms"].items() if name.startswith("pyengine")]
    theirs = [t for name, t in row["ms"].items() if name.startswith(peer)]
    if ours and theirs:
        aim(row, f"times as fast as {peer}", min(theirs) / min(ours), wanted)


def under(call, *settings: tuple):
    """`call` with (module, name, value) in force."""

    def run():
        with ExitStack() as stack:
            for setting in settings:
                stack.enter_context(mock.patch.object(*setting))
            return call()

    return run


def gpu_only(rig: Rig, call):
    def skip():
        raise Skipped("needs a GPU")

    return call if rig.gpu else skip


def backends(rig: Rig, call, suffix: str = "") -> dict:
    """The call by each backend of a GPU, or by the CPU's."""
    on_cpu = {} if rig.gpu else {f"pyengine cpu{suffix}": call}
    forced = {name: gpu_only(rig, under(call, (settings, "gpu_backend", name))) for name in ("cuda", "triton")}
    return on_cpu | {f"pyengine {name}{suffix}": run for name, run in forced.items()}


def machine(rig: Rig) -> dict:
    return about(*PACKAGES) | {"device": str(rig.device)}


def brief(row: dict) -> str:
    kept = ("ms", "times_slower", "fraction_of_floor", "failed", "crossover", "checks")
    sizes = {key: value for key, value in row.items() if isinstance(value, (str, int))}
    return json.dumps(sizes | {key: row[key] for key in kept if row.get(key)})


def main(description: str, sections: dict) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does every path run?")
    parser.add_argument("--budget", type=float, default=270, help="seconds, after which no row is begun")
    parser.add_argument("--step", action="append", default=[], help="NAME=EXIT-CODE of what ran before, for the record")
    parser.add_argument("--resume", action="store_true", help="keep the sections that are in OUT")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.resume else {"rates": {}, "sections": {}}
    rig = Rig(options.device, options.small, options.budget, report["rates"])
    report |= {"machine": machine(rig), "steps": {n: int(c) for n, c in (s.split("=") for s in options.step)}}

    def save() -> None:
        whole = options.out.with_suffix(".part")  # if the run is stopped, OUT is still whole
        whole.write_text(json.dumps(report, indent=1) + "\n")
        whole.replace(options.out)

    for name, section in sections.items():
        if name in report["sections"]:
            continue
        result = report["sections"][name] = {"rows": []}
        began = time.monotonic()
        try:
            rows = section(rig)
            while time.monotonic() < rig.deadline and (row := next(rows, None)) is not None:
                result["rows"].append(row)
                print(name, brief(row), flush=True)
                save()
            if time.monotonic() >= rig.deadline:
                result["skipped"] = "the time was up" + (" after these rows" if result["rows"] else "")
        except Skipped as reason:
            result["skipped"] = str(reason)
        except Exception as error:  # noqa: BLE001 the other sections are worth having
            result["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(name, result["error"], flush=True)
        result["seconds"] = round(time.monotonic() - began, 1)
        save()
        rows = row = None
        gc.collect()
        try:
            rig.wait()
        except RuntimeError:  # an illegal access loses the device for this process: go on in a fresh one
            left = max(0.0, rig.deadline - time.monotonic())
            os.execv(sys.executable, [sys.executable, *sys.argv, "--resume", "--budget", str(left)])
        if rig.gpu:
            torch.cuda.empty_cache()
    for name, result in report["sections"].items():
        for row in result["rows"]:
            for target in row.get("targets", []):
                print("met   " if target["met"] else "missed", name, row.get("batch", ""), target)
    print("steps that failed:", [name for name, code in report["steps"].items() if code] or "none")
