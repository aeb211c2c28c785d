"""Checkpoints of a run: which one it goes on from, and that it is the same run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from pyengine.errors import InputError, first_line

log = logging.getLogger("pyengine")


FREE = ("checkpoint_every", "accumulate")  # settings that another part of the same run may change


def changed(before: dict[str, Any], run: dict[str, Any], free: tuple[str, ...] = FREE) -> list[str]:
    """What of `run` and its "settings" is other than it was, but for the settings in `free`."""
    known = json.loads(json.dumps(run))  # as it was stored
    old, new = ({k: v for k, v in {**r, **r["settings"]}.items() if k != "settings"} for r in (before, known))
    return sorted(k for k in new if k not in free and new[k] != old.get(k))


def checkpoint_of(out: Path, run: dict[str, Any], resume: bool, free: tuple[str, ...] = FREE) -> str | None:
    """The checkpoint in `out`/checkpoints to go on from, if any; notes what is being run beside it.

    run: what must be the same for a run to go on, and its "settings", of which those in `free` may change. Every
    process calls this. Raises InputError for checkpoints of another run, or of one that `resume` does not ask for.
    """
    directory = out / "checkpoints"
    whole_ones = []
    for file in directory.glob("checkpoint-*/trainer_state.json"):  # Trainer writes it last
        try:
            step = json.loads(file.read_bytes())["global_step"]
            _check_files(file.parent)
        except (OSError, ValueError, KeyError, SafetensorError, BadZipFile) as error:
            log.warning("%s is damaged (%s): taking an earlier checkpoint", file.parent, first_line(error))
        else:
            whole_ones.append((step, str(file.parent)))
    if whole_ones and not resume:
        raise InputError(f"{directory} holds checkpoints of an earlier run: resume it, or remove them")
    if resume and not whole_ones:
        log.warning("no checkpoint in %s: starting from the first step", directory)
    if whole_ones:
        try:
            others = changed(json.loads((directory / "run.json").read_bytes()), run, free)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{directory / 'run.json'} is missing or damaged: it tells of which run these checkpoints are; remove "
                "them"
            ) from error
        if others:
            raise InputError(f"{directory} is of a run with another {' and '.join(others)}; it cannot be resumed")
    PartialState().wait_for_everyone()  # all have looked before one writes
    if PartialState().is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    return max(whole_ones)[1] if whole_ones else None


def _check_files(directory: Path) -> None:
    """Raise where a file of weights or of an optimizer's state is cut short or holds other bytes than were written.

    Nothing is unpickled: torch's files are zip archives with a checksum for each part.
    """
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            tensors.keys()
    for file in directory.glob("*.pt"):
        with ZipFile(file) as archive:
            part = archive.testzip()
        if part is not None:
            raise ValueError(f"{file.name}: {part}")
