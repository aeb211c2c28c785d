"""Names of transformers' that are no public interface; all that is used of them, in one place, found at import.

Read in 5.10 to 5.24, where they are the same: `_get_logits_processor` is called once by each `generate`, and once by
each manager of continuous batching, which passes a generation config alone.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerationMixin

from pyengine.errors import InputError

try:
    from transformers.generation.continuous_batching.cb_logits_processors import (
        CLASSIC_TO_CB_PROCESSORS_MAP,
        ContinuousBatchingLogitsProcessor,
    )

    _ = GenerationMixin._get_logits_processor
    asked_of = inspect.signature(ContinuousBatchingLogitsProcessor.prepare_tensor_args).parameters
except (ImportError, AttributeError) as error:
    raise InputError(
        f"transformers {transformers.__version__} has other internals than 5.10 to 5.24, for which this integration is "
        f"written ({error}); install one of these"
    ) from error

# Since 5.11 a manager asks its processors about the tokens that are drawn, before that about all that are read.
ASKS_OF_ALL_TOKENS = "requests_with_new_token" not in asked_of

Made = Callable[[GenerationConfig, list[Any], dict[str, Any]], list[Any]]
_PREPARING: WeakKeyDictionary[Any, list[Made]] = WeakKeyDictionary()  # of models; attachments end in any order
_CONVERTING: Counter[type] = Counter()


@contextmanager
def preparing(model: Any, made: Made) -> Iterator[None]:
    """Inside, `made(generation config, the caller's processors, other arguments)` gives the processors that the caller
    is taken to have passed, whenever the model prepares to generate."""
    everybody = _PREPARING.setdefault(model, [])
    if not everybody:
        theirs = model._get_logits_processor

        def prepare(
            generation_config: GenerationConfig, *, logits_processor: Any = None, **arguments: Any
        ) -> LogitsProcessorList:
            given = list(logits_processor or [])
            for each in everybody:
                given = each(generation_config, given, arguments)
            return theirs(generation_config=generation_config, logits_processor=LogitsProcessorList(given), **arguments)

        model._get_logits_processor = prepare
    everybody.append(made)
    try:
        yield
    finally:
        everybody.remove(made)
        if not everybody:
            del model._get_logits_processor


@contextmanager
def converting(processor: Any, batched: Any) -> Iterator[None]:
    """Inside, a manager of continuous batching makes its per-request version of a processor."""
    _CONVERTING[processor] += 1
    CLASSIC_TO_CB_PROCESSORS_MAP[processor] = batched
    try:
        yield
    finally:
        _CONVERTING[processor] -= 1
        if not _CONVERTING[processor]:
            del CLASSIC_TO_CB_PROCESSORS_MAP[processor]


__all__ = ["ASKS_OF_ALL_TOKENS", "ContinuousBatchingLogitsProcessor", "GenerationMixin", "converting", "preparing"]
