"""What the machine says of itself while it is measured: load, throttling, energy. What it does not say is absent."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from pyengine.machine import commit

POWERCAP = Path("/sys/class/powercap")
CPUS = Path("/sys/devices/system/cpu")
GROUP = Path("/sys/fs/cgroup/cpu.stat")
STOLEN = 0.02  # of the processors' time, taken by other guests of the host


class Watch:
    """From its making on: the warnings that a reader of the figures needs, and joules."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.load, self.cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        self.throttled, self.ticks = _throttled(), _ticks()
        self.began = time.monotonic()

    def warnings(self) -> list[str]:
        found = []
        if self.load > self.cores:
            found.append(f"the load was {self.load:.1f} before it began, on {self.cores} cores: others ran beside it")
        if (commit() or "").endswith("-dirty"):
            found.append("the tree is dirty: the commit does not say what ran")
        throttled = _throttled()
        found += [f"{what}: {throttled[what] - n} times" for what, n in self.throttled.items() if throttled[what] > n]
        stolen, passed = (after - before for after, before in zip(_ticks(), self.ticks, strict=True))
        if passed and stolen / passed > STOLEN:
            found.append(f"{stolen / passed:.0%} of the processors' time went to other guests of this host")
        return found + _gpu_throttling(self.device)


def joules(device: torch.device) -> float | None:
    """A counter that only rises, of the GPU (NVML) or the processors' packages (RAPL); None where neither is read.

    Both count what everybody on the device or the package does.
    """
    if device.type == "cuda":
        handle = _nvml(device)
        return None if handle is None else _ask("nvmlDeviceGetTotalEnergyConsumption", handle, 1e-3)
    try:
        counters = sorted(POWERCAP.glob("intel-rapl:[0-9]*"))  # intel-rapl:0:0 is a part of intel-rapl:0
        own = [path / "energy_uj" for path in counters if path.name.count(":") == 1]
        return 1e-6 * sum(int(path.read_text()) for path in own) if own else None
    except (OSError, ValueError):  # of root alone, since 2020
        return None


def _throttled() -> dict[str, int]:
    """Counters, by what they mean."""
    found = {}
    try:
        counts = [int(p.read_text()) for p in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
        if counts:
            found["a core was slowed down by its heat"] = sum(counts)
        fields = dict(line.split() for line in GROUP.read_text().splitlines())
        found["the container's share of the processors was used up"] = int(fields.get("nr_throttled", 0))
    except (OSError, ValueError):
        pass
    return found


def _ticks() -> tuple[int, int]:
    """(stolen, all) ticks of the processors; zeros where nobody says."""
    try:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return numbers[7], sum(numbers)
    except (OSError, ValueError, IndexError):
        return 0, 0


def _nvml(device: torch.device) -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def _ask(function: str, handle: Any, unit: float = 1.0) -> float | None:
    import pynvml

    try:
        return unit * float(getattr(pynvml, function)(handle))
    except pynvml.NVMLError:
        return None


def _gpu_throttling(device: torch.device) -> list[str]:
    """Slowed down by heat or power, now; idle clocks and the settings of its owner are not meant."""
    handle = _nvml(device) if device.type == "cuda" else None
    if handle is None:
        return []
    reasons = int(_ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0)
    slow = 0x4 | 0x8 | 0x20 | 0x40 | 0x80  # software power cap, hardware slowdown, software and hardware heat, brake
    return ["the GPU was slowed down by heat or power"] if reasons & slow else []
