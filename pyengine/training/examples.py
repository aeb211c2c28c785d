"""Preference pairs and scored responses from JSONL; a line that cannot be used is named and refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.errors import InputError
from pyengine.training.data import json_object, read_file


class Pair(NamedTuple):
    """One preference: {"prompt", "chosen", "rejected"}."""

    prompt: str
    chosen: str
    rejected: str
    where: str  # file:line


class Scored(NamedTuple):
    """One response with a number: {"prompt", "response"} and "label" or "reward"."""

    prompt: str
    response: str
    value: float
    where: str  # file:line


def read_examples(path: str | Path, number: str = "reward") -> list[Pair] | list[Scored]:
    """The examples of a JSONL file, all of one kind, which its first line decides; empty lines are skipped.

    number: the key of a scored response's value; a "label" must be 0 or 1 (or a Boolean), a "reward" finite.
    Raises InputError, naming file:line, for a line that is no such object, an empty response, a pair of equal
    responses or a line of the other kind.
    """
    lines = read_file(path).splitlines()
    pairs: list[Pair] = []
    scored: list[Scored] = []
    for i, line in enumerate(lines, 1):
        if line.strip():
            example = _parse(line, f"{path}:{i}", number)
            (pairs if isinstance(example, Pair) else scored).append(example)  # type: ignore[arg-type]
            if pairs and scored:
                raise InputError(f"{example.where}: pairs and scored responses in one file; split it")
    if not pairs and not scored:
        raise InputError(f"{path}: holds no examples")
    return pairs or scored


def _parse(line: bytes, where: str, number: str) -> Pair | Scored:
    record = json_object(line, where)
    paired = "chosen" in record or "rejected" in record
    keys = ("prompt", "chosen", "rejected") if paired else ("prompt", "response", number)
    missing = [key for key in keys if key not in record]
    if missing:
        raise InputError(
            f'{where}: lacks {", ".join(missing)}; a line is {{"prompt", "chosen", "rejected"}} or '
            f'{{"prompt", "response", "{number}"}}'
        )
    texts = [record[key] for key in keys[: 3 if paired else 2]]
    for key, text in zip(keys, texts, strict=False):
        if not isinstance(text, str):
            raise InputError(f"{where}: {key} is not a string: {text!r}")
        if not text.strip():
            raise InputError(f"{where}: {key} is empty")
    if paired:
        if texts[1] == texts[2]:
            raise InputError(f"{where}: chosen and rejected are the same text; leave such a pair out")
        return Pair(texts[0], texts[1], texts[2], where)
    return Scored(texts[0], texts[1], _number(record[number], number, where), where)


def _number(value: Any, name: str, where: str) -> float:
    if name == "label":
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InputError(f"{where}: label must be 0 or 1, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {name} must be a finite number, got {value!r}")
    return float(value)
