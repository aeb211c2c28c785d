"""The exact worlds against enumeration, and the engine against the exact worlds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyengine import BestOfK, Blockwise, Engine, InputError, SamplingParams, Tokenwise
from pyengine.ledger import best_of_k_bound, blockwise_bound
from pyengine.scorers import Probe
from pyengine.worlds import markov, outcomes, represent, simpson


def tiny(cap=5, seed=0):
    """Two states, an EOS, rewards of tokens and of ends: small enough to enumerate all responses."""
    rng = np.random.default_rng(seed)
    step = rng.dirichlet([1.0] * 3, size=2)
    return markov.Chain(step, cap, np.array([0, 1, 2]), rng.standard_normal((cap + 1, 3)), (0, 1))


def responses(chain, state):
    """{response: base probability} of everything that may follow a prompt."""
    found, going = {}, {(): 1.0}
    while going:
        longer = {}
        for y, p in going.items():
            for z, q in enumerate(chain.step[y[-1] if y else state]):
                done = z == chain.states or len(y) + 1 == chain.cap
                (found if done else longer)[(*y, z)] = p * q
        going = longer
    return found


def engine_of(world, scorer=None):
    return Engine(world.model, world.tokenizer, scorer, max_rows=1024, cache_gb=0.3)


def mean_and_error(x):
    return np.mean(x), np.std(x, ddof=1) / math.sqrt(len(x))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_best_of_k_law_is_what_enumeration_says(k):
    base, score = np.array([0.1, 0.4, 0.3, 0.2]), np.array([2.0, 0.0, 2.0, 1.0])
    law = np.zeros(4)
    for draw in itertools.product(range(4), repeat=k):
        best = [i for i in draw if score[i] == max(score[list(draw)])]
        for i in best:  # the first of the best; over all orders, any of them alike
            law[i] += math.prod(base[list(draw)]) / len(best)
    np.testing.assert_allclose(outcomes.best_of_k_law(base, score, k), law, atol=1e-12)
    with pytest.raises(InputError, match="at least 1"):
        outcomes.best_of_k_law(base, score, 0.5)


def test_values_are_expected_rewards():
    chain = tiny()
    for s in range(2):
        expected = sum(p * chain.reward(y) for y, p in responses(chain, s).items())
        assert markov.values(chain)[0, s] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(markov.backup(chain, markov.values(chain)), markov.values(chain), atol=1e-12)
    with pytest.raises(InputError, match="no whole response"):
        chain.reward([0, 1])


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_tokenwise_with_the_true_values_attains_the_optimum(weight):
    """J* = log Z - λ V* at every prefix, and no other policy reaches it (Controlled Decoding, Theorem 2.1)."""
    chain = tiny()
    value = markov.values(chain)
    policy = markov.tilted(chain, value, weight)
    ahead = (chain.gain + value[1:])[:, None, :]
    log_z = np.log((chain.step * np.exp(weight * ahead)).sum(-1))

    def objective(p):
        return weight * ((p * ahead).sum(-1) - value[:-1, :-1]) - outcomes.divergence(p, chain.step)

    np.testing.assert_allclose(objective(policy), log_z - weight * value[:-1, :-1], atol=1e-12)
    other = markov.tilted(chain, value + 0.1 * np.random.default_rng(1).standard_normal(value.shape), weight + 0.3)
    assert (objective(other) < objective(policy)).all()


def test_reward_and_kl_of_a_tokenwise_policy_are_sums_over_responses():
    chain = tiny()
    policy = markov.tilted(chain, markov.values(chain), 0.8)
    reward, kl = markov.evaluate(chain, policy)
    for s in range(2):
        total = np.zeros(3)
        for y, base in responses(chain, s).items():
            ratio = math.prod(
                policy[t, b, z] / chain.step[b, z] for t, (b, z) in enumerate(itertools.pairwise((s, *y)))
            )
            total += base * ratio * np.array([1, chain.reward(y), math.log(ratio)])
        assert total == pytest.approx([1, reward[s], kl[s]], abs=1e-12)


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_blockwise_law_is_a_law_and_has_its_reward_and_kl(k, block_tokens):
    """Summed over all responses, ragged last blocks included; the KL stays below b(K) E ceil(L / M)."""
    chain = tiny()
    value = markov.values(chain) + 0.2 * np.random.default_rng(3).standard_normal((6, 3))  # any scorer will do
    exact = markov.blockwise(chain, value, k, block_tokens)
    for s in range(2):
        total = np.zeros(4)
        for y, base in responses(chain, s).items():
            log_ratio = exact.sequence_log_ratio(s, y)
            bound = blockwise_bound(k, len(y), block_tokens)
            total += base * math.exp(log_ratio) * np.array([1, chain.reward(y), log_ratio, bound])
        assert total[:3] == pytest.approx([1, exact.reward[s], exact.kl[s]], abs=1e-10)
        assert exact.kl[s] <= total[3] + 1e-12


def test_blockwise_of_one_block_is_best_of_k():
    chain = tiny()
    exact = markov.best_of_k(chain, 4)
    for s in range(2):
        every = responses(chain, s)
        base, reward = np.array(list(every.values())), np.array([chain.reward(y) for y in every])
        law = outcomes.best_of_k_law(base, reward, 4)
        assert exact.reward[s] == pytest.approx(law @ reward, abs=1e-12)
        assert exact.kl[s] == pytest.approx(float(outcomes.divergence(law, base)), abs=1e-12)
        assert exact.kl[s] <= best_of_k_bound(4)


def test_the_printed_blockwise_bound_has_a_counter_example():
    """Two one-token responses, K = 2, M = 4: KL .1308, printed .0483; the bound that counts blocks is .1931."""
    chain = markov.Chain(
        np.array([[0.5, 0.5, 0.0]] * 2), 1, np.zeros(3, dtype=np.intp), np.array([[0.0, 1.0, 0.0]] * 2), (0,)
    )
    kl = markov.blockwise(chain, chain.final, 2, 4).cost.kl
    assert kl == pytest.approx(0.1308, abs=5e-5)
    assert blockwise_bound(2, 1, 4, blocks="paper") == pytest.approx(0.0483, abs=5e-5)
    assert blockwise_bound(2, 1, 4, blocks="paper") < kl <= blockwise_bound(2, 1, 4)


def test_frontier_is_the_gibbs_law_and_above_every_policy():
    chain = tiny()
    cost = markov.frontier(chain, 0.7)
    laws = []
    for s in range(2):
        every = responses(chain, s)
        base, reward = np.array(list(every.values())), np.array([chain.reward(y) for y in every])
        law = outcomes.gibbs_law(base, reward, 0.7)
        laws.append((law @ reward, outcomes.divergence(law, base)))
    assert cost == pytest.approx(np.mean(laws, 0), abs=1e-12)
    for other in (markov.tokenwise(chain, markov.values(chain), 1.0), markov.best_of_k(chain, 3).cost):
        assert other.reward <= markov.frontier_at_kl(chain, other.kl)
    assert markov.frontier_at_kl(chain, cost.kl) == pytest.approx(cost.reward, abs=1e-9)


def test_real_k_hits_its_kl():
    chain = markov.length()
    value = markov.values(chain)
    k = markov.k_at_kl(chain, value, 32, 1.5)
    assert markov.blockwise(chain, value, k, 32).cost.kl == pytest.approx(1.5, abs=1e-5)


def test_figures_of_worlds_a_and_b():
    """To the digits that they were first computed with, elsewhere: reward and KL."""
    chain = markov.additive()
    assert markov.blockwise(chain, markov.values(chain), 6, 16).cost == pytest.approx((44.18, 2.81), abs=5e-3)
    assert markov.best_of_k(chain, 50).cost == pytest.approx((44.49, 2.93), abs=5e-3)
    chain = markov.length()
    assert markov.best_of_k(chain, 50).cost.reward == pytest.approx(-1.229, abs=5e-4)
    assert markov.frontier_at_kl(chain, markov.best_of_k(chain, 50).cost.kl) == pytest.approx(-1.168, abs=5e-4)
    for m, k, *cost in [(8, 3, -1.77, 1.93), (16, 5, -1.72, 1.84), (32, 12, -1.54, 2.08), (64, 28, -1.37, 2.41)]:
        assert markov.blockwise(chain, markov.values(chain), k, m).cost == pytest.approx(cost, abs=6e-3)


def test_samples_follow_the_chain():
    chain = tiny()
    drawn = markov.sample(chain, 8000, seed=0)
    for s in range(2):
        rewards = [chain.reward(y) for y in drawn[s::2]]
        mean, error = mean_and_error(rewards)
        assert abs(mean - markov.values(chain)[0, s]) < 4 * error
    first = np.bincount([y[0] for y in drawn], minlength=3) / 8000
    np.testing.assert_allclose(first, markov.visits(chain)[1], atol=4 * math.sqrt(0.25 / 8000))


def test_cd_q_and_fudge_from_data():
    """With a one-hot of the state and two clocks neither is exact; both come close, and CD-Q off-policy too."""
    chain = markov.length()
    value = markov.values(chain)
    data = markov.visited(chain, markov.sample(markov.perturbed(chain, 0.5, 1), 4000, seed=0))
    spread = markov.rmse(chain, np.full_like(value, np.mean(data.reward)), value)
    for fit in (markov.fit_cd_q(chain, data), markov.fit_fudge(chain, data)):
        assert markov.rmse(chain, fit, value) < 0.5 * spread
    table = markov.mean_reward(chain, data)
    i = data.t == 1
    assert table[1, 0] == pytest.approx(data.reward[i & (data.z == 0)].mean())


def test_a_reward_of_every_token_is_regressed_on_what_is_still_to_come():
    """World A: values count from the prefix on; 20,000 responses leave .03 of a spread of 2."""
    chain = markov.additive(8)
    data, value = markov.visited(chain, markov.sample(chain, 20_000, seed=0)), markov.values(chain)
    for fit in (markov.fit_cd_q, markov.fit_fudge, markov.mean_reward, markov.tabular_cd_q):
        assert markov.rmse(chain, np.nan_to_num(fit(chain, data)), value) < 0.06


class TestOutcomes:
    def test_no_weight_is_the_base_policy(self):
        """0 * -inf is no utility."""
        assert outcomes.gibbs_law(np.array([0.5, 0.5]), np.array([0.0, -np.inf]), 0.0).tolist() == [0.5, 0.5]

    def test_one_gold_reward_whatever_the_noise(self):
        worlds = [outcomes.two_rewards(5, 2000, noise, 3) for noise in ("none", "gaussian", "t")]
        assert all(np.array_equal(w.gold, worlds[0].gold) for w in worlds)
        inner = worlds[0].gold - worlds[0].gold.mean(-1, keepdims=True)
        # Standard errors with 10,000 outcomes: .0075 for the correlation, .014 for the spread.
        assert np.corrcoef(inner.reshape(2, -1))[0, 1] == pytest.approx(-0.5, abs=0.03)
        assert inner.std() == pytest.approx(2, abs=0.06)
        with pytest.raises(InputError, match="noise must be"):
            outcomes.two_rewards(noise="some")

    def test_lsc_examples(self):
        assert outcomes.lsc(np.array([0.0, 1e4, -1e4]), 0.0) == pytest.approx([-math.log(2), 0, -1e4])
        r, ref = np.array([1.0, -2.0]), np.array([0.5, 0.1])
        np.testing.assert_allclose(outcomes.lsc(r + 7, ref + 7), outcomes.lsc(r, ref), atol=1e-12)

    def test_the_gibbs_tilt_costs_what_was_asked(self):
        utility = np.random.default_rng(0).standard_normal((4, 50))
        base = np.full(utility.shape, 1 / 50)
        weight = outcomes.weight_at_kl(base, utility, 1.2)
        law = outcomes.gibbs_law(base, utility, weight)
        assert outcomes.divergence(law, base).mean() == pytest.approx(1.2, abs=1e-9)
        with pytest.raises(InputError, match="no weight costs 9"):
            outcomes.weight_at_kl(base, utility, 9.0)


class TestSimpson:
    def test_losses_have_their_gradients(self):
        """L_PG in groups: its mean over all groups of k from a finite set is -J(π_k) with softmax selection."""
        rng = np.random.default_rng(0)
        score, reward = (torch.from_numpy(rng.standard_normal(3)) for _ in range(2))
        k = simpson.GROUP
        # All 3^10 groups at once, weighted alike: iid draws with replacement.
        draws = torch.tensor(list(itertools.product(range(3), repeat=k)))
        batch = reward[draws] - reward[draws].mean() + reward.mean()
        expected = -(score[draws].softmax(-1) * (reward[draws] - reward[draws].mean())).sum(-1).mean()
        assert simpson.l_pg(score[draws], batch).item() == pytest.approx(expected.item(), abs=1e-12)
        # Softmax selection's law is k p0 E[rho | the first draw].
        rho = score[draws].softmax(-1)[:, 0]
        law = torch.stack([k * rho[draws[:, 0] == i].mean() / 3 for i in range(3)])
        assert law.sum().item() == pytest.approx(1, abs=1e-12)
        assert -(law * (reward - reward.mean())).sum().item() == pytest.approx(expected.item(), abs=1e-12)
        # The gradient, with d softmax_i / d s_j = softmax_i (1_ij - softmax_j).
        free = score.clone().requires_grad_()
        simpson.l_pg(free[draws], batch).backward()
        soft = score[draws].softmax(-1)
        slope = soft * (batch - (soft * batch).sum(-1, keepdim=True))  # [groups, k], of each place's score
        wanted = torch.zeros(3, dtype=torch.float64).index_add(0, draws.flatten(), slope.flatten()) / -len(draws)
        torch.testing.assert_close(free.grad, wanted, atol=1e-12, rtol=0)
        assert free.grad.abs().max() > 1e-2

    def test_probes_are_minima(self):
        data = simpson.simpson(60, seed=0)
        for name, loss in simpson.LOSSES.items():
            weight = torch.from_numpy(simpson.fit(name, data)).requires_grad_()
            x, r = torch.from_numpy(data.features), torch.from_numpy(data.reward)
            offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
            if name != "PG":  # the offset that was left out
                search = torch.optim.LBFGS([offset], max_iter=100, line_search_fn="strong_wolfe")

                def closure():
                    search.zero_grad()
                    value = loss(x @ weight.detach() + offset, r)
                    value.backward()
                    return value

                search.step(closure)
            total = loss(x @ weight + offset.detach(), r) + simpson.PENALTY * weight.square().sum()
            (gradient,) = torch.autograd.grad(total, weight)
            assert gradient.abs().max() < 1e-3, name

    def test_pass_rate_of_one_draw_is_the_mean(self):
        data = simpson.simpson(10, seed=0)
        rate = simpson.pass_rate(data, np.random.default_rng(0).standard_normal(simpson.WIDTH), 1)
        np.testing.assert_allclose(rate, data.reward.mean(1), atol=1e-12)


class TestRepresent:
    @pytest.mark.parametrize("chain", [tiny(), markov.additive(), markov.length()], ids=["tiny", "A", "B"])
    def test_logits_are_log_probabilities_and_states_are_in_sight(self, chain):
        world = represent.markov(chain)
        rng = np.random.default_rng(0)
        ids = torch.from_numpy(rng.integers(0, chain.states, (3, chain.cap + 1)))
        with torch.no_grad():
            out = world.model(input_ids=ids, output_hidden_states=True)
        law = np.maximum(np.log(np.maximum(chain.step, 1e-300)), represent.FORBIDDEN)
        np.testing.assert_allclose(out.logits.log_softmax(-1).numpy(), law[ids.numpy()], atol=1e-4)
        assert torch.equal(out.hidden_states[-1][..., world.classes].argmax(-1), ids)
        assert torch.equal(out.hidden_states[-1][0, :, world.positions].argmax(-1), torch.arange(chain.cap + 1))

    def test_features_stand_in_the_hidden_state(self):
        features = np.random.default_rng(0).standard_normal((3, 4, 5))
        world = represent.own_responses(features)
        ids = world.tokenizer("p1 r1.2", return_tensors="pt").input_ids
        with torch.no_grad():
            out = world.model(input_ids=ids, output_hidden_states=True)
        np.testing.assert_allclose(out.hidden_states[-1][0, 1, world.features].numpy(), features[1, 2], atol=1e-5)
        probability = out.logits[0, 0].softmax(-1).numpy()
        np.testing.assert_allclose(probability[4:8], 0.25, atol=1e-6)
        assert world.tokenizer.decode([6]) == "r1.2"

    def test_the_branching_cache_serves_it(self, caplog):
        engine_of(represent.markov(tiny()))
        assert not caplog.records  # a slower decoder would say why

    def test_a_scorer_of_another_world_is_refused(self):
        chain = tiny()
        scorer = represent.TableScorer(np.zeros((2, 9)), slice(0, 2))
        with pytest.raises(InputError, match="values of 9 tokens"):
            engine_of(represent.markov(chain), scorer)
        with pytest.raises(InputError, match="need 4 classes"):
            represent.build(np.eye(4), [0], ["a", "b"], 3)


class TestEngine:
    """Through `pyengine.Engine`; standard errors of the samples, seeds fixed."""

    N = 400

    def follow(self, chain, strategy, scorer=None):
        world = represent.markov(chain)
        engine = engine_of(world, scorer or represent.value_scorer(chain, world))
        states = [chain.prompts[i % len(chain.prompts)] for i in range(self.N)]
        sampling = [SamplingParams(max_tokens=chain.cap, seed=i) for i in range(self.N)]
        return states, engine.generate([f"s{s}" for s in states], strategy, sampling)

    def test_tokenwise_kl_of_each_token_is_exact(self):
        """Summed KLs along a response are those of the table; their mean and that of log-ratios is the sequence KL."""
        chain = replace(markov.length(), cap=16, final=markov.length(16).final)
        value = markov.values(chain)
        policy = markov.tilted(chain, value, 2.0)
        step_kl = outcomes.divergence(policy, chain.step)
        exact = markov.tokenwise(chain, value, 2.0)
        states, results = self.follow(chain, Tokenwise(2.0))
        for s, r in zip(states, results, strict=True):
            along = sum(step_kl[t, b] for t, b in enumerate([s, *r.tokens[:-1]]))
            assert r.kl == pytest.approx(along, abs=1e-4)
            assert r.reward == pytest.approx(chain.reward(r.tokens), abs=1e-5)
        for name, found in {
            "kl": [r.kl for r in results],
            "ratio": [sum(r.logp_policy) - sum(r.logp_base) for r in results],
        }.items():
            mean, error = mean_and_error(found)
            assert abs(mean - exact.kl) < 4 * error, name
        mean, error = mean_and_error([r.reward for r in results])
        assert abs(mean - exact.reward) < 4 * error

    @pytest.mark.parametrize("strategy", [Blockwise(3, 2), Blockwise(4, 3), BestOfK(5)], ids=str)
    def test_block_selection_follows_its_law(self, strategy):
        chain = tiny(cap=6, seed=1)
        exact = markov.blockwise(chain, markov.values(chain), strategy.k, strategy.block_tokens or chain.cap)
        states, results = self.follow(chain, strategy)
        for s in range(2):
            rewards = [r.reward for b, r in zip(states, results, strict=True) if b == s]
            mean, error = mean_and_error(rewards)
            assert abs(mean - exact.reward[s]) < 4 * error
        ratios = [exact.sequence_log_ratio(s, r.tokens) for s, r in zip(states, results, strict=True)]
        mean, error = mean_and_error(ratios)
        assert abs(mean - exact.cost.kl) < 4 * error
        assert all(r.reward == pytest.approx(chain.reward(r.tokens), abs=1e-5) for r in results)

    def test_a_probe_selects_by_features(self):
        data = simpson.simpson(4, seed=0)
        world = represent.own_responses(data.features)
        weight = np.random.default_rng(1).standard_normal(simpson.WIDTH)
        probe = Probe(world.model.config.n_embd)
        with torch.no_grad():
            probe.head.weight.zero_()[0, world.features] = torch.from_numpy(weight).float()
            probe.head.bias.zero_()
        sampling = [SamplingParams(max_tokens=1, seed=i) for i in range(40)]
        results = engine_of(world, probe).generate([f"p{i % 4}" for i in range(40)], BestOfK(8), sampling)
        scores = (data.features @ weight).reshape(-1)
        for r in results:
            assert r.reward == pytest.approx(scores[r.tokens[0]], abs=1e-3)
            assert r.reward == max(c.utility for c in r.blocks[0].candidates)
