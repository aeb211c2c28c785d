"""Preference pairs and labelled responses from JSONL; all lines that cannot be used are named and refused together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pyengine.codec import FORMS
from pyengine.errors import InputError
from pyengine.jsonl import json_object, lines_of, prompt_of, raise_all, response_of


class Pair(NamedTuple):
    """One preference: {"prompt", "chosen", "rejected"}."""

    prompt: str
    chosen: str
    rejected: str
    where: str  # file:line


class Labelled(NamedTuple):
    """One response that has a property or has not: {"prompt", "response", "label"}."""

    prompt: str
    response: str
    label: float  # 0 .. 1
    where: str  # file:line


def read_preferences(path: str | Path) -> list[Pair] | list[Labelled]:
    """The examples of a JSONL file, all of one kind, which its first line decides; empty lines are skipped.

    A label must be 0 or 1, or a Boolean. Raises one InputError that names file:line of the first five faults and counts
    all: lines that are no such object, empty responses, pairs of equal responses, lines of the other kind.
    """
    pairs: list[Pair] = []
    labelled: list[Labelled] = []
    faults, lines = [], 0
    for where, line in lines_of(path):
        lines += 1
        try:
            example = _parse(line, where)
            if labelled if isinstance(example, Pair) else pairs:
                raise InputError(f"{example.where}: pairs and labelled responses in one file; split it")
        except InputError as error:
            faults.append(str(error))
            continue
        if isinstance(example, Pair):
            pairs.append(example)
        else:
            labelled.append(example)
    raise_all(faults, lines, "lines")
    if not lines:
        raise InputError(f"{path}: holds no examples")
    return pairs or labelled


def _parse(line: bytes, where: str) -> Pair | Labelled:
    record = json_object(line, where)
    paired = "chosen" in record or "rejected" in record
    keys = ("prompt", "chosen", "rejected") if paired else ("prompt", "response", "label")
    missing = [key for key in keys if key not in record and not (key == "prompt" and set(FORMS) & record.keys())]
    if missing:
        raise InputError(
            f'{where}: lacks {", ".join(missing)}; a line is {{"prompt", "chosen", "rejected"}} or '
            '{"prompt", "response", "label"}'
        )
    answers = [response_of(record, key, where) for key in keys[1 : 3 if paired else 2]]
    texts = [prompt_of(record, where), *answers]
    for key, text in zip(keys, texts, strict=False):
        if not (text if key == "prompt" else text.strip()):
            raise InputError(f"{where}: {key} is empty")
    if paired:
        if texts[1] == texts[2]:
            raise InputError(f"{where}: chosen and rejected are the same text; leave such a pair out")
        return Pair(texts[0], texts[1], texts[2], where)
    label = record["label"]
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise InputError(f"{where}: label must be 0 or 1, got {label!r:.40}")
    return Labelled(texts[0], texts[1], float(label), where)
