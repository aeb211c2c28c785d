"""Large jobs: the rows of a JSONL file decoded, each once and in order, even if a process is killed.

`pyengine.integrations.ray` runs the same on many machines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.codec import FORMS
from pyengine.engine import Engine
from pyengine.errors import InputError, RequestError
from pyengine.jsonl import SHOWN, json_object, prompt_of
from pyengine.results import Result, SamplingParams, finite
from pyengine.scorers import ScorerLike
from pyengine.strategies import Strategy, Tokenwise
from pyengine.training.identity import identity
from pyengine.training.rows import SHARDS, Shard, Through, check_writable, lines_in, scan, worked
from pyengine.training.shards import Job, written

# Rows of a shard, which one engine decodes together: what a kill loses of one worker's time. A 32nd of the input,
# within these bounds, so that many workers have something to do; as it depends on the input alone, a row has the same
# ones beside it whoever decodes it.
LEAST, MOST, PARTS = 32, 512, 32
# What a row of the output has of its result; `blocks`, with all branches, would be most of its bytes.
OWN = ("drawn_tokens", *(f.name for f in fields(Result) if f.name not in (*FORMS, "blocks")))
# What an engine takes beside the model, scorer and device; and what of it decides its results, to the last bit.
OPTIONS = [name for name in signature(Engine.from_pretrained).parameters if name not in ("path", "scorer", "device")]
PINNED = ("dtype", "quantize", "max_rows", "cache_gb", "batch_invariant")


class Row(NamedTuple):
    """One prompt: where it came from, what it is, or why it is none, and what else its line of JSONL holds."""

    where: str
    prompt: Any
    rest: dict[str, Any]

    @property
    def kept(self) -> dict[str, Any]:
        """What stands beside a result: all but the error of an earlier run."""
        return {name: value for name, value in self.rest.items() if name != "error"}


def readable(
    engine: Engine, rows: Sequence[Row], ask: Callable[[Any], Any] | None = None, chat: bool = False
) -> Iterator[Row | str]:
    """Each row as it is decoded, or what is wrong with its prompt.

    ask: what makes of a row's prompt the one that is asked. chat: a text is what the user says, where the tokenizer has
    a template.
    """
    for row in rows:
        try:
            if isinstance(row.prompt, InputError):
                raise row.prompt
            prompt = row.prompt if ask is None else ask(row.prompt)
            if chat and type(prompt) is str and engine.codec.templated:
                prompt = [{"role": "user", "content": prompt}]
            engine.encode(prompt, row.where)
        except InputError as error:
            yield str(error)
        else:
            yield row._replace(prompt=prompt)


def decoded(
    engine: Engine,
    rows: Sequence[Row],
    strategy: Strategy | None,
    sampling: SamplingParams | Sequence[SamplingParams],
    progress: bool | None = None,
) -> Iterator[tuple[int, Result | str]]:
    """(place among the rows, its Result or what was wrong with it) as each is done."""
    for i, outcome in engine.as_completed([row.prompt for row in rows], strategy, sampling, progress):
        if isinstance(outcome, Result):
            yield i, outcome
        else:
            yield i, f"{rows[i].where}: {outcome.reason if isinstance(outcome, RequestError) else outcome}"


@dataclass
class Generator:
    """Decodes shards and commits them; model and scorer are loaded with the first. Any process that sees the files can
    do it. The fields are as `generate` has them."""

    source: Path
    job: Job
    model: str | Path
    scorer: ScorerLike | None
    strategy: Strategy | None
    sampling: SamplingParams
    ask: Callable[[Any], Any] | None
    chat: bool
    device: str
    options: dict[str, Any]
    _engine: Engine | None = field(default=None, init=False, repr=False)

    def __call__(self, shard: Shard) -> int:
        """The rows of the shard, which is committed when this returns; one that already was is left as it is.

        Raises InputError for what is wrong with the run as a whole, and if the file is not what it was.
        """
        path = self.job.file(shard)
        if path.is_file():
            return shard.rows
        rows = [_row(line, f"{self.source.name}:{number}") for number, line in lines_in(self.source, shard)]
        if self._engine is None:
            self._engine = Engine.from_pretrained(self.model, self.scorer, self.device, **self.options)
        outcomes = self._outcomes(self._engine, rows, shard.first)
        with written(path) as file:
            for i, row in enumerate(rows):
                file.write(json.dumps(_line(row, outcomes[i]), allow_nan=False) + "\n")
        return shard.rows

    def _outcomes(self, engine: Engine, rows: Sequence[Row], first: int) -> dict[int, Result | str]:
        """Of each row, by its place in the shard."""
        found = dict(enumerate(readable(engine, rows, self.ask, self.chat)))
        asked = {i: row for i, row in found.items() if isinstance(row, Row)}
        outcomes: dict[int, Result | str] = {i: said for i, said in found.items() if isinstance(said, str)}
        seed, places = self.sampling.seed, list(asked)
        sampling = [self.sampling if seed is not None else replace(self.sampling, seed=first + i) for i in places]
        for i, outcome in decoded(engine, list(asked.values()), self.strategy, sampling, False):
            outcomes[places[i]] = outcome
        return outcomes


def generate(
    source: str | Path | Iterable[Mapping[str, Any]],
    model: str | Path,
    out: str | Path,
    *,
    strategy: Strategy | None = None,
    sampling: SamplingParams | None = None,
    scorer: ScorerLike | None = None,
    ask: Callable[[Any], Any] | None = None,
    chat: bool = False,
    device: str = "cpu",
    resume: bool = False,
    progress: bool | None = None,
    through: Through = map,
    **options: Any,
) -> dict[str, Any]:
    """Decode the rows of `source` into `out`, and a report to OUT.report.json, which is returned too.

    source: a JSONL file of lines with a "prompt", "prompt_ids" or "messages", or such rows. A row keeps its place and
    whatever else it has, and gets what is in its `Result` but for `prompt`, `prompt_ids` and `blocks`; the report
    counts the rows of which that replaces something. What is wrong with a row, or with decoding or scoring it, is its
    own: it gets "error" instead of all that (a line that is no JSON object is kept beside it as "line").
    model: a directory or hub id. strategy, sampling, scorer: as for `Engine.generate`; without a seed a row's is its
    place in the source, from 0: a prompt that comes again gets another answer, and every run the same ones. ask, chat:
    as for `readable`. device, options: as for `Engine.from_pretrained`; memory too small for all rows that run together
    moves last bits of what is computed, unless it is a given `cache_gb` or the engine is `batch_invariant`. resume:
    take up a run that was cut short, with the same rows, model, scorer and settings; one that was not begun starts, and
    one that is done is only reported. progress: a bar on stderr after two seconds; None shows it
    on a terminal only. through: who decodes the shards; by default this process, one after the other.

    The report: rows, replaced, failed, the first `faults`, cut_off (answers whose finish_reason is "length"), tokens,
    drawn_tokens (of all branches), mean_reward and mean_kl of the answers, null where there is none, and seconds of
    this run. Memory does not grow with the rows. Raises InputError for what is wrong with the run as a whole, for files
    that cannot be read or written, and for an output that is there already, or is part of other work.
    """
    sampling = sampling or SamplingParams()
    decisive = [(name, options.get(name)) for name in PINNED]
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"generate: unknown option {name!r}; an engine takes {', '.join(OPTIONS)}")
    if sampling.n > 1:
        raise InputError(f"generate: n is {sampling.n}, a row has one answer: repeat the row, without a seed")
    if isinstance(strategy, Tokenwise) and strategy.kl_budget is not None and strategy.per == "sequence":
        raise InputError('generate: a kl_budget per="sequence" is spent by all prompts of one call: calibrate a weight')

    def pins() -> dict[str, Any]:
        return {
            "model": identity(model, "model"),
            "scorer": None if scorer is None else identity(scorer),
            "strategy": None if strategy is None else [type(strategy).__name__, asdict(strategy)],
            "sampling": asdict(sampling),
            "prompts": [chat, None if ask is None else identity(ask)],
            "engine": {name: v if isinstance(v, (int, float)) else str(v) for name, v in decisive if v},
        }

    def worker(path: Path, job: Job) -> Generator:
        return Generator(path, job, model, scorer, strategy, sampling, ask, chat, device, options)

    return worked(source, out, _scan, pins, worker, _Answers(), resume=resume, progress=progress, through=through)


def _scan(path: Path) -> tuple[str, list[Shard], int]:
    """As `scan` has it: the rows that have something of a result are counted."""
    return scan(path, _has_result, _full, '{"prompt"}')


def _full(rows: int, size: int, total: int) -> bool:
    return size >= total // SHARDS and (rows >= MOST or (rows >= LEAST and size >= total // PARTS))


def _has_result(line: bytes, where: str) -> bool:
    return not {"error", *OWN}.isdisjoint(_row(line, where).rest)


def _row(line: bytes, where: str) -> Row:
    rest: dict[str, Any] = {"line": line.decode(errors="replace")}
    try:
        record = json_object(line, where)
        check_writable(record, where)
        rest = record
        return Row(where, prompt_of(record, where), rest)
    except InputError as error:
        return Row(where, error, rest)


def _line(row: Row, outcome: Result | str) -> dict[str, Any]:
    """A row of the output."""
    if isinstance(outcome, str):
        return {name: value for name, value in row.rest.items() if name not in OWN} | {"error": outcome}
    found = {**finite(outcome.to_dict()), "drawn_tokens": outcome.drawn_tokens}
    return row.kept | {name: found[name] for name in OWN}


@dataclass
class _Answers:
    """What the report says of the answers."""

    failed: int = 0
    faults: list[str] = field(default_factory=list)
    cut_off: int = 0
    totals: Counter[str] = field(default_factory=Counter)

    def add(self, record: dict[str, Any]) -> None:
        if "error" in record:
            self.failed += 1
            self.faults += [record["error"]] * (len(self.faults) < SHOWN)
            return
        self.cut_off += record["finish_reason"] == "length"
        counts = {"answers": 1, "tokens": len(record["tokens"]), "drawn_tokens": record["drawn_tokens"]}
        self.totals.update(counts | {"kl": record["kl"] or 0, "rewarded": record["reward"] is not None})
        self.totals["reward"] += record["reward"] or 0

    def report(self) -> dict[str, Any]:
        t = self.totals
        return {
            "failed": self.failed,
            "faults": self.faults,
            "cut_off": self.cut_off,
            "tokens": t["tokens"],
            "drawn_tokens": t["drawn_tokens"],
            "mean_reward": t["reward"] / t["rewarded"] if t["rewarded"] else None,
            "mean_kl": t["kl"] / t["answers"] if t["answers"] else None,
        }
