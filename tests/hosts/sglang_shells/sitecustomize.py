"""SGLang 0.5.23 on a machine without a GPU: the packages that it imports, and never calls there, are empty shells.

Lies on PYTHONPATH of the processes that run SGLang, so that those which it spawns have it too.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from unittest.mock import MagicMock

KERNELS = ("sgl_kernel", "flashinfer", "deep_gemm", "flash_attn", "torch_memory_saver", "cutlass", "tilelang")
OTHERS = ("IPython", "torchvision", "datasets", "gguf", "modelscope", "soundfile")


class Shell(types.ModuleType):
    """A module in which every name is there and none does anything."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


def asked_by(package):
    """Whether an import comes from that package, which does without what is not there."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("importlib", __name__):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package


class Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STUBBED and not asked_by("transformers"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Shell(spec.name)

    def exec_module(self, module):
        pass


STUBBED = {name for name in (*KERNELS, *OTHERS) if importlib.util.find_spec(name) is None}
sys.meta_path.append(Shells())
