"""Any sequence-classification checkpoint as a scorer of text, with its own tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pyengine.checkpoint import context_of, load_checkpoint
from pyengine.errors import InputError
from pyengine.modes import evaluating
from pyengine.scorers.base import Candidates, Scorer

BATCH = 32  # texts in one forward pass


class RewardModel(Scorer):
    """The scalar logit of prompt + completion, both as text, so any tokenizer will do."""

    def __init__(self, model: Any, tokenizer: Any, name: str = "reward-model") -> None:
        labels = model.config.num_labels
        if labels != 1:
            raise InputError(f"reward model {name!r} has {labels} outputs, a scorer needs exactly one (num_labels=1)")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise InputError(f"reward model {name!r}: its tokenizer has neither a padding nor an EOS token")
        tokenizer.padding_side = "right"
        model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.longest = context_of(model.config) or math.inf
        for name, module in model.named_modules():  # RoBERTa counts positions from its padding index + 1
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                self.longest -= module.padding_idx + 1

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> RewardModel:
        """Load from a directory or hub id; safetensors only."""
        model, tokenizer = load_checkpoint(AutoModelForSequenceClassification, "reward model", path, trust_remote_code)
        return cls(model, tokenizer, Path(path).name)

    def move(self, device: torch.device) -> None:
        self.model.to(device)

    def score(self, candidates: Candidates) -> Tensor:
        texts = [p + c for p, c in zip(candidates.prompts, candidates.completions, strict=True)]
        ids = [self.tokenizer(text).input_ids for text in texts]
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > self.longest:
                raise InputError(
                    f"reward model {self.name!r} reads {self.longest} tokens, a candidate has {len(tokens)}: "
                    f"{text[:40]!r}...; shorten max_tokens or take another reward model"
                )
        scores = []
        for start in range(0, len(ids), BATCH):
            batch = self.tokenizer.pad({"input_ids": ids[start : start + BATCH]}, return_tensors="pt")
            with evaluating(self.model):
                scores.append(self.model(**batch.to(self.model.device)).logits[:, 0].float())
        return torch.cat(scores)
