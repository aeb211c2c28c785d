"""What clients get: OpenAI's objects, whole or in pieces, with what the engine knows beside them under `tilt`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from pyengine.serve.wire import Done, Piece, Places, Token


@dataclass
class Answer:
    """One HTTP answer.

    tokens, texts: of each prompt, n choices each. echo: each choice begins with its prompt's text. silent: without a
    token, as only the prompt's own log-probabilities were asked for. top: likeliest tokens asked for at each place.
    running: each piece says how many tokens there are so far. ids: each choice and piece has its tokens' ids too.
    """

    model: str
    chat: bool
    n: int
    echo: bool = False
    silent: bool = False
    top: int = 0
    running: bool = False
    ids: bool = False
    tokens: Sequence[int] = ()
    texts: Sequence[str] = ()
    drawn: int = 0  # of all branches
    committed: dict[int, int] = field(default_factory=dict)  # tokens of each choice
    firsts: dict[int, Places | None] = field(default_factory=dict)  # what is known of each prompt's tokens
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice that were given
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid4().hex
        self.created = int(time.time())

    def _object(self, piece: bool, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * piece) if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    # Whole

    def whole(self, done: Sequence[Done]) -> dict[str, Any]:
        """The object of all choices, in their order."""
        done = sorted(done, key=lambda one: one.choice)
        for one in done:
            self.firsts.setdefault(one.choice // self.n, one.prompt_logprobs)
        choices = [self._choice(one) for one in done]
        return self._object(False, choices) | {"usage": self.usage()}

    def _choice(self, done: Done) -> dict[str, Any]:
        self.count(done)
        if self.chat:
            content = {"role": "assistant", "content": done.text, "refusal": None}
            logprobs = self._logprobs(done.choice, done.logprobs)
            return {"index": done.choice, "message": content, "logprobs": logprobs} | _end(done)
        before = self.texts[done.choice // self.n] if self.echo else ""
        if self.silent:
            done = done._replace(text="", logprobs=None if done.logprobs is None else [], logp=None)
        places = done.logprobs
        first = self.firsts[done.choice // self.n]
        if places is not None and first is not None:
            places = [*first, *places]
        text = before + done.text
        ids = {"token_ids": [] if self.silent else done.tokens} if self.ids else {}
        return {"index": done.choice, "text": text, "logprobs": self._logprobs(done.choice, places)} | ids | _end(done)

    def count(self, done: Done) -> None:
        self.committed[done.choice] = 0 if self.silent else len(done.tokens)
        self.drawn += done.drawn_tokens

    def usage(self) -> dict[str, Any]:
        return self._so_far() | {"completion_tokens_details": {"tilt_drawn_tokens": self.drawn}}

    def _so_far(self) -> dict[str, Any]:
        prompt, committed = sum(self.tokens), sum(self.committed.values())
        return {"prompt_tokens": prompt, "completion_tokens": committed, "total_tokens": prompt + committed}

    # In pieces

    def first(self, index: int) -> dict[str, Any] | None:
        """The piece with which a choice begins: the role, or the prompt that is to be echoed."""
        if self.chat:
            return self._piece(index, {"role": "assistant", "content": ""})
        return self._piece(index, self.texts[index // self.n]) if self.echo else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        if not self.silent:
            self.committed[piece.choice] = self.committed.get(piece.choice, 0) + len(piece.tokens)
        told: dict[str, Any] = {"kl": piece.kl}
        if piece.block is not None:
            told["block"] = piece.block
        ids = {"token_ids": [] if self.silent else piece.tokens} if self.ids else {}
        content = {"content": piece.text} if self.chat else "" if self.silent else piece.text
        return self._piece(piece.choice, content, self._logprobs(piece.choice, piece.logprobs), tilt=told, **ids)

    def last(self, done: Done) -> dict[str, Any]:
        self.count(done)
        return self._piece(done.choice, {} if self.chat else "", **_end(done))

    def _piece(self, index: int, content: Any, logprobs: Any = None, **told: Any) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta" if self.chat else "text": content,
            "logprobs": logprobs,
            "finish_reason": None,
        }
        whole = self._object(True, [choice | told])
        return whole | {"usage": self._so_far()} if self.running else whole

    def final(self) -> dict[str, Any]:
        """Without choices: what it all took."""
        return self._object(True, []) | {"usage": self.usage()}

    # Log-probabilities

    def _logprobs(self, index: int, places: Places | None) -> dict[str, Any] | None:
        if places is None:
            return None
        if self.chat:
            return {
                "content": [_shown(one) | {"top_logprobs": [_shown(o) for o in top[: self.top]]} for one, top in places]
            }
        at = [self.offsets.get(index, 0)]
        for token, _ in places:
            at.append(at[-1] + len(token.text))
        self.offsets[index] = at.pop()
        return {
            "tokens": [token.text for token, _ in places],
            "token_logprobs": [token.logprob for token, _ in places],
            "top_logprobs": [_likeliest(top) for _, top in places],
            "text_offset": at,
            "base_token_logprobs": [token.base_logprob for token, _ in places],
        }


def _likeliest(top: Sequence[Token]) -> dict[str, float | None] | None:
    """From the likeliest on; of tokens that look alike the likelier one."""
    found: dict[str, float | None] = {}
    for one in top:
        found.setdefault(one.text, one.logprob)
    return found or None


def _shown(one: Token) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data), "base_logprob": one.base_logprob}


def _end(done: Done) -> dict[str, Any]:
    """Why a choice ended, and what the engine knows of it: scores, KL in nats, the seed that gives it again."""
    tilt: dict[str, Any] = {
        "reward": done.reward,
        "rewards": done.rewards,
        "kl": done.kl,
        "kl_kind": done.kl_kind,
        "seed": done.seed,
        "drawn_tokens": done.drawn_tokens,
    }
    tilt |= {} if done.blocks is None else {"candidates": done.blocks}
    tilt |= {} if done.logp is None else {"logp_base": done.logp[0], "logp_policy": done.logp[1]}
    return {"finish_reason": done.finish_reason, "stop_reason": done.stop_reason, "tilt": tilt}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
