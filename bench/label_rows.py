"""Labels rows on a local Ray cluster while workers and the whole job are killed: python -m bench.label_rows.

`pyengine label --ray local` scores 100,000 generated reviews with the embedded reward model. One worker gets SIGKILL
early, the whole job (driver, raylet and workers) half-way; it is started again with --resume, and another worker gets
SIGKILL. Then every id must be in the output exactly once and in its place, and a sample must have the scores of a
direct run. Writes bench/results/label_rows.json; --rows takes another number, and then nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

import pyengine
from pyengine.machine import about
from pyengine.scorers import Candidates, parts_of, score_texts
from pyengine.training.labelling import SHARD_BYTES
from pyengine.worlds import reviews

HERE = Path(__file__).parent

ROWS, SAMPLE = 100_000, 2_000
TOLERANCE = 1e-5  # fp32, other neighbours in the batch


def write_rows(path: Path, count: int) -> None:
    with path.open("w") as file:
        for i, (prompt, response) in enumerate(reviews.corpus(count, seed=1)):
            file.write(json.dumps({"id": i, "prompt": prompt, "response": response}) + "\n")


class Run:
    """One run of a command of pyengine, its processes, and how far it is."""

    def __init__(self, command: list[Any], out: Path, log: Path, accept: int = 0) -> None:
        """accept: the exit code of a run that ends well."""
        command = [sys.executable, "-m", "pyengine", *map(str, command), "--out", str(out), "--resume"]
        self.log, self.accept = log, accept
        self.directory, self.began = out.with_name(out.name + ".shards"), time.perf_counter()
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)

    def shards(self) -> int:
        return len(list(self.directory.glob("*.jsonl")))

    def lives(self) -> bool:
        if self.process.poll() not in (None, self.accept):
            raise SystemExit(f"{self.log.read_text()}\nthe run ended with {self.process.returncode}")
        return self.process.returncode is None

    def wait_for(self, shards: int) -> None:
        while self.shards() < shards and self.lives():
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill_worker(self) -> bool:
        """SIGKILL for one actor that labels; False if the run ended before there was one."""
        while self.lives():
            for process in self.processes():
                with contextlib.suppress(psutil.Error):  # it may end meanwhile
                    if any("MapWorker" in word for word in process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        return True
            time.sleep(0.02)
        return False

    def kill(self) -> bool:
        """SIGKILL for all of it; False if it had ended by itself."""
        children = self.processes()
        self.process.kill()
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # it went with its parent
                process.kill()
        return self.process.wait() == -signal.SIGKILL

    def end(self) -> float:
        """Wait for it; seconds that it ran."""
        said = self.process.communicate()[0]
        if self.process.returncode != self.accept:
            raise SystemExit(f"{self.log.read_text()}\nthe run ended with {self.process.returncode}")
        self.report = json.loads(said)
        return time.perf_counter() - self.began


def disturb(command: list[Any], out: Path, log: Path, shards: int, accept: int = 0) -> tuple[Run, dict[str, Any]]:
    """The last run of a command, and what was done: a worker is killed early, the whole job half-way, and another
    worker of the run that takes it up."""
    first = Run(command, out, log, accept)
    first.wait_for(shards // 5)
    workers = [first.kill_worker()]
    first.wait_for(shards // 2)
    killed = first.kill()
    seconds = [time.perf_counter() - first.began]
    kept = first.shards()
    second = Run(command, out, log, accept)
    second.wait_for(shards * 3 // 4)
    workers.append(second.kill_worker())
    seconds.append(second.end())
    return second, {
        "seconds": round(sum(seconds), 1),
        "seconds_of_each_run": [round(s, 1) for s in seconds],
        "killed_workers": sum(workers),
        "restarts": int(killed),
        "shards_kept_at_the_restart": kept,
    }


def verify(rows: Path, out: Path, count: int) -> dict[str, Any]:
    """What is lost, doubled, out of place or changed, and how far a sample is from a direct run."""
    before = [json.loads(line) for line in rows.read_text().splitlines()]
    after = [json.loads(line) for line in out.read_text().splitlines()]
    ids = Counter(row["id"] for row in after)
    sample = random.Random(0).sample(range(count), min(SAMPLE, count))
    texts = [before[i]["response"] for i in sample]
    direct = score_texts(
        parts_of(pyengine.embedded("reward-model")),
        Candidates([before[i]["prompt"] for i in sample], [()] * len(sample), {}, {}, lambda _: texts),
    )
    by_id = {row["id"]: row["reward"] for row in after}
    return {
        "lost": sum(i not in ids for i in range(count)),
        "doubled": sum(times - 1 for times in ids.values()),
        "out_of_place_or_changed": sum(
            {**row, "reward": None} != {**was, "reward": None} for row, was in zip(after, before, strict=False)
        ),
        "sample": len(sample),
        "largest_difference_from_a_direct_run": max(
            abs(by_id.get(i, float("inf")) - score) for i, score in zip(sample, direct.tolist(), strict=True)
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="with another number nothing is written")
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        rows, out, log = (Path(name) / file for file in ("rows.jsonl", "labelled.jsonl", "log.txt"))
        write_rows(rows, count)
        command = ["label", rows, "--scorer", "reward-model", "--ray", "local"]
        run, disturbed = disturb(command, out, log, -(-rows.stat().st_size // SHARD_BYTES))
        result = {
            "machine": about("ray"),
            "rows": count,
            "megabytes": round(rows.stat().st_size / 1e6, 1),
            "scorer": "embedded reward model",
            "rows_per_second": round(count / disturbed["seconds"]),
            **disturbed,
            **verify(rows, out, count),
            "report": run.report,
        }
        said = log.read_text()
    print(json.dumps(result, indent=1))
    sound = not (result["lost"] or result["doubled"] or result["out_of_place_or_changed"])
    sound = sound and result["largest_difference_from_a_direct_run"] < TOLERANCE
    if not sound:
        print(said, file=sys.stderr)
    elif count == ROWS and result["restarts"] == 1 and result["killed_workers"] == 2:
        (HERE / "results" / "label_rows.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(not sound)


if __name__ == "__main__":
    raise SystemExit(main())
