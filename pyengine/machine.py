"""What figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import pyengine
from pyengine import _C
from pyengine.ops.settings import settings


def about() -> dict[str, object]:
    """The processor, its instruction set, versions and, where there is one, the GPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, object] = {
        "pyengine": pyengine.__version__,
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.instruction_set(settings.cpu_isa),
        "compiler": _C.compiler(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        return found | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | {"gpu": "not yet run on a GPU"}
