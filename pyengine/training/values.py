"""The regression behind a prefix scorer: which prefixes a batch holds, what they are regressed on, and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyengine.modes import states_of
from pyengine.scorers import PrefixScorer
from pyengine.training.data import Encoded

Method = Literal["fudge", "cd-q"]
CHUNK = 2**24  # elements of Q that exist at once where an expectation over the vocabulary is taken: 64 MB in fp32
ROWS, PASS = 8, 1024  # responses in one pass of a model; more if they have less than so many tokens


class Batch(NamedTuple):
    """B encoded responses, right-padded. start: of the response's tokens; length: how many, an EOS included."""

    ids: Tensor  # [B, T] int64
    start: Tensor  # [B] int64
    length: Tensor  # [B] int64
    reward: Tensor  # [B] fp32
    ended: Tensor  # [B] bool


def collate(items: Sequence[Encoded]) -> dict[str, Tensor]:
    """A `Batch` as the dict that transformers' Trainer moves about."""
    longest = max(len(item.ids) for item in items)
    batch = Batch(
        torch.tensor([item.ids + [0] * (longest - len(item.ids)) for item in items]),
        torch.tensor([item.start for item in items]),
        torch.tensor([len(item.ids) - item.start for item in items]),
        torch.tensor([item.reward for item in items], dtype=torch.float32),
        torch.tensor([item.ended for item in items]),
    )
    return batch._asdict()


class Prefixes(NamedTuple):
    """The N prefixes y^1 .. y^|y| of a batch's responses, response by response."""

    before: Tensor  # [N, D] hidden state at y_{t-1}, which Q of y_t is read from
    token: Tensor  # [N] y_t
    after: Tensor  # [N, D] hidden state at y_t
    last: Tensor  # [N] bool: y_t is the last token that there is
    response: Tensor  # [N] row of the batch
    logits: Tensor | None  # [N, V] of the base policy after y_t


@torch.no_grad()
def read_prefixes(model: Any, batch: Batch, layer: int, logits: bool) -> Prefixes:
    """What a frozen model says of a batch, without gradient; see `gather_prefixes`."""
    return gather_prefixes(model, batch, layer, logits)


def gather_prefixes(model: Any, batch: Batch, layer: int, logits: bool) -> Prefixes:
    """What a model says of a batch, each response read once; `logits` whether those are kept.

    Rows of like length are read together: the batch as it is would be two thirds padding on reviews.
    """
    end = batch.start + batch.length
    together = max(ROWS, PASS // batch.ids.shape[1])
    parts = [_read(model, batch, rows, layer, logits) for rows in end.argsort(stable=True).split(together)]
    token, response = (torch.cat([getattr(p, name) for p in parts]) for name in ("token", "response"))
    order = response.argsort(stable=True)
    before, after, last = (torch.cat([getattr(p, name) for p in parts])[order] for name in ("before", "after", "last"))
    kept = torch.cat([p.logits for p in parts if p.logits is not None])[order] if logits else None
    return Prefixes(before, token[order], after, last, response[order], kept)


def _read(model: Any, batch: Batch, rows: Tensor, layer: int, logits: bool) -> Prefixes:
    """One forward pass over some rows of a batch."""
    start, end = batch.start[rows, None], (batch.start + batch.length)[rows, None]
    ids = batch.ids[rows, : int(end.max())]
    steps = torch.arange(ids.shape[1], device=ids.device)
    keep_few = not logits and "logits_to_keep" in inspect.signature(model.forward).parameters
    output = model(
        input_ids=ids,
        attention_mask=(steps < end).long(),
        use_cache=False,
        output_hidden_states=True,
        **({"logits_to_keep": 1} if keep_few else {}),
    )
    hidden = states_of(model, output, layer).flatten(0, 1)
    at = ((steps >= start) & (steps < end)).flatten().nonzero()[:, 0]
    return Prefixes(
        before=hidden[at - 1],
        token=ids.flatten()[at],
        after=hidden[at],
        last=(steps == end - 1).flatten()[at],
        response=rows[at // ids.shape[1]],
        logits=output.logits.flatten(0, 1)[at] if logits else None,
    )


class Student(nn.Module):
    """A prefix scorer while it learns: Q[., z] = scorer's + one column that all tokens share.

    The shared column tells tokens that the responses hold rarely or never what the others have in common; without it
    they would keep the mean reward, above all others where things stand badly. `finished` adds it to every row of the
    head, so that what is saved is a plain `PrefixScorer`.
    """

    accepts_loss_kwargs = False  # the loss is a mean over responses: Trainer divides it by the accumulation

    def __init__(self, scorer: PrefixScorer, mean: float) -> None:
        """The scorer starts as the constant `mean` (of the rewards)."""
        super().__init__()
        self.scorer, self.shared = scorer, nn.Linear(scorer.width, 1)
        with torch.no_grad():
            for part in (scorer.head, self.shared):
                part.weight.zero_()
                part.bias.zero_()
            self.shared.bias.fill_(mean)

    def forward(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Q of one token a row, without the others': hidden [N, D], token [N] -> fp32 [N]."""
        features = self.scorer.features(hidden)
        own = (features * self.scorer.head.weight[token]).sum(-1) + self.scorer.head.bias[token]
        return own.float() + self.shared(features)[:, 0].float()

    @torch.no_grad()
    def expected(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """sum_z pi_ref(z) Q[., z]: hidden [N, D], logits [N, V] -> fp32 [N], without gradient."""
        out = [hidden.new_zeros(0, dtype=torch.float32)]
        rows = max(1, CHUNK // logits.shape[-1])
        for some, following in zip(hidden.split(rows), logits.split(rows), strict=True):
            features = self.scorer.features(some)
            out.append(expectation(following, self.scorer.head(features)) + self.shared(features)[:, 0].float())
        return torch.cat(out)

    @torch.no_grad()
    def finished(self) -> PrefixScorer:
        """The scorer with the shared column in its head; the student is used up."""
        self.scorer.head.weight.add_(self.shared.weight)
        self.scorer.head.bias.add_(self.shared.bias)
        return self.scorer.eval()


def expectation(logits: Tensor, values: Tensor) -> Tensor:
    """E of values [N, V] under softmax(logits [N, V]), fp32 [N]; tokens of probability 0 do not count."""
    probability = logits.float().softmax(-1)
    return torch.where(probability > 0, probability * values.float(), 0.0).sum(-1)


def targets(method: Method, student: Student, p: Prefixes, reward: Tensor, ended: Tensor) -> Tensor:
    """What V(y^t) is regressed on, fp32 [N], without gradient (Controlled Decoding).

    CD-Q: the reward at the end of a response that ended, else the expected value one token later. CD-FUDGE: for every
    prefix the return of its response, which is the reward if it ended and the expected value at the cut if it was cut
    off: a reward is never given where the response did not end.
    """
    final = p.last & ended[p.response]
    if method == "cd-q":
        out = reward[p.response]
        ahead = (~final).nonzero()[:, 0]
    else:
        out = reward.clone()
        ahead = (p.last & ~ended[p.response]).nonzero()[:, 0]
    if len(ahead):
        assert p.logits is not None
        value = student.expected(p.after[ahead], p.logits[ahead])
        out = out.index_copy(0, ahead if method == "cd-q" else p.response[ahead], value)
    return out if method == "cd-q" else out[p.response]


def regression_loss(value: Tensor, target: Tensor, response: Tensor, length: Tensor, reduction: str) -> Tensor:
    """Mean over responses of 1/2 (value - target)^2, summed ("sum") or averaged ("token_mean") over their tokens.

    value, target, response: [N], response being rows of length [B].
    """
    error = 0.5 * (value - target).square()
    if reduction == "token_mean":
        error = error / length[response]
    return error.sum() / len(length)
