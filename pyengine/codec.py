"""Text to tokens and tokens to text, for everyone: prompts of every form, templates, special tokens, characters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from pyengine.errors import InputError, first_line

BROKEN = "\ufffd"  # what a decoder shows for bytes that are no character
REACH = 4  # tokens before new ones that are decoded with them, at least

# Text; token ids, used as they are; messages, through the tokenizer's template; or an object with one of these under
# "prompt", "prompt_ids" or "messages".
PromptLike = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
FORMS = ("prompt", "prompt_ids", "messages")


class Prompt(NamedTuple):
    """A prompt as the model reads it: its text, as a template renders it, its tokens, and the messages it was."""

    text: str
    ids: list[int]
    messages: list[Any] | None = None


class PromptKey(str):
    """A prompt that is no text where texts are kept, compared and written: its JSON. form: the prompt itself."""

    form: Any

    def __new__(cls, form: Any) -> PromptKey:
        key = super().__new__(cls, json.dumps(form))
        key.form = form
        return key


def form_of(record: Mapping[str, Any], where: str) -> Any:
    """The prompt that an object gives: a text or messages under "prompt", "prompt_ids" or "messages".

    InputError, naming `where`, unless it gives one.
    """
    forms = [form for form in FORMS if form in record]
    if len(forms) != 1:
        has = f"has {' and '.join(map(repr, forms))}" if forms else "lacks them all"
        raise InputError(f'{where}: needs one of "prompt", "prompt_ids" and "messages", {has}')
    given = record[forms[0]]
    if isinstance(given, str) and forms[0] == "prompt":
        return given
    several = isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and len(given) > 0
    kind = (lambda item: type(item) is int) if forms[0] == "prompt_ids" else (lambda item: isinstance(item, Mapping))
    if not several or not all(map(kind, given)):
        wanted = "token ids" if forms[0] == "prompt_ids" else 'messages, {"role", "content"} each,'
        wanted = f"a string or {wanted}" if forms[0] == "prompt" else wanted
        raise InputError(f'{where}: needs {wanted} under "{forms[0]}", got {given!r:.40}')
    return given


def key_of(prompt: PromptLike, where: str = "prompt") -> str:
    """A prompt of any form as a key: a text is its own, anything else a `PromptKey`."""
    form = form_of(prompt, where) if isinstance(prompt, Mapping) else prompt
    return form if isinstance(form, str) else PromptKey(list(form))


def as_prompts(prompts: Any) -> list[Any]:
    """The prompts of a call: one text, one list of token ids or one conversation is a single prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    given = list(prompts)
    ids = given and all(type(item) is int for item in given)
    conversation = given and all(isinstance(item, Mapping) and "role" in item for item in given)
    return [given] if ids or conversation else given


class Codec:
    """A tokenizer beside the model whose tokens it makes.

    name: what errors call the model. rows: tokens that it embeds. context: tokens that it reads, None for any number.
    """

    def __init__(self, tokenizer: Any, name: str, rows: int, context: int | None = None) -> None:
        self.tokenizer, self.name, self.rows, self.context = tokenizer, name, rows, context
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        vocabulary = tokenizer.get_vocab()
        self._bytes = _byte_tokens(tokenizer, vocabulary)
        self._longest = max(map(len, vocabulary), default=1)  # characters of a token
        self._pieces: dict[int, tuple[str, bytes]] = {}

    # Text to tokens

    def read(self, prompt: Any, label: str = "prompt") -> Prompt:
        """A prompt of any form; InputError, naming `label`, if it is empty or leaves no room to answer."""
        read = self._read(prompt, label)
        text, ids, _ = read
        if not ids:
            raise InputError(f"{label} is empty")
        unknown = next((token for token in ids if not 0 <= token < self.rows), None)
        if unknown is not None:
            shown = f" {self.tokenizer.convert_ids_to_tokens(unknown)!r}" if 0 <= unknown < len(self.tokenizer) else ""
            raise InputError(f"{label} has token {unknown}{shown}, {self.name} embeds {self.rows} tokens")
        if self.context is not None and len(ids) >= self.context:
            raise InputError(
                f"{label} has {len(ids)} tokens, {self.name} reads {self.context} and needs room for one "
                f"more: {text[:40]!r}..."
            )
        return read

    def _read(self, prompt: Any, label: str) -> Prompt:
        if isinstance(prompt, PromptKey):
            prompt = prompt.form
        if isinstance(prompt, Mapping):
            prompt = form_of(prompt, label)
        if isinstance(prompt, str):
            self.fits(prompt, label)
            return Prompt(prompt, self.encode(prompt, label))
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise InputError(f"{label} is not a string, token ids or messages: {prompt!r:.80}")
        if all(type(token) is int for token in prompt):
            return Prompt(
                self.decode(prompt) if all(0 <= t < len(self.tokenizer) for t in prompt) else "", list(prompt)
            )
        text = self.render(prompt, label)
        return Prompt(text, self.pieces(text, label), list(prompt))

    def fits(self, text: str, label: str = "prompt") -> None:
        """InputError for a text that is too long however long its tokens are, before it is cut into them."""
        if self.context is not None and len(text) > self.context * self._longest:
            says = (
                f"{label} has {len(text)} characters, more than the {self.context} tokens that {self.name} reads hold"
            )
            raise InputError(says)

    def converse(self, messages: Any, label: str = "messages", ended: bool = False) -> list[int]:
        """The token ids of `render`."""
        return self.pieces(self.render(messages, label, ended), label)

    def encode(self, text: str, label: str = "prompt") -> list[int]:
        """Token ids of a text, with the special tokens that this tokenizer begins one with, none of them twice."""
        ids = self._tokens(text, label)
        bos = self.tokenizer.bos_token_id
        twice = bos is not None and ids[:2] == [bos, bos] and text.startswith(self.tokenizer.bos_token)
        return ids[1:] if twice else ids

    def pieces(self, text: str, label: str = "text") -> list[int]:
        """Token ids of a text that is a part of one: without special tokens around it."""
        return self._tokens(text, label, add_special_tokens=False)

    def _tokens(self, text: str, label: str, **options: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{label} is not valid Unicode: {error.reason} at character {error.start}") from error
        return list(self.tokenizer(text, verbose=False, **options).input_ids) if text else []

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def render(self, messages: Any, label: str = "messages", ended: bool = False) -> str:
        """The text of a conversation by the tokenizer's template, ready to be answered.

        A last message of the assistant is continued or, if it has ended, whole. InputError, naming `label`, where there
        is no template or it takes no such messages.
        """
        for message in messages:
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message):
                raise InputError(f'{label}: a message is {{"role", "content"}}, got {message!r:.80}')
        if not self.templated:
            raise InputError(f"{label}: the tokenizer of {self.name} has no chat template; give the text itself")
        more = messages[-1]["role"] == "assistant"
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not more,
                continue_final_message=more and not ended,
            )
        except Exception as error:  # the template's own
            raise InputError(f"{label}: the chat template of {self.name} refuses it: {first_line(error)}") from error

    # Tokens to text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens.

        As the tokenizer has it, but where byte tokens (`<0xE5>`) make no characters: a decoder breaks the whole run of
        them, here what is a character stays one and only the other bytes become U+FFFD.
        """
        kept = [i for i in ids if i not in self.special] if skip_special_tokens else list(ids)
        runs = [] if not self._bytes else list(_runs(kept, self._bytes))
        if all(_is_text(data) for _, _, data in runs):
            return self._decoded(kept)
        parts, start, before = [], 0, list[int]()
        for first, last, data in runs:
            parts += [self._behind(before, kept[start:first]), data.decode(errors="replace")]
            start, before = last, kept[:last]
        return "".join(parts) + self._behind(before, kept[start:])

    def _behind(self, before: list[int], ids: list[int]) -> str:
        """What ids that do not begin or end inside a character add after others."""
        if not before or not ids:
            return self._decoded(ids)
        ordinary = next((i for i in reversed(before) if i not in self._bytes), None)
        context = [] if ordinary is None else [ordinary]
        if not context:  # a text that begins with bytes: any other token stands for them
            context = [next(i for i in ids if i not in self._bytes)]
        return self._decoded(context + ids)[len(self._decoded(context)) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def _letters(self) -> dict[str, int]:
        return _byte_letters(self.tokenizer)

    def piece(self, token: int) -> tuple[str, bytes]:
        """The text and the bytes of one token in the middle of a text. One that is a part of a character has its own
        bytes, and U+FFFD as text."""
        if token not in self._pieces:
            before = self.pieces("a")[-1:]
            text = self._decoded([*before, token])[len(self._decoded(before)) :]
            letters = self.tokenizer.convert_ids_to_tokens(token) or ""
            if token in self._bytes:
                data = bytes([self._bytes[token]])
            elif BROKEN in text and all(letter in self._letters for letter in letters):
                data = bytes(self._letters[letter] for letter in letters)
            else:
                data = text.encode()
            self._pieces[token] = text, data
        return self._pieces[token]

    def after(self, ids: Sequence[int], skip_special_tokens: bool = True) -> Text:
        """The text that is to follow these tokens, empty so far."""
        return Text(self, tuple(ids), skip_special_tokens)

    def between(self, before: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text that `ids` add after `before`, a character that is not whole at its end shown as U+FFFD."""
        return self.after(before, skip_special_tokens).push(ids, last=True)


@dataclass
class Text:
    """The text of a response that grows: what `push` gives joins to decode(prompt + response) without decode(prompt).

    A character that is not whole yet is held back until it is. Only the tokens since the last whole one are decoded
    anew, with a few before them, so that a response costs what it is long.
    """

    codec: Codec
    pending: tuple[int, ...]  # tokens whose text has not all been given, after a few whose text has
    skip_special_tokens: bool
    text: str = ""  # so far
    whole: bool = field(init=False)  # all of pending's text has been given, so that it may be forgotten
    given: str = field(init=False)  # the beginning of pending's text that has been given, or is the prompt's

    def __post_init__(self) -> None:
        self._settle(self.pending)

    def copy(self) -> Text:
        """A fork, which grows apart from now on."""
        if self.whole:
            self._settle(self.pending)  # once for all that are made
        other = object.__new__(Text)  # as `copy.copy` makes it, in a fraction of the time
        other.__dict__.update(self.__dict__)
        return other

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The new text, once these tokens have followed. last: none will follow, so that nothing is held back."""
        if self.whole:
            self._settle(self.pending)
        self.pending = (*self.pending, *ids)
        everything = self.codec.decode(self.pending, self.skip_special_tokens)
        known = _common(self.given, everything)
        end = len(everything if last else everything.rstrip(BROKEN))
        new = everything[known:end]
        self.text += new
        self.given = everything[: max(known, end)]
        self.whole = len(self.given) == len(everything)
        return new

    def _settle(self, ids: tuple[int, ...]) -> None:
        """Forget all but a few tokens: the last that have text and begin and end with whole characters."""
        reach, skip = REACH, self.skip_special_tokens
        while True:
            self.pending = ids[-reach:]
            self.given = self.codec.decode(self.pending, skip)
            if reach >= len(ids) or (
                self.given.strip() and not self.given.startswith(BROKEN) and not self.given.endswith(BROKEN)
            ):
                break
            reach *= 2
        self.whole = False  # settled already


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _byte_tokens(tokenizer: Any, vocabulary: Mapping[str, int]) -> dict[int, int]:
    """{id: byte} of tokens that stand for one byte each, where the tokenizer falls back to them."""
    byte = re.compile(r"<0x([0-9A-F]{2})>")
    found = ((i, byte.fullmatch(token)) for token, i in vocabulary.items())
    values = {i: int(match[1], 16) for i, match in found if match}
    # A tokenizer that does not fall back may have such tokens all the same, which are their own text then.
    letter = next((i for i, value in values.items() if value == ord("A")), None)
    return {} if letter is None or tokenizer.decode([letter]).strip() != "A" else values


def _byte_letters(tokenizer: Any) -> dict[str, int]:
    """{letter: the byte that it stands for} in the tokens of a byte-level tokenizer; none in others'."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # half a second, where no tokenizer is loaded

    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return {letter: byte for byte, letter in bytes_to_unicode().items()} if "ByteLevel" in str(decoder) else {}


def _runs(ids: Sequence[int], values: Mapping[int, int]) -> list[tuple[int, int, bytes]]:
    """(first, past the last, bytes) of each run of byte tokens."""
    runs, start = [], None
    for i, token in enumerate([*ids, -1]):
        if token in values:
            start = i if start is None else start
        elif start is not None:
            runs.append((start, i, bytes(values[t] for t in ids[start:i])))
            start = None
    return runs


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
