"""What reading of examples asks of a model that nothing is decoded with: its tokens, without an engine around it."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyengine.checkpoint import context_of, ends_of
from pyengine.codec import Codec
from pyengine.engine import Engine


class Named(NamedTuple):
    """A model's name in messages and the size of its vocabulary."""

    name: str
    vocab_size: int


class Texts:
    """A tokenizer and its model's limits, in the place of an `Engine` for `encode` and `read_examples`.

    eos: ids that end a response. context: tokens that the model reads, None for any number. name: of the model.
    """

    encode = Engine.encode
    context = Engine.context

    def __init__(
        self, tokenizer: Any, eos: frozenset[int], context: int | None = None, name: str = "the model"
    ) -> None:
        self.tokenizer, self.eos = tokenizer, eos
        self.policy = Named(name, len(tokenizer))
        self.codec = Codec(tokenizer, name, len(tokenizer), context)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, name: str) -> Texts:
        """As an engine of this model of transformers would have them."""
        return cls(tokenizer, ends_of(model), context_of(model.config), f"model {name!r}")
