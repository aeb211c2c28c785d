"""Labelling: every row once, in its place, with the score of a direct run, whatever is killed and when."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pyengine
from pyengine import InputError, RewardModel, Statistics, cli
from pyengine.scorers import Candidates, parts_of, score_texts
from pyengine.training import labelling, shards
from pyengine.training.data import read_examples
from pyengine.training.labelling import label
from pyengine.worlds import reviews

CUT = [(1, "stop"), (10, "length"), (2, "stop")]
PROMPT = "Review of the Harbour, a bakery:"


def rows(count, seed=0):
    texts = enumerate(reviews.corpus(count, seed))
    return [{"id": i, "prompt": prompt, "response": response} for i, (prompt, response) in texts]


def jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def direct(scorer, records):
    texts = [r["response"] for r in records]
    candidates = Candidates([r["prompt"] for r in records], [()] * len(records), {}, {}, lambda _: texts)
    return score_texts(parts_of(scorer), candidates).tolist()


def never(prompts, completions):
    raise AssertionError("nothing may be scored")


@pytest.fixture
def small(monkeypatch):
    """Shards of about 20 rows."""
    monkeypatch.setattr(labelling, "SHARD_BYTES", 4096)


def test_every_row_keeps_its_place_and_gets_the_direct_score(tmp_path, small, engine):
    records = rows(400)
    random.Random(0).shuffle(records)  # ids are not places
    records[7] |= {"reward": 99.0, "finish_reason": "length"}
    lines = [json.dumps(r) for r in records]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n\n".join(lines))  # empty lines, and no newline at the end
    report = label(source, reviews.sentiment, tmp_path / "new" / "out.jsonl", progress=True)
    expected = [r | {"reward": s} for r, s in zip(records, direct(reviews.sentiment, records), strict=True)]
    assert read(tmp_path / "new" / "out.jsonl") == expected
    rewards = [r["reward"] for r in expected]
    assert (report["rows"], report["replaced"], report["cut_off"]) == (400, 1, 1)
    del rewards[7]  # it was cut off: a reward in the output, none of the statistics
    assert (report["least"], report["greatest"]) == (min(rewards), max(rewards))
    known = Statistics(**report["statistics"])
    assert (known.count, known.ddof) == (399, 0)
    assert known.mean == pytest.approx(statistics.fmean(rewards), abs=1e-12)
    assert known.std == pytest.approx(statistics.pstdev(rewards), abs=1e-12)
    assert json.loads((tmp_path / "new" / "out.jsonl.report.json").read_text()) == report
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out.jsonl", "out.jsonl.report.json"]
    assert [e.reward for e in read_examples(tmp_path / "new" / "out.jsonl", engine) if e.ended] == rewards


def test_a_sum_of_scorers_over_rows_in_memory(tmp_path, small):
    records = rows(60)
    scorer = [(0.7, pyengine.embedded("reward-model")), (0.3, reviews.politeness)]
    report = label(iter(records), scorer, tmp_path / "a.jsonl")
    found = [r["reward"] for r in read(tmp_path / "a.jsonl")]
    assert found == pytest.approx(direct(scorer, records), abs=1e-6)
    assert label(jsonl(tmp_path / "rows.jsonl", records), scorer, tmp_path / "b.jsonl")["of"] == report["of"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert not (tmp_path / "a.jsonl.rows").exists()


def test_equal_rewards_have_a_std_of_zero(tmp_path):
    report = label(rows(7), lambda prompts, completions: [0.1] * len(prompts), tmp_path / "out.jsonl")
    assert report["statistics"]["std"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "rows.jsonl:2: not JSON"),
        ("[1]", "rows.jsonl:2: must be a JSON object"),
        ({"prompt": PROMPT}, "rows.jsonl:2: lacks 'response'"),
        ({"prompt": PROMPT, "chosen": "a", "rejected": "b"}, "it is a pair"),
        ({"prompt": 3, "response": " A."}, "rows.jsonl:2: needs a string or messages"),
        ({"prompt": PROMPT, "response": " "}, "rows.jsonl:2: the response is empty"),
        ({"prompt": "", "response": " A."}, "rows.jsonl:2: the prompt is empty"),
        (f'{{"prompt": "{PROMPT}", "response": " A.", "y": 1e999}}', "rows.jsonl:2: cannot be written again: Out of"),
        ({"prompt": PROMPT, "response": "\ud800"}, "rows.jsonl:2: the response is not valid Unicode"),
    ],
)
def test_a_bad_line_is_named_before_any_is_scored(tmp_path, line, message):
    good = {"prompt": PROMPT, "response": " Fine."}
    source = jsonl(tmp_path / "rows.jsonl", [good, line, good])
    with pytest.raises(InputError, match=message):
        label(source, never, tmp_path / "out.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_all_bad_lines_are_counted_and_an_empty_file_is_refused(tmp_path, small):
    source = jsonl(tmp_path / "rows.jsonl", [*rows(100), *["nonsense"] * 9])
    with pytest.raises(InputError, match=r"9 of 109 lines cannot be used: .*rows.jsonl:101: .*; and 4 more$"):
        label(source, never, tmp_path / "out.jsonl")
    for text, message in (("\n\n", "rows.jsonl: no rows"), (None, "rows.jsonl: No such file")):
        source.unlink() if text is None else source.write_text(text)
        with pytest.raises(InputError, match=message):
            label(source, never, tmp_path / "out.jsonl")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_score_that_is_not_finite_names_its_row(tmp_path, small, bad):
    records = rows(100)
    source = jsonl(tmp_path / "rows.jsonl", records)

    def scorer(prompts, completions):
        return [bad if c == records[60]["response"] else 0.5 for c in completions]

    with pytest.raises(InputError, match=r"rows.jsonl:61: its score is (nan|inf|-inf); a reward must be finite"):
        label(source, scorer, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert len(list((tmp_path / "out.jsonl.shards").glob("*.jsonl"))) >= 2  # the shards before it are kept


def test_scorers_that_cannot_score_these_rows(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [*rows(3), {"prompt": PROMPT, "response": " very" * 3000}])
    for scorer, message in (
        (pyengine.embedded("reward-model"), r"rows from .*rows.jsonl:1: reward model 'reward-model' reads \d+ tokens"),
        (pyengine.embedded("probe"), "reads hidden states or tokens of a language model: give the model"),
        (pyengine.rewards.length(), "'length' reads hidden states or tokens"),
        ([], "needs a scorer"),
        ([("x", reviews.sentiment)], "its weight must be a finite number, got 'x'"),
        ([reviews.sentiment, reviews.politeness], r"holds \(weight, scorer\) pairs"),
        ("/no/such/scorer", "scorer /no/such/scorer: no such directory"),
    ):
        with pytest.raises(InputError, match=message):
            label(source, scorer, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"device 'abacus' is none that torch knows: use cpu, cuda, cuda:1 or mps$"):
        label(rows(3), reviews.sentiment, tmp_path / "out.jsonl", device="abacus")
    assert not (tmp_path / "out.jsonl.shards").exists()


KILLED = """
import sys
from pathlib import Path
from pyengine.training import labelling
from slow import scorer
labelling.SHARD_BYTES = 4096
labelling.label(sys.argv[1], scorer, sys.argv[2])
"""
SLOW = """
import os, time
from pyengine.worlds import reviews
def scorer(prompts, completions):
    with open(os.environ["SCORED"], "a") as file:
        file.write("".join(c + "\\n" for c in completions))
    time.sleep(0.03)
    return reviews.sentiment(prompts, completions)
"""


def test_sigkill_in_the_middle_and_a_restart(tmp_path, small, monkeypatch):
    """Nothing is lost or doubled, and of what was done only the shard in hand is scored again."""
    records = rows(600)
    source, out, scored = jsonl(tmp_path / "rows.jsonl", records), tmp_path / "out.jsonl", tmp_path / "scored"
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("SCORED", str(scored))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, out])
    directory = tmp_path / "out.jsonl.shards"
    while len(list(directory.glob("*.jsonl"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = len(list(directory.glob("*.jsonl")))

    monkeypatch.syspath_prepend(tmp_path)
    import slow

    total = len(labelling._scan(source)[1])
    assert 5 <= done < total
    with pytest.raises(InputError, match="part of a run that was cut short: resume it, or delete it"):
        label(source, slow.scorer, out)
    with pytest.raises(InputError, match="was made with another scorer; give the same"):
        label(source, reviews.sentiment, out, resume=True)
    with pytest.raises(InputError, match="was made with another input; give the same"):
        label(jsonl(tmp_path / "other.jsonl", records[1:]), slow.scorer, out, resume=True)
    report = label(source, slow.scorer, out, resume=True)
    assert report["rows"] == 600
    assert read(out) == [r | {"reward": s} for r, s in zip(records, direct(reviews.sentiment, records), strict=True)]
    again = len(scored.read_text().splitlines()) - 600
    assert 0 <= again <= max(shard.rows for shard in labelling._scan(source)[1])


def test_a_run_that_is_done_is_only_reported(tmp_path):
    records, out = rows(30), tmp_path / "out.jsonl"
    report = label(records, reviews.sentiment, out)
    with pytest.raises(InputError, match="exists already; choose another output, or resume"):
        label(records, reviews.sentiment, out)
    assert label(records, reviews.sentiment, out, resume=True) == report
    with pytest.raises(InputError, match="exists already, and was made with another input and scorer"):
        label(records[1:], never, out, resume=True)
    (tmp_path / "out.jsonl.report.json").unlink()
    with pytest.raises(InputError, match="does not say what it was made of"):
        label(records, reviews.sentiment, out, resume=True)


def test_killed_at_every_commit(tmp_path, small, monkeypatch):
    """The output is missing or whole whenever a run ends, and a run that is taken up ends with it whole."""
    records, out = rows(60), tmp_path / "out.jsonl"
    source = jsonl(tmp_path / "rows.jsonl", records)
    label(source, reviews.sentiment, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    acts = {name: getattr(Path, name) for name in ("replace", "unlink", "rmdir")}

    class Killed(BaseException):
        pass

    for before in (True, False):  # the commit was not made, or was the last thing that was
        ends = 0
        for last in range(100):
            calls = iter(range(100))

            def dying(act, *arguments, **options):
                if next(calls) != last:
                    return act(*arguments, **options)
                if not before:
                    act(*arguments, **options)
                raise Killed

            for name, act in acts.items():
                monkeypatch.setattr(Path, name, lambda *a, act=act, **k: dying(act, *a, **k))
            try:
                label(source, reviews.sentiment, out, resume=True)
            except Killed:
                ends += 1
                assert not out.exists() or out.read_bytes() == whole
                monkeypatch.undo()
                monkeypatch.setattr(labelling, "SHARD_BYTES", 4096)
                assert label(source, reviews.sentiment, out, resume=True)["rows"] == 60
                assert out.read_bytes() == whole
                assert not (tmp_path / "out.jsonl.shards").exists()
            else:
                break
            finally:
                monkeypatch.undo()
                monkeypatch.setattr(labelling, "SHARD_BYTES", 4096)
                out.unlink(missing_ok=True)
        assert ends >= 11  # the manifest, three shards, the report, the output, and the end of each file but it
    assert out.exists() is False


def test_one_run_at_a_time(tmp_path, small):
    records, out = rows(60), tmp_path / "out.jsonl"
    job = shards.Job(out, {})
    with shards.held(job.out, False), pytest.raises(InputError, match="another run is making it"):
        label(records, reviews.sentiment, out)
    assert label(records, reviews.sentiment, out)["rows"] == 60


def test_a_file_that_changes_meanwhile_and_a_shard_that_is_damaged(tmp_path, small):
    records, out = rows(80), tmp_path / "out.jsonl"
    source = jsonl(tmp_path / "rows.jsonl", records)

    def changing(labeller, todo):
        for shard in todo:
            source.write_text(source.read_text().replace("the", "THE"))
            yield labeller(shard)

    with pytest.raises(InputError, match="has changed since this run read it"):
        label(source, reviews.sentiment, out, through=changing)

    assert not out.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged and was removed"),
        (lambda path: path.write_text(path.read_text().partition("\n")[0] + "\n"), r"has 1 lines for \d+ rows"),
        (Path.unlink, "is gone"),
    ],
)
def test_a_damaged_shard_is_labelled_again_by_the_run_that_is_resumed(tmp_path, small, damage, message):
    records, out = rows(80), tmp_path / "out.jsonl"

    def damaging(labeller, todo):
        yield from map(labeller, todo)
        damage(labeller.job.file(todo[1]))

    with pytest.raises(InputError, match=rf"\d\.jsonl {message}.*; run it again with --resume"):
        label(records, reviews.sentiment, out, through=damaging)
    assert not out.exists()
    again = []

    def counting(labeller, todo):
        again.extend(todo)
        return map(labeller, todo)

    assert label(records, reviews.sentiment, out, resume=True, through=counting)["rows"] == 80
    assert len(again) == 1
    assert [r["reward"] for r in read(out)] == direct(reviews.sentiment, records)


def test_rewards_of_what_was_cut_off_are_no_statistics(tmp_path, caplog):
    records = [{"prompt": PROMPT, "response": " Fine." * n, "finish_reason": f} for n, f in CUT]
    report = label(records, lambda p, c: [len(x) for x in c], tmp_path / "out.jsonl")
    assert (report["rows"], report["cut_off"], report["statistics"]["count"]) == (3, 1, 2)
    assert (report["least"], report["greatest"], report["statistics"]["mean"]) == (6, 12, 9)
    assert [r["reward"] for r in read(tmp_path / "out.jsonl")] == [6, 60, 12]
    none = label(records[1:2], lambda p, c: [1.0], tmp_path / "none.jsonl")
    assert (none["cut_off"], none["least"], none["statistics"]) == (1, None, None)
    assert caplog.messages == ["each of 1 responses was cut off: there are no statistics of rewards"]


def stranger(directory):
    directory.mkdir()
    (directory / "thesis.jsonl").write_text("years of work")
    return directory


def test_files_of_others_are_not_touched(tmp_path, small):
    theirs = stranger(tmp_path / "out.jsonl.shards")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"is of no run that was cut short: it holds thesis.jsonl; move it away"):
            label(rows(30), never, tmp_path / "out.jsonl", resume=resume)
    (theirs / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is of no run that was cut short"):
        label(rows(30), never, tmp_path / "out.jsonl")
    assert sorted(p.name for p in theirs.iterdir()) == ["manifest.json", "thesis.jsonl"]

    def adding(labeller, todo):
        (labeller.job.directory / "thesis.jsonl").write_text("more")
        return map(labeller, todo)

    label(rows(30), reviews.sentiment, tmp_path / "b.jsonl", through=adding)
    assert [p.name for p in (tmp_path / "b.jsonl.shards").iterdir()] == ["thesis.jsonl"]


def test_an_output_that_another_run_made_meanwhile_is_kept(tmp_path, monkeypatch):
    out, locked = tmp_path / "out.jsonl", shards._locked

    def late(*arguments):
        out.write_text("theirs")
        return locked(*arguments)

    monkeypatch.setattr(shards, "_locked", late)
    with pytest.raises(InputError, match="exists already"):
        label(rows(5), never, out)
    assert out.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_lock_on_a_directory_that_is_gone_is_none(tmp_path, monkeypatch):
    """Another run removes the directory between this one's open and its lock; a third must still be kept out."""
    out, flock, calls = tmp_path / "out.jsonl", shards.fcntl.flock, []

    def late(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            shards.directory_of(out).rmdir()
        return flock(handle, how)

    monkeypatch.setattr(shards.fcntl, "flock", late)
    with (
        shards.held(out, False) as directory,
        pytest.raises(InputError, match="another run is making it"),
        shards.held(out, False),
    ):
        pass
    assert len(calls) == 3
    assert not directory.exists()


def test_a_second_run_does_not_touch_the_rows_of_the_first(tmp_path, small):
    records, out = rows(60), tmp_path / "out.jsonl"

    def meanwhile(labeller, todo):
        with pytest.raises(InputError, match="another run is making it"):
            label(rows(60, seed=1), never, out)
        return map(labeller, todo)

    label(records, reviews.sentiment, out, through=meanwhile)
    assert [r["id"] for r in read(out)] == list(range(60))
    assert [r["response"] for r in read(out)] == [r["response"] for r in records]
    with pytest.raises(InputError, match="exists already"):
        label(rows(60, seed=1), never, out)
    with pytest.raises(InputError, match="the prompt is empty"):
        label([{"prompt": "", "response": " A."}], never, tmp_path / "other.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_what_the_system_refuses_names_its_path(tmp_path, small, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "b.jsonl.shards").write_text("")
    for out, message in (
        (tmp_path / "file" / "out.jsonl", r"file/out.jsonl: nothing can be written there \(Not a directory\)"),
        (tmp_path / "b.jsonl", r"b.jsonl.shards: File exists"),
        (Path("/proc/out.jsonl"), r"/proc/out.jsonl: nothing can be written there \(No such file"),
    ):
        with pytest.raises(InputError, match=message):
            label(rows(3), never, out)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(InputError, match=r"c.jsonl.shards/manifest.json: No space left on device"):
        label(rows(3), reviews.sentiment, tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl.shards").exists()


def test_both_names_are_on_the_disk_before_the_shards_go(tmp_path, monkeypatch):
    synced, fsync, clear = [], os.fsync, shards._clear
    monkeypatch.setattr(shards.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(shards, "_clear", lambda directory: synced.append("clear") or clear(directory))
    label(rows(3), reviews.sentiment, tmp_path / "out.jsonl")
    assert synced[synced.index("clear") - 1] == str(tmp_path)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="is no regular file; rows are read more than once: write them to a file"):
            label(source, never, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (1, "row 2 must be a mapping, got 1"),
        ("abc", "row 2 must be a mapping, got 'abc'"),
        ({"prompt": PROMPT, "response": " A.", "x": torch.zeros(1)}, "row 2 cannot be written as JSON: Object of type"),
        ({"prompt": PROMPT, "response": " A.", "x": math.nan}, "row 2 cannot be written as JSON: Out of range"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        label([{"prompt": PROMPT, "response": " A."}, row], never, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """But by the places of shards, of which there are at most 10,000."""
    monkeypatch.setattr(labelling, "SHARD_BYTES", 2**14)
    peaks, sizes = [], []
    for count in (1500, 6000):
        source = jsonl(tmp_path / f"{count}.jsonl", rows(count))
        tracemalloc.start()
        label(source, lambda prompts, completions: [0.5] * len(prompts), tmp_path / f"{count}.out")
        peaks.append(tracemalloc.get_traced_memory()[1])
        sizes.append(source.stat().st_size)
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.06 * (sizes[1] - sizes[0])


def test_shards_grow_where_they_would_be_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "SHARD_BYTES", 1)
    source = jsonl(tmp_path / "rows.jsonl", rows(300))
    assert len(labelling._scan(source)[1]) == 300
    monkeypatch.setattr(labelling, "SHARDS", 10)
    found = labelling._scan(source)[1]
    assert len(found) <= 10
    assert [s.first for s in found] == [0, *(s.first + s.rows for s in found[:-1])]
    assert sum(s.size for s in found) == source.stat().st_size


def test_command(tmp_path):
    source, out = jsonl(tmp_path / "rows.jsonl", rows(40)), tmp_path / "out.jsonl"

    def run(*arguments):
        return CliRunner().invoke(cli.app, ["label", *map(str, arguments)], standalone_mode=False)

    done = run(source, "--scorer", "reward-model", "--out", out)
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["rows"] == 40
    judge = RewardModel.from_pretrained(pyengine.embedded("reward-model"))
    with torch.inference_mode():
        assert [r["reward"] for r in read(out)] == pytest.approx(direct(judge, rows(40)), abs=1e-6)
    again = run(source, "--scorer", "reward-model", "--out", out, "--resume")
    assert json.loads(again.stdout) == json.loads(done.stdout)
    for options, message in (
        ((source, "--scorer", "sentiment", "--out", out), "exists already"),
        ((source, "--scorer", "sentiment", "--out", out, "--resume"), "made with another scorer"),
        ((tmp_path / "no.jsonl", "--scorer", "sentiment", "--out", tmp_path / "o"), "No such file"),
        ((tmp_path / "no.jsonl", "--scorer", "sentiment", "--out", out), "exists already"),  # before the rows are read
        ((source, "--scorer", "sentimant", "--out", tmp_path / "o"), "embedded are prefix, probe, reward-model, sent"),
        ((source, "--scorer", "", "--out", tmp_path / "o"), "no scorer ''"),
        ((source, "--scorer", "/no/such", "--out", tmp_path / "o"), "/no/such: no such directory"),
    ):
        failed = run(*options)
        assert isinstance(failed.exception, InputError)
        assert message in str(failed.exception)
