"""The decoding strategies, as data: what to draw, what to score and what to keep.

The engine runs them all with one loop: from each prefix draw `k` branches of at most `block_tokens`
tokens, select one by utility, commit it, repeat. The base policy is k = 1 and no tilt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pyengine.errors import InputError, single, whole

Selection = Literal["argmax", "softmax"]


@dataclass(frozen=True)
class Tokenwise:
    """Tilt every token: softmax(logits / T + weight * V) (Controlled Decoding, Eq. 6).

    weight is λ in 1 / (unit of the reward); 0 is the base policy. Needs a prefix scorer. Its KL is exact.

    kl_budget, in nats, solves for λ instead: per="token" at every token, so that each costs the budget (or as much of
    it as the token's values can spend); per="sequence" once for all prompts of a call, so that their mean KL is the
    budget within 1 % (`Engine.calibrate`). It needs a temperature above 0 and no filters, whose KL no λ undoes.
    """

    weight: float = 1.0
    kl_budget: float | None = None
    per: Literal["token", "sequence"] = "token"
    k: ClassVar[int] = 1
    block_tokens: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", single(self.weight, "Tokenwise: weight"))
        if self.per not in ("token", "sequence"):
            raise InputError(f'Tokenwise: per must be "token" or "sequence", got {self.per!r}')
        if self.kl_budget is not None:
            if self.weight != 1:
                raise InputError("Tokenwise: give weight or kl_budget, not both")
            if single(self.kl_budget, "Tokenwise: kl_budget") <= 0:
                raise InputError(f"Tokenwise: kl_budget must be positive, got {self.kl_budget}; weight=0 is the base")


@dataclass(frozen=True)
class Blockwise:
    """Draw k branches of block_tokens tokens, keep one, repeat (Controlled Decoding, Eq. 7).

    selection "argmax" keeps the branch of highest utility; "softmax" draws from softmax(utility / beta).
    k = 1 is the base policy; a scorer is then only asked for the reward of the result. KL is bounded by b(k)
    for each committed block.
    """

    k: int = 8
    block_tokens: int = 16
    selection: Selection = "argmax"
    beta: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "block_tokens", whole(self.block_tokens, "Blockwise: block_tokens", 1))


@dataclass(frozen=True)
class BestOfK:
    """Draw k whole responses and keep one.

    selection="softmax" with beta is Q-Probe when the scorer is a probe. KL is bounded by b(k).
    """

    k: int = 8
    selection: Selection = "argmax"
    beta: float | None = None
    block_tokens: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check(self)


Strategy = Tokenwise | Blockwise | BestOfK
BASE = Tokenwise(weight=0.0)


def _check(strategy: Blockwise | BestOfK) -> None:
    name = type(strategy).__name__
    object.__setattr__(strategy, "k", whole(strategy.k, f"{name}: k", 1))
    if strategy.selection not in ("argmax", "softmax"):
        raise InputError(f'{name}: selection must be "argmax" or "softmax", got {strategy.selection!r}')
    if strategy.selection == "softmax":
        if strategy.beta is None or single(strategy.beta, f"{name}: beta") <= 0:
            raise InputError(f'{name}: selection="softmax" needs beta > 0, got {strategy.beta}')
    elif strategy.beta is not None:
        raise InputError(f'{name}: beta is only used with selection="softmax"')
