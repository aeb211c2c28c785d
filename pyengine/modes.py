"""Evaluation mode for as long as a model is read, and every module's own mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
