"""pyengine makes a frozen language model follow a reward while it decodes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.errors import InputError, RequestError

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.evaluation.rejection import rejection_sample
    from pyengine.results import Block, Candidate, Event, Result, SamplingParams
    from pyengine.rewards import centred, log_sigmoid, lsc, normalised
    from pyengine.rewards.conditioning import Conditioning
    from pyengine.rewards.references import LearnedReference, References, Statistics
    from pyengine.scorers import FunctionScorer, PrefixModel, PrefixScorer, Probe, RewardModel, Scorer, load_scorer
    from pyengine.scorers.embedding_probe import EmbeddingProbe
    from pyengine.strategies import BestOfK, Blockwise, Tokenwise

__version__ = "0.1.0"

# Loaded on first use: importing transformers takes seconds that `pyengine --help` need not spend.
_HOME = {
    "Conditioning": "rewards.conditioning",
    "Engine": "engine",
    "LearnedReference": "rewards.references",
    "References": "rewards.references",
    "Statistics": "rewards.references",
    "Block": "results",
    "Candidate": "results",
    "Event": "results",
    "Result": "results",
    "SamplingParams": "results",
    "centred": "rewards",
    "rejection_sample": "evaluation.rejection",
    "log_sigmoid": "rewards",
    "lsc": "rewards",
    "normalised": "rewards",
    "EmbeddingProbe": "scorers.embedding_probe",
    "FunctionScorer": "scorers",
    "PrefixModel": "scorers",
    "PrefixScorer": "scorers",
    "Probe": "scorers",
    "RewardModel": "scorers",
    "Scorer": "scorers",
    "load_scorer": "scorers",
    "BestOfK": "strategies",
    "Blockwise": "strategies",
    "Tokenwise": "strategies",
}

__all__ = [
    "BestOfK",
    "Block",
    "Blockwise",
    "Candidate",
    "Conditioning",
    "EmbeddingProbe",
    "Engine",
    "Event",
    "FunctionScorer",
    "InputError",
    "LearnedReference",
    "PrefixModel",
    "PrefixScorer",
    "Probe",
    "References",
    "RequestError",
    "Result",
    "RewardModel",
    "SamplingParams",
    "Scorer",
    "Statistics",
    "Tokenwise",
    "centred",
    "embedded",
    "load_scorer",
    "log_sigmoid",
    "lsc",
    "normalised",
    "rejection_sample",
]


def embedded(name: str) -> Path:
    """The directory of an embedded model: "policy", "prefix", "probe" or "reward-model".

    The policy writes short restaurant and product reviews; the others score their sentiment.
    """
    path = Path(__file__).parent / "embedded" / name
    if not (path / "config.json").is_file():
        raise InputError(f"no embedded model {name!r}; there are policy, prefix, probe and reward-model")
    return path


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"pyengine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")
