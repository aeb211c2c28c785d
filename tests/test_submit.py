"""Requests of every kind in one loop: submitted, stepped together, cancelled, preempted; the engine's own thread."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import pyengine
from pyengine import BestOfK, Blockwise, Engine, InputError, RequestError, SamplingParams, Tokenwise
from pyengine.cache import PAGE, budget_for
from pyengine.scorers import PrefixModel, load_scorer
from pyengine.worlds import reviews

ROOT = Path(__file__).parent.parent
PROMPTS = reviews.prompts(8)
KINDS = [Tokenwise(1.0), Blockwise(4, 8), None, Tokenwise(2.0)]


@pytest.fixture
def engine():
    return Engine.from_pretrained(pyengine.embedded("policy"), cache_gb=0.05)


def sampling(n=24, seed=0, **others):
    return SamplingParams(max_tokens=n, seed=seed, **others)


def pages(engine):
    return engine._decoder.cache


@pytest.mark.parametrize("what", [("check", "36"), ("soak", "250")], ids=lambda what: what[0])
def test_requests_of_every_kind_together_are_what_each_is_alone(what):
    """Recorded one by one, before there was a loop for all; `python -m bench.mixed check` takes them all."""
    command = [sys.executable, "-m", "bench.mixed", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_strategy_for_each_prompt(engine):
    engine.set_scorer(pyengine.embedded("prefix"))
    strategies = [None, Tokenwise(2.0), Blockwise(4, 8), BestOfK(3), Tokenwise(kl_budget=0.2), Blockwise(2, 16)]
    prompts = PROMPTS[:6]
    found = engine.generate(prompts, strategies, sampling())
    for prompt, strategy, result in zip(prompts, strategies, found, strict=True):
        (alone,) = engine.generate(prompt, strategy, sampling())
        assert result.tokens == alone.tokens
        assert result.kl == pytest.approx(alone.kl, abs=1e-4)
        assert len(result.blocks) == len(alone.blocks)
    with pytest.raises(InputError, match="6 prompts but 2 strategies"):
        engine.generate(prompts, strategies[:2])


def test_requests_name_their_own_scorers(engine):
    """A model with a cache of its own, a function and none, while the engine follows another."""
    engine.set_scorer(pyengine.embedded("probe"))
    scorers = [pyengine.embedded("reward-model"), lambda prompts, texts: [float(len(t)) for t in texts], None]
    handles = [engine.submit(PROMPTS[0], Blockwise(3, 8), sampling(), scorer) for scorer in scorers]
    names = [set(handle.result().rewards) for handle in handles]
    assert len({*map(frozenset, names)}) == 3
    assert "probe" in names[2]
    for scorer, handle in zip(scorers, handles, strict=True):
        with engine.following(scorer if scorer is not None else pyengine.embedded("probe")):
            assert engine.generate(PROMPTS[0], Blockwise(3, 8), sampling())[0].tokens == handle.result().tokens


def test_whoever_waits_drives_and_events_are_those_of_a_stream(engine):
    want = list(engine.stream(PROMPTS[0], None, sampling()))
    other = engine.submit(PROMPTS[1], None, sampling())
    handle = engine.submit(PROMPTS[0], None, sampling())
    assert list(handle) == want
    assert other.done or not other.done  # whichever: it was stepped beside
    assert other.result() == engine.generate(PROMPTS[1], None, sampling())[0]
    late = engine.submit(PROMPTS[0], None, sampling())
    late.result()
    (event,) = list(late)  # nobody listened: all of it at once
    assert (event.text, event.tokens, event.result) == (want[-1].result.text, want[-1].result.tokens, want[-1].result)


def test_leaving_an_iterator_early_cancels(engine):
    handle = engine.submit(PROMPTS[0], Blockwise(2, 4), sampling(200), lambda p, c: [0.0] * len(c))
    for event in handle:
        assert event.tokens
        break
    with pytest.raises(RequestError, match="cancelled"):
        handle.result()
    assert (pages(engine).pages_in_use, pages(engine).leaves_free) == (0, pages(engine).leaves)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_what_is_cancelled_is_free_with_the_next_step_and_others_go_on(engine, after):
    engine.eos = frozenset()
    want = engine.generate(PROMPTS[1], BestOfK(1), sampling(80))[0]
    gone = engine.submit(PROMPTS[0], None, sampling(200))
    stays = engine.submit(PROMPTS[1], BestOfK(1), sampling(80))
    for _ in range(after):
        engine._core.turn()
    gone.cancel()
    engine._core.turn()
    assert gone.done
    assert engine.stats()["running"] + engine.stats()["waiting"] == 1
    engine._decoder.check_integrity()
    assert stays.result().tokens == want.tokens
    with pytest.raises(RequestError, match="prompt 0: it was cancelled"):
        gone.result()
    stays.cancel()
    assert stays.result().tokens == want.tokens


def test_a_deadline_and_priorities(engine):
    engine._decoder.max_rows = 1
    late = engine.submit(PROMPTS[0], None, sampling(), deadline=0.0)
    time.sleep(0.01)
    with pytest.raises(RequestError, match="deadline has passed"):
        late.result()
    done = []
    handles = [engine.submit(PROMPTS[i], None, sampling(4), priority=p) for i, p in enumerate((0, 2, 1, -1))]
    for i, handle in enumerate(handles):
        handle.tell = lambda _, i=i: done.append(i)
    for handle in handles:
        handle.result()
    assert done == [3, 0, 2, 1]


def test_memory_that_runs_out_is_given_up_by_the_youngest_and_it_goes_on_with_the_same_tokens():
    """Four prompts that grow by two pages each, in a cache of seven."""
    policy = pyengine.embedded("policy")
    whole = Engine.from_pretrained(policy, cache_gb=0.05)
    whole.eos = frozenset()
    ids = [[*whole.encode(PROMPTS[0])[:8], i + 10] for i in range(4)]
    want = whole.generate(ids, None, sampling(130, seed=3))
    size = pages(whole).token_bytes
    small = Engine.from_pretrained(policy, cache_gb=budget_for(size, 7, 1) / 1e9)
    small.eos = frozenset()
    assert pages(small).capacity == 7
    done = []
    handles = [small.submit(prompt, None, sampling(130, seed=3)) for prompt in ids]
    for i, handle in enumerate(handles):
        handle.tell = lambda _, i=i: done.append(i)
    found = [handle.result() for handle in handles]
    assert [r.tokens for r in found] == [r.tokens for r in want]
    assert [r.text for r in found] == [r.text for r in want]
    streams = [small.stream(prompt, None, sampling(130, seed=3, stop="zzz")) for prompt in ids]
    texts = ["" for _ in ids]
    for events in itertools.zip_longest(*streams):
        for i, event in enumerate(events):
            texts[i] += event.text if event else ""
    assert texts == [r.text for r in want]
    assert small.stats()["preempted"] > 0
    assert done == [0, 1, 2, 3], "the oldest keeps its memory"
    pages(small).check_integrity()
    assert pages(small).pages_in_use == 0


def test_branches_wait_until_there_are_leaves_for_all_of_them(engine):
    """Two requests of eight branches each, where there is memory for nine: the second is admitted when the first is
    gone, though both prompts would fit."""
    size = pages(engine).token_bytes
    small = Engine.from_pretrained(pyengine.embedded("policy"), reviews.sentiment, cache_gb=9.5 * 16 * 4 * size / 1e9)
    assert pages(small).leaves == 9
    handles = [small.submit(prompt, BestOfK(8), sampling(16)) for prompt in PROMPTS[:2]]
    small._core.turn()
    assert small.stats()["waiting"] == 1
    assert pages(small).leaves_free == 1
    small._decoder.check_integrity()
    assert [handle.result().tokens for handle in handles]
    assert small.stats()["waiting"] == 0


@pytest.mark.parametrize(("listening", "want"), [(True, [PAGE, 1] * 4 + [5, 2]), (False, [4 * PAGE + 5, *[2] * 4])])
def test_a_long_prompt_is_read_beside_the_steps_of_others(engine, listening, want):
    """In pieces, a page at least for each token that those have which decode. A short one has its first at once."""
    engine.eos = frozenset()
    short = engine.submit(PROMPTS[0], None, sampling(40))
    short.listening = listening
    engine._core.turn()
    read = []
    forward = engine._decoder._forward
    engine._decoder._forward = lambda work, ids, *rest: read.append(len(ids)) or forward(work, ids, *rest)
    ids = [1 + i % 500 for i in range(4 * PAGE + 5)]
    long = engine.submit(ids, None, sampling(4))
    while len(read) < len(want):
        engine._core.turn()
    assert read[: len(want)] == want
    assert len(short.result().tokens) == 40
    assert long.result().tokens == engine.generate([ids], None, sampling(4))[0].tokens


@pytest.mark.parametrize(("shaped", "ends"), [({}, {0}), ({}, ()), ({"frequency_penalty": 1.0}, {0})])
def test_rows_of_a_light_model_idle_until_the_host_looks(shaped, ends):
    """At most eight steps later; they go on as where it looks after each, and what they draw meanwhile nobody has."""
    kinds = [None, Blockwise(2, 5), Tokenwise(1.0), Blockwise(16, 24)]
    found, drawn, turns = [], [], []
    for light in (True, False):
        engine = Engine.from_pretrained(pyengine.embedded("policy"), cache_gb=0.05, batch_invariant=True)
        engine.eos, core = frozenset(ends), engine._core
        assert engine._decoder.light
        engine._decoder.light = light
        probe, head = (load_scorer(pyengine.embedded(name)) for name in ("probe", "prefix"))
        scorers = [None, probe, PrefixModel(engine.model, engine.tokenizer, head), probe]
        each = [(p, kinds[i % 4], sampling(40, i, **shaped), scorers[i % 4]) for i, p in enumerate(PROMPTS)]
        each.append((PROMPTS[0], BestOfK(48), sampling(3, **shaped), probe))  # then looks are not at the ends of blocks
        handles = [engine.submit(*one) for one in each]
        steps = []
        while not core.schedule.idle:
            core.turn()
            steps.append(core.schedule.rows.steps)
        turns.append(steps)
        found.append([handle.result() for handle in handles])
        drawn.append(engine.stats()["drawn_tokens"])
    assert found[0] == found[1]
    assert drawn[0] == drawn[1]
    assert set(turns[1]) == {1}
    assert max(turns[0]) > 2
    assert len(turns[0]) < len(turns[1]) * (0.8 if shaped else 0.5)


@pytest.mark.parametrize(
    ("rows", "ends", "want"), [(8, [1, 2, 3, 4], 8), (8, [1, 2, 3, 4, 5], 5), (3, [1, 6, 6], 6), (1, [1], 1)]
)
def test_the_host_looks_where_more_than_half_of_the_rows_idle(engine, rows, ends, want):
    engine.eos = frozenset()
    for i in range(rows):
        engine.submit(PROMPTS[i], None, sampling([*ends, *[40] * rows][i]))
    engine._core.turn()
    assert engine._core.schedule.rows.steps == want


def test_a_plain_request_has_its_first_token_with_its_first_step(engine):
    """While sixteen requests of eight branches are under way."""
    busy = [engine.submit(PROMPTS[i % 8], Blockwise(8, 16), sampling(64, i), reviews.sentiment) for i in range(16)]
    for _ in range(5):
        engine._core.turn()
    plain = engine.submit(PROMPTS[3], None, sampling())
    plain.listening = True
    engine._core.turn()
    assert len(plain._events) == 1
    for handle in (plain, *busy):
        handle.cancel()


def test_a_thread_of_its_own(engine):
    want = engine.generate(PROMPTS[:4], None, [sampling(20, i) for i in range(4)])
    engine.start()
    engine.start()
    handles = [engine.submit(prompt, None, sampling(20, i)) for i, prompt in enumerate(PROMPTS[:4])]
    found = [handle.result(timeout=30) for handle in handles]
    again = engine.generate(PROMPTS[:4], None, [sampling(20, i) for i in range(4)])
    for some in (found, again):  # who joins when decides the last bits
        assert [r.tokens for r in some] == [r.tokens for r in want]
        assert [r.text for r in some] == [r.text for r in want]
    late = engine.submit(PROMPTS[5], None, sampling(30))
    assert engine.drain(timeout=30)
    assert late.done
    with pytest.raises(InputError, match="takes no more requests"):
        engine.submit(PROMPTS[0])
    engine.start()
    running = engine.submit(PROMPTS[0], BestOfK(2), sampling(400), lambda p, c: [0.0] * len(c))
    engine.close()
    with pytest.raises(RequestError):
        running.result()
    assert not [t for t in threading.enumerate() if t.name == "pyengine" and t.is_alive() and not engine._core._closing]


def test_clients_of_several_threads(engine):
    """Sixteen threads, each with requests of its own; every answer is its own."""
    want = {i: engine.generate(PROMPTS[i % 8], None, sampling(16, i))[0].tokens for i in range(32)}
    found = {}

    def client(i):
        torch.set_num_threads(1)
        for j in (i, i + 16):
            found[j] = engine.submit(PROMPTS[j % 8], None, sampling(16, j)).result().tokens

    threads = [threading.Thread(target=client, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == want


def test_async(engine):
    want = engine.generate(PROMPTS[:3], None, [sampling(12, i) for i in range(3)])

    async def run():
        handles = [engine.submit(prompt, None, sampling(12, i)) for i, prompt in enumerate(PROMPTS[:3])]
        pieces = [event.text async for event in handles[0]]
        return pieces, [await handle for handle in handles]

    pieces, found = asyncio.run(run())
    assert [r.tokens for r in found] == [r.tokens for r in want]
    assert "".join(pieces) == want[0].text


def test_a_step_that_fails_ends_what_was_under_way_and_nothing_else(engine):
    """An error of the engine's own, not of a request: each handle raises it, and the engine is whole again."""
    engine.eos = frozenset()
    first, second = (engine.submit(prompt, None, sampling(40)) for prompt in PROMPTS[:2])
    engine._core.turn()
    step = engine._decoder.step

    def fall(*_):
        raise MemoryError("no memory left")

    engine._decoder.step = fall
    with pytest.raises(MemoryError):
        first.result()
    engine._decoder.step = step
    for handle in (first, second):
        with pytest.raises(RequestError, match=r"cut short \(MemoryError: no memory left\)"):
            handle.result()
    pages(engine).check_integrity()
    assert pages(engine).pages_in_use == 0
    assert engine.generate(PROMPTS[0], None, sampling())


def test_a_call_hears_that_another_threads_step_failed(engine):
    engine.start()
    engine._decoder.step = lambda *_: 1 / 0
    with pytest.raises(RequestError, match="cut short"):
        engine.generate(PROMPTS[:3], None, sampling())


def test_an_engine_whose_thread_has_died_says_so(engine):
    engine.start()
    engine._decoder.step = lambda *_: 1 / 0
    handle = engine.submit(PROMPTS[0], None, sampling())
    with pytest.raises(RequestError, match="division by zero"):
        handle.result(timeout=30)
    while engine._core._thread is not None:
        time.sleep(0.01)
    with pytest.raises(InputError, match="this engine has stopped: division by zero"):
        engine.submit(PROMPTS[0], None, sampling())


def test_boundaries_lie_at_fixed_positions(engine, monkeypatch):
    """Where a single branch is committed does not depend on when others come and go."""
    committed = {}
    commit = engine._decoder.commit

    def noted(winners):
        for stem, _, length in winners:
            committed.setdefault(tuple(stem.ids), []).append(length)
        commit(winners)

    monkeypatch.setattr(engine._decoder, "commit", noted)
    engine.eos = frozenset()
    handles = []
    for i in range(6):
        handles.append(engine.submit(PROMPTS[i], None, sampling(50 + i)))
        for _ in range(3 + i):
            engine._core.turn()
    for handle in handles:
        handle.result()
    assert len(committed) == 6
    assert all(lengths == [16, 16, 16] for lengths in committed.values())
    assert PAGE % 16 == 0


def test_joining_leaving_and_other_numbers_capture_nothing_new(engine, monkeypatch):
    """As on a GPU: a graph's key is its buckets and the scorers that tilt; all else lies in tensors."""
    engine = Engine(engine.model, engine.tokenizer, pyengine.embedded("prefix"), cache_gb=0.05, frozen=True)
    engine.eos = frozenset({0})
    plain = [engine.generate(p, s, sampling(30, i)) for i, (p, s) in enumerate(zip(PROMPTS, KINDS * 2, strict=False))]
    monkeypatch.setattr(engine._decoder, "waits", True)

    def mixed(strategies):
        handles = []
        for i, prompt in enumerate(PROMPTS):
            handles.append(engine.submit(prompt, strategies[i % len(strategies)], sampling(30, i)))
            engine._core.turn()
        return [handle.result() for handle in handles]

    found = mixed(KINDS)
    assert [r.tokens for r in found] == [r.tokens for (r,) in plain]
    keys = set(engine._decoder.captured)
    others = [Tokenwise(0.7), Blockwise(3, 12), None, Tokenwise(3.0)]
    mixed(others)
    new = set(engine._decoder.captured) - keys
    assert not [key for key in new if key[1:] not in {key[1:] for key in keys}], "more than another bucket"
    before = len(engine._decoder.captured)
    mixed([Tokenwise(0.3), Blockwise(3, 12), None, Tokenwise(-1.0)])
    assert len(engine._decoder.captured) == before
