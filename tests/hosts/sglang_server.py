"""SGLang's server as a process of its own, on a machine without a GPU, and what a test asks it."""

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHELLS = Path(__file__).parent / "sglang_shells"
MODELS = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "models"
OTHERS = ",".join(  # 250, read in 15 seconds
    sorted(path.stem for path in MODELS.glob("*.py") if path.stem not in ("llama", "qwen2"))
)
ARGUMENTS = {"device": "cpu", "attention_backend": "torch_native", "dtype": "float32", "max_total_tokens": 4096}


def environment(scorers=None, **more):
    """Of a process that runs SGLang: shells for the packages that are not there, and the scorers {name: source}."""
    found = {name: value for name, value in os.environ.items() if name != "PYENGINE_SCORERS"}
    path = os.pathsep.join(filter(None, [str(SHELLS), os.environ.get("PYTHONPATH")]))
    found |= {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1", "SGLANG_DISABLED_MODEL_ARCHS": OTHERS}
    found |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if scorers:
        found["PYENGINE_SCORERS"] = ",".join(f"{name}={source}" for name, source in scorers.items())
    return found | more


class Server:
    """model: a directory. settings: of SGLang's ServerArgs."""

    def __init__(self, log, model, scorers, settings, variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (ARGUMENTS | settings).items()]
        command = [sys.executable, "-m", "sglang.launch_server", f"--model-path={model}", f"--port={self.port}"]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--skip-server-warmup", *flags],
                env=environment(scorers, **variables),
                stdout=file,
                stderr=file,
                cwd=log.parent,  # not where pyengine lies unbuilt
                start_new_session=True,
            )
        while not self._ready():
            assert self.process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)

    def _ready(self):
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def ask(self, method, path, body=None):
        """Status and JSON, or text where it is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if "json" in (answer.headers["Content-Type"] or "") else text

    def generate(self, ids, tilt=None, max_new_tokens=24, **body):
        """The answer to a prompt of token ids; tilt: its fields. sampling: further sampling parameters."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True} | body.pop("sampling", {})
        if tilt is not None:
            sampling["custom_params"] = tilt
        status, answer = self.ask("POST", "/generate", {"input_ids": ids, "sampling_params": sampling} | body)
        assert status == 200, answer
        return answer

    def together(self, requests):
        """The answers to many at once; requests: [arguments of `generate`]."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.generate(**request), requests))

    def state(self):
        return self.ask("GET", "/server_info")[1]["internal_states"][0]["pyengine"]

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
