"""What a scorer or a model is, as a digest: work that was begun with one must not be finished with another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from pyengine.errors import InputError, first_line, real

Feed = Callable[[Any], object]  # takes bytes, or whatever has them

LIBRARIES = {*sys.stdlib_module_names, "numpy", "tokenizers", "torch", "transformers"}  # whose classes count by name
INTERNALS = {*vars(nn.Module())}  # of every module: its parts, which are walked by themselves, its mode and its hooks
IDLE = (logging.Logger, type(Lock()), type(RLock()))  # decide nothing about a score
# Of a class: what it says of itself, and what Python or its decorators add to it.
ASIDE = {
    *("__abstractmethods__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__dataclass_fields__"),
    *("__dataclass_params__", "__dict__", "__doc__", "__firstlineno__", "__match_args__", "__module__"),
    *("__orig_bases__", "__parameters__", "__qualname__", "__slotnames__", "__static_attributes__", "__weakref__"),
    "_abc_impl",
}
DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType)


def identity(thing: Any, what: str = "scorer") -> str:
    """A digest of what decides what a scorer or a model computes: equal things, equal digests, on any machine.

    A directory counts by its files, a file by its bytes, a hub id by its commit, a model by its modules, weights and
    configuration, a tokenizer by its rules, a function by its code, defaults and what it closes over, any other object
    by what it holds and by the functions and values of its class and their bases. Code counts as bytecode, which is
    another with another minor version of Python. Not seen are what a function reads from its module, hooks of modules,
    and the code of the libraries (`LIBRARIES`). Raises InputError for an object that cannot be looked into, such as an
    open file. what: the thing, in errors about a path.
    """
    digest = hashlib.blake2b(digest_size=16)
    _scorer(thing, digest.update, set(), what)
    return digest.hexdigest()


def terms(scorers: Sequence[Any]) -> list[tuple[float, Any]]:
    """The (weight, scorer) pairs of a list; InputError names an item that is none."""
    found = []
    for item in scorers:
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise InputError(f"a list of scorers holds (weight, scorer) pairs, got {item!r:.80}")
        found.append((real(item[0], f"scorer {item[1]!r:.80}: its weight"), item[1]))
    return found


def _scorer(thing: Any, feed: Feed, classes: set[type], what: str = "scorer") -> None:
    """A scorer in any of the forms that `parts_of` takes, in which a string is a path."""
    if isinstance(thing, (str, os.PathLike)):
        path, name = Path(thing), os.fspath(thing)
        there = path.exists()
        if not name or (not there and (path.is_absolute() or name.startswith(".") or "/" not in name)):
            raise InputError(f"{what} {name or repr(name)}: no such directory; a hub id is OWNER/NAME")
        if path.is_file():
            _walk(("file", _digest(path)), feed, classes)
        else:
            _walk(("directory", _files(path)) if there else ("hub", name, _commit(name, what)), feed, classes)
    elif isinstance(thing, Sequence) and not callable(thing):
        for weight, scorer in terms(thing):
            _walk(("part", weight), feed, classes)
            _scorer(scorer, feed, classes)
    else:
        _walk(thing, feed, classes)


def _files(directory: Path) -> list[tuple[str, str]]:
    """(name, digest) of every file below a directory but for hidden ones."""
    found = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory)
        if not any(part.startswith(".") for part in name.parts):
            found.append((name.as_posix(), _digest(path)))
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _commit(hub_id: str, what: str) -> str | None:
    """The commit that transformers would load; InputError where it finds nothing to load."""
    try:
        return extract_commit_hash(cached_file(hub_id, "config.json"), None)
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {hub_id}: {first_line(error)}") from error


def _walk(thing: Any, feed: Feed, classes: set[type], within: tuple[int, ...] = ()) -> None:
    """Feed a thing and all that it holds.

    classes: those that were fed already. within: the addresses of what it is itself held by, so that cycles end.
    """

    def add(kind: str, *inside: Any) -> None:
        feed(f"{kind}({len(inside)})".encode())
        for item in inside:
            _walk(item, feed, classes, (*within, id(thing)))

    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, np.generic)):
        feed(f"{type(thing).__name__}:{thing!r};".encode(errors="surrogatepass"))
        return
    if id(thing) in within:
        feed(b"again;")
        return
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if not isinstance(thing, type) and not _of_library(type(thing)):
        add("of", type(thing))
    if isinstance(thing, Tensor):
        add(f"tensor {thing.dtype} {list(thing.shape)}")
        feed(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(thing, np.ndarray):
        add(f"array {thing.dtype} {list(thing.shape)}", thing.tolist() if thing.dtype == object else thing.tobytes())
    elif isinstance(thing, nn.Module):
        add(name, *_module(thing))
    elif isinstance(thing, PreTrainedConfig):
        add(name, {k: v for k, v in thing.to_dict().items() if not k.startswith("_") and k != "transformers_version"})
    elif hasattr(thing, "backend_tokenizer"):
        rules = json.loads(thing.backend_tokenizer.to_str())
        add(name, {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")})
    elif hasattr(thing, "get_vocab"):
        add(name, thing.get_vocab(), thing.special_tokens_map)
    elif isinstance(thing, types.FunctionType):
        cells = [_content(cell) for cell in thing.__closure__ or ()]
        add(thing.__qualname__, thing.__module__, thing.__code__, thing.__defaults__, thing.__kwdefaults__, cells)
    elif isinstance(thing, types.CodeType):
        counts = (thing.co_argcount, thing.co_posonlyargcount, thing.co_kwonlyargcount, thing.co_flags)
        names = (thing.co_names, thing.co_varnames)  # of its arguments, too, by which it may be called
        add("code", thing.co_code, thing.co_exceptiontable, names, thing.co_consts, counts)
    elif isinstance(thing, types.MethodType):
        add("method", thing.__func__, thing.__self__)
    elif isinstance(thing, functools.partial):
        add("partial", thing.func, thing.args, thing.keywords)
    elif isinstance(thing, (type, types.BuiltinFunctionType, types.ModuleType)):
        add(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}")
        if isinstance(thing, type) and not _of_library(thing) and thing not in classes:
            classes.add(thing)
            add("class", thing.__bases__, _body(thing))
    elif isinstance(thing, IDLE):
        add(name)
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
    else:
        add(name, *_held(thing))


def _module(module: nn.Module) -> list[Any]:
    """What a module is made of. One of a library with a configuration is described by that and by its parts."""
    known: Any = vars(module)
    if _of_library(type(module)):
        known = known["config"] if isinstance(known.get("config"), PreTrainedConfig) else _public(known)
    else:
        known = {key: value for key, value in known.items() if key not in INTERNALS}
    return [known, module._parameters, module._buffers, module._modules]


def _public(known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in known.items() if key not in INTERNALS and not key.startswith("_")}


def _of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in LIBRARIES


def _body(kind: type) -> dict[str, Any]:
    """The functions and values in a class."""
    found = {}
    for key, value in vars(kind).items():
        if key in ASIDE or isinstance(value, DESCRIPTORS):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = (value.fget, value.fset)
        elif isinstance(value, functools.cached_property):
            value = value.func
        found[key] = value
    return found


def _held(thing: Any) -> list[Any]:
    """What an object of no known kind holds: its attributes and slots; InputError where nothing tells."""
    try:
        state = thing.__reduce_ex__(4)  # as pickle would take it apart: by it Ray sends it, too
    except (TypeError, AttributeError, NotImplementedError) as error:
        if _of_library(type(thing)):
            raise InputError(
                f"cannot tell what decides a score in {thing!r:.80}: {first_line(error)}; make it where it is used, "
                "not in the scorer"
            ) from error
        return [object.__getstate__(thing)]  # its __dict__ and slots
    if isinstance(state, str):
        return [state]
    return [list(part) if isinstance(part, Iterator) else part for part in state]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put into it yet
        return "empty"
