"""What clients may send: OpenAI's fields of text generation, vLLM's beside them, and the `tilt_*` fields.

A field that is not known, or a value that this server does not do, is an error that names it, and never left aside.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from pyengine.errors import InputError
from pyengine.results import SamplingParams
from pyengine.serve.limits import Limits, Refused
from pyengine.vocabulary import FIELDS, FieldError, Tilt, tilt_of

# OpenAI's fields that say nothing to this server, and the values that say nothing; None is one of each.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
INSTEAD = {
    "best_of": 'leave it out, or take tilt_strategy "best_of_k" with tilt_k',
    "tools": "this server calls no tools",
    "functions": "this server calls no functions",
    "chat_template": "the checkpoint's own template is the only one",
}
STRICT = ConfigDict(extra="forbid", strict=True)


# The first wrong element ends a list: an error for each of a million would take gigabytes.
T = TypeVar("T")
Some = Annotated[list[T], Field(fail_fast=True, max_length=1024)]
Many = Annotated[list[T], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None  # vLLM's


class ResponseFormat(BaseModel):
    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Shared(BaseModel):
    """What completions and chats have in common; None stands for a field that was not given."""

    model_config = STRICT
    model: str | None = None
    # OpenAI's
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | Some[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # the client's own books
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Some[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Many[int] | None = None
    bad_words: Some[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    # 0 is the earliest: a client can let others go first, and overtake nobody.
    priority: Annotated[int, Field(ge=0, le=2**31)] | None = None


OPEN: dict[str, Any] = dict.fromkeys((*FIELDS, *NEUTRAL), (Any, None))
Generation: Any = create_model("Generation", __base__=Shared, **OPEN)


class Completion(Generation):
    """`/v1/completions`."""

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool | None = None
    logprobs: int | None = None
    return_token_ids: bool | None = None  # vLLM's


class Chat(Generation):
    """`/v1/chat/completions`. A last message of the assistant is continued."""

    messages: Many[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class Tokenization(BaseModel):
    """`/tokenize`: a text or a conversation."""

    model_config = STRICT
    model: str | None = None
    prompt: str | None = None
    messages: Many[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenization(BaseModel):
    """`/detokenize`."""

    model_config = STRICT
    model: str | None = None
    tokens: Many[int]


def prompts_of(body: Any) -> list[Any]:
    """The prompts of a request, as the engine takes them."""
    if isinstance(body, Chat):
        return [{"messages": _messages(body)}]
    prompt = body.prompt
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    for i, one in enumerate(prompts):
        if not one:
            raise Refused(400, f"prompt {i} is empty", "prompt", "invalid_value")
    return list(prompts)


def _messages(body: Any) -> list[dict[str, Any]]:
    if not body.messages:
        raise Refused(400, "messages is empty", "messages", "invalid_value")
    found = []
    for i, message in enumerate(body.messages):
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    says = f'messages[{i}]: a part of its content is {{"type": "text", "text"}}, got {part!r:.80}'
                    raise Refused(400, says, "messages", "invalid_value")
            content = "".join(part["text"] for part in content)
        elif not isinstance(content, str):
            says = f"messages[{i}]: its content must be a text, got {content!r:.80}"
            raise Refused(400, says, "messages", "invalid_value")
        role = message.get("role")
        # What OpenAI's newer models call the system's messages; templates know the old name.
        found.append(message | {"content": content, "role": "system" if role == "developer" else role})
    more = found[-1]["role"] == "assistant"
    for field, wanted in (("continue_final_message", more), ("add_generation_prompt", not more)):
        if getattr(body, field) not in (None, wanted):
            says = f"{field} must be {str(wanted).lower()} here: a last message of the assistant is continued"
            raise Refused(400, says, field, "unsupported_value")
    return found


def tilt_in(body: Any, limits: Limits) -> Tilt:
    """What a request follows; Refused, naming the field."""
    for field, values in NEUTRAL.items():
        value = getattr(body, field)
        if value is not None and value not in values:
            says = f"{field} {value!r:.80} is not supported: {INSTEAD.get(field, 'leave it out')}"
            raise Refused(400, says, field, "unsupported_value")
    try:
        tilt = tilt_of({field: getattr(body, field) for field in FIELDS})
    except FieldError as error:
        raise Refused(400, str(error), error.field, "invalid_value") from None
    if tilt.strategy is not None:
        limits.at_most("k", tilt.strategy.k, "tilt_k")
    return tilt


def sampling_in(body: Any, limits: Limits) -> SamplingParams:
    """How a request's tokens are drawn; Refused, naming the field."""
    chat = isinstance(body, Chat)
    length = "max_completion_tokens" if chat and body.max_completion_tokens is not None else "max_tokens"
    wanted = getattr(body, length)
    limits.at_most("max_tokens", wanted, length)
    limits.at_most("n", body.n, "n")
    if chat:
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs needs logprobs true", "top_logprobs", "invalid_value")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        limits.at_most("logprobs", logprobs, "top_logprobs")
    else:
        logprobs = body.logprobs
        limits.at_most("logprobs", logprobs, "logprobs")
    if logprobs is not None and logprobs < 0:
        field = "top_logprobs" if chat else "logprobs"
        raise Refused(400, f"{field} must be at least 0, got {logprobs}", field, "invalid_value")
    none = not chat and body.echo and wanted == 0  # the prompt's own logprobs are asked for
    given: dict[str, Any] = {
        "max_tokens": 1 if none else limits.default_max_tokens if wanted is None else wanted,
        "logprobs": logprobs,
        "prompt_logprobs": logprobs if not chat and body.echo else None,
        "logit_bias": _biases(body.logit_bias),
        "grammar": _grammar(body),
    }
    others = SamplingParams.__dataclass_fields__.keys() & Shared.model_fields.keys() - given.keys()
    given |= {field: getattr(body, field) for field in others}
    try:
        return SamplingParams(**{field: value for field, value in given.items() if value is not None})
    except InputError as error:
        param, message = field_of(str(error))
        param = length if param == "max_tokens" else param
        raise Refused(400, message, param, "invalid_value") from None


def field_of(message: str) -> tuple[str | None, str]:
    """The field that an error of the engine names, as this server calls it, and the message without the class."""
    message = message.replace("SamplingParams: bad word ", "SamplingParams: bad_words: ")
    found = re.match(r"SamplingParams: (?:a token of |token \S+ of )?(\w+)", message)
    if found:
        field = "response_format" if found[1] == "grammar" else found[1]
        return field, message.removeprefix("SamplingParams: ")
    if re.match(r"Tokenwise", message):
        return ("tilt_kl_budget" if "kl_budget" in message else "tilt_scorer"), message
    found = re.match(r"(tilt_\w+): ", message)
    return (found[1], message[found.end() :]) if found else (None, message)


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    wrong = next((key for key in given if not key.isdecimal() or len(key) > 10), None)  # Python reads no 5000 digits
    if wrong is not None:
        raise Refused(400, f"logit_bias has {wrong!r:.40}, which is no token id", "logit_bias", "invalid_value")
    return {int(key): bias for key, bias in given.items()}


def _grammar(body: Any) -> dict[str, Any] | None:
    """What an answer must be in, by OpenAI's field or vLLM's."""
    wanted, other = body.response_format, body.structured_outputs
    if other is not None:
        kinds = {"json": "json", "regex": "regex", "grammar": "ebnf", "json_object": "json_object"}
        if wanted is not None and wanted.type != "text":
            raise Refused(400, "give response_format or structured_outputs", "structured_outputs", "invalid_value")
        if len(other) != 1 or next(iter(other)) not in kinds:
            says = f"structured_outputs must have one of {', '.join(kinds)}, got {other!r:.80}"
            raise Refused(400, says, "structured_outputs", "invalid_value")
        return {kinds[kind]: value for kind, value in other.items()}
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"json_object": True}
    given = wanted.json_schema or {}
    unknown = set(given) - {"name", "description", "schema", "strict"}
    if unknown or not isinstance(given.get("schema"), dict):
        why = f"has an unknown field {min(unknown)!r}" if unknown else 'needs an object under "schema"'
        raise Refused(400, f"response_format: json_schema {why}", "response_format", "invalid_value")
    return {"json": given["schema"]}
