"""`pyengine bench throughput`: contenders do the same work, and what is said of them is counted right."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from pyengine import BestOfK, Blockwise, InputError, Tokenwise, cli, costs
from pyengine.bench import measures, report, sensors, shapes, throughput, workload
from pyengine.bench.contenders import Run
from pyengine.bench.throughput import Task
from pyengine.bench.turns import Took, extra_peak, race
from pyengine.strategies import BASE

CPU = torch.device("cpu")
TINY = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # so that a greedy answer has opinions
}
# As their model cards and safetensors indices say.
PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.shapes(), "Tiny", TINY)
    # The rates of this machine take seconds to measure.
    monkeypatch.setattr(throughput, "measured_rates", lambda device, dtype: costs.Rates(1e10, 1e11, 1e9))


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.shapes(), "Tiny", TINY)
        return shapes.engine_of("Tiny@random", "cpu", 0.1)


def test_shapes_have_the_parameters_of_the_published_models():
    """Three here, one of each family and each way of tying; all ten did when they were written down."""
    assert set(PUBLISHED) == set(shapes.shapes()) - {"Tiny"}
    for name in ("SmolLM2-135M", "Qwen2.5-7B", "Qwen3-0.6B"):
        assert shapes.parameters_of(shapes.config_of(name)) == PUBLISHED[name], name


def test_memory_that_does_not_suffice_is_said_before_any_is_taken(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 1e9)
    made = []
    monkeypatch.setattr(shapes, "Engine", made.append)
    with pytest.raises(InputError, match=r"Llama-3.1-8B@random: 32.1 GB of float32 weights and 2 GB of cache"):
        shapes.engine_of("Llama-3.1-8B@random", "cpu", 2.0)
    with pytest.raises(InputError, match=r"GPT-9@random: no such shape; there are Llama-3.1-8B"):
        shapes.engine_of("GPT-9@random", "cpu", None)
    assert made == []


def test_a_shapes_weights_are_its_own_and_leave_the_callers_draws_alone():
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    model, tokenizer = shapes.made("Tiny", "cpu")
    assert torch.equal(torch.rand(1), want)
    assert (model.dtype, model.training) == (torch.float32, False)
    assert tokenizer.decode([3, 499]) == "w3 w499"


@pytest.mark.parametrize("sizes", [[(70, 17)] * 2, [(30, 5), (90, 20), (61, 11)]])
@pytest.mark.parametrize("strategy", [BASE, Blockwise(3, 8), BestOfK(3)])
def test_all_contenders_give_the_same_greedy_answers(engine, strategy, sizes):
    """Prompts of several lengths are padded for the peers; those that are done leave the batch."""
    baselines = ("generate", "fork") if strategy == BASE else ("generate", "fork", "plain")
    found = throughput.contenders_of(Task("Tiny@random", strategy, sizes, baselines=baselines), engine)
    asks = workload.asked(sizes, 500, 0, 3)
    runs = {name: contender(asks, 0, True) for name, contender in found.items()}
    for name, run in runs.items():
        assert run.tokens == runs["pyengine"].tokens, name
        assert len({tuple(tokens) for tokens in run.tokens}) == len(set(sizes)) or len(set(sizes)) == 1
        assert [sum(n for _, n in own) for own in run.commits] == [answer for _, answer in sizes], name
        assert all(own == sorted(own) for own in run.commits), name
        assert run.drawn >= (1 if name == "plain" else strategy.k) * sum(answer for _, answer in sizes)
    if isinstance(strategy, Blockwise):
        blocks = [-(-answer // 8) for _, answer in sizes]
        assert [list(map(len, runs[n].commits)) for n in ("pyengine", "generate", "fork")] == [blocks] * 3
    sampled = [contender(asks, 7, False).tokens for contender in found.values()]
    assert all(list(map(len, tokens)) == [answer for _, answer in sizes] for tokens in sampled)
    assert sampled[0] != runs["pyengine"].tokens


def test_branches_are_kept_by_the_probe(engine):
    """Of one block the peers keep the branch whose last state the probe likes best."""
    task = Task("Tiny@random", Blockwise(6, 8), [(40, 8)], baselines=("fork",))
    (ask,) = workload.asked([(40, 8)], 500, 0, 1)
    scorer = throughput._followed(engine, task.strategy)
    kept = throughput.contenders_of(task, engine)["fork"]([ask], 2, False).tokens[0]

    def score(tokens):
        with torch.inference_mode():
            states = engine.model(torch.tensor([ask.prompt + tokens]), output_hidden_states=True).hidden_states[-1]
            return float(scorer(states[0, -1]))

    plain = throughput.contenders_of(Task("Tiny@random", BASE, [(40, 8)], baselines=("fork",)), engine)["fork"]
    others = [score(plain([ask], seed, False).tokens[0]) for seed in range(12)]
    assert score(kept) > sorted(others)[8]


def test_waits_are_counted_from_commits():
    run = Run([[1, 2, 3, 4, 5], [6]], [[(1.0, 2), (4.0, 2), (5.0, 1)], [(2.0, 1)]], 40, 6)
    assert measures.first_commits(run, 1) == [1.0, 2.0]
    assert measures.first_commits(run, 4) == [4.0, 2.0]
    assert measures.gaps(run) == [3.0, 1.0]
    samples = [measures.Sample(run, Took(wall, 1.0), joules) for wall, joules in ((2.0, 12.0), (4.0, 18.0))]
    found = measures.row(samples, 4, 1.5, 24)
    assert found["committed_tokens_per_s"] == 6 / 3
    assert found["drawn_tokens_per_s"] == 40 / 3
    assert found["fraction_of_floor"] == 0.5
    assert found["joules_per_token"] == 15 / 6
    assert found["prefix_hit_rate"] == 0.25
    assert found["commit_gap_s"]["p50"] == 2.0
    without = measures.row([samples[0]._replace(joules=None), samples[1]], 4, None, 24)
    assert {"joules_per_token", "fraction_of_floor"} & set(without) == set(), "absent, not zero"
    assert "commit_gap_s" not in measures.row([samples[0]._replace(run=Run([[1]], [[(1.0, 1)]], 1))], 4, None, 24)


def test_the_floor_reads_a_prompt_once_for_all_its_branches(engine):
    """Only bytes count at these rates: weights once a pass, keys and values of a layer as they lie there."""
    rates = costs.Rates(1.0, 1e30, 1e30)
    weights = costs.weights_of(engine.model)
    step = weights.body_bytes + weights.head_bytes

    def attention(rows, keys):
        keys_and_values, queries_and_outputs = 2.0 * keys * 2 * 16 * 4, 2.0 * 6 * rows * 16 * 4
        return 2 * (keys_and_values + queries_and_outputs)

    found = measures.least_seconds(engine.model, [(10, 3)], 0, 4, 2, rates)
    assert found == 3 * step + attention(10, 10) + attention(4, 10 + 4) + attention(4, 12)
    alone = measures.least_seconds(engine.model, [(10, 1)] * 2, 6, 1, None, rates)
    assert alone == step + attention(14, 14), "what prompts share is read once"


def test_a_run_is_recorded_and_pytest_benchmark_reads_it(tmp_path, capsys):
    out = tmp_path / "run.json"
    asked = ["--model", "Tiny@random", "--k", "2", "--block", "4", "--prompts", "2", "--prompt-tokens", "200"]
    asked += ["--max-tokens", "6", "--prefix", "shared", "--rounds", "6", "--cache-gb", "0.1", "--out", str(out)]
    done = CliRunner().invoke(cli.app, ["bench", "throughput", *asked])
    assert done.exit_code == 0, done.output
    assert "first block, ms" in done.stdout
    found = json.loads(out.read_text())
    assert (found["schema"], found["kind"], found["settings"]["rounds"]) == (1, "throughput", 6)
    assert [one["name"] for one in found["benchmarks"]] == ["pyengine", "generate", "fork", "plain"]
    assert not any("differs" in warning for warning in found["warnings"])
    for one in found["benchmarks"]:
        assert len(one["stats"]["data"]) == len(one["extra_info"]["cpu_data"]) == 6
        times = one["extra_info"].get("times_as_long")
        assert (times is None) == (one["name"] == "pyengine")
        assert times is None or times["low"] <= times["ratio"] <= times["high"]
        shared = 64 / 400 if one["name"] in ("pyengine", "plain") else 0  # a page, of one of two prompts
        assert one["extra_info"]["prefix_hit_rate"] == shared, one["name"]
    assert {"cpu_flags", "clocks_mhz", "commit", "torch", "packages"} <= set(found["machine"])
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines[:6]] == found["benchmarks"][0]["stats"]["data"]
    assert "| throughput | pyengine | generate | fork | plain |" in out.with_suffix(".md").read_text()
    assert "<svg" in out.with_suffix(".svg").read_text()
    theirs = [sys.executable, "-m", "pytest_benchmark", "compare", str(out)]
    read = subprocess.run(theirs, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "benchmark 'throughput': 4 tests" in read.stdout, read.stderr


def test_a_run_ends_in_time_and_says_so():
    task = Task("Tiny@random", Blockwise(2, 4), [(20, 4)], baselines=("fork",), max_seconds=0.0, cache_gb=0.1)
    found = throughput.run(task)
    assert found.settings["rounds"] == 1, "the first always ends"
    assert any("1 of 12 rounds: --max-seconds 0 was over" in warning for warning in found.warnings)
    fork = found.benchmarks[1]["extra_info"]
    assert fork["pyengine_is"] == "cannot tell"
    assert found.document()["benchmarks"][1]["extra_info"]["times_as_long"]["high"] is None, "JSON has no infinity"


def test_who_says_something_else_is_named():
    same, other = Run([[1, 2, 3]], [[]], 3), Run([[1, 9, 3]], [[]], 3)
    found = throughput.differing(
        {"pyengine": lambda *_: same, "fork": lambda *_: other, "plain": lambda *_: same}, workload.Ask([1], 3)
    )
    assert found == ["fork differs from pyengine at token 1 of a greedy answer: they do not do the same work"]


def test_each_round_has_an_order_and_tokens_of_its_own():
    seen = []
    samples = race({name: lambda name=name: seen.append(name) for name in "abc"}, 40)
    turns = ["".join(seen[i : i + 3]) for i in range(0, 120, 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(set(turns)) == 6, "all orders come"
    assert all(len(times) == 40 for times in samples.values())
    one, other = (workload.asked([(50, 1), (60, 1)], 500, 20, number) for number in (1, 2))
    assert one[0].prompt[:20] == one[1].prompt[:20]
    assert one[0].prompt[20:] != one[1].prompt[20:50]
    assert one[0].prompt[:20] != other[0].prompt[:20]


def test_memory_is_what_a_run_takes_beside_what_was_there():
    kept = torch.ones(2**22)
    result, peak = extra_peak(lambda: float((kept + 1).sum()), CPU)
    assert result == 2 * 2**22
    assert 0.98 * 2**24 <= peak < 2 * 2**24  # the kernel counts pages in batches


def test_lengths(tmp_path):
    assert workload.lengths("fixed", 2, 5, 7) == [(5, 7)] * 2
    drawn = workload.lengths("lognormal", 4000, 100, 40)
    assert sorted(p for p, _ in drawn)[2000] == pytest.approx(100, rel=0.05)
    assert sorted(a for _, a in drawn)[2000] == pytest.approx(40, rel=0.05)
    chat = workload.lengths("chat", 20_000)
    assert sum(p for p, _ in chat) / 20_000 == pytest.approx(161.31, rel=0.04)
    assert sum(a for _, a in chat) / 20_000 == pytest.approx(337.99, rel=0.04)
    file = tmp_path / "lengths.jsonl"
    file.write_text('{"prompt_tokens": 3, "max_tokens": 4}\n{"prompt_tokens": 5}\n')
    assert workload.lengths(str(file), 1) == [(3, 4)]
    with pytest.raises(InputError, match=r"lengths.jsonl:2: max_tokens must be a whole number"):
        workload.lengths(str(file), 2)


def test_what_the_machine_says_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(sensors, "commit", lambda: "abc-dirty")
    monkeypatch.setattr(sensors.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    ticks = iter([(0, 0), (10, 100)])
    monkeypatch.setattr(sensors, "_ticks", lambda: next(ticks))
    counts = iter([{"hot": 2}, {"hot": 5}])
    monkeypatch.setattr(sensors, "_throttled", lambda: next(counts))
    load, dirty, hot, stolen = sensors.Watch(CPU).warnings()
    assert "load was 99.0" in load
    assert "dirty" in dirty
    assert hot == "hot: 3 times"
    assert "10% of the processors' time" in stolen
    assert sensors.joules(CPU) is None or sensors.joules(CPU) > 0
    for name, value in (("intel-rapl:0", "5000000"), ("intel-rapl:0:0", "1"), ("intel-rapl:1", "2000000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(value)
    monkeypatch.setattr(sensors, "POWERCAP", tmp_path)
    assert sensors.joules(CPU) == 7.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--baselines", "fork,mine"], "--baselines mine: there are generate, fork, plain, vllm"),
        (["--baselines", "vllm"], "pip install 'tilt-engine\\[vllm\\]'"),
        (["--strategy", "tokenwise", "--weight", "2"], "--baselines generate: it does not tilt tokens"),
        (["--strategy", "base"], "--baselines plain: that is the strategy base itself"),
        (["--rounds", "0"], "--rounds must be a whole number of at least 1"),
        (["--prefix", "common"], "--prefix common: shared or unique"),
        (["--lengths", "/no/such/file"], "--lengths /no/such/file: no such file"),
        (["--lengths", "chat", "--max-tokens", "4"], "are not used by --lengths chat"),
        (["--prompt-tokens", "600"], "have 664 tokens, Tiny reads 512"),
        (["--out", "run.txt"], "give a name that ends in .json"),
        (["--out", "/no/such/folder/run.json"], "No such file or directory"),
        (["--model", "Huge@random"], "--model Huge@random: no such shape"),
    ],
)
def test_bad_options_are_named(options, words):
    done = CliRunner().invoke(cli.app, ["bench", "throughput", "--model", "Tiny@random", *options])
    assert isinstance(done.exception, InputError)
    with pytest.raises(InputError, match=words):
        raise done.exception


def test_tokenwise_is_raced_with_plain():
    task = Task("Tiny@random", Tokenwise(2.0), [(20, 4)], baselines=("plain",), rounds=1, cache_gb=0.1)
    ours, plain = throughput.run(task).benchmarks
    assert plain["extra_info"]["committed_tokens_per_s"] > 0
    assert ours["extra_info"]["first_block_s"] == ours["extra_info"]["first_token_s"]


def test_a_record_that_is_none_of_ours_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 2}')
    with pytest.raises(InputError, match=r"a.json: no record of `pyengine bench`"):
        report.read(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"b.json: No such file"):
        report.read(tmp_path / "b.json")
