"""A profile's spans nest, its costs are what is moved and computed, and its time is that of the run."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

import pyengine
from pyengine import BestOfK, Blockwise, Engine, InputError, SamplingParams, Tokenwise, cli, costs
from pyengine.costs import Rates, floor
from pyengine.profiling import lines_of, profile, report
from pyengine.reference import Tree
from pyengine.timing import OFF, Cost, Timed, recording, timed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def followed():
    return Engine.from_pretrained(pyengine.embedded("policy"), scorer=pyengine.embedded("prefix"))


def test_nobody_records_and_nothing_is_asked():
    assert timed("anything", lambda: pytest.fail("a cost was asked for")) is OFF


def test_spans_nest_and_their_own_time_leaves_out_what_is_inside(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0, 7.0, 10.0, 20.0, 21.0])
    with recording(CPU) as recorder:
        monkeypatch.setattr(recorder, "now", lambda: next(clock))
        with timed("a"):
            with timed("b", lambda: Cost(8.0)):
                pass
            with timed("b"):
                pass
        with timed("c"):
            pass
        with pytest.raises(InputError, match="one profile at a time"), recording(CPU):
            pass
    assert recorder.spans() == [
        Timed(("a", "b"), 3.0, 3.0, Cost(8.0)),
        Timed(("a", "b"), 2.0, 2.0, None),
        Timed(("a",), 10.0, 5.0, None),
        Timed(("c",), 1.0, 1.0, None),
    ]
    assert timed("later") is OFF


def test_an_error_inside_is_the_callers():
    with pytest.raises(ZeroDivisionError), recording(CPU) as recorder, timed("a", lambda: pytest.fail("no cost")):
        _ = 1 / 0
    assert [span.path for span in recorder.spans()] == [("a",)]


def test_lines_sum_what_a_phase_calls_and_say_what_binds_it():
    rates = Rates(100.0, 1000.0, 10.0)
    spans = [
        Timed(("sample", "tilt"), 2.0, 2.0, Cost(100.0, 0.0, 5.0)),
        Timed(("sample", "tilt"), 3.0, 3.0, Cost(200.0, 0.0, 10.0)),
        Timed(("sample", "model"), 9.0, 4.0, Cost(100.0, 9000.0)),
        Timed(("sample", "quick"), 9.0, 3.5, Cost(1.0)),
        Timed(("commit", "text"), 1.0, 1.0, None),
        Timed(("sample",), 30.0, 11.0, None),
    ]
    found = lines_of(spans, rates)
    assert [(line.phase, line.op, line.calls, line.seconds) for line in found] == [
        ("sample", "tilt", 2, 5.0),
        ("sample", "model", 1, 4.0),
        ("sample", "quick", 1, 3.5),
        ("commit", "text", 1, 1.0),
    ]
    assert [line.binds for line in found] == ["bytes", "products", "calls", "host"]
    assert [line.least for line in found] == [3.0, 9.0, 0.01, 0.0]
    assert floor(Cost(1.0, 1.0, 9.0), rates) == (0.9, "exponentials")


def test_costs_count_what_is_there(followed):
    model = followed.model
    body = sum(p.numel() for p in model.model.layers.parameters()) + model.model.norm.weight.numel()
    head = model.lm_head.weight.numel()
    assert costs.weights_of(model) == (body, head, 4 * body, 4 * head)
    assert costs.model_pass(costs.Weights(10, 4, 20, 4), 3, 1) == Cost(24.0, 2.0 * (30 + 4))
    assert costs.tilt_sample(torch.zeros(2, 5).half(), torch.zeros(3, 2, 5)) == Cost(20 + 120, 0.0, 20.0)
    # Prompts of 7 and 9 tokens with two rows and one; tails of 1, 2 and 3, the new token included; 4 heads, 2 of keys.
    tree = Tree(*(torch.tensor(x) for x in ([[0], [1]], [7, 9], [0, 2, 3], [[0], [1], [2]], [1, 2, 3])))
    seen = costs.tree_attention(torch.zeros(4, 3, 8), torch.zeros(2, 3, 8), tree, 1, window=8)
    assert seen.exps == (2 * 7 + 8 + 6) * 4
    found = costs.tree_attention(torch.zeros(4, 3, 8), torch.zeros(2, 3, 8), tree, 1, None)
    keys, pairs = 7 + 9 + 6, 2 * 7 + 9 + 6
    assert found == Cost(2 * keys * 2 * 8 * 4 + 2 * 4 * 3 * 8 * 4, 4 * pairs * 4 * 8, pairs * 4)
    found = costs.causal(torch.zeros(4, 5, 8), torch.zeros(2, 5, 8), [(None, 0, 3), (None, 2, 4)])
    assert found == costs.attention(torch.zeros(4, 5, 8), 3 + 4, (1 + 2 + 3) + (3 + 4), 8, 2)


@pytest.mark.parametrize("strategy", [Blockwise(4, 8), BestOfK(3), Tokenwise(2.0), Tokenwise(kl_budget=0.1), None])
def test_a_profile_names_where_the_time_went(followed, strategy, tmp_path, capsys):
    prompts = ["Review of the Harbour, a bakery:", "Review of a clock:"]
    sampling = SamplingParams(24, seed=3, stop=["zzz"])
    plain = followed.generate(prompts, strategy, sampling)
    kept = []
    found = profile(lambda: kept.append(followed.generate(prompts, strategy, sampling)) or kept[-1], CPU, tmp_path)
    assert [[result.tokens for result in results] for results in kept] == [[r.tokens for r in plain]] * 3
    assert 0 <= found.unattributed < found.seconds
    assert sum(line.seconds for line in found.lines) + found.unattributed == pytest.approx(found.seconds, rel=1e-6)
    calls = {(line.phase, line.op): line.calls for line in found.lines}
    steps = calls["sample", "model"]
    assert calls["sample", "tree_attention"] == steps * followed.model.config.num_hidden_layers
    assert steps <= calls["sample", "tilt_sample"] <= steps + 8
    assert calls["prefill", "model"] == 1
    named = {op for _, op in calls}
    if isinstance(strategy, Tokenwise):
        assert "values prefix" in named
        assert ("solve_weight" in named) == (strategy.kl_budget is not None)
    elif strategy is not None:
        assert {"scorer prefix", "select_block"} <= named
    assert found.blocks == sum(len(result.blocks) or len(result.tokens) for result in plain)
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["schema"] == 1
    assert saved["lines"][0]["op"] == found.lines[0].op
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {"sample", "model", "tilt_sample"} <= {event.get("name") for event in events}
    report(found)
    assert "(unattributed)" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out"):
        profile(lambda: pytest.fail("it ran"), CPU, tmp_path / "file")


def test_the_command_takes_generates_options(tmp_path):
    """One row of the file has no prompt: it is told, the others are profiled, and the exit code is 1."""
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "Review of a clock:"}\n{"prompt": ""}\n')
    out = tmp_path / "out"
    asked = ["--input", str(source), "--scorer", "probe", "--k", "2", "--block", "4", "--max-tokens", "8"]
    done = CliRunner().invoke(cli.app, ["profile", *asked, "--out", str(out)])
    assert done.exit_code == 1
    assert "rows.jsonl:2 is empty" in done.stderr
    assert "scorer probe" in done.stdout
    saved = json.loads((out / "profile.json").read_text())
    assert saved["tokens"] <= 8
    wanted = CliRunner().invoke(cli.app, ["profile", "a prompt", "--stream"])
    assert wanted.exit_code == 2
