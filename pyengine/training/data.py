"""Responses with a reward: read from JSONL, or drawn from the base policy by the engine and scored.

Everything is checked before anything is trained on: a bad line is named, and all bad lines are named together.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.engine import Engine
from pyengine.errors import InputError, real, whole
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import BASE
from pyengine.training.shards import written

SHOWN = 5  # faults that one message tells of


@dataclass(frozen=True)
class Example:
    """One response and the reward of the whole of it.

    tokens: the response's ids exactly as they were drawn, with the EOS that ended it; None tokenises `response` and
    ends it with one EOS if it ended. ended: whether the response is whole, so that its last token carries the reward;
    one that was cut off (False) has no reward yet, and training bootstraps at the cut. where: what errors call it.
    """

    prompt: str
    response: str
    reward: float
    tokens: list[int] | None = None
    ended: bool = True
    where: str = "example"


class Encoded(NamedTuple):
    """An example as token ids; the response is ids[start:], its EOS included."""

    ids: list[int]
    start: int
    reward: float
    ended: bool
    prompt: str


def encode(engine: Engine, example: Example) -> Encoded:
    """The example in the tokens of the engine's model: the response's ids behind the prompt's, nothing merged.

    Raises InputError, naming the example, for an empty response, a reward that is not finite, tokens of another
    vocabulary, an EOS before the end, or more tokens than the model's context.
    """
    where = example.where
    if isinstance(example.reward, bool) or not isinstance(example.reward, (int, float)):
        raise InputError(f"{where}: the reward must be a number, got {example.reward!r}")
    if not math.isfinite(example.reward):
        raise InputError(f"{where}: the reward is {example.reward}; give a finite one, or clip it")
    head = engine.encode(example.prompt, f"{where}: the prompt")
    if example.tokens is None:
        tokens = _tokenised(engine, head, example)
    else:
        tokens = _checked(engine, head, example, example.tokens)
    if not example.ended and tokens[-1] in engine.eos:
        raise InputError(f'{where}: finish_reason is "length", but the response ends with an EOS')
    early = next((i for i, token in enumerate(tokens[:-1]) if token in engine.eos), None)
    if early is not None:
        raise InputError(f"{where}: the response has an EOS at token {early} of {len(tokens)}; it must end there")
    if engine.context is not None and len(head) + len(tokens) > engine.context:
        raise InputError(
            f"{where}: prompt and response have {len(head)} + {len(tokens)} tokens, {engine.policy.name} reads "
            f"{engine.context}; shorten it"
        )
    return Encoded(head + tokens, len(head), float(example.reward), example.ended, example.prompt)


def encode_all(engine: Engine, examples: Iterable[Example]) -> list[Encoded]:
    """Every example as tokens; one InputError for all that cannot be used."""
    out, faults = [], []
    for example in examples:
        try:
            out.append(encode(engine, example))
        except InputError as error:
            faults.append(str(error))
    raise_all(faults, len(out) + len(faults), "examples")
    return out


def _tokenised(engine: Engine, head: list[int], example: Example) -> list[int]:
    """The ids of the response's text, and one EOS if it ended."""
    if not example.response.strip():
        raise InputError(f"{example.where}: the response is empty")
    joint = engine.tokenizer(example.prompt + example.response, verbose=False).input_ids
    if joint[: len(head)] == head:
        tokens = joint[len(head) :]
    else:  # a token would span the border, which no response that was decoded behind this prompt has
        tokens = engine.tokenizer(example.response, add_special_tokens=False, verbose=False).input_ids
        if _spelled(engine, head, tokens) != example.response:
            raise InputError(
                f"{example.where}: {engine.policy.name} cannot spell this response behind its prompt; give its "
                '"tokens", or move the space between them'
            )
    if example.ended and tokens[-1] not in engine.eos:
        if not engine.eos:
            raise InputError(f'{example.where}: {engine.policy.name} has no EOS token to end with; give "tokens"')
        own = engine.tokenizer.eos_token_id
        tokens = [*tokens, own if own in engine.eos else min(engine.eos)]
    return tokens


def _checked(engine: Engine, head: list[int], example: Example, tokens: Any) -> list[int]:
    """Tokens that were given: ids of this vocabulary which spell the response."""
    where, size = example.where, engine.policy.vocab_size
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"{where}: the response is empty: its tokens must be a list of at least one id")
    for token in tokens:
        if type(token) is not int or not 0 <= token < size:
            raise InputError(
                f"{where}: token {token!r} is not in the vocabulary of {size} tokens of {engine.policy.name}: "
                "the tokens are another model's"
            )
    if _spelled(engine, head, tokens) != example.response:
        raise InputError(f"{where}: its tokens do not spell its response: they are another tokenizer's")
    return tokens


def _spelled(engine: Engine, head: list[int], tokens: list[int]) -> str:
    """The text that tokens add behind a prompt. Decoded together: SentencePiece drops a leading space."""
    context = head[-4:]
    before, both = engine.tokenizer.batch_decode(
        [context, context + tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return both[len(before) :]


def read_examples(path: str | Path, engine: Engine, rewarded: bool = True) -> list[Example]:
    """Examples from JSONL lines {"prompt", "response", "reward"}, checked against the engine's model.

    Optional in a line: "finish_reason", "stop" (the default: the response is whole) or "length" (it was cut off), and
    "tokens", the response's ids as `write_examples` keeps them; where these end without an EOS, finish_reason must be
    there. Unless `rewarded`, no reward is read, and all are 0. Raises one InputError that names file and line of the
    first five faults and counts all; empty lines are skipped.
    """
    found, faults, lines = [], [], 0
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        lines += 1
        try:
            where = f"{path}:{number}"
            record = json_object(line, where)
            example = example_of(record if rewarded else record | {"reward": 0.0}, where)
            tokens = encode(engine, example).ids
            if example.tokens is not None and "finish_reason" not in record and tokens[-1] not in engine.eos:
                raise InputError(
                    f'{where}: its tokens end without an EOS: give "finish_reason", "length" if the response was cut '
                    'off, "stop" if its environment ended it there'
                )
            found.append(example)
        except InputError as error:
            faults.append(str(error))
    raise_all(faults, lines, "lines")
    if not found:
        raise InputError(f'{path}: no examples; it needs lines {{"prompt", "response", "reward"}}')
    return found


def example_of(record: dict[str, Any], where: str) -> Example:
    """The example in one object; InputError, naming `where`, for a key that is missing or of another kind."""
    missing = [key for key in ("prompt", "response", "reward") if key not in record]
    if missing:
        pair = ": it is a pair" if "chosen" in record else ""
        raise InputError(f"{where}: lacks {' and '.join(map(repr, missing))}{pair}")
    for key in ("prompt", "response"):
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key!r} must be a string, got {record[key]!r:.40}")
    finish = record.get("finish_reason", "stop")
    if finish not in ("stop", "length"):
        raise InputError(f'{where}: finish_reason must be "stop" or "length", got {finish!r}')
    return Example(
        record["prompt"], record["response"], record["reward"], record.get("tokens"), finish == "stop", where
    )


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """JSONL lines that `read_examples` reads again, to the token."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        for e in examples:
            record: dict[str, Any] = {"prompt": e.prompt, "response": e.response, "reward": e.reward}
            record["finish_reason"] = "stop" if e.ended else "length"
            if e.tokens is not None:
                record["tokens"] = e.tokens
            file.write(json.dumps(record) + "\n")


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from JSONL lines {"prompt": ...}; one InputError for all lines that cannot be used."""
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path: str | Path) -> list[tuple[str, str]]:
    """(file:line, prompt) as `read_prompts` finds them."""
    found, faults = [], []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            prompt = json_object(line, where).get("prompt")
            if not isinstance(prompt, str):
                raise InputError(f'{where}: needs a string "prompt"')
        except InputError as error:
            faults.append(str(error))
        else:
            found.append((where, prompt))
    raise_all(faults, len(found) + len(faults), "lines")
    if not found:
        raise InputError(f'{path}: no prompts; it needs lines {{"prompt": ...}}')
    return found


def read_file(path: str | Path) -> bytes:
    """The bytes of a file; InputError, naming it, if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL; InputError, naming `where`, if it is no object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be a JSON object, got {record!r:.40}")
    return record


def raise_all(faults: Sequence[str], total: int, things: str) -> None:
    """One InputError for all faults; none if there are none."""
    if len(faults) == 1:
        raise InputError(faults[0])
    if faults:
        rest = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(f"{len(faults)} of {total} {things} cannot be used: {'; '.join(faults[:SHOWN])}{rest}")


def split(keys: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, so that no key (a prompt) is on both sides; at least one key on each.

    A share of 0 holds nothing out. Raises InputError where a share above 0 meets a single key.
    """
    share = real(share, "held_out", 0, 0.9)
    known = sorted(set(keys))
    if share and len(known) < 2:
        raise InputError("held_out: holding prompts out needs at least two of them; give held_out=0 to train on all")
    random.Random(seed).shuffle(known)
    away = set(known[: min(max(1, round(share * len(known))), len(known) - 1)] if share else ())
    return [i for i, key in enumerate(keys) if key not in away], [i for i, key in enumerate(keys) if key in away]


def roll_out(
    engine: Engine,
    prompts: str | Sequence[str],
    reward: ScorerLike,
    per_prompt: int = 1,
    max_tokens: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Example]:
    """`per_prompt` responses of the base policy (temperature 1, no filters) to each prompt, with their rewards.

    The j-th response to a prompt is drawn with seed + j, so the same call gives the same examples; a prompt that comes
    again goes on counting. The engine's own scorer is back when this returns. Raises InputError for a prompt
    that cannot be decoded, by its place in `prompts`, and, naming prompt and sample, for a reward that is not finite.
    """
    whole(per_prompt, "roll_out: per_prompt", 1)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for i, prompt in enumerate(prompts):
        engine.encode(prompt, f"prompt {i}")
    seen: Counter[str] = Counter()
    asked, sampling = [], []
    for prompt in prompts:
        for _ in range(per_prompt):
            asked.append(prompt)
            sampling.append(SamplingParams(max_tokens=max_tokens, seed=seed + seen[prompt]))
            seen[prompt] += 1
    with engine.following(reward):
        results = engine.generate(asked, BASE, sampling, progress)
    out = []
    for result, params in zip(results, sampling, strict=True):
        where = f"roll-out {(params.seed or 0) - seed} of prompt {result.prompt[:40]!r}"
        if result.reward is None or not math.isfinite(result.reward):
            raise InputError(f"{where}: the reward is {result.reward}, it must be finite: {result.text[:40]!r}")
        ended = result.finish_reason == "stop"
        out.append(Example(result.prompt, result.text, result.reward, result.tokens, ended, where))
    return out
