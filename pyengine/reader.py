"""A reward model that reads each prompt once: it has a branching cache of its own beside the base model's."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import Tensor

from pyengine.decoder import PREFILL_TOKENS, BranchingDecoder, Frontier, Prompt
from pyengine.errors import InputError, first_line
from pyengine.scorers import RewardModel, Scorer

log = logging.getLogger("pyengine")


class Reader(BranchingDecoder):
    """The decoder of a causal sequence classifier; its "logits" are the score [N, 1] of each prefix.

    A block costs one pass over its new tokens, where reading the text anew costs K times the whole prefix.
    """

    def __init__(self, scorer: RewardModel, max_rows: int, budget: float | None) -> None:
        super().__init__(scorer.model, (), max_rows, budget)
        self.name, self.longest = scorer.name, scorer.longest

    def join(self, prompts: list[Prompt]) -> None:
        for prompt in prompts:
            self._fits_context(len(prompt.ids))
        super().join(prompts)

    def _fits_context(self, tokens: int) -> None:
        if tokens > self.longest:
            raise InputError(
                f"reward model {self.name!r} reads {self.longest} tokens, a candidate has {tokens}; shorten max_tokens "
                "or take another reward model"
            )

    def _read(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Frontier:
        hidden = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        return Frontier(self.model.score(hidden if rows is None else hidden[rows]), {})

    @torch.inference_mode()
    def score(self, tails: list[list[int]]) -> Tensor:
        """fp32 [N] at the last token of each branch, all of them extended in one pass; an empty tail adds nothing."""
        for i, tail in enumerate(tails):
            self._fits_context(self._sequences[i // self._k].length + len(tail))
        scores = self.fork().logits
        longest = max(map(len, tails))
        device = self.model.device
        padded = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], dtype=torch.long, device=device)
        last = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        some = max(1, PREFILL_TOKENS // len(tails))  # columns in one pass
        for start in range(0, longest, some):
            tokens = padded[:, start : start + some]
            at = last - start
            here = (at >= 0) & (at < tokens.shape[1])
            found = self.extend(tokens, at.clamp(0, tokens.shape[1] - 1)).logits
            scores = torch.where(here[:, None], found, scores)
        return scores[:, 0].float()


def reader_of(scorer: Scorer, tokenizer: Any, max_rows: int, budget: float | None) -> Reader | None:
    """A reader for a causal reward model that shares the base model's tokenizer; None where the text must be read.

    What it gives is tried against the model's own forward pass first.
    """
    if not isinstance(scorer, RewardModel) or not _same(scorer.tokenizer, tokenizer):
        return None
    try:
        reader = Reader(scorer, max_rows, budget)
        reason = _mismatch(reader)
    except Exception as error:  # noqa: BLE001 - whatever a foreign model raises, its text can still be read
        reason = first_line(error)
    if reason is None:
        return reader
    log.warning("%s: reads every candidate from its start (%s)", scorer.name, reason)
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same tokens."""

    def rules(tokenizer: Any) -> object:
        if not getattr(tokenizer, "is_fast", False):
            return None
        found = json.loads(tokenizer.backend_tokenizer.to_str())
        return {name: rule for name, rule in found.items() if name not in ("padding", "truncation")}

    return rules(one) is not None and rules(one) == rules(other)


@torch.inference_mode()
def _mismatch(reader: Reader) -> str | None:
    """Why this reader goes wrong, or None: a fork, ragged tails, a commit and a second block."""
    model = reader.model
    vocab, pad = model.get_input_embeddings().weight.shape[0], model.config.pad_token_id
    ids = [token for token in ((7 * i + 3) % vocab for i in range(20)) if token != pad]
    tails = [[ids[11], ids[12]], [ids[13]], [], [ids[14], ids[15]]]
    reader.open(2, 2)
    try:
        reader.join([Prompt(ids[:9], 8), Prompt(ids[3:7], 8)])
        found = reader.score(tails).tolist()
        reader.commit(torch.tensor([0, 3], device=model.device))
        found += reader.score([[ids[1]]] * 4)[::2].tolist()
    finally:
        reader.close()
    whole = [(ids[:9] if i < 2 else ids[3:7]) + tail for i, tail in enumerate(tails)]
    whole += [[*whole[0], ids[1]], [*whole[3], ids[1]]]
    wanted = [model(input_ids=torch.tensor([text], device=model.device)).logits[0, 0].item() for text in whole]
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * max(1.0, *map(abs, wanted))
    gap = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    return None if gap <= tolerance else f"its scores differ by {gap:.2g} from a recompute"
