"""The executable specification against things known from outside it."""

from __future__ import annotations

import math

import pytest
import torch

from pyengine import ops, reference


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10: a zero and an all-ones counter and key."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = ((0x6627E8D5, 0xE169C58D), (0xBC57AC4C, 0x9B00DBD8))
    found = reference.uniforms(zero, zero, stream=0)
    for uniform, (high, low) in zip(found, words, strict=True):
        assert uniform.item() == (high << 21 | low >> 11) * 2.0**-53


def test_uniforms_are_uniform_and_differ_between_streams():
    position = torch.arange(100_000)
    u, v = reference.uniforms(torch.zeros_like(position), position, stream=0)
    w, _ = reference.uniforms(torch.zeros_like(position), position, stream=1)
    for x in (u, v, w):
        assert 0 <= x.min() < x.max() < 1
        assert abs(x.mean() - 0.5) < 4.5 * (1 / 12 / len(x)) ** 0.5
    correlation = torch.corrcoef(torch.stack([u, v, w]))
    assert (correlation - torch.eye(3)).abs().max() < 4.5 / len(u) ** 0.5


def test_optimum_of_controlled_decoding():
    """Thm 2.1: at the optimum D = λ E V - log Z, so J* = λ E V - D - λ V(s) = log Z - λ V(s)."""
    torch.manual_seed(0)
    logits, values, weight = torch.randn(1, 30, dtype=torch.float64), torch.randn(1, 30, dtype=torch.float64), 2.5
    base = logits.softmax(-1)
    log_z = (base * (weight * values).exp()).sum().log()
    policy = base * (weight * values).exp() / log_z.exp()
    out = ops.tilt_sample(logits.float(), values[None].float(), weight)
    torch.testing.assert_close(out.kl.double().squeeze(), weight * (policy * values).sum() - log_z, atol=1e-5, rtol=0)
    state_value = (base * values).sum()
    attained = weight * ((policy * values).sum() - state_value) - out.kl.item()
    torch.testing.assert_close(attained, log_z - weight * state_value, atol=1e-5, rtol=0)
    rivals = (torch.randn(1000, 30, dtype=torch.float64) * 3).softmax(-1)
    objective = weight * ((rivals * values).sum(-1) - state_value) - (rivals * (rivals / base).log()).sum(-1)
    assert objective.max() < attained


def test_values_shifted_by_a_constant_change_nothing():
    torch.manual_seed(1)
    logits, values = torch.randn(8, 200), torch.randn(1, 8, 200)
    seed = torch.arange(8)
    a, b = ops.tilt_sample(logits, values, 1.5, seed=seed), ops.tilt_sample(logits, values + 7, 1.5, seed=seed)
    assert torch.equal(a.token, b.token)
    torch.testing.assert_close(a.kl, b.kl, atol=1e-5, rtol=0)


def test_two_heads_are_their_weighted_sum():
    """V* is linear in the reward, so several rewards need one tilt (§1.3)."""
    torch.manual_seed(2)
    logits, values = torch.randn(8, 200), torch.randn(2, 8, 200)
    together = ops.tilt_sample(logits, values, torch.tensor([0.7, -0.3]), seed=1)
    summed = ops.tilt_sample(logits, (0.7 * values[0] - 0.3 * values[1])[None], 1.0, seed=1)
    assert torch.equal(together.token, summed.token)
    torch.testing.assert_close(together.kl, summed.kl, atol=1e-5, rtol=0)


def test_gumbel_noise_is_gumbel_down_to_rare_tokens():
    """Mean and variance, and the frequency of noise that exceeds 12 (6 in a million)."""
    noise = reference.gumbel(torch.arange(40), torch.arange(40) * 3, 50_001)
    assert noise.shape == (40, 50_001)
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5e-3)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=1e-2)
    expected = noise.numel() * -math.expm1(-math.exp(-12))
    assert abs((noise > 12).sum().item() - expected) < 4.5 * math.sqrt(expected)
    longer = reference.gumbel(torch.arange(40), torch.arange(40) * 3, 50_007)
    assert torch.equal(longer[:, :50_001], noise)  # a token's noise does not depend on the vocabulary


@pytest.mark.parametrize(("bias", "temperature", "softcap"), [(False, 1.0, None), (True, 0.7, 3.0)])
def test_linear_logprob_reference(bias, temperature, softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    offset = torch.randn(9, dtype=torch.float64) if bias else None
    target = torch.tensor([0, 8, -100, 3, 3])
    out = reference.linear_logprob(hidden, weight, target, bias=offset, temperature=temperature, softcap=softcap)
    z = hidden @ weight.T + (0 if offset is None else offset)
    x = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
    p = x.softmax(-1)
    kept = target >= 0
    torch.testing.assert_close(out.logp[kept], p[kept].gather(1, target[kept][:, None])[:, 0].log())
    torch.testing.assert_close(out.lse2[kept] - 2 * out.lse[kept], (p**2).sum(-1).log()[kept])
    torch.testing.assert_close(out.entropy[kept], -(p * p.log()).sum(-1)[kept])
    torch.testing.assert_close(out.max_logit[kept], x.amax(-1)[kept])
    assert all(field[2] == 0 for field in out)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()] + ([offset.requires_grad_()] if bias else [])

    def outputs(h, w, b=None):
        found = reference.linear_logprob(h, w, target, bias=b, temperature=temperature, softcap=softcap)
        assert not any(field.requires_grad for field in (found.lse, found.lse2, found.max_logit))
        return found.logp, found.entropy

    assert torch.autograd.gradcheck(outputs, inputs)
