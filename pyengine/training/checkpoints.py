"""A run's directory: that it is free, which checkpoint the run goes on from, and that it is the same run."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from pyengine.errors import InputError
from pyengine.training.shards import room_in, unused

log = logging.getLogger("pyengine")


FREE = ("checkpoint_every", "accumulate")  # settings that another part of the same run may change


def changed(before: dict[str, Any], run: dict[str, Any], free: tuple[str, ...] = FREE) -> list[str]:
    """What of `run` and its "settings" is other than it was, but for the settings in `free`."""
    known = json.loads(json.dumps(run))  # as it was stored
    old, new = ({k: v for k, v in {**r, **r["settings"]}.items() if k != "settings"} for r in (before, known))
    return sorted(k for k in new if k not in free and new[k] != old.get(k))


def whole_checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the checkpoints in `out` that a run can go on from; a warning names those that are damaged.

    Trainer writes trainer_state.json last: a directory without it is of a run that was killed there, and is passed over
    without a word.
    """
    found = []
    for file in (out / "checkpoints").glob("checkpoint-*/trainer_state.json"):
        try:
            step = int(json.loads(file.read_bytes())["global_step"])
            _read_through(file.parent)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, zipfile.BadZipFile):
            log.warning("%s is damaged: taking an earlier checkpoint", file.parent)
        else:
            found.append((step, file.parent))
    return sorted(found)


def _read_through(checkpoint: Path) -> None:
    """Any of the errors of reading, if a file of weights or of the optimizer is missing, cut short or altered."""
    for kind in ("*model*", "optimizer*"):
        if not any(checkpoint.glob(kind)):
            raise FileNotFoundError(kind)  # Trainer would start it anew without a word
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # its header states the size of the file
                pass
        elif file.suffix in (".pt", ".pth"):  # torch writes zip files, with check sums
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile(file)


def fresh(out: Path, resume: bool) -> bool:
    """Whether no run has ended in `out` yet. Called before anything is loaded, drawn or trained.

    Raises InputError where nothing can be written, for checkpoints that `resume` does not ask for, and for what an
    earlier run has left: with `resume`, only its report tells whether that was this run.
    """
    if any(out.glob("checkpoints/checkpoint-*/trainer_state.json")):
        if not resume:
            raise InputError(f"{out / 'checkpoints'} holds checkpoints of an earlier run: resume it, or remove them")
        room_in(out, out)
        return True
    if resume and (out / "report.json").is_file():
        return False
    unused(out)
    return True


def finished(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The report of this very run, which has ended in `out`; InputError if that was another."""
    try:
        report: dict[str, Any] = json.loads((out / "report.json").read_bytes())
        others = changed(report, run)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out / 'report.json'} is no report of such a run") from error
    if others:
        raise InputError(f"{out} holds a finished run with another {' and '.join(others)}")
    log.warning("%s: this run is finished", out)
    return report


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """An interrupt of the training inside says what is kept of it."""
    try:
        yield
    except KeyboardInterrupt:
        kept = whole_checkpoints(out)
        if kept:
            log.warning("interrupted: %s holds step %d, from which the same run goes on with resume", *kept[-1][::-1])
        else:
            log.warning("interrupted before the first checkpoint in %s: nothing is kept", out / "checkpoints")
        raise


def checkpoint_of(out: Path, run: dict[str, Any], resume: bool, free: tuple[str, ...] = FREE) -> str | None:
    """The checkpoint in `out`/checkpoints to go on from, if any; notes what is being run beside it.

    run: what must be the same for a run to go on, and its "settings", of which those in `free` may change. Every
    process calls this. Raises InputError for checkpoints of another run, or of one that `resume` does not ask for.
    """
    directory = out / "checkpoints"
    fresh(out, resume)
    whole_ones = whole_checkpoints(out)
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
    return str(whole_ones[-1][1]) if whole_ones else None
