"""Names of transformers' that are no public interface; all that is used of them, in one place, found at import.

Read in 5.10 to 5.24, where they are the same: `_get_logits_processor` is called once by each `generate`, and once by
each manager of continuous batching, which passes a generation config alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def preparing(model: Any, made: Made) -> Iterator[None]:
    """Inside, `made(generation config, the caller's processors, other arguments)` gives the processors that the caller
    is taken to have passed, whenever the model prepares to generate."""
    theirs = model._get_logits_processor

    def prepare(
        generation_config: GenerationConfig, *args: Any, logits_processor: Any = None, **arguments: Any
    ) -> LogitsProcessorList:
        if args:  # as no version does
            raise InputError("transformers passes arguments by position that it passed by name: another version")
        ours = LogitsProcessorList(made(generation_config, list(logits_processor or []), arguments))
        return theirs(generation_config=generation_config, logits_processor=ours, **arguments)

    had = "_get_logits_processor" in vars(model)
    model._get_logits_processor = prepare
    try:
        yield
    finally:
        if had:
            model._get_logits_processor = theirs
        else:
            del model._get_logits_processor


@contextmanager
def converting(processor: Any, batched: Any) -> Iterator[None]:
    """Inside, a manager of continuous batching makes its per-request version of a processor."""
    before = CLASSIC_TO_CB_PROCESSORS_MAP.get(processor)
    CLASSIC_TO_CB_PROCESSORS_MAP[processor] = batched
    try:
        yield
    finally:
        if before is None:
            del CLASSIC_TO_CB_PROCESSORS_MAP[processor]
        else:
            CLASSIC_TO_CB_PROCESSORS_MAP[processor] = before


__all__ = ["ASKS_OF_ALL_TOKENS", "ContinuousBatchingLogitsProcessor", "converting", "preparing"]
