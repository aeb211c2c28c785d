"""Q-Probe where only samples and embeddings are there: another model reads the text, a probe reads that model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel

from pyengine import ops
from pyengine.checkpoint import load_checkpoint
from pyengine.errors import InputError, first_line
from pyengine.modes import evaluating, states_of
from pyengine.ops import BlockSelection
from pyengine.scorers.base import Candidates, Scorer
from pyengine.scorers.heads import Probe

BATCH = 32  # texts in one forward pass


def check_layer(model: Any, layer: int, name: str) -> None:
    """InputError unless transformers' hidden_states of this model have `layer`; name: what it calls the model."""
    states = model.config.get_text_config(decoder=True).num_hidden_layers + 1  # the embedding and one for each layer
    if not -states <= layer < states:
        raise InputError(f"{name} has {states} hidden states, layer {layer} is not among them")


@torch.inference_mode()
def last_states(
    model: Any,
    ids: Sequence[Sequence[int]],
    layer: int,
    name: str = "the model",
    label: str = "text",
    progress: bool | None = False,
) -> Tensor:
    """fp32 [N, D] on the CPU: the hidden state `layer` at the last token of each sequence.

    model: a causal transformers model without its head, whose padding on the right changes nothing to its left.
    layer: as in transformers' hidden_states, -1 the last. progress: a bar; None shows it on a terminal only.
    Raises InputError, which calls the model `name` and sequence i `label` i, for a layer that is not there and for
    sequences without tokens or longer than the model reads.
    """
    check_layer(model, layer, name)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for i, tokens in enumerate(ids):
        if not tokens:
            raise InputError(f"{name}: {label} {i} is empty")
        if longest is not None and len(tokens) > longest:
            raise InputError(f"{name} reads {longest} tokens, {label} {i} has {len(tokens)}; shorten it")
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.empty(len(ids), model.config.get_text_config(decoder=True).hidden_size)
    hide = None if progress is None else not progress
    for start in tqdm(range(0, len(order), BATCH), desc="embeddings", delay=2, disable=hide, leave=False):
        rows = order[start : start + BATCH]
        lengths = torch.tensor([len(ids[i]) for i in rows])
        padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, i in enumerate(rows):
            padded[row, : lengths[row]] = torch.tensor(ids[i])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        given = {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}
        with evaluating(model):
            states = states_of(model, model(**given, output_hidden_states=True), layer)
        out[rows] = states[torch.arange(len(rows)), lengths - 1].float().cpu()
    return out


class Embedder:
    """A model that turns texts into embeddings, with its own tokenizer; any decoder's checkpoint will do."""

    def __init__(self, model: Any, tokenizer: Any, layer: int = -1) -> None:
        config = model.config.get_text_config(decoder=True)
        self.model, self.tokenizer, self.layer = model, tokenizer, layer
        self.name = f"embedding model {Path(model.config.name_or_path or type(model).__name__).name!r}"
        self.width, self.layers = config.hidden_size, config.num_hidden_layers + 1
        check_layer(model, layer, self.name)

    @classmethod
    def from_pretrained(cls, path: str | Path, layer: int = -1, trust_remote_code: bool = False) -> Embedder:
        """Load from a directory or hub id; safetensors only."""
        model, tokenizer = load_checkpoint(AutoModel, "embedding model", path, trust_remote_code, dtype="auto")
        return cls(model, tokenizer, layer)

    def __call__(self, texts: Sequence[str], progress: bool | None = False) -> Tensor:
        """fp32 [N, D] on the CPU: the hidden state at the last token of each text."""
        ids = [self.tokenizer(text, verbose=False).input_ids for text in texts]
        return last_states(self.model, ids, self.layer, self.name, progress=progress)


class EmbeddingProbe(Scorer):
    """A probe on another model's embedding of prompt + completion: any base policy, also with other tokens.

    embed: texts -> [N, D], an Embedder or a call to somebody's service; a tensor, a NumPy array or lists of numbers.
    """

    def __init__(self, embed: Any, probe: Probe, name: str = "embedding-probe") -> None:
        if isinstance(embed, Embedder):
            if probe.hidden_size != embed.width:
                raise InputError(
                    f"scorer {name!r} reads embeddings of width {probe.hidden_size}, {embed.name} gives {embed.width}: "
                    "the probe was trained for another model"
                )
            if probe.layer % embed.layers != embed.layer % embed.layers:
                raise InputError(f"scorer {name!r} was trained on layer {probe.layer}, not on layer {embed.layer}")
        self.embed, self.probe, self.name = embed, probe, name

    @classmethod
    def from_pretrained(
        cls, model: str | Path, probe: Probe, name: str = "embedding-probe", trust_remote_code: bool = False
    ) -> EmbeddingProbe:
        """With an embedding model from a directory or hub id, read at the probe's layer."""
        return cls(Embedder.from_pretrained(model, probe.layer, trust_remote_code), probe, name)

    def move(self, device: torch.device) -> None:
        self.probe.move(device)
        if isinstance(self.embed, Embedder):
            self.embed.model.to(device)

    def score(self, candidates: Candidates) -> Tensor:
        texts = [p + c for p, c in zip(candidates.prompts, candidates.completions, strict=True)]
        try:
            embeddings = torch.as_tensor(self.embed(texts))
        except (TypeError, ValueError) as error:
            raise InputError(f"scorer {self.name!r}: embed gives no matrix: {first_line(error)}") from error
        if embeddings.shape != (len(texts), self.probe.hidden_size):
            raise InputError(
                f"scorer {self.name!r} needs embeddings [{len(texts)}, {self.probe.hidden_size}], "
                f"got {list(embeddings.shape)}"
            )
        return self.probe(embeddings.to(self.probe.head.weight.device)).float()


@torch.inference_mode()
def rerank(
    probe: Probe, embeddings: Tensor, beta: float = 0.0, seed: Tensor | int = 0, position: Tensor | int = 0
) -> BlockSelection:
    """Which of the K samples of each prompt to answer with (Q-Probe).

    embeddings: [B, K, D], fp32, bf16 or fp16. beta: 0 is argmax, > 0 draws from softmax(Q / beta); it need not be
    the one that the probe was trained with. seed, position: as `ops.select_block` takes them.
    Returns BlockSelection: index int64 [B], probability fp32 [B, K], utility fp32 [B, K], the bias included.
    """
    if embeddings.dim() != 3 or embeddings.shape[2] != probe.hidden_size:
        raise InputError(
            f"rerank: scorer {probe.name!r} reads embeddings [prompts, samples, {probe.hidden_size}], "
            f"got {list(embeddings.shape)}"
        )
    options: dict[str, Any] = {"beta": beta, "seed": seed, "position": position}
    if probe.hidden:
        return ops.select_block(probe(embeddings)[..., None].float(), **options)
    picked = ops.select_block(hidden=embeddings, probe=probe.head.weight, **options)
    return picked._replace(utility=picked.utility + probe.head.bias)
