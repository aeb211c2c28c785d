"""Rewards for the rows of a JSONL file: each row once and in order, even if a process is killed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyengine.checkpoint import device_of
from pyengine.engine import Engine
from pyengine.errors import InputError, first_line
from pyengine.jsonl import json_object, raise_all
from pyengine.rewards.references import Statistics
from pyengine.scorers import Part, ScorerLike, parts_of
from pyengine.training.data import Example, example_of
from pyengine.training.identity import identity
from pyengine.training.rows import SHARDS, Shard, Through, check_writable, lines_in, scan, worked
from pyengine.training.scoring import Scored, check_text, reads_text, score_examples
from pyengine.training.shards import Job, written

log = logging.getLogger("pyengine")
SHARD_BYTES = 1 << 18  # of input in a shard at least: what a kill loses of one worker's time


@dataclass
class Labeller:
    """Scores shards and commits them; the scorer is loaded with the first. Any process that sees the files can do it.

    device: where the scorer runs, as torch calls it. model: of `label`; it is loaded with the scorer.
    """

    source: Path
    job: Job
    scorer: ScorerLike
    device: str = "cpu"
    model: str | Path | None = None
    _parts: list[Part] = field(default_factory=list, init=False, repr=False)
    _engine: Engine | None = field(default=None, init=False, repr=False)

    def __call__(self, shard: Shard) -> int:
        """The rows of the shard, which is committed when this returns; one that already was is left as it is.

        Raises InputError, with file:line, for scores that are not finite, and if the file is not what it was.
        """
        path = self.job.file(shard)
        if path.is_file():
            return shard.rows
        found = [(i, json_object(line, f"{self.source}:{i}")) for i, line in lines_in(self.source, shard)]
        scores = self._scores(
            [example_of({**record, "reward": 0.0}, f"{self.source}:{i}") for i, record in found], shard
        )
        faults = [
            f"{self.source}:{line}: its score is {score.reward}; a reward must be finite"
            for (line, _), score in zip(found, scores, strict=True)
            if not all(map(math.isfinite, (score.reward, *(score.values or ()))))
        ]
        raise_all(faults, shard.rows, f"rows from {self.source}:{shard.line}")
        with written(path) as file:
            for (_, record), score in zip(found, scores, strict=True):
                along = {} if score.values is None else {"values": score.values}
                file.write(json.dumps(record | {"reward": score.reward} | along) + "\n")
        return shard.rows

    def _scores(self, examples: Sequence[Example], shard: Shard) -> list[Scored]:
        if not self._parts:
            self._parts = ready(self.scorer, self.device, self.model)
            if self.model is not None and not all(map(reads_text, self._parts)):
                self._engine = Engine.from_pretrained(self.model, device=self.device)
        try:
            return score_examples(self._engine, self._parts, examples)
        except InputError as error:
            raise InputError(f"rows from {self.source}:{shard.line}: {error}") from error


def label(
    source: str | Path | Iterable[Mapping[str, Any]],
    scorer: ScorerLike,
    out: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool | None = None,
    through: Through = map,
) -> dict[str, Any]:
    """Write the rows of `source` to `out` with their rewards, and a report to OUT.report.json, which is returned too.

    source: a JSONL file of {"prompt", "response"} lines, or such rows. A row keeps its place and whatever else it has;
    a "reward" that it had is replaced, and the report counts those. scorer: any; one that reads the hidden states or
    tokens of a language model needs that `model`, a directory or hub id. Where every part of it scores prefixes (prefix
    scorers, prefix models, probes), a row also gets "values", the score at each token of its response, of which the
    last is its reward. device: where both run. resume: take up a run that was cut short, of the same rows with the same
    scorer (see `identity`); one that was not begun starts, and one that is done is only reported. progress: a bar on
    stderr after two seconds; None shows it on a terminal only. through: who labels the shards; by default this process,
    one after the other.

    The report: rows, replaced, cut_off (rows whose finish_reason is "length"), seconds of this run, and of the rewards
    the least, the greatest and `statistics`, which are what `pyengine.Statistics` is made of (ddof 0). Those leave out
    what was cut off, whose reward is that of a prefix: it is kept in the output, where trainers bootstrap at the cut
    instead. Where every row was cut off they are null, and a warning is logged.
    Memory does not grow with the rows, whose results lie in OUT.shards until all are there. Raises one InputError
    with file:line for lines that cannot be used, before any is scored; for a score that is not finite; for files that
    cannot be read or written; and for an output that is there already, or is part of other work.
    """
    return worked(
        source,
        out,
        _scan,
        lambda: {"scorer": identity(scorer)} | ({} if model is None else {"model": identity(model, "model")}),
        lambda path, job: Labeller(path, job, scorer, device, model),
        _Rewards(),
        resume=resume,
        progress=progress,
        through=through,
    )


def ready(scorer: ScorerLike, device: str, model: str | Path | None) -> list[Part]:
    """The parts of a scorer, on their device; InputError for one that cannot be there, or needs a model."""
    parts = parts_of(scorer)
    if not parts:
        raise InputError("labelling needs a scorer")
    if model is None:
        check_text(parts)
    place = device_of(device)
    try:
        for part in parts:
            part.scorer.move(place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r}: {first_line(error)}") from error
    return parts


def _scan(path: Path) -> tuple[str, list[Shard], int]:
    """As `scan` has it: the rows that have a reward are counted."""
    return scan(path, _check, _full, '{"prompt", "response"}')


def _full(rows: int, size: int, total: int) -> bool:
    return size >= max(SHARD_BYTES, total // SHARDS)


def _check(line: bytes, where: str) -> bool:
    """Whether a row has a reward; InputError, naming `where`, if it is none that can be scored."""
    record = json_object(line, where)
    example = example_of({**record, "reward": 0.0}, where)
    check_writable({**record, "reward": 0.0}, where)
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
class _Rewards:
    """What the report says of the rewards. Those of what was cut off are of a prefix, and counted only."""

    cut_off: int = 0
    moments: _Moments = field(default_factory=lambda: _Moments())

    def add(self, record: dict[str, Any]) -> None:
        if record.get("finish_reason") == "length":
            self.cut_off += 1
        else:
            self.moments.add(record["reward"])

    def report(self) -> dict[str, Any]:
        if not self.moments.count:
            log.warning("each of %d responses was cut off: there are no statistics of rewards", self.cut_off)
        return {"cut_off": self.cut_off, **self.moments.report()}


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
