"""Sums over the tokens of a response, and the checks that all losses of them share."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyengine import reference
from pyengine.errors import InputError, real
from pyengine.reference import SequenceMoments, TokenLogprob

Reduction = Literal["sum", "token_mean"]


def sequence_moments(tokens: TokenLogprob, kept: Tensor) -> SequenceMoments:
    """Sums over the tokens of each response.

    Args:
        tokens: what `ops.linear_logprob` or `ops.logits_logprob` returned, every field [..., T].
        kept: bool [..., T], True on response tokens, the EOS included, False on prompt and padding. Fields there may
            hold anything, NaN too.

    Returns:
        SequenceMoments of shape [...]: only `.logp` carries a gradient.
    """
    if kept.dtype != torch.bool or kept.shape != tokens.logp.shape:
        shape = list(tokens.logp.shape)
        raise InputError(f"sequence_moments: kept must be bool {shape}, got {kept.dtype} {list(kept.shape)}")
    return reference.sequence_moments(TokenLogprob(*map(wide, tokens)), kept)


def check_labels(moments: SequenceMoments, name: str = "response") -> None:
    """InputError, naming the first, for responses with a token that the policy forbids. Waits for the device."""
    forbidden = (moments.logp == -math.inf).flatten().nonzero().flatten().tolist()
    if forbidden:
        raise InputError(
            f"{name} {forbidden[0]} holds a token with log-probability -inf ({len(forbidden)} of "
            f"{moments.logp.numel()} do): its logit is masked, so it is no label to train on"
        )


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def mean_logp(moments: SequenceMoments) -> Tensor:
    return wide(moments.logp) / moments.tokens.clamp(min=1)


def check_sides(loss: str, chosen: SequenceMoments, rejected: SequenceMoments) -> None:
    if chosen.logp.shape != rejected.logp.shape:
        sizes = f"{list(chosen.logp.shape)} chosen and {list(rejected.logp.shape)} rejected"
        raise InputError(f"{loss}: a pair has one response of each side, got {sizes}")


def check_desirable(name: str, desirable: Tensor, moments: SequenceMoments) -> None:
    if desirable.dtype != torch.bool or desirable.shape != moments.logp.shape:
        found = f"{desirable.dtype} {list(desirable.shape)}"
        raise InputError(f"{name}: desirable must be bool {list(moments.logp.shape)}, got {found}")


def one_of(value: Any, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def positive(value: Any, name: str) -> float:
    number = real(value, name)
    if number <= 0:
        raise InputError(f"{name} must be above 0, got {value!r}")
    return number
