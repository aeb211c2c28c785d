"""`pyengine info`: what is installed here, and which backends serve the ops."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import pyengine


def info() -> None:
    """Versions, the backends that are there, and why one is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for label, value in report():
        table.add_row(label, value)
    Console().print(table)


def report() -> Iterator[tuple[str, str]]:
    """(what, its state) for `pyengine info`."""
    import torch

    from pyengine import _C, ops
    from pyengine.ops.backend import gpu_backend

    yield "tilt-engine", pyengine.__version__
    yield "python", f"{platform.python_version()} on {platform.machine()}"
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        yield package, importlib.metadata.version(package)
    yield "CPU kernels", f"C++ with {ops.common.instruction_set()}, built by {_C.compiler()}"
    built = ", ".join(_C.cuda_architectures())
    yield "CUDA kernels", f"built for {built}" if built else "not built (needs nvcc; PYENGINE_CUDA=ON insists)"
    yield "threads", str(torch.get_num_threads())
    if torch.cuda.is_available():
        yield "GPU", f"{torch.cuda.get_device_name()}; tilt_sample runs {gpu_backend('tilt_sample')}"
    elif torch.version.cuda is None:
        yield "GPU", f"missing: torch {torch.__version__} is built without CUDA"
    else:
        yield "GPU", f"missing: torch is built for CUDA {torch.version.cuda}, but finds no device"
    for package, use in (
        ("triton", "GPU kernels of all ops"),
        ("flash_attn", "attention on a GPU with PYENGINE_ATTENTION=flash"),
    ):
        try:
            there = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            there = ""
        yield package.replace("_", "-"), f"{there or 'not installed'}; {use}"
