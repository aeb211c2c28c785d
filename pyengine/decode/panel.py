"""The scorers that requests follow, and the readers of those that are models with a cache of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from pyengine.reader import Reader, reader_of
from pyengine.scorers import Part, Policy, Scorer


def name_of(model: Any) -> str:
    """What a model of transformers' is called: the last part of where it came from."""
    return Path(model.config.name_or_path or type(model).__name__).name


def policy_of(model: Any, tokenizer: Any) -> Policy:
    """What scorers may ask about a base policy, of a causal language model of transformers'."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    return Policy(
        name=f"model {name_of(model)!r}",
        vocab_size=(head if head is not None else embedding).weight.shape[0],
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers + 1,
        device=model.device,
        tokenizer=tokenizer,
    )


class Panel:
    """One reader for each scorer, alive as long as somebody follows it: a request's plan, or the engine by default."""

    def __init__(self, policy: Policy, max_rows: int, budget: float | None, frozen: bool, steady: bool) -> None:
        self._policy = policy
        self._readers_get = (max_rows, budget, frozen, steady)
        self._readers: WeakValueDictionary[Scorer, Reader] = WeakValueDictionary()
        self._without: WeakSet[Scorer] = WeakSet()  # read as text: a trial takes a cache and several passes

    def check(self, parts: list[Part]) -> None:
        """InputError where one of them does not fit the policy; their parameters move to its device."""
        for part in parts:
            part.scorer.check(self._policy)
            part.scorer.move(self._policy.device)

    def readers(self, parts: list[Part]) -> dict[Scorer, Reader]:
        """Of the scorers that have one. The caller keeps them alive."""
        found: dict[Scorer, Reader] = {}
        for scorer in dict.fromkeys(part.scorer for part in parts):
            reader = self._readers.get(scorer)
            if reader is None and scorer not in self._without:
                reader = reader_of(scorer, self._policy.tokenizer, *self._readers_get)
            if reader is None:
                self._without.add(scorer)
            else:
                self._readers[scorer] = found[scorer] = reader
        return found

    def forget(self) -> None:
        """Nothing that the readers' models have read so far is used again."""
        for reader in self._readers.values():
            reader.forget()
