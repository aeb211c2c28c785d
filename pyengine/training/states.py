"""A frozen model's hidden states of all responses, read once and kept: an epoch then costs what the scorer does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from pyengine.cache import bytes_of
from pyengine.training.data import Encoded
from pyengine.training.values import Batch, Prefixes, collate, looks_ahead, read_prefixes

TOGETHER = 32  # responses that are read in one call
log = logging.getLogger("pyengine")


class Read(NamedTuple):
    """A response of n tokens and what the model says of it, on the CPU. hidden: [n + 1, D], the state before its first
    token and at each; logits: [V] after the last of one that was cut off, else []."""

    item: Encoded
    hidden: Tensor
    logits: Tensor


def read_once(model: Any, items: Sequence[Encoded], layer: int, rank: int = 0, world: int = 1) -> list[Read] | None:
    """Each item as CD-FUDGE reads it; None, with a line that says so, where they are more than a quarter of the free
    memory: they are read anew in each step then.

    Batches are cut by length, whatever the steps take, so that the bits are the same in a run that was resumed. rank,
    world: of several processes, each of which reads its share and gives it to the others.
    """
    tokens, cut = sum(len(i.ids) - i.start + 1 for i in items), sum(not i.ended for i in items)
    config = model.config.get_text_config(decoder=True)
    size = model.dtype.itemsize * (tokens * config.hidden_size + cut * config.vocab_size)
    free = bytes_of(None, torch.device("cpu")) / world  # every process of this host keeps all of them
    fits = [size <= free]
    if not all(gather_object(fits) if world > 1 else fits):  # all of them wait for each other below, or none does
        log.warning(
            "the hidden states of %d responses take %.3g GB, %.3g GB are free for them: each step reads its own again",
            *(len(items), size / 1e9, free / 1e9),
        )
        return None
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    parts = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]
    found: list[tuple[int, Read]] = []
    for part in tqdm(parts[rank::world], desc="hidden states", unit="batch", delay=2, disable=None, leave=False):
        batch = Batch(**{k: v.to(model.device) for k, v in collate([items[i] for i in part]).items()})
        p = read_prefixes(model, batch, layer, "fudge")
        sizes = batch.length.tolist()
        logits = iter(p.logits.cpu())
        for i, before, after in zip(part, p.before.cpu().split(sizes), p.after.cpu().split(sizes), strict=True):
            ahead = torch.empty(0) if items[i].ended else next(logits).clone()
            found.append((i, Read(items[i], torch.cat([before, after[-1:]]), ahead)))
    if world > 1:
        found = gather_object(found)
    return [read for _, read in sorted(found, key=lambda pair: pair[0])]


def collate_read(reads: Sequence[Read]) -> dict[str, Tensor]:
    """Prefixes as the dict that transformers' Trainer moves about, and the reward and length of their B responses."""
    items = [read.item for read in reads]
    sizes = torch.tensor([len(item.ids) - item.start for item in items])
    response = torch.arange(len(items)).repeat_interleave(sizes)
    last = torch.zeros(len(response), dtype=torch.bool)
    last[sizes.cumsum(0) - 1] = True
    cut = [read.logits for read in reads if not read.item.ended]
    p = Prefixes(
        before=torch.cat([read.hidden[:-1] for read in reads]),
        token=torch.tensor([token for item in items for token in item.ids[item.start :]]),
        after=torch.cat([read.hidden[1:] for read in reads]),
        last=last,
        response=response,
        ahead=looks_ahead("fudge", last, torch.tensor([item.ended for item in items])[response]),
        logits=torch.stack(cut) if cut else torch.empty(0, 0),
    )
    reward = torch.tensor([item.reward for item in items], dtype=torch.float32)
    return {"reward": reward, "length": sizes, **p._asdict()}
