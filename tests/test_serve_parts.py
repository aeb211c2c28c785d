"""The server's parts on their own: the fields of a request, the wire, the limits, what is shipped beside it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from pyengine import BestOfK, Blockwise, SamplingParams, Tokenwise
from pyengine.decode.grammar import compile_grammar
from pyengine.errors import InputError
from pyengine.named import scorer_named
from pyengine.ops.linear import Int8Linear
from pyengine.serve import talk
from pyengine.serve.answers import Answer
from pyengine.serve.core import Core
from pyengine.serve.limits import Limits, Refused
from pyengine.serve.link import GONE, Link
from pyengine.serve.metrics import Metrics
from pyengine.serve.protocol import Chat, Completion, prompts_of, sampling_in
from pyengine.serve.wire import HEADER, Cancel, CoreOptions, Done, Failed, Job, Wire, framed
from pyengine.vocabulary import FieldError, Tilt, tilt_of

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("fields", "tilt"),
    [
        ({}, Tilt()),
        ({"tilt_scorer": "helpful"}, Tilt(None, {"helpful": 1.0})),
        ({"tilt_strategy": "tokenwise"}, Tilt(Tokenwise(1.0))),
        ({"tilt_strategy": "tokenwise", "tilt_weight": -2}, Tilt(Tokenwise(-2.0))),
        ({"tilt_strategy": "tokenwise", "tilt_kl_budget": 0.1, "tilt_k": None}, Tilt(Tokenwise(kl_budget=0.1))),
        ({"tilt_strategy": "blockwise"}, Tilt(Blockwise())),
        ({"tilt_strategy": "blockwise", "tilt_k": 4, "tilt_block_tokens": 5}, Tilt(Blockwise(4, 5))),
        (
            {"tilt_strategy": "best_of_k", "tilt_selection": "softmax", "tilt_beta": 0.5},
            Tilt(BestOfK(8, "softmax", 0.5)),
        ),
        (
            {"tilt_strategy": "best_of_k", "tilt_scorer": "helpful=1, brief=.3", "tilt_candidates": 1},
            Tilt(BestOfK(), {"helpful": 1.0, "brief": 0.3}, True),
        ),
        ({"tilt_scorer": {"helpful": 1, "brief": -0.5}}, Tilt(None, {"helpful": 1.0, "brief": -0.5})),
    ],
)
def test_tilt_fields(fields, tilt):
    assert tilt_of(fields) == tilt


@pytest.mark.parametrize(
    ("field", "others"),
    [
        ("tilt_strenght", {"tilt_strenght": 1}),
        ("tilt_strategy", {"tilt_strategy": "greedy"}),
        ("tilt_strategy", {"tilt_strategy": ["tokenwise"]}),
        ("tilt_k", {"tilt_k": 4}),
        ("tilt_k", {"tilt_strategy": "blockwise", "tilt_k": 0}),
        ("tilt_k", {"tilt_strategy": "blockwise", "tilt_k": True}),
        ("tilt_k", {"tilt_strategy": "blockwise", "tilt_k": "4"}),
        ("tilt_block_tokens", {"tilt_strategy": "best_of_k", "tilt_block_tokens": 4}),
        ("tilt_weight", {"tilt_strategy": "tokenwise", "tilt_weight": float("nan")}),
        ("tilt_weight", {"tilt_strategy": "tokenwise", "tilt_weight": 1e300}),
        ("tilt_kl_budget", {"tilt_strategy": "tokenwise", "tilt_kl_budget": 0}),
        ("tilt_kl_budget", {"tilt_strategy": "tokenwise", "tilt_kl_budget": 1, "tilt_weight": 1}),
        ("tilt_beta", {"tilt_strategy": "blockwise", "tilt_beta": 1}),
        ("tilt_beta", {"tilt_strategy": "blockwise", "tilt_selection": "softmax"}),
        ("tilt_selection", {"tilt_strategy": "blockwise", "tilt_selection": "max"}),
        ("tilt_candidates", {"tilt_candidates": "yes"}),
        ("tilt_scorer", {"tilt_scorer": ""}),
        ("tilt_scorer", {"tilt_scorer": {}}),
        ("tilt_scorer", {"tilt_scorer": ["helpful"]}),
        ("tilt_scorer", {"tilt_scorer": "helpful="}),
        ("tilt_scorer", {"tilt_scorer": "helpful=much"}),
        ("tilt_scorer", {"tilt_scorer": "helpful=nan"}),
        ("tilt_scorer", {"tilt_scorer": "helpful,helpful"}),
        ("tilt_scorer", {"tilt_scorer": {"helpful": True}}),
    ],
)
def test_a_wrong_tilt_field_is_named(field, others):
    with pytest.raises(FieldError) as caught:
        tilt_of(others)
    assert caught.value.field == field


def test_messages_become_what_templates_know():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    chat = Chat(messages=[{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}])
    assert prompts_of(chat) == [
        {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello there"}]}
    ]
    for wrong in (None, 5, [{"type": "image_url", "image_url": {"url": "http://x"}}]):
        with pytest.raises(Refused) as caught:
            prompts_of(Chat(messages=[{"role": "user", "content": wrong}]))
        assert (caught.value.status, caught.value.param) == (400, "messages")
    more = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    prompts_of(Chat(messages=more, continue_final_message=True, add_generation_prompt=False))
    with pytest.raises(Refused, match="is continued"):
        prompts_of(Chat(messages=more, continue_final_message=False))


def test_a_request_without_a_length_gets_the_default():
    limits = Limits(default_max_tokens=7)
    assert sampling_in(Completion(prompt="a"), limits).max_tokens == 7
    messages = [{"role": "user", "content": "a"}]
    assert sampling_in(Chat(messages=messages, max_completion_tokens=5), limits).max_tokens == 5
    with pytest.raises(Refused) as caught:
        sampling_in(Chat(messages=messages, max_completion_tokens=0), limits)
    assert caught.value.param == "max_completion_tokens"


@pytest.mark.parametrize(
    ("limit", "flag"),
    [("requests", "--max-requests"), ("max_tokens", "--max-tokens"), ("default_max_tokens", "--default-max-tokens")],
)
def test_a_limit_of_nothing_is_named_by_its_flag(limit, flag):
    with pytest.raises(InputError, match=flag):
        Limits(**{limit: 0})


def test_the_wire_takes_messages_however_they_are_cut():
    ours, theirs = socket.socketpair()
    wire = Wire(theirs)
    data = b"".join(framed(Cancel(number)) for number in range(3))
    assert wire.take() == []
    found = []
    for start in range(0, len(data), 7):
        ours.sendall(data[start : start + 7])
        found += wire.take()
    assert found == [Cancel(0), Cancel(1), Cancel(2)]
    ours.close()
    assert wire.take(None) == []
    assert wire.closed


@pytest.fixture
def core():
    """In this process, with its wire's other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Core(CoreOptions(scorers=(("length", "length"),), cache_gb=0.05), Wire(theirs)), Wire(ours)


@pytest.mark.parametrize(
    ("options", "layer", "dtype"),
    [({"quantize": "int8"}, Int8Linear, torch.int8), ({"dtype": "bfloat16"}, torch.nn.Linear, torch.bfloat16)],
)
def test_the_core_s_numbers_are_as_narrow_as_it_is_told(options, layer, dtype):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        head = Core(CoreOptions(cache_gb=0.05, **options), Wire(theirs)).engine.model.lm_head
    assert (type(head), head.weight.dtype) == (layer, dtype)


@pytest.mark.parametrize("listening", [False, True])
def test_what_was_cancelled_is_free_within_two_steps(core, listening):
    core, _ = core
    sampling = SamplingParams(max_tokens=200, ignore_eos=True, seed=1, n=2)
    out = []
    core._obey(Job(1, ["Review of"], Blockwise(4, 8), sampling, None, listening, False), out)
    core._obey(Job(2, ["Review of"], None, sampling, None, listening, False), out)
    for _ in range(12):
        core.engine.step()
        core._collect(out)
    assert core.engine.stats()["rows"] == 10
    core._obey(Cancel(1), out)
    core._obey(Cancel(2), out)
    core.engine.step()
    core.engine.step()
    stats = core.engine.stats()
    assert [stats[name] for name in ("running", "waiting", "rows", "pages_in_use", "leaves_in_use")] == [0] * 5
    assert core.jobs == {}


def test_a_step_that_fails_ends_its_requests_and_two_end_the_core(core, monkeypatch):
    core, front = core
    step, failing = core.engine.step, [True]

    def fails():
        if not core.engine._core.schedule.idle and failing:
            failing.pop()
            core.engine._core.schedule.abort(RuntimeError("out of memory"))
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(core.engine, "step", fails)
    sampling = SamplingParams(max_tokens=8, seed=1)
    front.send(Job(1, ["Review of"], None, sampling, None, False, False))
    running = threading.Thread(target=core.run)
    running.start()
    heard = []
    while not any(isinstance(message, Failed) for message in heard):
        heard += [message for batch in front.take(None) for message in batch]
    assert "out of memory" in next(message.message for message in heard if isinstance(message, Failed))
    front.send(Job(2, ["Review of"], None, sampling, None, False, False))
    while not any(isinstance(message, Done) for message in heard):
        heard += [message for batch in front.take(None) for message in batch]
    front._socket.shutdown(socket.SHUT_RDWR)
    running.join()


def test_nobody_waits_while_a_grammar_is_compiled(core, monkeypatch):
    core, front = core
    going, compiled = threading.Event(), compile_grammar

    def slow(*arguments):
        going.wait(30)
        return compiled(*arguments)

    monkeypatch.setattr("pyengine.serve.core.compile_grammar", slow)
    digits = SamplingParams(max_tokens=8, seed=1, grammar={"regex": "[0-9]{3}"})
    front.send(Job(1, ["Review of"], None, digits, None, False, False))
    front.send(Job(2, ["Review of"], None, digits, None, False, False))
    front.send(Job(3, ["Review of"], None, SamplingParams(max_tokens=8, seed=1), None, False, False))
    running = threading.Thread(target=core.run)
    running.start()
    heard = []

    def hear(number):
        while not any(isinstance(message, Done) and message.number == number for message in heard):
            heard.extend(message for batch in front.take(None) for message in batch)

    hear(3)
    front.send(Cancel(2))
    time.sleep(0.1)
    going.set()
    hear(1)
    front._socket.shutdown(socket.SHUT_RDWR)
    running.join()
    done = [message for message in heard if isinstance(message, Done)]
    assert [message.number for message in done] == [3, 1]
    assert done[1].text.strip().isdigit()
    assert core.taken == 3


def test_a_stream_with_nothing_to_show_says_that_it_lives(monkeypatch):
    monkeypatch.setattr(talk, "QUIET", 0.05)
    link = Link(CoreOptions())

    async def listen():
        link._writer = SimpleNamespace(write=lambda data: None)
        job = (["a"], None, SamplingParams(), None, True, False)
        one = talk.Talk(link, Limits(), Metrics(link), Job, *job, prompts="prompt")
        stream = one.stream(Answer("policy", False, 1), 1, False)
        first = await anext(stream)
        one._queue.put_nowait(Failed(1, "over", False))
        rest = [piece async for piece in stream]
        assert link.live == 1
        one.end()
        return first, rest

    first, rest = asyncio.run(listen())
    assert first.startswith(b":")
    assert b"over" in rest[-2]
    assert link.live == 0


def test_the_first_wrong_element_ends_a_list():
    for wrong in ({"prompt": [1.5] * 50_000}, {"prompt": "a", "bad_words": [1] * 1000}):
        with pytest.raises(ValidationError) as caught:
            Completion.model_validate(wrong)
        assert caught.value.error_count() < 10
    for wrong in ({"stop": ["a"] * 2000}, {"logit_bias": {str(i): 1 for i in range(2000)}}, {"priority": -1}):
        with pytest.raises(ValidationError):
            Completion.model_validate({"prompt": "a"} | wrong)


def test_a_message_that_cannot_be_read_is_the_end_of_the_core():
    async def hear():
        link = Link(CoreOptions())
        reader = asyncio.StreamReader()
        reader.feed_data(HEADER.pack(3) + b"???")
        await link._read(reader)
        return link.dead

    assert asyncio.run(hear()) == GONE


def test_the_front_needs_no_torch():
    code = "import sys, pyengine.serve.run; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_of_a_file_is_a_scorer(tmp_path):
    (tmp_path / "own.py").write_text("def brief(prompts, completions):\n    return [-len(c) for c in completions]\n")
    assert scorer_named(f"{tmp_path}/own.py:brief")(["p"], ["four"]) == [-4]
    assert scorer_named("pyengine.worlds.reviews:politeness") is not None
    for wrong, says in (
        (f"{tmp_path}/own.py:long", "no function 'long'"),
        (f"{tmp_path}/other.py:brief", "FileNotFoundError"),
        ("no.module:brief", "ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=says):
            scorer_named(wrong)


def test_the_dashboard_asks_for_metrics_that_are_there(serve):
    server = serve()
    there = {re.sub(r"\{.*", "", name) for name in server.metrics()}
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"pyengine_\w+", target["expr"])
    }
    labelled = {"pyengine_kl_nats_total", "pyengine_http_responses_total", "pyengine_requests_finished_total"}
    assert asked - labelled <= there
    server.post("/v1/completions", {"prompt": "Review of", "max_tokens": 3})
    there = {re.sub(r"\{.*", "", name) for name in server.metrics()}
    assert asked <= there
