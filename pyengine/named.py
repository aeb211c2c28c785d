"""Scorers by name: the one place where a name on a command line, or in a request, becomes a scorer."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyengine
from pyengine.errors import InputError, first_line
from pyengine.worlds import reviews

if TYPE_CHECKING:  # torch takes seconds that `pyengine --help` need not spend
    from pyengine.scorers.base import ScorerLike

MODELS = ("prefix", "probe", "reward-model")  # embedded
EXACT = {"sentiment": reviews.sentiment, "politeness": reviews.politeness}  # of the embedded reviews
SCORERS = (*MODELS, *EXACT, "length")
SOURCES = f"a directory, a hub id, FILE.py:FUNCTION, MODULE:FUNCTION, or embedded: {', '.join(SCORERS)}"  # in words


def scorer_named(name: str) -> ScorerLike:
    """An embedded scorer or an exact reward by its name ("length" is `rewards.length()`, in tokens), a function as
    FILE.py:FUNCTION or MODULE:FUNCTION, else `name` as a directory or hub id.

    Raises InputError for a name that can be none of these.
    """
    if name in MODELS:
        return pyengine.embedded(name)
    if name in EXACT:
        return EXACT[name]
    if name == "length":
        from pyengine.rewards import length

        return length()
    source, colon, function = name.rpartition(":")
    if colon and function.isidentifier() and not Path(name).is_dir():
        return _function(source, function)
    if not name or ("/" not in name and not Path(name).is_dir()):  # else the hub is asked, which takes its time
        raise InputError(
            f"no scorer {name!r}: embedded are {', '.join(SCORERS)}; else give a directory, FILE.py:FUNCTION "
            "or a hub id, OWNER/NAME"
        )
    return name


def _function(source: str, name: str) -> Callable[..., Any]:
    """A function of a file or an installed module, which runs: whoever gives the name vouches for it."""
    try:
        if source.endswith(".py"):
            found: Any = runpy.run_path(source)
        else:
            found = vars(importlib.import_module(source))
    except Exception as error:  # the module's own
        raise InputError(f"scorer {source}:{name}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(found.get(name)):
        raise InputError(f"scorer {source}:{name}: there is no function {name!r} in {source}")
    return cast("Callable[..., Any]", found[name])
