"""The server's core: a process that has the engine, and steps it for whatever the front sends."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

import pyengine
from pyengine.decode.grammar import compile_grammar
from pyengine.decode.request import Handle, samples
from pyengine.engine import Engine
from pyengine.errors import InputError, first_line
from pyengine.named import scorer_named
from pyengine.results import Block, Event, Result, finite
from pyengine.scorers import Scorer, parts_of
from pyengine.serve.wire import (
    Accepted,
    Cancel,
    CoreOptions,
    Detokenize,
    Done,
    Failed,
    Job,
    Piece,
    Places,
    Ready,
    Stats,
    Token,
    Tokenize,
    Wire,
)

log = logging.getLogger("pyengine.serve")
STATS_EVERY = 0.1  # seconds, at most
COMPILED_EVERY = 0.01  # seconds after which it is looked whether a grammar is compiled, where nobody decodes


class Core:
    """The jobs that are under way, and the engine that does them."""

    def __init__(self, options: CoreOptions, wire: Wire) -> None:
        self.wire = wire
        path = pyengine.embedded("policy") if options.model is None else options.model
        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        self.engine = Engine.from_pretrained(
            path,
            device=options.device,
            dtype=dtype,
            quantize=options.quantize,
            max_rows=options.max_rows,
            cache_gb=options.cache_gb,
            batch_invariant=options.batch_invariant,
            trust_remote_code=options.trust_remote_code,
        )
        codec = self.engine.codec
        if options.max_model_len is not None:
            if codec.context is not None and options.max_model_len > codec.context:
                raise InputError(f"max_model_len is {options.max_model_len}, {codec.name} reads {codec.context} tokens")
            codec.context = options.max_model_len
        self.scorers = {name: _scorer(name, source) for name, source in options.scorers}
        self.engine.keep([(1.0, scorer) for scorer in self.scorers.values()])
        self.jobs: dict[int, tuple[Job, dict[int, Handle]]] = {}
        # A grammar may take a minute to compile, in which nobody else is to wait; xgrammar lets go of the GIL.
        self._compiler = ThreadPoolExecutor(1)
        self._compiling: dict[int, tuple[Job, Future[Any]]] = {}
        self.taken = 0
        self._told = 0.0  # when stats were sent
        wire.send(
            [
                Ready(
                    self.engine.name,
                    codec.context,
                    {name: scorer.scores_tokens for name, scorer in self.scorers.items()},
                    codec.templated,
                )
            ]
        )

    def run(self) -> None:
        """Until the front has gone. A step that fails has failed its requests; two in a row are the core's own end."""
        failures = 0
        while not self.wire.closed:
            out: list[Any] = []
            for message in self.wire.take(0 if self.jobs else COMPILED_EVERY if self._compiling else None):
                self._obey(message, out)
            for number, (job, grammar) in list(self._compiling.items()):
                if grammar.done():
                    del self._compiling[number]
                    self._answer(job, grammar, out)
            try:
                self.engine.step()
                failures = 0
            except Exception:
                log.exception("a step failed, and with it the requests that were under way")
                failures += 1
                if failures == 2:
                    raise
            self._collect(out)
            now = time.monotonic()
            if not self.jobs or now - self._told > STATS_EVERY:
                self._told = now
                out.append(Stats(self.taken, self.engine.stats()))
            if out:
                self.wire.send(out)

    # What the front asks for

    def _obey(self, message: Any, out: list[Any]) -> None:
        if isinstance(message, Cancel):
            _, handles = self.jobs.pop(message.number, (None, {}))
            for handle in handles.values():
                handle.cancel()
            self._compiling.pop(message.number, None)
            return
        if isinstance(message, Job):
            self.taken += len(message.prompts) * message.sampling.n
            if message.sampling.grammar is not None:
                codec, vocab, eos = self.engine.codec, self.engine.policy.vocab_size, self.engine.eos
                compiled = self._compiler.submit(compile_grammar, message.sampling.grammar, codec, vocab, eos)
                self._compiling[message.number] = message, compiled
                return
        self._answer(message, None, out)

    def _answer(self, message: Any, grammar: Future[Any] | None, out: list[Any]) -> None:
        """What a job begins with, once its grammar is compiled (and kept by its compiler), or a question's answer."""
        try:
            if grammar is not None:
                grammar.result()
            if isinstance(message, Job):
                self._begin(message, out)
            elif isinstance(message, Tokenize):
                out.append(self._tokens(message))
            elif isinstance(message, Detokenize):
                out.append(Accepted(message.number, [], [self._text(message.ids)]))
        except InputError as error:
            out.append(Failed(message.number, str(error), True))
        except Exception as error:
            log.exception("a request could not be taken")
            out.append(Failed(message.number, f"{type(error).__name__}: {first_line(error)}", False))

    def _begin(self, job: Job, out: list[Any]) -> None:
        scorer = self._followed(job)
        handles: dict[int, Handle] = {}
        try:
            for i, (prompt, strategy, sampling) in enumerate(
                zip(*samples(list(job.prompts), job.strategy, job.sampling), strict=True)
            ):
                if i % job.sampling.n:  # the first sample of a prompt has them for all
                    sampling = replace(sampling, prompt_logprobs=None)
                handles[i] = self.engine.submit(prompt, strategy, sampling, scorer, priority=job.priority)
                if job.listening:
                    handles[i].listen()
        except BaseException as error:
            for handle in handles.values():
                handle.cancel()
            if isinstance(error, InputError):  # to the engine each is a call's only prompt
                at = len(handles) // job.sampling.n
                raise InputError(str(error).replace("prompt 0", f"prompt {at}", 1)) from error
            raise
        self.jobs[job.number] = job, handles
        firsts = [handles[i] for i in range(0, len(handles), job.sampling.n)]
        out.append(Accepted(job.number, [len(h.prompt_ids) for h in firsts], [h.prompt for h in firsts]))

    def _followed(self, job: Job) -> list[tuple[float, Scorer]] | None:
        """What a job's answers are scored by: what it names, or the default where its strategy needs one."""
        named = job.scorers
        if named is None:
            if job.strategy is None:
                return None
            if not self.scorers:
                raise InputError("tilt_strategy: this server has no scorer (--scorer NAME=DIR)")
            named = {next(iter(self.scorers)): 1.0}
        for name in named:
            if name not in self.scorers:
                there = ", ".join(self.scorers) or "none"
                raise InputError(f"tilt_scorer: no scorer {name!r:.80}; this server has {there}")
        return [(weight, self.scorers[name]) for name, weight in named.items()]

    def _tokens(self, message: Tokenize) -> Accepted:
        codec = self.engine.codec
        if isinstance(message.prompt, str):
            codec.fits(message.prompt)
            ids = codec.encode(message.prompt) if message.special else codec.pieces(message.prompt)
        else:
            ids = codec.read(message.prompt).ids
        return Accepted(message.number, ids, [codec.piece(i)[0] for i in ids] if message.pieces else [])

    def _text(self, ids: list[int]) -> str:
        codec = self.engine.codec
        unknown = next((i for i in ids if not 0 <= i < len(codec.tokenizer)), None)
        if unknown is not None:
            raise InputError(f"tokens: {unknown} is no token of {codec.name}, which has {len(codec.tokenizer)}")
        return codec.decode(ids, skip_special_tokens=False)

    # What the front is told

    def _collect(self, out: list[Any]) -> None:
        """What is new of every job; those that are done go."""
        for number, (job, handles) in list(self.jobs.items()):
            for index, handle in list(handles.items()):
                if job.listening:
                    out += [self._piece(job, index, event) for event in handle.take()]
                if handle.done:
                    del handles[index]
                    outcome = handle.outcome()
                    if isinstance(outcome, Result):
                        out.append(self._done(job, index, outcome, handle))
                    else:
                        log.error("a request failed: %s", outcome, exc_info=outcome.__cause__)
                        out.append(Failed(number, getattr(outcome, "reason", str(outcome)), False))
                        for other in handles.values():  # an answer has all its choices, or none
                            other.cancel()
                        handles.clear()
            if not handles:
                del self.jobs[number]

    def _piece(self, job: Job, index: int, event: Event) -> Piece:
        block = event.block
        return Piece(
            job.number,
            index,
            event.text,
            event.tokens,
            event.kl,
            self._places(event.tokens, event.logprobs),
            _shown(block) if block is not None and job.candidates else None,
        )

    def _done(self, job: Job, index: int, result: Result, handle: Handle) -> Done:
        logprobs = None if result.logprobs is None or job.listening else result.logprobs
        asked = result.prompt_logprobs
        return Done(
            job.number,
            index,
            result.text,
            result.tokens,
            result.finish_reason,
            result.stop_reason,
            result.drawn_tokens,
            finite(result.reward),
            finite(result.rewards),
            result.kl,
            result.kl_kind,
            result.seed,
            handle.queued or 0.0,
            [block.ranks[block.chosen] for block in result.blocks],
            self._places(result.tokens, logprobs),
            None if asked is None else self._places(result.prompt_ids, asked),
            [_shown(block) for block in result.blocks] if job.candidates and not job.listening else None,
            None if result.logprobs is None else (result.logp_base, result.logp_policy),
        )

    def _places(self, tokens: list[int], logprobs: list[Any] | None) -> Places | None:
        """What is known of these tokens. JSON has no -inf: a log-probability below -9999 is -9999, as in vLLM."""
        if logprobs is None:
            return None
        places: Places = []
        piece = self.engine.codec.piece
        for token, likeliest in zip(tokens, logprobs, strict=True):
            found = [
                Token(*piece(one.token), one.token, max(one.logprob, -9999.0), max(one.base_logprob, -9999.0))
                for one in likeliest or ()
            ]
            first = Token(*piece(token), token, None, None)
            places.append((next((one for one in found if one.id == token), first), found))
        return places


def _shown(block: Block) -> dict[str, Any]:
    ranks = block.ranks
    candidates = [
        {
            "text": c.text,
            "tokens": c.tokens,
            "scores": finite(c.scores),
            "utility": finite(c.utility),
            "probability": c.probability,
            "base_logprob": c.logp_base,
            "rank": rank,
            "finish_reason": c.finish_reason,
        }
        for c, rank in zip(block.candidates, ranks, strict=True)
    ]
    return {"start": block.start, "chosen": block.chosen, "candidates": candidates}


def _scorer(name: str, source: str) -> Scorer:
    """A scorer under the name that it is registered by."""
    (part,) = parts_of(scorer_named(source))
    part.scorer.name = name
    return part.scorer


def main() -> None:
    """`python -m pyengine.serve.core FD`: the core of the front at the other end of this socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front decides when it ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    options = wire.take(None)[0]
    try:
        core = Core(options, wire)
    except InputError as error:
        wire.send([Failed(0, str(error), True)])
        raise SystemExit(2) from None
    with contextlib.closing(core.engine):
        core.run()


if __name__ == "__main__":
    main()
