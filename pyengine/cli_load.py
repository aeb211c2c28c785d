"""What the commands load: scorers and models by their names on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyengine
from pyengine.errors import InputError

if TYPE_CHECKING:
    from pyengine.engine import Engine

SCORERS = ("prefix", "probe", "reward-model", "sentiment", "politeness", "length")


def make_scorer(name: str) -> Any:
    """A scorer by embedded name, or a directory or hub id; InputError for what can be neither."""
    if name in ("prefix", "probe", "reward-model"):
        return pyengine.embedded(name)
    if name in SCORERS:
        from pyengine.worlds import reviews

        return getattr(reviews, name)
    if not name or ("/" not in name and not Path(name).is_dir()):  # else the hub is asked, which takes its time
        raise InputError(
            f"no scorer {name!r}: embedded are {', '.join(SCORERS)}; else give a directory or a hub id, OWNER/NAME"
        )
    return name


def conditioned(model: str | None, score: float | None) -> Callable[[Any], Any]:
    """What makes of a prompt the one that asks a policy of conditional alignment for this reward; None asks nothing."""
    file = Path(model or "") / "conditioning.json"
    there = model is not None and file.is_file()
    if score is None:
        if there:
            print(f"pyengine: {model} was trained to be asked for a reward: --score 5, say", file=sys.stderr)
        return lambda prompt: prompt
    if not there:
        raise InputError(f"--score: {model or 'the embedded model'} has no conditioning.json, as method ca leaves it")
    from pyengine.rewards.conditioning import Conditioning

    template = Conditioning.load(file)

    def asking(prompt: Any) -> str:
        if type(prompt) is not str:
            raise InputError(f"--score asks in a text, not in token ids or messages: {prompt!r:.40}")
        return template.prompt(prompt, score)

    return asking


def quiet_loading() -> None:
    """No loading bars where nobody watches."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def load_engine(
    model: str | None,
    scorer: str | None,
    device: str,
    cache_gb: float | None,
    trust_remote_code: bool,
    batch_invariant: bool = False,
) -> Engine:
    from pyengine.engine import Engine

    quiet_loading()
    path: Any = pyengine.embedded("policy") if model is None else model
    picked = None if scorer is None else make_scorer(scorer)
    return Engine.from_pretrained(
        path,
        scorer=picked,
        device=device,
        cache_gb=cache_gb,
        trust_remote_code=trust_remote_code,
        batch_invariant=batch_invariant,
    )
