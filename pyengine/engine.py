"""The engine: a frozen model, what it is made to follow, and the calls that decode with it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from pyengine.checkpoint import context_of, device_of, ends_of, load_checkpoint, unapplied_defaults
from pyengine.codec import Codec, PromptLike, as_prompts
from pyengine.decode import stops
from pyengine.decode.core import Core
from pyengine.decode.logprobs import prompt_logprobs
from pyengine.decode.panel import Panel, name_of, policy_of
from pyengine.decode.request import Handle, Request, samples
from pyengine.decode.schedule import Schedule
from pyengine.decode.settle import Judge
from pyengine.decode.shaping import Shape, resolve
from pyengine.errors import InputError, RequestError, first_line, real, whole
from pyengine.fallback import choose_decoder
from pyengine.kl_budget import calibrate, spend_budgets
from pyengine.plan import Plan
from pyengine.quantize import check_quantize, narrowed
from pyengine.reader import Reader
from pyengine.results import Event, Result, SamplingParams
from pyengine.scorers import Part, Scorer, ScorerLike, parts_of
from pyengine.strategies import Strategy, Tokenwise

log = logging.getLogger("pyengine")
T = TypeVar("T")


class Engine:
    """A frozen language model, its tokenizer and a scorer that it can be made to follow.

    scorer: anything `parts_of` takes: a Scorer, a directory or hub id, a callable
    f(prompts, completions) -> list[float], a list of (weight, scorer), or a sum such as `0.7 * a + b`; one of weight 0
    is reported and not followed. max_rows: most sequences (prompts times branches) decoded at once, or the branches of
    one prompt if those are more; other prompts wait until some leave. cache_gb: memory for keys and values in GB (1e9
    bytes), allocated once; None is a quarter of the host's free memory, or three fifths of a GPU's. A reward model with
    a cache of its own takes as much again, or that share of what is left. frozen: you vouch that nothing about the
    model and the scorers' models changes while the engine lives (no training, adapters, hooks): then what was read of a
    prompt, and a GPU's captured graphs, serve later calls too, and not only those that are there together; after a
    change all the same, call `forget`.
    batch_invariant: what is drawn for a prompt and a seed, its log-probabilities, KL and scores are the same to the bit
    whatever else is decoded beside it, in whatever order, also in bf16 and fp16; what is drawn is the same for any
    number of threads, too. It costs time (docs/benchmarks.md), is for a CPU, and is refused with the reason for a model
    that has products outside of linear layers, a mixture of experts say. Without it a product sums as the number of its
    rows has it: in fp32 the last bits of a logit move, in bf16 a token may.

    Calls of all threads share each step of one loop. Between its passes the model is yours: a reward may call it,
    another engine decode with it. Each pass runs in evaluation mode, and one at a time whatever the threads.

    Raises InputError, with one line that says what to do, for anything that does not fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scorer: ScorerLike | None = None,
        max_rows: int = 256,
        cache_gb: float | None = None,
        frozen: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"the kernels take fp32, bf16 and fp16, this model is {model.dtype}: give a dtype")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows = whole(max_rows, "Engine: max_rows", 1)
        self.name, self.policy = name_of(model), policy_of(model, tokenizer)
        self.codec = Codec(
            tokenizer, self.policy.name, model.get_input_embeddings().weight.shape[0], context_of(model.config)
        )
        self.eos = ends_of(model)
        budget = None if cache_gb is None else 1e9 * real(cache_gb, "Engine: cache_gb", 0)
        unapplied = unapplied_defaults(model)
        if unapplied:
            log.warning("%s: its generation_config is not applied: %s", self.name, ", ".join(unapplied))
        self.batch_invariant = batch_invariant
        self._decoder = choose_decoder(model, (), max_rows, budget, frozen, batch_invariant)
        self._panel = Panel(self.policy, max_rows, budget, frozen, batch_invariant)
        self._judge = Judge(self.policy, self.codec, batch_invariant)
        self._core = Core(Schedule(self._decoder, self._judge, self.policy.name, batch_invariant))
        self.parts: list[Part] = []
        self._readers: dict[Scorer, Reader] = {}
        self._kept: dict[Scorer, Reader] = {}
        self.set_scorer(scorer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        scorer: ScorerLike | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        max_rows: int = 256,
        cache_gb: float | None = None,
        frozen: bool = False,
        trust_remote_code: bool = False,
        batch_invariant: bool = False,
        quantize: str | None = None,
    ) -> Engine:
        """Load a causal language model from a directory, hub id or GGUF file, which is dequantised; no pickles.

        dtype: fp32 on a CPU and the checkpoint's own elsewhere, unless given. quantize: "int8" keeps the weights of all
        linear layers in eight bits, on a CPU, where decoding takes the time that reading them takes. What such numbers
        cost is measured once and said in the log, in nats a token from fp32. trust_remote_code: run code that comes
        with the checkpoint; never unless asked for.
        """
        cpu = device_of(device).type == "cpu"
        wanted = dtype or (torch.float32 if cpu else None)
        check_quantize(quantize, device, wanted)
        narrow = cpu and (quantize is not None or wanted in (torch.bfloat16, torch.float16))
        model, tokenizer = load_checkpoint(
            AutoModelForCausalLM, "model", path, trust_remote_code, dtype=(None if narrow else wanted) or "auto"
        )
        if narrow:
            log.warning("%s: %s", name_of(model), narrowed(model, wanted, quantize))
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r}: {first_line(error)}") from error
        return cls(model, tokenizer, scorer, max_rows, cache_gb, frozen, batch_invariant)

    @property
    def context(self) -> int | None:
        """Tokens that the model reads, None for any number."""
        return self.codec.context

    def set_scorer(self, scorer: ScorerLike | None) -> None:
        """Follow another scorer by default, from the next request on; None follows none."""
        parts = parts_of(scorer)
        self._panel.check(parts)
        # Whatever cuts this short leaves nothing followed; the memory of readers that nobody needs goes before any is
        # made.
        wanted = {part.scorer for part in parts}
        self.parts, self._readers = [], {s: r for s, r in self._readers.items() if s in wanted}
        self._readers = self._panel.readers(parts)
        self.parts = parts

    def keep(self, scorer: ScorerLike) -> None:
        """Check a scorer that requests will name, and make its cache before the first of them comes."""
        self._kept |= self._followed(scorer)[1]

    def _followed(self, scorer: ScorerLike) -> tuple[list[Part], dict[Scorer, Reader]]:
        parts = parts_of(scorer)
        self._panel.check(parts)
        return parts, self._panel.readers(parts)

    def forget(self) -> None:
        """What was read of prompts, and captured, is not used again: for a `frozen` engine whose model has changed."""
        with self._core.alone("changing its model"):
            self._decoder.forget()
            self._panel.forget()

    @contextmanager
    def following(self, scorer: ScorerLike | None) -> Iterator[None]:
        """Follow another scorer inside; the one that was followed before is back afterwards."""
        before = [part.term() for part in self.parts] or None
        # Back once more where an interrupt cuts the first time short.
        try:
            try:
                self.set_scorer(scorer)
                yield
            finally:
                self.set_scorer(before)
        except BaseException:
            self.set_scorer(before)
            raise

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        strategy: Strategy | Sequence[Strategy | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Decode every prompt; a Result for each, in the order of the prompts, the n samples of one side by side.

        prompts: one or several, each a text, a list of token ids that is used as it is, or a conversation, a list of
        {"role", "content"}, which goes through the tokenizer's template (a last message of the assistant is continued).
        strategy: None is the base policy; one for all prompts, or one for each; sampling likewise. progress: a bar
        on stderr after two seconds; None shows it on a terminal only. errors: what is wrong with one prompt, or with
        decoding or scoring it, never ends the others. "return" puts its InputError in the place of its result;
        "raise" raises a prompt's before any is decoded, and a RequestError once the others are done: they are in
        its `results`.
        """
        if errors not in ("raise", "return"):
            raise InputError(f'errors must be "raise" or "return", got {errors!r}')
        prompts, strategies, params = samples(as_prompts(prompts), strategy, sampling)
        requests, refused = self._accepted(prompts, strategies, params, progress)
        if errors == "raise" and refused:
            raise refused[min(refused)]
        with closing(self._outcomes(requests, refused, progress)) as outcomes:
            found = dict(outcomes)
        results = [found[i] for i in range(len(prompts))]
        failed = [outcome for outcome in results if isinstance(outcome, RequestError)]
        if errors == "raise" and failed:
            failed[0].results = results
            raise failed[0]
        return results

    def as_completed(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        strategy: Strategy | Sequence[Strategy | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
    ) -> Generator[tuple[int, Result | InputError], None, None]:
        """(place among the prompts, its Result or the InputError that says what was wrong) as each is done.

        Prompts that cannot be decoded come first. Arguments as for `generate`.
        """
        return self._outcomes(*self._accepted(*samples(as_prompts(prompts), strategy, sampling), progress), progress)

    def _outcomes(
        self, requests: list[Request], refused: dict[int, InputError], progress: bool | None
    ) -> Generator[tuple[int, Result | InputError], None, None]:
        yield from refused.items()
        yield from self._minded(requests, self._finished(requests, progress))

    def _finished(
        self, requests: list[Request], progress: bool | None
    ) -> Generator[tuple[int, Result | InputError], None, None]:
        hide = None if progress is None else not progress
        done: deque[int] = deque()
        with tqdm(total=len(requests), unit="prompt", delay=2, disable=hide, leave=False) as bar:
            handles = {request.index: self._core.submit(request, done.append) for request in requests}
            while handles:
                self._core.wait(lambda: bool(done), tick=lambda: bar.update(0))
                while done:
                    index = done.popleft()
                    bar.update()
                    outcome = handles.pop(index).outcome()
                    assert isinstance(outcome, (Result, InputError))
                    yield index, outcome

    def _minded(self, requests: list[Request], given: Iterator[T]) -> Generator[T, None, None]:
        """What is given while these are decoded; however that ends, they hold nothing afterwards."""
        # Given back once more where an interrupt cuts the first time short.
        try:
            try:
                yield from given
            finally:
                self._abandon(requests)
        except BaseException:
            self._abandon(requests)
            raise

    def _abandon(self, requests: list[Request]) -> None:
        """Nobody waits for these any more: what they hold is given back. Also of one whose handle an interrupt lost."""
        left = [request for request in requests if request.number and not request.handle.done]
        for request in left:
            request.cancelled = True
        if left:
            self._core.sweep()

    def submit(
        self,
        prompt: PromptLike,
        strategy: Strategy | None = None,
        sampling: SamplingParams | None = None,
        scorer: ScorerLike | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Handle:
        """A request that shares each step with all others that are there; from any thread.

        scorer: None is the engine's own. priority: the lower, the earlier it is served. deadline: seconds from now,
        after which it fails. Whoever waits for the handle drives the engine, unless `start` gave it a thread.
        InputError for what is wrong with the request.
        """
        return self._core.submit(self._request(prompt, strategy, sampling, scorer, priority, deadline))

    def _request(
        self,
        prompt: PromptLike,
        strategy: Strategy | None,
        sampling: SamplingParams | None,
        scorer: ScorerLike | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Request:
        if sampling is not None and sampling.n > 1:
            raise InputError(f"a handle is for one sample, n is {sampling.n}: submit each with a seed of its own")
        requests, refused = self._accepted(*samples([prompt], strategy, sampling), scorer=scorer)
        if refused:
            raise refused[0]
        requests[0].priority = priority
        requests[0].deadline = None if deadline is None else time.monotonic() + deadline
        return requests[0]

    def stream(
        self, prompt: PromptLike, strategy: Strategy | None = None, sampling: SamplingParams | None = None
    ) -> Iterator[Event]:
        """One event for each committed token (base policy, Tokenwise) or block; the last has the result.

        A request that cannot be finished ends in its RequestError, after the events of what was committed.
        """
        request = self._request(prompt, strategy, sampling)
        return self._minded([request], self._events(request))

    def _events(self, request: Request) -> Generator[Event, None, None]:
        yield from self._core.submit(request)

    def start(self) -> None:
        """Give the engine a thread of its own, which decodes whatever is submitted."""
        self._core.start()

    def step(self) -> bool:
        """One pass of the loop by this thread, for a host with a loop of its own; False where nobody is there."""
        if self._core.schedule.idle:
            return False
        self._core.turn()
        return True

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and finish what is there; False where that is not done after so many seconds."""
        return self._core.drain(timeout)

    def close(self) -> None:
        """Take no more requests, and cancel those that are there."""
        self._core.close()

    def stats(self) -> dict[str, Any]:
        """Requests running and waiting, rows, pages and leaves in use, and how many ended in which way so far."""
        return self._core.stats()

    def calibrate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        kl_budget: float,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
    ) -> Tokenwise:
        """Tokenwise with the λ whose KL, averaged over these prompts and seeds, is kl_budget nats within 1 %.

        Decodes all prompts several times, from the same seeds. The fewer they are, the larger the steps in which
        their mean can move: where none falls within 1 %, the nearest is taken, with a warning that says what it is.
        """
        return calibrate(self.generate, as_prompts(prompts), kl_budget, sampling, progress)

    def encode(self, prompt: PromptLike, label: str = "prompt") -> list[int]:
        """Token ids of a prompt; InputError, naming `label`, if it is empty or leaves no room to answer."""
        return self.codec.read(prompt, label).ids

    def _accepted(
        self,
        prompts: list[Any],
        strategies: list[Strategy],
        sampling: list[SamplingParams],
        progress: bool | None = None,
        scorer: ScorerLike | None = None,
    ) -> tuple[list[Request], dict[int, InputError]]:
        """The requests that can be decoded, and what is wrong with each prompt that cannot.

        A budget for whole sequences has become a weight. InputError for what is wrong with the call as a whole.
        """
        parts, readers = (self.parts, self._readers) if scorer is None else self._followed(scorer)
        requests: list[Request] = []
        refused: dict[int, InputError] = {}
        plans: dict[tuple[Strategy, int], tuple[Plan, Shape]] = {}
        for i, (prompt, own, p) in enumerate(zip(prompts, strategies, sampling, strict=True)):
            if (own, id(p)) not in plans:
                shape = resolve(p, self.codec, self.policy.vocab_size, self.eos)
                plans[own, id(p)] = Plan(own, parts, readers, p), shape
            try:
                text, ids, messages = self.codec.read(prompt, f"prompt {i}")
            except InputError as error:
                refused[i] = error
                continue
            room = p.max_tokens if self.context is None else min(p.max_tokens, self.context - len(ids))
            assert p.seed is not None
            grown = stops.Branch(stops.ends_of(p, self.eos, room), self.codec.after(ids, p.skip_special_tokens))
            plan, shape = plans[own, id(p)]
            requests.append(Request(i, text, ids, plan, room, p.seed, grown, shape, messages))
            if p.prompt_logprobs is not None:
                requests[-1].prompt_logprobs = prompt_logprobs(self.model, ids, p.prompt_logprobs)
        # A prompt without a reference is found before any is decoded.
        self._judge.refuse(requests)
        for request in requests:
            self._core.schedule.refuse(request)
            if request.error:
                assert isinstance(request.error, InputError)
                refused[request.index] = request.error
        requests = [request for request in requests if not request.error]
        spend_budgets(self.generate, prompts, requests, progress)
        return requests, refused
