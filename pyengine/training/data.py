"""Responses with a reward: read from JSONL, or drawn from the base policy by the engine and scored.

Everything is checked before anything is trained on: a bad line is named, and all bad lines are named together.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.codec import FORMS, PromptKey, PromptLike, as_prompts, key_of
from pyengine.engine import Engine
from pyengine.errors import InputError, real, whole
from pyengine.jsonl import json_object, lines_of, prompt_of, raise_all, record_of, response_of
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import BASE
from pyengine.training.shards import written


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
    tokens = _spelling(engine, head, example)
    if example.ended and tokens[-1] not in engine.eos:
        if not engine.eos:
            raise InputError(f'{example.where}: {engine.policy.name} has no EOS token to end with; give "tokens"')
        own = engine.tokenizer.eos_token_id
        tokens = [*tokens, own if own in engine.eos else min(engine.eos)]
    return tokens


def _spelling(engine: Engine, head: list[int], example: Example) -> list[int]:
    """Tokens that spell the response behind its prompt, whose own ids stay.

    As the tokenizer reads both together; where a token spans the border then, which no response that was decoded behind
    this prompt has, as it reads the response behind the prompt without its last spaces, or alone. SentencePiece gives a
    text's first word a space of its own, and a prompt's last space to the word after it.
    """
    prompt, response, encoded = example.prompt, example.response, engine.codec.encode
    tried = []
    if not isinstance(prompt, PromptKey):
        joint = encode_behind(encoded, prompt, response)
        if joint is not None and encoded(prompt) == head:
            return joint
        tried.append(encode_behind(encoded, prompt.rstrip(), response))
    alone = engine.tokenizer(response, add_special_tokens=False, verbose=False).input_ids
    for tokens in (*tried, alone, alone[1:]):
        if tokens and spells(engine, head, tokens, response):
            return list(tokens)
    raise InputError(
        f"{example.where}: {engine.policy.name} cannot spell this response behind its prompt; give its "
        '"tokens", or move the space between them'
    )


def spells(engine: Engine, head: list[int], tokens: list[int], response: str) -> bool:
    """Whether tokens are this response behind the prompt's, with or without special tokens and the EOS in its text."""
    own = tokens[:-1] if tokens[-1] in engine.eos else tokens
    read = engine.codec.between
    return response in (read(head, tokens), read(head, tokens, False), read(head, own, False))


def encode_behind(encode: Callable[[str], list[int]], before: str, text: str) -> list[int] | None:
    """What `text` adds to the tokens of `before`; None where a token spans the border."""
    head, joint = encode(before), encode(before + text)
    return joint[len(head) :] if joint[: len(head)] == head else None


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
    if not spells(engine, head, tokens, example.response):
        raise InputError(f"{where}: its tokens do not spell its response: they are another tokenizer's")
    return tokens


def read_examples(path: str | Path, engine: Engine, rewarded: bool = True) -> list[Example]:
    """Examples from JSONL lines {"prompt", "response", "reward"}, checked against the engine's model.

    Instead of a text under "prompt", token ids under "prompt_ids" or messages under "messages" or "prompt", which go
    through the tokenizer's template; the response may be one message of the assistant, or stand under "completion".

    Optional in a line: "finish_reason", "stop" (the default: the response is whole) or "length" (it was cut off), and
    "tokens", the response's ids as `write_examples` keeps them; where these end without an EOS, finish_reason must be
    there. Unless `rewarded`, no reward is read, and all are 0. Raises one InputError that names file and line of the
    first five faults and counts all; empty lines are skipped.
    """
    found, faults, lines = [], [], 0
    for where, line in lines_of(path):
        lines += 1
        try:
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
    answer = "completion" if "completion" in record and "response" not in record else "response"
    there = {*record, *(["prompt"] if set(FORMS) & record.keys() else [])}
    missing = [key for key in ("prompt", answer, "reward") if key not in there]
    if missing:
        pair = ": it is a pair" if "chosen" in record else ""
        raise InputError(f"{where}: lacks {' and '.join(map(repr, missing))}{pair}")
    finish = record.get("finish_reason", "stop")
    if finish not in ("stop", "length"):
        raise InputError(f'{where}: finish_reason must be "stop" or "length", got {finish!r}')
    prompt, response = prompt_of(record, where), response_of(record, answer, where)
    return Example(prompt, response, record["reward"], record.get("tokens"), finish == "stop", where)


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """JSONL lines that `read_examples` reads again, to the token."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as file:
        file.writelines(map(line_of, examples))


def line_of(example: Example) -> str:
    """The line of JSONL that `read_examples` reads it from again, to the token."""
    record: dict[str, Any] = {**record_of(example.prompt), "response": example.response, "reward": example.reward}
    record["finish_reason"] = "stop" if example.ended else "length"
    if example.tokens is not None:
        record["tokens"] = example.tokens
    return json.dumps(record) + "\n"


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
    prompts: PromptLike | Sequence[PromptLike],
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
    prompts = as_prompts(prompts)
    for i, prompt in enumerate(prompts):
        engine.encode(prompt, f"prompt {i}")
    repeated = [prompt for prompt in map(key_of, prompts) for _ in range(per_prompt)]
    with engine.following(reward):
        return drawn(engine, in_turn(repeated, max_tokens, seed), seed, progress)


def in_turn(prompts: Iterable[str], max_tokens: int, seed: int) -> list[tuple[str, SamplingParams]]:
    """Each prompt with what its roll-out is drawn by: the j-th to a prompt with seed + j."""
    seen: Counter[str] = Counter()
    out = []
    for prompt in prompts:
        out.append((prompt, SamplingParams(max_tokens=max_tokens, seed=seed + seen[prompt])))
        seen[prompt] += 1
    return out


def drawn(
    engine: Engine, asked: Sequence[tuple[str, SamplingParams]], seed: int, progress: bool | None = None
) -> list[Example]:
    """The roll-outs that are asked for, with what the engine's scorer says of them; InputError as for `roll_out`."""
    prompts, sampling = [prompt for prompt, _ in asked], [params for _, params in asked]
    out = []
    for prompt, result, params in zip(
        prompts, engine.generate(prompts, BASE, sampling, progress), sampling, strict=True
    ):
        where = f"roll-out {(params.seed or 0) - seed} of prompt {result.prompt[:40]!r}"
        if result.reward is None or not math.isfinite(result.reward):
            raise InputError(f"{where}: the reward is {result.reward}, it must be finite: {result.text[:40]!r}")
        ended = result.finish_reason == "stop"
        out.append(Example(prompt, result.text, result.reward, result.tokens, ended, where))
    return out
