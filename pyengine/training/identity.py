"""What a scorer or a model is, as a digest: work that was begun with one must not be finished with another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file, extract_commit_hash

from pyengine.errors import InputError, first_line

Feed = Callable[[Any], object]  # takes bytes, or whatever has them

PASSING = ("training", "transformers_version")  # of a module or its configuration: how it is used, not what it is


def identity(thing: Any) -> str:
    """A digest of everything that decides what a scorer or a model computes: equal things, equal digests, anywhere.

    A directory counts by its files, a hub id by its commit, a model by its weights and configuration, a tokenizer by
    its rules, a function by its code, defaults and what it closes over. What a function reads from its module, and the
    versions of libraries, are not seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    _scorer(thing, digest.update)
    return digest.hexdigest()


def _scorer(thing: Any, feed: Feed) -> None:
    """A scorer in any of the forms that `parts_of` takes, in which a string is a path."""
    if isinstance(thing, (str, os.PathLike)):
        path = Path(thing)
        if not path.is_dir() and (path.is_absolute() or str(thing).startswith(".")):
            raise InputError(f"scorer {thing}: no such directory")
        _walk(("directory", _files(path)) if path.is_dir() else ("hub", str(thing), _commit(str(thing))), feed)
    elif isinstance(thing, Sequence):
        for weight, scorer in thing:
            _walk(("part", float(weight)), feed)
            _scorer(scorer, feed)
    else:
        _walk(thing, feed)


def _files(directory: Path) -> list[tuple[str, str]]:
    """(name, digest) of every file below a directory but for hidden ones."""
    found = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory)
        if not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                found.append((name.as_posix(), hashlib.file_digest(file, "blake2b").hexdigest()))
    return found


def _commit(hub_id: str) -> str | None:
    """The commit that transformers would load; InputError where it finds nothing to load."""
    try:
        return extract_commit_hash(cached_file(hub_id, "config.json"), None)
    except (OSError, ValueError) as error:
        raise InputError(f"scorer {hub_id}: {first_line(error)}") from error


def _walk(thing: Any, feed: Feed, within: tuple[int, ...] = ()) -> None:
    """Feed a thing and all that it holds; `within`: the addresses of what it is itself held by, so that cycles end."""

    def add(kind: str, *inside: Any) -> None:
        feed(f"{kind}({len(inside)})".encode())
        for item in inside:
            _walk(item, feed, (*within, id(thing)))

    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, np.generic)):
        feed(f"{type(thing).__name__}:{thing!r};".encode(errors="surrogatepass"))
        return
    if id(thing) in within:
        feed(b"again;")
        return
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, Tensor):
        add(f"tensor {thing.dtype} {list(thing.shape)}")
        feed(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(thing, np.ndarray):
        add(f"array {thing.dtype} {list(thing.shape)}", thing.tolist() if thing.dtype == object else thing.tobytes())
    elif isinstance(thing, nn.Module):
        config: Any = getattr(thing, "config", None)
        known = config.to_dict() if hasattr(config, "to_dict") else vars(thing)
        kept = {key: known[key] for key in known if not key.startswith("_") and key not in PASSING}
        add(name, kept, thing.state_dict())
    elif hasattr(thing, "backend_tokenizer"):
        rules = json.loads(thing.backend_tokenizer.to_str())
        add(name, {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")})
    elif hasattr(thing, "get_vocab"):
        add(name, thing.get_vocab(), thing.special_tokens_map)
    elif isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        add(thing.__qualname__, thing.__module__, thing.__code__, thing.__defaults__, thing.__kwdefaults__, cells)
    elif isinstance(thing, types.CodeType):
        add("code", thing.co_code, thing.co_names, thing.co_consts)
    elif isinstance(thing, types.MethodType):
        add("method", thing.__func__, thing.__self__)
    elif isinstance(thing, functools.partial):
        add("partial", thing.func, thing.args, thing.keywords)
    elif isinstance(thing, (type, types.BuiltinFunctionType, types.ModuleType)):
        add(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}")
    elif isinstance(thing, Mapping):
        add(name, *(pair for key in sorted(thing, key=repr) for pair in (key, thing[key])))
    elif isinstance(thing, (set, frozenset)):
        add(name, *sorted(thing, key=repr))
    elif isinstance(thing, (list, tuple)):
        add(name, *thing)
    elif isinstance(thing, os.PathLike):
        add(name, os.fspath(thing))
    elif dataclasses.is_dataclass(thing):
        add(name, *(getattr(thing, field.name) for field in dataclasses.fields(thing) if field.init))
    elif hasattr(thing, "__dict__"):
        add(name, vars(thing))
    else:
        add(name, "" if " at 0x" in repr(thing) else repr(thing))
