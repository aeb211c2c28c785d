"""Worlds D1, D2 and F against enumeration and formulas written out here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pyengine import InputError
from pyengine.losses import weighted_nll
from pyengine.reference import SequenceMoments
from pyengine.worlds import bandit, bigram, offline, represent


def random_law(*shape, seed=0):
    return bigram.normalised(np.random.default_rng(seed).standard_normal(shape))


def every_response(law, length):
    """[N, length] and their probabilities [N] under a law [V + 1, V], one token at a time."""
    vocab = law.shape[1]
    responses = np.array(list(itertools.product(range(vocab), repeat=length)))
    last, chance = np.full(len(responses), vocab), np.ones(len(responses))
    for t in range(length):
        chance = chance * law[last, responses[:, t]]
        last = responses[:, t]
    return responses, chance


class TestBigrams:
    def test_moments_spread_and_shares_are_sums_over_responses(self):
        """6^6 responses; a share has steps where it is known to 1 / N only by luck, hence its tolerance."""
        law, table = random_law(3, 7, 6), np.random.default_rng(1).standard_normal((3, 7, 6)) - 0.3
        mean, variance = bigram.moments(law, table, 6)
        share = bigram.share_above(law, table, 6)
        pooled = []
        for x in range(3):
            responses, chance = every_response(law[x], 6)
            total = bigram.along(table, np.stack([responses] * 3))[x]
            assert chance.sum() == pytest.approx(1)
            assert mean[x] == pytest.approx(chance @ total)
            assert variance[x] == pytest.approx(chance @ (total - mean[x]) ** 2)
            assert share[x] == pytest.approx(chance @ (total > 0), abs=2e-3)
            pooled.append([chance @ total / 6, chance @ total**2 / 36])
        first, second = np.mean(pooled, 0)
        assert bigram.spread(law, table, 6) == pytest.approx(math.sqrt(second - first**2))

    def test_a_sum_that_does_not_vary_is_above_or_not(self):
        law, table = random_law(2, 4, 3), np.array([0.5, -0.5])[:, None, None] * np.ones((2, 4, 3))
        assert bigram.share_above(law, table, 5).tolist() == [1, 0]

    def test_sums_along_a_response_start_after_the_prompt(self):
        table = np.arange(12.0).reshape(1, 4, 3)
        assert bigram.along(table, np.array([[[2, 0, 1]]])) == table[0, 3, 2] + table[0, 2, 0] + table[0, 0, 1]

    def test_samples_follow_the_law(self):
        law = random_law(2, 4, 3)
        drawn = bigram.sample(law, 3, 20_000, 0)
        for x in range(2):
            responses, chance = every_response(law[x], 3)
            found = np.bincount(drawn[x] @ [9, 3, 1], minlength=27)[responses @ [9, 3, 1]] / 20_000
            assert (np.abs(found - chance) < 5 * np.sqrt(chance * (1 - chance) / 20_000)).all()

    def test_alignments_are_ratios_of_probabilities(self):
        law = bigram.confident(3, seed=2, vocab=5)
        against = {"none": 1.0, "greedy": law.max(-1, keepdims=True), "sampled": (law**2).sum(-1, keepdims=True)}
        for name, denominator in against.items():
            np.testing.assert_allclose(bigram.alignments(law, name), np.log(law / denominator), atol=1e-12)

    def test_confidence_rises_from_prompt_to_prompt(self):
        law = bigram.confident(6)
        entropy = -(law * np.log(law)).sum(-1).mean(-1)
        assert (np.diff(entropy) < 0).all()
        assert entropy[0] > 3.9
        assert entropy[-1] < 0.8
        with pytest.raises(InputError, match="at least 2"):
            bigram.confident(1)

    def test_a_model_represents_them(self):
        laws = random_law(3, 5, 4)
        world = represent.bigrams(laws, 6)
        ids = world.tokenizer("p1 1.3 1.0 1.2", return_tensors="pt").input_ids
        assert ids.tolist() == [[13, 7, 4, 6]]
        with torch.no_grad():
            probability = world.model(input_ids=ids).logits[0].double().softmax(-1).numpy()
        np.testing.assert_allclose(probability[:, 4:8], laws[1][[4, 3, 0, 2]], atol=1e-5)
        np.testing.assert_allclose(probability[:, 4:8].sum(-1), 1, atol=1e-5)


class TestBandit:
    def test_a_seed_has_its_world_whatever_the_others_are(self):
        alone, both = bandit.concave([5]), bandit.concave([3, 5])
        assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, both, strict=True))
        with pytest.raises(InputError, match="at least one seed"):
            bandit.concave([])

    def test_the_reward_falls_beyond_its_turn(self):
        """The direction is read off the linear world: least squares without a residual."""
        straight, world = bandit.concave([0], curvature=0.0), bandit.concave([0])
        assert torch.equal(straight.features, world.features)
        x = straight.features[0].reshape(-1, bandit.WIDTH).numpy()
        design = np.hstack([x, np.ones((len(x), 1))])
        found, residual, *_ = np.linalg.lstsq(design, straight.reward[0].reshape(-1).numpy(), rcond=None)
        assert residual[0] < 1e-18
        z = x @ found[:-1] / np.linalg.norm(found[:-1])
        raw = np.where(z > 1, z - 1.5 * (z - 1) ** 2, z)
        np.testing.assert_allclose(world.reward[0].reshape(-1), (raw - raw.mean()) / raw.std(ddof=1), atol=1e-10)

    def test_the_better_candidate_is_preferred_as_often_as_bradley_and_terry_say(self):
        world = bandit.concave(range(40))
        gap = world.reward[torch.arange(40)[:, None, None], world.prompt[:, :, None], world.pair].diff(dim=-1)[..., 0]
        chance = torch.sigmoid(2 * gap.abs())  # that the better one comes first
        error = (chance * (1 - chance)).sum().sqrt()
        assert abs((gap < 0).sum() - chance.sum()) < 4 * error
        assert (world.pair[..., 0] != world.pair[..., 1]).all()

    def test_reward_and_kl_of_a_policy(self):
        world = bandit.concave([1, 2])
        weights = torch.randn(2, bandit.WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for s in range(2):
            rewards, divergences = [], []
            for features, reward in zip(world.features[s], world.reward[s], strict=True):
                p, q = (np.exp(features.numpy() @ w[s].numpy()) for w in (weights, world.reference))
                p, q = p / p.sum(), q / q.sum()
                rewards.append(p @ reward.numpy())
                divergences.append(p @ np.log(p / q))
            assert bandit.expected(world, weights)[s].item() == pytest.approx(np.mean(rewards))
            assert bandit.divergence(world, weights)[s].item() == pytest.approx(np.mean(divergences))

    @pytest.mark.parametrize("name", ["DPO", "WPO", "WPO_W", "WPO_L"])
    def test_training_is_adam_on_the_gradient_written_out(self, name):
        """-beta W sigmoid(-h) (phi_w - phi_l), for normalisers cancel within a prompt; W = (p / sum p^2)^(1/3)."""
        world = bandit.concave([7], pairs=64)
        trace = bandit.train(world, bandit.arms(beta=0.5)[name], epochs=3)
        theta, start = (world.reference[0].numpy().copy() for _ in range(2))
        order, step = torch.Generator().manual_seed(0), 0
        m, v = np.zeros((2, bandit.WIDTH))
        for _ in range(3):
            for batch in torch.rand(1, 64, generator=order).argsort(-1)[0].split(bandit.BATCH):
                gradients = []
                for x, (good, bad) in zip(world.prompt[0, batch], world.pair[0, batch], strict=True):
                    phi = world.features[0, x].numpy()
                    p = np.exp(phi @ theta) / np.exp(phi @ theta).sum()
                    used = {"WPO_W": [good], "WPO_L": [bad], "DPO": []}.get(name, [good, bad])
                    sides = [p[i] / (p**2).sum() for i in used]
                    weight = min(1.0, np.prod(sides) ** (1 / 3))
                    h = 0.5 * (phi[good] - phi[bad]) @ (theta - start)
                    gradients.append(-0.5 * weight / (1 + np.exp(h)) * (phi[good] - phi[bad]))
                g, step = np.mean(gradients, 0), step + 1
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                theta = theta - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(trace.weights[0], theta, atol=1e-9)
        assert trace.reward[-1].item() == pytest.approx(bandit.expected(world, trace.weights).item())
        assert trace.reward[0].item() == pytest.approx(bandit.expected(world, world.reference).item())
        assert trace.kl[0].item() == 0

    def test_the_control_hands_out_the_same_weights_to_others(self):
        world = bandit.concave([0, 1])
        both = bandit.moments(bandit.log_law(world, world.reference), world.prompt, world.pair)
        chosen, rejected = (SequenceMoments(*(field[:, :, i] for field in both)) for i in (0, 1))
        ones = lambda *_: torch.ones_like(chosen.logp)  # noqa: E731
        weight = bandit.pair_weight(chosen, rejected)
        dealt = bandit.shuffled(ones, torch.Generator().manual_seed(0))(chosen, rejected, None, None)
        assert torch.equal(dealt.sort(-1).values, weight.sort(-1).values)
        assert (dealt != weight).double().mean() > 0.5


class TestOffline:
    @pytest.fixture(scope="class")
    def world(self):
        return offline.offline(0, 2000)

    def test_z_is_standardised_and_the_halves_differ(self, world):
        assert world.z.mean() == pytest.approx(0, abs=1e-9)
        assert world.z.std() == pytest.approx(1, abs=1e-9)
        for half, z in zip(world.halves, world.z.reshape(2, -1), strict=True):
            assert abs(z.mean() - offline.mean_z(world, half)) < 4 * z.std() / math.sqrt(len(z))
        assert offline.mean_z(world, world.halves[0]) > 0 > offline.mean_z(world, world.halves[1])
        with pytest.raises(InputError, match="at least 1"):
            offline.offline(0, 0)

    @pytest.mark.parametrize("name", ["SFT", "SFT, all", "FA", "RWR"])
    def test_counts_are_where_the_weighted_loss_is_flat(self, world, name):
        """The gradient of `losses.weighted_nll` by the logits of the policy that was counted."""
        weight = offline.weights(world)[name]
        logits = torch.from_numpy(np.log(np.maximum(offline.count_fit(world, weight), 1e-300))).requires_grad_(True)
        last = np.insert(world.responses[:, :-1], 0, offline.VOCAB, axis=1)
        log_p = logits.log_softmax(-1)
        logp = log_p[torch.from_numpy(last), torch.from_numpy(world.responses)].sum(-1)
        tokens = torch.full((len(logp),), offline.LENGTH)
        moments = SequenceMoments(logp, tokens, logp.detach(), logp.detach(), logp.detach())
        weighted_nll(moments, torch.from_numpy(weight)).backward()
        assert logits.grad.abs().max() < 1e-12

    def test_where_no_data_went_the_policy_is_uniform(self, world):
        assert (offline.count_fit(world, np.zeros(len(world.z))) == 0.1).all()

    def test_methods_land_where_their_weighted_data_lie(self, world):
        """FA at E[z | z > 0], RWR at E[z e^(z/5)] / E[e^(z/5)]: a bigram policy reproduces additive rewards nearly."""
        z, weights = world.z, offline.weights(world)
        assert set(weights["FA"]) == {0.0, 1.0}
        np.testing.assert_array_equal(weights["FA"] > 0, z > 0)
        np.testing.assert_allclose(weights["RWR"], np.exp(z / 5), rtol=1e-12)
        for name, mean in (
            ("FA", z[z > 0].mean()),
            ("RWR", (z * np.exp(z / 5)).mean() / np.exp(z / 5).mean()),
            ("SFT", z[: len(z) // 2].mean()),
        ):
            assert offline.mean_z(world, offline.count_fit(world, weights[name])) == pytest.approx(mean, abs=0.02)

    def test_conditional_alignment_has_matched_what_it_is_linear_in(self, world):
        """At the maximum likelihood sum_i z_i^k (count - expectation) is 0 for k = 0 and 1, for each pair of tokens."""
        fit = offline.conditional(world)
        last = np.insert(world.responses[:, :-1], 0, offline.VOCAB, axis=1)
        logits = fit[0][last] + world.z[:, None, None] * fit[1][last]
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for power in (0, 1):
            missing = np.zeros((offline.VOCAB + 1, offline.VOCAB))
            factor = (world.z**power)[:, None]
            np.add.at(missing, (last, world.responses), np.broadcast_to(factor, last.shape))
            np.subtract.at(missing, last, factor[:, :, None] * expected)
            assert np.abs(missing).max() < 1e-4 * len(world.z)
        z = [offline.mean_z(world, offline.asked(fit, score)) for score in (-1.0, 0.0, 1.0)]
        assert z == pytest.approx([-1, 0, 1], abs=0.15)

    @pytest.mark.parametrize("standardised", [False, True])
    def test_the_regularised_optimum_is_one(self, world, standardised):
        """Better than its neighbours, and just below what a law that also knows its position reaches (soft values)."""
        base = offline.count_fit(world, world.supervised)
        law = offline.regularised(world, base, 0.3, standardised)
        reward = world.step / (world.statistics.std if standardised else 1.0)

        def objective(policy):
            mean = bigram.moments(policy[None], reward[None], offline.LENGTH)[0][0]
            return mean - 0.3 * offline.divergence(policy, base)

        soft = np.zeros(offline.VOCAB + 1)
        for _ in range(offline.LENGTH):
            soft = 0.3 * np.log((base * np.exp((reward + soft[None, : offline.VOCAB]) / 0.3)).sum(-1))
        assert 0.9 * soft[-1] < objective(law) <= soft[-1]
        rng = np.random.default_rng(0)
        for _ in range(20):
            noisy = law * np.exp(0.02 * rng.standard_normal(law.shape))
            assert objective(noisy / noisy.sum(-1, keepdims=True)) < objective(law)

    def test_a_large_beta_leaves_the_base_as_it_is(self, world):
        base = offline.count_fit(world, world.supervised)
        base[0, 0], base[0, 1] = 0.0, base[0, 0] + base[0, 1]  # forbidden
        np.testing.assert_allclose(offline.regularised(world, base, 1e6), base, atol=1e-5)
        assert offline.regularised(world, base, 0.1)[0, 0] == 0
