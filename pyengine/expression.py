"""Sums and transforms of scorers in one line of text, `0.7*helpful + brief`: read by a grammar, never evaluated.

Precedence is Python's, so that a line means what the same line of Python does:

    expression = sum {"&" sum}
    sum        = product {("+" | "-") product}
    product    = ["-"] {NUMBER "*"} factor
    factor     = "(" expression ")" | FUNCTION "(" expression ["," REFERENCE] ")" | NAME

A NAME is what `scorer_named` takes and goes on to the next space or one of ( ) , & * +; one with any of these inside
stands in quotes. A minus inside a name is the name's: `a - b` subtracts, `a-b` is a scorer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pyengine.errors import InputError
from pyengine.named import scorer_named

if TYPE_CHECKING:  # torch takes seconds that `pyengine --help` need not spend
    from pyengine.scorers.base import ScorerLike

# Of `pyengine.rewards`: what their second argument is; "" where they take one alone.
FUNCTIONS = {"lsc": "references", "centred": "references", "normalised": "statistics", "log_sigmoid": ""}
# A minus that begins a token is one of its own: inside a word it is the word's.
TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[-()&,*+])|'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<word>[^\s()&,*+'"]+))""",
)
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e-?\d+)?", re.IGNORECASE)
DEEPEST = 50  # brackets in brackets


class Token(NamedTuple):
    """A mark, a word or a quoted name; at: of its first character, from 1."""

    kind: str
    text: str
    at: int


def scorer_of(text: str) -> ScorerLike:
    """A scorer by its name (see `scorer_named`), or what an expression of such names says.

    A directory, or a function of a file, that is there under this very name is that, whatever is in its name.

    Raises InputError, with the place, for a line that is no expression, and as `scorer_named` and the transforms do.
    """
    source, _, function = text.rpartition(":")
    if os.path.isdir(text) or (function.isidentifier() and os.path.isfile(source)):  # also where it is no path at all
        return scorer_named(text)
    words = list(_tokens(text))
    if not text or (len(words) == 1 and words[0].kind != "mark"):
        text = words[0].text if words else text
        return scorer_named(text)
    reader = _Reader(text, words)
    found = reader.expression(0)
    if reader.next.kind != "end":
        reader.refuse(f"expected + - & or the end, found {reader.next.text!r}")
    return found if len(found) > 1 or found[0][0] != 1 else found[0][1]


def _tokens(text: str) -> Iterator[Token]:
    at = 0
    while text[at:].strip():
        found = TOKEN.match(text, at)
        if not found:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise InputError(f"scorer {text!r}: the quote at character {at + 1} is not closed")
        kind = str(found.lastgroup)
        yield Token(kind if kind in ("mark", "word") else "quoted", found[kind], found.start(kind) + 1)
        at = found.end()


class _Reader:
    """Recursive descent over the tokens of one line."""

    def __init__(self, text: str, tokens: list[Token]) -> None:
        self.text, self.tokens = text, [*tokens, Token("end", "the end", len(text) + 1)]

    @property
    def next(self) -> Token:
        return self.tokens[0]

    def refuse(self, what: str, at: int | None = None) -> NoReturn:
        raise InputError(f"scorer {self.text!r}: {what} at character {at or self.next.at}")

    def mark(self, *marks: str) -> str | None:
        """The next token, taken, if it is one of these."""
        if self.next.kind == "mark" and self.next.text in marks:
            return self.tokens.pop(0).text
        return None

    def close(self, what: str) -> None:
        if not self.mark(")"):
            self.refuse(f"expected {what}, found {self.next.text!r}")

    def made(self, at: int, make: Callable[[], Any]) -> Any:
        """What `make` gives; its InputError says where it was asked for."""
        try:
            return make()
        except InputError as error:
            raise InputError(f"scorer {self.text!r}, at character {at}: {error}") from error

    def expression(self, depth: int) -> Any:
        if depth > DEEPEST:
            self.refuse(f"more than {DEEPEST} brackets are open")
        found = self.sum(depth)
        while self.next[:2] == ("mark", "&"):
            at = self.tokens.pop(0).at
            one, other = found, self.sum(depth)
            found = self.made(at, lambda: one & other)
        return found

    def sum(self, depth: int) -> Any:
        found = self.product(depth)
        while sign := self.mark("+", "-"):
            other = self.product(depth)
            found = found + other if sign == "+" else found - other
        return found

    def product(self, depth: int) -> Any:
        weight = -1.0 if self.mark("-") else 1.0
        while self.next.kind == "word" and NUMBER.fullmatch(self.next.text) and self.tokens[1][:2] == ("mark", "*"):
            weight *= float(self.next.text)
            del self.tokens[:2]
        found = self.factor(depth)
        if self.next[:2] == ("mark", "*"):
            self.refuse("a weight stands before its scorer, as in 0.7*a: unexpected '*'")
        return found if weight == 1 else found * weight

    def factor(self, depth: int) -> Any:
        from pyengine.scorers.base import Sum

        if self.mark("("):
            found = self.expression(depth + 1)
            self.close("')'")
            return found
        token = self.next
        if token.kind in ("mark", "end"):
            self.refuse(f"expected a scorer, found {token.text!r}")
        self.tokens.pop(0)
        if token.kind == "word" and self.mark("("):
            return Sum(((1.0, self.function(token, depth)),))
        return Sum(((1.0, self.made(token.at, lambda: scorer_named(token.text))),))

    def function(self, name: Token, depth: int) -> Any:
        from pyengine import rewards

        if name.text not in FUNCTIONS:
            self.refuse(f"unknown function {name.text!r}, known are {', '.join(FUNCTIONS)};", name.at)
        inside, given = self.expression(depth + 1), []
        if FUNCTIONS[name.text]:
            comma, sign = self.mark(","), -1.0 if self.mark("-") else 1.0
            if not comma or self.next.kind not in ("word", "quoted"):
                self.refuse(f"{name.text} takes a scorer and its {FUNCTIONS[name.text]}: expected them")
            word = self.tokens.pop(0)
            if sign < 0 and not NUMBER.fullmatch(word.text):
                self.refuse(f"{name.text} takes {FUNCTIONS[name.text]}: a sign goes with a number only;", word.at)
            given = [sign * float(word.text) if NUMBER.fullmatch(word.text) else word.text]
        self.close(f"')' of {name.text}")
        transform: Any = getattr(rewards, name.text)
        return self.made(name.at, lambda: transform(list(inside), *given))
