"""Large jobs on a local Ray cluster: the output of a local run, even if a worker is killed; faults come back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import threading
import time

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

import pyengine
from pyengine import Blockwise, InputError, SamplingParams, cli, generation
from pyengine.integrations import ray as cluster
from pyengine.training import labelling
from pyengine.training.shards import Job
from pyengine.worlds import reviews


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = enumerate(reviews.corpus(1000, seed=2))
    path.write_text("".join(json.dumps({"id": i, "prompt": p, "response": r}) + "\n" for i, (p, r) in lines))
    return path


@pytest.fixture(scope="module")
def local():
    """One cluster for all tests here, as `address="local"` starts it."""
    with cluster._cluster("local"):
        yield


def workers():
    """Processes of this one's cluster that run an actor of Ray Data."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            if any("MapWorker" in word for word in process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def a_worker_killed(out):
    """SIGKILL for an actor after the next shard of this output, while the block runs."""
    directory = out.with_name(out.name + ".shards")
    before = len(list(directory.glob("*.jsonl")))
    killed, over = [], threading.Event()

    def kill():
        while not killed and not over.is_set():
            found = workers()
            if len(list(directory.glob("*.jsonl"))) > before and found:
                os.kill(found[0].pid, signal.SIGKILL)
                killed.append(found[0].pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert len(killed) == 1
    assert not psutil.pid_exists(killed[0]) or psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE


def test_a_killed_worker_and_shards_of_an_earlier_run(local, source, tmp_path, monkeypatch):
    """Half of the shards come from a run without Ray that was cut short; a worker dies over the others."""
    monkeypatch.setattr(labelling, "SHARD_BYTES", 2**12)
    scorer, out = pyengine.embedded("reward-model"), tmp_path / "out.jsonl"
    labelling.label(source, [(1.0, scorer)], tmp_path / "whole.jsonl")

    def cut_short(labeller, todo):
        yield from map(labeller, todo[::2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labelling.label(source, [(1.0, scorer)], out, through=cut_short)
    monkeypatch.chdir(scorer.parent)  # where no worker is
    scorers = [(1.0, scorer.name)]
    with a_worker_killed(out):
        report = cluster.label(source, scorers, out, resume=True, workers=1, progress=True)
    assert report["rows"] == 1000
    found, whole = ([json.loads(line) for line in path.open()] for path in (out, tmp_path / "whole.jsonl"))
    assert [row["id"] for row in found] == list(range(1000))
    assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in whole], abs=1e-5)


def test_generation_by_workers_of_which_one_is_killed_has_the_bytes_of_one_machine(local, tmp_path, monkeypatch):
    """Half of the shards come from a run without Ray that was cut short, and some rows are at fault."""
    monkeypatch.setattr(generation, "LEAST", 8)
    monkeypatch.setattr(generation, "MOST", 8)
    model, out, source = pyengine.embedded("policy"), tmp_path / "out.jsonl", tmp_path / "rows.jsonl"
    rows = [{"id": i, "prompt": "" if i % 50 == 9 else prompt} for i, prompt in enumerate(reviews.prompts(400))]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"strategy": Blockwise(2, 4), "scorer": pyengine.embedded("prefix"), "sampling": SamplingParams(max_tokens=8)}
    generation.generate(source, model, tmp_path / "whole.jsonl", **job)

    def cut_short(worker, todo):
        yield from map(worker, todo[::2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation.generate(source, model, out, through=cut_short, **job)
    monkeypatch.chdir(model.parent)  # where no worker is
    with a_worker_killed(out):
        report = cluster.generate(source, model.name, out, resume=True, workers=1, **job)
    assert (report["rows"], report["failed"]) == (400, 8)
    assert [json.loads(line)["id"] for line in out.open()] == list(range(400))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_fault_is_a_result_of_the_worker_and_an_error_of_the_run(local, source, tmp_path, monkeypatch):
    """The two halves of its way, without the seconds that an actor takes to start."""
    line = next(i for i, text in enumerate(source.read_text().splitlines(), 1) if "wonderful" in text)

    def bad(prompts, completions):
        return [math.nan if "wonderful" in c else 0.0 for c in completions]

    (tmp_path / "a.jsonl.shards").mkdir()
    job = Job(tmp_path / "a.jsonl", {})
    worker = cluster._Actor(cluster.ray.put(labelling.Labeller(source, job, bad)))
    place = labelling._scan(source)[1][0]._asdict()
    done = worker({name: np.array([value]) for name, value in place.items()})
    (fault,) = done["fault"]
    assert done["rows"] == [0]
    assert f"{source}:{line}: its score is nan" in fault
    monkeypatch.setattr(cluster.ray.data.Dataset, "iter_rows", lambda dataset: iter([{"rows": 0, "fault": fault}]))
    for broken, said in ((Broken(None), "KeyError: 'no such shop'"), (Broken("gone"), "RaySystemError: .* gone")):
        failed = cluster._Actor(cluster.ray.put(broken))({name: np.array([v]) for name, v in place.items()})
        assert re.fullmatch(f"a worker failed with {said}", failed["fault"][0])
    with pytest.raises(InputError, match=rf"cannot be used: .*rows.jsonl:{line}: its score is nan"):
        cluster.label(source, bad, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


class Broken:
    """A worker that cannot be made where it is sent, or that fails there."""

    def __init__(self, said):
        self.said = said

    def __call__(self, shard):
        raise KeyError("no such shop")

    def __setstate__(self, state):
        self.__dict__ = state
        if self.said:
            raise RuntimeError(self.said)


def test_no_gpu_is_said_and_not_waited_for(local, source, tmp_path):
    with pytest.raises(InputError, match="the Ray cluster has no GPU"):
        cluster.generate(source, pyengine.embedded("policy"), tmp_path / "o", device="cuda", workers=1)


DIED = "a shard's workers died 6 times, the last with '.*'"


@pytest.mark.parametrize(
    ("error", "arguments", "said"),
    [
        ("ActorDiedError", (), DIED),
        ("ActorUnavailableError", ("gone", b"0" * 16), DIED),
        ("OutOfMemoryError", ("no room",), "Ray ended with OutOfMemoryError: no room"),
        ("NodeDiedError", ("it is off",), "Ray ended with NodeDiedError: it is off"),
    ],
)
def test_a_shard_that_kills_its_workers_ends_the_run(local, source, tmp_path, monkeypatch, error, arguments, said):
    """What Ray is told, and what it then ends with; six workers that start and die would take a minute."""
    dataset, told = cluster.ray.data.Dataset, {}
    map_batches = dataset.map_batches

    def told_of(self, *arguments, **options):
        told.update(options)
        return map_batches(self, *arguments, **options)

    def dying(self):
        raise getattr(cluster.ray.exceptions, error)(*arguments)
        yield

    monkeypatch.setattr(dataset, "map_batches", told_of)
    monkeypatch.setattr(dataset, "iter_rows", dying)
    with pytest.raises(InputError, match=rf"rows.jsonl: {said}; .*: resume when there is memory"):
        cluster.label(source, reviews.sentiment, tmp_path / "out.jsonl", workers=1)
    assert told["max_task_retries"] == cluster.RETRIES == 5
    assert told["num_cpus"] == told["batch_size"] == 1
    (place,) = told["fn_constructor_args"]
    assert isinstance(place, cluster.ray.ObjectRef)  # not the scorer, which may be a model
    assert cluster.ray.get(place).scorer is not None


def test_bad_lists_of_scorers_are_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"holds \(weight, scorer\) pairs"):
        cluster.label(source, [reviews.sentiment, reviews.politeness], tmp_path / "out.jsonl")


def test_what_is_refused_before_a_cluster_is_asked(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)

    def refused(*arguments, command="label"):
        done = CliRunner().invoke(cli.app, [command, *map(str, arguments)], standalone_mode=False)
        assert isinstance(done.exception, InputError)
        assert done.stdout == ""
        return str(done.exception)

    options = (source, "--scorer", "sentiment", "--out", tmp_path / "out.jsonl")
    assert "no Ray cluster at '127.0.0.1:1'" in refused(*options, "--ray", "127.0.0.1:1")
    assert "no Ray cluster at 'nonsense': Invalid address" in refused(*options, "--ray", "nonsense")
    assert "no such directory" in refused(source, "--scorer", "/no/such", "--out", tmp_path / "o", "--ray", "local")
    with pytest.raises(InputError, match="workers must be a whole number of at least 1"):
        cluster.label(source, reviews.sentiment, tmp_path / "o", workers=0)
    with pytest.raises(InputError, match="workers must be a whole number of at least 1"):
        cluster.generate(source, pyengine.embedded("policy"), tmp_path / "o", workers=0)
    lock, there = threading.Lock(), {"address": "127.0.0.1:1"}
    unsendable = {"scorer": lambda prompts, completions: [lock.locked()] * len(completions)}
    for said, options in ((r"cannot be sent to a Ray worker: .*lock", unsendable), ("'nonsense'", {"nonsense": 1})):
        with pytest.raises(InputError, match=said):
            cluster.generate(source, pyengine.embedded("policy"), tmp_path / "o", **options, **there)
    with pytest.raises(InputError, match=r"cannot be sent to a Ray worker: .*lock"):
        cluster.label(source, out=tmp_path / "o", **unsendable, **there)
    options = ("--input", source, "--out", tmp_path / "o", "--ray")
    assert "no Ray cluster at ''" in refused(*options, "", command="generate")
    assert "no Ray cluster at '127.0.0.1:1'" in refused(*options, "127.0.0.1:1", command="generate")


def test_usage_statistics_are_off_and_no_dashboard_runs(local):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not cluster.ray._private.worker.global_worker.node.webui_url
    assert cluster.ray.cluster_resources()["object_store_memory"] == cluster.OBJECT_STORE
