"""Checkpoints of a run: which one it goes on from, and that it is the same run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pyengine.errors import InputError

log = logging.getLogger("pyengine")


def checkpoint_of(out: Path, run: dict[str, Any], resume: bool) -> str | None:
    """The checkpoint in `out`/checkpoints to go on from, if any; notes what is being run beside it.

    run: what must be the same for a run to go on, and its "settings", of which checkpoint_every and accumulate may
    change. Every process calls this. Raises InputError for checkpoints of another run, or of one that `resume` does
    not ask for.
    """
    directory = out / "checkpoints"
    whole_ones = []
    for file in directory.glob("checkpoint-*/trainer_state.json"):  # Trainer writes it last
        try:
            whole_ones.append((json.loads(file.read_bytes())["global_step"], str(file.parent)))
        except (ValueError, KeyError):
            log.warning("%s is damaged: taking an earlier checkpoint", file.parent)
    if whole_ones and not resume:
        raise InputError(f"{directory} holds checkpoints of an earlier run: resume it, or remove them")
    if resume and not whole_ones:
        log.warning("no checkpoint in %s: starting from the first step", directory)
    if whole_ones:
        before = json.loads((directory / "run.json").read_bytes())
        old, new = ({k: v for k, v in {**r, **r["settings"]}.items() if k != "settings"} for r in (before, run))
        changed = sorted(k for k in new if k not in ("checkpoint_every", "accumulate") and new[k] != old.get(k))
        if changed:
            raise InputError(f"{directory} is of a run with another {' and '.join(changed)}; it cannot be resumed")
    PartialState().wait_for_everyone()  # all have looked before one writes
    if PartialState().is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    return max(whole_ones)[1] if whole_ones else None
