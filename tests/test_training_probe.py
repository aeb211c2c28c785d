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

import pyengine
from pyengine import BestOfK, InputError, Probe, SamplingParams, cli, load_scorer, lsc, ops, rewards
from pyengine.losses import ce_loss, pg_loss, q_loss, qp_loss
from pyengine.scorers import Candidates
from pyengine.training import probe as training
from pyengine.training.data import read_examples, roll_out, split, write_examples
from pyengine.training.embeddings import Pairs, Samples, embed_examples, load_embeddings, samples_of
from pyengine.training.examples import Labelled, Pair, read_preferences
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
    samples = Samples(states.to(dtype), torch.sigmoid(states @ w[0]), prompt, -1)
    left, right = states[::2], states[1::2]
    wins = (left @ w[0] > right @ w[0])[:, None]
    better, worse = torch.where(wins, left, right), torch.where(wins, right, left)
    return samples, Pairs(better.to(dtype), worse.to(dtype), prompt[: rows // 2], -1)


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
        if loss == "pg":
            options |= {"group": 5, "beta_train": 0.5}
        fit = train_probe(data, loss, hidden=hidden, progress=False, **options)
        order = torch.Generator().manual_seed(7)
        train = torch.tensor(split(data.prompt.tolist(), 0.1, 7)[0])
        epochs = [list(training._batches(data.prompt, train, loss, options["batch"], 5, order)) for _ in range(10)]
        assert len(epochs[0][-1]) < options["batch"]
        torch.manual_seed(7)
        probe = Probe(32, hidden=hidden)
        if loss in ("pg", "qp"):
            nn.init.zeros_(probe.head.bias)
            probe.head.bias.requires_grad_(False)
        baseline = samples.reward[train].mean().item()
        if loss in ("q", "ce"):
            nn.init.zeros_(probe.head.weight)
            nn.init.constant_(probe.head.bias, baseline if loss == "q" else math.log(baseline / (1 - baseline)))
        start = probe.state_dict()["head.weight"].clone()
        plain(data, loss, probe, itertools.chain(*epochs), 2e-3, baseline, 0.5)
        assert (probe.head.weight - start).abs().max() > 0.05
        for name, value in probe.state_dict().items():
            torch.testing.assert_close(fit.probe.state_dict()[name], value, atol=1e-5, rtol=0, msg=name)

    def test_every_row_comes_once_an_epoch_in_a_new_order(self):
        prompt, order = torch.arange(60) // 6, torch.Generator().manual_seed(0)
        for loss, group in (("q", None), ("pg", 3), ("pg", 6)):
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
        train, test = split(samples.prompt.tolist(), 0.2, seed=0)
        assert len(samples.prompt[test].unique()) == 18
        assert not set(samples.prompt[test].tolist()) & set(samples.prompt[train].tolist())
        assert sorted(train + test) == list(range(900))
        assert [len(rows) for rows in split([4, 4, 9], 0.9, 0)] in ([1, 2], [2, 1])
        assert split([4, 4], 0.0, 0) == ([0, 1], [])
        with pytest.raises(InputError, match="at least two"):
            split([0] * 9, 0.2, 0)

    def test_learns_what_there_is_to_learn(self):
        samples, pairs = teacher(rows=3600)
        found = train_probe(pairs, "qp", lr=5e-2, batch=1024, epochs=30, progress=False)
        assert found.held_out["accuracy"] > 0.95
        assert found.held_out_loss[-1] < 0.2 < math.log(2) * 0.9 < found.train_loss[0]
        assert train_probe(samples, "ce", lr=5e-2, epochs=30, progress=False).held_out["correlation"] > 0.99
        chosen = train_probe(samples, "pg", lr=5e-2, epochs=30, group=4, progress=False).held_out
        assert chosen["reward_argmax"] > chosen["reward_base"] + 0.2

    @pytest.mark.parametrize("loss", ["q", "ce"])
    def test_a_few_rows_are_trained_on_as_far_as_many(self, loss):
        """At the defaults it is as good as ridge regression on the same rows; it starts as the mean."""
        rows = 576
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(rows, 48, generator=generator)
        reward = torch.sigmoid(x[:, :4].sum(1) + torch.randn(rows, generator=generator))
        samples = Samples(x, reward, torch.arange(rows) // 4, -1)
        fit = train_probe(samples, loss, progress=False)
        train, test = (torch.tensor(part) for part in split(samples.prompt.tolist(), 0.1, 0))
        assert (fit.settings["batch"], fit.settings["lr"] > 5e-4) == (len(train) // 9, True)
        a = torch.cat([x, torch.ones(rows, 1)], 1)
        ridge = torch.linalg.solve(a[train].T @ a[train] + 5 * torch.eye(49), a[train].T @ reward[train])
        error = lambda found: (found - reward[test]).square().mean().item()  # noqa: E731
        own = fit.probe(x[test])
        assert error(own.sigmoid() if loss == "ce" else own) < 1.25 * error(a[test] @ ridge)
        assert fit.held_out["r2"] == pytest.approx(
            1 - error(own.sigmoid() if loss == "ce" else own) / reward[test].var(correction=0).item(), abs=1e-5
        )
        still = train_probe(samples, loss, lr=1e-12, epochs=1, progress=False).probe(x)
        mean = reward[train].mean()
        torch.testing.assert_close(still, (mean if loss == "q" else mean.logit()).expand(rows))

    def test_many_rows_are_trained_on_as_in_the_paper(self):
        assert training.pace("q", 190_000, 150, None, None) == {"batch": 1000, "lr": pytest.approx(5e-5, rel=0.02)}
        assert training.pace("qp", 10**7, 150, None, None) == {"batch": 1024, "lr": 5e-5}
        assert training.pace("pg", 5, 150, None, 0.1) == {"batch": 1, "lr": 0.1}

    def test_a_probe_that_is_worse_than_the_mean_is_told(self, tmp_path):
        x = torch.randn(60, 48, generator=torch.Generator().manual_seed(1))
        noise = Samples(x, torch.randn(60, generator=torch.Generator().manual_seed(2)), torch.arange(60), -1)
        fit = train_probe(noise, "q", held_out=0.3, progress=False)
        assert fit.held_out["r2"] < 0
        assert fit.warnings[0].startswith(f"held-out R² is {fit.held_out['r2']:.2f}: the mean reward predicts better")
        fit.save(tmp_path)
        assert json.loads((tmp_path / "training.json").read_text())["warnings"] == fit.warnings
        assert train_probe(teacher()[0], "q", progress=False).warnings == []

    def test_rewards_of_selection_by_hand(self):
        """Q = x, three groups of two prompts and three samples; weights 1/4, 1/4 and 1/2 at x / beta = 0, 0, log 2."""
        x = torch.tensor([[0.0, 0.0, 0.5 * math.log(2)], [0.5 * math.log(2), 0.0, 0.0]])
        reward = torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, 4.0]])
        probe = Probe(1)
        with torch.no_grad():
            probe.head.weight.fill_(1.0)
            probe.head.bias.zero_()
        data = Samples(x.reshape(6, 1), reward.flatten(), torch.arange(6) // 3, -1)
        problem = training._problem(data, "pg", torch.arange(6), 0.5)
        found = training._metrics(probe, problem, [torch.arange(3)[None], torch.arange(3, 6)[None]])
        assert found["reward_base"] == pytest.approx(3.5)
        assert found["reward_softmax"] == pytest.approx(((1 + 2) / 4 + 6 / 2 + 3 / 2 + (5 + 4) / 4) / 2)
        assert found["reward_argmax"] == pytest.approx((6 + 3) / 2)
        assert found["correlation"] == pytest.approx(torch.corrcoef(torch.stack([x, reward]).flatten(1))[0, 1].item())

    def test_keeps_the_epoch_that_was_best_on_held_out_prompts(self):
        """40 noisy rows of width 64: the longer, the worse."""
        torch.manual_seed(0)
        data = Samples(torch.randn(40, 64), torch.randn(40), torch.arange(40), -1)
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
        data = Samples(torch.zeros(14, 3), torch.zeros(14), prompt, -1)
        with pytest.raises(InputError, match="prompt 7 has 4 samples, loss 'pg' needs 5 like the others"):
            train_probe(data, "pg", held_out=0)
        with pytest.raises(InputError, match="prompt 7 has 4 samples, loss 'pg' needs a multiple of 5"):
            train_probe(data, "pg", group=5, held_out=0)
        # Alone on its side of the split each of these would look as it should.
        two = Samples(torch.zeros(10, 3), torch.zeros(10), torch.tensor([0] * 4 + [1] * 6), -1)
        with pytest.raises(InputError, match="prompt 1 has 6 samples, loss 'pg' needs 4 like the others"):
            train_probe(two, "pg", held_out=0.5, epochs=1)

    def test_rewards_that_the_loss_cannot_use(self):
        samples, pairs = teacher()
        with pytest.raises(InputError, match=r"rewards in 0 \.\. 1, row 3 has 1.5"):
            train_probe(Samples(torch.zeros(5, 2), torch.tensor([0, 1, 0.5, 1.5, 2]), torch.arange(5), -1), "ce")
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
        for name, value in (("beta_train", 0.1), ("group", 5)):
            with pytest.raises(InputError, match=f"{name} is for loss 'pg', not for 'ce'"):
                train_probe(samples, "ce", **{name: value})
        for name, value in (("lr", 0.0), ("seed", -1), ("epochs", 0), ("batch", 0), ("held_out", 0.95)):
            with pytest.raises(InputError, match=f"train_probe: {name} must be"):
                train_probe(samples, "q", **{name: value})

    def test_layers(self):
        """The probe reads what was embedded; who does not know which hidden state that is must say so."""
        states, options = (torch.zeros(4, 2), torch.zeros(4), torch.arange(4)), {"epochs": 1, "progress": False}
        assert train_probe(Samples(*states, 1), "q", **options).probe.layer == 1
        assert train_probe(Samples(*states, 1), "q", layer=1, **options).probe.layer == 1
        assert train_probe(Samples(*states), "q", layer=2, **options).probe.layer == 2
        with pytest.raises(InputError, match="the embeddings are of layer 1, not of layer -1"):
            train_probe(Samples(*states, 1), "q", layer=-1, **options)
        with pytest.raises(InputError, match="do not say which hidden state they are; give the layer"):
            train_probe(Samples(*states), "q", **options)
        with pytest.raises(InputError, match=r"layer must be a whole number .*, got 1\.5"):
            Samples(*states, 1.5)

    def test_a_loss_that_runs_away(self):
        samples, _ = teacher()
        with pytest.raises(InputError, match=r"the (held-out )?loss is (inf|nan) in epoch \d; lower lr from 1e\+30"):
            train_probe(samples, "q", lr=1e30, keep_best=True, progress=False)

    @pytest.mark.parametrize("keep_best", [True, False])
    def test_a_held_out_loss_that_runs_away(self, keep_best):
        """Rows of 1e30, whose squared error overflows, on one side of the split only."""
        away = split(list(range(20)), 0.1, 0)[1]
        states = torch.ones(20, 2)
        states[away] = 1e30
        data = Samples(states, torch.arange(20.0), torch.arange(20), -1)
        with pytest.raises(InputError, match=r"the held-out loss is (inf|nan) in epoch 1; lower lr"):
            train_probe(data, "q", keep_best=keep_best, progress=False)

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
            assert all(torch.equal(vars(data)[n], v) for n, v in vars(again).items() if n != "layer")
            assert again.layer == -1
        unknown = {"embeddings": torch.zeros(2, 2), "reward": torch.zeros(2), "prompt": torch.arange(2)}
        save_file(unknown, tmp_path / "unknown.safetensors")
        assert load_embeddings(tmp_path / "unknown.safetensors").layer is None
        for layer in (torch.tensor([1]), torch.tensor(1.0)):
            save_file(unknown | {"layer": layer}, tmp_path / "odd.safetensors")
            with pytest.raises(InputError, match=r"odd.safetensors: layer must be one whole number"):
                load_embeddings(tmp_path / "odd.safetensors")
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
            ('{"prompt": "a"}', "lacks response, label"),
            ('{"prompt": "a", "chosen": "b"}', "lacks rejected"),
            ('["a"]', "must be a JSON object"),
            ('{"prompt": "a", "response": " ", "label": 1}', "response is empty"),
            ('{"prompt": "a", "response": 3, "label": 1}', "'response' must be a string or one message"),
            ('{"prompt": "a", "response": "b", "label": NaN}', "label must be 0 or 1, got nan"),
            ('{"prompt": "a", "response": "b", "label": "high"}', "label must be 0 or 1, got 'high'"),
            ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the same text"),
            ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "in one file"),
        ],
    )
    def test_lines(self, tmp_path, line, message):
        file = tmp_path / "data.jsonl"
        file.write_text(f'{{"prompt": "p", "response": "q", "label": 0}}\n\n{line}\n')
        with pytest.raises(InputError, match=f"data.jsonl:3: .*{message}") as error:
            read_preferences(file)
        assert "\n" not in str(error.value)

    def test_all_bad_lines_are_told_together(self, tmp_path):
        (tmp_path / "data.jsonl").write_text('{"prompt": "p", "response": "q", "label": 1}\n' + "{\n" * 7)
        with pytest.raises(InputError, match=r"^7 of 8 lines cannot be used: .*:2: not JSON.*:6: not .*; and 2 more$"):
            read_preferences(tmp_path / "data.jsonl")

    def test_labels(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text('{"prompt": "p", "response": "q", "label": true}\n')
        assert read_preferences(file) == [Labelled("p", "q", 1.0, f"{file}:1")]
        file.write_text('{"prompt": "p", "response": "q", "label": 2}\n')
        with pytest.raises(InputError, match=r"data.jsonl:1: label must be 0 or 1, got 2"):
            read_preferences(file)
        file.write_text("\n")
        with pytest.raises(InputError, match="holds no examples"):
            read_preferences(file)


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


class TestRewardsOfSamples:
    """`samples_of` takes what the engine takes."""

    @pytest.fixture
    def results(self, engine):
        return engine.generate(reviews.prompts(4), sampling=SamplingParams(max_tokens=24, seed=1))

    def test_a_function_that_is_called_by_name(self, engine, results):
        def judged(completions, prompts, **_):
            return [float(len(c) + 1000 * len(p)) for c, p in zip(completions, prompts, strict=True)]

        found = samples_of(engine, results, judged, layer=1)
        assert found.reward.tolist() == [len(r.text) + 1000 * len(r.prompt) for r in results]
        assert found.layer == 1

    def test_scorers_transforms_and_sums(self, engine, results):
        judge = load_scorer(pyengine.embedded("reward-model"))
        reward = 0.5 * lsc(judge, 0.2) - 2 * rewards.length(64)
        found = samples_of(engine, results, reward).reward
        with torch.inference_mode():
            given = Candidates([r.prompt for r in results], [[0]] * 4, {}, {}, lambda _: [r.text for r in results])
            score = judge.score(given)
        lengths = torch.tensor([len(r.tokens) / 64 for r in results]).log()
        torch.testing.assert_close(found, 0.5 * torch.sigmoid(score - 0.2).log() - 2 * lengths, atol=1e-5, rtol=1e-5)

    def test_what_reads_hidden_states_is_refused(self, engine, results):
        with pytest.raises(InputError, match="'probe' reads hidden states or tokens"):
            samples_of(engine, results, pyengine.embedded("probe"))
        with pytest.raises(InputError, match="needs a reward"):
            samples_of(engine, results, None)
        with pytest.raises(InputError, match="one number for each of 4"):
            samples_of(engine, results, lambda prompts, completions: [0.0])


class TestCommand:
    def run(self, *arguments):
        done = CliRunner().invoke(cli.app, ["train", "probe", *map(str, arguments)], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout)

    def test_from_jsonl_and_from_embeddings(self, tmp_path, engine):
        texts = [c for _, c in reviews.corpus(60, seed=9)]
        prompts = [p for p in reviews.prompts(20) for _ in range(3)]
        both = zip(prompts, texts, strict=True)
        rows = [{"prompt": p, "response": c, "reward": reviews.sentiment_of(c)} for p, c in both]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = ("--lr", 0.01, "--epochs", 20, "--out")
        found = self.run(
            tmp_path / "rows.jsonl", "--loss", "pg", "--hidden", 16, "--layer", 2, *options, tmp_path / "probe"
        )
        assert found["epoch"] == 20
        assert found["held_out"]["rows"] == 6
        engine.set_scorer(tmp_path / "probe")
        assert (engine.parts[0].scorer.hidden, engine.parts[0].scorer.layer) == ((16,), 2)
        report = json.loads((tmp_path / "probe" / "training.json").read_text())
        assert len(report["train_loss"]) == len(report["held_out_loss"]) == 20
        _, pairs = teacher()
        pairs.save(tmp_path / "pairs.safetensors")
        found = self.run(tmp_path / "pairs.safetensors", "--loss", "qp", *options, tmp_path / "qp", "--epochs", 90)
        assert found["held_out"]["accuracy"] > 0.8
        with pytest.raises(InputError, match="the embeddings are of layer -1, not of layer 2"):
            self.run(tmp_path / "pairs.safetensors", "--loss", "qp", "--layer", 2, *options, tmp_path / "no")
        with pytest.raises(InputError, match="loss must be one of q, ce, pg, qp, got 'mse'"):
            self.run(tmp_path / "pairs.safetensors", "--loss", "mse", *options, tmp_path / "no")

    def test_roll_outs_are_read_as_they_were_drawn(self, tmp_path, engine):
        """The file that `train scorer` keeps: the same tokens, and no EOS behind a response that was cut off."""
        drawn = roll_out(engine, reviews.prompts(12), reviews.sentiment, max_tokens=24, seed=3)
        assert {e.ended for e in drawn} == {True, False}
        write_examples(tmp_path / "rollouts.jsonl", drawn)
        found = embed_examples(engine, read_examples(tmp_path / "rollouts.jsonl", engine), 1)
        results = engine.generate(reviews.prompts(12), sampling=SamplingParams(max_tokens=24, seed=3))
        wanted = samples_of(engine, results, reviews.sentiment, 1)
        torch.testing.assert_close(found.embeddings, wanted.embeddings, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.reward, wanted.reward)
        assert found.layer == 1
        out = self.run(tmp_path / "rollouts.jsonl", "--loss", "q", "--epochs", 2, "--layer", 1, "--out", tmp_path)
        assert out["epoch"] == 2
        assert load_scorer(tmp_path).layer == 1

    def test_what_cannot_be_trained_on_is_refused_before_anything_is_embedded(self, tmp_path, monkeypatch):
        def embedded(*_, **__):
            raise AssertionError("a model was asked")

        monkeypatch.setattr("pyengine.training.embeddings.last_states", embedded)
        pairs, labels = tmp_path / "pairs.jsonl", tmp_path / "labels.jsonl"
        pairs.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3)
        labels.write_text('{"prompt": "p", "response": "a", "label": 1}\n')
        for file, options, message in (
            (pairs, ("--loss", "q"), "pairs.jsonl:1: lacks 'response' and 'reward': it is a pair"),
            (labels, ("--loss", "qp"), "labels.jsonl: --loss qp needs pairs"),
            (pairs, ("--loss", "qp", "--beta", 0.5), "beta_train is for loss 'pg'"),
            (pairs, ("--loss", "qp", "--group", 4), "group is for loss 'pg'"),
            (pairs, ("--loss", "qp", "--seed", -1), "seed must be a whole number"),
            (pairs, ("--loss", "qp", "--lr", -1), "lr must be a finite number"),
            (pairs, ("--loss", "qp", "--hidden", 0), "--hidden must be a whole number"),
        ):
            with pytest.raises(InputError, match=message):
                self.run(file, "--out", tmp_path / "out", *options)

    def test_responses_without_rewards_are_scored(self, tmp_path):
        """By a sum on the command line, of a function of a file that is called as TRL calls its own."""
        (tmp_path / "own.py").write_text(
            "def brief(prompts, completions, completion_ids, **columns):\n    return [-len(c) for c in completions]\n"
        )
        texts = [c for _, c in reviews.corpus(30, seed=9)]
        own = [2 * reviews.sentiment_of(c) - 0.01 * len(c) for c in texts]
        for name, said in (("given", own), ("scored", [None] * 30)):
            rows = [
                {"prompt": p, "response": c} | ({} if r is None else {"reward": r})
                for p, c, r in zip(reviews.prompts(10) * 3, texts, said, strict=True)
            ]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = ("--loss", "q", "--epochs", 2, "--out")
        given = self.run(tmp_path / "given.jsonl", *options, tmp_path / "a")
        reward = ("--reward", f"2*sentiment + 0.01*{tmp_path}/own.py:brief")
        scored = self.run(tmp_path / "scored.jsonl", *reward, *options, tmp_path / "b")
        assert scored["held_out"] == pytest.approx(given["held_out"], rel=1e-4, abs=1e-6)
        with pytest.raises(InputError, match="--reward scores responses of JSONL lines"):
            self.run(tmp_path / "given.safetensors", *reward, *options, tmp_path / "c")

    def test_pairs_from_jsonl(self, tmp_path):
        texts = sorted((c for _, c in reviews.corpus(40, seed=9)), key=reviews.sentiment_of)
        rows = [{"prompt": p, "chosen": texts[-1 - i], "rejected": texts[i]} for i, p in enumerate(reviews.prompts(20))]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert isinstance(read_preferences(tmp_path / "rows.jsonl")[0], Pair)
        found = self.run(tmp_path / "rows.jsonl", "--loss", "qp", "--out", tmp_path, "--lr", 0.01, "--epochs", 30)
        assert found["held_out"]["accuracy"] >= 0.5
