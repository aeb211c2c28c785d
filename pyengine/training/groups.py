"""Samples of one prompt, in groups among which a probe learns to choose (Q-Probe's policy gradient)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine.errors import InputError


def group_size(prompt: Tensor, size: int | None) -> int:
    """K, the samples of a prompt that make one group: `size`, or None for all of them, as many for each prompt.

    Raises InputError that names the first prompt whose samples do not make whole groups.
    """
    known, count = prompt.unique(return_counts=True)
    wanted = int(count.mode().values) if size is None else size
    odd = ((count != wanted) if size is None else (count % wanted != 0)).nonzero()[:, 0]
    if len(odd):
        number, found = int(known[odd[0]]), int(count[odd[0]])
        others = f"{wanted} like the others" if size is None else f"a multiple of {wanted}"
        raise InputError(f"prompt {number} has {found} samples, loss 'pg' needs {others}; draw more or leave some out")
    return wanted


def groups(prompt: Tensor, size: int, order: torch.Generator | None) -> Tensor:
    """Rows [G, K] so that all of a group have one prompt; with `order` they are drawn anew, else as they stand."""
    place = prompt.unique(return_inverse=True)[1]
    if order is None:
        return place.argsort(stable=True).view(-1, size)
    shuffled = place + torch.rand(len(place), generator=order, dtype=torch.float64)
    rows = shuffled.argsort().view(-1, size)
    return rows[torch.randperm(len(rows), generator=order)]
