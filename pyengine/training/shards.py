"""Work on many rows that survives a kill: it is cut into shards, and each is committed whole.

While OUT is made, the directory OUT.shards holds a manifest, which says what the work is on, and one file for each
shard that is done, named by its rows. A file comes under its name complete and at once: making a shard a second time
changes nothing, and a process that is killed leaves nothing of the shard in hand. When all are there they become OUT,
beside OUT.report.json, and the directory goes. Of what lies in it only these files are ever removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn, Protocol, TextIO
from uuid import uuid4

from pyengine.errors import InputError

log = logging.getLogger("pyengine")
SHARD, SCRATCH, MANIFEST = "[0-9]*-[0-9]*.jsonl", "*.partial", "manifest.json"  # all that OUT.shards is to hold


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "pins", json.loads(json.dumps(self.pins)))  # as it will be read: without tuples

    @property
    def directory(self) -> Path:
        return directory_of(self.out)

    @property
    def report(self) -> Path:
        return self.out.with_name(self.out.name + ".report.json")

    def file(self, shard: Rows) -> Path:
        return self.directory / f"{shard.first:012}-{shard.first + shard.rows:012}.jsonl"


def directory_of(out: Path) -> Path:
    return out.with_name(out.name + ".shards")


def digest_of(data: bytes) -> str:
    """What stands for bytes where a run states what it is made of, as in `Job.pins`."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def written(path: Path, scratch: Path | None = None) -> Iterator[TextIO]:
    """A text file that appears under its name when the block ends well, and not at all otherwise.

    scratch: a directory on the same file system for it until then; its own by default. An OSError, in the block too, is
    an InputError that names the file.
    """
    partial = (scratch or path.parent) / f"{path.name}.{uuid4().hex}.partial"
    try:
        with partial.open("w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave an empty file under the final name
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            refuse(path, error)
        raise


def refuse(path: Path, error: OSError) -> NoReturn:
    """The InputError for what the system will not do with a file."""
    raise InputError(f"{path}: {error.strerror or error}") from error


def room_in(directory: Path, out: Path) -> None:
    """InputError, naming `out`, unless files can be written in `directory`, or where it would be made.

    Nothing is left of the try.
    """
    there = next(p for p in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(p))
    try:
        with TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{out}: nothing can be written there ({reason}); give another output") from error


def unused(out: Path) -> None:
    """InputError where a model or the report of an earlier run lies in `out`, or nothing can be written."""
    left = sorted(file.name for pattern in ("report.json", "*.safetensors") for file in out.glob(pattern))
    if left:
        raise InputError(f"{out} holds {left[0]} of an earlier run: give another directory, or empty it")
    room_in(out, out)


def vacant(out: Path, resume: bool) -> None:
    """InputError where something lies at `out` and nobody wants to resume."""
    if not resume and os.path.lexists(out):
        raise InputError(f"{out} exists already; choose another output, or resume the run that made it")
    room_in(out.parent, out)


@contextmanager
def held(out: Path, resume: bool) -> Iterator[Path]:
    """The output's directory of shards, for this process alone; the lock goes with the process, however it ends, and
    whoever interrupts the block is told what is kept.

    Raises InputError if another run holds it, or if shards that are not to be resumed or files of others lie there, or
    if there is an output that is not to be resumed.
    """
    vacant(out, resume)
    directory = directory_of(out)
    handle = _locked(out, directory)
    try:
        _check_ours(directory)
        try:
            vacant(out, resume)  # another run may have made it before the lock was ours
            if any(directory.glob(SHARD)) and not resume:
                raise InputError(f"{directory} holds part of a run that was cut short: resume it, or delete it")
            yield directory
        except KeyboardInterrupt:
            kept = len(list(directory.glob(SHARD)))
            where = f"{directory} keeps {kept} parts, from which the same run goes on with resume"
            log.warning("interrupted: %s", where if kept else "nothing is kept")
            raise
        finally:
            if not any(directory.glob(SHARD)):  # nothing to resume
                _clear(directory)
    finally:
        os.close(handle)


def begun(job: Job, resume: bool) -> dict[str, Any] | None:
    """Take up the job in the directory that is held, or begin it there; its report if its output is made already.

    Raises InputError where the output or the shards that lie there are of other work.
    """
    if os.path.lexists(job.out):
        vacant(job.out, resume)
        report = _json(job.report)
        _same(job, report.get("of"), f"{job.out} exists already, and")
        _clear(job.directory)  # the run was killed between its last two steps
        return report
    manifest = job.directory / MANIFEST
    if any(job.directory.glob(SHARD)):
        _same(job, _json(manifest).get("of"), f"{job.directory}")
    else:
        with written(manifest) as file:
            file.write(json.dumps({"of": job.pins}, indent=1) + "\n")
    return None


def _locked(out: Path, directory: Path) -> int:
    """A handle of the directory, which is made if it is not there, with the lock on it."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(directory, os.O_RDONLY)
            except FileNotFoundError:
                continue  # the run that had it ended meanwhile
        except OSError as error:
            refuse(directory, error)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                # The run that had it may have removed it after it was opened here: that lock keeps nobody out.
                if os.path.samestat(os.fstat(handle), os.stat(directory)):
                    return handle
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"{out}: another run is making it; wait for that, or choose another output") from None
        except OSError as error:
            os.close(handle)
            refuse(directory, error)
        os.close(handle)


def _check_ours(directory: Path) -> None:
    """InputError for a directory that no run made. What a run leaves before its manifest is scratch only."""
    others = [path for path in directory.iterdir() if not path.match(SCRATCH)]
    if others and not isinstance(_json(directory / MANIFEST).get("of"), dict):
        raise InputError(f"{directory} is of no run that was cut short: it holds {others[0].name}; move it away")


def _clear(directory: Path) -> None:
    """Remove what runs put into the directory, and it too if it held nothing else."""
    with suppress(OSError):  # what stays is in nobody's way
        for pattern in (SHARD, SCRATCH, MANIFEST):  # the manifest last: it says whose the others are
            for path in directory.glob(pattern):
                path.unlink(missing_ok=True)
        directory.rmdir()


def missing(job: Job, shards: Iterable[Any]) -> list[Any]:
    """The shards that are not done yet."""
    return [shard for shard in shards if not job.file(shard).is_file()]


def lines(job: Job, shards: Iterable[Rows]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its object) of all shards, in order.

    Raises InputError for a shard that has not one for each of its rows; it is removed, so that a run which is resumed
    makes it again.
    """
    for shard in shards:
        path, count = job.file(shard), 0
        try:
            with path.open() as file:
                for count, line in enumerate(file, 1):  # noqa: B007
                    record = json.loads(line)
                    if not isinstance(record, dict) or not line.endswith("\n"):
                        raise ValueError("no object")
                    yield line, record
        except FileNotFoundError:
            raise InputError(f"{path} is gone; run it again with --resume (resume=True) to make it anew") from None
        except OSError as error:
            refuse(path, error)
        except ValueError:
            count = -1
        if count != shard.rows:
            path.unlink(missing_ok=True)
            what = "is damaged" if count < 0 else f"has {count} lines for {shard.rows} rows"
            raise InputError(f"{path} {what} and was removed; run it again with --resume (resume=True) to make it anew")


@contextmanager
def merged(job: Job, report: dict[str, Any]) -> Iterator[TextIO]:
    """The output, to be written in the block, and with it `report`, which the block may still fill."""
    with written(job.out, job.directory) as file:
        yield file
        with written(job.report, job.directory) as beside:  # before the output: what lies there is always accounted for
            beside.write(json.dumps({"of": job.pins, **report}, indent=1) + "\n")
    handle = os.open(job.out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # both names are on the disk before the shards go
    finally:
        os.close(handle)
    _clear(job.directory)


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
