"""Tokenwise inside SGLang: requests with `tilt_*` in their `custom_params` follow a scorer, others are as they were.

SGLang finds this by the entry point `sglang.srt.plugins`. The scorers of a server are named once, in the environment
variable PYENGINE_SCORERS: "NAME=SOURCE,NAME=SOURCE", the first one is the default. docs/sglang.md says the rest.
"""

from __future__ import annotations

import logging
import os

from pyengine.errors import SMALLEST, InputError, real

SCORERS = "PYENGINE_SCORERS"
CACHE = "PYENGINE_SCORER_CACHE_GB"  # of each scorer that is a model of its own; taken before SGLang takes its own


def register() -> None:
    """The plugin: called by SGLang in each of its processes, before it starts.

    What is wrong ends the process: SGLang logs a plugin's exceptions and serves on, and without the plugin a request
    with `tilt_*` would get the base policy. Where no scorers are named, what is wrong is a warning.
    """
    named = os.environ.get(SCORERS)
    try:
        from pyengine.integrations.sglang import private

        private.install(scorers_of(named) if named else {}, gigabytes_of(os.environ.get(CACHE, "1")))
    except Exception as error:  # whatever it is, SGLang would go on without it
        if named:
            raise SystemExit(f"pyengine: {type(error).__name__}: {error}") from error
        logging.getLogger(__name__).warning("pyengine is not in this SGLang: %s", error)


def scorers_of(named: str) -> dict[str, str]:
    """{name: source} of PYENGINE_SCORERS; a source alone is its own name. InputError where it is not written so."""
    found: dict[str, str] = {}
    for one in named.split(","):
        name, equals, source = (part.strip() for part in one.partition("="))
        if not name or name in found or bool(equals) != bool(source):
            raise InputError(f"{SCORERS}: {one!r} in {named!r}: give NAME=SOURCE, each name once and without commas")
        found[name] = source or name
    return found


def gigabytes_of(given: str) -> float:
    """A number of 10⁹ bytes; InputError where it is none."""
    try:
        return real(float(given), CACHE, SMALLEST)
    except ValueError:
        raise InputError(f"{CACHE} must be a number of gigabytes above 0, got {given!r}") from None
