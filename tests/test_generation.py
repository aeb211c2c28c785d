"""Large jobs on one machine: every row once, in its place, the answer that the engine gives, whatever is killed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import pyengine
from pyengine import BestOfK, Blockwise, InputError, SamplingParams, Tokenwise, cli, generation
from pyengine.generation import generate
from pyengine.rewards.conditioning import Conditioning
from pyengine.worlds import reviews

POLICY = pyengine.embedded("policy")
SHORT = SamplingParams(max_tokens=6)


def jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(count):
    return [{"id": count - i, "meta": {"x": i}, "prompt": p} for i, p in enumerate(reviews.prompts(count))]


@pytest.fixture
def small(monkeypatch):
    """Shards of eight rows."""
    monkeypatch.setattr(generation, "LEAST", 8)
    monkeypatch.setattr(generation, "MOST", 8)


@pytest.mark.parametrize(
    ("strategy", "scorer"),
    [(None, None), (Blockwise(k=2, block_tokens=3), reviews.sentiment), (Tokenwise(2), "prefix")],
)
def test_every_row_keeps_its_place_and_gets_the_engines_answer(tmp_path, engine, small, strategy, scorer):
    scorer = pyengine.embedded(scorer) if isinstance(scorer, str) else scorer
    records, sampling = rows(20), SamplingParams(max_tokens=6, seed=4, stop=["waiter"])
    records[3]["text"] = "of an earlier run"
    source = jsonl(tmp_path / "rows.jsonl", records)
    source.write_text(source.read_text().replace("\n", "\n\n").rstrip())  # empty lines, and no newline at the end
    report = generate(
        source, POLICY, tmp_path / "new" / "out.jsonl", strategy=strategy, sampling=sampling, scorer=scorer
    )
    with engine.following(scorer):
        results = engine.generate([r["prompt"] for r in records], strategy, sampling)
    found = read(tmp_path / "new" / "out.jsonl")
    assert [(r["id"], r["meta"], r["prompt"]) for r in found] == [(r["id"], r["meta"], r["prompt"]) for r in records]
    for row, result in zip(found, results, strict=True):
        assert (row["text"], row["tokens"], row["seed"]) == (result.text, result.tokens, 4)
        assert row["logp_base"] == pytest.approx(result.logp_base, abs=1e-5)
        assert row["drawn_tokens"] == result.drawn_tokens
        assert (row["reward"] is None) == (scorer is None)
        assert not {"blocks", "prompt_ids", "error"} & row.keys()
    assert (report["rows"], report["replaced"], report["failed"], report["faults"]) == (20, 1, 0, [])
    assert report["tokens"] == sum(len(r.tokens) for r in results)
    assert report["drawn_tokens"] == sum(r.drawn_tokens for r in results)
    assert report["cut_off"] == sum(r.finish_reason == "length" for r in results)
    assert report["mean_kl"] == pytest.approx(sum(r.kl for r in results) / 20, abs=1e-5)
    if scorer is None:
        assert report["mean_reward"] is None
    else:
        assert report["mean_reward"] == pytest.approx(sum(r.reward for r in results) / 20, abs=1e-5)
    assert json.loads((tmp_path / "new" / "out.jsonl.report.json").read_text()) == report
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_without_a_seed_a_rows_is_its_place_in_any_cut(tmp_path, small, monkeypatch):
    records = [{"prompt": reviews.prompts(1)[0]}] * 20
    generate(records, POLICY, tmp_path / "a.jsonl", sampling=SHORT)
    monkeypatch.setattr(generation, "MOST", 3)
    monkeypatch.setattr(generation, "LEAST", 3)
    generate(records, POLICY, tmp_path / "b.jsonl", sampling=SHORT)
    one, other = read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl")
    assert [r["seed"] for r in one] == list(range(20))
    assert [r["tokens"] for r in one] == [r["tokens"] for r in other]
    assert len({r["text"] for r in one}) > 5


def test_what_is_wrong_with_a_row_is_its_own(tmp_path, small):
    bad = [
        ("{not json", "rows.jsonl:3: not JSON"),
        ("[1]", "rows.jsonl:4: must be a JSON object"),
        ({"id": "none"}, "rows.jsonl:5: needs one of"),
        ({"id": "empty", "prompt": ""}, "rows.jsonl:6 is empty"),
        ({"id": "long", "prompt": "wonderful " * 600}, "rows.jsonl:7 has "),
        ({"id": "half", "prompt": "\ud800"}, "rows.jsonl:8 is not valid Unicode"),
        ('{"id": "inf", "prompt": "a", "x": 1e999}', "rows.jsonl:9: cannot be written again"),
        ({"id": "fails", "prompt": "the spa", "text": "of an earlier run"}, "rows.jsonl:10: scorer 'moody'"),
    ]

    def moody(prompts, completions):
        if "the spa" in prompts:
            raise KeyError("no such shop")
        return [0.0] * len(completions)

    good = rows(4)
    good[1]["error"] = "of an earlier run"
    source = jsonl(tmp_path / "rows.jsonl", [*good[:2], *(line for line, _ in bad), *good[2:]])
    report = generate(
        source, POLICY, tmp_path / "out.jsonl", strategy=BestOfK(2), sampling=SHORT, scorer=moody, progress=True
    )
    found = read(tmp_path / "out.jsonl")
    assert len(found) == 12
    for (line, message), row in zip(bad, found[2:10], strict=True):
        assert row.pop("error").startswith(message)
        assert row == ({k: v for k, v in line.items() if k != "text"} if isinstance(line, dict) else {"line": line})
    generate(jsonl(tmp_path / "g.jsonl", good), POLICY, tmp_path / "good.jsonl", strategy=BestOfK(2), scorer=moody,
             sampling=SHORT)  # fmt: skip
    others = read(tmp_path / "good.jsonl")
    assert [r["id"] for r in found[:2] + found[10:]] == [r["id"] for r in others]
    assert [r["tokens"] for r in found[:2]] == [r["tokens"] for r in others[:2]]  # the same places, the same seeds
    assert "error" not in found[1]
    assert (report["rows"], report["replaced"], report["failed"]) == (12, 2, 8)
    assert len(report["faults"]) == 5
    assert report["faults"][0].startswith(bad[0][1])


def test_what_is_wrong_with_the_run_is_said_before_a_row_is_decoded(tmp_path):
    out = tmp_path / "out.jsonl"
    for message, options in (
        ("n is 2, a row has one answer", {"sampling": SamplingParams(n=2)}),
        ("calibrate a weight", {"strategy": Tokenwise(kl_budget=1.0, per="sequence")}),
        ("needs a scorer", {"strategy": Blockwise()}),
        ("device 'abacus'", {"device": "abacus"}),
        ("unknown option 'nonsense'; an engine takes dtype, max_rows, cache_gb", {"nonsense": 1}),
        (r"^model /no/such: no such directory", {"model": "/no/such"}),
        (r"^scorer /no/such: no such directory", {"scorer": "/no/such"}),
    ):
        with pytest.raises(InputError, match=message):
            generate(rows(2), options.pop("model", POLICY), out, **options)
    for text, message in (("\n", r'no rows; it needs lines \{"prompt"\}'), (None, "No such file")):
        source = tmp_path / "rows.jsonl"
        source.unlink() if text is None else source.write_text(text)
        with pytest.raises(InputError, match=message):
            generate(source, POLICY, out)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_of_the_input_alone(tmp_path):
    """A 32nd of it each, from 32 to 512 rows."""
    for count, most in ((20, 20), (320, 32), (4000, 125), (20_000, 512)):
        source = jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i:06}"} for i in range(count)])
        found = generation._scan(source)[1]
        assert max(s.rows for s in found) == most
        assert [s.first for s in found] == [0, *(s.first + s.rows for s in found[:-1])]
        assert sum(s.rows for s in found) == count
        assert all(s.rows == most for s in found[:-1])


KILLED = """
import sys
import pyengine
from pyengine import SamplingParams, generation
generation.LEAST = generation.MOST = 8
generation.generate(sys.argv[1], pyengine.embedded("policy"), sys.argv[2], sampling=SamplingParams(max_tokens=6))
"""


def test_sigkill_in_the_middle_and_a_restart(tmp_path, small, model_dirs):
    source, out = jsonl(tmp_path / "rows.jsonl", rows(400)), tmp_path / "out.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, out])
    directory = tmp_path / "out.jsonl.shards"
    while len(list(directory.glob("*.jsonl"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = {p: p.stat().st_mtime_ns for p in directory.glob("*.jsonl")}
    assert 3 <= len(kept) < 50
    with pytest.raises(InputError, match="part of a run that was cut short: resume it, or delete it"):
        generate(source, POLICY, out, sampling=SHORT)
    for other, options in (
        ("sampling", {"sampling": SamplingParams(max_tokens=7)}),
        ("model", {"model": model_dirs["llama"]}),
        ("scorer", {"scorer": reviews.sentiment}),
        ("strategy", {"strategy": Tokenwise(0.0)}),
        ("prompts", {"chat": True}),
        ("engine", {"batch_invariant": True}),
        ("engine", {"cache_gb": 0.05}),
        ("engine", {"max_rows": 16}),
    ):
        with pytest.raises(InputError, match=f"was made with another {other}; give the same"):
            generate(source, options.pop("model", POLICY), out, resume=True, **{"sampling": SHORT} | options)
    again = []

    def counting(worker, todo):
        again.extend(todo)
        for shard in todo:
            yield worker(shard)
        assert [worker(shard) for shard in generation._scan(source)[1]] == [8] * 50  # again, as Ray retries
        assert all(path.stat().st_mtime_ns == before for path, before in kept.items())

    report = generate(source, POLICY, out, sampling=SHORT, resume=True, through=counting)
    assert len(again) == 50 - len(kept)
    assert (report["rows"], report["failed"]) == (400, 0)
    generate(source, POLICY, tmp_path / "whole.jsonl", sampling=SHORT)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert generate(source, POLICY, out, sampling=SHORT, resume=True) == report


def test_settings_with_lists_are_resumed(tmp_path, small):
    """What is compared with a manifest is what it can hold: JSON knows no tuples, and keys that are texts."""
    sampling = SamplingParams(max_tokens=6, stop=["waiter"], logit_bias={5: 1.0})

    def cut_short(worker, todo):
        yield worker(todo[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(rows(20), POLICY, tmp_path / "out.jsonl", sampling=sampling, through=cut_short)
    assert generate(rows(20), POLICY, tmp_path / "out.jsonl", sampling=sampling, resume=True)["rows"] == 20


def test_memory_for_fewer_rows_at_once_moves_last_bits_only_and_none_of_an_invariant_engine(tmp_path, small):
    """The bytes are those of any run with the same memory, and of any at all where the engine is batch-invariant."""
    job = {"strategy": Blockwise(4, 4), "scorer": pyengine.embedded("prefix"), "sampling": SHORT}

    def made(**options):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        generate(rows(16), POLICY, out, **job, **options)
        return out.read_bytes(), [(row["tokens"], row["text"]) for row in read(out)]

    plenty, little = made(cache_gb=0.05), made(cache_gb=0.001)
    assert (made(), made(cache_gb=0.001)) == (plenty, little)
    assert plenty[0] != little[0]  # else nothing here tells whether a row ran beside fewer
    assert plenty[1] == little[1]
    assert made(batch_invariant=True) == made(batch_invariant=True, cache_gb=0.001)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)], standalone_mode=False)


def test_command(tmp_path):
    source, out = jsonl(tmp_path / "rows.jsonl", rows(20)), tmp_path / "out.jsonl"
    jsonl(tmp_path / "again.jsonl", [{"id": 7, "prompt": "the fox", "error": "of an earlier run"}])
    for options in (("--json",), ("--json", "--stream")):
        printed = run("--input", tmp_path / "again.jsonl", "--max-tokens", 1, *options).stdout.splitlines()[-1]
        assert '"id": 7' in printed
        assert "error" not in printed
    options = ("--input", source, "--scorer", "sentiment", "--k", 2, "--block", 3, "--max-tokens", 6, "--out", out)
    done = run(*options)
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"] == 20
    generate(
        source,
        POLICY,
        tmp_path / "same.jsonl",
        strategy=Blockwise(2, 3),
        sampling=SHORT,
        scorer=reviews.sentiment,
    )
    assert out.read_bytes() == (tmp_path / "same.jsonl").read_bytes()
    assert json.loads(run(*options, "--resume").stdout) == json.loads(done.stdout)
    jsonl(source, [*rows(3), "nonsense", "{}"])
    failed = run("--input", source, "--max-tokens", 3, "--out", tmp_path / "b.jsonl")
    assert failed.return_value == 1
    assert [line.split(": ")[1] for line in failed.stderr.splitlines()] == [
        *("rows.jsonl:4", "rows.jsonl:5", '2 of 5 rows failed')
    ]  # fmt: skip
    for given, message in (
        (options, "exists already; choose another output"),
        (("a prompt", "--out", tmp_path / "o"), "--out takes its rows from --input"),
        (("a prompt", "--input", source, "--out", tmp_path / "o"), "--out takes its rows from --input"),
        (("--input", source, "--out", tmp_path / "o", "--stream"), "leaves out --stream and --json"),
        (("--input", source, "--out", tmp_path / "o", "--json"), "leaves out --stream and --json"),
        (("--input", source, "--out", tmp_path / "o", "--workers", 2), "--workers are a cluster's"),
        (("--input", source, "--resume"), "are for a job with --input"),
        (("--input", source, "--ray", "local"), "are for a job with --input"),
        (("--input", source, "--workers", 2), "are for a job with --input"),
        (("--input", source, "--workers", 0), "are for a job with --input"),
        (("--input", source, "--ray", ""), "are for a job with --input"),
        (("--input", source, "--out", tmp_path / "o", "--workers", 0), "--workers are a cluster's"),
        (("--input", source, "--out", "/proc/o"), "nothing can be written there"),
    ):
        refused = run(*given)
        assert isinstance(refused.exception, InputError), given
        assert message in str(refused.exception)


def test_texts_are_asked_as_the_command_asks_them(tmp_path, model_dirs):
    """By the template where there is one, for a reward where the model takes it, and as they are with --raw."""
    shutil.copytree(model_dirs["llama"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "the fox"}])
    options = ("--input", source, "--model", tmp_path / "model", "--max-tokens", 4, "--seed", 3)
    for extra, asked in (((), "<the fox>"), (("--raw",), "the fox"), (("--score", 2), "the fox <2.0>")):
        if extra[:1] == ("--score",):
            Conditioning("{instruction} <{score}>{response}").save(tmp_path / "model" / "conditioning.json")
        out = tmp_path / f"{len(extra)}{''.join(map(str, extra))}.jsonl"
        assert run(*options, *extra, "--out", out).exit_code == 0
        printed = json.loads(run(*options, *extra, "--json").stdout)
        (row,) = read(out)
        assert row["logp_base"] == pytest.approx(printed["logp_base"], abs=1e-5)
        assert (row["tokens"], row["prompt"], printed["prompt"]) == (printed["tokens"], "the fox", asked)
        assert math.isfinite(row["kl"])
