"""Work on the rows of a JSONL file that any process which sees the files can take a shard of: `worked`.

The file is read as a stream, twice: to look at all of it before any of it is worked on, and shard by shard as it is.
`pyengine.integrations.ray` does the same on many machines.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from pyengine.errors import InputError, first_line
from pyengine.jsonl import SHOWN, raise_all
from pyengine.training.shards import Job, begun, digest_of, held, lines, merged, missing, refuse

SHARDS = 10_000  # at most, so that neither the manifest nor the directory grows with the input


class Shard(NamedTuple):
    """Rows first .. first + rows - 1: `size` bytes of the file from `offset`, which is where line `line` begins."""

    first: int
    rows: int
    offset: int
    size: int
    line: int
    digest: str


class Worker(Protocol):
    """What commits a shard and gives its rows, also of one that is committed already; it travels to other machines.

    device: where it computes, as torch calls it. Raises InputError for what must end the whole run.
    """

    source: Path
    device: str

    def __call__(self, shard: Shard) -> int: ...


class Account(Protocol):
    """What a report says of the rows of an output, of which it sees each, in order."""

    def add(self, record: dict[str, Any]) -> None: ...
    def report(self) -> dict[str, Any]: ...


Scan = Callable[[Path], tuple[str, list[Shard], int]]  # as `scan` gives it
Through = Callable[[Any, Sequence[Shard]], Iterable[int]]  # a Worker's shards to the rows of each, in whatever order


def worked(
    source: str | Path | Iterable[Mapping[str, Any]],
    out: str | Path,
    scan: Scan,
    pins: Callable[[], dict[str, Any]],
    worker: Callable[[Path, Job], Worker],
    account: Account,
    *,
    resume: bool,
    progress: bool | None,
    through: Through,
) -> dict[str, Any]:
    """Write what a worker makes of the rows of `source` to `out`, and a report to OUT.report.json, which is returned.

    source: a JSONL file, or rows. scan: checks the file, cuts it into shards and counts the rows of which a key will be
    replaced. pins: what beside the input fixes every row of the output. worker: made of the file and the job. resume,
    progress, through: as `pyengine.training.labelling.label` has them. The report: rows, replaced, what the account
    says, and seconds of this run. Memory does not grow with the rows, whose results lie in OUT.shards until all are
    there. Raises InputError for files that cannot be read or written, and for an output that is there already, or is
    part of other work.
    """
    out, start = Path(out).absolute(), time.perf_counter()
    if isinstance(source, (str, Path)):
        source = Path(source).absolute()
        if source.exists() and not source.is_file():
            raise InputError(f"{source} is no regular file; rows are read more than once: write them to a file first")
    with held(out, resume) as directory:
        path = source if isinstance(source, Path) else _file_of(source, directory)
        digest, shards, replaced = scan(path)
        job = Job(out, {"input": digest, **pins()})
        report = begun(job, resume)
        if report is not None:
            return report
        rows = sum(shard.rows for shard in shards)
        report = {"rows": rows, "replaced": replaced}
        todo = missing(job, shards)
        hide = None if progress is None else not progress
        done = rows - sum(shard.rows for shard in todo)
        with tqdm(total=rows, initial=done, unit="row", delay=2, disable=hide, leave=False) as bar:
            for count in through(worker(path, job), todo) if todo else ():
                bar.update(count)
        with merged(job, report) as file:
            for line, record in lines(job, shards):
                file.write(line)
                account.add(record)
            report |= account.report() | {"seconds": round(time.perf_counter() - start, 2)}
    return {"of": job.pins, **report}


def scan(
    path: Path,
    check: Callable[[bytes, str], bool],
    full: Callable[[int, int, int], bool],
    what: str,
) -> tuple[str, list[Shard], int]:
    """(digest of the file, its shards, rows of which `check` is true); one InputError for all lines that it refuses.

    check: of a line and its file:line. full: whether a shard of so many rows and bytes, of a file of so many bytes,
    is one. what: a line as the error for a file without rows shows it.
    """
    whole, faults, shards = hashlib.blake2b(digest_size=16), list[str](), list[Shard]()
    first = rows = offset = marked = 0
    line, part = 1, list[bytes]()

    def cut() -> None:
        nonlocal first, rows, offset, line
        data = b"".join(part)
        if rows:
            shards.append(Shard(first, rows, offset, len(data), line, digest_of(data)))
        whole.update(data)
        first, rows, offset, line = first + rows, 0, offset + len(data), line + len(part)
        part.clear()

    try:
        total, size = path.stat().st_size, 0
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                part.append(text)
                size += len(text)
                if text.strip():
                    rows += 1
                    try:
                        marked += check(text, f"{path}:{number}")
                    except InputError as error:
                        faults.append(str(error) if len(faults) < SHOWN else "")  # no more are shown
                if full(rows, size, total):
                    cut()
                    size = 0
        cut()
    except OSError as error:
        refuse(path, error)
    raise_all(faults, first, "lines")
    if not first:
        raise InputError(f"{path}: no rows; it needs lines {what}")
    return whole.hexdigest(), shards, marked


def lines_in(source: Path, shard: Shard) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of each row of the shard; InputError if the file is not what it was."""
    try:
        with source.open("rb") as file:
            file.seek(shard.offset)
            data = file.read(shard.size)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; every worker must see it") from error
    if digest_of(data) != shard.digest:
        raise InputError(f"{source} has changed since this run read it; begin anew, with another output")
    for number, line in enumerate(data.split(b"\n"), shard.line):
        if line.strip():
            yield number, line


def check_writable(record: Mapping[str, Any], where: str) -> None:
    """InputError, naming `where`, for an object that cannot be written again as it was read."""
    try:
        json.dumps(record, allow_nan=False)
    except (ValueError, RecursionError) as error:  # Python reads NaN and 1e999, which no JSON can say again
        raise InputError(f"{where}: cannot be written again: {first_line(error)}") from error


def _file_of(rows: Iterable[Mapping[str, Any]], directory: Path) -> Path:
    """Rows as a file among the shards, to go with them; InputError names one that JSON cannot hold."""
    path = directory / "rows.partial"
    try:
        with path.open("w") as file:
            for number, row in enumerate(rows, 1):
                if not isinstance(row, Mapping):
                    raise InputError(f"row {number} must be a mapping, got {row!r:.40}")
                try:
                    file.write(json.dumps(dict(row), allow_nan=False) + "\n")
                except (TypeError, ValueError, RecursionError) as error:
                    raise InputError(f"row {number} cannot be written as JSON: {first_line(error)}") from error
    except OSError as error:
        refuse(path, error)
    return path
