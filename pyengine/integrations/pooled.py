"""A classifier that a host serves as a scorer: vLLM's `/classify`, or an `AsyncLLM` with runner="pooling"."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor

from pyengine.checkpoint import same_tokenizer
from pyengine.codec import Codec, PromptKey
from pyengine.errors import InputError
from pyengine.integrations.hosts import HostError, OpenAIHost, asked_of_vllm, together, tokenizer_of
from pyengine.scorers import Candidates, Policy, Scorer

# While a thread scores: the event loop that the host answers in, and the tokenizer whose tokens the candidates are.
ASKER: ContextVar[tuple[asyncio.AbstractEventLoop, Any] | None] = ContextVar("ASKER", default=None)


class PooledScorer(Scorer):
    """The logit of a sequence classifier that somebody else runs, for `BlockwiseDriver`.

    client: the base URL of a server with vLLM's `/classify`, an `openai.AsyncOpenAI` for it, or an `AsyncLLM` with
    runner="pooling" and PoolerConfig(task="classify"), which keeps the prefixes that candidates share in its cache.
    form: "text", the completion behind the prompt, in the base policy's own tokens where the tokenizers are equal, so
    that prefixes are shared to the token; or "chat", by the classifier's template. tokenizer: the classifier's, an
    object, a directory or a hub id; an AsyncLLM has its own, a server needs it for "chat" and to share prefixes to the
    token. label: of a classifier with several outputs, the number of the one whose log-probability is the score.
    """

    def __init__(
        self,
        client: Any,
        model: str | None = None,
        *,
        tokenizer: Any = None,
        form: Literal["text", "chat"] = "text",
        label: int | None = None,
        name: str = "pooled",
    ) -> None:
        self.name, self.form, self.label = name, form, label
        if form not in ("text", "chat"):
            raise InputError(f"scorer {name!r}: form must be text or chat, got {form!r}")
        self._vllm = client if hasattr(client, "encode") and hasattr(client, "vllm_config") else None
        if self._vllm is not None:
            if self._vllm.vllm_config.model_config.runner_type != "pooling":
                raise InputError(f'scorer {name!r}: this AsyncLLM generates; start one with runner="pooling"')
            tokenizer = self._vllm.get_tokenizer()
        else:
            self._host = OpenAIHost(client, model, None)
            tokenizer = None if tokenizer is None else tokenizer_of(tokenizer)
        if form == "chat" and not getattr(tokenizer, "chat_template", None):
            raise InputError(f"scorer {name!r}: form chat needs its tokenizer (tokenizer=), with a chat template")
        self.codec = None if tokenizer is None else Codec(tokenizer, f"scorer {name!r}", len(tokenizer))
        self._shared: dict[int, Any] = {}  # the policies' tokenizers whose tokens are its own, by id

    def check(self, policy: Policy) -> None:
        if self.codec is not None and same_tokenizer(self.codec.tokenizer, policy.tokenizer):
            self._shared[id(policy.tokenizer)] = policy.tokenizer

    def score(self, candidates: Candidates) -> Tensor:
        asker = ASKER.get()
        if asker is None:
            raise InputError(f"scorer {self.name!r} is a host's, and for BlockwiseDriver alone")
        loop, tokenizer = asker
        shared = id(tokenizer) in self._shared
        given = [self._read(candidates, i, shared) for i in range(len(candidates.prompts))]
        logits = torch.tensor(asyncio.run_coroutine_threadsafe(self._ask(given), loop).result(), dtype=torch.float32)
        labels = logits.shape[1]
        if self.label is None and labels > 1:
            raise InputError(f"scorer {self.name!r} has {labels} outputs: give the label that is to be likely")
        if self.label is not None and not 0 <= self.label < labels:
            raise InputError(f"scorer {self.name!r} has {labels} outputs, label {self.label} is not among them")
        return logits[:, 0] if labels == 1 else logits.log_softmax(-1)[:, self.label or 0]

    def _read(self, candidates: Candidates, i: int, shared: bool) -> list[int] | str:
        """What the classifier reads of a candidate. shared: whether the candidates' tokens are its own."""
        prompt, messages = candidates.prompts[i], candidates.conversations[i]
        if self.form == "chat":
            assert self.codec is not None
            asked = messages or [{"role": "user", "content": prompt}]
            answer = {"role": "assistant", "content": candidates.completions[i]}
            return self.codec.converse([*asked, answer], f"scorer {self.name!r}", ended=True)
        if shared and candidates.prompt_ids:
            assert self.codec is not None
            return [*candidates.prompt_ids[i], *(t for t in candidates.tokens[i] if t not in self.codec.special)]
        if isinstance(prompt, PromptKey):
            raise InputError(f"scorer {self.name!r} reads text, a prompt is {prompt!r:.40}: give texts")
        text = prompt + candidates.completions[i]
        return text if self.codec is None else self.codec.encode(text, f"scorer {self.name!r}")

    async def _ask(self, given: list[list[int] | str]) -> list[list[float]]:
        """The logits of each, in their order."""
        if self._vllm is not None:
            return await together([self._encode(ids) for ids in given])
        await self._host.ready()
        root = str(self._host.client.base_url).rstrip("/").removesuffix("/v1")
        body = {"model": self._host.model, "input": given, "use_activation": False}
        found = await self._host.ask("POST", f"{root}/classify", body)
        try:
            logits = {int(one["index"]): [float(x) for x in one["probs"]] for one in found["data"]}
            if len({len(one) for one in logits.values()} | {0}) != 2:
                raise ValueError("not equally many outputs of each")
            return [logits[i] for i in range(len(given))]
        except (KeyError, TypeError, ValueError) as error:
            raise HostError(f"{root}/classify answers what is no classification: {found!r:.200}") from error

    async def _encode(self, ids: list[int] | str) -> list[float]:
        from vllm import PoolingParams

        async def once() -> list[float]:
            params = PoolingParams(task="classify", use_activation=False)
            assert self._vllm is not None
            asking = self._vllm.encode({"prompt_token_ids": ids}, params, f"tilt-{uuid4().hex}")
            return [answer async for answer in asking][-1].outputs.data.float().tolist()

        return await asked_of_vllm(once)
