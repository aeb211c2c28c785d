"""Rewards for the rows of a JSONL file: each row once and in order, even if a process is killed.

The file is read as a stream, twice: to check all of it before any of it is scored, and shard by shard as it is.
`pyengine.integrations.ray` runs the same on many machines.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pyengine.checkpoint import device_of
from pyengine.errors import InputError, first_line
from pyengine.jsonl import SHOWN, json_object, raise_all
from pyengine.rewards.references import Statistics
from pyengine.scorers import Candidates, Part, ScorerLike, parts_of, score_texts
from pyengine.scorers.base import as_given
from pyengine.training.data import example_of
from pyengine.training.identity import identity
from pyengine.training.shards import Job, begun, digest_of, held, lines, merged, missing, refuse, written

SHARD_BYTES = 1 << 18  # of input in a shard at least: what a kill loses of one worker's time
SHARDS = 10_000  # at most, so that neither the manifest nor the directory grows with the input


class Shard(NamedTuple):
    """Rows first .. first + rows - 1: `size` bytes of the file from `offset`, which is where line `line` begins."""

    first: int
    rows: int
    offset: int
    size: int
    line: int
    digest: str


@dataclass
class Labeller:
    """Scores shards and commits them; the scorer is loaded with the first. Any process that sees the files can do it.

    device: where the scorer runs, as torch calls it.
    """

    source: Path
    job: Job
    scorer: ScorerLike
    device: str = "cpu"
    _parts: list[Part] = field(default_factory=list, init=False, repr=False)

    def __call__(self, shard: Shard) -> int:
        """The rows of the shard, which is committed when this returns; one that already was is left as it is.

        Raises InputError, with file:line, for scores that are not finite, and if the file is not what it was.
        """
        path = self.job.file(shard)
        if path.is_file():
            return shard.rows
        found = self._rows(shard)
        rewards = self._rewards([record for _, record in found], shard)
        faults = [
            f"{self.source}:{line}: its score is {reward}; a reward must be finite"
            for (line, _), reward in zip(found, rewards, strict=True)
            if not math.isfinite(reward)
        ]
        raise_all(faults, shard.rows, f"rows from {self.source}:{shard.line}")
        with written(path) as file:
            for (_, record), reward in zip(found, rewards, strict=True):
                file.write(json.dumps(record | {"reward": reward}) + "\n")
        return shard.rows

    def _rows(self, shard: Shard) -> list[tuple[int, dict[str, Any]]]:
        """(line, record) of each row."""
        try:
            with self.source.open("rb") as file:
                file.seek(shard.offset)
                data = file.read(shard.size)
        except OSError as error:
            raise InputError(f"{self.source}: {error.strerror}; every worker must see it") from error
        if digest_of(data) != shard.digest:
            raise InputError(f"{self.source} has changed since this run read it; label it anew, into another output")
        numbered = enumerate(data.split(b"\n"), shard.line)
        return [(i, json_object(line, f"{self.source}:{i}")) for i, line in numbered if line.strip()]

    def _rewards(self, records: Sequence[Mapping[str, Any]], shard: Shard) -> list[float]:
        if not self._parts:
            self._parts = ready(self.scorer, self.device)
        examples = [example_of({**record, "reward": 0.0}, "") for record in records]
        prompts, responses = [e.prompt for e in examples], [e.response for e in examples]
        candidates = Candidates(prompts, [()] * len(records), {}, {}, as_given(responses))
        try:
            return score_texts(self._parts, candidates).tolist()
        except InputError as error:
            raise InputError(f"rows from {self.source}:{shard.line}: {error}") from error


Through = Callable[[Labeller, Sequence[Shard]], Iterable[int]]


def label(
    source: str | Path | Iterable[Mapping[str, Any]],
    scorer: ScorerLike,
    out: str | Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: bool | None = None,
    through: Through = map,
) -> dict[str, Any]:
    """Write the rows of `source` to `out` with their rewards, and a report to OUT.report.json, which is returned too.

    source: a JSONL file of {"prompt", "response"} lines, or such rows. A row keeps its place and whatever else it has;
    a "reward" that it had is replaced, and the report counts those. scorer: anything that reads text. device: where it
    runs. resume: take up a run that was cut short, of the same rows with the same scorer (see `identity`); one that was
    not begun starts, and one that is done is only reported. progress: a bar on stderr after two seconds; None shows it
    on a terminal only. through: who labels the shards; by default this process, one after the other.

    The report: rows, replaced, cut_off (rows whose finish_reason is "length"), seconds of this run, and of the rewards
    the least, the greatest and `statistics`, which are what `pyengine.Statistics` is made of (ddof 0). Those leave out
    what was cut off, whose reward is that of a prefix: it is kept in the output, where trainers bootstrap at the cut
    instead. Where every row was cut off they are null.
    Memory does not grow with the rows, whose results lie in OUT.shards until all are there. Raises one InputError
    with file:line for lines that cannot be used, before any is scored; for a score that is not finite; for files that
    cannot be read or written; and for an output that is there already, or is part of other work.
    """
    out, start = Path(out).absolute(), time.perf_counter()
    if isinstance(source, (str, Path)):
        source = Path(source).absolute()
        if source.exists() and not source.is_file():
            raise InputError(f"{source} is no regular file; rows are read more than once: write them to a file first")
    with held(out, resume) as directory:
        path = source if isinstance(source, Path) else _file_of(source, directory)
        digest, shards, replaced = _scan(path)
        job = Job(out, {"input": digest, "scorer": identity(scorer)})
        report = begun(job, resume)
        if report is not None:
            return report
        rows = sum(shard.rows for shard in shards)
        report = {"rows": rows, "replaced": replaced, "cut_off": 0}
        todo = missing(job, shards)
        hide = None if progress is None else not progress
        done = rows - sum(shard.rows for shard in todo)
        with tqdm(total=rows, initial=done, unit="row", delay=2, disable=hide, leave=False) as bar:
            for labelled in through(Labeller(path, job, scorer, device), todo) if todo else ():
                bar.update(labelled)
        with merged(job, report) as file:
            rewards = _Moments()
            for line, record in lines(job, shards):
                file.write(line)
                if record.get("finish_reason") == "length":
                    report["cut_off"] += 1
                else:
                    rewards.add(record["reward"])
            report |= rewards.report() | {"seconds": round(time.perf_counter() - start, 2)}
    return {"of": job.pins, **report}


def ready(scorer: ScorerLike, device: str) -> list[Part]:
    """The parts of a scorer of text, on their device; InputError for one that cannot be there."""
    parts = parts_of(scorer)
    if not parts:
        raise InputError("labelling needs a scorer")
    place = device_of(device)
    try:
        for part in parts:
            part.scorer.move(place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: {first_line(error)}") from error
    return parts


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


def _scan(path: Path) -> tuple[str, list[Shard], int]:
    """(digest of the file, its shards, how many rows have a reward); one InputError for all bad lines."""
    whole, faults, shards = hashlib.blake2b(digest_size=16), list[str](), list[Shard]()
    rows = replaced = offset = 0
    line = 1
    try:
        least = max(SHARD_BYTES, path.stat().st_size // SHARDS)
        with path.open("rb") as file:
            while part := file.readlines(least):
                first, data = rows + len(faults), b"".join(part)
                for number, text in enumerate(part, line):
                    if not text.strip():
                        continue
                    try:
                        replaced += _check(text, f"{path}:{number}")
                        rows += 1
                    except InputError as error:
                        faults.append(str(error) if len(faults) < SHOWN else "")  # no more are shown
                count = rows + len(faults) - first
                if count:
                    shards.append(Shard(first, count, offset, len(data), line, digest_of(data)))
                whole.update(data)
                offset += len(data)
                line += len(part)
    except OSError as error:
        refuse(path, error)
    raise_all(faults, rows + len(faults), "lines")
    if not rows:
        raise InputError(f'{path}: no rows; it needs lines {{"prompt", "response"}}')
    return whole.hexdigest(), shards, replaced


def _check(line: bytes, where: str) -> bool:
    """Whether a row has a reward; InputError, naming `where`, if it is none that can be scored."""
    record = json_object(line, where)
    example = example_of({**record, "reward": 0.0}, where)
    try:
        json.dumps({**record, "reward": 0.0}, allow_nan=False)
    except (ValueError, RecursionError) as error:  # Python reads NaN and 1e999, which no JSON can say again
        raise InputError(f"{where}: cannot be written again: {first_line(error)}") from error
    for key, text in (("prompt", example.prompt), ("response", example.response)):
        if not (text if key == "prompt" else text.strip()):
            raise InputError(f"{where}: the {key} is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: the {key} is not valid Unicode: {error.reason} at character {error.start}"
            ) from error
    return "reward" in record


@dataclass
class _Moments:
    """Mean and standard deviation of a stream (Welford 1962), with its ends."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        gap = value - self.mean
        self.mean += gap / self.count
        self.squares += gap * (value - self.mean)
        self.least, self.greatest = min(self.least, value), max(self.greatest, value)

    def report(self) -> dict[str, Any]:
        if not self.count:
            return {"least": None, "greatest": None, "statistics": None}
        # Equal values have a std of exactly 0, which rounding of the mean would spoil.
        std = 0.0 if self.least == self.greatest else math.sqrt(self.squares / self.count)
        statistics = Statistics(self.mean, std, 0, self.count)
        return {"least": self.least, "greatest": self.greatest, "statistics": asdict(statistics)}
