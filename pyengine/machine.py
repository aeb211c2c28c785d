"""What figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import pyengine
from pyengine import _C
from pyengine.ops.settings import settings

ROOT = Path(__file__).parent.parent
VECTORS = ("avx", "fma", "amx", "f16c", "sse4", "asimd", "sve", "bf16")  # of a processor's flags, by their beginnings


def about(*packages: str) -> dict[str, object]:
    """The processor, its instruction set, flags and clocks, versions (also of these packages, None for one that is not
    there), the commit and, where there is one, the GPU."""
    fields = _cpuinfo()
    found: dict[str, object] = {
        "pyengine": pyengine.__version__,
        "commit": commit(),
        "cpu": fields.get("model name", [platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.instruction_set(settings.cpu_isa),
        "cpu_flags": _vector_flags(fields.get("flags", fields.get("Features", [""]))[0].split()),
        "clocks_mhz": [round(float(clock)) for clock in fields.get("cpu MHz", [])],
        "compiler": _C.compiler(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if packages:
        found["packages"] = {name: version(name) for name in packages}
    if not torch.cuda.is_available():
        return found | {"gpu": "not yet run on a GPU"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found | {
        "gpu": properties.name,
        "cuda": torch.version.cuda,
        "cuda_kernels": _C.cuda_architectures(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def commit() -> str | None:
    """Of the checkout that this package lies in, with -dirty where it was changed; None for one that was installed."""
    if output_of("git", "ls-files", "--error-unmatch", __file__) is None:
        return None
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def output_of(*command: str) -> str | None:
    """What a command prints, run where this package lies; None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, list[str]]:
    """Each field of /proc/cpuinfo with its value for every core; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def _vector_flags(flags: list[str]) -> list[str]:
    return sorted({flag for flag in flags if flag.startswith(VECTORS)})
