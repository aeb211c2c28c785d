"""Drawing a block: k branches of each live request, a token a step, without asking the device how it goes.

On a GPU (`decoder.waits`) no step waits for the host: what was drawn is read once, when the block is whole. On a CPU
reading is free, so that branches which have ended can be dropped on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyengine import ops
from pyengine.decoder import Decoder
from pyengine.ops import TiltSample
from pyengine.results import FinishReason, SamplingParams
from pyengine.scorers import Hidden, Part


class Row(NamedTuple):
    """One branch to be drawn."""

    params: SamplingParams
    seed: int
    position: int  # response tokens that are there
    room: int  # most tokens it may have; the row ends with the last of them
    context: float  # tokens until the model's context is full


@dataclass
class Tail:
    """What one block drew: N rows (request-major, then branch) of at most M tokens."""

    tokens: list[list[int]]
    logp_base: list[list[float]]
    logp_policy: list[list[float]]
    kl: list[float]  # summed over the row's tokens
    finish_reason: list[FinishReason | None]
    bad: dict[int, int] = field(default_factory=dict)  # rows whose logits were not finite, and at which step first
    slots: list[int] = field(default_factory=list)  # the row that each of the decoder's rows belongs to, at the end
    hidden: Hidden = field(default_factory=dict)  # at each row's last token
    previous: Hidden = field(default_factory=dict)  # at the token before


def propose(
    decoder: Decoder,
    rows: Sequence[Row],
    steps: int,
    eos: Collection[int],
    tilt: Sequence[tuple[float, Part]],
    tick: Callable[[], object],
) -> Tail:
    """Fork the decoder and draw up to `steps` tokens for each row; `tilt` are prefix scorers with their weights."""
    frontier, n = decoder.fork(), len(rows)
    device = frontier.logits.device
    columns: dict[str, Any] = {
        name: torch.tensor([getattr(row.params, name) for row in rows], device=device)
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    columns["seed"] = torch.tensor([row.seed for row in rows]).to(device)
    columns["position"] = torch.tensor([row.position for row in rows], device=device)
    weights = torch.tensor([weight for weight, _ in tilt], device=device) if tilt else None
    ends, room = (
        torch.tensor(sorted(eos), dtype=torch.long, device=device),
        torch.tensor([row.room for row in rows], device=device),
    )

    slots = torch.arange(n, device=device)  # the row that each of the decoder's rows belongs to
    alive = torch.ones(n, dtype=torch.bool, device=device)
    drawn: list[tuple[Tensor, TiltSample]] = []
    hidden: Hidden = {}
    previous: Hidden = {}
    for step in range(steps):
        tick()
        before = frontier.hidden
        values = torch.stack([part.scorer.values(before) for _, part in tilt]) if tilt else None
        drawn.append((slots, ops.tilt_sample(frontier.logits, values, weights, **columns)))
        token = drawn[-1][1].token
        going = alive & ~torch.isin(token, ends) & (step + 1 < room[slots])
        over = not decoder.waits and not going.any()
        if over and not before:
            break  # nobody reads the hidden state of the last tokens
        frontier = decoder.append(token)
        previous, hidden = (
            _kept(old, new, slots, alive) for old, new in ((previous, before), (hidden, frontier.hidden))
        )
        alive = going
        if over:
            break
        columns["position"] = columns["position"] + 1
        if decoder.waits or step + 1 == steps:  # the block's commit drops what has ended
            continue
        # Ended branches are never read again: they go once they are half of the rows, or before the model would be
        # asked for a position beyond its context.
        full = any(not a and step + 1 >= rows[i].context for a, i in zip(alive.tolist(), slots.tolist(), strict=True))
        if full or 2 * int(alive.sum()) <= len(slots):
            index = alive.nonzero()[:, 0]
            frontier = decoder.keep(index)
            columns = {name: column[index] for name, column in columns.items()}
            slots, alive = slots[index], alive[index]
    tail = _read(drawn, rows, eos)
    tail.slots, tail.hidden, tail.previous = slots.tolist(), hidden, previous
    return tail


def _kept(old: Hidden, new: Hidden, slots: Tensor, alive: Tensor) -> Hidden:
    """`old` [N, D] with the states `new` of rows that are alive in their slots."""
    if not old:
        return dict(new)
    out = {}
    for layer, states in new.items():
        chosen = torch.where(alive[:, None], states, old[layer][slots])
        out[layer] = chosen if len(slots) == len(old[layer]) else old[layer].index_copy(0, slots, chosen)
    return out


def _read(drawn: list[tuple[Tensor, TiltSample]], rows: Sequence[Row], eos: Collection[int]) -> Tail:
    """The tokens of each row up to its end."""
    n = len(rows)
    tail = Tail([[] for _ in rows], [[] for _ in rows], [[] for _ in rows], [0.0] * n, [None] * n)
    slots = [slot.tolist() for slot, _ in drawn]
    if len(slots[-1]) < n:
        fields = [[x.tolist() for x in sample] for _, sample in drawn]
    else:  # nothing was dropped: one transfer for each field
        whole = [torch.stack(found).tolist() for found in zip(*(sample for _, sample in drawn), strict=True)]
        fields = [list(found) for found in zip(*whole, strict=True)]
    for step, (here, (tokens, base, policy, kl, valid)) in enumerate(zip(slots, fields, strict=True)):
        for c, i in enumerate(here):
            if tail.finish_reason[i] is not None:
                continue
            if not valid[c]:
                tail.bad.setdefault(i, step)
            tail.tokens[i].append(tokens[c])
            tail.logp_base[i].append(base[c])
            tail.logp_policy[i].append(policy[c])
            tail.kl[i] += kl[c]
            if tokens[c] in eos:
                tail.finish_reason[i] = "stop"
            elif step + 1 >= rows[i].room:
                tail.finish_reason[i] = "length"
    return tail
