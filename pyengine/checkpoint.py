"""Loading a checkpoint and its tokenizer with transformers, so that whatever is wrong with it is said in one line."""

from __future__ import annotations

import io
import json
import logging
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer
from transformers.utils.logging import is_progress_bar_enabled

from pyengine.errors import InputError, first_line, whole

log = logging.getLogger("pyengine")


def device_of(name: Any) -> torch.device:
    """The device of this name; torch's own error lists twenty kinds, nearly all of machines that nobody has."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {name!r} is none that torch knows: use cpu, cuda, cuda:1 or mps") from error


def load_checkpoint(auto: Any, kind: str, path: str | Path, trust_remote_code: bool, **arguments: Any) -> Any:
    """(model, tokenizer) from a directory, hub id or GGUF file; no pickles, and no code of its own unless asked for.

    auto: a transformers Auto class. A GGUF file, or a directory that holds one and no safetensors, is dequantised whole
    by transformers. Raises InputError, naming `kind` and `path`, for anything that cannot be loaded whole: transformers
    would fill missing weights with random numbers and go on.
    """
    path, file = _gguf_in(kind, Path(path)) or (path, None)
    if (Path(path).is_absolute() or str(path).startswith(".")) and not Path(path).is_dir():
        is_file = " (that is a file)" if Path(path).is_file() else ""
        raise InputError(f"{kind} {path}: no such directory{is_file}; give one with config.json and safetensors")
    source: dict[str, Any] = {} if file is None else {"gguf_file": file}
    how = {"use_safetensors": True} if file is None else source | _dequantised(file)
    try:
        # The bar of the dequantisation asks nobody.
        with nullcontext() if file is None or is_progress_bar_enabled() else redirect_stderr(io.StringIO()):
            model, found = auto.from_pretrained(
                path, trust_remote_code=trust_remote_code, output_loading_info=True, **how, **arguments
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **source)
    except Exception as error:
        raise InputError(
            f"{kind} {path}: {_of_adapter(Path(path), error)}{_other_files(Path(path))}{first_line(error)}"
        ) from error
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise InputError(f"{kind} {path}: its tokenizer knows no text; are the tokenizer files there?")
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"{kind} {path}: the checkpoint lacks {len(missing)} of the weights of a {type(model).__name__}, "
            f"{missing[0]!r} among them"
        )
    if file is not None:
        log.warning("%s %s: %s is dequantised to %s", kind, path, file, str(model.dtype).removeprefix("torch."))
    return model, tokenizer


def _gguf_in(kind: str, path: Path) -> tuple[Path, str] | None:
    """(directory, name) of the GGUF file that `path` is or holds beside no safetensors; InputError for several of them,
    and where what reads one is not installed."""
    if path.is_dir():
        files = [] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
    else:
        files = [path] if path.suffix == ".gguf" else []
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{kind} {path}: holds several GGUF files, {names}: give one of them")
    if not files[0].is_file():
        raise InputError(f"{kind} {path}: no such file")
    needs = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if needs:
        raise InputError(f"{kind} {path}: reading GGUF needs {' and '.join(needs)}: pip install {' '.join(needs)}")
    return files[0].parent, files[0].name


def _dequantised(file: str) -> dict[str, Any]:
    """What tells transformers to unpack every weight; the older ones know no other way."""
    config: Any = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(gguf_file=file, dequantize=True)}


def context_of(config: Any) -> int | None:
    """Tokens that a model of this config reads at most; None for any number.

    With yarn and linear RoPE that is the factor times the original length, as transformers documents it; some
    checkpoints name that product in max_position_embeddings, others the original length.
    """
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if longest and rope.get("rope_type") in ("yarn", "linear") and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or longest
        return max(longest, int(rope["factor"] * original))
    return longest or None


def ends_of(model: Any) -> frozenset[int]:
    """The tokens that end a response of this model; none where neither generation_config nor config names one."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return frozenset(whole(token, "eos_token_id of the model's config", 0) for token in found)


# What transformers' `generate` takes of a checkpoint's generation_config and nothing here does, with what is neutral.
PROCESSORS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "stop_strings": None,
}
# The same of SamplingParams, which has its own defaults; read by `generate` where it samples.
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# What sets it here, where something does.
FIELDS = {name: name for name in (*SAMPLED, "repetition_penalty")} | {
    "bad_words_ids": "bad_words",
    "suppress_tokens": "logit_bias",
    "min_new_tokens": "min_tokens",
    "sequence_bias": "logit_bias",
    "stop_strings": "stop",
}


def unapplied_defaults(model: Any) -> list[str]:
    """Each default of the checkpoint's generation_config that the engine does not apply, and what would set it."""
    config = model.generation_config
    found = []
    for field, neutral in (PROCESSORS | (SAMPLED if config and config.do_sample else {})).items():
        value = getattr(config, field, None)
        if value not in (None, neutral, []):
            ours = f"set SamplingParams.{FIELDS[field]}" if field in FIELDS else "nothing here sets it"
            found.append(f"{field}={value!r:.40} ({ours})")
    return found


def _of_adapter(path: Path, error: Exception) -> str:
    """Which base an adapter in this directory is of; transformers' errors name the base's files alone."""
    file = path / "adapter_config.json"
    try:
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    if not isinstance(base, str) or not base:
        return (
            "an adapter that does not name its base (base_model_name_or_path): load the base and merge it with peft: "
        )
    on = f"an adapter on {base}"
    if not Path(base).is_dir():
        return f"{on}, which is no directory here: "
    if "ignore_mismatched_sizes" in str(error):
        return f"{on}, of other sizes than it (tokens of its own?): resize the base and merge it with peft: "
    if not any(path.glob("tokenizer*")):
        return f"{on}, without tokenizer files: copy the base's beside it: "
    return f"{on}: "


def _other_files(path: Path) -> str:
    """What to do about a directory without safetensors whose weights lie in files of another kind."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return ""
    if any(path.glob("*.bin")):
        return "its weights are pickles (*.bin), which are not loaded: save it as safetensors with transformers first: "
    return ""


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same tokens; False where that cannot be told (a slow tokenizer)."""

    def rules(tokenizer: Any) -> object:
        if not getattr(tokenizer, "is_fast", False):
            return None
        found = json.loads(tokenizer.backend_tokenizer.to_str())
        return {name: rule for name, rule in found.items() if name not in ("padding", "truncation")}

    return rules(one) is not None and rules(one) == rules(other)
