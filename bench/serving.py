"""The server under load: as quick as `generate`, and whole after everything that clients do to it.

    python -m bench.serving time [MODEL ...]  # 32 clients and `generate` at 32 rows; writes bench/results/serving.json
    python -m bench.serving soak [N]          # N mixed requests of 32 clients, a tenth cancelled, faults among them

Without a MODEL directory it is the embedded policy.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyengine
from pyengine import Engine, SamplingParams
from pyengine.worlds import reviews

RESULTS = Path(__file__).parent / "results" / "serving.json"
CLIENTS, ROUNDS = 32, 7


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, int, subprocess.Popen[str]]]:
    """Host and port of a server, and its process."""
    command = [sys.executable, "-m", "pyengine", "serve", "--port", "0", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, text=True)
        try:
            while True:
                time.sleep(0.2)
                log.seek(0)
                said = log.read()
                found = re.search(r"is served at http://([\d.]+):(\d+)", said)
                if found:
                    break
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start: {said}")
            yield found[1], int(found[2]), process
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise SystemExit(f"the server ended with {process.returncode}")
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            process.kill()


class Client:
    """One connection, kept open: less of the machine than a client library takes, as both cores are shared."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, path: str, body: Any) -> None:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await self.writer.drain()

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON, or the events of a stream."""
        await self.send(path, body)
        assert self.reader is not None
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split()[1])
        if "transfer-encoding: chunked" in head:
            data = b""
            while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
                data += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
            return status, [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]
        length = re.search(r"content-length: (\d+)", head)
        data = await self.reader.readexactly(int(length[1]) if length else 0)
        if "connection: close" in head:
            self.close()
        return status, json.loads(data)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None


# How quick it is


async def together(host: str, port: int, bodies: list[dict[str, Any]]) -> list[Any]:
    """The answers to all, each client sending its next once it has the one before."""
    answers: list[Any] = [None] * len(bodies)
    left = iter(range(len(bodies)))

    async def client() -> None:
        own = Client(host, port)
        for i in left:
            status, answers[i] = await own.post("/v1/completions", bodies[i])
            assert status == 200, answers[i]
        own.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


def timed(model: str | None, count: int, tokens: int) -> dict[str, Any]:
    """Committed tokens a second of the server and of `generate`, by turns; the same answers from both."""
    prompts = (reviews.prompts(64) * (count // 64 + 1))[:count]
    params = [SamplingParams(max_tokens=tokens, seed=i, ignore_eos=True) for i in range(count)]
    bodies = [
        {"prompt": prompt, "max_tokens": tokens, "seed": i, "ignore_eos": True} for i, prompt in enumerate(prompts)
    ]
    path = pyengine.embedded("policy") if model is None else model
    engine = Engine.from_pretrained(path, max_rows=CLIENTS, cache_gb=0.5)
    rates: dict[str, list[float]] = {"server": [], "generate": []}
    with served(*([] if model is None else [model]), "--max-rows", str(CLIENTS), "--cache-gb", "0.5") as (
        host,
        port,
        _,
    ):
        for round_ in range(ROUNDS + 1):
            begun = time.perf_counter()
            answers = asyncio.run(together(host, port, bodies))
            middle = time.perf_counter()
            results = engine.generate(prompts, None, params)
            end = time.perf_counter()
            same = sum(a["choices"][0]["text"] == r.text for a, r in zip(answers, results, strict=True))
            # In fp32 the last bits of a logit move with what is beside it, and a token in many thousands with them.
            assert same >= 0.95 * count, f"{count - same} of {count} answers differ"
            if round_:  # the first warms both up
                rates["server"].append(count * tokens / (middle - begun))
                rates["generate"].append(count * tokens / (end - middle))
    ratios = [a / b for a, b in zip(rates["server"], rates["generate"], strict=True)]
    return {
        "model": engine.name,
        "requests": count,
        "tokens": tokens,
        "clients": CLIENTS,
        "server_tokens_per_second": statistics.median(rates["server"]),
        "generate_tokens_per_second": statistics.median(rates["generate"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def record(what: str, measured: Any) -> None:
    """Into the results, beside what was measured of other things."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(known | {what: measured}, indent=1) + "\n")


def main(what: str, *arguments: str) -> None:
    if what == "time":
        rows = [timed(None, 512, 64)] + [timed(model, 64, 128) for model in arguments]
        for row in rows:
            print(json.dumps(row))
        record("time", rows)
    elif what == "soak":
        from bench.serving_soak import soak

        soak(int(arguments[0]) if arguments else 2000)


if __name__ == "__main__":
    main(*sys.argv[1:])
