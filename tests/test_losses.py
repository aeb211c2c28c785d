"""Preference and offline losses against their formulas on fp64 probabilities, closed-form optima, and odd input."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyengine import InputError, Statistics, ops
from pyengine.losses import (
    OrpoLoss,
    ca_loss,
    check_labels,
    class_weight,
    dpo_loss,
    fa_loss,
    fa_weight,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    log_weight,
    odds_ratio_loss,
    rwr_loss,
    rwr_weight,
    sequence_moments,
    sft_loss,
    simpo_loss,
    weighted,
    weighted_nll,
)
from pyengine.ops import SequenceMoments, TokenLogprob

VOCAB, EPS = 11, 2.0**-23


class Response(NamedTuple):
    logp: Tensor  # of the response, with its graph
    tokens: int
    reference: float

    @property
    def rho(self):
        return self.logp - self.reference

    @property
    def mean(self):
        return self.logp / max(1, self.tokens)

    @property
    def odds(self):
        p = self.mean.clamp(max=-EPS).exp()  # of an empty response: as near to 1 as fp32 allows
        return p / (1 - p)


def sigmoid(x):
    return 1 / (1 + (-x).exp())


LOSSES = {  # name: the loss, its formula for one pair
    "dpo": (partial(dpo_loss, beta=0.3), lambda w, r: -sigmoid(0.3 * (w.rho - r.rho)).log()),
    "cdpo": (
        partial(dpo_loss, beta=0.3, label_smoothing=0.2),
        lambda w, r: -0.8 * sigmoid(0.3 * (w.rho - r.rho)).log() - 0.2 * sigmoid(0.3 * (r.rho - w.rho)).log(),
    ),
    "hinge": (partial(hinge_loss, beta=0.3), lambda w, r: (1 - 0.3 * (w.rho - r.rho)).clamp(min=0)),
    "ipo": (
        partial(ipo_loss, beta=0.3),
        lambda w, r: (w.rho / max(1, w.tokens) - r.rho / max(1, r.tokens) - 1 / 0.6) ** 2,
    ),
    "ipo, summed": (partial(ipo_loss, beta=0.3, normalize=False), lambda w, r: (w.rho - r.rho - 1 / 0.6) ** 2),
    "simpo": (partial(simpo_loss, beta=1.5, gamma=0.7), lambda w, r: -sigmoid(1.5 * w.mean - 1.5 * r.mean - 0.7).log()),
    "sft": (sft_loss, lambda w, r: -w.mean),
    "sft, summed": (partial(sft_loss, reduction="sum"), lambda w, r: -w.logp),
    "odds ratio": (odds_ratio_loss, lambda w, r: -sigmoid((w.odds / r.odds).log()).log()),
    "orpo": (OrpoLoss(lam=0.4), lambda w, r: -w.mean - 0.4 * sigmoid((w.odds / r.odds).log()).log()),
}
WEIGHTED = {f"{name}, weighted": weighted(loss) for name, (loss, _) in LOSSES.items()}


class Batch(NamedTuple):
    logits: Tensor  # [N, T, V], a leaf
    labels: Tensor  # [N, T]
    kept: Tensor  # [N, T]
    reference: Tensor  # [N]

    def moments(self):
        fields = ops.logits_logprob(self.logits.flatten(0, 1), self.labels.flatten())
        return sequence_moments(TokenLogprob(*(f.unflatten(0, self.labels.shape) for f in fields)), self.kept)

    def sides(self):
        """The arguments of a paired loss: the first half is chosen."""
        moments, pairs = self.moments(), len(self.labels) // 2
        halves = [SequenceMoments(*(f[half] for f in moments)) for half in (slice(pairs), slice(pairs, None))]
        return *halves, *self.reference.split(pairs)

    def responses(self):
        """From probabilities, token by token, in fp64."""
        out = []
        for rows, labels, kept, reference in zip(*self, strict=True):
            logp = torch.zeros((), dtype=torch.float64)
            for row, label, keep in zip(rows.double(), labels, kept, strict=True):
                if keep:
                    logp = logp + (row.exp()[label] / row.exp().sum()).log()
            out.append(Response(logp, int(kept.sum()), reference.item()))
        return out


def batch(seed=0, dtype=torch.float32):
    """Four pairs with prompts, padding, an empty response, and tokens that are forbidden but no labels."""
    torch.manual_seed(seed)
    logits, labels = 2 * torch.randn(8, 7, VOCAB), torch.randint(0, VOCAB - 1, (8, 7))
    logits[2, :, -1] = -math.inf
    kept = torch.ones(8, 7, dtype=torch.bool)
    kept[:, :2] = False
    kept[3, 4:] = kept[4, 6:] = kept[6, 5:] = kept[5] = False
    return Batch(logits.to(dtype).requires_grad_(), labels, kept, -12 + 2 * torch.randn(8))


def given(logp, tokens=3):
    """A side of a pair with this summed log-probability."""
    logp = torch.as_tensor(logp)
    return SequenceMoments(logp, torch.full(logp.shape, tokens, dtype=torch.int64), logp, logp, logp)


@pytest.mark.parametrize("name", LOSSES)
def test_paired_losses_are_their_formulas(name):
    loss, formula = LOSSES[name]
    data = batch()
    found, responses = loss(*data.sides()), data.responses()
    want = torch.stack([formula(w, r) for w, r in zip(responses[:4], responses[4:], strict=True)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
    coefficients = torch.tensor([1.0, -2.0, 0.5, 3.0])
    a, b = (torch.autograd.grad((coefficients * x).sum(), data.logits)[0] for x in (found, want))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert a[~data.kept].count_nonzero() == 0


@pytest.mark.parametrize("name", [*LOSSES, *WEIGHTED])
def test_gradcheck(name):
    """fp64 stays fp64; weights are constants."""
    loss = WEIGHTED[name] if name in WEIGHTED else LOSSES[name][0]
    torch.manual_seed(1)
    tokens = torch.tensor([3, 1, 4, 2, 5])
    logp = [(-3 * torch.rand(5, dtype=torch.float64) - 0.1).requires_grad_() for _ in range(2)]
    rest = [[-torch.rand(5, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    references = [-3 * torch.rand(5, dtype=torch.float64) for _ in range(2)]

    def value(*logp):
        sides = [SequenceMoments(x, tokens, *others) for x, others in zip(logp, rest, strict=True)]
        return loss(*sides, *references)

    assert value(*logp).dtype == torch.float64
    assert torch.autograd.gradcheck(value, logp)


def test_defaults():
    """DPO, IPO, hinge and KTO as in TRL; SimPO as in the authors' code; ORPO's lambda of 0.1."""
    low, high, zero = given(torch.tensor([-6.0])), given(torch.tensor([-3.0])), torch.zeros(1)
    pair = (high, low, zero, zero)
    assert dpo_loss(*pair).item() == pytest.approx(math.log1p(math.exp(-0.3)))
    assert hinge_loss(*pair).item() == pytest.approx(0.7)
    assert ipo_loss(*pair).item() == pytest.approx(16.0)
    assert simpo_loss(high, low).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert sft_loss(high, low).item() == 1.0
    assert OrpoLoss()(high, low).item() == pytest.approx(1 + 0.1 * odds_ratio_loss(high, low).item())
    assert kto_loss(high, zero, torch.tensor([True]), 0.0).item() == pytest.approx(1 / (1 + math.exp(-0.3)))


@pytest.mark.parametrize("loss", [dpo_loss, hinge_loss, ipo_loss, weighted(dpo_loss)])
def test_references_carry_no_gradient(loss):
    logp = torch.tensor([-2.0, -4.0], requires_grad=True)
    reference = torch.tensor([-3.0, -3.5], requires_grad=True)
    loss(given(logp), given(logp - 1), reference, reference - 0.5).sum().backward()
    assert reference.grad is None


class TestKto:
    desirable = torch.tensor([True, False, False, True, True, False, True, False])

    def test_is_its_formula(self):
        data = batch()
        options = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5}
        found = kto_loss(data.moments(), data.reference, self.desirable, torch.tensor(0.8), **options)
        want = torch.stack(
            [
                1.5 * (1 - sigmoid(0.2 * (r.rho - 0.8))) if good else 0.5 * (1 - sigmoid(0.2 * (0.8 - r.rho)))
                for r, good in zip(data.responses(), self.desirable, strict=True)
            ]
        )
        torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)
        a, b = (torch.autograd.grad((torch.arange(1, 9) * x).sum(), data.logits)[0] for x in (found, want))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_gradcheck_and_a_detached_baseline(self):
        logp = torch.randn(8, dtype=torch.float64, requires_grad=True)
        baseline = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x: kto_loss(given(x), torch.zeros(8), self.desirable, baseline, beta=0.3), logp
        )
        kto_loss(given(logp), torch.zeros(8), self.desirable, baseline).sum().backward()
        assert baseline.grad is None

    def test_baseline_is_a_clamped_mean(self):
        policy = torch.tensor([1.0, 4.0, 1.0], requires_grad=True)
        z0 = kto_baseline(policy, torch.tensor([0.0, 1.0, 0.0]))
        assert z0.item() == pytest.approx(5 / 3)
        assert not z0.requires_grad
        assert kto_baseline(-policy, torch.zeros(3)).item() == 0

    @pytest.mark.parametrize("count", [0, 1])
    def test_a_batch_of_one_has_no_mismatched_response(self, count):
        with pytest.raises(InputError, match=rf"N >= 2 mismatched responses, got \[{count}\]"):
            kto_baseline(torch.zeros(count), torch.zeros(count))

    def test_class_weights_make_class_means(self):
        """Equal weights: the mean over the desirable plus the mean over the others."""
        moments, reference = given(-torch.arange(8.0), tokens=1), torch.zeros(8)
        uniform = moments._replace(sampled=torch.zeros(8))
        losses = kto_loss(moments, reference, self.desirable, 0.0)
        total = (class_weight(uniform, self.desirable) * losses).sum()
        assert total.item() == pytest.approx((losses[self.desirable].mean() + losses[~self.desirable].mean()).item())


class TestOffline:
    z = torch.tensor([1.2, -0.3, 0.0, 2.0, -1.0, 0.5, 0.1, -2.0])

    @pytest.mark.parametrize("reduction", ["sum", "token_mean"])
    @pytest.mark.parametrize(
        ("loss", "weight"),
        [
            (lambda m, z, r: fa_loss(m, z, reduction=r), lambda z: float(z > 0)),
            (lambda m, z, r: fa_loss(m, z, 0.5, r), lambda z: float(z > 0.5)),
            (lambda m, z, r: rwr_loss(m, z, reduction=r), lambda z: math.exp(z / 5)),
            (lambda m, z, r: rwr_loss(m, z, 0.5, 3.0, r), lambda z: min(3.0, math.exp(2 * z))),
            (lambda m, z, r: rwr_loss(m, z, math.inf, reduction=r), lambda z: 1.0),
            (lambda m, z, r: ca_loss(m, r), lambda z: 1.0),
        ],
        ids=["fa", "fa, .5", "rwr", "rwr, capped", "rwr, sft", "ca"],
    )
    def test_are_their_formulas(self, loss, weight, reduction):
        data = batch()
        found, responses = loss(data.moments(), self.z, reduction), data.responses()
        total = -sum(weight(z) * r.logp for z, r in zip(self.z.tolist(), responses, strict=True))
        want = total / (8 if reduction == "sum" else sum(r.tokens for r in responses))
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
        a, b = (torch.autograd.grad(x, data.logits)[0] for x in (found, want))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)

    def test_gradcheck(self):
        logp = torch.randn(8, dtype=torch.float64, requires_grad=True)
        z = self.z.double()
        for reduction in ("sum", "token_mean"):
            assert torch.autograd.gradcheck(lambda x: rwr_loss(given(x), z, reduction=reduction), logp)
            assert torch.autograd.gradcheck(lambda x: fa_loss(given(x), z, reduction=reduction), logp)

    def test_weights_are_constants_and_tokens_are_counted(self):
        weight, logp = torch.tensor([2.0, 1.0], requires_grad=True), torch.tensor([-3.0, -1.0], requires_grad=True)
        weighted_nll(given(logp), weight).backward()
        assert weight.grad is None
        assert logp.grad.tolist() == [-1.0, -0.5]
        assert weighted_nll(given(logp[:1], tokens=1), weight[:1], "token_mean").item() == 6.0

    def test_the_threshold_is_strict_and_the_mean_is_what_is_kept(self):
        assert fa_weight(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [0.0, 0.0, 1.0]
        assert fa_weight(self.z).mean().item() == 4 / 8

    @pytest.mark.parametrize("reduction", ["sum", "token_mean"])
    def test_a_batch_that_is_filtered_whole_is_zero_with_a_graph(self, reduction):
        data = batch()
        loss = fa_loss(data.moments(), torch.full((8,), -1.0), reduction=reduction)
        assert loss.item() == 0
        loss.backward()
        assert data.logits.grad.count_nonzero() == 0
        assert weighted_nll(given(torch.zeros(0)), torch.zeros(0), reduction).item() == 0

    def test_a_dropped_response_may_hold_anything(self):
        logp = torch.tensor([-2.0, -math.inf, math.nan], requires_grad=True)
        loss = fa_loss(given(logp), torch.tensor([1.0, -1.0, -1.0]))
        loss.backward()
        assert loss.item() == pytest.approx(2 / 3)
        assert logp.grad.tolist() == pytest.approx([-1 / 3, 0, 0])

    def test_equal_rewards_have_z_0(self):
        for rewards in ([0.1] * 5, [3.0]):
            z = torch.tensor(Statistics.of(rewards, ddof=1).z(rewards))
            assert fa_weight(z).sum() == 0
            assert rwr_weight(z).tolist() == [1.0] * len(rewards)

    def test_exp_is_of_fp32(self):
        assert rwr_weight(torch.tensor([20.0]).half(), beta=1.0).item() == pytest.approx(math.exp(20), rel=1e-6)
        assert fa_weight(torch.tensor([1.0]).bfloat16()).dtype == torch.float32

    def test_a_missing_reward_is_not_a_low_one(self):
        assert fa_weight(torch.tensor([math.nan])).isnan().all()
        assert rwr_weight(torch.tensor([math.nan]), math.inf, 2.0).isnan().all()


def every_loss(data):
    """Name to value of all losses, on the same responses."""
    moments, z = data.moments(), TestOffline.z
    values = {name: loss(*data.sides()) for name, (loss, _) in LOSSES.items()}
    values |= {name: loss(*data.sides()) for name, loss in WEIGHTED.items()}
    kto = kto_loss(moments, data.reference, TestKto.desirable, 0.4)
    values |= {"kto": kto, "kto, weighted": class_weight(moments, TestKto.desirable) * kto}
    for reduction in ("sum", "token_mean"):
        values[f"fa, {reduction}"] = fa_loss(moments, z, reduction=reduction)
        values[f"rwr, {reduction}"] = rwr_loss(moments, z, reduction=reduction)
        values[f"ca, {reduction}"] = ca_loss(moments, reduction)
    return values


class TestMasks:
    def test_labels_of_prompt_and_padding_do_not_matter(self):
        data = batch()
        other = data._replace(labels=torch.where(data.kept, data.labels, (data.labels + 3) % (VOCAB - 1)))
        assert not torch.equal(other.labels, data.labels)
        for (name, a), b in zip(every_loss(data).items(), every_loss(other).values(), strict=True):
            assert torch.equal(a, b), name

    def test_the_eos_matters(self):
        """The last kept token of a response is its EOS; chosen response 0's is at 6, and it is FA's, RWR's, CA's."""
        data = batch()
        labels = data.labels.clone()
        labels[0, 6] = (labels[0, 6] + 1) % (VOCAB - 1)
        before, after = every_loss(data), every_loss(data._replace(labels=labels))
        for name in before:
            assert not torch.allclose(before[name], after[name], rtol=1e-4), name

    def test_padding_does_not_matter(self):
        """Logits at masked positions may be anything, the labels ignore_index."""
        data = batch()
        logits = torch.cat([data.logits.detach(), torch.full((8, 5, VOCAB), math.nan)], 1).requires_grad_()
        longer = data._replace(
            logits=logits,
            labels=torch.cat([data.labels, torch.full((8, 5), -100)], 1),
            kept=torch.cat([data.kept, torch.zeros(8, 5, dtype=torch.bool)], 1),
        )
        for (name, a), b in zip(every_loss(data).items(), every_loss(longer).values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
            gradient = torch.autograd.grad(b.sum(), logits, retain_graph=True)[0]
            assert gradient.isfinite().all(), name

    @pytest.mark.parametrize("field", [0, 1, 2, 3, 4])
    def test_masked_fields_may_be_nan(self, field):
        torch.manual_seed(0)
        fields = list(torch.randn(5, 2, 3))
        kept = torch.tensor([[True, False, True], [False, False, False]])
        clean = sequence_moments(TokenLogprob(*fields), kept)
        fields[field] = torch.where(kept, fields[field], math.nan)
        for a, b in zip(clean, sequence_moments(TokenLogprob(*fields), kept), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("kept", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool)])
    def test_a_wrong_mask_is_refused(self, kept):
        with pytest.raises(InputError, match=r"kept must be bool \[2, 3\]"):
            sequence_moments(TokenLogprob(*torch.zeros(5, 2, 3)), kept)


class TestOddInput:
    def test_all_responses_empty(self):
        data = batch()
        data = data._replace(kept=torch.zeros_like(data.kept))
        for name, value in every_loss(data).items():
            assert value.isfinite().all(), name
            gradient = torch.autograd.grad(value.sum(), data.logits, retain_graph=True)[0]
            assert gradient.count_nonzero() == 0, name
        assert log_weight(data.moments()).tolist() == [0.0] * 8

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types_are_upcast_first(self, dtype):
        half = batch(dtype=dtype)
        wide = half._replace(logits=half.logits.detach().float())
        for (name, a), b in zip(every_loss(half).items(), every_loss(wide).values(), strict=True):
            assert a.dtype == torch.float32, name
            torch.testing.assert_close(a, b, msg=name)
        fields = [torch.full((1, 2049), value, dtype=dtype) for value in (-1.0, 0.0, 0.0, 0.0, 0.0)]
        summed = sequence_moments(TokenLogprob(*fields), torch.ones(1, 2049, dtype=torch.bool))
        assert summed.logp.tolist() == [-2049.0]  # which neither type holds
        low = SequenceMoments(*(f if f.dtype == torch.int64 else f.to(dtype) for f in batch().moments()))
        high = SequenceMoments(*(f if f.dtype == torch.int64 else f.float() for f in low))
        desirable, reference = TestKto.desirable, batch().reference.to(dtype)
        for loss in (
            lambda m: kto_loss(m, reference, desirable, 0.1),
            lambda m: ca_loss(m),
            lambda m: weighted(ipo_loss)(m, m, reference, reference + 1),
        ):
            torch.testing.assert_close(loss(low), loss(high), atol=0, rtol=0)

    def test_a_forbidden_label_is_named(self):
        data = batch()
        labels = data.labels.clone()
        check_labels(data.moments())
        labels[2, 3] = VOCAB - 1
        with pytest.raises(InputError, match=r"response 2 holds a token with log-probability -inf \(1 of 8 do\)"):
            check_labels(data._replace(labels=labels).moments())

    @pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
    def test_a_forbidden_label_leaves_weighted_losses_finite(self, side):
        """Its weight is 0: neither 0 * inf nor a NaN in the gradient."""
        data = batch()
        labels = data.labels.clone()
        logits = data.logits.detach().clone()
        for row in {"chosen": [0], "rejected": [4], "both": [0, 4]}[side]:
            logits[row, 3, -1], labels[row, 3] = -math.inf, VOCAB - 1
        data = data._replace(labels=labels, logits=logits.requires_grad_())
        for name, loss in WEIGHTED.items():
            if "orpo" in name and side != "rejected":
                continue  # its NLL is not weighted
            value = loss(*data.sides())
            assert value[0] == 0 or "orpo" in name
            assert value.isfinite().all(), name
            gradient = torch.autograd.grad(value.sum(), logits)[0]
            assert gradient.isfinite().all(), name
            assert gradient[4].count_nonzero() == 0, name

    def test_no_value_is_looked_at(self):
        """On a GPU that would wait for it; a tensor on the meta device has none."""
        tokens = torch.ones(8, dtype=torch.int64, device="meta")
        logp, desirable = torch.zeros(8, device="meta"), torch.ones(8, dtype=torch.bool, device="meta")
        moments = SequenceMoments(logp, tokens, logp, logp, logp)
        for loss in [*(loss for loss, _ in LOSSES.values()), *WEIGHTED.values()]:
            assert loss(moments, moments, logp, logp).shape == (8,)
        losses = kto_loss(moments, logp, desirable, kto_baseline(logp, logp))
        assert (class_weight(moments, desirable) * losses).shape == (8,)
        for scalar in (fa_loss(moments, logp), rwr_loss(moments, logp, cap=2.0), ca_loss(moments, "token_mean")):
            assert scalar.shape == ()

    def test_limits_of_unweighted_losses(self):
        low, zero = given(torch.tensor([-math.inf])), torch.zeros(1)
        assert dpo_loss(low, given(zero), zero, zero).item() == math.inf
        assert dpo_loss(given(zero), low, zero, zero).item() == 0
        assert hinge_loss(given(zero), low, zero, zero).item() == 0
        assert simpo_loss(given(zero), low).item() == 0
        assert odds_ratio_loss(given(zero), low).item() == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_odds_near_one_have_finite_gradients(self, dtype):
        values = torch.tensor([0.0, -EPS / 4, -2 * EPS, -1e-4, -0.6, -0.8, -50.0, 1e-6], dtype=dtype)
        a = values.clone().requires_grad_()
        certain = odds_ratio_loss(given(a, tokens=1), given(torch.full_like(values, -1.0), tokens=1))
        certain.sum().backward()
        assert certain.isfinite().all()
        assert a.grad.isfinite().all()
        assert a.grad[[0, 1, 7]].tolist() == [0, 0, 0]
        p = values[3:7].double().exp()
        odds = (p / (-torch.expm1(values[3:7].double()))) / (math.exp(-1) / (1 - math.exp(-1)))
        torch.testing.assert_close(certain[3:7].double(), torch.log1p(1 / odds), atol=0, rtol=1e-5)

    def test_a_lambda_of_0_skips_the_term(self):
        low = given(torch.tensor([-3.0]), tokens=2)
        nothing = OrpoLoss(lam=0.0, preference=lambda *_: torch.tensor([math.nan]))
        assert nothing(low, low).item() == 1.5

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda m, x: dpo_loss(m, m, None, None), "dpo_loss needs the reference policy's log-probabilities"),
            (lambda m, x: hinge_loss(m, m, x, None), "hinge_loss needs the reference"),
            (lambda m, x: weighted(ipo_loss)(m, m, None, x), "ipo_loss needs the reference"),
            (lambda m, x: kto_loss(m, None, x > 0, 0.0), "kto_loss needs the reference"),
            (lambda m, x: dpo_loss(m, m, x[:, None], x), r"must have the policy's shape \[3\], got \[3, 1\]"),
            (lambda m, x: dpo_loss(m, m, x, x, beta=0.0), "dpo_loss: beta must be above 0, got 0.0"),
            (lambda m, x: dpo_loss(m, m, x, x, label_smoothing=0.6), r"label_smoothing must be .* in 0 .. 0.5"),
            (lambda m, x: hinge_loss(m, m, x, x, beta=-1), "hinge_loss: beta must be above 0"),
            (lambda m, x: ipo_loss(m, m, x, x, beta=math.nan), "ipo_loss: beta must be a finite number"),
            (lambda m, x: simpo_loss(m, m, gamma=math.inf), "simpo_loss: gamma must be a finite number"),
            (lambda m, x: sft_loss(m, m, reduction="mean"), "reduction must be one of sum, token_mean, got 'mean'"),
            (lambda m, x: OrpoLoss(lam=-1)(m, m), "OrpoLoss: lam must be a finite number in 0"),
            (lambda m, x: kto_loss(m, x, x, 0.0), r"kto_loss: desirable must be bool \[3\], got torch.float32"),
            (lambda m, x: kto_loss(m, x, x > 0, 0.0, desirable_weight=-1), "kto_loss: desirable_weight"),
            (lambda m, x: kto_baseline(x, x[:2]), r"got \[3\] and \[2\]"),
            (lambda m, x: weighted_nll(m, x[:2]), r"weight must have shape \[3\], got \[2\]"),
            (lambda m, x: weighted_nll(m, x, "mean"), "reduction must be one of"),
            (lambda m, x: rwr_weight(x, 0.0), "rwr_weight: beta must be above 0"),
            (lambda m, x: rwr_weight(x, cap=0.0), "rwr_weight: cap must be above 0"),
            (lambda m, x: fa_weight(x, math.nan), "fa_weight: threshold"),
        ],
    )
    def test_bad_arguments_are_named(self, call, message):
        with pytest.raises(InputError, match=message):
            call(given(torch.zeros(3)), torch.zeros(3))
