"""Who decodes: this engine, and what people do without one. Each takes requests and says when it committed what.

All keep of K branches the one whose last hidden state a linear probe likes best, which costs nobody anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from pyengine.bench.workload import Ask
from pyengine.engine import Engine
from pyengine.results import SamplingParams
from pyengine.scorers import ScorerLike
from pyengine.strategies import Strategy


class Run(NamedTuple):
    """tokens: of each answer. commits: of each request (seconds since all were asked, tokens). drawn: tokens of all
    branches. hits: tokens of prompts that a cache knew."""

    tokens: list[list[int]]
    commits: list[list[tuple[float, int]]]
    drawn: int
    hits: int = 0


SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # as the engine's defaults: from the policy itself
# (requests, seed, greedy) -> what came
Contender = Callable[[list[Ask], int, bool], Run]


def by_engine(engine: Engine, strategy: Strategy, scorer: ScorerLike | None) -> Contender:
    """Its answers are sampled at temperature 1, or greedy, without an end of their own."""
    if scorer is not None:
        engine.keep(scorer)

    def run(asks: list[Ask], seed: int, greedy: bool) -> Run:
        before, began = engine.stats(), time.perf_counter()
        temperature = 0.0 if greedy else 1.0
        handles = []
        for i, ask in enumerate(asks):
            params = SamplingParams(ask.tokens, temperature, seed=seed + i, ignore_eos=True)
            handles.append(engine.submit(ask.prompt, strategy, params, scorer).listen())
        commits: list[list[tuple[float, int]]] = [[] for _ in asks]
        while engine.step():
            now = time.perf_counter() - began
            for handle, own in zip(handles, commits, strict=True):
                tokens = sum(len(event.tokens) for event in handle.take())
                if tokens:
                    own.append((now, tokens))
        after = engine.stats()
        drawn, hits = (after.get(n, 0) - before.get(n, 0) for n in ("drawn_tokens", "prefix_hit_tokens"))
        return Run([handle.result().tokens for handle in handles], commits, drawn, hits)

    return run


class _Padded:
    """Requests of several lengths as a batch of transformers': padded at the left, those that are done taken out."""

    def __init__(self, asks: list[Ask], device: torch.device) -> None:
        self.asks, self.device = asks, device
        self.tokens: list[list[int]] = [[] for _ in asks]
        self.commits: list[list[tuple[float, int]]] = [[] for _ in asks]
        self.alive = list(range(len(asks)))
        self.drawn, self.began = 0, time.perf_counter()

    def left(self, i: int) -> int:
        return self.asks[i].tokens - len(self.tokens[i])

    def batch(self) -> tuple[Tensor, Tensor]:
        """Ids and attention mask [alive, longest]."""
        rows = [self.asks[i].prompt + self.tokens[i] for i in self.alive]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def step(self, block: int | None) -> int:
        """Tokens of the next block."""
        longest = max(map(self.left, self.alive))
        return longest if block is None else min(block, longest)

    def commit(self, new: list[list[int]]) -> list[int]:
        """A list for each that is alive; the places among them of those that still are."""
        now, kept = time.perf_counter() - self.began, []
        for place, (i, tokens) in enumerate(zip(self.alive, new, strict=True)):
            own = tokens[: self.left(i)]
            self.tokens[i] += own
            self.commits[i].append((now, len(own)))
            if self.left(i):
                kept.append(place)
        self.alive = [self.alive[place] for place in kept]
        return kept

    def done(self) -> Run:
        return Run(self.tokens, self.commits, self.drawn)


class _Ticks:
    """A streamer: `generate` hands it the prompt, then each token of all rows as it is drawn."""

    def __init__(self, batch: _Padded) -> None:
        self.batch = batch
        self.rows: list[int] | None = None  # of its batch, those that are alive; None until the prompt has come

    def put(self, value: Tensor) -> None:
        if self.rows is None:
            self.rows = list(range(len(self.batch.alive)))
            return
        drawn = value.tolist()
        kept = self.batch.commit([[drawn[row]] for row in self.rows])
        self.rows = [self.rows[place] for place in kept]

    def end(self) -> None:
        pass


class Generated:
    """transformers' `generate(num_return_sequences=K)` for every block, which reads the prompt again each time.

    probe: [1, D]. With one branch it is called once, and its tokens count as they are drawn.
    """

    def __init__(self, model: Any, probe: Tensor, k: int, block: int | None, asks: list[Ask], greedy: bool) -> None:
        self.model, self.probe, self.k = model, probe, k
        self.block_tokens, self.greedy = block if k > 1 else None, greedy
        self.never = model.get_input_embeddings().weight.shape[0]  # no token: nothing ends an answer, nor is masked
        self.batch = _Padded(asks, model.device)

    @torch.inference_mode()
    def block(self) -> None:
        """Draws one and commits it."""
        batch, k = self.batch, self.k
        ids, mask = batch.batch()
        rows, m = len(batch.alive), batch.step(self.block_tokens)
        asked: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": m}
        asked |= {"eos_token_id": self.never, "repetition_penalty": 1.0}
        asked |= {"return_dict_in_generate": True, "output_hidden_states": k > 1}
        asked["do_sample"] = not self.greedy
        asked |= {} if self.greedy else SAMPLED
        batch.drawn += rows * k * m
        if k == 1:
            self.model.generate(**asked, streamer=_Ticks(batch))
            return
        if self.greedy:  # it returns no several of one and the same
            asked |= {"input_ids": ids.repeat_interleave(k, 0), "attention_mask": mask.repeat_interleave(k, 0)}
        else:
            asked["num_return_sequences"] = k
        output = self.model.generate(**asked)
        best = _best(output.hidden_states[-1][-1], self.probe, k)
        batch.commit(output.sequences[best, -m:].tolist())


class Forked:
    """The prompt is read once; for each block the cache is copied for every branch, and the winner's copy is kept."""

    @torch.inference_mode()
    def __init__(self, model: Any, probe: Tensor, k: int, block: int | None, asks: list[Ask], greedy: bool) -> None:
        self.model, self.probe, self.k = model, probe, k
        self.block_tokens, self.greedy = block if k > 1 else 1, greedy
        self.batch = _Padded(asks, model.device)
        ids, self.mask = self.batch.batch()
        self.at = self.mask.sum(1)
        self.whole = bool(self.mask.all())  # without padding no mask is made, which is quicker
        self.cache = DynamicCache(config=model.config)
        given = self._given(self.mask, (self.mask.cumsum(1) - 1).clamp(min=0))
        self.logits = model(ids, past_key_values=self.cache, logits_to_keep=1, use_cache=True, **given).logits[:, -1]

    def _given(self, mask: Tensor, places: Tensor) -> dict[str, Tensor]:
        return {} if self.whole else {"attention_mask": mask, "position_ids": places}

    @torch.inference_mode()
    def block(self) -> None:
        """Draws one and commits it."""
        k, m = self.k, self.batch.step(self.block_tokens)
        logits, mask, at = self.logits, self.mask, self.at
        if k > 1:
            self.cache.batch_repeat_interleave(k)
            logits, mask, at = (x.repeat_interleave(k, 0) for x in (logits, mask, at))
        drawn, several = list[Tensor](), {"use_cache": True, "output_hidden_states": k > 1}
        for _ in range(m):
            drawn.append(_draw(logits, self.greedy))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            given = self._given(mask, at[:, None])
            output = self.model(drawn[-1], past_key_values=self.cache, **several, **given)
            logits, at = output.logits[:, -1], at + 1
        self.batch.drawn += m * len(logits)
        best = _best(output.hidden_states[-1], self.probe, k) if k > 1 else torch.arange(len(logits))
        kept = self.batch.commit(torch.cat(drawn, 1)[best].tolist())
        if k > 1 or len(kept) < len(best):
            best = best[kept]
            self.cache.batch_select_indices(best)
            logits, mask, at = logits[best], mask[best], at[best]
        self.logits, self.mask, self.at = logits, mask, at


def by_blocks(kind: type[Generated] | type[Forked], model: Any, probe: Tensor, k: int, block: int | None) -> Contender:
    """One of the above until all is committed."""

    def run(asks: list[Ask], seed: int, greedy: bool) -> Run:
        torch.manual_seed(seed)
        state = kind(model, probe, k, block, asks, greedy)
        while state.batch.alive:
            state.block()
        return state.batch.done()

    return run


def _draw(logits: Tensor, greedy: bool) -> Tensor:
    return logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(torch.softmax(logits.float(), -1), 1)


def _best(hidden: Tensor, probe: Tensor, k: int) -> Tensor:
    """Of hidden states [prompts x K, T, D] the row of each prompt's best branch."""
    scores = (hidden[:, -1] @ probe.T)[:, 0].view(-1, k)
    return scores.argmax(1) + torch.arange(len(scores), device=scores.device) * k
