"""What the scorers that tilt say of every next token."""

from __future__ import annotations

import torch
from torch import Tensor

from pyengine import costs
from pyengine.ops.linear import steady as held_steady
from pyengine.scorers import Hidden, PrefixModel, PrefixScorer, Scorer
from pyengine.timing import Cost, timed


def token_values(scorer: Scorer, hidden: Hidden, vocab: int, steady: bool = False) -> Tensor:
    """V(y^t, z) of every next token z of a base policy with `vocab` of them, fp32 [N, vocab].

    hidden: {layer: [N, D]} at each row's last token. What pads a vocabulary in one model and not in the other has the
    mean. steady: a row's bits depend on nothing beside it.
    """
    with timed(f"values {scorer.name}", lambda: _cost(scorer, hidden, vocab)):
        values = (_steady_values(scorer, hidden) if steady else scorer.values(hidden))[:, :vocab]
    if values.shape[1] == vocab:
        return values
    return torch.cat([values, values.mean(1, keepdim=True).expand(-1, vocab - values.shape[1])], 1)


def _cost(scorer: Scorer, hidden: Hidden, vocab: int) -> Cost:
    head = scorer.head if isinstance(scorer, PrefixModel) else scorer
    weights = sum(p.numel() for p in head.parameters()) if isinstance(head, torch.nn.Module) else 0
    return costs.head_values(weights, len(next(iter(hidden.values()))), vocab)


def _steady_values(scorer: Scorer, hidden: Hidden) -> Tensor:
    # The layers of a scorer that consists of one head can be held steady.
    head = scorer.head if type(scorer) is PrefixModel else scorer
    heads = [head] if type(head) is PrefixScorer else []
    with held_steady(*heads):
        if heads:
            return scorer.values(hidden)
        # Whatever it does, a row at a time.
        rows = [{layer: h[i : i + 1] for layer, h in hidden.items()} for i in range(len(next(iter(hidden.values()))))]
        return torch.cat([scorer.values(row) for row in rows])
