"""Model directories that the project did not train, and the embedded engine, for all tests."""

from __future__ import annotations

import gc
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small tensors gain nothing from threads, and where two files run at a time those of one wait for those of the other.
# The processes that tests start heed only this; a test that is about threads asks for them itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

import pyengine
from pyengine import _C, Engine, ops
from pyengine.decode.request import mix

torch.set_num_threads(1)

# By what they take; the others follow in the order of their names.
LONGEST = ("claims", "triton_trees", "embedded", "tilt", "training_prefix", "triton", "readme", "packaging")


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Engines that a file leaves behind give their caches back: Ray forks, which fails where those are still mapped."""
    yield
    gc.collect()


def pytest_collection_modifyitems(items):
    """The longest files start first: with several workers, the one that comes last is waited for."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "sphinx of quartz"]
VOCAB = 320
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "vocab_size": VOCAB,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=96, vocab_size=VOCAB, eos_token_id=0, bos_token_id=0
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=32, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8, sliding_window_pattern=2),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL,
        head_dim=16,
        sliding_window=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}


def train_tokenizer(sentencepiece: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, or one that marks and drops spaces as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if sentencepiece else pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """{architecture: directory} with random weights large enough that logits differ clearly."""
    tokenizer = train_tokenizer()
    out = {}
    for name, config in ARCHITECTURES.items():
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
        out[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(out[name])
        tokenizer.save_pretrained(out[name])
    return out


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{% if not loop.last or add_generation_prompt %} / {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer(model_dirs):
    """It puts a BOS before every text, and its chat template writes one too."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    bos = tokenizer.convert_ids_to_tokens(7)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 7)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    return train_tokenizer(sentencepiece=True)


@pytest.fixture(params=sorted(ARCHITECTURES))
def model_dir(request, model_dirs):
    """Each architecture in turn."""
    return model_dirs[request.param]


@pytest.fixture(scope="session")
def embedded_engine():
    """The embedded policy without a scorer; tests that set one leave none behind."""
    return Engine.from_pretrained(pyengine.embedded("policy"))


@pytest.fixture
def engine(embedded_engine):
    yield embedded_engine
    embedded_engine.set_scorer(None)


@pytest.fixture
def as_the_engine(monkeypatch):
    """Holds a result of somebody else's blocks against the engine's from the same candidates: it draws their tokens and
    does all the rest itself. Log-probabilities are not looked at. bound: theirs knows no more of its KL."""

    def check(theirs, engine, prompt, strategy, sampling, bound=False):
        seed, draw, script = mix(sampling.seed, theirs.prompt_ids), ops.tilt_sample, {}
        for block in theirs.blocks:
            for b, candidate in enumerate(block.candidates):
                own = mix(seed, [b]) if b else seed
                script |= {(own, block.start + i): token for i, token in enumerate(candidate.tokens)}

        def scripted(*arguments, seed, position, **columns):
            drawn = draw(*arguments, seed=seed, position=position, **columns)
            rows = zip(seed.tolist(), position.tolist(), drawn.token.tolist(), strict=True)
            return drawn._replace(token=torch.tensor([script.get((own, at), token) for own, at, token in rows]))

        with monkeypatch.context() as patch:
            patch.setattr(ops, "tilt_sample", scripted)
            (ours,) = engine.generate(prompt, strategy, sampling)
        assert (theirs.text, theirs.tokens) == (ours.text, ours.tokens)
        assert (theirs.finish_reason, theirs.stop_reason) == (ours.finish_reason, ours.stop_reason)
        assert (theirs.kl_kind, theirs.seed) == (ours.kl_kind, ours.seed)
        assert ours.kl <= theirs.kl if bound else theirs.kl == pytest.approx(ours.kl, abs=1e-4)
        assert theirs.rewards == pytest.approx(ours.rewards, abs=1e-4, nan_ok=True)
        assert theirs.reward == pytest.approx(ours.reward, abs=1e-4, nan_ok=True)
        assert len(theirs.blocks) == len(ours.blocks) > 0
        for one, other in zip(theirs.blocks, ours.blocks, strict=True):
            # Which of two equal candidates a model likes better is decided by its last bits.
            texts = [tuple(candidate.tokens) for candidate in one.candidates]
            twins = one.chosen != other.chosen and texts[one.chosen] == texts[other.chosen]
            assert one.start == other.start
            assert one.chosen == other.chosen or twins
            for a, b in zip(one.candidates, other.candidates, strict=True):
                assert (a.text, a.tokens, a.finish_reason) == (b.text, b.tokens, b.finish_reason)
                assert a.utility == pytest.approx(b.utility, abs=1e-4, nan_ok=True)
                assert twins or a.probability == pytest.approx(b.probability, abs=1e-4)

    return check


@pytest.fixture
def in_two_processes(tmp_path):
    """`pyengine` with these arguments through `accelerate launch` on two CPU processes; gives its stdout."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "pyengine"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments):
        done = subprocess.run(
            [*launch, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def in_triton():
    """Runs a file of tests/triton_cases in a process of its own: on the GPU where there is one, else interpreted.

    The interpreter is chosen when triton is imported, so it would seize every other test of this process too.
    """
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("triton_cases")
    environment = os.environ | {"PYTHONPATH": str(cases)}
    environment |= {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

    def run(name):
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "rig", cases / name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout

    return run


def _instruction_sets():
    for name in ("portable", "avx2", "avx512"):
        try:
            _C.instruction_set(name)
        except ValueError:
            continue
        yield name


@pytest.fixture(params=list(_instruction_sets()))
def isa(request, monkeypatch):
    """Runs the test with each instruction set of this machine."""
    monkeypatch.setattr(ops.settings.settings, "cpu_isa", request.param)
    return request.param


@pytest.fixture(scope="session")
def sass():
    """bench/sass.py, from a folder that is not on this process's path."""
    path = Path(__file__).parent.parent / "bench" / "sass.py"
    spec = importlib.util.spec_from_file_location("sass", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN: whoever reads what nobody wrote is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**31) if x.dtype != torch.bool else True)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))


class Server:
    """A server as a process of its own, and what a test asks it."""

    def __init__(self, process, address, key):
        self.process, self.address = process, address
        self.url = f"http://{address[0]}:{address[1]}"
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(self, method, path, body=None, headers=None):
        """Status and JSON, or text where it is none."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body)
        connection.request(method, path, data, self.headers if headers is None else self.headers | headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text

    def post(self, path, body, headers=None):
        return self.ask("POST", path, body, headers)

    def get(self, path, headers=None):
        """headers: {} sends none."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        connection.request("GET", path, headers=self.headers if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def metrics(self):
        """{sample: value}."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def idle(self):
        """Whether nothing is held, within two seconds."""
        names = ("requests_running", "requests_waiting", "rows", "pages_used_ratio", "leaves_used_ratio")
        for _ in range(40):
            found = self.metrics()
            if not any(found[f"pyengine_{name}"] for name in names):
                return True
            time.sleep(0.05)
        return False


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """Starts `pyengine serve` of the embedded model with these arguments."""
    directory = tmp_path_factory.mktemp("serve")
    faulty = directory / "faulty.py"
    faulty.write_text("def raises(prompts, completions):\n    raise ValueError('it always does')\n")
    known = ("prefix", "sentiment", "length", f"raises={faulty}:raises")
    running = []

    def start(*arguments, scorers=known):
        log = directory / f"{len(running)}.log"
        command = [sys.executable, "-m", "pyengine", "serve", "--port=0", "--cache-gb=0.05", *arguments]
        command += [f"--scorer={scorer}" for scorer in scorers]
        with log.open("w") as file:
            running.append(subprocess.Popen(command, stderr=file))
        while not (found := re.search(r"is served at http://([\d.]+):(\d+)", log.read_text())):
            assert running[-1].poll() is None, log.read_text()
            time.sleep(0.05)
        key = arguments[arguments.index("--api-key") + 1] if "--api-key" in arguments else None
        return Server(running[-1], (found[1], int(found[2])), key)

    yield start
    for process in running:
        process.kill()
        process.wait()
