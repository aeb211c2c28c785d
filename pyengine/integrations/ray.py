"""Large jobs on a Ray cluster, with Ray Data: `pyengine.generation.generate` and `pyengine.training.labelling.label`
over actors, each of which loads model and scorer once.

A shard is committed by the worker that made it, under its own name, so that the retry of a task, which Ray starts
when a worker dies, or of the whole job changes nothing that is there. Input, output, model and scorer lie where every
node sees them.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported, which reads it then

import ray
import ray.data

from pyengine import generation
from pyengine.errors import InputError, first_line, whole
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import Strategy
from pyengine.training import labelling
from pyengine.training.identity import terms
from pyengine.training.rows import Shard, Through, Worker

OBJECT_STORE = 128 * 2**20  # bytes, little above Ray's minimum: shards travel as their places in the file
RETRIES = 5  # of a shard whose worker died; Ray Data would go on for ever, also where the shard is what kills it
log = logging.getLogger("pyengine")
CONNECT = 5  # seconds to wait for a cluster to answer; Ray itself waits for minutes


def label(
    source: str | Path | Iterable[Mapping[str, Any]],
    scorer: ScorerLike,
    out: str | Path,
    *,
    model: str | Path | None = None,
    address: str = "local",
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """`pyengine.training.labelling.label` by the workers of a Ray cluster; the same shards, output and report.

    address: "local" starts a cluster on this machine for as long as this takes, "auto" or HOST:PORT joins one; where
    this process is part of one already, that is taken. workers: actors, by default one for each CPU, or for each GPU
    with device "cuda". A scorer that is a path is loaded by each worker, any other is sent to it.
    Raises InputError as `label` does, for what cannot be sent, if there is no such cluster, and where workers fail.
    """
    through = _spread(address, workers)
    return labelling.label(
        source,
        _absolute(scorer),
        out,
        model=_absolute(model),
        device=device,
        resume=resume,
        progress=progress,
        through=through,
    )


def generate(
    source: str | Path | Iterable[Mapping[str, Any]],
    model: str | Path,
    out: str | Path,
    *,
    strategy: Strategy | None = None,
    sampling: SamplingParams | None = None,
    scorer: ScorerLike | None = None,
    address: str = "local",
    workers: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`pyengine.generation.generate`, to which options go, by the workers of a Ray cluster; the same output and report.

    Each worker has an engine of its own: on a CPU give so many `workers` as there is memory for models, and `cache_gb`
    for the keys and values of each. address, workers: as `label` has them. A scorer that is no path is sent to each.
    Raises InputError as `generate` does, for what cannot be sent, if there is no such cluster, and where workers fail.
    """
    return generation.generate(
        source,
        _absolute(model),
        out,
        strategy=strategy,
        sampling=sampling,
        scorer=_absolute(scorer),
        device=device,
        resume=resume,
        progress=progress,
        through=_spread(address, workers),
        **options,
    )


def _spread(address: str, workers: int | None) -> Through:
    if workers is not None:
        whole(workers, "workers", 1)
    return partial(_through, address=address, workers=workers)


def _absolute(scorer: Any) -> Any:
    """A scorer or a model whose files are found from a worker's working directory too."""
    if isinstance(scorer, (str, os.PathLike)):
        return Path(scorer).absolute() if os.path.exists(scorer) else scorer
    if isinstance(scorer, Sequence):
        return [(weight, _absolute(part)) for weight, part in terms(scorer)]
    return scorer


class _Actor:
    """What an actor runs: one shard after another."""

    def __init__(self, place: ray.ObjectRef) -> None:
        self.place = place
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """A batch of one shard; a fault is a result, since Ray would wrap the exception."""
        shard = Shard(**{name: value.item() for name, value in batch.items()})
        try:
            if self.worker is None:
                self.worker = ray.get(self.place)
            return {"rows": [self.worker(shard)], "fault": [""]}
        except InputError as error:
            return {"rows": [0], "fault": [str(error)]}
        except Exception as error:
            log.exception("a worker failed")  # in Ray's log of it
            return {"rows": [0], "fault": [f"a worker failed with {type(error).__name__}: {first_line(error)}"]}


def _through(worker: Worker, shards: Sequence[Shard], address: str, workers: int | None) -> Iterator[int]:
    """Rows of each shard as it is committed, in whatever order that is."""
    _check_sent(worker)
    with _cluster(address), _quiet():
        try:
            for row in _placed(worker, shards, workers).iter_rows():
                if row["fault"]:
                    raise InputError(row["fault"])
                yield row["rows"]
        except ray.exceptions.RayError as error:
            how = f"Ray ended with {type(error).__name__}: {first_line(error)}"
            if isinstance(error, ray.exceptions.RayActorError):
                how = f"a shard's workers died {RETRIES + 1} times, the last with {first_line(error)!r}"
            raise InputError(
                f"{worker.source}: {how}; the other shards are kept: resume when there is memory enough, or without "
                "what kills them"
            ) from error


def _check_sent(worker: Worker) -> None:
    """InputError for what cannot be sent to another process, before a cluster is asked."""
    try:
        with open(os.devnull, "wb") as nowhere:
            ray.cloudpickle.dump(worker, nowhere, buffer_callback=lambda buffer: None)
    except Exception as error:  # as the scorer's own __getstate__ raises it
        raise InputError(
            f"the scorer or a setting cannot be sent to a Ray worker: {first_line(error)}; make what is in it where it "
            "is used, or give a directory"
        ) from error


def _placed(worker: Worker, shards: Sequence[Shard], workers: int | None) -> ray.data.Dataset:
    """The shards, to be worked on by actors of the cluster that this process is part of."""
    kind = "GPU" if worker.device.startswith("cuda") else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if not there:  # Ray would wait for one for ever
        raise InputError(f"the Ray cluster has no {kind}")
    places = ray.data.from_items([shard._asdict() for shard in shards], override_num_blocks=len(shards))
    return places.map_batches(
        _Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers or there, len(shards))),
        fn_constructor_args=(ray.put(worker),),  # a place: its scorer itself may be a model
        num_cpus=1 if kind == "CPU" else None,
        num_gpus=1 if kind == "GPU" else None,
        max_task_retries=RETRIES,
    )


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """The cluster at an address; one that was joined or started here is left when the block ends."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        _answers(address)
    try:
        ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """InputError if an address is HOST:PORT and nobody listens there."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), CONNECT).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"no Ray cluster at {address!r}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its own bars and its account of the plan; errors are still told."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])
