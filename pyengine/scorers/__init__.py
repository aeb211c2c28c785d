"""Scorers: prefix scorer, probe, reward model, Python callable, and weighted lists of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyengine.errors import InputError, first_line, real
from pyengine.scorers.base import (
    Candidates,
    FunctionScorer,
    Hidden,
    Part,
    Policy,
    Scorer,
    ScorerLike,
    Sum,
    Transform,
    Transformed,
)
from pyengine.scorers.heads import FORMAT, PrefixScorer, Probe, load_head
from pyengine.scorers.prefix_model import KIND, PrefixModel
from pyengine.scorers.reward_model import RewardModel

__all__ = [
    "Candidates",
    "FunctionScorer",
    "Hidden",
    "Part",
    "Policy",
    "PrefixModel",
    "PrefixScorer",
    "Probe",
    "RewardModel",
    "Scorer",
    "ScorerLike",
    "Sum",
    "Transform",
    "Transformed",
    "load_scorer",
    "parts_of",
    "score_texts",
]


def load_scorer(path: str | Path, trust_remote_code: bool = False) -> Scorer:
    """The scorer in a directory: a prefix scorer or probe of this library, else a reward model."""
    directory = Path(path)
    config_file = directory / "config.json"
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"scorer {path}: config.json is not JSON: {first_line(error)}") from error
        if not isinstance(config, dict):
            raise InputError(f"scorer {path}: config.json must be an object, got {config!r:.40}")
        if config.get(FORMAT) == KIND:
            return PrefixModel.from_pretrained(directory, trust_remote_code)
        if FORMAT in config:
            return load_head(directory, config)
    elif (directory / "adapter_config.json").is_file():
        pass  # on a reward model
    elif directory.is_dir() or directory.is_absolute() or str(path).startswith("."):
        raise InputError(f"scorer {path}: no such directory with a config.json")
    return RewardModel.from_pretrained(path, trust_remote_code)


def parts_of(scorer: ScorerLike | None) -> list[Part]:
    """Any scorer as its weighted parts, in order; nested lists multiply their weights.

    A transformed scorer becomes its raw scorer and the transforms, so that one pass serves all that share the scorer.
    """
    parts: list[Part] = []
    for weight, part in _flatten(scorer, 1.0):
        if not math.isfinite(weight):
            raise InputError(f"scorer {part.name!r}: its weight must be a finite number, got {weight}")
        taken = {p.name for p in parts}
        names = (part.name, *(f"{part.name}-{i}" for i in range(2, len(parts) + 3)))
        name = next(name for name in names if name not in taken)
        if isinstance(part, Transformed):
            parts.append(Part(weight, name, part.scorer, part.transforms))
        else:
            parts.append(Part(weight, name, part))
    return parts


@torch.inference_mode()
def score_texts(parts: Sequence[Part], candidates: Candidates) -> Tensor:
    """The weighted sum of the parts, fp64 [N] on the CPU, for candidates without hidden states.

    Raises InputError, naming the scorer, for one that reads hidden states or tokens.
    """
    total = torch.zeros(len(candidates.tokens), dtype=torch.float64)
    for part in parts:
        if part.scorer.layers or part.scorer.scores_tokens:
            raise InputError(
                f"scorer {part.name!r} reads hidden states or tokens, which are not there where responses are given as "
                "text: use a reward model or a function"
            )
        total += part.weight * part.utilities(part.scorer.score(candidates), candidates.prompts).cpu()
    return total


def _flatten(scorer: Any, weight: float) -> list[tuple[float, Scorer]]:
    if scorer is None:
        return []
    if isinstance(scorer, Scorer):
        return [(weight, scorer)]
    if isinstance(scorer, (str, os.PathLike)):
        return [(weight, load_scorer(Path(scorer)))]
    if callable(scorer):
        return [(weight, FunctionScorer(scorer))]
    if isinstance(scorer, Sequence):
        parts = []
        for item in scorer:
            if not (isinstance(item, (tuple, list)) and len(item) == 2):
                raise InputError(f"a list of scorers holds (weight, scorer) pairs, got {item!r}")
            name = getattr(item[1], "name", None) or getattr(item[1], "__name__", str(item[1]))
            parts += _flatten(item[1], weight * real(item[0], f"scorer {name!r}: its weight"))
        return parts
    raise InputError(f"not a scorer: {scorer!r}; give a Scorer, a directory, a callable or (weight, scorer) pairs")
