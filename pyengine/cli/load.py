"""What the commands load: prompts, scorers and models, as the command line names them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyengine
from pyengine.errors import InputError
from pyengine.expression import scorer_of
from pyengine.named import SOURCES

if TYPE_CHECKING:
    import torch

    from pyengine.engine import Engine
    from pyengine.generation import Row
    from pyengine.scorers import ScorerLike

DTYPES = ("float32", "bfloat16", "float16")
SCORERS = f"{SOURCES}; or a sum of such: 0.7*a + b"


class Complaints:
    """What was wrong with single lines: printed as it is found, and counted, while the others go on."""

    made = 0

    def __call__(self, message: str) -> None:
        self.made += 1
        print(f"pyengine: {message}", file=sys.stderr)


def read_rows(arguments: list[str], file: Path | None, complain: Any) -> Iterator[Row]:
    """The prompts of the arguments, else of a JSONL file, else of the lines of stdin.

    A JSONL line that cannot be used goes to `complain`, with its number; the others still come.
    """
    from pyengine.generation import Row
    from pyengine.jsonl import json_object, lines_of, prompt_of

    if arguments and file:
        raise InputError("give prompts as arguments or with --input, not both")
    if arguments:
        yield from (Row(f"prompt {i + 1}", a, {}) for i, a in enumerate(arguments))
    elif file is None:
        if sys.stdin.isatty():
            raise InputError("no prompt: give one as an argument, on stdin or with --input FILE.jsonl")
        try:
            for i, line in enumerate(sys.stdin, 1):
                text = line.removeprefix("\ufeff" if i == 1 else "").rstrip("\r\n")
                if text.strip():
                    yield Row(f"stdin line {i}", text, {})
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not text in {error.encoding}: byte {error.start} {error.reason}") from error
    else:
        for where, line in lines_of(file):
            try:
                record = json_object(line, where)
                yield Row(where, prompt_of(record, where), record)
            except InputError as error:
                complain(str(error))


def conditioned(model: str | None, score: float | None) -> Callable[[Any], Any]:
    """What makes a prompt ask a policy of conditional alignment for this reward; None leaves prompts as they are."""
    file = Path(model or "") / "conditioning.json"
    there = model is not None and file.is_file()
    if score is None:
        if there:
            print(f"pyengine: {model} was trained to be asked for a reward: --score 5, say", file=sys.stderr)
        return lambda prompt: prompt
    if not there:
        raise InputError(f"--score: {model or 'the embedded model'} has no conditioning.json, as method ca leaves it")
    from pyengine.rewards.conditioning import Conditioning

    template = Conditioning.load(file)

    def asking(prompt: Any) -> str:
        if type(prompt) is not str:
            raise InputError(f"--score asks in a text, not in token ids or messages: {prompt!r:.40}")
        return template.prompt(prompt, score)

    return asking


def ray_module() -> Any:
    """`pyengine.integrations.ray`; InputError where Ray is not installed."""
    try:
        from pyengine.integrations import ray
    except ImportError as error:
        raise InputError(f"--ray needs {error.name}: pip install 'tilt-engine[ray]'") from error
    return ray


def said(option: str, given: list[str] | None) -> str | None:
    """The one value of an option, which would keep the last of several without a word; InputError for several."""
    if given and len(given) > 1:
        raise InputError(f'{option} is there {len(given)} times: give one sum, {option} "{" + ".join(given)}"')
    return given[0] if given else None


def followed(option: str, given: list[str] | None) -> ScorerLike | None:
    """The scorer that an option says (see `scorer_of`), None where it is not given."""
    text = said(option, given)
    if text is None:
        return None
    quiet_loading()  # a transform reads what it transforms
    return scorer_of(text)


def quiet_loading() -> None:
    """No loading bars where nobody watches."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def load_engine(model: str | None, scorer: ScorerLike | None, device: str, **options: Any) -> Engine:
    """options: of `Engine.from_pretrained`."""
    from pyengine.engine import Engine

    quiet_loading()
    path: Any = pyengine.embedded("policy") if model is None else model
    return Engine.from_pretrained(path, scorer=scorer, device=device, **options)


def check_dtype(name: str | None) -> None:
    if name not in (None, *DTYPES):
        raise InputError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {name!r}")


def dtype_of(name: str | None) -> torch.dtype | None:
    """InputError for one that is not there."""
    import torch

    check_dtype(name)
    return None if name is None else getattr(torch, name)
