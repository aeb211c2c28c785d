"""`pyengine train preference` and `offline`: what they leave, that they resume, that two processes do as one."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from pyengine import Engine, InputError, SamplingParams, cli
from pyengine.integrations.trl import runs
from pyengine.integrations.trl.runs import PolicyTraining, train_offline, train_preference
from pyengine.rewards import Statistics
from pyengine.rewards.conditioning import Conditioning
from pyengine.training.data import encode, read_examples

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs")


def pairs(count=24):
    return [
        {
            "prompt": f"pack {WORDS[i % 6]}",
            "chosen": f" the {WORDS[i % 10]} {WORDS[(3 * i + 1) % 10]}",
            "rejected": f" {WORDS[(i + 5) % 10]}" * (i % 3 + 1),
        }
        for i in range(count)
    ]


def rewarded(count=24):
    return [
        {"prompt": f"pack {WORDS[i % 6]}", "response": f" {WORDS[i % 10]} {WORDS[(7 * i) % 10]}", "reward": i % 5 - 1.5}
        for i in range(count)
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(*arguments):
    """The report that `pyengine train ARGUMENTS` prints."""
    done = CliRunner().invoke(cli.app, ["train", *map(str, arguments)], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


QUICK = ("--batch", 8, "--accumulate", 2, "--lr", 1e-3)


def weights(directory, name="model.safetensors"):
    return load_file(directory / name)


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name, **tolerance)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto"])
def test_preferences_move_the_policy_and_it_decodes(model_dirs, tmp_path, loss):
    data, out = write(tmp_path / "pairs.jsonl", pairs()), tmp_path / "out"
    report = command(
        "preference", data, "--model", model_dirs["llama"], "--out", out, "--loss", loss, "--weights", "none",
        "--epochs", 4, "--held-out", 0.2, *QUICK,
    )  # fmt: skip
    assert json.loads((out / "report.json").read_text()).items() >= report.items()
    assert (report["examples"], report["cut"], report["same_tokens"]) == (24, 0, 0)
    assert report["train"] == (40 if loss == "kto" else 20)
    assert report["beta"] == {"dpo": 0.01, "simpo": 2.0, "kto": 0.1}[loss]
    assert report["steps"] == 4 * (5 if loss == "kto" else 3)
    assert report["held_out"]["rewards/margins"] > 0
    names = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "report.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl")) or name == "checkpoints"]
    assert not torch.equal(weights(out)["lm_head.weight"], weights(model_dirs["llama"])["lm_head.weight"])
    engine = Engine.from_pretrained(out)
    assert engine.generate("pack my", sampling=SamplingParams(max_tokens=3, seed=0))[0].tokens


def test_a_killed_run_resumes_to_the_same_weights(model_dirs, tmp_path):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    data = write(tmp_path / "pairs.jsonl", pairs())
    training = PolicyTraining(1e-3, batch=8, accumulate=2, epochs=3, held_out=0, checkpoint_every=2, lora=2)
    run = (model_dirs["llama"], data)
    with pytest.raises(KeyboardInterrupt):
        train_preference(*run, tmp_path / "killed", training=training, callbacks=[Kill()])
    with pytest.raises(InputError, match="holds checkpoints of an earlier run"):
        train_preference(*run, tmp_path / "killed", training=training)
    with pytest.raises(InputError, match="of a run with another loss"):
        train_preference(*run, tmp_path / "killed", "hinge", training=training, resume=True)
    about = tmp_path / "killed" / "checkpoints" / "run.json"
    known = about.read_text()
    about.write_text(known[:9])
    with pytest.raises(InputError, match=r"run.json is missing or damaged"):
        train_preference(*run, tmp_path / "killed", training=training, resume=True)
    about.write_text(known)
    report = train_preference(*run, tmp_path / "killed", training=training, resume=True)
    assert report["steps"] == 9
    train_preference(*run, tmp_path / "whole", training=training)
    name = "adapter_model.safetensors"
    assert_same(weights(tmp_path / "killed", name), weights(tmp_path / "whole", name), rtol=0, atol=0)


def test_an_adapter_is_merged_or_refused(model_dirs, tmp_path, monkeypatch):
    """The policy that training starts from is the adapted one, from a relative path too."""
    data = write(tmp_path / "pairs.jsonl", pairs(8))
    (tmp_path / "base").symlink_to(model_dirs["llama"])
    monkeypatch.chdir(tmp_path)
    first = PolicyTraining(1e-1, epochs=3, batch=8, accumulate=1, held_out=0, lora=2)
    train_preference("base", data, "first", training=first)
    config = tmp_path / "first" / "adapter_config.json"
    about = json.loads(config.read_text())
    assert about["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    with pytest.raises(InputError, match=r"first: an adapter, and another would be stored without it: merge it") as e:
        train_preference("first", data, "second", training=first)
    assert "\n" not in str(e.value)
    second = PolicyTraining(1e-12, batch=8, accumulate=1, held_out=0)
    train_preference("first", data, "second", training=second)
    name = "model.layers.0.self_attn.q_proj"
    saved = weights(tmp_path / "first", "adapter_model.safetensors")
    low = [saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA"]
    start = weights(model_dirs["llama"])[f"{name}.weight"]
    assert (low[0] @ low[1]).abs().max() > 1e-2
    torch.testing.assert_close(weights(tmp_path / "second")[f"{name}.weight"], start + 2 * low[0] @ low[1])
    config.write_text("{}")
    with pytest.raises(InputError, match=r"first: an adapter, whose adapter_config.json names no base"):
        train_preference("first", data, "third", training=second)
    config.write_text(json.dumps(about | {"r": 3}))
    with pytest.raises(InputError, match=r"first: an adapter that does not go into /.*: ") as e:
        train_preference("first", data, "third", training=second)
    assert "\n" not in str(e.value)
    config.write_text(json.dumps(about | {"base_model_name_or_path": "/no/base"}))
    with pytest.raises(InputError, match="an adapter; its base /no/base: no such directory"):
        train_preference("first", data, "third", training=second)
    with pytest.raises(InputError, match="first: an adapter on /no/base, which is no directory here: "):
        Engine.from_pretrained("first")


def test_a_used_directory(model_dirs, tmp_path):
    data, out = write(tmp_path / "pairs.jsonl", pairs(8)), tmp_path / "out"
    given = ("preference", data, "--model", model_dirs["llama"], "--held-out", 0, *QUICK)
    with pytest.raises(InputError, match="is the model that is trained"):
        command(*given, "--out", model_dirs["llama"])
    report = command(*given, "--out", out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"holds model.safetensors of an earlier run|holds report.json of an earlier"):
        command(*given, "--out", out)
    with pytest.raises(InputError, match="holds a finished run with another seed"):
        command(*given, "--out", out, "--resume", "--seed", 1)
    assert command(*given, "--out", out, "--resume") == report
    (out / "report.json").unlink()
    with pytest.raises(InputError, match=r"holds model.safetensors of an earlier run"):
        command(*given, "--out", out, "--resume")
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_two_processes_give_what_one_gives(model_dirs, tmp_path, in_two_processes):
    """LoRA under WPO, through `accelerate launch` on CPUs; 21 pairs do not divide into batches of 8."""
    data = write(tmp_path / "pairs.jsonl", pairs(21))
    options = ["preference", str(data), "--model", str(model_dirs["llama"]), "--lora", "4", "--held-out", "0"]
    options += ["--batch", "8", "--lr", "1e-2", "--accumulate"]
    said = in_two_processes("train", *options, 1, "--out", tmp_path / "two")
    both, one = json.loads(said.splitlines()[-1]), command(*options, "2", "--out", tmp_path / "one")
    assert (both["processes"], both["steps"], both["beta"]) == (2, one["steps"], one["beta"])
    assert both["training_loss"] == pytest.approx(one["training_loss"], rel=1e-4)
    names = {file.name for file in (tmp_path / "two").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "report.json"} <= names
    adapters = [weights(tmp_path / n, "adapter_model.safetensors") for n in ("one", "two")]
    assert any(value.abs().max() > 1e-2 for name, value in adapters[0].items() if "lora_B" in name)
    assert_same(*adapters, rtol=1e-3, atol=1e-4)
    found = Engine.from_pretrained(tmp_path / "two").generate("pack", sampling=SamplingParams(max_tokens=3, seed=0))
    assert found[0].tokens


@pytest.mark.parametrize("method", ["fa", "rwr", "ca", "sft"])
def test_offline(model_dirs, tmp_path, method):
    rows = [{k: v for k, v in row.items() if k != "reward" or method != "sft"} for row in rewarded()]
    data, out = write(tmp_path / "rewards.jsonl", rows), tmp_path / "out"
    options = {"rwr": ("--beta", 2, "--reduction", "token_mean"), "fa": ("--threshold", 0.2)}.get(method, ())
    report = command(
        "offline",
        data,
        "--model",
        model_dirs["llama"],
        "--out",
        out,
        "--method",
        method,
        "--held-out",
        0,
        *QUICK,
        *options,
    )
    statistics = Statistics.of([row["reward"] for row in rewarded()])
    z = torch.tensor(statistics.z([row["reward"] for row in rewarded()]))
    assert (out / "reward_statistics.json").exists() == (method != "sft")
    assert (out / "conditioning.json").exists() == (method == "ca")
    w = {"fa": (z > 0.2).float(), "rwr": (z / 2).exp()}.get(method, torch.ones_like(z))
    if method == "sft":
        assert "statistics" not in report
    else:
        assert Statistics.load(out / "reward_statistics.json") == statistics
        assert report["retained"] == (w > 0).double().mean().item()
        assert report["mean_z"] == pytest.approx(((w * z).sum() / w.sum()).item(), abs=1e-5)
    assert report["steps"] == 3
    assert not torch.equal(weights(out)["lm_head.weight"], weights(model_dirs["llama"])["lm_head.weight"])
    if method == "ca":
        prompt = Conditioning.load(out / "conditioning.json").prompt("pack my", 5.0)
        assert prompt == "User:pack my Assistant: <rm_score> 5.0"
        assert Engine.from_pretrained(out).generate(prompt, sampling=SamplingParams(max_tokens=2, seed=0))


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_parts_of_a_step_change_nothing(model_dirs, tmp_path, reduction):
    data = write(tmp_path / "rewards.jsonl", rewarded(12))
    losses = []
    for parts in (1, 4):
        training = PolicyTraining(1e-3, batch=8, accumulate=parts, held_out=0)
        options = {"method": "rwr", "reduction": reduction, "training": training}
        losses.append(train_offline(model_dirs["llama"], data, tmp_path / str(parts), **options)["training_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(weights(tmp_path / "1"), weights(tmp_path / "4"), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("nonsense", (), "pairs.jsonl:3: not JSON"),
        ('{"prompt": "a", "chosen": "b"}', (), "pairs.jsonl:3: lacks rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', (), "pairs.jsonl:3: chosen and rejected are the same"),
        (None, ("--max-length", 2), r"of 2 lines cannot be used: .*:1: the prompt has \d+ tokens, .* within 2"),
        (None, ("--loss", "ppo"), "loss must be one of dpo, ipo, hinge, simpo, orpo, kto"),
        (None, ("--loss", "kto", "--variant", "chosen"), "variant is of pairs"),
        (None, ("--weights", "W"), "weights must be one of"),
        (None, ("--weights", "off", "--clamp", "none"), r"clamp \(--clamp\) is read only with weights, which are off"),
        (None, ("--batch", 3, "--accumulate", 2), "a batch of 3 cannot be shared by 1 processes that accumulate 2"),
        (None, ("--clamp", "sum"), "clamp must be one of product, none, got 'sum'"),
        (None, ("--batch", 0), "batch must be a whole number"),
        (None, ("--lr", 0), "lr must be a finite number"),
        (None, ("--lora", 0), "lora must be a whole number"),
        (None, ("--model", "/no/such"), "model /no/such: no such directory"),
        (None, ("--loss", "kto", "--batch", 2, "--accumulate", 2), r"\(--batch\): 2 in 2 parts .* at least 4"),
    ],
)
def test_preferences_at_fault(model_dirs, tmp_path, line, options, message):
    data = write(tmp_path / "pairs.jsonl", pairs(2))
    data.write_text(data.read_text() + (line or ""))
    with pytest.raises(InputError, match=message) as error:
        command("preference", data, "--model", model_dirs["llama"], "--out", tmp_path / "out", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "report.json").exists()


class TestLabels:
    def labelled(self, count=6):
        return [
            {"prompt": f"pack {WORDS[i]}", "response": f" the {WORDS[i + 1]}", "label": i % 2} for i in range(count)
        ]

    def test_a_single_response_is_not_held_out(self, model_dirs, tmp_path):
        data = write(tmp_path / "labels.jsonl", self.labelled())
        with pytest.raises(InputError, match=r"held_out \(--held-out\): a single response .* give 0"):
            command(
                "preference", data, "--model", model_dirs["llama"], "--out", tmp_path / "out", "--loss", "kto", *QUICK
            )

    def test_a_run_goes_on_with_the_same_parts_alone(self, model_dirs, tmp_path):
        """They make the order and z0."""

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        data, out = write(tmp_path / "labels.jsonl", self.labelled()), tmp_path / "out"
        training = PolicyTraining(1e-3, batch=4, accumulate=2, epochs=3, held_out=0, checkpoint_every=1)
        with pytest.raises(KeyboardInterrupt):
            train_preference(model_dirs["llama"], data, out, "kto", training=training, callbacks=[Kill()])
        other = dataclasses.replace(training, accumulate=1)
        with pytest.raises(InputError, match="of a run with another accumulate"):
            train_preference(model_dirs["llama"], data, out, "kto", training=other, resume=True)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_tokens_that_are_trained_on_are_the_engines(model_dirs, tmp_path, monkeypatch, loss):
    """Behind a prompt that ends in a space, the response starts with a token of its own."""
    rows = [{"prompt": "pack my ", "chosen": "the fox", "rejected": "the dog"}] * 2
    data, seen = write(tmp_path / "pairs.jsonl", rows), []
    monkeypatch.setattr(runs.Run, "finish", lambda self, trainer, *_: seen.append(trainer) or {})
    training = PolicyTraining(1e-3, batch=4, accumulate=1, held_out=0)
    train_preference(model_dirs["llama"], data, tmp_path / "out", loss, training=training)
    engine = Engine.from_pretrained(model_dirs["llama"])
    row = seen[0].train_dataset[0]
    prompt = engine.encode("pack my ")
    joint = engine.tokenizer("pack my the fox").input_ids
    assert joint[: len(prompt)] != prompt, "tokens merge across this border"
    assert row["prompt_ids"] == prompt
    sides = ("completion_ids",) if loss == "kto" else ("chosen_ids", "rejected_ids")
    found = [engine.tokenizer.decode(row[side]) for side in sides]
    texts = ["the fox<eos>", "the dog<eos>"]
    assert found == (texts if loss == "dpo" else texts[:1] if row["label"] else texts[1:])
    if loss == "kto":
        kl = list(seen[0].train_dataset["KL_completion_ids"])
        own = list(seen[0].train_dataset["completion_ids"])
        assert kl == own[-1:] + own[:-1]


def test_a_fault_is_one_line_on_stderr(tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "pairs.jsonl", pairs(2))
    given = ["pyengine", "train", "preference", str(data), "--out", str(tmp_path / "out"), "--batch", "3"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err == (
        "pyengine: error: a batch of 3 cannot be shared by 1 processes that accumulate 16 parts each; make it a "
        "multiple of 16\n"
    )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"reward": None}, ("--method", "fa"), "rewards.jsonl:1: the reward must be a number"),
        ({"response": ""}, ("--method", "fa"), "rewards.jsonl:1: the response is empty"),
        ({"response": " the" * 99}, ("--method", "fa"), r"rewards.jsonl:1: prompt and response have .* reads 96"),
        ({}, ("--method", "fa", "--threshold", 9), "no response has z > 9"),
        ({}, ("--method", "fa", "--beta", 2), "beta is read by method 'rwr'"),
        ({}, ("--method", "rwr", "--template", "paper"), "template is read by method 'ca'"),
        ({}, ("--method", "ca", "--template", "/no/such"), "conditioning /no/such"),
        ({}, ("--method", "fa", "--cap", 2), "cap is read by method 'rwr', not by 'fa'"),
        ({}, ("--method", "ppo"), "method must be one of"),
    ],
)
def test_rewards_at_fault(model_dirs, tmp_path, change, options, message):
    rows = rewarded(6)
    data = write(tmp_path / "rewards.jsonl", [rows[0] | change, *rows[1:]])
    with pytest.raises(InputError, match=message) as error:
        command("offline", data, "--model", model_dirs["llama"], "--out", tmp_path / "out", *options)
    assert "\n" not in str(error.value)


def test_a_conversation_or_token_ids_are_trained_on_as_such(model_dirs, tmp_path, monkeypatch):
    engine, asked = Engine.from_pretrained(model_dirs["llama"]), [{"role": "user", "content": "pack my"}]
    engine.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} / {% endfor %}"
    for part in (engine.model, engine.tokenizer):
        part.save_pretrained(tmp_path / "chat")
    rows = [
        {"messages": asked, "response": " the fox", "reward": 1.0},
        {"prompt_ids": [5, 6, 7], "response": " the dog", "reward": 0.0},
        {"prompt": "pack my", "response": " the box", "reward": 2.0},
    ]
    data, seen = write(tmp_path / "rows.jsonl", rows), []
    monkeypatch.setattr(runs.Run, "finish", lambda self, trainer, *_: seen.append(trainer) or {})
    training = PolicyTraining(1e-3, batch=4, accumulate=1, held_out=0)
    train_offline(tmp_path / "chat", data, tmp_path / "out", "rwr", training=training)
    wanted = [encode(engine, example) for example in read_examples(data, engine)]
    assert [row["input_ids"] for row in seen[0].train_dataset] == [row.ids for row in wanted]
    assert [row["labels"].count(-100) for row in seen[0].train_dataset] == [row.start for row in wanted]
    assert wanted[0].ids[: wanted[0].start] == engine.encode(asked)
    with pytest.raises(InputError, match=r"rows.jsonl:1: ca states the reward in a prompt of text"):
        train_offline(tmp_path / "chat", data, tmp_path / "ca", "ca", training=training)
