"""What minimises the losses: closed forms of DPO and IPO, and what weighted regression reaches for Gaussian rewards."""

from __future__ import annotations

import math
from functools import partial

import pytest
import scipy.special
import scipy.stats
import torch

from pyengine.losses import dpo_loss, fa_weight, ipo_loss, rwr_weight, weighted, weighted_nll
from pyengine.ops import SequenceMoments


def given(logp, tokens=3):
    """A side of a pair with this summed log-probability."""
    logp = torch.as_tensor(logp)
    return SequenceMoments(logp, torch.full(logp.shape, tokens, dtype=torch.int64), logp, logp, logp)


class TestPopulations:
    """§5.2 for Gaussian z: what the losses' minimisers reach, integrated on a grid of responses, one for each z."""

    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = scipy.stats.norm.pdf(z) / scipy.stats.norm.pdf(z).sum()

    def mean(self, weight):
        mass = weight * torch.as_tensor(self.density)
        return (mass * self.z).sum().item() / mass.sum().item()

    @pytest.mark.parametrize(("beta", "effective"), [(5.0, 0.961), (1.0, 0.368), (0.5, 0.018)])
    def test_rwr(self, beta, effective):
        weight, density = rwr_weight(self.z, beta), torch.as_tensor(self.density)
        assert self.mean(weight) == pytest.approx(1 / beta, abs=1e-6)
        share = ((density * weight).sum() ** 2 / (density * weight**2).sum()).item()
        assert share == pytest.approx(math.exp(-1 / beta**2), rel=1e-6)
        assert share == pytest.approx(effective, abs=5e-4)

    def test_fa_is_the_inverse_mills_ratio(self):
        assert self.mean(fa_weight(self.z)) == pytest.approx(0.798, abs=1e-3)
        assert (fa_weight(self.z) * torch.as_tensor(self.density)).sum().item() == pytest.approx(0.5, abs=1e-4)
        for t in (-1.0, 0.7):
            want = scipy.stats.norm.pdf(t) / scipy.stats.norm.sf(t)
            assert self.mean(fa_weight(self.z, t)) == pytest.approx(want, abs=1e-3)

    def test_sft_stays(self):
        assert self.mean(rwr_weight(self.z, math.inf)) == pytest.approx(0, abs=1e-9)

    def test_the_weighted_law_minimises_rwr(self):
        z = torch.linspace(-3, 3, 25, dtype=torch.float64)
        data = torch.as_tensor(scipy.stats.norm.pdf(z))
        theta = (data.log() + z / 5).requires_grad_()  # the law data * exp(z / 5)
        loss = weighted_nll(given(theta.log_softmax(0)), data * rwr_weight(z))
        assert torch.autograd.grad(loss, theta)[0].abs().max() < 1e-15


class TestOptima:
    """One pair for each q, its two responses all that there are, labelled 0 over 1 with probability q."""

    q = torch.tensor([0.5, 0.6, 0.9, 0.98], dtype=torch.float64)

    def fitted(self, loss):
        """The log-ratio margins at the minimum, by Rprop from a random reference."""
        torch.manual_seed(0)
        reference = torch.randn(4, 2, dtype=torch.float64).log_softmax(-1)
        theta = reference.clone().requires_grad_()
        optimiser = torch.optim.Rprop([theta], lr=0.3, step_sizes=(1e-12, 10))
        for _ in range(120):
            logp = theta.log_softmax(-1)
            sides = [given(logp[:, i], tokens=i + 1) for i in (0, 1)]
            first = loss(sides[0], sides[1], reference[:, 0], reference[:, 1])
            second = loss(sides[1], sides[0], reference[:, 1], reference[:, 0])
            optimiser.zero_grad()
            (self.q * first + (1 - self.q) * second).mean().backward()
            optimiser.step()
        ratio = theta.detach().log_softmax(-1) - reference
        return ratio[:, 0] - ratio[:, 1]

    @pytest.mark.parametrize("beta", [0.5, 2.0])
    @pytest.mark.parametrize("wrap", [lambda loss: loss, weighted], ids=["plain", "weighted"])
    def test_dpo(self, beta, wrap):
        """logit(q) / beta, whatever the reference is; weights of pairs change nothing."""
        want = torch.as_tensor(scipy.special.logit(self.q)) / beta
        torch.testing.assert_close(self.fitted(wrap(partial(dpo_loss, beta=beta))), want, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("wrap", [lambda loss: loss, weighted], ids=["plain", "weighted"])
    def test_ipo(self, wrap):
        """(2q - 1) / (2 beta)."""
        loss = partial(ipo_loss, beta=0.4, normalize=False)
        torch.testing.assert_close(self.fitted(wrap(loss)), (2 * self.q - 1) / 0.8, atol=1e-6, rtol=0)

    def test_label_smoothing_is_a_mixture_of_labels(self):
        mixed = self.q * 0.9 + (1 - self.q) * 0.1
        want = torch.as_tensor(scipy.special.logit(mixed))
        torch.testing.assert_close(
            self.fitted(partial(dpo_loss, beta=1.0, label_smoothing=0.1)), want, atol=1e-6, rtol=0
        )
