"""Prefix scorers that learn with a trunk of their own: the gradient, what a run leaves, and what the engine serves."""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

from pyengine import (
    Blockwise,
    Engine,
    InputError,
    PrefixModel,
    PrefixScorer,
    SamplingParams,
    Tokenwise,
    cli,
    load_scorer,
)
from pyengine.scorers import Candidates
from pyengine.training.data import Example, encode_all, read_examples, write_examples
from pyengine.training.prefix import PrefixTrainer, PrefixTraining, _arguments, train_prefix_scorer
from pyengine.training.trunk import TrunkStudent, grouped, load_trunk
from pyengine.training.values import Batch, Student, collate

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs", "the", "my")
QUICK = {"epochs": 2, "batch": 8, "width": 16, "held_out": 0.0, "trunk": "copy", "trunk_lr": 1e-3}


def words_examples(count, cut=()):
    """Responses of some words whose reward is decided by the first of them, which the last does not tell."""
    rng = random.Random(7)
    out = []
    for i in range(count):
        said = [rng.choice(WORDS) for _ in range(rng.randint(2, 7))]
        reward = 1.0 if said[0] in WORDS[:6] else -1.0
        prompt = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
        out.append(Example(prompt, " " + " ".join(said), reward, ended=i not in cut, where=f"example {i}"))
    return out


@pytest.fixture(scope="module")
def base(model_dirs):
    return Engine.from_pretrained(model_dirs["llama"])


def stored(directory):
    """All weights of a prefix model."""
    head, model = (load_file(directory / part / "model.safetensors") for part in ("head", "model"))
    return {f"head.{k}": v for k, v in head.items()} | {f"model.{k}": v for k, v in model.items()}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(("method", "layer"), [("cd-q", -1), ("cd-q", 1), ("fudge", -1)])
def test_the_gradient_is_that_of_the_loss_by_hand(base, tmp_path, method, layer):
    """Of trunk and scorer, against one unpadded pass for each response and the whole of Q; targets are constants.

    The trunk is of another architecture than the base policy; one response was cut off.
    """
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=320)
    trunk, scorer = transformers.GPT2Model(config), PrefixScorer(32, 320, 16, layer)
    student = Student(scorer, 0.0)
    with torch.no_grad():
        for parameter in [*trunk.parameters(), *student.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = TrunkStudent(trunk, student)
    settings = PrefixTraining(method, layer=layer, trunk="other")
    items = encode_all(base, words_examples(12, cut={3}))
    arguments = _arguments(base, settings, tmp_path)
    trainer = PrefixTrainer(base.model, settings, model=model, args=arguments, train_dataset=items)
    model.train()
    trainer.compute_loss(model, collate(items)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = 0.0
    for item in items:
        ids = torch.tensor([item.ids])
        hidden = trunk(ids, output_hidden_states=True).hidden_states[layer][0]
        features = scorer.features(hidden)
        q = scorer.head(features) + student.shared(features)
        with torch.no_grad():
            ahead = (base.model(ids).logits[0].softmax(-1) * q).sum(-1)[item.start :]
        value = q[torch.arange(item.start - 1, len(item.ids) - 1), ids[0, item.start :]]
        if method == "cd-q":
            target = ahead.clone()
            target[-1] = item.reward if item.ended else ahead[-1]
        else:
            target = torch.full_like(ahead, item.reward if item.ended else float(ahead[-1]))
        loss = loss + 0.5 * (value - target).square().sum() / len(items)
    loss.backward()
    moved = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name] is None
        else:
            moved += name.startswith("trunk.") and bool(parameter.grad.abs().max() > 1e-3)
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)
    assert moved >= 12
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_a_trunk_learns_what_frozen_states_do_not_tell(base, tmp_path, monkeypatch):
    """The reward depends on the first word: frozen states explain little of it on held-out prefixes, a trunk most.

    CD-FUDGE on responses that ended does not run the base policy, whose weights stay as they are.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=0
    )
    engine = Engine(transformers.LlamaForCausalLM(config), base.tokenizer)
    before, examples = copy.deepcopy(engine.model.state_dict()), words_examples(800)
    settings = {"epochs": 10, "batch": 16, "width": 32, "held_out": 0.2}
    frozen = train_prefix_scorer(engine, examples, tmp_path / "frozen", PrefixTraining(**settings))
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", None)
        settings |= {"trunk": "copy", "trunk_lr": 1e-3}
        own = train_prefix_scorer(engine, examples, tmp_path / "own", PrefixTraining(**settings))
    assert own["data"] == frozen["data"]
    assert frozen["held_out"]["r2"] < 0.2
    assert own["held_out"]["r2"] > 0.9
    assert_same(before, engine.model.state_dict())
    after = load_scorer(tmp_path / "own").model.state_dict()
    assert all(not torch.equal(after[name], before[f"model.{name}"]) for name in after)


def test_it_serves_another_base_than_its_own(base, model_dirs, tmp_path):
    """Trained as a copy of a Llama, followed by a GPT-2: what the engine reports is a recompute from the start."""
    train_prefix_scorer(base, words_examples(40), tmp_path / "values", PrefixTraining(**QUICK | {"layer": 2}))
    files = sorted(str(f.relative_to(tmp_path / "values")) for f in (tmp_path / "values").iterdir())
    assert files == ["config.json", "head", "model", "report.json"]
    assert not list((tmp_path / "values").rglob("*.bin"))
    scorer = load_scorer(tmp_path / "values")
    assert isinstance(scorer, PrefixModel)
    assert (scorer.name, scorer.head.layer) == ("values", 2)
    other = Engine.from_pretrained(model_dirs["gpt2"], scorer=scorer, cache_gb=0.01)
    plain = other.generate(["pack my"] * 6, sampling=[SamplingParams(10, seed=i) for i in range(6)])
    for strategy in (Tokenwise(3.0), Blockwise(4, 3)):
        results = other.generate(["pack my"] * 6, strategy, [SamplingParams(10, seed=i) for i in range(6)])
        assert [r.tokens for r in results] != [r.tokens for r in plain]
        for result in results:
            ids = [other.encode(result.prompt)]
            candidates = Candidates([result.prompt], [result.tokens], {}, {}, lambda tokens: [""], ids)
            assert result.reward == pytest.approx(scorer.score(candidates).item(), abs=1e-4)


def test_groups_have_their_own_rate_and_every_parameter_once(base, tmp_path):
    trunk, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    weights, biases = [trunk.weight, student.weight], [trunk.bias, student.bias]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=1.0)
    grouped(optimizer, trunk, 0.5)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    assert [found[id(p)] for p in weights] == [(0.5, 0.1), (1.0, 0.1)]
    assert [found[id(p)] for p in biases] == [(0.5, 0.01), (1.0, 0.01)]
    examples = words_examples(16)
    train_prefix_scorer(base, examples, tmp_path / "slow", PrefixTraining(**QUICK | {"trunk_lr": 1e-9}))
    scorer = load_scorer(tmp_path / "slow")
    assert_same(scorer.model.state_dict(), base.model.model.state_dict(), rtol=0, atol=1e-6)
    assert scorer.head.head.weight.abs().max() > 1e-3


def test_dropout_and_accumulation_change_nothing(base, model_dirs, tmp_path):
    """GPT-2 as the trunk, whose configuration has a dropout of 0.1."""
    examples = words_examples(24, cut={5, 6})
    for name, parts in (("a", 1), ("b", 1), ("c", 4)):
        settings = QUICK | {"trunk": str(model_dirs["gpt2"]), "accumulate": parts, "method": "cd-q", "trunk_lr": 1e-4}
        train_prefix_scorer(base, examples, tmp_path / name, PrefixTraining(**settings))
    assert_same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert_same(stored(tmp_path / "a"), stored(tmp_path / "c"), rtol=1e-3, atol=2e-4)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_resumes_to_the_same_bits(base, tmp_path):
    examples = words_examples(20)
    settings = PrefixTraining("cd-q", **QUICK, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        train_prefix_scorer(base, examples, tmp_path / "stopped", settings, callbacks=[Stop()])
    assert not (tmp_path / "stopped" / "model").exists()
    with pytest.raises(InputError, match="of a run with another trunk"):
        train_prefix_scorer(
            base, examples, tmp_path / "stopped", PrefixTraining("cd-q", **QUICK | {"trunk": "frozen"}), True
        )
    train_prefix_scorer(base, examples, tmp_path / "stopped", settings, resume=True)
    train_prefix_scorer(base, examples, tmp_path / "whole", settings)
    assert_same(stored(tmp_path / "stopped"), stored(tmp_path / "whole"))
    assert not (tmp_path / "stopped" / "checkpoints").exists()


def test_two_processes_give_what_one_gives(base, model_dirs, tmp_path, in_two_processes):
    """Through `accelerate launch` on CPUs, from a layer above which the trunk gets no gradient."""
    data = tmp_path / "data.jsonl"
    write_examples(data, words_examples(21))
    options = ["--data", data, "--model", model_dirs["llama"], "--epochs", 2, "--batch", 8, "--width", 16]
    options += ["--held-out", 0, "--layer", 2, "--trunk", "copy", "--trunk-lr", 1e-4]
    in_two_processes("train", "scorer", "--method", "cd-q", *options, "--out", tmp_path / "two")
    settings = PrefixTraining("cd-q", **QUICK | {"layer": 2, "trunk_lr": 1e-4})
    train_prefix_scorer(base, read_examples(data, base), tmp_path / "one", settings)
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert_same(one, two, rtol=1e-4, atol=2e-5)
    start = base.model.model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], one[f"model.{name}"])}
    assert {name for name in moved if ".layers." in f".{name}"} == {
        n for n in start if n[:9] in ("layers.0.", "layers.1.")
    }


def test_trunks_that_cannot_be(base, model_dirs, tmp_path):
    examples = words_examples(9)

    def refused(message, **changes):
        with pytest.raises(InputError, match=message) as caught:
            train_prefix_scorer(base, examples, tmp_path / "no", PrefixTraining(**QUICK | changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "no").exists()

    refused("trunk /no/such: no such directory", trunk="/no/such")
    refused("reads layer 9, trunk copy has 4", layer=9)
    refused("trunk must be frozen, copy, a directory or a hub id, got ''", trunk="")
    refused("trunk_lr must be a finite number", trunk_lr=0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    torch.manual_seed(0)
    for name, positions, rows in (("short", 4, 320), ("few", 64, 40), ("foreign", 64, 330)):
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=positions, vocab_size=rows)
        transformers.GPT2Model(config).save_pretrained(tmp_path / name)
        if name == "foreign":
            tokenizer.add_tokens(["thequick"])
        tokenizer.save_pretrained(tmp_path / name)
    config = transformers.BertConfig(
        vocab_size=330,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(tmp_path / "encoder")
    refused("encoder is not causal: a value would depend on the tokens after it", trunk=str(tmp_path / "encoder"))
    refused(r"short reads 4 tokens, an example has \d+", trunk=str(tmp_path / "short"))
    refused(r"few embeds 40 tokens, the examples hold token \d+", trunk=str(tmp_path / "few"))
    refused("foreign: its vocabulary is not that of model 'llama', token 'thequick'", trunk=str(tmp_path / "foreign"))


def test_a_trunk_is_read_in_fp32_and_apart_from_its_model(model_dirs):
    engine = Engine.from_pretrained(model_dirs["qwen2"], dtype=torch.bfloat16)
    items = encode_all(engine, words_examples(3))
    trunk, policy = load_trunk(engine, "copy", items)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in trunk.parameters())
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert not {p.data_ptr() for p in trunk.parameters()} & {p.data_ptr() for p in engine.model.parameters()}
    value, p = TrunkStudent(trunk, Student(PrefixScorer(policy.hidden_size, 320, 8), 0.5))(Batch(**collate(items)))
    assert value.requires_grad
    assert not p.before.requires_grad
    assert not p.after.requires_grad
    assert statistics.mean(value.tolist()) == pytest.approx(0.5)


def test_the_command_line(monkeypatch, capsys, model_dirs, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    data, out = tmp_path / "data.jsonl", tmp_path / "mine"
    write_examples(data, words_examples(20))
    options = ("--data", data, "--out", out, "--model", model_dirs["llama"], "--epochs", 1, "--width", 8)
    code, printed, err = run("train", "scorer", *options, "--trunk", "copy", "--trunk-lr", 1e-3)
    assert (code, err) == (0, "")
    assert "layer -1 of trunk copy, for llama" in " ".join(printed.split())
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert (settings["trunk"], settings["trunk_lr"]) == ("copy", 1e-3)
    generate = ("generate", "pack my", "--scorer", out, "--model", model_dirs["gpt2"], "--max-tokens", 6)
    for strategy, kind in (("tokenwise", "(exact)"), ("blockwise", "bound")):
        code, printed, _ = run(*generate, "--strategy", strategy)
        assert code == 0
        assert kind in printed
    code, printed, err = run("train", "scorer", *options, "--trunk-lr", 1e-3)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert "--trunk-lr is for --trunk copy or another checkpoint" in err
