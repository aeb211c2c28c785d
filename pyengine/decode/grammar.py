"""Structured output: which tokens keep a response inside a grammar. xgrammar compiles it and follows it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyengine.codec import BROKEN, Codec
from pyengine.errors import InputError, first_line

KEPT = 2**28  # bytes of compiled grammars for each tokenizer; what was used longest ago goes first
CHECKED = 256  # tokens whose bytes are compared with the text that they add
_compilers: WeakKeyDictionary[Codec, dict[tuple[int, frozenset[int]], Any]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar compiled for one tokenizer and vocabulary."""

    compiled: Any

    def matcher(self) -> Matcher:
        """At the beginning of a response."""
        return Matcher(_xgrammar().GrammarMatcher(self.compiled))


class Matcher:
    """Where one branch is in its grammar."""

    def __init__(self, state: Any) -> None:
        self._state = state

    @property
    def ended(self) -> bool:
        """An EOS token was drawn: nothing follows."""
        return bool(self._state.is_terminated())

    def fork(self) -> Matcher:
        """One that goes its own way from here; microseconds, however long the response is."""
        return Matcher(self._state.fork())

    def push(self, token: int) -> None:
        """The branch has one more token; what follows its end is not looked at."""
        if not self.ended:
            self._state.accept_token(token)

    def fill(self, bits: Tensor, row: int) -> None:
        """Write the tokens that may come next into a row of int32 words, a bit for each; all once it has ended."""
        if not self.ended:
            self._state.fill_next_token_bitmask(bits, row)


def forbid(logits: Tensor, matchers: Mapping[int, Matcher]) -> None:
    """-inf, in place, at each token of logits [N, V] (fp32) with which a row of `matchers` would leave its grammar."""
    xgrammar = _xgrammar()
    bits = xgrammar.allocate_token_bitmask(*logits.shape)  # all ones
    for row, matcher in matchers.items():
        matcher.fill(bits, row)
    xgrammar.apply_token_bitmask_inplace(logits, bits.to(logits.device), indices=list(matchers))


def compile_grammar(grammar: Mapping[str, Any], codec: Codec, vocab: int, eos: Collection[int]) -> Grammar:
    """SamplingParams.grammar for a model with logits of `vocab` tokens; compiled once as long as the codec lives.

    A response ends with one of `eos` exactly where the grammar may end. InputError, which names the grammar, where it
    does not compile or nothing fits it; and for a tokenizer whose tokens are not bytes.
    """
    compilers = _compilers.setdefault(codec, {})
    key = (vocab, frozenset(eos))
    if key not in compilers:
        compilers[key] = _compiler(codec, vocab, sorted(eos))
    ((kind, given),) = grammar.items()
    shown = f"SamplingParams: grammar {kind} {given!r:.80}"
    try:
        compiled = _compiled(compilers[key], kind, given)
        found = Grammar(compiled)
        found.matcher().fill(bits := torch.zeros(1, (vocab + 31) // 32, dtype=torch.int32), 0)
    except (RuntimeError, ValueError, TypeError) as error:  # xgrammar's own, and json's
        reason = re.sub(r"^\[[\d:]+\] \S+: ", "", first_line(error))
        raise InputError(f"{shown} does not compile: {reason}") from error
    if not bits.any():
        raise InputError(f"{shown}: no token of {codec.name} can begin it")
    return found


def _compiled(compiler: Any, kind: str, given: Any) -> Any:
    if kind == "json":
        return compiler.compile_json_schema(given if isinstance(given, str) else json.dumps(given))
    if kind == "json_object":
        return compiler.compile_json_schema('{"type": "object"}', strict_mode=False)
    return compiler.compile_regex(given) if kind == "regex" else compiler.compile_grammar(given)


def _compiler(codec: Codec, vocab: int, eos: list[int]) -> Any:
    """xgrammar's compiler for the tokens of a codec; special tokens are no text, so that no grammar admits them."""
    xgrammar = _xgrammar()
    if not eos:
        raise InputError(f"SamplingParams: grammar needs an EOS token, {codec.name} has none")
    detected = xgrammar.TokenizerInfo.from_huggingface(codec.tokenizer, vocab_size=vocab, stop_token_ids=eos)
    spelled = [b"" if i in codec.special else token for i, token in enumerate(detected.decoded_vocab)]
    _check_bytes(codec, spelled)
    info = xgrammar.TokenizerInfo(spelled, vocab_size=vocab, stop_token_ids=eos)
    return xgrammar.GrammarCompiler(info, max_threads=torch.get_num_threads(), cache_limit_bytes=KEPT)


def _check_bytes(codec: Codec, spelled: list[bytes]) -> None:
    """InputError where the bytes of a token are not the text that it adds, as with word pieces."""
    known = [i for i, token in enumerate(spelled) if token and i < len(codec.tokenizer)]
    before = [next(i for i in known if spelled[i].isalpha())]
    for i in known[:: max(1, len(known) // CHECKED)]:
        text = spelled[i].decode(errors="replace")
        if BROKEN not in text and text != (found := codec.between(before, [i], skip_special_tokens=False)):
            raise InputError(
                f"SamplingParams: grammar needs a tokenizer whose tokens are bytes; for {codec.name}, token {i} "
                f"would be {text!r} and is {found!r}"
            )


def _xgrammar() -> ModuleType:
    try:
        import xgrammar
    except ImportError as error:
        raise InputError("SamplingParams: grammar needs xgrammar: pip install 'tilt-engine[grammar]'") from error
    return xgrammar
