"""Tokenwise, blockwise and best-of-K inside transformers' own `generate` and continuous batching."""

from pyengine.integrations.transformers.custom import best_of_k, blockwise
from pyengine.integrations.transformers.processor import TiltLogitsProcessor

__all__ = ["TiltLogitsProcessor", "best_of_k", "blockwise"]
