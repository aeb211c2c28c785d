"""What is asked of the contenders: how long prompts and answers are, and tokens that nobody has seen before."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import NamedTuple

import torch

from pyengine.errors import InputError, whole
from pyengine.jsonl import json_object, lines_of

PROMPT, TOKENS = 256, 64
SPREAD = 0.7  # of a logarithm of `lognormal`
# Means of ShareGPT's turns as vLLM's paper counted them (Kwon et al. 2023, 6.1); the spread of a logarithm is ours.
CHAT, CHAT_SPREAD = (161.31, 337.99), 1.0
KINDS = ("fixed", "lognormal", "chat")


class Ask(NamedTuple):
    """A prompt's token ids, and how many tokens its answer has."""

    prompt: list[int]
    tokens: int


def lengths(
    kind: str, count: int, prompt_tokens: int | None = None, max_tokens: int | None = None, seed: int = 0
) -> list[tuple[int, int]]:
    """(tokens of the prompt, of the answer) of `count` requests.

    kind: "fixed" (all as given), "lognormal" (medians as given), "chat" (means of ShareGPT's) or a JSONL file, a
    {"prompt_tokens", "max_tokens"} a line. InputError, which names the option or the line, for what does not fit.
    """
    whole(count, "--prompts", 1)
    if kind in ("fixed", "lognormal"):
        prompt = whole(PROMPT if prompt_tokens is None else prompt_tokens, "--prompt-tokens", 1)
        answer = whole(TOKENS if max_tokens is None else max_tokens, "--max-tokens", 1)
        if kind == "fixed":
            return [(prompt, answer)] * count
        return _drawn((math.log(prompt), math.log(answer)), SPREAD, count, seed)
    if prompt_tokens is not None or max_tokens is not None:
        raise InputError(f"--prompt-tokens and --max-tokens are not used by --lengths {kind}")
    if kind == "chat":
        return _drawn(tuple(math.log(mean) - CHAT_SPREAD**2 / 2 for mean in CHAT), CHAT_SPREAD, count, seed)
    path = Path(kind)
    if not path.is_file():
        raise InputError(f"--lengths {kind}: no such file; else one of {', '.join(KINDS)}")
    return _of_file(path, count)


def _drawn(middles: tuple[float, ...], spread: float, count: int, seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    rows = [[max(1, round(draw.lognormvariate(m, spread))) for m in middles] for _ in range(count)]
    return [(prompt, answer) for prompt, answer in rows]


def _of_file(path: Path, count: int) -> list[tuple[int, int]]:
    found = []
    for where, line in lines_of(path):
        row = json_object(line, where)
        found.append(tuple(whole(row.get(name), f"{where}: {name}", 1) for name in ("prompt_tokens", "max_tokens")))
        if len(found) == count:
            break
    if len(found) < count:
        raise InputError(f"--lengths {path}: {len(found)} lines for --prompts {count}")
    return [(prompt, answer) for prompt, answer in found]


def shared_tokens(sizes: list[tuple[int, int]], prefix: str) -> int:
    """How many tokens all prompts begin with: half of the shortest, or none."""
    if prefix not in ("shared", "unique"):
        raise InputError(f"--prefix {prefix}: shared or unique")
    return min(prompt for prompt, _ in sizes) // 2 if prefix == "shared" else 0


def asked(sizes: list[tuple[int, int]], vocab: int, shared: int, number: int) -> list[Ask]:
    """The requests of round `number`: each round's tokens are its own, so that no cache knows them from another."""
    generator = torch.Generator().manual_seed(number)

    def ids(count: int) -> list[int]:
        return torch.randint(1, vocab, (count,), generator=generator).tolist()

    head = ids(shared)
    return [Ask(head + ids(prompt - shared), answer) for prompt, answer in sizes]
