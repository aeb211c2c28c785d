"""KL accounting: what a strategy may cost, in nats from the base policy."""

from __future__ import annotations

import math
from typing import Literal

from pyengine.errors import InputError


def best_of_k_bound(k: int) -> float:
    """b(K) = log K - (K - 1) / K, an upper bound on KL(best-of-K || base), in nats.

    It holds for softmax selection too, at any beta: the selected candidate's density ratio increases with
    utility and is majorised by the maximum's, K u^(K-1), and sum g log g is Schur-convex.
    Source: Controlled Decoding §1.4 of the specification; b(1) = 0, b(8) = 1.2044.
    """
    if k < 1:
        raise InputError(f"best_of_k_bound: k must be at least 1, got {k}")
    return math.log(k) - (k - 1) / k


def blockwise_bound(k: int, length: int, block_tokens: int, blocks: Literal["ceil", "paper"] = "ceil") -> float:
    """An upper bound on the KL of blockwise best-of-K over a response of `length` tokens, in nats.

    blocks="ceil": b(K) * ceil(length / block_tokens), one b(K) for each block that was selected.
    blocks="paper": b(K) * length / block_tokens as printed in Controlled Decoding; false when the block
    does not divide the length (two one-token responses, K = 2, M = 4: KL .1308, printed .0483).
    """
    if length < 0 or block_tokens < 1:
        raise InputError(f"blockwise_bound: need length >= 0 and block_tokens >= 1, got {length}, {block_tokens}")
    count = -(-length // block_tokens) if blocks == "ceil" else length / block_tokens
    return best_of_k_bound(k) * count
