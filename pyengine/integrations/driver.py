"""Blockwise and best-of-K over a model that somebody else runs.

A host draws K branches of at most M tokens from the same prefix, which its prefix cache keeps; a scorer here reads
them, the engine's own selection keeps one, and the next block is drawn behind it. From the same candidates the same
blocks are kept as by `pyengine.Engine`, and the same objects say so.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

from pyengine.codec import Codec, Prompt, PromptLike, as_prompts
from pyengine.decode import stops
from pyengine.decode.panel import Panel
from pyengine.decode.request import Branch, Request, mix, samples
from pyengine.decode.settle import Judge
from pyengine.decode.shaping import Shape
from pyengine.decoder import PREFILL_TOKENS
from pyengine.errors import InputError, RequestError, first_line
from pyengine.integrations.hosts import Drawn, HostError, asked, cost, host_of, together
from pyengine.integrations.pooled import ASKER, PooledScorer
from pyengine.integrations.texts import TextJudge, Written, check_scorers, text_of
from pyengine.plan import Plan
from pyengine.reader import Reader
from pyengine.results import Event, Result, SamplingParams
from pyengine.scorers import Part, Policy, Scorer, ScorerLike, parts_of
from pyengine.strategies import BestOfK, Blockwise, Strategy, Tokenwise

T = TypeVar("T")
AT_ONCE = 64  # prompts of a call that a host is asked for together
HIDDEN = -1  # stands for a token whose id the host does not show


class BlockwiseDriver:
    """A host's model and a scorer that it is made to follow, block by block; `stream` and `generate` as the engine's.

    client: vLLM's `AsyncLLM`, an `openai.AsyncOpenAI` or a base URL of an endpoint with OpenAI's legacy completions.
    scorer: as `Engine` takes it, but for scorers that read the base policy's hidden states; `PooledScorer` is one
    that a host serves. model: of an endpoint that serves several. tokenizer: the model's (an object, a directory or a
    hub id), for an endpoint that takes and shows token ids, as vLLM and `pyengine serve` do. Without it prompts and
    answers go as texts: each block begins anew behind the text of those before, the id of every token is -1, and
    scorers that read ids are refused. cache_gb: memory for a scorer with a cache of its own, as of `Engine`.

    The siblings of a block have seeds that are functions of (request's seed, prompt, block, branch): the same call
    draws the same from a host that keeps to seeds. logp_base and logp_policy are NaN where the host does
    not say them: vLLM does for a policy as it is, at temperature 0 or 1.

    Raises InputError, with one line that says what to do, for anything that does not fit.
    """

    def __init__(
        self,
        client: Any,
        scorer: ScorerLike | None = None,
        *,
        model: str | None = None,
        tokenizer: Any = None,
        cache_gb: float | None = None,
    ) -> None:
        self._host = host_of(client, model, tokenizer)
        self.parts: list[Part] = parts_of(scorer)
        for part in self.parts:
            if part.scorer.layers:
                raise InputError(
                    f"scorer {part.name!r} reads the base policy's hidden states, which a host does not show: take a "
                    "reward model, a function, a prefix model or an embedding probe, or decode with pyengine.Engine"
                )
        self._budget = None if cache_gb is None else 1e9 * cache_gb
        self._readers: dict[Scorer, Reader] = {}
        self._judge: Judge | None = None
        # One candidate set at a time, but where nothing is computed here. A new thread has torch's default number of
        # threads, and with it other last bits.
        only_pooled = bool(self.parts) and all(isinstance(part.scorer, PooledScorer) for part in self.parts)
        self._threads = ThreadPoolExecutor(
            AT_ONCE if only_pooled else 1, "driver", torch.set_num_threads, (torch.get_num_threads(),)
        )

    async def stream(
        self,
        prompt: PromptLike,
        strategy: Strategy | None = None,
        sampling: SamplingParams | None = None,
    ) -> AsyncIterator[Event]:
        """An event for each block, the last with the result; strategy None is the base policy. Whoever leaves the
        iterator, or is cancelled, ends the branches at the host. A request that cannot be finished ends in its
        RequestError, after the events of what was committed."""
        if sampling is not None and sampling.n > 1:
            raise InputError(f"a stream is of one sample, n is {sampling.n}: stream each with a seed of its own")
        requests, refused = await self._accepted(*samples([prompt], strategy, sampling))
        if refused:
            raise refused[0]
        async for event in self._events(requests[0]):
            yield event

    async def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        strategy: Strategy | Sequence[Strategy | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """A Result for each prompt, in their order, decoded together; arguments and errors as of `Engine.generate`."""
        if errors not in ("raise", "return"):
            raise InputError(f'errors must be "raise" or "return", got {errors!r}')
        prompts, strategies, params = samples(as_prompts(prompts), strategy, sampling)
        requests, refused = await self._accepted(prompts, strategies, params)
        if errors == "raise" and refused:
            raise refused[min(refused)]
        with tqdm(total=len(requests), unit="prompt", delay=2, disable=_hidden(progress), leave=False) as bar:
            at_once = asyncio.Semaphore(AT_ONCE)
            outcomes = await together([self._outcome(request, at_once, bar) for request in requests])
        found: dict[int, Any] = {r.index: one for r, one in zip(requests, outcomes, strict=True)} | refused
        results = [found[i] for i in range(len(prompts))]
        failed = next((one for one in results if isinstance(one, RequestError)), None)
        if errors == "raise" and failed is not None:
            failed.results = results
            raise failed
        return results

    async def _outcome(self, request: Request, at_once: asyncio.Semaphore, bar: Any) -> Result | RequestError:
        async with at_once:
            try:
                async for event in self._events(request):
                    result = event.result
            except RequestError as error:
                return error
            finally:
                bar.update()
        assert result is not None
        return result

    # What is asked for

    async def _ready(self) -> Judge:
        await self._host.ready()
        if self._judge is None:
            codec = self._host.codec
            policy = Policy(self._host.name, 0, 0, 0, torch.device("cpu"), codec and codec.tokenizer)
            if codec is None:
                check_scorers(self.parts)
            for part in self.parts:
                part.scorer.check(policy)
            if codec is not None:
                panel = Panel(policy, 256, self._budget, False, False)
                self._readers = panel.readers(self.parts)
            self._judge = TextJudge(policy) if codec is None else Judge(policy, codec, True)
        return self._judge

    async def _accepted(
        self, prompts: list[Any], strategies: list[Strategy], sampling: list[SamplingParams]
    ) -> tuple[list[Request], dict[int, InputError]]:
        judge = await self._ready()
        codec = self._host.codec
        requests: list[Request] = []
        refused: dict[int, InputError] = {}
        for strategy, params in dict.fromkeys(zip(strategies, map(_Same, sampling), strict=True)):
            _check(strategy, params.params, codec is not None)
        for i, (prompt, own, p) in enumerate(zip(prompts, strategies, sampling, strict=True)):
            plan = Plan(_one_branch(own), self.parts, self._readers, p)
            try:
                read = text_of(prompt, f"prompt {i}") if codec is None else codec.read(prompt, f"prompt {i}")
            except InputError as error:
                refused[i] = error
                continue
            context = None if codec is None else codec.context
            room = p.max_tokens if context is None else min(p.max_tokens, context - len(read.ids))
            requests.append(_request(i, read, plan, room, codec))
        await self._aside(judge.refuse, requests)
        refused |= {r.index: r.error for r in requests if isinstance(r.error, InputError)}
        return [r for r in requests if r.error is None], refused

    async def _aside(self, call: Callable[..., T], *arguments: Any) -> T:
        """The call by a thread beside the event loop."""
        loop = asyncio.get_running_loop()
        ASKER.set((loop, self._host.codec and self._host.codec.tokenizer))
        run = partial(contextvars.copy_context().run, torch.inference_mode()(call))
        return await loop.run_in_executor(self._threads, run, *arguments)

    # Blocks

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        while request.finish_reason is None:
            try:
                await self._draw(request)
                await self._aside(self._settle, request)
            except Exception as error:  # noqa: BLE001 - whatever a host or a scorer's model raises, the others go on
                ours = isinstance(error, InputError)
                request.fail(str(error) if ours else f"{type(error).__name__}: {first_line(error)}", error)
            if request.error is not None:
                raise request.error
            yield _committed(request)

    async def _draw(self, request: Request) -> None:
        """The branches of the next block."""
        plan, done = request.plan, len(request.tokens)
        room = min(plan.strategy.block_tokens or request.limit, request.limit - done)
        prompt: Any = request.prompt_ids + request.tokens
        if self._host.codec is None:
            prompt = request.prompt + request.text.grown.text
        whole = plan.strategy.block_tokens is None and self._host.codec is not None
        asks = [asked(plan.sampling, mix(seed, [done]) % 2**53, room, done, whole) for seed in request.seeds]
        drawn = await together([self._host.draw(prompt, plan.sampling, one) for one in asks])
        request.branches = [self._branch(request, one, room) for one in drawn]

    def _branch(self, request: Request, drawn: Drawn, room: int) -> Branch:
        """A branch as the engine has it, which ends where the engine would end it."""
        name, text = self._host.name, request.text.fork()
        if not 0 <= drawn.size <= room or (drawn.tokens is not None and not drawn.tokens):
            raise HostError(f"{name} was asked for at most {room} tokens of a branch and gave {drawn.size}")
        if drawn.tokens is None:
            read = text.push(list(drawn.text))  # type: ignore[arg-type]  # characters stand for tokens
            kept = _kept(drawn, read)
            tokens = [HIDDEN] * (drawn.size if kept is None else kept)
            if kept is None and not request.plan.selects:
                drawn = drawn._replace(base=None, policy=None)  # of one branch the KL is exact: a bound will not do
            last = len(request.tokens) + drawn.size >= request.limit
        else:
            tokens, last = drawn.tokens[: text.push(drawn.tokens)], False
        if text.finish is None and drawn.finish == "stop":
            reason = drawn.stop_reason
            if isinstance(reason, str):
                raise HostError(f"{name} ended a branch with the stop string {reason!r}, which its tokens do not have")
            text.end(stops.Finish("stop", reason if reason in (request.params.stop_token_ids or ()) else None))
        elif text.finish is None and last:
            text.end(stops.Finish("length"))
        elif text.finish is None and len(tokens) < room:
            raise HostError(f"{name} was asked for {room} tokens of a branch and gave {len(tokens)} for their length")
        kept, nothing = len(tokens), [float("nan")] * len(tokens)
        drawn = _cut(drawn, kept)
        return Branch(
            tokens=tokens,
            logp_base=nothing if drawn.base is None else drawn.base,
            logp_policy=nothing if drawn.policy is None else drawn.policy,
            kl=cost(drawn, request.params, request.plan.selects),
            finish_reason=None if text.finish is None else text.finish.reason,
            ended=True,
            text=text,
        )

    def _settle(self, request: Request) -> None:
        """One branch is kept, and joins the request."""
        judge = self._judge
        assert judge is not None
        chosen: int | None = 0
        if not request.plan.selects:
            if request.branches[0].finish_reason:
                judge.score_ended([request])
        else:
            try:
                self._join(request)
                if request.error is None:
                    chosen = judge.select([request]).get(request)
            finally:
                for reader in dict.fromkeys(request.plan.follows()):
                    reader.end(whole=False)
                request.stems = {}
        if request.error is not None or chosen is None:
            return
        branch = request.branches[chosen]
        request.tokens += branch.tokens
        request.logp_base += branch.logp_base
        request.logp_policy += branch.logp_policy
        request.kl_tokens += branch.kl
        assert branch.text is not None
        request.text, request.finish_reason = branch.text, branch.finish_reason

    def _join(self, request: Request) -> None:
        """Readers read the prefix, for the branches behind it; nothing is there but this request."""
        for reader in request.plan.follows():
            ids, longest = request.prompt_ids + request.tokens, max(len(b.tokens) for b in request.branches)
            reason = reader.refuses(len(ids), 0, request.plan.k, longest)
            reader.begin()
            stem = None if reason else reader.join(ids, 0)
            if stem is None:
                return request.fail(reason or f"scorer {reader.name!r} has no memory for {len(ids)} tokens (cache_gb)")
            request.stems[reader] = stem
            while stem.at is None:
                for _, at in reader.prefill([stem], PREFILL_TOKENS):
                    stem.at = at
        return None


def _committed(request: Request) -> Event:
    """The event of what has just joined a request."""
    if request.plan.selects:
        block = request.blocks[-1]
        picked = block.candidates[block.chosen]
        event = Event(picked.text, picked.tokens, block, kl=request.kl(len(request.blocks)))
    else:
        event = Event(request.text.show(), request.branches[0].tokens, kl=request.kl(0))
    if request.finish_reason is not None:
        event.result = request.result()
    return event


def _kept(drawn: Drawn, read: int) -> int | None:
    """Tokens that make up its first `read` characters; None where the tokens' texts do not make up its text.

    A special token that was left out of the text adds nothing."""
    if read == len(drawn.text):
        return drawn.size
    ends = [0]
    for piece in drawn.pieces or ():
        ends.append(ends[-1] + len(piece) * drawn.text.startswith(piece, ends[-1]))
    return next(i for i, end in enumerate(ends) if end >= read) if ends[-1] == len(drawn.text) else None


def _cut(drawn: Drawn, kept: int) -> Drawn:
    """The first tokens of it; those behind the end of the branch go."""
    base, policy = drawn.base and drawn.base[:kept], drawn.policy and drawn.policy[:kept]
    return drawn._replace(size=kept, tokens=drawn.tokens and drawn.tokens[:kept], base=base, policy=policy)


def _request(index: int, read: Prompt, plan: Plan, room: int, codec: Codec | None) -> Request:
    params = plan.sampling
    assert params.seed is not None
    if codec is None:  # characters stand for tokens, and what ends it but a stop string the host says
        ends = stops.Ends(limit=2**62, strings=tuple(params.stop or ()), included=params.include_stop_str_in_output)
        text = stops.Branch(ends, Written())  # type: ignore[arg-type]
        prompt_ids = list(read.text.encode())  # of the seeds
    else:
        eos = {codec.tokenizer.eos_token_id} - {None}
        text = stops.Branch(stops.ends_of(params, eos, room), codec.after(read.ids, params.skip_special_tokens))
        prompt_ids = read.ids
    request = Request(index, read.text, prompt_ids, plan, room, params.seed, text, Shape(), read.messages)
    if codec is None:
        request.prompt_ids = []
    return request


# What a host can be asked for


@dataclass(frozen=True, eq=False)
class _Same:
    """Parameters by identity."""

    params: SamplingParams


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _one_branch(strategy: Strategy) -> Strategy:
    """The base policy is one whole response."""
    return BestOfK(1) if isinstance(strategy, Tokenwise) else strategy


def _check(strategy: Strategy, params: SamplingParams, ids: bool) -> None:
    """InputError for what cannot be asked of a host."""
    if isinstance(strategy, Tokenwise) and (strategy.weight or strategy.kl_budget):
        raise InputError(
            "Tokenwise changes every token's distribution, from which only the host itself can draw: use the vLLM "
            "plug-in (pyengine.integrations.vllm), or Blockwise or BestOfK"
        )
    for name in ("grammar", "logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            raise InputError(f"SamplingParams: {name} is not there over a host; decode with pyengine.Engine")
    if isinstance(strategy, Blockwise) and params.max_tokens > strategy.block_tokens:
        for name in ("presence_penalty", "frequency_penalty", "bad_words"):
            if getattr(params, name):
                raise InputError(
                    f"SamplingParams: a host counts {name} from the first token of a block, not of the response: leave "
                    "it out, or use BestOfK or pyengine.Engine"
                )
    if not ids and params.stop and params.min_tokens:
        raise InputError("SamplingParams: min_tokens beside stop needs the tokens of a host: give tokenizer")
