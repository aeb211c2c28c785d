"""Probes: losses, the exact law of the policy, the fast loop against the plain one, embeddings, rejection sampling."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from pyengine import BestOfK, InputError, Probe, SamplingParams, cli_train, load_scorer, ops
from pyengine.losses import ce_loss, pg_loss, q_loss, qp_loss
from pyengine.training import probe as training
from pyengine.training.embeddings import Pairs, Samples, load_embeddings, samples_of
from pyengine.training.examples import Pair, Scored, read_examples
from pyengine.training.probe import train_probe
from pyengine.worlds import reviews

BASE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # p0 of three outcomes
VALUE = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)


def probe_policy(value, beta, k):
    """pi_k of each outcome: the sum over all groups of K draws, in fp64."""
    out = torch.zeros_like(BASE)
    for group in itertools.product(range(len(BASE)), repeat=k):
        rows = torch.tensor(group)
        out = out.index_add(0, rows, BASE[rows].prod() * torch.softmax(value[rows] / beta, 0))
    return out


class TestLosses:
    def test_are_their_formulas(self):
        q, r = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
        assert q_loss(q, r).item() == pytest.approx((1 + 4) / 2)
        assert ce_loss(q, r).item() == pytest.approx((math.log(2) + 2 + math.log1p(math.exp(-2))) / 2)
        assert qp_loss(q, r).item() == pytest.approx((math.log1p(math.e) + math.log1p(math.exp(-2))) / 2)
        # Weights 1/4 and 3/4 at beta = 1; at beta = .5 they are 1/10 and 9/10.
        q, r = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[1.0, 5.0]])
        assert pg_loss(q, r).item() == pytest.approx(-(1 / 4 + 15 / 4))
        assert pg_loss(q, r, baseline=2.0).item() == pytest.approx(-(-1 / 4 + 9 / 4))
        assert pg_loss(q, r, beta=0.5).item() == pytest.approx(-(0.1 + 4.5))

    def test_cross_entropy_falls_when_the_label_is_hit(self):
        """Eq. 3 as printed lacks the minus sign: it would be minimised by missing every label."""
        assert ce_loss(torch.tensor([9.0]), torch.ones(1)) < ce_loss(torch.tensor([-9.0]), torch.ones(1))

    @pytest.mark.parametrize("shape", [(3, 5), (4, 1)], ids=["constant rewards", "k = 1"])
    def test_no_gradient_where_nothing_can_be_chosen(self, shape):
        torch.manual_seed(0)
        q = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        reward = torch.arange(float(shape[0]), dtype=torch.float64)[:, None].expand(shape)
        pg_loss(q, reward, baseline=0.7, beta=0.1).backward()
        assert q.grad.abs().max() < 1e-15

    def test_policy_gradient_is_that_of_the_expected_reward(self):
        """E over all groups of the loss's gradient is -dJ(pi_k), J enumerated; the baseline moves nothing."""
        k, beta = 4, 0.3
        value = VALUE.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(probe_policy(value, beta, k) @ REWARD, value)
        for baseline in (0.0, 0.4):
            total = torch.zeros_like(value)
            for group in itertools.product(range(3), repeat=k):
                rows = torch.tensor(group)
                loss = pg_loss(value[rows][None], REWARD[rows][None], baseline, beta)
                total += BASE[rows].prod() * torch.autograd.grad(loss, value)[0]
            torch.testing.assert_close(total, -wanted, atol=1e-14, rtol=0)


class TestPolicy:
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_density_ratio_is_k_times_the_mean_of_rho(self, k):
        """Exactly, for every k: Q-Probe's Eq. 5 with rho is therefore -J / k, and the group form is -J."""
        weight = (VALUE / 0.3).exp()
        rho = torch.zeros(3, dtype=torch.float64)
        for others in itertools.product(range(3), repeat=k - 1):
            rows = torch.tensor(others, dtype=torch.long)
            rho += BASE[rows].prod() * weight / (weight + weight[rows].sum())
        torch.testing.assert_close(probe_policy(VALUE, 0.3, k) / BASE, k * rho, atol=1e-13, rtol=0)

    def test_select_block_draws_with_these_probabilities(self):
        groups = torch.tensor(list(itertools.product(range(3), repeat=4)))
        found = ops.select_block(VALUE[groups][..., None].float(), beta=0.3).probability.double()
        weight = BASE[groups].prod(-1)[:, None]
        policy = torch.zeros(3, dtype=torch.float64).index_add(0, groups.flatten(), (weight * found).flatten())
        torch.testing.assert_close(policy, probe_policy(VALUE, 0.3, 4), atol=1e-6, rtol=0)

    @pytest.mark.parametrize(("k", "beta"), [(2, 0.1), (6, 0.5), (6, 3.0)])
    def test_two_outcomes(self, k, beta, monkeypatch):
        p, value = 0.3, torch.tensor([0.8, 0.1], dtype=torch.float64)
        monkeypatch.setitem(globals(), "BASE", torch.tensor([p, 1 - p], dtype=torch.float64))
        f = math.exp(0.7 / beta)
        law = [math.comb(k, n) * p**n * (1 - p) ** (k - n) * n * f / (n * f + k - n) for n in range(k + 1)]
        assert probe_policy(value, beta, k)[0].item() == pytest.approx(sum(law), abs=1e-13)
        assert probe_policy(value, 1e-3, k)[0].item() == pytest.approx(1 - (1 - p) ** k, abs=1e-13)  # beta -> 0
        assert probe_policy(value, 1e9, k)[0].item() == pytest.approx(p, abs=1e-8)  # beta -> infinity

    def test_limit_in_k_is_the_regularised_optimum(self):
        """The error falls as 1 / k."""
        limit = BASE * (VALUE / 0.5).exp()
        limit /= limit.sum()
        errors = [k * (probe_policy(VALUE, 0.5, k) - limit).abs().max().item() for k in (4, 8)]
        assert errors[1] == pytest.approx(errors[0], rel=0.25)


def teacher(rows=900, width=32, prompts=90, dtype=torch.float32):
    """Samples whose reward is linear in the embedding, and pairs of them."""
    generator = torch.Generator().manual_seed(3)
    states, w = (torch.randn(n, width, generator=generator) for n in (rows, 1))
    prompt = torch.arange(rows) % prompts
    samples = Samples(states.to(dtype), torch.sigmoid(states @ w[0]), prompt)
    left, right = states[::2], states[1::2]
    wins = (left @ w[0] > right @ w[0])[:, None]
    better, worse = torch.where(wins, left, right), torch.where(wins, right, left)
    return samples, Pairs(better.to(dtype), worse.to(dtype), prompt[: rows // 2])


def plain(data, loss, probe, batches, lr, baseline, beta):
    """The loop as one writes it: autograd and torch.optim.Adam as it comes."""
    optimizer = torch.optim.Adam(probe.parameters(), lr=lr)
    for pick in batches:
        if loss == "qp":
            value = qp_loss(probe(data.chosen[pick].float()), probe(data.rejected[pick].float()))
        else:
            q, r = probe(data.embeddings[pick].float()), data.reward[pick]
            value = {"q": q_loss, "ce": ce_loss, "pg": lambda q, r: pg_loss(q, r, baseline, beta)}[loss](q, r)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


class TestLoop:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("hidden", [(), (24,)], ids=["linear", "mlp"])
    @pytest.mark.parametrize("loss", ["q", "ce", "pg", "qp"])
    def test_ends_where_autograd_and_torch_adam_end(self, loss, hidden, dtype):
        """The same batches for 10 epochs, the last of each short: weights within 1e-5 after moves of about 1e-1."""
        samples, pairs = teacher(dtype=dtype)
        data = pairs if loss == "qp" else samples
        options = {"epochs": 10, "lr": 2e-3, "batch": 35 if loss == "pg" else 128, "held_out": 0.1, "seed": 7}
        fit = train_probe(data, loss, hidden=hidden, group=5, beta_train=0.5, progress=False, **options)
        order = torch.Generator().manual_seed(7)
        train, _ = training.split(data.prompt, 0.1, order)
        epochs = [list(training._batches(data.prompt, train, loss, options["batch"], 5, order)) for _ in range(10)]
        assert len(epochs[0][-1]) < options["batch"]
        torch.manual_seed(7)
        probe = Probe(32, hidden=hidden)
        if loss in ("pg", "qp"):
            nn.init.zeros_(probe.head.bias)
            probe.head.bias.requires_grad_(False)
        start = probe.state_dict()["head.weight"].clone()
        baseline = samples.reward[train].mean().item()
        plain(data, loss, probe, itertools.chain(*epochs), 2e-3, baseline, 0.5)
        assert (probe.head.weight - start).abs().max() > 0.05
        for name, value in probe.state_dict().items():
            torch.testing.assert_close(fit.probe.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)

    def test_every_row_comes_once_an_epoch_in_a_new_order(self):
        prompt, order = torch.arange(60) // 6, torch.Generator().manual_seed(0)
        for loss, group in (("q", None), ("pg", 3), ("pg", None)):
            epochs = [torch.cat(list(training._batches(prompt, torch.arange(60), loss, 7, group, order))) for _ in "ab"]
            assert all(sorted(e.flatten().tolist()) == list(range(60)) for e in epochs)
            assert not torch.equal(*epochs)
            if loss == "pg":
                assert all((prompt[e] == prompt[e[:, :1]]).all() for e in epochs)
        # Groups of 3 out of 6 are other triples every epoch, not the same ones in another order.
        first, second = (
            {frozenset(g.tolist()) for g in e}
            for e in (torch.cat(list(training._batches(prompt, torch.arange(60), "pg", 7, 3, order))) for _ in "ab")
        )
        assert first != second

    def test_prompts_are_held_out_whole(self):
        samples, _ = teacher()
        train, test = training.split(samples.prompt, 0.2, torch.Generator().manual_seed(0))
        assert len(samples.prompt[test].unique()) == 18
        assert not set(samples.prompt[test].tolist()) & set(samples.prompt[train].tolist())
        assert sorted(train.tolist() + test.tolist()) == list(range(900))
        with pytest.raises(InputError, match="at least two"):
            training.split(torch.zeros(9, dtype=torch.long), 0.2, torch.Generator())

    def test_learns_what_there_is_to_learn(self):
        samples, pairs = teacher(rows=3600)
        found = train_probe(pairs, "qp", lr=5e-2, epochs=30, progress=False)
        assert found.held_out["accuracy"] > 0.95
        assert found.held_out_loss[-1] < 0.2 < math.log(2) * 0.9 < found.train_loss[0]
        assert train_probe(samples, "ce", lr=5e-2, epochs=30, progress=False).held_out["correlation"] > 0.99
        chosen = train_probe(samples, "pg", lr=5e-2, epochs=30, group=4, progress=False).held_out
        assert chosen["reward_argmax"] > chosen["reward_base"] + 0.2

    def test_keeps_the_epoch_that_was_best_on_held_out_prompts(self):
        """40 noisy rows of width 64: the longer, the worse."""
        torch.manual_seed(0)
        data = Samples(torch.randn(40, 64), torch.randn(40), torch.arange(40))
        options = {"lr": 1e-2, "epochs": 60, "held_out": 0.3, "progress": False}
        best, last = (train_probe(data, "q", keep_best=keep, **options) for keep in (True, False))
        assert best.epoch == 1 + min(range(60), key=best.held_out_loss.__getitem__) < 60
        assert best.held_out["loss"] == pytest.approx(min(last.held_out_loss))
        assert last.held_out["loss"] == pytest.approx(last.held_out_loss[-1])
        assert last.held_out["loss"] > best.held_out["loss"]

    def test_the_same_seed_gives_the_same_bits(self):
        samples, _ = teacher()
        runs = [train_probe(samples, "pg", hidden=(8,), epochs=3, seed=seed, progress=False) for seed in (1, 1, 2)]
        weights = [run.probe.head.weight for run in runs]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


class TestBadData:
    def test_groups_of_unequal_size_name_the_prompt(self):
        prompt = torch.tensor([4] * 5 + [9] * 5 + [7] * 4)
        data = Samples(torch.zeros(14, 3), torch.zeros(14), prompt)
        with pytest.raises(InputError, match="prompt 7 has 4 samples, loss 'pg' needs 5 like the others"):
            train_probe(data, "pg", held_out=0)
        with pytest.raises(InputError, match="prompt 7 has 4 samples, loss 'pg' needs a multiple of 5"):
            train_probe(data, "pg", group=5, held_out=0)

    def test_rewards_that_the_loss_cannot_use(self):
        samples, pairs = teacher()
        with pytest.raises(InputError, match=r"rewards in 0 \.\. 1, row 3 has 1.5"):
            train_probe(Samples(torch.zeros(5, 2), torch.tensor([0, 1, 0.5, 1.5, 2]), torch.arange(5)), "ce")
        with pytest.raises(InputError, match="'qp' needs Pairs"):
            train_probe(samples, "qp")
        with pytest.raises(InputError, match="'pg' needs Samples"):
            train_probe(pairs, "pg")
        with pytest.raises(InputError, match="loss must be one of q, ce, pg, qp, got 'dpo'"):
            train_probe(samples, "dpo")
        with pytest.raises(InputError, match="beta_train must be above 0"):
            train_probe(samples, "pg", beta_train=0.0)
        with pytest.raises(InputError, match="keep_best needs held_out"):
            train_probe(samples, "q", held_out=0, keep_best=True)

    def test_a_loss_that_runs_away(self):
        samples, _ = teacher()
        with pytest.raises(InputError, match=r"the loss is (inf|nan) in epoch \d; lower lr from 1e\+30"):
            train_probe(samples, "q", lr=1e30, keep_best=True, progress=False)

    def test_rows_that_are_not_numbers(self):
        bad = torch.zeros(5000, 2)
        bad[4500, 1] = math.inf
        with pytest.raises(InputError, match="embeddings has NaN or infinity in row 4500"):
            Samples(bad, torch.zeros(5000), torch.arange(5000))
        with pytest.raises(InputError, match="reward has NaN or infinity in row 1"):
            Samples(torch.zeros(2, 2), torch.tensor([0, math.nan]), torch.arange(2))
        with pytest.raises(InputError, match=r"reward has 3 rows, prompt has 2"):
            Samples(torch.zeros(2, 2), torch.zeros(3), torch.arange(2))
        for value in (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, device="meta")):
            with pytest.raises(InputError, match="embeddings must be floats in the host's memory, got torch"):
                Samples(value, torch.zeros(2), torch.arange(2))
        with pytest.raises(InputError, match=r"embeddings must be a tensor of shape \[N, D\], got \[2\]"):
            Samples(torch.zeros(2), torch.zeros(2), torch.arange(2))
        with pytest.raises(InputError, match="prompt must hold whole numbers"):
            Samples(torch.zeros(2, 2), torch.zeros(2), torch.zeros(2))
        with pytest.raises(InputError, match=r"chosen is \[2, 2\], rejected \[2, 3\]"):
            Pairs(torch.zeros(2, 2), torch.zeros(2, 3), torch.arange(2))

    def test_files(self, tmp_path):
        samples, pairs = teacher(dtype=torch.bfloat16)
        for data in (samples, pairs):
            data.save(tmp_path / "data.safetensors")
            again = load_embeddings(tmp_path / "data.safetensors")
            assert type(again) is type(data)
            assert all(torch.equal(vars(data)[name], value) for name, value in vars(again).items())
        save_file({"embeddings": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
        with pytest.raises(InputError, match="must hold embeddings, reward, prompt"):
            load_embeddings(tmp_path / "half.safetensors")
        (tmp_path / "no.safetensors").write_text("{")
        for name in ("no", "missing"):
            with pytest.raises(InputError, match=f"{name}.safetensors"):
                load_embeddings(tmp_path / f"{name}.safetensors")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not JSON"),
            ('{"prompt": "a"}', "lacks response, reward"),
            ('{"prompt": "a", "chosen": "b"}', "lacks rejected"),
            ('["a"]', "must be a JSON object"),
            ('{"prompt": "a", "response": " ", "reward": 1}', "response is empty"),
            ('{"prompt": "a", "response": 3, "reward": 1}', "response is not a string: 3"),
            ('{"prompt": "a", "response": "b", "reward": NaN}', "reward must be a finite number, got nan"),
            ('{"prompt": "a", "response": "b", "reward": "high"}', "reward must be a finite number, got 'high'"),
            ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the same text"),
            ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "in one file"),
        ],
    )
    def test_lines(self, tmp_path, line, message):
        file = tmp_path / "data.jsonl"
        file.write_text(f'{{"prompt": "p", "response": "q", "reward": 0.5}}\n\n{line}\n')
        with pytest.raises(InputError, match=f"data.jsonl:3: .*{message}") as error:
            read_examples(file)
        assert "\n" not in str(error.value)

    def test_labels(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text('{"prompt": "p", "response": "q", "label": true}\n')
        assert read_examples(file, "label") == [Scored("p", "q", 1.0, f"{file}:1")]
        file.write_text('{"prompt": "p", "response": "q", "label": 2}\n')
        with pytest.raises(InputError, match=r"data.jsonl:1: label must be 0 or 1, got 2"):
            read_examples(file, "label")
        file.write_text("\n")
        with pytest.raises(InputError, match="holds no examples"):
            read_examples(file)


class TestProbeFiles:
    def test_mlp_survives_the_disk(self, tmp_path):
        torch.manual_seed(0)
        probe = Probe(16, layer=2, hidden=(12, 8))
        probe.save(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["hidden"] == [12, 8]
        again, states = load_scorer(tmp_path), torch.randn(5, 16)
        assert torch.equal(again(states), probe(states))
        layers = [m for m in probe.trunk if isinstance(m, nn.Linear)]
        by_hand = torch.relu(layers[1](torch.relu(layers[0](states))))
        torch.testing.assert_close(probe(states), (by_hand @ probe.head.weight[0]) + probe.head.bias)

    def test_files_from_before_there_were_hidden_layers(self, tmp_path):
        probe = Probe(16)
        probe.save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["hidden"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert torch.equal(load_scorer(tmp_path).head.weight, probe.head.weight)
        assert set(probe.state_dict()) == {"head.weight", "head.bias"}

    def test_misfits(self, engine, tmp_path):
        with pytest.raises(InputError, match=r"width 64.* has 128"):
            engine.set_scorer(Probe(64, hidden=(8,)))
        with pytest.raises(InputError, match=r"reads layer 7.* has 3"):
            engine.set_scorer(Probe(128, layer=7, hidden=(8,)))
        with pytest.raises(InputError, match="a width in hidden must be a whole number of at least 1, got 0"):
            Probe(8, hidden=(4, 0))


def test_from_roll_outs_to_a_better_answer(engine):
    """40 prompts of 8 responses, the group loss, then Q-Probe with another beta raises the exact sentiment."""
    prompts = [p for p in reviews.prompts(40) for _ in range(8)]
    params = [SamplingParams(max_tokens=64, seed=i) for i in range(len(prompts))]
    samples = samples_of(engine, engine.generate(prompts, sampling=params), reviews.sentiment, progress=False)
    fit = train_probe(samples, "pg", lr=5e-3, epochs=60, progress=False)
    engine.set_scorer(fit.probe)
    sampling = SamplingParams(max_tokens=64, seed=90_000)
    fresh = reviews.prompts(96, seed=5)[:64]
    base = [reviews.sentiment_of(r.text) for r in engine.generate(fresh, sampling=sampling)]
    steered = [reviews.sentiment_of(r.text) for r in engine.generate(fresh, BestOfK(8, "softmax", 0.1), sampling)]
    gain = torch.tensor(steered) - torch.tensor(base)
    assert gain.mean() > 4 * gain.std() / 8


class TestCommand:
    def run(self, *arguments):
        done = CliRunner().invoke(cli_train.train, ["probe", *map(str, arguments)], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout)

    def test_from_jsonl_and_from_embeddings(self, tmp_path, engine):
        texts = [c for _, c in reviews.corpus(60, seed=9)]
        prompts = [p for p in reviews.prompts(20) for _ in range(3)]
        both = zip(prompts, texts, strict=True)
        rows = [{"prompt": p, "response": c, "reward": reviews.sentiment_of(c)} for p, c in both]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = ("--out", tmp_path / "probe", "--lr", 0.01, "--epochs", 20, "--layer", 2)
        found = self.run(tmp_path / "rows.jsonl", "--loss", "pg", "--hidden", 16, *options)
        assert found["epoch"] == 20
        assert found["held_out"]["rows"] == 6
        engine.set_scorer(tmp_path / "probe")
        assert (engine.parts[0].scorer.hidden, engine.parts[0].scorer.layer) == ((16,), 2)
        report = json.loads((tmp_path / "probe" / "training.json").read_text())
        assert len(report["train_loss"]) == len(report["held_out_loss"]) == 20
        _, pairs = teacher()
        pairs.save(tmp_path / "pairs.safetensors")
        assert self.run(tmp_path / "pairs.safetensors", "--loss", "qp", *options)["held_out"]["accuracy"] > 0.8
        with pytest.raises(InputError, match="--loss must be one of q, ce, pg, qp"):
            self.run(tmp_path / "pairs.safetensors", "--loss", "mse", *options)

    def test_pairs_from_jsonl(self, tmp_path):
        texts = sorted((c for _, c in reviews.corpus(40, seed=9)), key=reviews.sentiment_of)
        rows = [{"prompt": p, "chosen": texts[-1 - i], "rejected": texts[i]} for i, p in enumerate(reviews.prompts(20))]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert isinstance(read_examples(tmp_path / "rows.jsonl")[0], Pair)
        found = self.run(tmp_path / "rows.jsonl", "--loss", "qp", "--out", tmp_path, "--lr", 0.01, "--epochs", 30)
        assert found["held_out"]["accuracy"] >= 0.5
