"""Bigram languages of a fixed length, whose additive quantities are known by dynamic programming; and world D1.

A language is a table of P(next token | last token) for each of X prompts, law [X, V + 1, V]; its last row is what
follows the prompt itself. A response has `length` tokens. All figures of fp64 NumPy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pyengine.errors import InputError
from pyengine.losses import Alignment, log_weight, sequence_moments
from pyengine.reference import TokenLogprob, logits_logprob

Array = NDArray[np.float64]
VOCAB, LENGTH = 64, 32  # of world D1
CONFIDENCE = (0.5, 8.0)  # its prompts' factors on the logits, evenly spread in their logarithm


def normalised(logits: Array) -> Array:
    """softmax over the last axis."""
    tilted = np.exp(logits - logits.max(-1, keepdims=True))
    return tilted / tilted.sum(-1, keepdims=True)


def confident(prompts: int = 16, seed: int = 0, vocab: int = VOCAB) -> Array:
    """World D1, the entropy language: logits c_x N(0, 1), where a prompt's confidence c_x scales all that follows it.

    The confidences reach from near-uniform next tokens (4.0 nats) to near-certain ones (.6 nats).
    """
    if prompts < 2:
        raise InputError(f"confident: prompts must be at least 2, got {prompts}")
    scale = np.geomspace(*CONFIDENCE, prompts)[:, None, None]
    return normalised(scale * np.random.default_rng(seed).standard_normal((prompts, vocab + 1, vocab)))


def moments(law: Array, table: Array, length: int) -> tuple[Array, Array]:
    """Mean and variance [X] of the sum of table[x, last, next] [X, V + 1, V] along a response."""
    first = second = np.zeros(law.shape[:2])
    for _ in range(length):
        ahead, further = first[:, None, : law.shape[2]], second[:, None, : law.shape[2]]
        second = (law * (table**2 + 2 * table * ahead + further)).sum(-1)
        first = (law * (table + ahead)).sum(-1)
    return first[:, -1], second[:, -1] - first[:, -1] ** 2


def share_above(law: Array, table: Array, length: int) -> Array:
    """P(the sum of table along a response > 0) [X], by Gil-Pelaez's inversion of its characteristic function.

    100 midpoints up to 20 / sd: in world D1 within 3e-4 of 1,600 midpoints up to 40 / sd. A sum without variance counts
    as it stands.
    """
    mean, variance = moments(law, table, length)
    out = (mean > 0).astype(float)
    steps = 0.2 * (np.arange(100) + 0.5)
    for x in np.flatnonzero(variance > 1e-18):
        omega = steps / np.sqrt(variance[x])
        turned = law[x] * np.exp(1j * omega[:, None, None] * table[x])
        phi = np.ones((len(omega), law.shape[2], 1), dtype=complex)
        for _ in range(length):
            after = turned @ phi
            phi = after[:, :-1]
        out[x] = 0.5 + (after[:, -1, 0].imag / steps).sum() * 0.2 / np.pi
    return out


def sample(law: Array, length: int, count: int, seed: int) -> NDArray[np.intp]:
    """[X, count, length]: `count` responses to each prompt."""
    rng, (prompts, rows, _) = np.random.default_rng(seed), law.shape
    total = law.cumsum(-1)
    out = np.empty((prompts, count, length), dtype=np.intp)
    last = np.full((prompts, count), rows - 1)
    for t in range(length):
        drawn = rng.random((prompts, count, 1)) >= total[np.arange(prompts)[:, None], last]
        last = out[:, :, t] = np.minimum(drawn.sum(-1), rows - 2)  # rounding may leave a total below 1
    return out


def along(table: Array, responses: NDArray[np.intp]) -> Array:
    """[X, N]: the sum of table [X, V + 1, V] along each response [X, N, T]."""
    prompts, count, _ = responses.shape
    begun = np.concatenate([np.full((prompts, count, 1), table.shape[2]), responses], -1)
    return table[np.arange(prompts)[:, None, None], begun[:, :, :-1], begun[:, :, 1:]].sum(-1)


def alignments(law: Array, alignment: Alignment) -> Array:
    """log w of each token as a response of its own [X, V + 1, V]: what `losses.log_weight` averages over a response.

    Every token of every row must be possible.
    """
    vocab = law.shape[-1]
    rows = torch.from_numpy(np.log(law)).flatten(0, 1).repeat_interleave(vocab, 0)
    tokens = logits_logprob(rows, torch.arange(vocab).repeat(len(rows) // vocab))
    alone = TokenLogprob(*(field[:, None] for field in tokens))
    weight = log_weight(sequence_moments(alone, torch.ones_like(alone.logp, dtype=torch.bool)), alignment)
    return weight.reshape(law.shape).numpy()


def spread(law: Array, table: Array, length: int) -> float:
    """Standard deviation of the mean of table along a response, over on-policy responses to all prompts alike.

    With the table of `alignments` it is that of log w(y) (WPO, Figure 2).
    """
    mean, variance = (m / length**power for power, m in enumerate(moments(law, table, length), 1))
    return float(np.sqrt(variance.mean() + mean.var()))
