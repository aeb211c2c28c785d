"""How a request over a wire says what to follow: flat `tilt_*` keys, the same in every host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyengine.errors import SMALLEST, InputError, real, single, whole
from pyengine.strategies import BestOfK, Blockwise, Strategy, Tokenwise

# strategy -> the fields that it uses, and what they are called in its class
USES: dict[str, tuple[type[Any], dict[str, str]]] = {
    "tokenwise": (Tokenwise, {"tilt_weight": "weight", "tilt_kl_budget": "kl_budget"}),
    "blockwise": (
        Blockwise,
        {"tilt_k": "k", "tilt_block_tokens": "block_tokens", "tilt_selection": "selection", "tilt_beta": "beta"},
    ),
    "best_of_k": (BestOfK, {"tilt_k": "k", "tilt_selection": "selection", "tilt_beta": "beta"}),
}
STRENGTHS = tuple(dict.fromkeys(field for _, used in USES.values() for field in used))
FIELDS = ("tilt_strategy", *STRENGTHS, "tilt_scorer", "tilt_candidates")


class FieldError(InputError):
    """What is wrong with one field of a request. field: its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Tilt(NamedTuple):
    """What a request follows. strategy: None is the base policy. scorers: {name: weight} as the host registered them,
    None for the host's default. candidates: whether the answer shows every block with all its branches."""

    strategy: Strategy | None = None
    scorers: dict[str, float] | None = None
    candidates: bool = False


def tilt_of(fields: Mapping[str, Any]) -> Tilt:
    """The `tilt_*` fields of a request; None counts as not given.

    tilt_strategy: "tokenwise", "blockwise" or "best_of_k"; without it the base policy, whose answers tilt_scorer only
    scores. tilt_weight (λ) or tilt_kl_budget (nats a token): of tokenwise. tilt_k, tilt_block_tokens: branches, and
    tokens of a block. tilt_selection "softmax" draws the branch that is kept from softmax(utility / tilt_beta).
    tilt_scorer: "helpful", "helpful=1,brief=.3" or {"helpful": 1, "brief": 0.3}; a weight of 0 reports only.
    tilt_candidates: true shows the branches.

    Raises FieldError, which names the field: one that is not known, that the strategy does not use, or whose value is
    not of its kind or range.
    """
    given = {field: value for field, value in fields.items() if value is not None}
    for field in given:
        if field not in FIELDS:
            raise FieldError(field, f"unknown field {field}; there are {', '.join(FIELDS)}")
    candidates = given.pop("tilt_candidates", False)
    if candidates not in (True, False):  # some hosts have no booleans: 0 and 1 are equal to these
        raise FieldError("tilt_candidates", f"tilt_candidates must be true or false, got {candidates!r:.80}")
    scorers = scorers_of(given.pop("tilt_scorer", None))
    return Tilt(_strategy(given.pop("tilt_strategy", None), given), scorers, bool(candidates))


def _strategy(name: Any, given: Mapping[str, Any]) -> Strategy | None:
    if name is not None and (not isinstance(name, str) or name not in USES):
        raise FieldError("tilt_strategy", f"unknown tilt_strategy {name!r:.80}; choose from {', '.join(USES)}")
    made, used = USES[name] if name is not None else (None, {})
    for field in given:
        if field not in used:
            users = " or ".join(repr(other) for other, (_, theirs) in USES.items() if field in theirs)
            without = f"tilt_strategy {name!r}" if name else "a request without tilt_strategy"
            raise FieldError(field, f"{field} is not used by {without}: give tilt_strategy {users}")
    if made is None:
        return None
    if "tilt_weight" in given and "tilt_kl_budget" in given:
        raise FieldError("tilt_kl_budget", "give tilt_weight or tilt_kl_budget, not both")
    values = {used[field]: _checked(field, value) for field, value in given.items()}
    soft = values.get("selection") == "softmax"
    if soft != ("beta" in values):
        says = 'tilt_selection "softmax" needs tilt_beta' if soft else 'tilt_beta goes with tilt_selection "softmax"'
        raise FieldError("tilt_beta", says)
    strategy: Strategy = made(**values)
    return strategy


# What each field takes.
KINDS: dict[str, Callable[[Any, str], Any]] = {
    "tilt_weight": single,
    "tilt_kl_budget": lambda value, name: single(value, name, SMALLEST),
    "tilt_k": lambda value, name: whole(value, name, 1),
    "tilt_block_tokens": lambda value, name: whole(value, name, 1),
    "tilt_beta": lambda value, name: single(value, name, SMALLEST),
}


def _checked(field: str, value: Any) -> Any:
    if field == "tilt_selection":
        if value not in ("argmax", "softmax"):
            raise FieldError(field, f'tilt_selection must be "argmax" or "softmax", got {value!r:.80}')
        return value
    if isinstance(value, bool):
        raise FieldError(field, f"{field} must be a number, got {value!r}")
    try:
        return KINDS[field](value, field)
    except InputError as error:
        raise FieldError(field, str(error)) from None


def scorers_of(given: Any) -> dict[str, float] | None:
    """The scorers of a request and their weights; FieldError where it is not written as `tilt_of` says."""
    if given is None:
        return None
    wanted = 'tilt_scorer must be a name, "name=weight,…" or {name: weight}'
    if isinstance(given, str):
        terms = [term.partition("=") for term in given.split(",")]
        named: list[tuple[Any, Any]] = [(name.strip(), weight if equals else 1.0) for name, equals, weight in terms]
    elif isinstance(given, Mapping):
        named = list(given.items())
    else:
        raise FieldError("tilt_scorer", f"{wanted}, got {given!r:.80}")
    found: dict[str, float] = {}
    for name, weight in named:
        if not isinstance(name, str) or not name or name in found:
            why = "twice" if name in found else "without a name"
            raise FieldError("tilt_scorer", f"{wanted}; {given!r:.80} has a scorer {why}")
        try:
            number = float(weight) if isinstance(weight, str) else weight
            found[name] = real(None if isinstance(number, bool) else number, f"tilt_scorer: the weight of {name!r}")
        except (InputError, ValueError):
            raise FieldError("tilt_scorer", f"{wanted}; the weight of {name!r} is {weight!r:.40}") from None
    if not found:
        raise FieldError("tilt_scorer", f"{wanted}, got {given!r:.80}")
    return found
