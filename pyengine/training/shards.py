"""Work on many rows that survives a kill: it is cut into shards, and each is committed whole.

While OUT is made, the directory OUT.shards holds a manifest, which says what the work is on, and one file for each
shard that is done, named by its rows. A file comes under its name complete and at once: whoever makes a shard a second
time changes nothing, and who is killed leaves nothing of the shard in hand. When all are there they become OUT, beside
OUT.report.json, and the directory goes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO
from uuid import uuid4

from pyengine.errors import InputError


class Rows(Protocol):
    """A shard: the rows first .. first + rows - 1 of the work."""

    @property
    def first(self) -> int: ...
    @property
    def rows(self) -> int: ...


@dataclass(frozen=True)
class Job:
    """One output and what it is made of; it travels to workers, who must see the same files.

    pins: what fixes every row of the output, as JSON; a run that was cut short is taken up again only with equal ones.
    """

    out: Path
    pins: dict[str, Any]

    @property
    def directory(self) -> Path:
        return self.out.with_name(self.out.name + ".shards")

    @property
    def report(self) -> Path:
        return self.out.with_name(self.out.name + ".report.json")

    def file(self, shard: Rows) -> Path:
        return self.directory / f"{shard.first:012}-{shard.first + shard.rows:012}.jsonl"


@contextmanager
def written(path: Path, scratch: Path | None = None) -> Iterator[TextIO]:
    """A text file that appears under its name when the block ends well, and not at all otherwise.

    scratch: a directory on the same file system for it until then; its own by default.
    """
    partial = (scratch or path.parent) / f"{path.name}.{uuid4().hex}.partial"
    try:
        with partial.open("w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave an empty file under the final name
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def finished(job: Job, resume: bool) -> dict[str, Any] | None:
    """The report of a run that has made this output already; None if it has to be made.

    Raises InputError where something else lies there, or where it does and nobody wants to resume.
    """
    if not job.out.exists():
        return None
    if not resume:
        raise InputError(f"{job.out} exists already; choose another output, or resume the run that made it")
    report = _json(job.report)
    _same(job, report.get("of"), f"{job.out} exists already, and")
    shutil.rmtree(job.directory, ignore_errors=True)  # the run was killed between its last two steps
    return report


@contextmanager
def held(job: Job, resume: bool) -> Iterator[None]:
    """The output's directory of shards, for this process alone; the lock goes with the process, however it ends.

    Raises InputError if another run holds it, or if shards of other work, or of any that is not to be resumed, lie
    there.
    """
    directory, manifest = job.directory, job.directory / "manifest.json"
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{job.out}: another run is making it; wait for that, or choose another output") from None
        try:
            if any(directory.glob("*.jsonl")):
                if not resume:
                    raise InputError(f"{directory} holds part of a run that was cut short: resume it, or delete it")
                _same(job, _json(manifest), f"{directory}")
            else:
                with written(manifest) as file:
                    file.write(json.dumps(job.pins, indent=1) + "\n")
            yield
        finally:
            if not any(directory.glob("*.jsonl")):  # nothing to resume
                shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(handle)


def missing(job: Job, shards: Iterable[Any]) -> list[Any]:
    """The shards that are not done yet."""
    return [shard for shard in shards if not job.file(shard).is_file()]


def lines(job: Job, shards: Iterable[Rows]) -> Iterator[str]:
    """All lines of all shards, in order; InputError for a shard that has not one for each of its rows."""
    for shard in shards:
        path, count = job.file(shard), 0
        with path.open() as file:
            for count, line in enumerate(file, 1):  # noqa: B007
                yield line
        if count != shard.rows:
            raise InputError(f"{path} has {count} lines for {shard.rows} rows; delete it and resume")


@contextmanager
def merged(job: Job, report: dict[str, Any]) -> Iterator[TextIO]:
    """The output, to be written in the block, and with it `report`, which the block may still fill."""
    with written(job.out, job.directory) as file:
        yield file
        with written(job.report, job.directory) as beside:  # before the output: what lies there is always accounted for
            beside.write(json.dumps({"of": job.pins, **report}, indent=1) + "\n")
    shutil.rmtree(job.directory, ignore_errors=True)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(job: Job, known: Any, what: str) -> None:
    """InputError unless the work that is there is this job's."""
    known = known if isinstance(known, dict) else {}
    differ = [key for key, value in job.pins.items() if known.get(key) != value]
    if not known:
        raise InputError(f"{what} does not say what it was made of; choose another output")
    if differ:
        raise InputError(
            f"{what} was made with another {' and '.join(differ)}; give the same, or choose another output"
        )
