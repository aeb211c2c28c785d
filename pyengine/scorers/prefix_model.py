"""A prefix scorer that is a model of its own, for any base policy with the same tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from pyengine.checkpoint import context_of, load_checkpoint
from pyengine.errors import InputError, first_line
from pyengine.modes import evaluating, states_of
from pyengine.scorers.base import Candidates, Hidden, Policy, Scorer
from pyengine.scorers.heads import FORMAT, PrefixScorer, load_head

KIND = "prefix-model"


class PrefixModel(Scorer):
    """V(y^t, z) of every next token z, by a head on a language model other than the base policy (Controlled Decoding).

    model: a decoder without a language-model head (transformers' AutoModel); head: a PrefixScorer that reads one of
    its layers. It serves base policies of any size and training, a DPO-tuned one among them, as long as they share
    its tokenizer's vocabulary (by how many rows their heads pad it may differ). In the engine it reads each prompt once
    and each token once, in a branching cache of its own.
    """

    scores_tokens = reads_ids = True

    def __init__(self, model: Any, tokenizer: Any, head: PrefixScorer, name: str = KIND) -> None:
        config = model.config.get_text_config(decoder=True)
        width, layers = config.hidden_size, config.num_hidden_layers + 1
        if head.hidden_size != width:
            raise InputError(f"scorer {name!r}: its head reads a width of {head.hidden_size}, its model has {width}")
        if not -layers <= head.layer < layers:
            raise InputError(f"scorer {name!r}: its head reads layer {head.layer}, its model has {layers}")
        self.model, self.tokenizer, self.head, self.name = model, tokenizer, head, name
        self.longest = context_of(model.config) or math.inf

    @classmethod
    def from_pretrained(cls, path: str | Path, trust_remote_code: bool = False) -> PrefixModel:
        """What `save` wrote; safetensors only."""
        directory = Path(path)
        model, tokenizer = load_checkpoint(AutoModel, "scorer", directory / "model", trust_remote_code)
        try:
            head = load_head(directory / "head", json.loads((directory / "head" / "config.json").read_bytes()))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"scorer {path}: its head: {first_line(error)}") from error
        if not isinstance(head, PrefixScorer):
            raise InputError(f"scorer {path}: its head is not a prefix scorer")
        return cls(model, tokenizer, head, directory.name)

    def save(self, directory: str | Path) -> None:
        """Write config.json, and the model, its tokenizer and the head beside it."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps({FORMAT: KIND}) + "\n")
        self.model.save_pretrained(path / "model")
        self.tokenizer.save_pretrained(path / "model")
        self.head.save(path / "head")

    def check(self, policy: Policy) -> None:
        if self.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise InputError(f"scorer {self.name!r} and {policy.name} have different vocabularies")
        for what, rows in (
            ("its head scores", self.head.vocab_size),
            ("its model embeds", self.model.get_input_embeddings().weight.shape[0]),
        ):
            if rows < len(policy.tokenizer):
                raise InputError(
                    f"scorer {self.name!r}: {what} {rows} tokens, the tokenizer has {len(policy.tokenizer)}: they do "
                    "not belong together"
                )

    def move(self, device: torch.device) -> None:
        self.model.to(device)
        self.head.to(device)

    def values(self, hidden: Hidden) -> Tensor:
        """From the hidden states of its own model."""
        return self.head.values(hidden)

    def states(self, ids: list[int]) -> Tensor:
        """Hidden states [T, D] of a sequence, read from its start."""
        with evaluating(self.model):
            output = self.model(
                input_ids=torch.tensor([ids], device=self.model.device), use_cache=False, output_hidden_states=True
            )
        return states_of(self.model, output, self.head.layer)[0]

    @torch.inference_mode()
    def score(self, candidates: Candidates) -> Tensor:
        found = []
        for prompt, tokens in zip(candidates.prompt_ids, candidates.tokens, strict=True):
            before = [*prompt, *tokens[:-1]]
            if len(before) > self.longest:
                raise InputError(
                    f"scorer {self.name!r} reads {self.longest} tokens, a response has {len(before)} before its last "
                    "one; shorten max_tokens or take another scorer"
                )
            last = torch.tensor(tokens[-1:], device=self.model.device)
            found.append(self.head.values_at(self.states(before)[-1:], last))
        return torch.cat(found).float()
