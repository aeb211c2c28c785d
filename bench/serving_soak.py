"""Whatever clients do to the server, nobody else's answer suffers and nothing is left behind.

`python -m bench.serving soak [N]`: N requests of every kind from 32 clients. A tenth is cancelled midway, half of
them by closing the stream and half by dropping the socket. Among the others are bodies that are no JSON, prompts that
are too long, scorers that are not there and one that raises, and a client process is killed. Each answer has the
status that it should have, 100 are the same when asked for again alone, no page is in use afterwards, and memory has
not grown.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from bench.serving import CLIENTS, Client, record, served
from pyengine.worlds import reviews

FAULTY = "def raises(prompts, completions):\n    raise ValueError('it always does')\n"
# fault -> the status it gets
FAULTS = {"malformed": 400, "oversized": 400, "unknown scorer": 400, "raises": 500, "no model": 404, "limit": 400}
SCHEMA = {
    "type": "object",
    "properties": {"stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["stars"],
    "additionalProperties": False,
}
KINDS = ("base", "tokenwise", "budget", "blockwise", "best of k", "soft", "two scorers", "json")
PROMPTS = reviews.prompts(64)


def kind_of(draw: random.Random) -> dict[str, Any]:
    """The fields of one kind of request."""
    blockwise = {"tilt_strategy": "blockwise", "tilt_k": draw.randint(2, 8), "tilt_block_tokens": draw.randint(3, 16)}
    format_ = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    return {
        "base": {},
        "tokenwise": {"tilt_strategy": "tokenwise", "tilt_weight": draw.uniform(-4, 8)},
        "budget": {"tilt_strategy": "tokenwise", "tilt_kl_budget": draw.uniform(0.01, 0.3)},
        "blockwise": blockwise,
        "best of k": {"tilt_strategy": "best_of_k", "tilt_k": draw.randint(2, 6), "tilt_scorer": "sentiment"},
        "soft": blockwise | {"tilt_selection": "softmax", "tilt_beta": draw.uniform(0.1, 1)},
        "two scorers": blockwise | {"tilt_scorer": {"prefix": 1.0, "length": 0.02, "sentiment": 0.5}},
        "json": blockwise | {"response_format": format_, "max_tokens": 60},
    }[draw.choice(KINDS)]


def request(number: int) -> tuple[str, dict[str, Any]]:
    """(what becomes of it, body) of the request with this number."""
    draw = random.Random(number)
    body: dict[str, Any] = {"prompt": draw.choice(PROMPTS), "seed": number, "max_tokens": draw.randint(4, 80)}
    body |= {"temperature": draw.choice((0.7, 1.0, 1.3))} | kind_of(draw)
    if draw.random() < 0.2:
        body["n"] = draw.randint(2, 4)
    if draw.random() < 0.15:
        body["logprobs"] = draw.randint(0, 4)
    if draw.random() < 0.1:
        body["stop"] = ["the", " was"]
    if draw.random() < 0.4:
        body["stream"] = True
    if number % 10 == 3:
        closed = number % 20 == 3
        endless = {"prompt": body["prompt"], "seed": number, "max_tokens": 400, "ignore_eos": True, "n": 2}
        return ("closed" if closed else "dropped"), endless | {"stream": closed}
    if number % 25 == 7:
        fault = draw.choice(list(FAULTS))
        wrong: dict[str, dict[str, Any]] = {
            "malformed": {},
            "oversized": {"prompt": "word " * 600},
            "unknown scorer": {"tilt_strategy": "blockwise", "tilt_scorer": "../../secret"},
            "raises": {"tilt_strategy": "blockwise", "tilt_scorer": "raises", "stream": False},
            "no model": {"model": "another"},
            "limit": {"max_tokens": 10**6},
        }
        return fault, {"prompt": body["prompt"], "seed": number, "max_tokens": 16} | wrong[fault]
    return "answered", body


def said(answer: Any) -> list[tuple[str, str]]:
    """Text and finish reason of each choice, whole or streamed."""
    if isinstance(answer, dict):
        return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
    texts, ends = dict[int, str](), dict[int, str]()
    for choice in (choice for piece in answer for choice in piece["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ends[choice["index"]] = choice["finish_reason"] or ends.get(choice["index"], "")
    return [(texts[index], ends[index]) for index in sorted(texts)]


def memory(pid: int) -> int:
    """Bytes that a process and its children hold."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    statuses = [Path(f"/proc/{one}/status").read_text() for one in (str(pid), *children)]
    return sum(1024 * int(line.split()[1]) for text in statuses for line in text.splitlines() if "VmRSS" in line)


def metrics(host: str, port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def storm(host: str, port: int, pid: int, count: int) -> tuple[dict[int, Any], Counter[str], dict[int, int]]:
    """The answers by number, what became of all, and the memory as the number that was served goes by."""
    answers: dict[int, Any] = {}
    became: Counter[str] = Counter()
    held: dict[int, int] = {}
    numbers = iter(range(count))

    async def client() -> None:
        own = Client(host, port)
        for number in numbers:
            fate, body = request(number)
            if fate in ("closed", "dropped"):
                await own.send("/v1/completions", body)
                assert own.reader is not None
                if fate == "closed":
                    await own.reader.readuntil(b"data: ")  # the stream has begun
                else:
                    await asyncio.sleep(0.05)
                own.close()
                became[fate] += 1
            else:
                status, answer = await own.post("/v1/completions", b'{"prompt": ' if fate == "malformed" else body)
                if status != FAULTS.get(fate, 200):
                    raise SystemExit(f"request {number} ({fate}) got {status}: {answer}")
                if fate == "answered":
                    answers[number] = said(answer)
                became[fate] += 1
            if became.total() % 100 == 0:
                held[became.total()] = memory(pid)
        own.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers, became, held


def killed(host: str, port: int) -> None:
    """A client process that is killed in the middle of a stream."""
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 4})
    code = f"""
import http.client, time
connection = http.client.HTTPConnection({host!r}, {port})
connection.request("POST", "/v1/completions", {body!r}, {{"Content-Type": "application/json"}})
print(connection.getresponse().read(100), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()


def soak(count: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        faulty = Path(directory) / "faulty.py"
        faulty.write_text(FAULTY)
        scorers = [f"--scorer={name}" for name in ("prefix", "sentiment", "length", f"raises={faulty}:raises")]
        with served(*scorers, "--cache-gb=0.007", "--max-rows=96") as (host, port, process):
            killed(host, port)
            begun = time.perf_counter()
            answers, became, held = asyncio.run(storm(host, port, process.pid, count))
            seconds = time.perf_counter() - begun
            deadline = time.monotonic() + 5
            while True:
                after = metrics(host, port)
                names = ("requests_running", "requests_waiting", "rows", "pages_used_ratio", "leaves_used_ratio")
                left = {name: after[f"pyengine_{name}"] for name in names if after[f"pyengine_{name}"]}
                if not left or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            again = random.Random(0).sample(sorted(answers), min(100, len(answers)))
            alone = Client(host, port)

            async def once_more() -> list[int]:
                return [n for n in again if said((await alone.post("/v1/completions", request(n)[1]))[1]) != answers[n]]

            differ = asyncio.run(once_more())
    growth = held[count // 100 * 100] / held[max(100, count // 200 * 100)] - 1
    row = {
        "requests": count,
        "seconds": seconds,
        "became": dict(became),
        "preempted": after["pyengine_preempted_total"],
        "differ_when_alone": len(differ),
        "asked_again": len(again),
        "left_in_use": left,
        "memory_growth_in_the_second_half": growth,
    }
    print(json.dumps(row))
    record("soak", row)
    if differ or left or became.total() != count:
        raise SystemExit(f"differ: {differ}; left in use: {left}; answered: {became.total()} of {count}")
    if count >= 2000 and growth > 0.02:
        raise SystemExit(f"memory grew by {growth:.1%}: {held}")
