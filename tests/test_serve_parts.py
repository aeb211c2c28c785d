"""The server's parts on their own: the fields of a request, the wire, the limits, what is shipped beside it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pyengine import BestOfK, Blockwise, Tokenwise
from pyengine.errors import InputError
from pyengine.named import scorer_named
from pyengine.serve.limits import Limits, Refused
from pyengine.serve.protocol import Chat, Completion, prompts_of, sampling_in
from pyengine.serve.wire import Cancel, Wire, framed
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


def test_the_front_needs_no_torch():
    code = "import sys, pyengine.serve.run; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_of_a_file_is_a_scorer(tmp_path):
    (tmp_path / "own.py").write_text("def brief(prompts, completions):\n    return [-len(c) for c in completions]\n")
    assert scorer_named(f"{tmp_path}/own.py:brief")(["p"], ["four"]) == [-4]
    assert scorer_named("pyengine.worlds.reviews:length") is not None
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
