"""A trunk that learns with its prefix scorer: a language model of the scorer's own, from the base policy or elsewhere.

The frozen base is then asked for one thing only, its next-token distributions, where a target is an expectation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from pyengine.checkpoint import load_checkpoint
from pyengine.engine import Engine
from pyengine.errors import InputError
from pyengine.scorers import Policy
from pyengine.training.data import Encoded
from pyengine.training.values import Batch, Prefixes, Student, gather_prefixes


def load_trunk(engine: Engine, source: str, items: Sequence[Encoded]) -> tuple[Any, Policy]:
    """(decoder without a language-model head, what a `PrefixScorer` on it may ask), in fp32, on the engine's device.

    source: "copy" of the engine's model, or a directory or hub id with the same vocabulary. In fp32 because updates of
    1e-5 are lost in bf16, whose steps near 0.1 are 5e-4. Raises InputError for a checkpoint that cannot be loaded, has
    another vocabulary, cannot read the items or sees what follows a token.
    """
    name, policy = f"trunk {source}", engine.policy
    if source == "copy":
        trunk = copy.deepcopy(engine.model.get_decoder()).float()
    else:
        trunk, tokenizer = load_checkpoint(AutoModel, "trunk", source, False, dtype=torch.float32)
        own, wanted = tokenizer.get_vocab(), policy.tokenizer.get_vocab()
        if own != wanted:
            token = min(token for token, _ in own.items() ^ wanted.items())
            raise InputError(
                f"{name}: its vocabulary is not that of {policy.name}, token {token!r} for one; give a checkpoint "
                "with the same tokenizer"
            )
    config = trunk.config.get_text_config(decoder=True)
    embedded, context = trunk.get_input_embeddings().weight.shape[0], getattr(config, "max_position_embeddings", None)
    longest, highest = max(len(item.ids) for item in items), max(max(item.ids) for item in items)
    if highest >= embedded:
        raise InputError(f"{name} embeds {embedded} tokens, the examples hold token {highest}; take another trunk")
    if context is not None and longest > context:
        raise InputError(f"{name} reads {context} tokens, an example has {longest}; shorten it or take another trunk")
    trunk.requires_grad_(True).to(policy.device)
    if not _causal(trunk, items[0].ids):
        raise InputError(f"{name} is not causal: a value would depend on the tokens after it; take a causal model")
    return trunk, replace(policy, name=name, hidden_size=config.hidden_size, layers=config.num_hidden_layers + 1)


@torch.no_grad()
def _causal(trunk: Any, ids: list[int]) -> bool:
    """Whether the states of the first half are the same without the second; a bidirectional model's are not."""
    if trunk.config.is_encoder_decoder:
        return False
    half = len(ids) // 2
    texts = (torch.tensor([text], device=trunk.device) for text in (ids, ids[:half]))
    one, other = (trunk(input_ids=text, use_cache=False).last_hidden_state[0, :half] for text in texts)
    return bool((one - other).norm() <= 1e-3 * other.norm())


class TrunkStudent(nn.Module):
    """A student and the trunk that it reads, which learn together.

    The trunk is always in evaluation mode: without dropout its values are those that are served, and a step is the
    same for any number of processes.
    """

    accepts_loss_kwargs = False  # as Student's

    def __init__(self, trunk: nn.Module, student: Student) -> None:
        super().__init__()
        self.trunk, self.student = trunk, student

    def train(self, mode: bool = True) -> TrunkStudent:
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, Prefixes]:
        """V of each prefix, fp32 [N], and the prefixes, whose hidden states carry no gradient: targets come of them.

        One call, so that DistributedDataParallel sees every use of a parameter.
        """
        p = gather_prefixes(self.trunk, batch, self.student.scorer.layer)
        value = self.student(p.before, p.token)
        return value, p._replace(before=p.before.detach(), after=p.after.detach())


def grouped(optimizer: torch.optim.Optimizer, trunk: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer with the trunk's parameters in groups of their own, at this learning rate."""
    own = {id(parameter) for parameter in trunk.parameters()}
    for group in list(optimizer.param_groups):
        theirs = [parameter for parameter in group["params"] if id(parameter) in own]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.add_param_group({**group, "params": theirs, "lr": lr})
    return optimizer
