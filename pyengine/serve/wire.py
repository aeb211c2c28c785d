"""What the server's two processes say to each other: pickled messages, each behind its length."""

from __future__ import annotations

import pickle
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyengine.results import SamplingParams
from pyengine.strategies import Strategy

HEADER = struct.Struct("<Q")


@dataclass(frozen=True)
class CoreOptions:
    """What the core makes its engine of. model: a directory or hub id, None for the embedded one. scorers: (name,
    source) each, as `named.scorer_named` takes a source; the first is the default. max_model_len: tokens of prompt and
    answer together, None for what the model reads."""

    model: str | None = None
    scorers: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"
    dtype: str | None = None
    quantize: str | None = None
    max_rows: int = 256
    cache_gb: float | None = None
    max_model_len: int | None = None
    batch_invariant: bool = False
    trust_remote_code: bool = False


# From the front to the core


class Job(NamedTuple):
    """Prompts that one HTTP request asks for, `sampling.n` samples of each. listening: pieces as they are committed.
    candidates: whether blocks come with all their branches."""

    number: int
    prompts: Sequence[Any]
    strategy: Strategy | None
    sampling: SamplingParams
    scorers: dict[str, float] | None
    listening: bool
    candidates: bool
    priority: int = 0


class Cancel(NamedTuple):
    number: int


class Tokenize(NamedTuple):
    """A prompt of any form. special: whether a text gets the special tokens that begin one. pieces: whether its tokens'
    texts are wanted too."""

    number: int
    prompt: Any
    special: bool
    pieces: bool


class Detokenize(NamedTuple):
    number: int
    ids: list[int]


# From the core to the front; `number` is the job's


class Ready(NamedTuple):
    """The core can take requests. scorers: {name: whether it scores every next token}."""

    name: str
    context: int | None
    scorers: dict[str, bool]
    templated: bool


class Failed(NamedTuple):
    """A job cannot be done or finished; asked: whether what was asked for is at fault, not what came on the way."""

    number: int
    message: str
    asked: bool


class Accepted(NamedTuple):
    """tokens: of each prompt, for `Tokenize` the ids; texts: of each prompt, for `Detokenize` what was asked for."""

    number: int
    tokens: list[Any]
    texts: list[str]


class Token(NamedTuple):
    """A token at a place, as the answer shows it. data: its bytes, also where it is but a part of a character."""

    text: str
    data: bytes
    id: int
    logprob: float | None  # None of a prompt's first
    base_logprob: float | None


Places = list[tuple[Token, list[Token]]]  # at each place the token that is there, and the likeliest


class Piece(NamedTuple):
    """A token or block that was committed. kl: nats so far. block: {"start", "chosen", "candidates"}, if asked for."""

    number: int
    choice: int
    text: str
    tokens: list[int]
    kl: float
    logprobs: Places | None
    block: dict[str, Any] | None


class Done(NamedTuple):
    """The end of one sample of a job. ranks: of the branch that each block kept, by the base policy. logp: logp_base
    and logp_policy of `Result`, where log-probabilities are asked for."""

    number: int
    choice: int
    text: str
    tokens: list[int]
    finish_reason: str
    stop_reason: str | int | None
    drawn_tokens: int
    reward: float | None
    rewards: dict[str, float]
    kl: float
    kl_kind: str
    seed: int
    queued: float
    ranks: list[int]
    logprobs: Places | None
    prompt_logprobs: Places | None
    blocks: list[dict[str, Any]] | None
    logp: tuple[list[float], list[float]] | None = None


class Stats(NamedTuple):
    """`Engine.stats`, and how many samples the core has taken so far."""

    taken: int
    engine: dict[str, Any]


def framed(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(data)) + data


class Wire:
    """The core's end: it sends, and takes what is there without waiting, or waits where it has nothing else to do."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._left = bytearray()
        self.closed = False

    def send(self, message: Any) -> None:
        try:
            self._socket.sendall(framed(message))
        except OSError:  # the front has gone
            self.closed = True

    def take(self, timeout: float | None = 0) -> list[Any]:
        """The messages that are there, at most after so many seconds; None waits for one."""
        while not self.closed and select.select([self._socket], [], [], timeout)[0]:
            timeout = 0
            data = self._socket.recv(1 << 20)
            self.closed = not data
            self._left += data
        found, at = [], 0
        while len(self._left) >= at + HEADER.size:
            stop = at + HEADER.size + HEADER.unpack_from(self._left, at)[0]
            if len(self._left) < stop:
                break
            found.append(pickle.loads(memoryview(self._left)[at + HEADER.size : stop]))
            at = stop
        del self._left[:at]
        return found
