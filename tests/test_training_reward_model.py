"""Reward models trained through TRL: what they learn and report, that the engine takes them, lines refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import pyengine
from pyengine import BestOfK, InputError, RewardModel, SamplingParams, cli
from pyengine.evaluation.calibration import calibration, evaluate
from pyengine.integrations.trl.reward_model import default_config, train_reward_model
from pyengine.scorers import Candidates
from pyengine.training.examples import Labelled, Pair
from pyengine.worlds import reviews

QUICK = {"learning_rate": 3e-3, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained language model of two small layers with the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pyengine.embedded("policy"))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pairs(count, seed=0):
    """Reviews ordered by their exact sentiment; all pairs that differ by a third or more."""
    texts = list(reviews.corpus(8 * count, seed=seed))
    out = []
    for (prompt, a), (_, b) in zip(texts[::2], texts[1::2], strict=True):
        gap = reviews.sentiment_of(a) - reviews.sentiment_of(b)
        if abs(gap) > 1 / 3:
            out.append(Pair(prompt, *((a, b) if gap > 0 else (b, a)), f"pair {len(out)}"))
    return out[:count]


def one_plain_step(base, examples, tmp_path, batch, accumulate):
    """Train by one step of plain gradient descent at a rate of .5; the model and its scorer as they were before."""
    args = default_config(
        tmp_path / "c",
        evaluate=False,
        max_steps=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        max_grad_norm=0.0,
        seed=3,
    )
    train_reward_model(base, examples, tmp_path / "out", args=args, held_out=0, seed=3)
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return model, RewardModel(model, transformers.AutoTokenizer.from_pretrained(base))


def labelled(count, seed=0):
    texts = [(p, c, reviews.sentiment_of(c)) for p, c in reviews.corpus(4 * count, seed=seed)]
    found = [Labelled(p, c, float(s > 0), f"response {i}") for i, (p, c, s) in enumerate(texts) if abs(s) > 1 / 3]
    return found[:count]


def write(file, examples):
    def record(e):
        if isinstance(e, Pair):
            return {"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected}
        return {"prompt": e.prompt, "response": e.response, "label": int(e.label)}

    file.write_text("".join(json.dumps(record(e)) + "\n" for e in examples))
    return file


def command(model, data, out, *options):
    """The report of `pyengine train reward-model`."""
    arguments = ["train", "reward-model", str(data), "--model", str(model), "--out", str(out), *options]
    done = CliRunner().invoke(cli.app, arguments, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(directory, report) of a Bradley-Terry model on 640 pairs from a file."""
    home = tmp_path_factory.mktemp("pairwise")
    args = default_config(home / "checkpoints", num_train_epochs=3, seed=0, **QUICK)
    report = train_reward_model(base, write(home / "pairs.jsonl", pairs(640)), home / "out", args=args)
    return home / "out", report


class TestPairwise:
    def test_learns_the_order_and_reports_it(self, trained):
        out, report = trained
        assert json.loads((out / "reward_model.json").read_text()) == report
        assert report["kind"] == "pairwise"
        assert report["train"] + report["held_out"] == 640
        assert 30 < report["held_out"] < 100
        assert report["accuracy"] > 0.8
        assert report["margin"] > 0.5
        assert report["loss"] < math.log(2)
        assert 0 <= report["expected_calibration_error"] < 0.2
        assert sum(b["rows"] for b in report["calibration"]) == report["held_out"]

    def test_the_report_is_that_of_the_stored_model_on_prompts_it_has_not_seen(self, trained):
        scorer = RewardModel.from_pretrained(trained[0])
        fresh = evaluate(scorer, pairs(200, seed=77))
        assert fresh["accuracy"] > 0.8

    def test_files_hold_no_pickle(self, trained):
        names = {f.name for f in trained[0].iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "reward_model.json"} <= names
        assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
        assert load_file(trained[0] / "model.safetensors")["score.weight"].dtype == torch.float32

    def test_steers_the_engine_which_reads_it_with_a_cache_of_its_own(self, trained, engine):
        engine.set_scorer(trained[0])
        assert len(engine._readers) == 1
        prompts, sampling = reviews.prompts(64), SamplingParams(max_tokens=48, seed=1)
        steered = engine.generate(prompts, BestOfK(8), sampling)
        base = engine.generate(prompts, sampling=sampling)
        gain = torch.tensor(
            [reviews.sentiment_of(a.text) - reviews.sentiment_of(b.text) for a, b in zip(steered, base, strict=True)]
        )
        assert gain.mean() > 4 * gain.std() / 64**0.5
        scorer = engine.parts[0].scorer
        for result in steered[:3]:
            texts = [c.text for c in result.blocks[0].candidates]
            given = Candidates([result.prompt] * 8, [[1]] * 8, {}, {}, lambda _: texts)
            with torch.inference_mode():
                read = scorer.score(given).tolist()
            assert [c.utility for c in result.blocks[0].candidates] == pytest.approx(read, abs=1e-3)

    def test_all_of_it_without_a_split(self, base, tmp_path):
        args = default_config(tmp_path / "c", evaluate=False, max_steps=2, seed=0, **QUICK)
        report = train_reward_model(base, pairs(64), tmp_path / "out", args=args, held_out=0)
        assert report == {"kind": "pairwise", "base": str(base), "train": 64, "held_out": 0}
        RewardModel.from_pretrained(tmp_path / "out")

    def test_loss_is_bradley_terry_on_the_text_that_the_scorer_reads(self, base, tmp_path):
        """One step of plain gradient descent on one batch: the weights move by -lr times the loss's own gradient."""
        examples = pairs(8)
        model, scorer = one_plain_step(base, examples, tmp_path, batch=8, accumulate=1)

        def scores(side):
            texts = [getattr(e, side) for e in examples]
            given = Candidates([e.prompt for e in examples], [[1]] * 8, {}, {}, lambda _: texts)
            return scorer.score(given)

        loss = -torch.nn.functional.logsigmoid(scores("chosen") - scores("rejected")).mean()
        loss.backward()
        found = load_file(tmp_path / "out" / "model.safetensors")
        for name, value in model.named_parameters():
            torch.testing.assert_close(found[name], value.detach() - 0.5 * value.grad, atol=1e-5, rtol=1e-4, msg=name)


class TestPointwise:
    def test_learns_the_labels(self, base, tmp_path, engine):
        file = write(tmp_path / "labels.jsonl", labelled(640))
        args = default_config(tmp_path / "checkpoints", num_train_epochs=3, seed=0, **QUICK)
        report = train_reward_model(base, file, tmp_path / "out", args=args)
        assert report["kind"] == "pointwise"
        assert report["accuracy"] > 0.8
        assert report["margin"] > 1
        assert report["loss"] < math.log(2)
        state = json.loads(next((tmp_path / "checkpoints").glob("*/trainer_state.json")).read_text())
        assert state["best_metric"] == max(r["eval_accuracy"] for r in state["log_history"] if "eval_accuracy" in r)
        engine.set_scorer(tmp_path / "out")
        assert len(engine._readers) == 1

    def test_loss_is_cross_entropy_of_the_logit(self, base, tmp_path):
        """One plain step, as for the pairs."""
        examples = labelled(8)
        model, scorer = one_plain_step(base, examples, tmp_path, batch=4, accumulate=2)
        given = Candidates([e.prompt for e in examples], [[1]] * 8, {}, {}, lambda _: [e.response for e in examples])
        q, y = scorer.score(given), torch.tensor([e.label for e in examples])
        (-(y * torch.sigmoid(q).log() + (1 - y) * torch.sigmoid(-q).log())).mean().backward()
        found = load_file(tmp_path / "out" / "model.safetensors")
        for name, value in model.named_parameters():
            torch.testing.assert_close(found[name], value.detach() - 0.5 * value.grad, atol=1e-5, rtol=1e-4, msg=name)

    def test_centring_needs_pairs(self, base, tmp_path):
        args = default_config(tmp_path, center_rewards_coefficient=0.01)
        with pytest.raises(InputError, match="center_rewards_coefficient needs pairs"):
            train_reward_model(base, labelled(8), tmp_path / "out", args=args)


def test_calibration_by_hand():
    """Bins of .05 over .5 .. 1: two rows at .52 of which one is right, one at 1.0 that is wrong, one at .8 right."""
    error, bins = calibration(torch.tensor([0.51, 0.53, 1.0, 0.8]).double(), torch.tensor([True, False, False, True]))
    assert [b["rows"] for b in bins] == [2, 1, 1]
    assert error == pytest.approx(2 / 4 * 0.02 + 1 / 4 * 0.2 + 1 / 4 * 1.0, abs=1e-6)


class Told:
    """A reward model that gives these logits in turn."""

    def __init__(self, *logits):
        self.logits = iter(logits)

    def score(self, candidates):
        return torch.tensor([next(self.logits) for _ in candidates.completions])


class TestReportByHand:
    def test_pairs(self):
        """r_w - r_l of 2, -1, .5 and 0."""
        examples = [Pair("p", "a", "b", "")] * 4
        found = evaluate(Told(3.0, 0.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0), examples)
        gaps = (2.0, -1.0, 0.5, 0.0)
        assert found["accuracy"] == 0.5
        assert found["margin"] == pytest.approx(1.5 / 4)
        assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-g)) for g in gaps) / 4)
        sure = {0.0: (0.5, 0.0), 0.5: (0.6225, 1.0), -1.0: (0.7311, 0.0), 2.0: (0.8808, 1.0)}
        assert [(b["confidence"], b["accuracy"]) for b in found["calibration"]] == [
            pytest.approx(row, abs=1e-4) for row in sure.values()
        ]
        wanted = (0.5 + (1 - 0.6225) + 0.7311 + (1 - 0.8808)) / 4
        assert found["expected_calibration_error"] == pytest.approx(wanted, abs=1e-4)

    def test_labels(self):
        """Logits of 2 and -.5 for label 1, of -1 and .25 for label 0."""
        examples = [Labelled("p", "a", label, "") for label in (1.0, 1.0, 0.0, 0.0)]
        found = evaluate(Told(2.0, -0.5, -1.0, 0.25), examples)
        assert found["accuracy"] == 0.5
        assert found["margin"] == pytest.approx(1.5 / 2 - -0.75 / 2)
        signed = (2.0, -0.5, 1.0, -0.25)  # in favour of the label
        assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-s)) for s in signed) / 4)
        sure = [(0.5622, 0.0), (0.6225, 0.0), (0.7311, 1.0), (0.8808, 1.0)]
        assert [(b["confidence"], b["accuracy"]) for b in found["calibration"]] == [
            pytest.approx(row, abs=1e-4) for row in sure
        ]


class TestBadInput:
    def test_max_length_leaves_nothing_out_without_a_word(self, base, tmp_path):
        args = default_config(tmp_path / "c", max_length=20)
        examples = [*(Pair("a", " b", " c", f"short {i}") for i in range(3)), *pairs(1)]
        with pytest.raises(InputError, match=r"pair 0: has \d+ tokens, max_length is 20; shorten it or leave it out"):
            train_reward_model(base, examples, tmp_path / "out", args=args)

    @pytest.mark.parametrize("label", [2, -0.5, math.nan, "yes"])
    def test_labels_of_a_sequence(self, base, tmp_path, label):
        with pytest.raises(InputError, match=r"mine: the label must be a finite number in 0 \.\. 1"):
            train_reward_model(base, [*labelled(2), Labelled("p", " q", label, "mine")], tmp_path / "out")

    def test_two_kinds_in_a_sequence(self, base, tmp_path):
        with pytest.raises(InputError, match="mine: a Labelled among examples of kind Pair"):
            train_reward_model(base, [*pairs(2), Labelled("p", " q", 1.0, "mine")], tmp_path / "out")
        with pytest.raises(InputError, match=r"example 0 is neither a Pair nor a Labelled: \('p', 'q', 1\)"):
            train_reward_model(base, [("p", "q", 1)], tmp_path / "out")

    def test_checkpoints_that_are_somebodys(self, base, tmp_path):
        ours, theirs = tmp_path / "reward-model-checkpoints", tmp_path / "checkpoints"
        for directory in (ours, theirs):
            directory.mkdir()
            (directory / "weights").write_text("dear")
        with pytest.raises(InputError, match=f"{ours} is there already"):
            train_reward_model(base, pairs(20), tmp_path)
        with pytest.raises(InputError, match=f"{ours} is there already"):
            command(base, write(tmp_path / "pairs.jsonl", pairs(20)), tmp_path)
        (ours / "weights").unlink()
        ours.rmdir()
        with pytest.raises(InputError, match="no/such/model"):  # what fails leaves the way free
            train_reward_model("/no/such/model", pairs(20), tmp_path)
        command(base, tmp_path / "pairs.jsonl", tmp_path, "--held-out", "0")
        assert not ours.exists()
        assert (theirs / "weights").read_text() == "dear"

    @pytest.mark.parametrize(
        "option", ["--batch=0", "--accumulate=0", "--lr=-1", "--lr=nan", "--seed=-1", "--epochs=-1", "--epochs=0"]
    )
    def test_numbers_of_the_command(self, base, tmp_path, option):
        name = option.split("=")[0]
        with pytest.raises(InputError, match=f"^{name} must be a (whole|finite) number"):
            command(base, write(tmp_path / "pairs.jsonl", pairs(20)), tmp_path / "out", option)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("nonsense", "not JSON"),
            ('{"prompt": "a", "chosen": "b"}', "lacks rejected"),
            ('{"prompt": "a", "chosen": "b", "rejected": ""}', "rejected is empty"),
            ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same text"),
            ('{"prompt": "a", "response": "b", "label": 1}', "pairs and labelled responses in one file"),
        ],
    )
    def test_line(self, base, tmp_path, line, message):
        file = write(tmp_path / "pairs.jsonl", pairs(2))
        file.write_text(file.read_text() + line + "\n")
        with pytest.raises(InputError, match=rf"pairs.jsonl:3: {message}") as error:
            train_reward_model(base, file, tmp_path / "out")
        assert "\n" not in str(error.value)

    def test_longer_than_the_model_reads(self, base, tmp_path):
        examples = [*pairs(3), Pair("a", " wonderful" * 300, "b", "pairs.jsonl:4")]
        with pytest.raises(InputError, match=r"pairs.jsonl:4: has \d+ tokens, reward model .* reads 256"):
            train_reward_model(base, examples, tmp_path / "out")

    def test_nothing(self, base, tmp_path):
        with pytest.raises(InputError, match=r"none.jsonl: No such file"):
            train_reward_model(base, tmp_path / "none.jsonl", tmp_path / "out")
        with pytest.raises(InputError, match="no examples"):
            train_reward_model(base, [], tmp_path / "out")
        with pytest.raises(InputError, match=r"reward model /no/such/model: "):
            train_reward_model("/no/such/model", pairs(20), tmp_path / "out")


def test_command(base, tmp_path):
    file = write(tmp_path / "pairs.jsonl", pairs(96))
    options = ["--lr", "3e-3", "--batch", "16", "--accumulate", "1", "--held-out", "0.2"]
    report = command(base, file, tmp_path / "out", *options)
    assert report["train"] + report["held_out"] == 96
    assert 0 <= report["accuracy"] <= 1
    RewardModel.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "reward-model-checkpoints").exists()
