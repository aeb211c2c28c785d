"""What a request asks for, checked once: a strategy, the scorers that it follows, and how tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyengine.errors import InputError
from pyengine.reader import Reader
from pyengine.results import SamplingParams
from pyengine.scorers import Part, PrefixModel, Scorer
from pyengine.strategies import BestOfK, Blockwise, Strategy, Tokenwise


@dataclass(frozen=True)
class Plan:
    """readers: of the scorers that are models with a cache of their own. tilts: λ of each scorer that tilts every
    token; budget: nats a token, for which their λ are solved in the proportions of `tilts`."""

    strategy: Strategy
    parts: Sequence[Part]
    readers: Mapping[Scorer, Reader]
    sampling: SamplingParams
    tilts: Mapping[Scorer, float] = field(init=False)

    def __post_init__(self) -> None:
        _check(self.strategy, self.parts, self.readers)
        tilts: dict[Scorer, float] = {}
        if isinstance(self.strategy, Tokenwise) and self.strategy.weight:
            for part in self.parts:
                if part.weight:
                    tilts[part.scorer] = tilts.get(part.scorer, 0.0) + self.strategy.weight * part.weight
        if isinstance(self.strategy, Tokenwise) and self.strategy.kl_budget is not None:
            tilts = _proportions(tilts)
        object.__setattr__(self, "tilts", tilts)

    @property
    def k(self) -> int:
        return self.strategy.k

    @property
    def selects(self) -> bool:
        return self.strategy.k > 1

    @property
    def budget(self) -> float | None:
        return self.strategy.kl_budget if isinstance(self.strategy, Tokenwise) and self.tilts else None

    @property
    def grows(self) -> bool:
        """Whether anything is committed before the response is whole."""
        return self.strategy.k == 1 or self.strategy.block_tokens is not None

    def follows(self) -> list[Reader]:
        """The readers that keep a place for the request: block by block, or token by token where they tilt."""
        wanted = self.readers if self.selects else self.tilts
        return list(dict.fromkeys(self.readers[scorer] for scorer in wanted if scorer in self.readers))


def _proportions(tilts: Mapping[Scorer, float]) -> dict[Scorer, float]:
    """The largest is 1: in fp32 weights that are all small would vanish. InputError where there is none."""
    largest = max((abs(weight) for weight in tilts.values()), default=0.0)
    if not largest:
        raise InputError("Tokenwise: kl_budget has nothing to spend: every scorer's weight is 0")
    return {scorer: weight / largest for scorer, weight in tilts.items()}


def _check(strategy: Strategy, parts: Sequence[Part], readers: Mapping[Scorer, Reader]) -> None:
    if not isinstance(strategy, (Tokenwise, Blockwise, BestOfK)):
        raise InputError(f"not a strategy: {strategy!r}; use Tokenwise, Blockwise or BestOfK")
    if isinstance(strategy, Tokenwise):
        if strategy.weight == 0:
            return
        for part in parts:
            if not part.weight:
                continue
            if part.transforms:
                raise InputError(
                    f"Tokenwise cannot follow {part.name!r}: the transform of a value is not the value of the "
                    "transformed reward; train a prefix scorer on the transformed reward instead"
                )
            if not part.scorer.scores_tokens:
                raise InputError(
                    f"Tokenwise needs scorers that score every next token; {part.name!r} scores whole prefixes "
                    "only: use a prefix scorer, or Blockwise or BestOfK"
                )
            if isinstance(part.scorer, PrefixModel) and part.scorer not in readers:
                raise InputError(
                    f"Tokenwise cannot follow {part.name!r}: its model has no branching cache (see the log); use "
                    "Blockwise or BestOfK"
                )
    if not parts and (strategy.k > 1 or isinstance(strategy, Tokenwise)):
        raise InputError(f"{strategy} needs a scorer: Engine.from_pretrained(..., scorer=...)")
