"""How a model is read: in evaluation mode, every module having its own again afterwards, and one state for a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pyengine.errors import InputError


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Inside, no module of these models trains (no dropout); afterwards those do that did before."""
    training = [module for model in models for module in model.modules() if module.training]
    # Given back once more where an interrupt cuts the first time short.
    try:
        try:
            for module in training:
                module.training = False
            yield
        finally:
            _train(training)
    except BaseException:
        _train(training)
        raise


def _train(modules: list[Any]) -> None:
    for module in modules:
        module.training = True


def states_of(model: Any, output: Any, layer: int) -> Tensor:
    """The hidden states [B, T, D] of a layer in what `model` put out; InputError where a token has several."""
    states: Tensor = output.hidden_states[layer]
    if states.dim() != 3:  # Gemma 3n keeps four
        raise InputError(f"{model.config.model_type}: a token has several hidden states; no scorer reads those")
    return states
