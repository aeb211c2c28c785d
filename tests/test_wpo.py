"""WPO's weights: three alignments against probabilities in fp64, their identities, and weighted losses in the op."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch

from pyengine import InputError, ops, reference
from pyengine.losses import (
    OrpoLoss,
    class_weight,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    log_weight,
    odds_ratio_loss,
    pair_weight,
    sequence_moments,
    sft_loss,
    simpo_loss,
    weighted,
)
from pyengine.ops import SequenceMoments, TokenLogprob

module = sys.modules["pyengine.ops.linear_preference"]
ALIGNMENTS = ("none", "greedy", "sampled")


def moments_of(logits, labels, kept=None):
    """Of logits [N, T, V] and labels [N, T], in fp64."""
    fields = reference.logits_logprob(logits.flatten(0, 1), labels.flatten())
    tokens = TokenLogprob(*(f.unflatten(0, labels.shape) for f in fields))
    return sequence_moments(tokens, torch.ones_like(labels, dtype=torch.bool) if kept is None else kept)


def token_alignments(logits, alignment):
    """a for each label of one row of logits [V]: each a response of one token."""
    vocab = len(logits)
    moments = moments_of(logits.expand(vocab, 1, vocab), torch.arange(vocab)[:, None])
    return log_weight(moments, alignment)


def naive(logits, labels, kept, alignment):
    """log w of each response, token by token, from probabilities."""
    out = []
    for rows, targets, keep in zip(logits.double(), labels, kept, strict=True):
        total = 0.0
        for row, y, k in zip(rows, targets, keep, strict=True):
            p = row.exp() / row.exp().sum()
            against = {"none": 1.0, "greedy": p.max(), "sampled": (p * p).sum()}[alignment]
            total += math.log(p[y] / against) if k else 0.0
        out.append(total / max(1, int(keep.sum())))
    return torch.tensor(out, dtype=torch.float64)


@pytest.fixture
def data():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(8, 6, 9), torch.randint(0, 8, (8, 6))
    logits[1, :, 8] = -math.inf
    labels[[0, 4]] = logits[[0, 4]].argmax(-1)  # likelier than a drawn token is in the mean: their W exceeds 1
    kept = torch.rand(8, 6) < 0.8
    kept[5] = False
    return logits, labels, kept


def sides(moments):
    pairs = len(moments.logp) // 2
    return [SequenceMoments(*(f[half] for f in moments)) for half in (slice(pairs), slice(pairs, None))]


class TestWeights:
    @pytest.mark.parametrize("alignment", ALIGNMENTS)
    def test_are_their_formulas(self, data, alignment):
        logits, labels, kept = data
        want = naive(*data, alignment)
        torch.testing.assert_close(log_weight(moments_of(*data), alignment), want)
        fields = ops.logits_logprob(logits.flatten(0, 1), labels.flatten())
        found = sequence_moments(TokenLogprob(*(f.unflatten(0, labels.shape) for f in fields)), kept)
        torch.testing.assert_close(log_weight(found, alignment).double(), want, atol=1e-5, rtol=1e-5)
        assert want[5] == 0

    @pytest.mark.parametrize("alignment", ALIGNMENTS)
    def test_pairs(self, data, alignment):
        """W = w(y_w) w(y_l), WPO_W and WPO_L, with the authors' clamp of it and with the paper's text."""
        w = naive(*data, alignment).exp()
        pair = sides(moments_of(*data))
        for variant, product in (("both", w[:4] * w[4:]), ("chosen", w[:4]), ("rejected", w[4:])):
            torch.testing.assert_close(pair_weight(*pair, alignment, variant, "none"), product)
            torch.testing.assert_close(pair_weight(*pair, alignment, variant), product.clamp(max=1))

    def test_defaults_are_sampled_both_and_clamped(self, data):
        pair = sides(moments_of(*data))
        free = pair_weight(*pair, clamp="none")
        assert free.min() < 1 < free.max()
        torch.testing.assert_close(pair_weight(*pair), free.clamp(max=1))

    @pytest.mark.parametrize("alignment", ALIGNMENTS)
    def test_classes(self, data, alignment):
        moments, w = moments_of(*data), naive(*data, alignment).exp()
        desirable = torch.tensor([True, False, True, True, False, False, True, False])
        found = class_weight(moments, desirable, alignment)
        for members in (desirable, ~desirable):
            torch.testing.assert_close(found[members], w[members] / w[members].sum())
        for one_class in (torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)):
            torch.testing.assert_close(class_weight(moments, one_class, alignment), w / w.sum())
        empty = SequenceMoments(*(f[:0] for f in moments))
        assert class_weight(empty, desirable[:0]).shape == (0,)

    def test_small_weights_of_a_class_do_not_underflow(self):
        """exp(-200) is 0 in fp32; shares of it are not."""
        logp = torch.tensor([-200.0, -201.0])
        moments = SequenceMoments(logp, torch.ones(2, dtype=torch.int64), logp, logp, logp)
        found = class_weight(moments, torch.tensor([True, True]))
        assert found.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda m, s: log_weight(m, "greedily"), "alignment must be one of none, greedy, sampled, got 'greedily'"),
            (lambda m, s: log_weight(m, "logp"), "alignment must be one of"),
            (lambda m, s: pair_weight(*s, variant="W"), "variant must be one of both, chosen, rejected, got 'W'"),
            (lambda m, s: pair_weight(*s, clamp=True), "clamp must be one of product, none, got True"),
            (lambda m, s: weighted(dpo_loss, "all"), "alignment must be"),
            (lambda m, s: weighted(dpo_loss, variant="all"), "variant must be"),
            (lambda m, s: weighted(dpo_loss, clamp="all"), "clamp must be"),
            (lambda m, s: class_weight(m, torch.ones(8)), r"class_weight: desirable must be bool \[8\]"),
        ],
    )
    def test_bad_arguments_are_named(self, data, call, message):
        moments = moments_of(*data)
        with pytest.raises(InputError, match=message):
            call(moments, sides(moments))


class TestIdentities:
    """§3.2 of the specification."""

    @pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
    def test_the_sampled_weight_of_a_token_is_1_in_the_mean(self, scale):
        torch.manual_seed(0)
        logits = scale * torch.randn(50, dtype=torch.float64)
        p, a = logits.softmax(0), token_alignments(logits, "sampled")
        assert (p * a.exp()).sum().item() == pytest.approx(1, abs=1e-12)
        shannon, renyi = -(p * p.log()).sum(), -(p * p).sum().log()
        assert (p * a).sum().item() == pytest.approx((renyi - shannon).item(), abs=1e-12)
        assert renyi < shannon

    def test_on_policy_the_mean_weight_of_a_length_is_at_most_1(self):
        """All 4^4 responses of a bigram language, each with its probability; some weights exceed 1."""
        torch.manual_seed(1)
        table = 2 * torch.randn(5, 4, dtype=torch.float64)  # the last row starts
        labels = torch.cartesian_prod(*[torch.arange(4)] * 4)
        logits = table[torch.cat([torch.full((256, 1), 4), labels[:, :-1]], 1)]
        moments = moments_of(logits, labels)
        w = log_weight(moments).exp()
        assert moments.logp.exp().sum().item() == pytest.approx(1)
        assert (moments.logp.exp() * w).sum() < 1
        assert w.max() > 1
        assert log_weight(moments, "greedy").max() <= 1e-12

    @pytest.mark.parametrize("vocab", [4, 100, 32_000])
    def test_the_largest_sampled_weight(self, vocab):
        """(1 + sqrt V) / 2 at p = 1 / sqrt V, the rest uniform; 90 at V = 32,000."""
        p = vocab**-0.5
        logits = torch.full((1, 1, vocab), math.log((1 - p) / (vocab - 1)), dtype=torch.float64)
        logits[..., 0] = math.log(p)
        bound = (1 + math.sqrt(vocab)) / 2
        assert log_weight(moments_of(logits, torch.zeros(1, 1, dtype=torch.int64))).exp().item() == pytest.approx(bound)
        near = [0.8 * p, 0.95 * p, 1.05 * p, 1.2 * p]
        for other in near:
            assert other / (other**2 + (1 - other) ** 2 / (vocab - 1)) < bound
        torch.manual_seed(0)
        labels = torch.randint(0, vocab, (40, 1))
        many = 5 * torch.randn(40, 1, vocab, dtype=torch.float64)
        many[torch.arange(40), 0, labels[:, 0]] += torch.linspace(0, 30, 40, dtype=torch.float64)
        assert log_weight(moments_of(many, labels)).exp().max() <= bound
        assert log_weight(moments_of(many, labels), "greedy").max() <= 1e-12

    @pytest.mark.parametrize("alignment", ["greedy", "sampled"])
    def test_uniform_and_one_hot_rows_are_aligned(self, alignment):
        uniform = torch.full((7,), 3.0, dtype=torch.float64)
        assert token_alignments(uniform, alignment).abs().max() < 1e-12
        support = torch.tensor([0.0, -math.inf, 0.0, -math.inf], dtype=torch.float64)
        assert token_alignments(support, alignment)[[0, 2]].abs().max() < 1e-12
        for sure in (torch.tensor([-math.inf, 2.0, -math.inf]), torch.tensor([0.0, 800.0, 0.0])):
            assert token_alignments(sure.double(), alignment)[1].abs() < 1e-12
        assert token_alignments(uniform, "none")[0].item() == pytest.approx(-math.log(7))

    @pytest.mark.parametrize("alignment", ALIGNMENTS)
    def test_shifts_and_padding_do_not_matter_and_a_temperature_does(self, data, alignment):
        logits, labels, kept = data
        found = log_weight(moments_of(*data), alignment)
        shifted = logits.double() + 50 * torch.randn(8, 6, 1, dtype=torch.float64)
        torch.testing.assert_close(log_weight(moments_of(shifted, labels, kept), alignment), found)
        longer = [torch.cat([x, x.flip(0)], 1) for x in (logits, labels)]
        padded = log_weight(moments_of(*longer, torch.cat([kept, torch.zeros_like(kept)], 1)), alignment)
        torch.testing.assert_close(padded, found)
        warmer = log_weight(moments_of(logits / 2, labels, kept), alignment)
        assert (warmer - found).abs().max() > 0.1

    def test_probabilities_that_underflow_in_fp16_do_not(self):
        """sum p^2 of a uniform row of 32,000 is 0 in fp16; its logarithm is taken by log-sum-exp in fp32."""
        fields = ops.logits_logprob(torch.zeros(1, 32_000).half(), torch.tensor([5]))
        moments = sequence_moments(TokenLogprob(*(f[None] for f in fields)), torch.tensor([[True]]))
        assert abs(log_weight(moments).item()) < 1e-5


LOSSES = {
    "dpo": partial(dpo_loss, beta=0.2, label_smoothing=0.1),
    "hinge": partial(hinge_loss, beta=0.2),
    "ipo": partial(ipo_loss, beta=0.2),
    "simpo": partial(simpo_loss, beta=1.0, gamma=0.3),
    "sft": sft_loss,
    "orpo": OrpoLoss(lam=0.5),
}


class TestWeightedLosses:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("variant", ["both", "chosen", "rejected"])
    @pytest.mark.parametrize("clamp", ["product", "none"])
    def test_weights_multiply_values_and_gradients(self, data, name, variant, clamp):
        """W is a constant: no gradient runs through it. ORPO's NLL keeps its own."""
        logits, labels, kept = data
        leaf = logits.double().requires_grad_()
        references = torch.linspace(-3, 2, 4).double(), torch.linspace(1, -4, 4).double()
        loss = LOSSES[name]
        for alignment in ALIGNMENTS:
            w = naive(*data, alignment).exp()
            weight = {"both": w[:4] * w[4:], "chosen": w[:4], "rejected": w[4:]}[variant]
            weight = weight.clamp(max=1) if clamp == "product" else weight
            pair = sides(moments_of(leaf, labels, kept))
            found = weighted(loss, alignment, variant, clamp)(*pair, *references)
            want = weight * loss(*pair, *references)
            if name == "orpo":
                want = sft_loss(*pair) + weight * 0.5 * odds_ratio_loss(*pair)
            torch.testing.assert_close(found, want)
            a, b = (torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (found, want))
            torch.testing.assert_close(a, b)
            assert not pair_weight(*pair, alignment, variant, clamp).requires_grad

    def test_a_loss_of_ones_own_is_weighted_too(self, data):
        pair = sides(moments_of(*data))
        found = weighted(lambda c, r, *_: c.logp - r.logp, clamp="none")(*pair, None, None)
        torch.testing.assert_close(found, pair_weight(*pair, clamp="none") * (pair[0].logp - pair[1].logp))

    @pytest.mark.parametrize("name", [*LOSSES, *(f"{name}, weighted" for name in LOSSES)])
    def test_chunked_by_the_op_as_unchunked(self, monkeypatch, name):
        """The mean is over all pairs, not over a chunk's; one pair at a time, all at once, and the fp64 reference."""
        loss = weighted(LOSSES[name.split(",")[0]]) if "weighted" in name else LOSSES[name]
        torch.manual_seed(0)
        hidden, weight = torch.randn(8, 5, 12), torch.randn(300, 12).requires_grad_()
        target = torch.randint(0, 300, (8, 5))
        target[2, 3:] = target[7, :2] = target[5] = -100
        hidden.requires_grad_()
        logp = -25 + 3 * torch.randn(8)
        want = reference.linear_preference(hidden, weight, target, loss, reference_logp=logp)
        gradients = torch.autograd.grad(want.loss, (hidden, weight))
        for kept in (10**9, 300 * 12, 1):
            monkeypatch.setattr(module, "KEPT_LOGITS", kept)
            found = ops.linear_preference(hidden, weight, target, loss, reference_logp=logp)
            torch.testing.assert_close(found.losses.double(), want.losses, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.loss.double(), want.losses.mean(), atol=1e-5, rtol=1e-5)
            for a, b in zip(torch.autograd.grad(found.loss, (hidden, weight)), gradients, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=1e-3)

    def test_partials_pass_into_a_compiled_graph(self):
        """linear_preference refuses closures there."""
        torch.manual_seed(0)
        hidden, weight, target = torch.randn(4, 3, 8), torch.randn(40, 8), torch.randint(0, 40, (4, 3))
        hidden.requires_grad_()

        def step(hidden, logp):
            loss = weighted(partial(dpo_loss, beta=0.3))
            return ops.linear_preference(hidden, weight, target, loss, reference_logp=logp).loss

        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(hidden, torch.zeros(4)), step(hidden, torch.zeros(4)))


def summed(*logp):
    total = torch.tensor(logp)
    return SequenceMoments(total, torch.full(total.shape, 2), total, total, total)


def test_a_class_of_forbidden_labels_has_weight_0():
    weight = class_weight(summed(-3.0, -math.inf), torch.tensor([True, False]))
    assert weight.tolist() == [1.0, 0.0]


def test_weights_are_put_on_the_preference_that_orpo_was_given():
    def hundred(chosen, rejected, *_):
        return 100 + 0 * chosen.logp

    chosen, rejected = summed(-3.0, -2.0), summed(-4.0, -5.0)
    loss = OrpoLoss(lam=1.0, preference=hundred)
    weight = pair_weight(chosen, rejected)
    torch.testing.assert_close(weighted(loss)(chosen, rejected, None, None), sft_loss(chosen, rejected) + 100 * weight)
    twice = weighted(weighted(OrpoLoss()))(chosen, rejected, None, None)
    torch.testing.assert_close(twice, sft_loss(chosen, rejected) + 0.1 * weight**2 * odds_ratio_loss(chosen, rejected))


@pytest.mark.parametrize("loss", [dpo_loss, hinge_loss, ipo_loss, simpo_loss, OrpoLoss(), odds_ratio_loss])
def test_sides_of_unequal_number_are_refused(loss):
    with pytest.raises(InputError, match=r"\[2\] chosen and \[1\] rejected"):
        loss(summed(-3.0, -2.0), summed(-4.0), torch.zeros(2), torch.zeros(1))
