"""Preference pairs: the rules of choosing, the same pairs whatever the batch, runs that are taken up, refused input."""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from pyengine import InputError, SamplingParams, cli, rewards
from pyengine.training import pairs
from pyengine.training.examples import read_preferences
from pyengine.training.pairs import Answer, build_pairs, choose
from pyengine.worlds import reviews

PROMPTS = reviews.prompts(12)
SAMPLING = SamplingParams(max_tokens=36, temperature=0.7, top_p=0.95, seed=3)
SETTINGS = {"samples": 4, "sampling": SAMPLING}


def answers(*scored):
    """Answers named a, b, ... of (reward, length)."""
    return [Answer(chr(97 + i), *pair) for i, pair in enumerate(scored)]


def picked(*scored, **options):
    outcome, chosen, rejected = choose(answers(*scored), **options)
    return (chosen.response, rejected.response) if outcome == "pair" else outcome


def jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        ([(1.0, 5), (3.0, 5), (2.0, 5)], ("b", "a")),
        ([(3.0, 9), (3.0, 4), (1.0, 5), (3.0, 6)], ("b", "c")),  # a tie at the top: the shortest
        ([(3.0, 4), (3.0, 4), (1.0, 5)], ("a", "c")),  # still tied: the first
        ([(1.0, 2), (3.0, 10), (1.0, 30), (1.0, 13), (2.0, 10)], ("b", "d")),  # at the bottom: closest in length
        ([(1.0, 8), (3.0, 10), (1.0, 12)], ("b", "a")),  # as close: the first
        ([(3.0, 20), (1.0, 19), (3.0, 10), (1.0, 12)], ("c", "d")),  # closest to the one that was chosen
        ([(2.0, 5), (2.0, 6), (2.0, 7)], "tied"),
        ([(2.0, 5)], "single"),
        ([], "single"),
    ],
)
def test_best_against_worst(scored, expected):
    assert picked(*scored) == expected


def test_equal_texts_make_no_pair():
    assert choose([Answer("a", 1.0, 3), Answer("a", 0.0, 3)]).outcome == "equal"


def test_hybrid_draws_any_that_is_lower_by_the_margin():
    scored = [(5.0, 3), (4.5, 3), (4.0, 3), (1.0, 3), (2.0, 3)]
    rng = random.Random(0)
    drawn = Counter(picked(*scored, margin=1.0, rng=rng) for _ in range(600))
    assert set(drawn) == {("a", "c"), ("a", "d"), ("a", "e")}  # 4.0 is lower by exactly 1
    assert all(150 < times < 250 for times in drawn.values())
    assert picked(*scored, margin=4.5) == "margin"
    for best, worst in ((0.3, 0.2), tuple(torch.tensor([0.7, 0.6]).tolist())):  # off by a rounding, fp64 and fp32
        assert best - worst < 0.1
        assert picked((best, 3), (worst, 3), margin=0.1) == ("a", "b")
        assert picked((best, 3), (worst, 3), margin=0.1001) == "margin"
    assert picked((1e9, 3), (1e9 - 50, 3), margin=1e-6) == ("a", "b")
    assert picked((2.0, 5), (2.0, 6), margin=0.5) == "tied"
    assert picked((2.0, 9), (2.0, 6), (0.0, 1), margin=0.5) == ("b", "c")  # a tie at the top: the shortest


def test_pairs_are_the_best_and_the_worst_of_the_samples(engine, tmp_path):
    out = tmp_path / "pairs.jsonl"
    report = build_pairs(engine, [*PROMPTS, PROMPTS[0]], reviews.sentiment, out, **SETTINGS)
    assert engine.parts == []
    found = {line["prompt"]: line for line in read(out)}
    assert list(found) == [prompt for prompt in PROMPTS if prompt in found]
    cut = 0
    for prompt in PROMPTS:
        sampling = [SamplingParams(36, 0.7, top_p=0.95, seed=3 + j) for j in range(4)]
        results = engine.generate([prompt] * 4, sampling=sampling)
        whole = [r for r in results if r.finish_reason == "stop"]
        cut += 4 - len(whole)
        scores = reviews.sentiment([], [r.text for r in whole])
        if len(set(scores)) < 2:
            assert prompt not in found
            continue
        line = found[prompt]
        assert list(line) == ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
        assert (line["score_chosen"], line["score_rejected"]) == pytest.approx((max(scores), min(scores)))
        by_text = dict(zip((r.text for r in whole), whole, strict=True))
        best, worst = by_text[line["chosen"]], by_text[line["rejected"]]
        tops = [r for r, s in zip(whole, scores, strict=True) if s == max(scores)]
        bottoms = [r for r, s in zip(whole, scores, strict=True) if s == min(scores)]
        assert len(best.tokens) == min(len(r.tokens) for r in tops)
        gaps = [abs(len(r.tokens) - len(best.tokens)) for r in bottoms]
        assert abs(len(worst.tokens) - len(best.tokens)) == min(gaps)
    assert cut > 0  # so that the rule for them was needed
    assert len(found) > 6
    assert report["left_out"] == {"cut_off": cut}
    assert (report["prompts"], report["repeated"], report["sampled"]) == (12, 1, 48)
    assert report["pairs"] == len(found) == len(read_preferences(out))
    assert report["pairs"] + sum(report["dropped"].values()) == 12
    assert json.loads((tmp_path / "pairs.jsonl.report.json").read_text()) == report


def test_the_same_pairs_whatever_the_batch_and_the_order(engine, tmp_path, monkeypatch):
    build_pairs(engine, PROMPTS, reviews.sentiment, tmp_path / "a", margin=0.2, **SETTINGS)
    monkeypatch.setattr(pairs, "AT_ONCE", 8)  # two prompts in a shard
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    build_pairs(engine, shuffled, reviews.sentiment, tmp_path / "b", margin=0.2, **SETTINGS)
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert len(one) > 4
    assert sorted(one, key=str) == sorted(other, key=str)
    assert all(line["score_chosen"] - line["score_rejected"] >= 0.2 for line in one)
    sampling = SamplingParams(36, 0.7, top_p=0.95, seed=50)
    build_pairs(engine, PROMPTS, reviews.sentiment, tmp_path / "c", samples=4, sampling=sampling)
    assert not {line["chosen"] for line in one} & {line["chosen"] for line in read(tmp_path / "c")}


def test_a_run_that_was_cut_short_samples_only_what_is_missing(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "AT_ONCE", 16)  # four prompts in a shard
    options = {**SETTINGS, "progress": True}
    build_pairs(engine, PROMPTS, reviews.sentiment, tmp_path / "whole", **options)
    generate, asked = engine.generate, []

    def dying(prompts, *arguments, **settings):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(prompts)
        return generate(prompts, *arguments, **settings)

    monkeypatch.setattr(engine, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(engine, PROMPTS, reviews.sentiment, tmp_path / "out", **options)
    monkeypatch.setattr(engine, "generate", lambda p, *a, **k: asked.append(p) or generate(p, *a, **k))
    for changes, message in (
        ({"samples": 3}, "another sampling"),
        ({"margin": 1.0}, "another margin"),
        ({"scorer": reviews.politeness}, "another scorer"),
        ({"prompts": PROMPTS[1:]}, "another prompts"),
        ({"resume": False}, "cut short: resume it"),
    ):
        given = {"prompts": PROMPTS, "scorer": reviews.sentiment, "out": tmp_path / "out", "resume": True, **options}
        with pytest.raises(InputError, match=message):
            build_pairs(engine, **(given | changes))
    assert len(asked) == 1
    report = build_pairs(engine, PROMPTS, reviews.sentiment, tmp_path / "out", resume=True, **options)
    assert [p for some in asked for p in some] == [p for p in PROMPTS for _ in range(4)]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert build_pairs(engine, PROMPTS, reviews.sentiment, tmp_path / "out", resume=True, **options) == report
    assert len(asked) == 3


def test_others_responses_stand_beside_the_samples(engine, tmp_path):
    great, awful = " The bread was wonderful. I loved the cake.", " The bread was awful. I hated the cake."
    lines = [
        {"prompt": PROMPTS[0], "response": great, "reward": 7.0},  # scored by somebody already
        {"prompt": PROMPTS[1], "response": great},
        {"prompt": PROMPTS[2], "response": awful * 3},
        {"prompt": PROMPTS[2], "response": great * 3},
    ]
    file = jsonl(tmp_path / "given.jsonl", lines)
    scorer = [(1.0, reviews.sentiment), (0.01, rewards.length())]
    report = build_pairs(engine, PROMPTS[:4], scorer, tmp_path / "out", candidates=file, **SETTINGS)
    found = {line["prompt"]: line for line in read(tmp_path / "out")}
    assert (found[PROMPTS[0]]["chosen"], found[PROMPTS[0]]["score_chosen"]) == (great, 7.0)
    assert (found[PROMPTS[2]]["chosen"], found[PROMPTS[2]]["rejected"]) == (great * 3, awful * 3)
    tokens = len(engine.tokenizer(great * 3).input_ids) + 1
    expected = reviews.sentiment_of(great * 3) + 0.01 * math.log(tokens / 1024)
    assert found[PROMPTS[2]]["score_chosen"] == pytest.approx(expected, abs=1e-6)
    assert report["given"] == 4
    assert report["chosen_given"] >= 2
    assert report["rejected_given"] >= 1
    file.write_text(file.read_text() + "\n")
    with pytest.raises(InputError, match="made with another candidates"):
        build_pairs(engine, PROMPTS[:4], scorer, tmp_path / "out", candidates=file, resume=True, **SETTINGS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "given.jsonl:2: must be a JSON object"),
        ({"prompt": PROMPTS[0]}, "given.jsonl:2: lacks 'response'"),
        ({"prompt": "Another:", "response": " Fine."}, "given.jsonl:2: its prompt is not among those to sample for"),
        ({"prompt": PROMPTS[0], "response": " "}, "given.jsonl:2: the response is empty"),
        ({"prompt": PROMPTS[0], "response": " A.", "reward": None}, "given.jsonl:2: the reward must be a number"),
        ({"prompt": PROMPTS[0], "response": " A.", "finish_reason": "length"}, "was cut off makes no pair"),
        ({"prompt": PROMPTS[0], "response": " very" * 600}, "given.jsonl:2: prompt and response have"),
    ],
)
def test_bad_candidates_are_named(engine, tmp_path, line, message):
    file = jsonl(tmp_path / "given.jsonl", [{"prompt": PROMPTS[0], "response": " Fine."}, line])
    with pytest.raises(InputError, match=message):
        build_pairs(engine, PROMPTS[:1], reviews.sentiment, tmp_path / "out", candidates=file, **SETTINGS)
    assert not (tmp_path / "out.shards").exists()


def test_degenerate_prompts_are_counted_and_make_no_pair(engine, tmp_path):
    def flat(prompts, completions):
        return [0.5] * len(prompts)

    def built(name, scorer, **changes):
        return build_pairs(engine, PROMPTS[:3], scorer, tmp_path / name, **(SETTINGS | changes))

    report = built("flat", flat)
    assert (report["pairs"], report["dropped"]) == (0, {"tied": 3})
    assert (tmp_path / "flat").read_text() == ""
    short = built("short", reviews.sentiment, sampling=SamplingParams(max_tokens=2, seed=0))
    assert (short["dropped"], short["left_out"]) == ({"single": 3}, {"cut_off": 12})
    assert built("greedy", reviews.sentiment, sampling=SamplingParams(200, 0.0, seed=0))["dropped"] == {"tied": 3}
    far = built("far", reviews.sentiment, margin=2.5, sampling=SamplingParams(200, seed=0))
    assert far["pairs"] == 0
    assert far["dropped"].get("margin", 0) > 0


def test_what_was_cut_off_makes_pairs_at_a_fixed_horizon_only(engine, tmp_path, caplog):
    def long(prompts, completions):
        return [float(len(c)) for c in completions]

    def built(name, **changes):
        caplog.clear()
        settings = SETTINGS | {"sampling": SamplingParams(max_tokens=2, seed=0)} | changes
        return build_pairs(engine, PROMPTS[:3], long, tmp_path / name, **settings)

    assert built("none")["pairs"] == 0
    count = 3 * SETTINGS["samples"]
    assert [line.split(":")[0] for line in caplog.messages] == [
        f"{count} of {count} responses were cut off at 2 tokens and make no pair",
        "no pair was made of 3 prompts",
    ]
    report = built("all", fixed_horizon=True)
    assert report["pairs"] > 0
    assert (report["left_out"], caplog.messages) == ({}, [])
    for line in read(tmp_path / "all"):
        for name in ("chosen", "rejected"):
            assert line[f"score_{name}"] == len(line[name])
    with pytest.raises(InputError, match="was made with another fixed_horizon"):
        built("all", resume=True)


def test_empty_responses_are_no_candidates(engine, tmp_path, monkeypatch):
    generate = engine.generate

    def emptied(*arguments, **settings):
        results = generate(*arguments, **settings)
        results[0].text = "  "
        results[0].finish_reason = "stop"
        return results

    monkeypatch.setattr(engine, "generate", emptied)
    report = build_pairs(engine, PROMPTS[:2], reviews.sentiment, tmp_path / "out", **SETTINGS)
    assert report["left_out"]["empty"] == 1


def test_what_cannot_be_used_is_refused(engine, tmp_path):
    def bad(prompts, completions):
        return [math.nan] * len(prompts)

    for changes, message in (
        ({"scorer": bad}, r"sample \d of prompt 'Review of .*: its score is nan, it must be finite"),
        ({"scorer": []}, "needs a scorer"),
        ({"prompts": []}, "needs prompts"),
        ({"prompts": ["fine", "", ""]}, "2 of 3 prompts cannot be used: prompt 1 is empty.*; prompt 2 is empty"),
        ({"samples": 1}, "one sample makes no pair"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"margin": 0.0}, "margin must be a finite number"),
        ({"sampling": SamplingParams()}, "needs a seed"),
        ({"candidates": "/no/such.jsonl"}, "/no/such.jsonl: No such file"),
    ):
        given = {"prompts": PROMPTS[:2], "scorer": reviews.sentiment, "out": tmp_path / "out", **SETTINGS}
        with pytest.raises(InputError, match=message):
            build_pairs(engine, **(given | changes))
    file = jsonl(tmp_path / "given.jsonl", [{"prompt": PROMPTS[0], "response": " Fine."}])
    with pytest.raises(InputError, match=r"given.jsonl:1: its score is nan"):
        build_pairs(
            engine,
            PROMPTS[:1],
            lambda prompts, completions: [math.nan if c == " Fine." else 0.0 for c in completions],
            tmp_path / "out",
            candidates=file,
            **SETTINGS,
        )


def test_prompts_of_a_file_are_named_by_their_lines(engine, tmp_path):
    file = jsonl(tmp_path / "prompts.jsonl", [{"prompt": PROMPTS[0]}, "", {"prompt": ""}, {"prompt": PROMPTS[0] * 500}])
    with pytest.raises(InputError, match=r"2 of 3 prompts .*prompts.jsonl:3 is empty.*prompts.jsonl:4.*tokens"):
        build_pairs(engine, file, reviews.sentiment, tmp_path / "out", **SETTINGS)


def test_candidates_are_read_once(engine, tmp_path):
    line = {"prompt": PROMPTS[0], "response": " The bread was wonderful."}
    file, pipe = jsonl(tmp_path / "given.jsonl", [line]), tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_bytes(file.read_bytes()))
    thread.start()
    one = build_pairs(engine, PROMPTS[:1], reviews.sentiment, tmp_path / "a", candidates=pipe, **SETTINGS)
    thread.join()
    other = build_pairs(engine, PROMPTS[:1], reviews.sentiment, tmp_path / "b", candidates=file, **SETTINGS)
    assert one["given"] == 1
    assert one["of"] == other["of"]


def test_a_response_may_stand_beside_a_single_sample(engine, tmp_path):
    file = jsonl(tmp_path / "given.jsonl", [{"prompt": PROMPTS[0], "response": " The bread was wonderful."}])
    settings = {"samples": 1, "sampling": SamplingParams(200, seed=0), "candidates": file}
    report = build_pairs(engine, PROMPTS[:2], reviews.sentiment, tmp_path / "out", **settings)
    assert report["dropped"]["single"] == 1
    assert report["given"] == 1


def test_an_output_that_is_there_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "out").write_text("")
    arguments = ["pairs", "--scorer", "sentiment", "--out", tmp_path / "out", "--model", "no/such", "--prompts", "p"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), standalone_mode=False)
    assert isinstance(done.exception, InputError)
    assert "exists already" in str(done.exception)


def test_command(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["pairs", *map(str, arguments)], standalone_mode=False)

    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS[:4]])
    options = ("--prompts", prompts, "--scorer", "probe", "--out", tmp_path / "out", "--samples", 3)
    done = run(*options, "--max-tokens", 200)
    assert done.exit_code == 0, done.exception
    report = json.loads(done.stdout)
    assert report["pairs"] == len(read_preferences(tmp_path / "out")) > 0
    assert report["of"]["sampling"]["temperature"] == 0.7
    assert report["of"]["sampling"]["top_p"] == 0.95
    for arguments, message in (
        ((*options, "--max-tokens", 200), "exists already"),
        ((*options, "--resume", "--seed", 1), "made with another sampling"),
        (("--scorer", "probe", "--out", tmp_path / "o", "--model", tmp_path), "need --prompts"),
    ):
        failed = run(*arguments)
        assert isinstance(failed.exception, InputError)
        assert message in str(failed.exception)
    options = ("--prompts", prompts, "--scorer", "probe", "--max-tokens", 2, "--out")
    failed = run(*options, tmp_path / "none")
    assert (failed.return_value, json.loads(failed.stdout)["pairs"]) == (1, 0)
    assert json.loads(run(*options, tmp_path / "some", "--fixed-horizon").stdout)["pairs"] > 0
