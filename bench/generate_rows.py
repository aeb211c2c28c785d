"""Decodes rows on a local Ray cluster while workers and the whole job are killed: python -m bench.generate_rows.

`pyengine generate --ray local` answers 10,000 rows, blockwise by the embedded prefix scorer; a hundred are at fault.
One worker gets SIGKILL early, the whole job half-way; it is started again with --resume, and another gets SIGKILL.
Then every row must be in the output exactly once and in its place, and the output must have the bytes that one worker
makes, and one process without Ray (on one thread, as Ray's workers are). Writes bench/results/generate_rows.json;
--rows takes another number, and then nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# The neighbours by their names, also under `python -m`, which has the repository root on the path instead.
sys.path.insert(0, str(HERE))

from label_rows import Run, disturb  # noqa: E402

from pyengine.generation import PARTS  # noqa: E402
from pyengine.machine import about  # noqa: E402
from pyengine.worlds import reviews  # noqa: E402

ROWS, FAULTS = 10_000, 100
SETTINGS = ["--scorer", "prefix", "--k", 4, "--block", 8, "--max-tokens", 16]


def write_rows(path: Path, count: int) -> list[dict[str, Any]]:
    rows = [{"id": i, "prompt": prompt} for i, (prompt, _) in enumerate(reviews.corpus(count, seed=1))]
    for row in rows[:: max(1, count // FAULTS)]:
        row["prompt"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def verify(rows: list[dict[str, Any]], out: Path) -> dict[str, int]:
    """What is lost, doubled, out of place, or answered if and only if its prompt has no answer."""
    after = [json.loads(line) for line in out.read_text().splitlines()]
    ids = Counter(row["id"] for row in after)
    return {
        "lost": sum(row["id"] not in ids for row in rows),
        "doubled": sum(times - 1 for times in ids.values()),
        "out_of_place_or_changed": sum(
            (row["id"], row["prompt"]) != (was["id"], was["prompt"]) for row, was in zip(after, rows, strict=False)
        ),
        "wrongly_answered": sum(("error" in row) == bool(row["prompt"]) for row in after),
        "with_error": sum("error" in row for row in after),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="with another number nothing is written")
    count = parser.parse_args().rows
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        source, out, one, alone, log = (Path(name) / f for f in ("rows.jsonl", "out", "one", "alone", "log.txt"))
        rows = write_rows(source, count)
        command = ["generate", "--input", source, *SETTINGS]
        run, disturbed = disturb([*command, "--ray", "local"], out, log, PARTS, accept=1)  # 1: some rows failed
        seconds = [
            Run([*command, *ray], to, log, 1).end()
            for ray, to in ((["--ray", "local", "--workers", 1], one), ([], alone))
        ]
        result = {
            "machine": about("ray"),
            "rows": count,
            "settings": " ".join(map(str, SETTINGS)),
            **disturbed,
            "seconds_of_one_worker": round(seconds[0], 1),
            "seconds_without_ray": round(seconds[1], 1),
            **verify(rows, out),
            "bytes_of_one_worker": out.read_bytes() == one.read_bytes(),
            "bytes_without_ray": out.read_bytes() == alone.read_bytes(),
            "report": run.report,
        }
        said = log.read_text()
    print(json.dumps(result, indent=1))
    sound = not any(result[key] for key in ("lost", "doubled", "out_of_place_or_changed", "wrongly_answered"))
    sound = sound and result["bytes_of_one_worker"] and result["bytes_without_ray"]
    if not sound:
        print(said, file=sys.stderr)
    elif count == ROWS and result["restarts"] == 1 and result["killed_workers"] == 2:
        (HERE / "results" / "generate_rows.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(not sound)


if __name__ == "__main__":
    raise SystemExit(main())
