"""Where a branch ends, and which part of its text a stream may show.

A branch ends with an EOS token, a stop token, the token that completes a stop string, or its last one. Whichever it is,
it ends there however its tokens came: one by one or a block at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pyengine.codec import Text
from pyengine.results import FinishReason, SamplingParams


class Finish(NamedTuple):
    """Why a branch ended. stop_reason: the stop string or the stop token's id, None for an EOS token or the length."""

    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Ends:
    """Where the branches of one request end.

    limit: tokens that a response has at most. eos, tokens, strings: end it once it has more than min_tokens. included:
    whether the text keeps the stop string or stop token.
    """

    limit: int
    eos: frozenset[int] = frozenset()
    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    min_tokens: int = 0
    included: bool = False


def ends_of(params: SamplingParams, eos: Collection[int], limit: int) -> Ends:
    """Where `params` end a response for which there is room for `limit` tokens."""
    return Ends(
        limit=min(limit, params.max_tokens),
        eos=frozenset() if params.ignore_eos else frozenset(eos),
        tokens=frozenset(params.stop_token_ids or ()),
        strings=tuple(params.stop or ()),
        min_tokens=params.min_tokens,
        included=params.include_stop_str_in_output,
    )


@dataclass
class Branch:
    """A response that grows until it ends: its text so far, from the first token behind the prompt.

    grown: the detokeniser, behind the prompt. count: tokens that are there. finish: set once it has ended. text: what
    the response says, cut at the stop string; whole once it has ended.
    """

    ends: Ends
    grown: Text
    count: int = 0
    finish: Finish | None = None
    text: str = ""
    shown: int = 0  # characters that `show` has given

    def fork(self) -> Branch:
        """One that grows apart from now on."""
        other = object.__new__(Branch)
        other.__dict__.update(self.__dict__)
        other.grown = self.grown.copy()
        return other

    def push(self, tokens: Sequence[int]) -> int:
        """Append tokens up to the one that ends the branch; how many those are. Those behind it are not looked at."""
        if self.finish is not None:
            return 0
        last = self._ends_with(tokens)
        kept, finish = (tokens, None) if last is None else (tokens[: last[0] + 1], last[1])
        if self.ends.strings and len(kept) > 1 and self._may_stop(kept):
            for i, token in enumerate(kept):  # which of them completes it
                self._append([token], finish if i + 1 == len(kept) else None)
                if self.finish is not None:
                    return i + 1
        else:
            self._append(kept, finish)
        return len(kept)

    def end(self, finish: Finish) -> None:
        """It ends with what is there, for a reason that its tokens do not show."""
        self._append([], finish)

    def show(self) -> str:
        """Text that was not shown yet and can be: nothing that may turn out to begin a stop string."""
        end = len(self.text)
        if self.finish is None:
            end -= begun(self.text, self.ends.strings)
        new, self.shown = self.text[self.shown : end], max(self.shown, end)
        return new

    def _ends_with(self, tokens: Sequence[int]) -> tuple[int, Finish] | None:
        """The first of the tokens that ends the branch by what it is or by being the last, with why."""
        if self.count + len(tokens) < self.ends.limit and self.ends.eos.union(self.ends.tokens).isdisjoint(tokens):
            return None
        for i, token in enumerate(tokens):
            at = self.count + i + 1
            if at > self.ends.min_tokens:
                if token in self.ends.eos:
                    return i, Finish("stop")
                if token in self.ends.tokens:
                    return i, Finish("stop", token)
            if at >= self.ends.limit:
                return i, Finish("length")
        return None

    def _may_stop(self, tokens: Sequence[int]) -> bool:
        """Whether the text has a stop string that ends behind what is there."""
        ahead = self.grown.copy()
        ahead.push(tokens)
        return completed(ahead.text, len(self.grown.text), self.ends.strings) is not None

    def _append(self, tokens: Sequence[int], finish: Finish | None) -> None:
        """Tokens of which only the last can complete a stop string or, with `finish`, end the branch otherwise."""
        before = len(self.grown.text)
        self.count += len(tokens)
        left_out = finish is not None and finish.stop_reason is not None and not self.ends.included
        self.grown.push(tokens[:-1] if left_out else tokens, last=finish is not None)
        self.text, self.finish = self.grown.text, finish
        if self.ends.strings and self.count > self.ends.min_tokens:
            found = completed(self.grown.text, before, self.ends.strings)
            if found is not None:
                start, string = found
                self.text = self.text[: start + len(string) if self.ends.included else start]
                self.finish = Finish("stop", string)


def completed(text: str, before: int, strings: Collection[str]) -> tuple[int, str] | None:
    """The stop string that the text behind its first `before` characters completes first, and where it begins.

    Of those that end at the same character, the longest. None if there is none.
    """
    found = [(text.find(string, max(0, before + 1 - len(string))), string) for string in strings]
    ends = [(start + len(string), start, string) for start, string in found if start >= 0]
    if not ends:
        return None
    _, start, string = min(ends)
    return start, string


def begun(text: str, strings: Collection[str]) -> int:
    """How many characters at the end of the text are the beginning of a stop string, at most."""
    longest = min(len(text), max((len(string) - 1 for string in strings), default=0))
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in strings if len(s) > n)), 0)
