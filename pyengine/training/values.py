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
    ahead: Tensor  # [N] bool: the method's target is what the scorer expects one token later
    logits: Tensor  # [number of ahead, V] of the base policy after those y_t


def looks_ahead(method: Method | None, last: Tensor, ended: Tensor) -> Tensor:
    """Which prefixes have an expectation as their target, bool [N]: last, ended (of their responses): bool [N].

    For CD-Q all but the end of a response that ended, for CD-FUDGE the cut of one that was cut off; None: none.
    """
    if method is None:
        return torch.zeros_like(last)
    return last & ~ended if method == "fudge" else ~(last & ended)


@torch.no_grad()
def read_prefixes(model: Any, batch: Batch, layer: int, method: Method | None = None) -> Prefixes:
    """What a frozen model says of a batch, without gradient; see `gather_prefixes`."""
    return gather_prefixes(model, batch, layer, method)


def gather_prefixes(model: Any, batch: Batch, layer: int, method: Method | None = None) -> Prefixes:
    """What a model says of a batch, each response read once; logits where `method` looks ahead, for None nowhere.

    Rows of like length are read together: the batch as it is would be two thirds padding on reviews.
    """
    end = batch.start + batch.length
    together = max(ROWS, PASS // batch.ids.shape[1])
    parts = [_read(model, batch, rows, layer, method) for rows in end.argsort(stable=True).split(together)]
    found = Prefixes(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    order = found.response.argsort(stable=True)
    place = (found.ahead.cumsum(0) - 1)[order][found.ahead[order]]
    ordered = {name: column[order] for name, column in found._asdict().items() if name != "logits"}
    return Prefixes(**ordered, logits=found.logits[place])


def _read(model: Any, batch: Batch, rows: Tensor, layer: int, method: Method | None) -> Prefixes:
    """One forward pass over some rows of a batch."""
    start, end = batch.start[rows, None], (batch.start + batch.length)[rows, None]
    ids = batch.ids[rows, : int(end.max())]
    steps = torch.arange(ids.shape[1], device=ids.device)
    at = ((steps >= start) & (steps < end)).flatten().nonzero()[:, 0]
    last, response = (steps == end - 1).flatten()[at], rows[at // ids.shape[1]]
    ahead = looks_ahead(method, last, batch.ended[response])
    keep_few = not bool(ahead.any()) and "logits_to_keep" in inspect.signature(model.forward).parameters
    output = model(
        input_ids=ids,
        attention_mask=(steps < end).long(),
        use_cache=False,
        output_hidden_states=True,
        **({"logits_to_keep": 1} if keep_few else {}),
    )
    hidden = states_of(model, output, layer).flatten(0, 1)
    none = hidden.new_empty(0)  # which torch.cat leaves out
    return Prefixes(
        before=hidden[at - 1],
        token=ids.flatten()[at],
        after=hidden[at],
        last=last,
        response=response,
        ahead=ahead,
        logits=output.logits.flatten(0, 1)[at[ahead]] if bool(ahead.any()) else none,
    )


class Student(nn.Module):
    """A prefix scorer while it learns: Q[., z] = scorer's + one column that all tokens share.

    The shared column tells tokens that the responses hold rarely or never what the others have in common; without it
    they would keep the mean reward, above all others where things stand badly. `finished` adds it to every row of the
    head, so that what is saved is a plain `PrefixScorer`.

    A row of the head whose token no response holds has no gradient and stays 0, so the head is kept to the others: of
    49,152 tokens a few thousand, and the step of the optimiser costs so much less.
    """

    accepts_loss_kwargs = False  # the loss is a mean over responses: Trainer divides it by the accumulation
    drawn: Tensor
    row: Tensor  # of the head, for each token of the vocabulary; -1 where it has none

    def __init__(self, scorer: PrefixScorer, mean: float, drawn: Tensor | None = None) -> None:
        """The scorer starts as the constant `mean` (of the rewards). drawn: int64 [U], the tokens that the responses
        hold, each once; None: all."""
        super().__init__()
        drawn = torch.arange(scorer.vocab_size) if drawn is None else drawn
        row = torch.full((scorer.vocab_size,), -1)
        row[drawn] = torch.arange(len(drawn))
        scorer.head = nn.Linear(scorer.width, len(drawn))
        self.scorer, self.shared = scorer, nn.Linear(scorer.width, 1)
        self.register_buffer("drawn", drawn, persistent=False)
        self.register_buffer("row", row, persistent=False)
        with torch.no_grad():
            for part in (scorer.head, self.shared):
                part.weight.zero_()
                part.bias.zero_()
            self.shared.bias.fill_(mean)

    def forward(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Q of one token a row, without the others': hidden [N, D], token [N] -> fp32 [N]."""
        features, row = self.scorer.features(hidden), self.row[token]
        own = (features * self.scorer.head.weight[row]).sum(-1) + self.scorer.head.bias[row]
        return torch.where(row >= 0, own.float(), 0.0) + self.shared(features)[:, 0].float()

    @torch.no_grad()
    def expected(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """sum_z pi_ref(z) Q[., z]: hidden [N, D], logits [N, V] -> fp32 [N], without gradient."""
        out = [hidden.new_zeros(0, dtype=torch.float32)]
        rows = max(1, CHUNK // logits.shape[-1])
        for some, following in zip(hidden.split(rows), logits.split(rows), strict=True):
            features = self.scorer.features(some)
            own = expectation(following, self.scorer.head(features), self.drawn)
            out.append(own + self.shared(features)[:, 0].float())
        return torch.cat(out)

    @torch.no_grad()
    def finished(self) -> PrefixScorer:
        """The scorer with all rows of its head, and the shared column in each; the student is used up."""
        scorer, head = self.scorer, self.scorer.head
        whole = nn.Linear(scorer.width, scorer.vocab_size, device="meta")
        for name, shared in (("weight", self.shared.weight), ("bias", self.shared.bias)):
            rows = shared.expand(scorer.vocab_size, *shared.shape[1:]).clone()
            rows[self.drawn] += getattr(head, name)
            setattr(whole, name, nn.Parameter(rows))
        scorer.head = whole
        return scorer.eval()


def expectation(logits: Tensor, values: Tensor, tokens: Tensor | None = None) -> Tensor:
    """E of values [N, U] of these tokens [U] under softmax(logits [N, V]), fp32 [N]; those of probability 0, and all
    others, count nothing. None: of all V."""
    probability = logits.float().softmax(-1)
    if tokens is not None:
        probability = probability[:, tokens]
    return torch.where(probability > 0, probability * values.float(), 0.0).sum(-1)


def targets(method: Method, student: Student, p: Prefixes, reward: Tensor) -> Tensor:
    """What V(y^t) is regressed on, fp32 [N], without gradient (Controlled Decoding); p as `method` has it read.

    CD-Q: the reward at the end of a response that ended, else the expected value one token later. CD-FUDGE: for every
    prefix the return of its response, which is the reward if it ended and the expected value at the cut if it was cut
    off: a reward is never given where the response did not end.
    """
    ahead = p.ahead.nonzero()[:, 0]
    out = reward[p.response] if method == "cd-q" else reward.clone()
    if len(ahead):
        value = student.expected(p.after[ahead], p.logits)
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
