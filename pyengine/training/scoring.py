"""Scores of responses that are given, by every kind of scorer: of text, of token ids, of a model's hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyengine.engine import Engine
from pyengine.errors import InputError
from pyengine.jsonl import raise_all
from pyengine.scorers import Candidates, Part, PrefixModel
from pyengine.scorers.base import as_given
from pyengine.training.data import Encoded, Example, encode_all
from pyengine.training.values import Batch, collate, read_prefixes

TOGETHER = 32  # responses whose hidden states exist at once


class Scored(NamedTuple):
    """The weighted sum of a response's scores at its end, and at each of its tokens, the end the last of them; `values`
    is None where a part scores whole responses only."""

    reward: float
    values: list[float] | None


def reads_text(part: Part) -> bool:
    """Whether a part needs no language model's hidden states or tokens."""
    return not (part.scorer.layers or part.scorer.reads_ids)


def check_text(parts: Sequence[Part]) -> None:
    """InputError for a part that needs a model."""
    for part in parts:
        if not reads_text(part):
            raise InputError(f"scorer {part.name!r} reads hidden states or tokens of a language model: give the model")


@torch.inference_mode()
def score_examples(engine: Engine | None, parts: Sequence[Part], examples: Sequence[Example]) -> list[Scored]:
    """The score of each response; a prefix scorer, a prefix model and a probe also give it at every prefix.

    engine: whose tokens and hidden states they are; None where no part reads any. A response that ended is scored at
    its EOS, as the engine does, one that was cut off at its last token. Raises InputError for a part that needs an
    engine or does not fit it, for responses that it cannot read, and as the scorers do.
    """
    if engine is None:
        check_text(parts)
    items = [] if engine is None else encode_all(engine, examples)
    prompts = [e.prompt for e in examples]
    ends = torch.zeros(len(examples), dtype=torch.float64)
    along: list[Tensor] | None = [torch.zeros(len(i.ids) - i.start, dtype=torch.float64) for i in items] or None
    for part in parts:
        if engine is not None:
            part.scorer.check(engine.policy)
        found = None if engine is None else _along(engine, part, items)
        if found is None:
            along = None
            texts = as_given([e.response for e in examples])
            tokens = [i.ids[i.start :] for i in items] or [[]] * len(examples)
            candidates = Candidates(prompts, tokens, {}, {}, texts, [i.ids[: i.start] for i in items])
            ends += part.weight * part.utilities(part.scorer.score(candidates), prompts).double().cpu()
        else:
            ends += part.weight * torch.stack([values[-1] for values in found])
            along = along and [total + part.weight * values for total, values in zip(along, found, strict=True)]
    values = [None] * len(examples) if along is None else [each.tolist() for each in along]
    return [Scored(*both) for both in zip(ends.tolist(), values, strict=True)]


def rewarded(engine: Engine, parts: Sequence[Part], examples: Sequence[Example]) -> list[Example]:
    """The examples with the rewards that `score_examples` gives them; InputError names one that is not finite."""
    found = [
        replace(e, reward=s.reward) for e, s in zip(examples, score_examples(engine, parts, examples), strict=True)
    ]
    faults = [f"{e.where}: its score is {e.reward}, it must be finite" for e in found if not math.isfinite(e.reward)]
    raise_all(faults, len(found), "responses")
    return found


def _along(engine: Engine, part: Part, items: Sequence[Encoded]) -> list[Tensor] | None:
    """The part's utilities at each token of each response, fp64 on the CPU; None if it scores whole responses only."""
    if not part.scorer.layers and not isinstance(part.scorer, PrefixModel):
        return None
    found: list[Tensor] = []
    for start in range(0, len(items), TOGETHER):
        some = items[start : start + TOGETHER]
        lengths = [len(item.ids) - item.start for item in some]
        asked = [item.prompt for item, length in zip(some, lengths, strict=True) for _ in range(length)]
        found += part.utilities(_read_along(engine, part, some), asked).double().cpu().split(lengths)
    return found


def _read_along(engine: Engine, part: Part, items: Sequence[Encoded]) -> Tensor:
    """Raw scores at each token, [tokens of all], response by response."""
    scorer = part.scorer
    if isinstance(scorer, PrefixModel):  # it would read each prefix anew
        return torch.cat([_of_prefix_model(scorer, item) for item in items])
    batch = Batch(**{name: value.to(engine.model.device) for name, value in collate(items).items()})
    read = {layer: read_prefixes(engine.model, batch, layer) for layer in scorer.layers}
    ends = [(item, end) for item in items for end in range(item.start + 1, len(item.ids) + 1)]
    heads = [item.ids[: item.start] for item, _ in ends]
    return scorer.score(
        Candidates(
            prompts=[item.prompt for item, _ in ends],
            tokens=[item.ids[item.start : end] for item, end in ends],
            hidden={layer: p.after for layer, p in read.items()},
            previous={layer: p.before for layer, p in read.items()},
            decode=lambda tokens, skip_special_tokens=True: [
                engine.codec.between(head, ids, skip_special_tokens) for head, ids in zip(heads, tokens, strict=True)
            ],
            prompt_ids=heads,
        )
    )


def _of_prefix_model(scorer: PrefixModel, item: Encoded) -> Tensor:
    """Q of each token of a response, from one pass over it."""
    if len(item.ids) - 1 > scorer.longest:
        raise InputError(f"scorer {scorer.name!r} reads {scorer.longest} tokens, a response has {len(item.ids) - 1}")
    before = scorer.states(item.ids[:-1])[item.start - 1 :]
    return scorer.head.values_at(before, torch.tensor(item.ids[item.start :], device=before.device)).float()
