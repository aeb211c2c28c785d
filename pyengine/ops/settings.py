"""What the environment says about the ops, read once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import pyengine._C as _C
from pyengine.errors import InputError

GPU_BACKENDS = ("cuda", "triton", "reference")
ATTENTIONS = ("triton", "flash")


@dataclass
class Settings:
    """One for the process, `settings`, which the ops read at each call; a test or a benchmark may assign its fields.

    cpu_isa (PYENGINE_CPU_ISA): "portable", "avx2" or "avx512", to compare the paths on one machine; None is the best
        that the machine has.
    gpu_backend (PYENGINE_GPU_BACKEND): "cuda", "triton" or "reference", to compare the backends on one GPU; None is
        the first that is there. An op that has none of that name takes the first that is there too.
    attention (PYENGINE_ATTENTION): "flash" sends a GPU's full-attention layers to flash-attn 2, and a page of the cache
        then has 256 tokens, which flash-attn needs; else "triton". Read when `pyengine` is imported.
    debug (PYENGINE_DEBUG=1): the tables of every GPU call are read back and checked, and the cache's books after every
        commit; slow.
    """

    cpu_isa: str | None = None
    gpu_backend: str | None = None
    attention: str = "triton"
    debug: bool = False


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings of an environment; InputError, naming the variable, for a value that cannot be."""
    found = Settings(
        environment.get("PYENGINE_CPU_ISA"),
        environment.get("PYENGINE_GPU_BACKEND"),
        environment.get("PYENGINE_ATTENTION", "triton"),
        environment.get("PYENGINE_DEBUG", "0") == "1",
    )
    if found.cpu_isa is not None:
        try:
            _C.instruction_set(found.cpu_isa)
        except ValueError as error:
            raise InputError(f"PYENGINE_CPU_ISA: {error}") from error
    if found.gpu_backend not in (None, *GPU_BACKENDS):
        raise InputError(f"PYENGINE_GPU_BACKEND must be one of {GPU_BACKENDS}, got {found.gpu_backend!r}")
    if found.attention not in ATTENTIONS:
        raise InputError(f'PYENGINE_ATTENTION must be "triton" or "flash", got {found.attention!r}')
    if found.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise InputError("PYENGINE_ATTENTION=flash, but flash-attn is not installed: pip install flash-attn")
    return found


settings = read_settings(os.environ)
