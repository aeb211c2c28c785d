"""Decoding side by side: this engine's strategy, the same without one, and what people do without this engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from pyengine.bench import hosted, measures, paired, workload
from pyengine.bench.contenders import Contender, Forked, Generated, Run, by_blocks, by_engine
from pyengine.bench.measures import Sample
from pyengine.bench.report import Report, entry
from pyengine.bench.sensors import Watch, joules
from pyengine.bench.shapes import engine_of
from pyengine.bench.turns import extra_peak, orders, timed
from pyengine.bench.workload import Ask
from pyengine.engine import Engine
from pyengine.errors import InputError, real, whole
from pyengine.profiling import measured_rates
from pyengine.scorers import PrefixScorer, Probe, Scorer
from pyengine.strategies import BASE, BestOfK, Blockwise, Strategy, Tokenwise

OURS = "pyengine"
BASELINES = ("generate", "fork", "plain", "vllm")
GREEDY = Ask([], 16)  # of the check that all say the same: tokens of the answer


@dataclass(frozen=True)
class Task:
    """What `pyengine bench throughput` measures. sizes: (tokens of the prompt, of the answer) of each request; shared:
    tokens that all prompts of a round begin with."""

    model: str
    strategy: Strategy
    sizes: Sequence[tuple[int, int]]
    shared: int = 0
    baselines: Sequence[str] = ("generate", "fork", "plain")
    rounds: int = 12
    max_seconds: float = 300.0
    device: str = "cpu"
    cache_gb: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole(self.rounds, "--rounds", 1)
        real(self.max_seconds, "--max-seconds", 0)
        for name in self.baselines:
            if name not in BASELINES:
                raise InputError(f"--baselines {name}: there are {', '.join(BASELINES)}")
            if isinstance(self.strategy, Tokenwise) and self.strategy != BASE and name != "plain":
                raise InputError(f"--baselines {name}: it does not tilt tokens: compare tokenwise with plain")
        if self.strategy == BASE and "plain" in self.baselines:
            raise InputError("--baselines plain: that is the strategy base itself; leave it out")
        if "vllm" in self.baselines:
            hosted.check()


def run(task: Task, say: Callable[[str], object] = lambda line: None) -> Report:
    """All contenders in turns, in a new order each round; the first round warms up and takes their memory's peak.

    say: told what is going on. InputError for what does not fit, before anything is timed.
    """
    deadline = time.monotonic() + task.max_seconds
    # vLLM starts a process, which is to have none of our threads.
    longest = max(prompt + answer for prompt, answer in task.sizes)
    hosts: dict[str, Contender] = {}
    if "vllm" in task.baselines:
        dtype = "float32" if task.device == "cpu" else "bfloat16"
        hosts["vllm"] = hosted.by_vllm(task.model, task.strategy, longest, dtype)
    engine = engine_of(task.model, task.device, task.cache_gb)
    if engine.context is not None and longest > engine.context:
        raise InputError(
            f"--lengths: a prompt and its answer have {longest} tokens, {engine.name} reads {engine.context}"
        )
    watch, device = Watch(engine.model.device), engine.model.device
    contenders = contenders_of(task, engine) | hosts
    say(f"{engine.name}: {', '.join(contenders)} in turns")
    notes = differing(contenders, _asked(task, engine, 0)[0])
    peaks, samples, done = _rounds(task, engine, contenders, deadline, say)
    if done < task.rounds:
        notes.append(f"{done} of {task.rounds} rounds: --max-seconds {task.max_seconds:g} was over")
    if done < paired.FEWEST:
        notes.append(f"{done} rounds: fewer than {paired.FEWEST} tell nothing")
    rates = measured_rates(device, engine.model.dtype)
    block = task.strategy.block_tokens or max(answer for _, answer in task.sizes)
    entries = []
    for name, own in samples.items():
        shape = (1, None) if name == "plain" else (task.strategy.k, task.strategy.block_tokens)
        least = measures.least_seconds(engine.model, task.sizes, task.shared, *shape, rates)
        extra = measures.row(own, block, least, sum(prompt for prompt, _ in task.sizes))
        if name in hosts:  # another process, whose memory and cache are not seen
            del extra["prefix_hit_rate"]
        else:
            extra["extra_peak_bytes"] = peaks[name]
        extra["anchor"] = name == next(iter(task.baselines), None)  # of `bench compare`
        extra["cpu_data"] = [sample.took.cpu for sample in own]
        times = [sample.took.wall for sample in own]
        if name != OURS:
            extra["times_as_long"] = paired.ratio(times, [s.took.wall for s in samples[OURS]])._asdict()
            extra["pyengine_is"] = paired.Ratio(**extra["times_as_long"]).verdict
        entries.append(entry("throughput", name, times, extra))
    settings = asdict(task) | {"strategy": repr(task.strategy), "baselines": list(task.baselines), "rounds": done}
    settings |= {"name": engine.name, "rates": rates._asdict()}
    return Report("throughput", settings, [*watch.warnings(), *notes], entries)


def contenders_of(task: Task, engine: Engine) -> dict[str, Contender]:
    """By name, on one model: between its passes it is as its owner left it."""
    model, strategy = engine.model, task.strategy
    scorer = _followed(engine, strategy)
    found = {OURS: by_engine(engine, strategy, scorer)}
    block = strategy.block_tokens if strategy.k > 1 else None
    weight = torch.zeros(1, model.config.get_text_config(decoder=True).hidden_size)
    if isinstance(scorer, Probe):
        weight = scorer.head.weight.detach()
    probe = weight.to(model.device, model.dtype)
    makers: Mapping[str, Callable[[], Contender]] = {
        "generate": lambda: by_blocks(Generated, model, probe, strategy.k, block),
        "fork": lambda: by_blocks(Forked, model, probe, strategy.k, block),
        "plain": lambda: by_engine(engine, BASE, None),
    }
    return found | {name: makers[name]() for name in task.baselines if name in makers}


def _followed(engine: Engine, strategy: Strategy) -> Scorer | None:
    """Random weights, the same in each run: a probe for branches, a prefix scorer for tokens."""
    width = engine.model.config.get_text_config(decoder=True).hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if isinstance(strategy, (Blockwise, BestOfK)) and strategy.k > 1:
            return Probe(width)
        if isinstance(strategy, Tokenwise) and strategy != BASE:
            return PrefixScorer(width, engine.policy.vocab_size, width=128)
    return None


def _asked(task: Task, engine: Engine, number: int) -> list[Ask]:
    return workload.asked(list(task.sizes), engine.policy.vocab_size, task.shared, 1000 * task.seed + number)


def differing(contenders: Mapping[str, Contender], ask: Ask) -> list[str]:
    """Who does not say greedily what this engine says: then they do not do the same work."""
    asks = [Ask(ask.prompt[:128], min(ask.tokens, GREEDY.tokens))]
    answers = {name: contender(asks, 0, True).tokens[0] for name, contender in contenders.items()}
    found = []
    for name, tokens in answers.items():
        at = next((i for i, (a, b) in enumerate(zip(tokens, answers[OURS], strict=False)) if a != b), None)
        if at is not None:
            found.append(f"{name} differs from {OURS} at token {at} of a greedy answer: they do not do the same work")
    return found


def _rounds(
    task: Task, engine: Engine, contenders: Mapping[str, Contender], deadline: float, say: Callable[[str], object]
) -> tuple[dict[str, int], dict[str, list[Sample]], int]:
    """(memory's peaks, samples, rounds); none is begun that would end after the deadline, if it took as long as the
    longest before."""
    device, peaks = engine.model.device, dict[str, int]()
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    wanted, longest = [answer for _, answer in task.sizes], 0.0
    for number, order in enumerate(orders(list(contenders), task.seed)):
        began = time.monotonic()
        if number > task.rounds or (number > 1 and began + longest > deadline):
            return peaks, samples, number - 1
        asks = _asked(task, engine, number + 1)
        for name in order:
            contender = contenders[name]
            if number == 0:
                came, peaks[name] = extra_peak(lambda: contender(asks, number, False), device)
            else:
                came, sample = _turn(lambda: contender(asks, number, False), device)
                samples[name].append(sample)
            if list(map(len, came.tokens)) != wanted:
                raise InputError(f"{name} answered with {list(map(len, came.tokens))} tokens where {wanted} were asked")
        longest = max(longest, time.monotonic() - began)
        say(f"round {number} of {task.rounds}: {longest:.1f} s at most" if number else "warm")
    raise AssertionError  # orders are endless


def _turn(work: Callable[[], Run], device: torch.device) -> tuple[Run, Sample]:
    before = joules(device)
    came, took = timed(work, device)
    after = joules(device)
    return came, Sample(came, took, None if before is None or after is None or after < before else after - before)
