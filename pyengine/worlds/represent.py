"""A world as a real language model: GPT-2 whose logits are the world's log-probabilities, and scorers on its states.

One layer, its attention and MLP projected to zero. A token's embedding is the one-hot of its class, its position's is a
one-hot too, so every sum has the same mean and variance, and the final LayerNorm is set to undo itself. The hidden
state is therefore (class, features, position) in plain sight and the LM head a table of log P(next token | class).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pyengine.errors import InputError
from pyengine.scorers.base import Candidates, Hidden, Policy, Scorer
from pyengine.worlds.markov import Chain, values

Array = NDArray[np.float64]
EOS = "<eos>"
FORBIDDEN = -100.0  # logit of what cannot come: e^-100 of the mass, and small enough for fp32 to keep the others
LAYER = -1


@dataclass(frozen=True, eq=False)
class World:
    """A model and its tokenizer, ready for `Engine(world.model, world.tokenizer, ...)`.

    classes, features, positions: where they are in the hidden state of layer -1.
    """

    model: Any
    tokenizer: Any
    classes: slice
    features: slice
    positions: slice


def build(
    law: Array, classes: Sequence[int], names: Sequence[str], positions: int, features: Array | None = None
) -> World:
    """A model of P(next token | class of the last token) [C, V].

    classes: of each token [V]. names: the tokens' texts, the EOS last and without one. features: [V, F], read by
    scorers; they come with a dimension that makes all their norms equal. Logits are exact to 1e-4 in fp32.
    """
    count, vocab = law.shape
    if not len(classes) == vocab == len(names) + 1:
        raise InputError(
            f"build: {vocab} tokens need {vocab} classes and {vocab - 1} names, got {len(classes)}, {len(names)}"
        )
    width = 0 if features is None else features.shape[1]
    spare = 0 if features is None else 1
    # φ and the rest of its norm stand once with each sign, so that they add nothing to a mean.
    start = (count, count + width + spare, count + 2 * (width + spare))
    size = -(-(start[2] + positions) // 16) * 16  # a width that the attention kernel takes
    embedding = np.zeros((vocab, size))
    embedding[range(vocab), list(classes)] = 1
    if features is not None:
        norm = np.square(features).sum(1)
        full = np.hstack([features, np.sqrt(norm.max() - norm)[:, None]])
        embedding[:, start[0] : start[1]], embedding[:, start[1] : start[2]] = full, -full
    place = np.zeros((positions, size))
    place[range(positions), start[2] + np.arange(positions)] = 1

    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=size,
        n_layer=1,
        n_head=1,
        n_inner=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocab - 1,
    )
    config.name_or_path = "world"
    model = GPT2LMHeadModel(config).eval()
    rows = embedding + place[0]
    head = np.zeros((vocab, size))
    with np.errstate(divide="ignore"):
        head[:, :count] = np.maximum(np.log(law), FORBIDDEN).T
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.from_numpy(embedding))
        model.transformer.wpe.weight.copy_(torch.from_numpy(place))
        for module in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
            module.weight.zero_()
            module.bias.zero_()
        model.transformer.ln_f.weight.fill_(float(np.sqrt(rows[0].var() + config.layer_norm_epsilon)))
        model.transformer.ln_f.bias.fill_(float(rows[0].mean()))
        model.lm_head.weight.copy_(torch.from_numpy(head))
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*names, EOS])}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return World(
        model,
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS),
        slice(0, count),
        slice(start[0], start[0] + width),
        slice(start[2], start[2] + positions),
    )


class TableScorer(Scorer):
    """V(row, z) from a table [R, V], where the row is a one-hot in the hidden state before z.

    gain: [V], what each token adds at once; `score` counts it over the response. Scores every prefix and every next
    token, so all strategies take it.
    """

    scores_tokens = True
    layers = (LAYER,)

    def __init__(self, table: Array, rows: slice, name: str = "table", gain: Array | None = None) -> None:
        self.table = torch.from_numpy(np.ascontiguousarray(table)).float()
        self.gain = torch.zeros(table.shape[1]) if gain is None else torch.from_numpy(gain).float()
        self.rows, self.name = rows, name

    def check(self, policy: Policy) -> None:
        if self.table.shape[1] != policy.vocab_size:
            raise InputError(
                f"scorer {self.name!r} has values of {self.table.shape[1]} tokens, {policy.name} has "
                f"{policy.vocab_size}: make it for this world"
            )

    def move(self, device: torch.device) -> None:
        self.table, self.gain = self.table.to(device), self.gain.to(device)

    def row(self, hidden: Hidden) -> Tensor:
        return hidden[LAYER][:, self.rows].argmax(-1)

    def score(self, candidates: Candidates) -> Tensor:
        last = torch.tensor([tokens[-1] for tokens in candidates.tokens], device=self.table.device)
        gained = torch.stack([self.gain[list(tokens)].sum() for tokens in candidates.tokens])
        return self.table[self.row(candidates.previous), last] + gained

    def values(self, hidden: Hidden) -> Tensor:
        return self.table[self.row(hidden)] + self.gain


def markov(chain: Chain) -> World:
    """A chain; states, and so prompts, are the texts "s0", "s1", ..."""
    stop = np.eye(chain.states + 1)[-1:]  # nothing follows the EOS
    names = [f"s{i}" for i in range(chain.states)]
    return build(np.vstack([chain.step, stop]), range(chain.states + 1), names, chain.cap + 1)


def value_scorer(chain: Chain, world: World, value: Array | None = None, name: str = "value") -> TableScorer:
    """The chain's V*, or another value table [cap + 1, S + 1], as a scorer: at position t it tells V of t + 1."""
    value = values(chain) if value is None else value
    return TableScorer(np.vstack([value[1:], value[-1:]]), world.positions, name, chain.gain.astype(float))


def bigrams(laws: Array, length: int) -> World:
    """P(next | last) of X prompts "p0", "p1", ..., each with tokens "0.0", "0.1", ... of its own: laws [X, V + 1, V].

    Responses have `length` tokens; token v after prompt x has the id x V + v.
    """
    prompts, rows, vocab = laws.shape
    law = np.zeros((prompts * rows + 1, prompts * (vocab + 1) + 1))
    for x in range(prompts):
        law[x * rows : (x + 1) * rows, x * vocab : (x + 1) * vocab] = laws[x]
    law[-1, -1] = 1  # nothing follows the EOS
    classes = [x * rows + v for x in range(prompts) for v in range(vocab)]
    classes += [x * rows + vocab for x in range(prompts)] + [prompts * rows]
    names = [f"{x}.{v}" for x in range(prompts) for v in range(vocab)] + [f"p{x}" for x in range(prompts)]
    return build(law, classes, names, length + 1)


def one_token(prompts: int, outcomes: int, laws: Array | None = None) -> World:
    """One-token responses "o0", "o1", ... to the prompts "p0", "p1", ...; every prompt is a class.

    laws: [X, Y], the probabilities of the outcomes of each prompt; uniform by default.
    """
    vocab = outcomes + prompts + 1
    law = np.zeros((prompts + 1, vocab))
    law[:, :outcomes] = 1 / outcomes
    if laws is not None:
        law[:-1, :outcomes] = laws
    classes = [prompts] * outcomes + [*range(prompts), prompts]
    names = [f"o{i}" for i in range(outcomes)] + [f"p{i}" for i in range(prompts)]
    return build(law, classes, names, 2)


def outcome_scorer(table: Array, world: World, name: str) -> TableScorer:
    """Utilities [X, Y] of the outcomes of each prompt in `one_token`; other tokens have -inf."""
    prompts, outcomes = table.shape
    whole = np.full((prompts + 1, outcomes + prompts + 1), -np.inf)
    whole[:-1, :outcomes] = table
    return TableScorer(whole, world.classes, name)


def own_responses(features: Array) -> World:
    """Prompt "p3" answers uniformly with "r3.0", "r3.1", ...; features [X, N, F] stand in the hidden state of these."""
    prompts, samples, width = features.shape
    count = prompts * samples
    law = np.zeros((prompts + 1, count + prompts + 1))
    for x in range(prompts):
        law[x, x * samples : (x + 1) * samples] = 1 / samples
    law[-1, -1] = 1
    classes = [prompts] * count + [*range(prompts), prompts]
    names = [f"r{x}.{i}" for x in range(prompts) for i in range(samples)] + [f"p{x}" for x in range(prompts)]
    table = np.vstack([features.reshape(count, width), np.zeros((prompts + 1, width))])
    return build(law, classes, names, 2, table)
