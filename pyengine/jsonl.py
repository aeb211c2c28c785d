"""JSONL files: one object a line, every line that cannot be used named by file:line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyengine.codec import PromptKey, form_of, key_of
from pyengine.errors import InputError

SHOWN = 5  # faults that one message tells of


def read_file(path: str | Path) -> bytes:
    """The bytes of a file, without a byte order mark; InputError, naming it, if it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: is UTF-16, JSONL is UTF-8: convert it (iconv -f UTF-16 -t UTF-8)")
    return data.removeprefix(b"\xef\xbb\xbf")


def lines_of(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(file:line, line) of all that are not empty."""
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", line


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL; InputError, naming `where`, if it is no object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be a JSON object, got {record!r:.40}")
    return record


def prompt_of(record: dict[str, Any], where: str) -> str:
    """A record's prompt: a text under "prompt", or a `PromptKey` of what is under "prompt_ids" or "messages".

    Messages may also lie under "prompt", as TRL's conversational data have them.
    """
    return key_of(form_of(record, where))


def record_of(prompt: str) -> dict[str, Any]:
    """The record that `prompt_of` reads this prompt from."""
    if not isinstance(prompt, PromptKey):
        return {"prompt": prompt}
    return {"prompt_ids" if type(prompt.form[0]) is int else "messages": prompt.form}


def response_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under `key`, or of the one message of an assistant that stands there (TRL's conversational data)."""
    given = record[key]
    if (
        isinstance(given, list)
        and len(given) == 1
        and isinstance(given[0], dict)
        and given[0].get("role") == "assistant"
    ):
        given = given[0].get("content")
    if not isinstance(given, str):
        raise InputError(f"{where}: {key!r} must be a string or one message of the assistant, got {record[key]!r:.40}")
    return given


def raise_all(faults: Sequence[str], total: int, things: str) -> None:
    """One InputError for all faults; none if there are none."""
    if len(faults) == 1:
        raise InputError(faults[0])
    if faults:
        rest = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(f"{len(faults)} of {total} {things} cannot be used: {'; '.join(faults[:SHOWN])}{rest}")


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from JSONL lines, as `prompt_of` reads them; one InputError for all lines that cannot be used."""
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path: str | Path) -> list[tuple[str, str]]:
    """(file:line, prompt) as `read_prompts` finds them."""
    found, faults = [], []
    for where, line in lines_of(path):
        try:
            found.append((where, prompt_of(json_object(line, where), where)))
        except InputError as error:
            faults.append(str(error))
    raise_all(faults, len(found) + len(faults), "lines")
    if not found:
        raise InputError(f'{path}: no prompts; it needs lines {{"prompt": ...}}')
    return found
