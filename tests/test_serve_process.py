"""The server as a process: clients that go away, limits, its end and the end of its core."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest

LONG = {
    "model": "policy",
    "prompt": "Review of the Harbour, a bakery:",
    "max_tokens": 300,
    "ignore_eos": True,
    "n": 8,
    "tilt_strategy": "blockwise",
    "tilt_k": 4,
    "tilt_block_tokens": 8,
}


@pytest.fixture(scope="module")
def server(serve):
    return serve()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_what_it_had(server, stream):
    before = server.metrics()["pyengine_cancelled_total"]
    connection = http.client.HTTPConnection(*server.address)
    connection.request("POST", "/v1/completions", json.dumps(LONG | {"stream": stream}), server.headers)
    while not server.metrics()["pyengine_rows"]:
        time.sleep(0.01)
    drawn = server.metrics()["pyengine_drawn_tokens_total"]
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert server.idle()
    assert server.metrics()["pyengine_cancelled_total"] == before + 8
    assert server.metrics()["pyengine_drawn_tokens_total"] - drawn < 8 * 4 * 300


def test_others_reach_it_only_with_a_key(tmp_path):
    command = [sys.executable, "-m", "pyengine", "serve", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--api-key" in done.stderr


def test_a_model_that_is_not_there_ends_it(tmp_path):
    command = [sys.executable, "-m", "pyengine", "serve", str(tmp_path / "nothing"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "pyengine: error: " in done.stderr
    assert "nothing" in done.stderr


def test_sigterm_finishes_what_runs_and_refuses_the_rest(serve):
    server = serve("--shutdown-timeout", "60")
    connection = http.client.HTTPConnection(*server.address)
    connection.request("POST", "/v1/completions", json.dumps(LONG | {"max_tokens": 480}), server.headers)
    while not server.metrics()["pyengine_rows"]:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    while server.get("/ready")[0] == 200:
        time.sleep(0.01)
    status, body = server.post("/v1/completions", LONG)
    assert (status, body["error"]["code"]) == (503, "draining")
    answer = connection.getresponse()
    assert answer.status == 200
    assert len(json.loads(answer.read())["choices"]) == 8
    assert server.process.wait(30) == 0


def test_a_dead_core_is_said_at_once(serve):
    server = serve()
    connection = http.client.HTTPConnection(*server.address)
    connection.request("POST", "/v1/completions", json.dumps(LONG), server.headers)
    while not server.metrics()["pyengine_rows"]:
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True)
    subprocess.run(["kill", "-9", *found.stdout.split()], check=True)
    assert connection.getresponse().status == 503
    assert server.get("/health")[0] == 503
    status, body = server.post("/v1/completions", LONG)
    assert (status, body["error"]["code"]) == (503, "core_dead")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_too_many_are_told_to_come_back(serve):
    server = serve("--max-queue", "2", "--max-requests", "6", "--max-rows", "4", "--max-k", "4", "--max-n", "8")
    status, body = server.post("/v1/completions", LONG)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "limit_exceeded", "n")
    connections = [http.client.HTTPConnection(*server.address) for _ in range(6)]
    for connection in connections:
        connection.request("POST", "/v1/completions", json.dumps(LONG | {"n": 1}), server.headers)
    statuses = [connection.getresponse().status for connection in connections]
    assert Counter(statuses)[429] >= 2
    assert Counter(statuses)[200] >= 2


def test_a_request_has_its_time(serve):
    server = serve("--request-timeout", "0.2")
    status, body = server.post("/v1/completions", LONG)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "--request-timeout" in body["error"]["message"]
    assert server.idle()


def test_other_sites_names_are_not_this_machine(server):
    for host, status in (("evil.example", 403), ("evil.example:80", 403), ("localhost:1", 200), ("[::1]:1", 200)):
        assert server.get("/v1/models", {"Host": host})[0] == status


def test_who_does_not_read_holds_nobody_up_for_long(serve):
    server = serve("--request-timeout", "2", "--max-requests", "4", "--max-n", "4")
    body = json.dumps(LONG | {"n": 4, "stream": True, "logprobs": 20, "max_tokens": 480}).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(server.address)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    while not server.metrics()["pyengine_rows"]:
        time.sleep(0.01)
    short = LONG | {"n": 1, "max_tokens": 4}
    assert server.post("/v1/completions", short)[0] == 429
    deadline = time.monotonic() + 8
    while server.post("/v1/completions", short)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slow.close()


def test_a_large_body_gets_413_and_the_end_of_its_connection(serve):
    server = serve("--max-body-bytes", "1000")
    connection = http.client.HTTPConnection(*server.address)
    connection.request("POST", "/v1/completions", b"x" * 2000, server.headers)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Connection"]) == (413, "close")
