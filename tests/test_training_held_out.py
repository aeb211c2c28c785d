"""What is held out trains nothing: other rewards there leave weights and statistics as they were, to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

from pyengine import Engine, InputError
from pyengine.integrations.trl.reward_model import default_config, train_reward_model
from pyengine.integrations.trl.runs import PolicyTraining, train_offline, train_preference
from pyengine.rewards import Statistics
from pyengine.training.data import Example, split
from pyengine.training.embeddings import Pairs, Samples
from pyengine.training.examples import Labelled, Pair
from pyengine.training.prefix import PrefixTraining, train_prefix_scorer
from pyengine.training.probe import train_probe

WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "box", "five", "jugs")
SHARE = 0.3


@pytest.fixture(scope="module")
def small(model_dirs, tmp_path_factory):
    """The directory of a model of one layer."""
    torch.manual_seed(4)
    config = transformers.AutoConfig.from_pretrained(model_dirs["llama"], num_hidden_layers=1)
    path = tmp_path_factory.mktemp("small")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(small):
    return Engine.from_pretrained(small)


def prompt(i):
    return f"pack {WORDS[i % 8]}"


def parts(count, seed=0):
    """Rows of `prompt` that are trained on, and rows that are held out."""
    return split([prompt(i) for i in range(count)], SHARE, seed)


def changed_in(rows, where, change):
    where = set(where)
    return [change(row) if i in where else row for i, row in enumerate(rows)]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def stored(directory):
    """All weights below a directory."""
    files = sorted(directory.rglob("*.safetensors"))
    return {f"{file.relative_to(directory)}/{k}": v for file in files for k, v in load_file(file).items()}


def examples(count=24, cut=()):
    return [
        Example(prompt(i), f" {WORDS[i % 10]} {WORDS[(7 * i) % 10]}", i % 5 - 1.5, ended=i not in cut)
        for i in range(count)
    ]


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
@pytest.mark.parametrize("trunk", ["frozen", "copy"])
def test_prefix_scorers(base, tmp_path, method, trunk):
    rows, settings = examples(), PrefixTraining(method, epochs=2, batch=8, width=8, held_out=SHARE, trunk=trunk)
    train, test = parts(len(rows))
    other = lambda e: dataclasses.replace(e, reward=100.0 - e.reward)  # noqa: E731
    runs = {"as they are": rows, "test": changed_in(rows, test, other), "train": changed_in(rows, train[:1], other)}
    reports = {name: train_prefix_scorer(base, found, tmp_path / name, settings) for name, found in runs.items()}
    weights = {name: stored(tmp_path / name) for name in runs}
    assert same(weights["as they are"], weights["test"])
    assert not same(weights["as they are"], weights["train"])
    one, two = reports["as they are"], reports["test"]
    assert (one["data"], one["training_loss"]) == (two["data"], two["training_loss"])
    assert one["training_responses"] == len(train)
    assert one["held_out"]["responses"] == len(test)
    assert one["held_out"]["calibration_error"] != two["held_out"]["calibration_error"]


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
def test_a_response_that_was_cut_off_has_no_reward(base, tmp_path, method):
    """Nor is it part of the mean that the scorer starts from."""
    cut = {1, 4, 9, 14}
    rows, settings = examples(cut=cut), PrefixTraining(method, epochs=2, batch=8, width=8, held_out=0.0)
    other = changed_in(rows, cut, lambda e: dataclasses.replace(e, reward=1e4))
    for name, found in (("as they are", rows), ("other", other)):
        assert train_prefix_scorer(base, found, tmp_path / name, settings)["cut_off"] == 4
    assert same(stored(tmp_path / "as they are"), stored(tmp_path / "other"))


@pytest.mark.parametrize("method", ["fudge", "cd-q"])
def test_responses_that_all_were_cut_off_teach_nothing(base, tmp_path, method):
    """Those that ended are all held out."""
    rows, settings = examples(), PrefixTraining(method, epochs=1, batch=8, width=8, held_out=SHARE)
    train, _ = parts(len(rows))
    cut = changed_in(rows, train, lambda e: dataclasses.replace(e, ended=False))
    with pytest.raises(InputError, match=f"all {len(train)} responses to train on were cut off"):
        train_prefix_scorer(base, cut, tmp_path / "no", settings)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("hidden", [(), (6,)], ids=["linear", "mlp"])
@pytest.mark.parametrize("loss", ["q", "ce", "pg", "qp"])
def test_probes(loss, hidden):
    """pg's baseline is the mean reward of the training rows alone."""
    generator = torch.Generator().manual_seed(1)
    states, others = torch.randn(2, 48, 8, generator=generator)
    reward, of = torch.rand(48, generator=generator), torch.arange(48) // 4
    train, test = split(of.tolist(), SHARE, 0)

    def weights(rows):
        left, right, r = states.clone(), others.clone(), reward.clone()
        left[rows], right[rows], r[rows] = others[rows], states[rows], 1 - reward[rows]
        data = Pairs(left, right, of, -1) if loss == "qp" else Samples(states, r, of, -1)
        options = {"hidden": hidden, "lr": 1e-2, "epochs": 3, "batch": 5, "held_out": SHARE, "progress": False}
        fit = train_probe(data, loss, **options)
        return fit.probe.state_dict(), fit.train_loss, fit.held_out

    known, told, changed = weights([]), weights(test), weights(train[:4])
    assert same(known[0], told[0])
    assert known[1] == told[1]
    assert known[2] != told[2]
    assert not same(known[0], changed[0])


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_reward_models(small, tmp_path, kind):
    """The weights of the last step: which checkpoint is kept is the held-out part's to say, as documented."""
    texts = [(f" {WORDS[i % 10]}", f" {WORDS[(i + 3) % 10]} {WORDS[i % 7]}") for i in range(24)]
    if kind == "pairs":
        rows = [Pair(prompt(i), *both, f"pair {i}") for i, both in enumerate(texts)]
        other = lambda e: e._replace(chosen=e.rejected, rejected=e.chosen)  # noqa: E731
    else:
        rows = [Labelled(prompt(i), both[0], float(i % 3 > 0), f"label {i}") for i, both in enumerate(texts)]
        other = lambda e: e._replace(label=1 - e.label)  # noqa: E731
    train, test = parts(len(rows))
    found = {}
    for name, given in (
        ("as they are", rows),
        ("test", changed_in(rows, test, other)),
        ("train", changed_in(rows, train[:1], other)),
    ):
        options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
        args = default_config(tmp_path / "c" / name, evaluate=False, **options, eval_strategy="epoch")
        report = train_reward_model(small, given, tmp_path / name, args=args, held_out=SHARE)
        assert (report["train"], report["held_out"]) == (len(train), len(test))
        found[name] = stored(tmp_path / name), report["loss"]
    assert same(found["as they are"][0], found["test"][0])
    assert found["as they are"][1] != found["test"][1]
    assert not same(found["as they are"][0], found["train"][0])


def written(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def policies(train_one, rows, other, tmp_path):
    """(weights, report, directory) of a run on the rows, with others held out, and with another row to train on."""
    train, test = parts(len(rows))
    out = []
    for name, where in (("as they are", ()), ("test", test), ("train", train[:1])):
        data = written(tmp_path / f"{name}.jsonl", changed_in(rows, where, other))
        report = train_one(data, tmp_path / name)
        assert report["train"] == len(train)
        out.append((stored(tmp_path / name), report, tmp_path / name))
    assert same(out[0][0], out[1][0])
    assert not same(out[0][0], out[2][0])
    assert out[0][1]["held_out"] != out[1][1]["held_out"]
    return out, train


@pytest.mark.parametrize("method", ["fa", "rwr", "ca"])
def test_offline_policies(small, tmp_path, method):
    rows = [{"prompt": e.prompt, "response": e.response, "reward": e.reward} for e in examples()]
    training = PolicyTraining(1e-2, batch=8, accumulate=1, held_out=SHARE)
    runs, train = policies(
        lambda data, out: train_offline(small, data, out, method, training=training),
        rows,
        lambda row: row | {"reward": 50 - row["reward"]},
        tmp_path,
    )
    want = Statistics.of([rows[i]["reward"] for i in train])
    for _, report, directory in runs[:2]:
        assert Statistics.load(directory / "reward_statistics.json") == want
        assert report["statistics"] == dataclasses.asdict(want)
    about = ("retained", "mean_z", "effective_share", "training_loss")
    assert [runs[0][1][name] for name in about] == [runs[1][1][name] for name in about]
    z = [(rows[i]["reward"] - want.mean) / want.std for i in train]
    w = {"fa": [float(v > 0) for v in z], "rwr": [math.exp(v / 5) for v in z], "ca": [1.0] * len(z)}[method]
    assert runs[0][1]["effective_share"] == pytest.approx(sum(w) ** 2 / sum(v * v for v in w) / len(w), rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_preferred_policies(small, tmp_path, loss):
    rows = [
        {"prompt": prompt(i), "chosen": f" the {WORDS[i % 10]}", "rejected": f" {WORDS[(i + 5) % 10]} {WORDS[i % 3]}"}
        for i in range(24)
    ]
    other = lambda row: row | {"chosen": row["rejected"], "rejected": row["chosen"]}  # noqa: E731
    if loss == "kto":
        rows = [{"prompt": r["prompt"], "response": r["chosen"], "label": i % 2} for i, r in enumerate(rows)]
        other = lambda row: row | {"label": 1 - row["label"]}  # noqa: E731
    training = PolicyTraining(1e-2, batch=8, accumulate=1, held_out=SHARE)
    policies(lambda data, out: train_preference(small, data, out, loss, training=training), rows, other, tmp_path)


class Watched(TrainerCallback):
    """The learning rate and the length of the gradient of each step, as the optimizer meets them."""

    def __init__(self):
        self.rates, self.norms = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())


def cosine(rate, steps, warm):
    """Linear from 0 over the first steps, then half a cosine to 0."""
    down = [0.5 * (1 + math.cos(math.pi * i / (steps - warm))) for i in range(steps - warm)]
    return [rate * share for share in [i / warm for i in range(warm)] + down]


def test_rates_and_lengths_of_the_steps(base, small, tmp_path):
    """A warm-up, then a cosine; clipped to a norm of 1 is what has a mean over tokens, and no sum."""
    rows = [{"prompt": e.prompt, "response": e.response, "reward": e.reward} for e in examples()]
    data = written(tmp_path / "rewards.jsonl", rows)
    training = PolicyTraining(1e-3, epochs=10, batch=12, accumulate=1, held_out=0)
    norms = {}
    for reduction in ("sum", "token_mean"):
        watched = Watched()
        options = {"reduction": reduction, "training": training, "callbacks": [watched]}
        train_offline(small, data, tmp_path / reduction, "rwr", **options)
        assert watched.rates == pytest.approx(cosine(1e-3, 20, 2))
        norms[reduction] = watched.norms
    assert max(norms["token_mean"]) <= 1 + 1e-5
    assert min(norms["sum"]) > 1.5
    watched = Watched()
    many = [dataclasses.replace(e, reward=30 * e.reward) for e in examples()]
    settings = PrefixTraining(epochs=20, batch=12, width=8, held_out=0, lr=1e-3)
    train_prefix_scorer(base, many, tmp_path / "prefix", settings, callbacks=[watched])
    assert watched.rates == pytest.approx(cosine(1e-3, 40, 2))
    assert min(watched.norms) > 1.5
    assert all(a != b for a, b in pairwise(watched.norms))
