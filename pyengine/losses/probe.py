"""The four losses of Q-Probe (arXiv:2402.14688)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def q_loss(q: Tensor, reward: Tensor) -> Tensor:
    """L_Q: the mean of (Q - r)^2 (Q-Probe, Eq. 2). Both [N]; a scalar."""
    return (q - reward).square().mean()


def ce_loss(q: Tensor, label: Tensor) -> Tensor:
    """L_CE: binary cross-entropy with logits Q; label in [0, 1] (Q-Probe, Eq. 3, which lacks the minus sign)."""
    return binary_cross_entropy_with_logits(q, label)


def pg_loss(q: Tensor, reward: Tensor, baseline: float = 0.0, beta: float = 1.0) -> Tensor:
    """L_PG: -mean_x sum_i (r_i - b) softmax_i(Q / beta) over groups of K samples of a prompt. Both [G, K]; a scalar.

    An unbiased estimate of -(J - b), J the expected reward of the policy that draws K samples and picks one with
    softmax(Q / beta). Eq. 5 of Q-Probe is this divided by K, because pi_K / p_0 = K E[rho] for every K.
    """
    return -((reward - baseline) * torch.softmax(q / beta, -1)).sum(-1).mean()


def qp_loss(chosen: Tensor, rejected: Tensor | float) -> Tensor:
    """L_QP: the mean of -log sigmoid(Q_w - Q_l) over pairs. Both [N]; a scalar."""
    return -logsigmoid(chosen - rejected).mean()
