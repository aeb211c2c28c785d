"""What Prometheus reads: counts of this server's requests, and what the core last said of the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pyengine.serve.link import Link
from pyengine.serve.wire import Done, Piece

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
PHASES = ("admit", "prefill", "sample", "select", "commit", "end")


class Metrics:
    """One registry for each server, so that several in one process do not meet."""

    def __init__(self, link: Link) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(link))
        own: dict[str, Any] = {"registry": self.registry, "namespace": "pyengine"}
        seconds = own | {"buckets": SECONDS}
        self.answers = Counter("http_responses", "HTTP answers by route and status.", ["route", "status"], **own)
        self.finished = Counter("requests_finished", "Samples by finish reason.", ["reason"], **own)
        self.prompt = Counter("prompt_tokens", "Tokens of prompts.", **own)
        self.committed = Counter("committed_tokens", "Tokens of answers.", **own)
        self.kl = Counter("kl_nats", "KL from the base policy, summed over samples.", ["kind"], **own)
        self.first = Histogram("time_to_first_token_seconds", "Until the first commit of a stream.", **seconds)
        self.between = Histogram("time_between_commits_seconds", "From a commit of a stream to the next.", **seconds)
        self.whole = Histogram("request_seconds", "From request to answer.", **seconds)
        self.queued = Histogram("queue_seconds", "Until a sample was given memory.", **seconds)
        ranks = own | {"buckets": (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)}
        self.ranks = Histogram("kept_rank", "Rank of the branch that was kept, by the base policy.", **ranks)

    def answer(self, route: str, status: int) -> None:
        self.answers.labels(route, str(status)).inc()

    def done(self, done: Done) -> None:
        self.finished.labels(done.finish_reason).inc()
        self.committed.inc(len(done.tokens))
        self.kl.labels(done.kl_kind).inc(max(0.0, done.kl))  # a KL of 0 may be rounded to less
        self.queued.observe(done.queued)
        for rank in done.ranks:
            self.ranks.observe(rank)


class Clock:
    """The times of one stream's choices."""

    def __init__(self, metrics: Metrics, began: float) -> None:
        self._metrics, self._began = metrics, began
        self._last: dict[int, float] = {}

    def commit(self, piece: Piece) -> None:
        now, last = time.monotonic(), self._last.get(piece.choice)
        (self._metrics.first if last is None else self._metrics.between).observe(now - (last or self._began))
        self._last[piece.choice] = now


class _Engine:
    """What the core said last."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def collect(self) -> Iterator[Metric]:
        stats = self._link.stats.engine
        gauges = {
            "requests_running": ("running", "Samples that have rows."),
            "requests_waiting": ("waiting", "Samples that wait for rows or memory."),
            "rows": ("rows", "Branches that have a row in the step."),
            "captured_graphs": ("captured_graphs", "CUDA graphs that are kept."),
        }
        for name, (key, says) in gauges.items():
            value = self._link.waiting if key == "waiting" else stats.get(key, 0)
            yield GaugeMetricFamily(f"pyengine_{name}", says, value)
        for name, unit in (("pages", "of prefixes"), ("leaves", "of branches")):
            share = stats.get(f"{name}_in_use", 0) / max(1, stats.get(name, 0))
            yield GaugeMetricFamily(f"pyengine_{name}_used_ratio", f"Share of the cache {unit} in use.", share)
        yield GaugeMetricFamily("pyengine_up", "1 where the core runs.", float(self._link.dead is None))
        counters = {
            "drawn_tokens": "Tokens of all branches.",
            "cancelled": "Samples that nobody waited for any more.",
            "error": "Samples that failed.",
            "preempted": "Samples that gave their memory back and went on later.",
            "prefix_hit_tokens": "Tokens of prompts that were in the cache already.",
        }
        for key, says in counters.items():
            name = "failed" if key == "error" else key
            yield CounterMetricFamily(f"pyengine_{name}", says, stats.get(key, 0))
        steps = CounterMetricFamily("pyengine_step_seconds", "Seconds of the loop's steps.", labels=["phase"])
        for phase in PHASES:
            steps.add_metric([phase], stats.get(f"{phase}_seconds", 0.0))
        yield steps
