"""`pyengine bench compare`: two versions in turns, two records by their anchors, and when an alarm is raised."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyengine
from pyengine import _C, InputError, cli
from pyengine.bench import records, report, versions, worker
from pyengine.bench.sensors import Watch
from pyengine.bench.versions import Outcome
from pyengine.cli.bench import share

SLOWER = """
_quick, _owed = tilt_sample, 0.0
def tilt_sample(*arguments, **options):
    global _owed
    _owed += {part}
    if _owed >= 1:
        _owed -= 1
        _quick(*arguments, **options)
    return _quick(*arguments, **options)
"""


def site(folder, part=0.0):
    """The package as it is here, with a tilt_sample that does so much of its work twice."""
    shutil.copytree(Path(pyengine.__file__).parent, folder / "pyengine", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_C.__file__, folder / "pyengine")
    with (folder / "pyengine" / "ops" / "tilt.py").open("a") as file:
        file.write(SLOWER.format(part=part) if part else "")
    return folder


def test_versions_run_in_turns_and_the_slower_one_is_seen(tmp_path):
    """One pair of processes, a tilt_sample that takes half as long again; what is not there fails alone."""
    old, new = site(tmp_path / "old"), site(tmp_path / "new", 0.5)
    found = versions.compare(old, new, ["tilt_sample", "no such"], 1, 7)
    assert list(found)[:2] == list(worker.CONTROLS)
    assert 1.2 < found["tilt_sample"].ratios[0] < 1.7  # 1.3 on a busy machine: the second call finds all in the cache
    assert found["tilt_sample"].same
    assert found["a product"].ratios[0] < 1.3
    assert found["no such"].error == "old: ValueError: there is no case 'no such'"


def test_a_version_that_does_not_start_is_named(tmp_path):
    with pytest.raises(InputError, match=r"empty does not start: pyengine came from .*, not from"):
        versions.compare(tmp_path / "empty", tmp_path / "empty", [], 1)


def outcomes(changes, noise=0.01, pairs=10):
    """Ratios around these changes; the controls have not moved."""
    draw = np.random.default_rng(0)

    def one(change, same=True):
        return Outcome(list(change * np.exp(noise * draw.normal(size=pairs))), [0.01] * pairs, same)

    return {name: one(1.0) for name in worker.CONTROLS} | {name: one(c) for name, c in changes.items()}


def test_an_alarm_needs_the_whole_interval_beyond_the_threshold():
    watch = Watch(torch.device("cpu"))
    changes = {"a": 1.08, "b": 1.0, "c": 1.03, "d": 0.9, "e": 1.01, "f": 1.0}
    found = versions.report(outcomes(changes), 0.03, "old", "new", watch)
    assert found.settings["regressions"] == ["a"]
    verdicts = {one["name"]: one["extra_info"]["verdict"] for one in found.benchmarks}
    assert verdicts == {
        "a plain sum": "the same",
        "a product": "the same",
        "a": "slower",
        "b": "the same",
        "c": "cannot tell",
        "d": "faster",
        "e": "the same",
        "f": "the same",
    }
    broken = {"both": Outcome([], [], False, "old: KeyError: 'a'"), "new": Outcome([], [], False, "new: KeyError: 'a'")}
    failed = versions.report(outcomes({"b": 1.0}) | broken, 0.03, "old", "new", watch)
    assert failed.settings["regressions"] == ["new"]
    assert "new: new: KeyError: 'a'" in failed.warnings
    noisy = versions.report(outcomes({"a": 1.08}, noise=0.2), 0.03, "old", "new", watch)
    assert noisy.settings["regressions"] == []


def test_no_change_raises_no_alarm_and_a_small_one_does():
    """Of eight comparisons with the noise of a shared machine."""
    watch, names = Watch(torch.device("cpu")), "abcdef"
    alarms = {1.0: 0, 1.08: 0}
    for change in alarms:
        for seed in range(8):
            draw = np.random.default_rng(seed)
            ratios = {n: change * np.exp(0.015 * draw.normal(size=10)) for n in names}
            found = {n: Outcome(list(r), [1.0] * 10, True) for n, r in ratios.items()}
            alarms[change] += bool(versions.report(found, 0.03, "old", "new", watch).settings["regressions"])
    assert alarms == {1.0: 0, 1.08: 8}


def test_what_a_reader_must_know_is_said():
    given = outcomes({"a": 1.0}) | {"b": Outcome([], [], False, "ImportError: none")}
    given["a"] = given["a"]._replace(same=False)
    given["a product"] = given["a product"]._replace(ratios=[1.2] * 10)
    found = versions.report(given, 0.03, "old", "new", Watch(torch.device("cpu")))
    assert "a: the two versions give other results" in found.warnings
    assert "b: ImportError: none" in found.warnings
    assert any(w.startswith("a product, which is the same in both, moved") for w in found.warnings)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout with two commits and a change that is in none, and a pip that copies."""
    root = tmp_path / "repository"
    (root / "pyengine").mkdir(parents=True)
    git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", root], check=True)
    for number in (1, 2):
        (root / "pyengine" / "a.py").write_text(f"n = {number}")
        (root / "README.md").write_text(str(number))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", str(number)], check=True)
    monkeypatch.setattr(versions, "ROOT", root)
    monkeypatch.setattr(versions, "BUILT", root / "build" / "bench")
    (root / ".git" / "info" / "exclude").write_text("build/")
    monkeypatch.setenv("GIT_AUTHOR_NAME", "a")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "a@b")
    monkeypatch.setenv("GIT_COMMITTER_NAME", "a")
    monkeypatch.setenv("GIT_COMMITTER_EMAIL", "a@b")
    run, installs = subprocess.run, []

    def pip(command, **options):
        if "pip" not in command:
            return run(command, **options)
        source, target = Path(command[-1]), Path(command[command.index("--target") + 1])
        installs.append(source)
        if "broken" in (source / "pyengine" / "a.py").read_text():
            return SimpleNamespace(returncode=1, stderr="error: it is broken")
        shutil.copytree(source / "pyengine", target / "pyengine")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return root, installs


def test_each_version_is_built_once_from_its_own_sources(repository):
    root, installs = repository
    assert versions.current() == versions.commit_of("HEAD")
    old, new = versions.built(versions.commit_of("HEAD~1")), versions.built(versions.current())
    assert [(s / "pyengine" / "a.py").read_text() for s in (old, new)] == ["n = 1", "n = 2"]
    (root / "pyengine" / "a.py").write_text("n = 3")
    dirty = versions.built(versions.current())
    assert (dirty / "pyengine" / "a.py").read_text() == "n = 3"
    assert (root / "pyengine" / "a.py").read_text() == "n = 3", "the working tree is left as it was"
    assert versions.built(versions.current()) == dirty
    assert len(installs) == 3, "what is built is kept"
    listed = subprocess.run(["git", "-C", root, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert listed.count("\n") == 1


def test_a_commit_that_is_not_there_or_does_not_build_is_named(repository, tmp_path, monkeypatch):
    root, _ = repository
    with pytest.raises(InputError, match=r"--against nowhere: git knows no such commit"):
        versions.commit_of("nowhere")
    (root / "pyengine" / "a.py").write_text("n = 4")
    (root / ".git" / "index.lock").touch()
    with pytest.raises(InputError, match=r"git could not make a commit of the working tree"):
        versions.current()
    (root / ".git" / "index.lock").unlink()
    (root / "pyengine" / "a.py").write_text("broken")
    with pytest.raises(InputError, match=r"does not build: error: it is broken"):
        versions.built(versions.current())
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    with pytest.raises(InputError, match=r"is no git checkout"):
        versions.commit_of("HEAD")


def record(path, machine=1.0, change=1.0, rounds=12, noise=0.01):
    """A run on a machine of this speed: an anchor and ours."""
    draw = np.random.default_rng(len(path.name))
    anchor = machine * np.exp(0.2 * draw.normal(size=rounds))
    ours = 0.5 * change * anchor * np.exp(noise * draw.normal(size=rounds))
    entries = [
        report.entry("throughput", "pyengine", list(ours), {"anchor": False}),
        report.entry("throughput", "fork", list(anchor), {"anchor": True}),
    ]
    path.write_text(json.dumps(report.Report("throughput", {}, [], entries).document()))
    return path


def test_records_are_compared_by_their_anchors(tmp_path):
    """The machine is three times slower in one of them; only the change beside the anchor counts."""
    old = record(tmp_path / "old.json")
    same, slow = record(tmp_path / "same.json", 3.0), record(tmp_path / "slower.json", 3.0, 1.15)
    assert records.compare(same, old, 0.03).settings["regressions"] == []
    (one,) = records.compare(same, old, 0.03).benchmarks
    assert one["extra_info"]["new_takes"]["ratio"] == pytest.approx(1, abs=0.03)
    found = CliRunner().invoke(cli.app, ["bench", "compare", str(slow), str(old), "--threshold", "5%"])
    assert found.exit_code == 1
    assert "throughput::pyengine / fork became slower by more than 5%" in found.stderr
    assert CliRunner().invoke(cli.app, ["bench", "compare", str(old), str(slow)]).exit_code == 0
    few = record(tmp_path / "few.json", 3.0, 1.5, rounds=5)
    assert records.compare(few, old, 0.03).settings["regressions"] == []
    assert records.compare(same, old, 0.03).warnings == []
    said = "throughput::pyengine / fork: 5 rounds are too few for 1 rows, no slowdown can be told"
    assert records.compare(few, old, 0.03).warnings == [said]
    other = json.loads(old.read_text()) | {"settings": {"model": "another"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"other.json and .* of different work: their settings have another model"):
        records.compare(tmp_path / "other.json", old, 0.03)
    elsewhere = json.loads(same.read_text())
    elsewhere["machine"]["cpu"] = "another"
    (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
    assert records.compare(tmp_path / "elsewhere.json", old, 0.03).warnings == ["they ran on another cpu"]
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps({"schema": 1, "benchmarks": []}))
    with pytest.raises(InputError, match=r"no benchmark beside an anchor in common"):
        records.compare(alone, old, 0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --against COMMIT, or two records"),
        (["a.json"], "give --against COMMIT, or two records"),
        (["a.json", "b.json", "--against", "HEAD"], "give --against COMMIT, or two records"),
        (["a.json", "b.json"], "a.json: No such file"),
        (["--against", "HEAD", "--threshold", "much"], "--threshold much: give a share"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    done = CliRunner().invoke(cli.app, ["bench", "compare", *arguments])
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)
    assert share("3%") == share("0.03") == 0.03
