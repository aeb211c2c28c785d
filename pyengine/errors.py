"""The one exception for input that cannot be used, and the checks that numbers share."""

from __future__ import annotations

import math
import operator
from typing import Any


class InputError(ValueError):
    """The caller's input is at fault; the message is one line that names the thing and what to do."""


class RequestError(InputError):
    """One request could not be finished; those beside it were not touched.

    index: its place among the prompts of the call. reason: what was wrong, without the prompt. results: of a call that
    raises this, all that was decoded, in the order of the prompts, with a RequestError in each place that has none.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"prompt {index}: {reason}")
        self.index, self.reason = index, reason
        self.results: list[Any] = []


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def whole(value: Any, name: str, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int in [least, most]; InputError, naming it, if it is not a whole number there."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        bounds = f"of at least {least}" if most == 2**63 - 1 else f"in {least} .. {most}"
        raise InputError(f"{name} must be a whole number {bounds}, got {value!r}")
    return number


def real(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """`value` as a finite float in [least, most]; InputError, naming it, if it is not one."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        bounds = "" if (least, most) == (-math.inf, math.inf) else f" in {least:g} .. {most:g}"
        raise InputError(f"{name} must be a finite number{bounds}, got {value!r:.80}")
    return number


SMALLEST, LARGEST = 2.0**-126, 3.4028234663852886e38  # of fp32's normal numbers, in which the kernels take parameters


def single(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """`real` for a number that the kernels take in fp32, where it must stay what it is: not become 0 or infinite."""
    number = real(value, name, least, most)
    if 0 < abs(number) < SMALLEST or abs(number) > LARGEST:
        raise InputError(f"{name} is {number:g}: fp32 holds 0 and {SMALLEST:.3g} to {LARGEST:.3g}")
    return number
