"""What draws for `BlockwiseDriver`: an endpoint of OpenAI's completions, or vLLM's `AsyncLLM` in this process.

Either is asked for one branch at a time, with a seed of its own; the host batches what comes together, and its prefix
cache keeps what the branches share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from pyengine.codec import BROKEN, Codec
from pyengine.errors import InputError, first_line
from pyengine.results import FinishReason, SamplingParams

log = logging.getLogger("pyengine")
T = TypeVar("T")

TRIES = 8  # of a request that a busy or unreachable host may be asked again
WAIT, LONGEST = 0.25, 8.0  # seconds before the second of them, doubled each time up to the longest


class HostError(InputError):
    """A host refused a request or could not finish it; the message says which host and what it said."""


class Drawn(NamedTuple):
    """One branch as a host drew it.

    text: what the host makes of its tokens. tokens: with the EOS or stop token, None where the host shows no ids.
    size: tokens. base, policy: log-probability in nats of each token under softmax(logits / T) of the model as the
    request shapes it, and under the distribution that it was drawn from; None where the host does not say.
    stop_reason: the stop string or stop token that ended it. pieces: the text of each token, where shown.
    """

    text: str
    tokens: list[int] | None
    size: int
    base: list[float] | None
    policy: list[float] | None
    finish: FinishReason
    stop_reason: str | int | None = None
    pieces: list[str] | None = None


class Host(Protocol):
    """name: what messages call it. codec: of its model, None where it is asked by text."""

    name: str
    codec: Codec | None

    async def ready(self) -> None:
        """Find out what is there, once; InputError for what cannot be driven."""
        ...

    async def draw(self, prompt: Sequence[int] | str, params: SamplingParams, asks: dict[str, Any]) -> Drawn:
        """One branch. asks: of `asked`. HostError where it is refused; cancelling it ends it at the host too."""
        ...


def host_of(client: Any, model: str | None, tokenizer: Any) -> Host:
    """The host behind a client: a base URL, an `openai.AsyncOpenAI`, or vLLM's `AsyncLLM`."""
    if isinstance(client, str) or hasattr(client, "completions"):
        return OpenAIHost(client, model, tokenizer)
    if hasattr(client, "generate") and hasattr(client, "vllm_config"):
        if model is not None or tokenizer is not None:
            raise InputError("an AsyncLLM has its own model and tokenizer: leave out model and tokenizer")
        return VLLMHost(client)
    raise InputError(f"not a client: {client!r:.80}; give a base URL, an openai.AsyncOpenAI or vLLM's AsyncLLM")


def asked(params: SamplingParams, seed: int, room: int, done: int, stop: bool) -> dict[str, Any]:
    """The fields of one branch, by vLLM's names. room: most tokens of it; done: tokens before it; stop: whether the
    host looks for the stop strings. What a checkpoint's generation_config would change is always said."""
    always = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    fields: dict[str, Any] = {name: getattr(params, name) for name in always}
    fields |= {"max_tokens": room, "seed": seed}
    for name in ("logit_bias", "allowed_token_ids", "bad_words", "stop_token_ids"):
        value = getattr(params, name)
        if value:
            fields[name] = dict(value) if name == "logit_bias" else list(value)
    if params.ignore_eos:
        fields["ignore_eos"] = True
    if params.min_tokens > done:
        fields["min_tokens"] = min(room, params.min_tokens - done)
    if params.stop and stop:
        fields["stop"] = list(params.stop)
    return fields


def shapes(params: SamplingParams) -> bool:
    """Whether a request changes the base policy, so that a host's raw log-probabilities are another's."""
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    fields = (params.logit_bias, params.allowed_token_ids, params.bad_words, params.min_tokens)
    return penalties != (1, 0, 0) or any(map(bool, fields))


def filters(params: SamplingParams) -> bool:
    return bool(params.top_k or params.top_p < 1 or params.min_p)


def told(
    shown: list[float] | None, params: SamplingParams, processed: bool | None
) -> tuple[list[float] | None, list[float] | None]:
    """(base, policy) of `Drawn` where a host shows one log-probability for each token.

    processed: it is of the distribution that the token was drawn from, or else of the model's own, at temperature 1;
    None where that cannot be seen, so that with filters it is told for neither.
    """
    greedy = params.temperature == 0
    if shown is None or (processed is None and filters(params) and not greedy):
        return None, None
    if processed:
        base = None if greedy or filters(params) else shown
        return base, [0.0] * len(shown) if greedy else shown
    known = not shapes(params) and params.temperature in (0, 1)
    policy = [0.0] * len(shown) if greedy else shown if known and not filters(params) else None
    return shown if known else None, policy


async def together(asks: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them at once. Where one fails, or nobody waits any more, the others are cancelled and have ended."""
    tasks = [asyncio.ensure_future(ask) for ask in asks]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def patiently(ask: Callable[[], Awaitable[T]], again: Callable[[Exception], float | None]) -> T:
    """What is asked for, again while `again(error)` gives seconds to wait at least, and not None."""
    for i in range(TRIES):
        try:
            return await ask()
        except Exception as error:
            least = again(error)
            if least is None or i + 1 == TRIES:
                raise
            await asyncio.sleep(min(max(least, WAIT * 2**i), max(least, LONGEST)))
    raise AssertionError  # the last try returns or raises


class OpenAIHost:
    """Any endpoint of OpenAI's legacy completions.

    With a tokenizer (an object, a directory or a hub id) prompts are token ids, and answers must show theirs: vLLM and
    `pyengine serve` do, by `return_token_ids`. Without one prompts and answers are texts.
    """

    def __init__(self, client: Any, model: str | None, tokenizer: Any) -> None:
        self._url = client if isinstance(client, str) else None
        self._ended: list[Any] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        if self._url is not None:
            client = _client(self._url)
        if not asyncio.iscoroutinefunction(getattr(client, "post", None)):
            raise InputError(f"{type(client).__name__} waits for each answer: give an openai.AsyncOpenAI")
        self.client, self.model = client.with_options(max_retries=0), model  # `patiently` asks again
        self.name = f"{client.base_url}"
        self.codec: Codec | None = None
        self._tokenizer = tokenizer
        self._found = self._agrees = False

    async def ready(self) -> None:
        loop = asyncio.get_running_loop()
        if self._url is not None and self._loop not in (None, loop):
            # Connections belong to the loop that made them: of one that has ended they cannot even be closed.
            self._ended.append(self.client)
            self.client = _client(self._url).with_options(max_retries=0)
        self._loop = loop
        if self._found:
            return
        found = await self.ask("GET", "/models", None)
        try:
            cards = {card["id"]: card.get("max_model_len") for card in found["data"]}
            _of(cards, str)
            _of(cards.values(), int, type(None))
        except (KeyError, TypeError, AttributeError) as error:
            raise HostError(f"{self.name} answers what is no list of models: {found!r:.200}") from error
        if self.model is None and len(cards) == 1:
            self.model = next(iter(cards))
        if self.model not in cards:
            wrong = "" if self.model is None else f" has no model {self.model!r}; it"
            raise InputError(f"{self.name}{wrong} serves {', '.join(map(repr, cards)) or 'none'}: give one as model")
        if self._tokenizer is not None:
            tokenizer = tokenizer_of(self._tokenizer)
            self.codec = Codec(tokenizer, f"model {self.model!r}", len(tokenizer), cards[self.model])
        self._found = True

    async def ask(self, method: Literal["GET", "POST"], path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer; HostError for any other. path: behind the base URL, or a whole URL."""
        import openai

        def again(error: Exception) -> float | None:
            if isinstance(error, openai.APIStatusError) and error.status_code in (429, 503):
                after = error.response.headers.get("retry-after", "")
                return min(float(after), 60.0) if after.isdecimal() else 0.0
            gone = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
            return 0.0 if gone else None

        async def once() -> Any:
            if method == "GET":
                return await self.client.get(path, cast_to=object)
            return await self.client.post(path, body=body, cast_to=object)

        try:
            found = await patiently(once, again)
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            says = body.get("message") or first_line(error)
            raise HostError(f"{self.name} refused it ({error.status_code}): {says}") from error
        except openai.OpenAIError as error:
            raise HostError(f"{self.name}: {first_line(error)} ({type(error).__name__})") from error
        if not isinstance(found, dict):
            raise HostError(f"{self.name}{path} answers no JSON object but {found!r:.80}")
        return found

    async def draw(self, prompt: Sequence[int] | str, params: SamplingParams, asks: dict[str, Any]) -> Drawn:
        body = {"model": self.model, "prompt": prompt, "logprobs": 0, **asks}
        body |= {"skip_special_tokens": params.skip_special_tokens}
        if self.codec is not None:
            body["return_token_ids"] = True
        answer = await self.ask("POST", "/completions", body)
        try:
            drawn = _drawn(answer, params)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise HostError(f"{self.name} answers what is no completion: {answer!r:.200}") from error
        if drawn.finish not in ("stop", "length"):
            raise HostError(f"{self.name} ended a branch with finish_reason {drawn.finish!r}")
        if self.codec is None:
            return drawn._replace(tokens=None)
        if drawn.tokens is None:
            raise HostError(f"{self.name} shows no token ids (return_token_ids): leave tokenizer out, to go by text")
        unknown = next((token for token in drawn.tokens if not 0 <= token < self.codec.rows), None)
        if unknown is not None:
            has = f"which is none of the tokenizer's {self.codec.rows}: give that of {self.model!r}"
            raise HostError(f"{self.name} gave token {unknown}, {has}")
        if not self._agrees:
            self._compare(self.codec, prompt, drawn, params)
        return drawn

    def _compare(self, codec: Codec, prompt: Any, drawn: Drawn, params: SamplingParams) -> None:
        """HostError where the tokens are not what the host says they are: the tokenizer is another model's.

        Of a text with a broken character the part before it is compared, and of one that a stop string may have cut
        what is left; only a whole text that is not empty shows that they agree."""
        assert drawn.tokens is not None
        ours, said = codec.between(prompt, drawn.tokens, params.skip_special_tokens).strip(), drawn.text.strip()
        broken, same = BROKEN in ours + said, [ours]
        if drawn.finish == "stop":  # whether its last token is in its text is the host's affair
            same.append(codec.between(prompt, drawn.tokens[:-1], params.skip_special_tokens).strip())
        whole = said in same and not broken
        ours, head = ours.partition(BROKEN)[0], said.partition(BROKEN)[0]
        cut = drawn.finish == "stop" and params.stop
        begins = (broken or cut) and (ours.startswith(head) or (broken and head.startswith(ours)))
        if not whole and not begins:
            raise HostError(
                f"{self.name} reads {said!r:.60} where the tokenizer reads {same[0]!r:.60}: give that of {self.model!r}"
            )
        self._agrees = whole and said != ""


def _drawn(answer: Any, params: SamplingParams) -> Drawn:
    """What an answer says; KeyError, IndexError, TypeError or AttributeError where it is no completion."""
    choice = answer["choices"][0]
    tokens, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
    size = answer["usage"]["completion_tokens"] if tokens is None else len(_of(tokens, int))
    text, finish, reason = choice["text"], choice["finish_reason"], choice.get("stop_reason")
    _of([text], str)
    _of([size], int)
    _of([reason], str, int, type(None))
    tilt = choice.get("tilt") or {}
    if "logp_policy" in tilt:  # `pyengine serve`, which knows both
        base, policy = _nats(tilt["logp_base"], size), _nats(tilt["logp_policy"], size)
    else:
        base, policy = told(_nats(logprobs.get("token_logprobs"), size), params, None)
    pieces = _of(logprobs.get("tokens") or [], str)
    return Drawn(text, tokens, size, base, policy, finish, reason, pieces if len(pieces) == size else None)


def _of(values: Any, *types: type) -> Any:
    """The values, if each is of one of these types and no bool; TypeError else."""
    if isinstance(values, str) or not all(type(value) in types for value in values):
        raise TypeError(f"not {types}: {values!r:.80}")
    return values


def _nats(values: Any, size: int) -> list[float] | None:
    """Log-probabilities of so many tokens; None unless each is shown, and none is a logit (vLLM's "raw_logits")."""
    shown = _of(values or [], float, int, type(None))
    seen = len(shown) == size and all(one is not None and one < 1e-3 for one in shown)
    return [float(one) for one in shown] if seen else None


def _client(url: str) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "unused"))


class VLLMHost:
    """vLLM's `AsyncLLM` of a generating model, in this process and its event loop."""

    def __init__(self, client: Any) -> None:
        config = client.vllm_config
        self.client, self.name = client, "vLLM"
        model, scheduler = config.model_config, config.scheduler_config
        if model.runner_type != "generate":
            raise InputError(f"this AsyncLLM has runner {model.runner_type!r}: only one that generates can be driven")
        if config.device_config.device_type == "cpu" and scheduler.enable_chunked_prefill:
            raise InputError(
                "on a CPU vLLM's engine dies of a request with a seed whose prompt it reads in parts: start it with "
                "enable_chunked_prefill=False and max_num_batched_tokens of at least max_model_len"
            )
        if not config.cache_config.enable_prefix_caching:
            log.warning("vLLM reads the whole prefix for every branch of every block: enable_prefix_caching is off")
        name = os.path.basename(str(model.model).rstrip("/"))
        self.codec: Codec | None = Codec(
            client.get_tokenizer(), f"model {name!r}", model.get_vocab_size(), model.max_model_len
        )
        self._processed = {"raw_logprobs": False, "processed_logprobs": True}.get(str(model.logprobs_mode))

    async def ready(self) -> None:
        pass

    async def draw(self, prompt: Sequence[int] | str, params: SamplingParams, asks: dict[str, Any]) -> Drawn:
        from vllm.sampling_params import RequestOutputKind
        from vllm.sampling_params import SamplingParams as Theirs

        # Asked for only where they say something.
        wanted = self._processed is not None and told([0.0], params, self._processed)[0] is not None
        kind = {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": "stop" in asks or "bad_words" in asks}

        async def once() -> Any:
            theirs = Theirs(**asks, **kind, logprobs=0 if wanted else None)
            asking = self.client.generate({"prompt_token_ids": list(prompt)}, theirs, f"tilt-{uuid4().hex}")
            return [answer async for answer in asking][-1]

        answer = await asked_of_vllm(once)
        one = answer.outputs[0]
        if one.finish_reason not in ("stop", "length"):
            raise HostError(f"vLLM ended a branch with finish_reason {one.finish_reason!r}")
        tokens = list(one.token_ids)
        shown = [at[token].logprob for at, token in zip(one.logprobs, tokens, strict=True)] if wanted else None
        base, policy = told(shown, params, bool(self._processed))
        return Drawn(one.text, tokens, len(tokens), base, policy, one.finish_reason, one.stop_reason)


async def asked_of_vllm(once: Callable[[], Awaitable[T]]) -> T:
    """What an `AsyncLLM` is asked for, again where it is too busy to take it; HostError with its words else."""
    from vllm.exceptions import GracefulHTTPError

    def again(error: Exception) -> float | None:
        return 0.0 if isinstance(error, GracefulHTTPError) and error.http_status in (429, 503) else None

    try:
        return await patiently(once, again)
    except Exception as error:  # whatever the engine raises, this request cannot go on
        raise HostError(f"vLLM could not answer: {first_line(error)} ({type(error).__name__})") from error


def tokenizer_of(given: Any) -> Any:
    """A tokenizer from a directory or hub id; an object is used as it is."""
    if not isinstance(given, (str, os.PathLike)):
        return given
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {given}: {first_line(error)}") from error


def cost(drawn: Drawn, params: SamplingParams, bounded: bool) -> float:
    """Nats from the base policy of the draw of these tokens: of filters and greediness, by what the host says.

    What is kept of a distribution and scaled up differs from it by -log of the mass kept, which each token's two
    log-probabilities show; of top_p alone the mass is at least top_p. bounded: whether that bound will do.
    """
    if params.temperature > 0 and not filters(params):
        return 0.0
    if drawn.base is not None and drawn.policy is not None:
        return math.fsum(max(0.0, p - b) for p, b in zip(drawn.policy, drawn.base, strict=True))
    if params.temperature > 0 and bounded and not params.top_k and not params.min_p:
        return -math.log(params.top_p) * drawn.size
    names = [name for name in ("top_k", "min_p", "top_p") if getattr(params, name) not in (0, 1)] or ["temperature"]
    raise HostError(
        f"the KL that {names[0]} costs cannot be known from what this host shows: leave it out, or decode with "
        "pyengine.Engine or `pyengine serve`"
    )
