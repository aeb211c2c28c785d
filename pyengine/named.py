"""Scorers by name: the one place where a name on a command line, or in a request, becomes a scorer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyengine
from pyengine.errors import InputError
from pyengine.worlds import reviews

if TYPE_CHECKING:  # torch takes seconds that `pyengine --help` need not spend
    from pyengine.scorers.base import ScorerLike

MODELS = ("prefix", "probe", "reward-model")  # embedded
EXACT = {"sentiment": reviews.sentiment, "politeness": reviews.politeness, "length": reviews.length}
SCORERS = (*MODELS, *EXACT)


def scorer_named(name: str) -> ScorerLike:
    """An embedded scorer or an exact reward by its name, else `name` as a directory or hub id.

    Raises InputError for a name that can be neither.
    """
    if name in MODELS:
        return pyengine.embedded(name)
    if name in EXACT:
        return EXACT[name]
    if not name or ("/" not in name and not Path(name).is_dir()):  # else the hub is asked, which takes its time
        raise InputError(
            f"no scorer {name!r}: embedded are {', '.join(SCORERS)}; else give a directory or a hub id, OWNER/NAME"
        )
    return name
