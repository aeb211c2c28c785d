"""Roll-outs that are kept as they are drawn: a run that is killed loses those in hand and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pyengine.engine import Engine
from pyengine.scorers import ScorerLike
from pyengine.training.data import Example, drawn, in_turn, line_of, read_examples
from pyengine.training.shards import Job, begun, digest_of, held, lines, merged, written

AT_ONCE = 256  # roll-outs in a shard: what a kill loses


class _Part(NamedTuple):
    """A shard: the roll-outs first .. first + rows - 1."""

    first: int
    rows: int


def kept_roll_outs(
    engine: Engine,
    prompts: Sequence[str],
    reward: ScorerLike,
    file: Path,
    *,
    count: int,
    max_tokens: int,
    seed: int,
    said: dict[str, Any],
    resume: bool = False,
    keeps: bool = True,
) -> list[Example]:
    """`count` responses of the base policy to the prompts in turn, in `file`; a run that is resumed goes on there.

    Each is what `roll_out` draws. said: what names model and reward; a run is resumed with equal ones, prompts, numbers
    and seed only. keeps: whether this process, of several that draw the same, writes. Raises InputError as `roll_out`
    does, where `file` or a part of it is there and nobody resumes it, and where it is of another run.
    """
    for i, prompt in enumerate(prompts):  # before any is drawn
        engine.encode(prompt, f"prompt {i}")
    asked = in_turn(islice(cycle(prompts), count), max_tokens, seed)
    shards = [_Part(first, min(AT_ONCE, count - first)) for first in range(0, count, AT_ONCE)]
    if not keeps:
        if resume and file.is_file():
            return read_examples(file, engine)
        with engine.following(reward):
            return [e for s in shards for e in drawn(engine, asked[s.first : s.first + s.rows], seed, False)]
    texts = digest_of(json.dumps(list(prompts)).encode())
    job = Job(file.absolute(), {**said, "prompts": texts, "max_tokens": max_tokens, "seed": seed, "count": count})
    with held(job.out, resume):
        if begun(job, resume) is None:
            bar = tqdm(total=count, unit="roll-out", delay=2, disable=None, leave=False)
            with bar, engine.following(reward):
                for shard in shards:
                    if not job.file(shard).is_file():
                        found = drawn(engine, asked[shard.first : shard.first + shard.rows], seed, False)
                        with written(job.file(shard)) as part:
                            part.writelines(map(line_of, found))
                    bar.update(shard.rows)
            with merged(job, {"count": count}) as out:
                out.writelines(line for line, _ in lines(job, shards))
    return read_examples(file, engine)
