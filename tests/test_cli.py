"""The command line: what it prints, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyengine
from pyengine import Engine, PrefixScorer, SamplingParams, cli
from pyengine.named import EXACT, SCORERS
from pyengine.rewards.conditioning import Conditioning
from pyengine.worlds import reviews

PROMPT = "Review of the Harbour, a bakery:"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `pyengine ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


def refused(outcome):
    """The one line that a refused call printed."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith("pyengine: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_installed_command_starts():
    done = subprocess.run(
        [sys.executable, "-m", "pyengine", "generate", PROMPT, "--seed", "1", "--max-tokens", "8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    assert done.stderr == ""  # no bar where nobody watches


def test_generate_prints_text_reward_and_kl(run):
    code, out, err = run(
        "generate", PROMPT, "--scorer", "prefix", "--strategy", "tokenwise", "--weight", 4, "--seed", 1
    )
    assert code == 0
    assert out.startswith(PROMPT)
    assert "reward " in out
    assert "nats (exact)" in out
    assert err == ""


def test_a_policy_that_is_asked_for_a_reward(run, tmp_path):
    for file in pyengine.embedded("policy").iterdir():
        (tmp_path / file.name).symlink_to(file)
    options = ("--model", tmp_path, "--seed", 1, "--max-tokens", 2)
    code, _, err = run("generate", PROMPT, *options, "--score", 2)
    assert code == 2
    assert f"--score: {tmp_path} has no conditioning.json" in err
    template = Conditioning("{instruction} <{score}>{response}")
    template.save(tmp_path / "conditioning.json")
    code, out, err = run("generate", PROMPT, *options, "--score", 2)
    assert (code, err) == (0, "")
    assert out.startswith(f"{PROMPT} <2.0>")
    code, out, err = run("generate", PROMPT, *options)
    assert (code, out.startswith(f"{PROMPT} <")) == (0, False)
    assert err == f"pyengine: {tmp_path} was trained to be asked for a reward: --score 5, say\n"


def test_every_strategy_and_scorer_by_name(run):
    for strategy, used in cli.generate.STRATEGIES.items():
        needs = ("--bound", 2, "--beta", 1) if "bound" in used else ()
        assert run("generate", PROMPT, "--scorer", "prefix", "--strategy", strategy, "--max-tokens", 4, *needs)[0] == 0
    for scorer in SCORERS:
        assert run("generate", PROMPT, "--scorer", scorer, "--k", 2, "--block", 4, "--max-tokens", 4)[0] == 0


def test_json_lines_from_arguments_stdin_and_file(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in reviews.prompts(3)))
    options = ("--json", "--seed", 1, "--max-tokens", 6)
    by_file = run("generate", "--input", file, *options)
    by_argument = run("generate", *reviews.prompts(3), *options)
    by_stdin = run("generate", *options, stdin="\n".join(reviews.prompts(3)))
    assert by_file == by_argument == by_stdin
    records = [json.loads(line) for line in by_file[1].splitlines()]
    assert [r["prompt"] for r in records] == reviews.prompts(3)
    assert all(len(r["tokens"]) <= 6 for r in records)


def test_stream(run):
    plain = run("generate", PROMPT, "--seed", 2, "--max-tokens", 12, "--json")
    text = json.loads(plain[1])["text"]
    assert run("generate", PROMPT, "--seed", 2, "--max-tokens", 12, "--stream")[1] == text + "\n"
    _, out, _ = run(
        "generate", PROMPT, "--seed", 2, "--scorer", "probe", "--block", 4, "--max-tokens", 12, "--stream", "--json"
    )
    events = [json.loads(line) for line in out.splitlines()]
    assert "".join(e["text"] for e in events) == events[-1]["result"]["text"]


def test_unreadable_lines_are_named_and_the_others_processed(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    good = json.dumps({"prompt": PROMPT})
    lines = [good, "{not json", json.dumps({"text": "x"}), json.dumps({"prompt": ""}), "", "[1]", good]
    lines += ["[" * 100_000, json.dumps({"prompt": "\ud800"})]
    file.write_text("\n".join(lines))
    code, out, err = run("generate", "--input", file, "--json", "--max-tokens", 4, "--seed", 1)
    assert code == 1
    assert len(out.splitlines()) == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        *(f"{file}:{i}" for i in (2, 3, 6, 8)),
        f"{file}:4 is empty",
        f"{file}:9 is not valid Unicode",
        "6 of 8 prompts failed",
    ]


@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_prompt_that_fails_on_the_way_is_named_by_its_line_and_the_others_are_printed(
    run, tmp_path, monkeypatch, stream
):
    def sentiment(prompts, completions):
        if reviews.prompts(3)[1] in prompts:
            raise KeyError("no such shop")
        return [0.0] * len(completions)

    monkeypatch.setitem(EXACT, "sentiment", sentiment)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in reviews.prompts(3)))
    options = ("--scorer", "sentiment", "--k", 2, "--block", 4, "--max-tokens", 8, "--seed", 1, "--json", *stream)
    code, out, err = run("generate", "--input", file, *options)
    assert code == 1
    results = [json.loads(line) for line in out.splitlines()]
    whole = [r["result"] for r in results if "result" in r] if stream else results
    assert sorted(r["prompt"] for r in whole) == sorted(reviews.prompts(3)[::2])
    said, count = err.splitlines()
    assert said.startswith(f"pyengine: {file}:2: scorer 'sentiment'")
    assert "no such shop" in said
    assert count == "pyengine: 1 of 3 prompts failed"


def test_what_is_finished_is_printed_before_an_interrupt(run, monkeypatch):
    def interrupted(prompts, completions):
        if any(len(c) > 40 for c in completions):
            raise KeyboardInterrupt
        return [0.0] * len(completions)

    monkeypatch.setitem(EXACT, "sentiment", interrupted)
    options = ("--scorer", "sentiment", "--k", 2, "--block", 4, "--max-tokens", 128, "--seed", 1, "--json")
    code, out, _ = run("generate", *reviews.prompts(12), *options)
    assert code == 130
    assert 0 < len(out.splitlines()) < 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", PROMPT, "--model", "/no/such/model"], "model /no/such/model: no such directory"),
        (["generate", PROMPT, "--scorer", "/no/such/scorer"], "scorer /no/such/scorer: no such directory"),
        (["generate", PROMPT, "--strategy", "beam"], "unknown strategy 'beam'; choose from base, tokenwise"),
        (["generate", PROMPT, "--scorer", "probe", "--k", "0"], "k must be a whole number of at least 1, got 0"),
        (
            ["generate", PROMPT, "--scorer", "prefix", "--strategy", "tokenwise", "--weight", "nan"],
            "finite number, got nan",
        ),
        (["generate", PROMPT, "--strategy", "blockwise"], "needs a scorer"),
        (["generate", PROMPT, "--dtype", "int8"], "--dtype must be float32, bfloat16 or float16, got 'int8'"),
        (["generate", PROMPT, "--quantize", "int4"], "quantize must be None or \"int8\", got 'int4'"),
        (
            ["generate", PROMPT, "--scorer", "a", "--scorer", "b"],
            '--scorer is there 2 times: give one sum, --scorer "a + b"',
        ),
        (["pairs", "--scorer", "a", "--scorer", "b", "--out", "/tmp/no.jsonl"], "--scorer is there 2 times"),
        (["label", "x.jsonl", "--scorer", "a", "--scorer", "b", "--out", "/tmp/no.jsonl"], "--scorer is there 2 times"),
        (["curve", "--reward", "a", "--reward", "b"], "--reward is there 2 times"),
        (["profile", PROMPT, "--scorer", "a", "--scorer", "b"], "--scorer is there 2 times"),
        (
            ["train", "scorer", "--rollouts", "2", "--reward", "a", "--reward", "b", "--out", "/tmp/no"],
            "--reward is there 2 times",
        ),
        (["generate", PROMPT, "--scorer", "sentiment +"], "expected a scorer, found 'the end' at character 12"),
        (["generate", PROMPT, "--kl-budget", "1"], "--kl-budget is not used by strategy 'base' (it is by tokenwise)"),
        (["generate", PROMPT, "--strategy", "tokenwise", "--per", "token"], "give that too"),
        (
            ["generate", PROMPT, "--strategy", "tokenwise", "--weight", "2", "--kl-budget", "1"],
            "give weight or kl_budget, not both",
        ),
        (["generate", PROMPT, "--strategy", "rejection", "--beta", "1"], "strategy 'rejection' needs --bound"),
        (
            ["generate", PROMPT, "--strategy", "rejection", "--bound", "1", "--beta", "1", "--stream"],
            "not with --stream",
        ),
        (["profile", PROMPT, "--strategy", "rejection", "--bound", "1", "--beta", "1"], "not with profile"),
        (
            ["generate", ".", "--strategy", "tokenwise", "--kl-budget", "1", "--per", "sequence", "--stream"],
            "--per sequence is an average over all prompts",
        ),
        (["generate", PROMPT, "--scorer", "probe", "--strategy", "tokenwise"], "'probe' scores whole prefixes"),
        (
            ["generate", PROMPT, "--k", "4"],
            "--k is not used by strategy 'base' (it is by blockwise, best-of-k, q-probe)",
        ),
        (["generate", PROMPT, "--temperature", "-1"], "temperature must be a finite number in 0 .. inf, got -1"),
        (["generate", PROMPT, "--k", "many"], "valid integer"),
        (["generate", PROMPT, "--no-such-option"], "No such option"),
        (["generate", PROMPT, "--input", "x.jsonl"], "not both"),
        (["generate", "--input", "/no/such.jsonl"], "/no/such.jsonl: No such file"),
        (["generate", ""], "prompt 1 is empty"),
        (["generate", "wonderful " * 600], "needs room for one more"),
        (["generate"], "no prompt on stdin"),
        (["demo", "--prompts", "0"], "--prompts must be a whole number of at least 1"),
        (["demo", "--svg", "/no/such/dir/x.svg"], "/no/such/dir/x.svg: no such directory"),
        (["generate", PROMPT, "--device", "abacus"], "device 'abacus'"),
        (["generate", "caf\udce9"], "prompt 1 is not valid Unicode"),
        (["decode"], "No such command"),
    ],
)
def test_bad_input_is_one_line(run, arguments, words):
    assert words.lower() in refused(run(*arguments)).lower()


def test_scorer_of_another_vocabulary(run, tmp_path):
    PrefixScorer(128, 99).save(tmp_path)
    assert "a vocabulary of 99 tokens" in refused(run("generate", PROMPT, "--scorer", tmp_path))


def test_model_that_the_project_did_not_train(run, model_dir):
    code, out, err = run("generate", "the quick", "--model", model_dir, "--seed", 1, "--max-tokens", 6, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens"]
    assert (
        run(
            "generate",
            "the quick",
            "--model",
            model_dir,
            "--scorer",
            "length",
            "--k",
            2,
            "--block",
            3,
            "--max-tokens",
            6,
        )[0]
        == 0
    )


def test_demo_shows_every_strategy_and_writes_the_picture(run, tmp_path):
    code, out, err = run("demo", "--prompts", 6, "--svg", tmp_path / "demo.svg")
    assert (code, err) == (0, "")
    for word in ("base", "tokenwise", "blockwise", "best-of-8", "Q-Probe", "KL", "What to see"):
        assert word in out
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding_gets_all_of_it(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "pyengine", "generate", "Grüße – 写", "--seed", "1", "--max-tokens", "4"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = "Grüße – 写".encode(encoding, errors="backslashreplace")
    assert done.stdout.startswith(shown)


def test_stdin_of_another_system(run):
    code, out, err = run("generate", "--json", "--max-tokens", 2, stdin=f"\ufeff{PROMPT}\r\nSecond line\r\n\r\n")
    assert (code, err) == (0, "")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [PROMPT, "Second line"]


def test_a_line_keeps_what_else_it_holds(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": PROMPT, "id": "a", "meta": {"x": 1}}, {"prompt_ids": [5, 6], "id": 7}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("generate", "--input", file, "--json", "--max-tokens", 3, "--seed", 1)
    assert (code, err) == (0, "")
    found = sorted((json.loads(line) for line in out.splitlines()), key=lambda r: str(r["id"]))
    assert [r["id"] for r in found] == [7, "a"]
    assert found[1]["meta"] == {"x": 1}
    assert found[0]["prompt_ids"] == [5, 6]


def test_a_function_of_your_own_is_followed(run, tmp_path):
    (tmp_path / "own.py").write_text("def brief(prompts, completions):\n    return [-len(c) for c in completions]\n")
    options = (
        "--scorer",
        f"{tmp_path}/own.py:brief",
        "--k",
        4,
        "--block",
        8,
        "--max-tokens",
        30,
        "--seed",
        1,
        "--json",
    )
    code, out, err = run("generate", "Review of the Harbour, a bakery:", *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["rewards"] == {"brief": -len(result["text"])}


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


def test_a_chat_model_is_asked_by_its_template(run, model_dirs, tmp_path):
    """A text is what the user says; --raw is the text itself."""
    shutil.copytree(model_dirs["llama"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    options = ("--model", tmp_path, "--max-tokens", 3, "--seed", 1, "--json")
    asked = json.loads(run("generate", "the fox", *options)[1])
    assert asked["prompt"] == "<user>the fox<me>"
    assert json.loads(run("generate", "the fox", "--raw", *options)[1])["prompt"] == "the fox"
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "the fox"}]}) + "\n")
    assert json.loads(run("generate", "--input", file, *options)[1])["tokens"] == asked["tokens"]
    code, out, _ = run("generate", "the fox", "--model", tmp_path, "--max-tokens", 3, "--seed", 1)
    assert code == 0
    assert out.startswith("the fox\n")


@pytest.mark.parametrize("base", [None, "", 3, "/no/such/base"])
def test_an_adapter_without_its_base(run, tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    said = refused(run("generate", PROMPT, "--model", tmp_path))
    assert ("does not name its base" if base != "/no/such/base" else "an adapter on /no/such/base, which is no") in said


@pytest.mark.parametrize(
    ("option", "engine"), [("--dtype=bfloat16", {"dtype": torch.bfloat16}), ("--quantize=int8", {"quantize": "int8"})]
)
def test_narrow_numbers_are_said_and_decoded_with(run, option, engine, caplog):
    code, out, _ = run("generate", PROMPT, option, "--max-tokens", 12, "--seed", 1, "--json", "--cache-gb", 0.05)
    assert code == 0
    assert "nats a token of its own text" in caplog.text
    engine = Engine.from_pretrained(pyengine.embedded("policy"), cache_gb=0.05, **engine)
    (result,) = engine.generate(PROMPT, sampling=SamplingParams(12, seed=1))
    assert json.loads(out)["tokens"] == result.tokens
    assert json.loads(out)["logp_base"] == pytest.approx(result.logp_base, abs=1e-6)


def test_info_names_versions_and_what_is_missing(run):
    code, out, _ = run("info")
    assert code == 0
    for word in ("tilt-engine", "torch", "CPU kernels", "CUDA kernels", "GPU", "triton"):
        assert word in out


def test_scores_that_are_not_finite_are_still_json():
    record = {"a": [float("nan"), 1.0], "b": {"c": float("-inf")}}
    assert json.loads(cli.generate.to_json(record)) == {"a": [None, 1.0], "b": {"c": None}}


def test_help_does_not_load_the_model_libraries():
    program = "import sys, pyengine.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_processes_part_before_they_end(monkeypatch, capsys):
    """A thread of a group that is left to the interpreter's exit has aborted runs that had done their work."""

    def group_s_threads():
        return [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself, model = [model], None
    assert group_s_threads()
    gc.disable()  # else it may come by chance
    monkeypatch.setattr(sys, "argv", ["pyengine", "info"])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert not torch.distributed.is_initialized()
        assert not group_s_threads()
    finally:
        gc.enable()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
