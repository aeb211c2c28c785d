"""linear_preference: a paired loss from the LM head, with its gradients made in the forward.

The logits of a chunk of pairs are kept just until their loss is known; then they turn into the gradient in
place. Three GEMMs do the work of `linear_logprob`'s four.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import pyengine._C as _C
from pyengine.ops import common
from pyengine.ops.common import fail, launched
from pyengine.ops.logit_tiles import (
    Gradients,
    Head,
    RowGradient,
    check_head,
    check_numbers,
    columns,
    differentiate,
    finish,
    fold,
    kept_rows,
    make_head,
    multiply,
    new_state,
)
from pyengine.reference import PairedLoss, Preference, SequenceMoments, TokenLogprob

OP = "linear_preference"
# Logits that a chunk of pairs may keep: 512 tokens at V = 131,072, 256 MB in fp32. Fewer tokens would spend
# more than 4 % of the time on reading and writing the weight's gradient once a chunk.
KEPT_LOGITS = 2**26


def linear_preference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: PairedLoss,
    *,
    reference_logp: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Preference:
    """Mean of a paired loss over P pairs, straight from the hidden states (DPO, IPO, SimPO, ..., times WPO weights).

    Pairs go through in chunks, so `loss` must be a function of each pair alone; a statistic of the batch
    would be one of the chunk.

    Args:
        hidden: [2P, T, D], fp32, bf16 or fp16: P chosen responses, then their P rejected ones.
        weight: [V, D], of the same type.
        target: int64 [2P, T]; ignore_index marks prompt and padding, which cost no product.
        loss: called as loss(chosen, rejected, reference_chosen, reference_rejected) with SequenceMoments of
            some pairs [p] and their reference log-probabilities [p] (None without reference_logp); returns
            the loss of each pair [p]. Only `.logp` carries a gradient.
        reference_logp: [2P] summed log-probabilities under the reference policy, or None.
        bias, temperature, softcap, ignore_index: as in `linear_logprob`.

    Returns:
        Preference: loss (scalar, fp32), whose backward hands out the gradients of hidden, weight and bias;
        losses [P]; moments of all 2P responses (fp32, tokens int64), both detached. A response without
        tokens has log-probability 0.

    Raises:
        ValueError: a shape, dtype, device, number or target is out of range, or `loss` returns another shape.
    """
    if hidden.dim() != 3 or len(hidden) % 2 or len(hidden) == 0:
        fail(OP, f"hidden must have shape [2P, T, D] with P >= 1, got {list(hidden.shape)}")
    check_head(OP, hidden, weight, bias, target)
    check_numbers(OP, temperature, softcap)
    if reference_logp is not None and reference_logp.shape != hidden.shape[:1]:
        fail(OP, f"reference_logp must have shape [{len(hidden)}], got {list(reference_logp.shape)}")
    given = (hidden, weight, bias)
    tracked = torch.is_grad_enabled()
    wanted = [tracked and tensor is not None and tensor.requires_grad for tensor in given]
    with torch.no_grad():
        head = make_head(weight, bias, temperature, softcap)
        gradients = Gradients(hidden.flatten(0, 1), weight, bias, wanted)
        result = _forward(hidden, weight, target, loss, reference_logp, head, ignore_index, gradients)
    if not any(wanted):
        return result
    to_hidden, to_weight, to_bias = gradients.results(weight, bias)
    to_hidden = None if to_hidden is None else to_hidden.view(hidden.shape)
    return result._replace(loss=_Precomputed.apply(result.loss, *given, to_hidden, to_weight, to_bias))


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients are known. They are scaled in place and handed out, so only once: a scaled copy
    of the weight's would cost as much time as a fifth of the GEMMs."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, *gradients):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_preference: its gradients were handed out by an earlier backward; call it again")
        if grad.item() != 1:
            gradients = [None if g is None else g.mul_(grad) for g in gradients]
        return (None, *gradients, None, None, None)


def _chunks(tokens: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of pairs whose tokens [P] sum to at most `limit`, or a single longer pair."""
    start, used = 0, 0
    for pair, count in enumerate(tokens.tolist()):
        if used and used + count > limit:
            yield start, pair
            start, used = pair, 0
        used += count
    yield start, len(tokens)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: PairedLoss,
    reference_logp: Tensor | None,
    head: Head,
    ignore_index: int,
    gradients: Gradients,
) -> Preference:
    launched(OP, _C.instruction_set(common.FORCED_ISA))
    pairs, length = len(hidden) // 2, target.shape[1]
    flat, labels = hidden.flatten(0, 1), target.flatten()
    kept = kept_rows(OP, labels, head.vocab, ignore_index)
    sequence = kept // length  # of each kept row
    tokens = torch.bincount(sequence, minlength=2 * pairs)
    sums = torch.zeros(4, 2 * pairs, dtype=torch.float64)
    losses = torch.empty(pairs)
    limit = max(1, KEPT_LOGITS // head.vocab)
    buffer, scratch = hidden.new_empty(0), torch.empty(0)
    for first, last in _chunks(tokens[:pairs] + tokens[pairs:], limit):
        in_chunk = (sequence % pairs >= first) & (sequence % pairs < last)
        rows, where = kept[in_chunk], sequence[in_chunk]
        some, some_labels = flat[rows], labels[rows]
        keep = gradients.wanted and len(rows) <= limit
        widest = next(columns(head.vocab))[1]
        size = len(rows) * (head.vocab if keep else widest)
        if buffer.numel() < size:  # once or twice: fresh memory costs a page fault every 4 kB
            buffer = hidden.new_empty(size)
            scratch = buffer if hidden.dtype == torch.float32 else torch.empty(len(rows) * widest)
        state = new_state(len(rows))
        for start, end in columns(head.vocab):
            to = buffer[len(rows) * start :] if keep else buffer
            fold(multiply(some, weight[start:end], to), start, head, some_labels, state)
        fields = finish(state)
        _add(sums, fields, where)
        by_sequence = _loss_gradient(loss, sums, tokens, reference_logp, first, last, losses)
        if not gradients.wanted or len(rows) == 0:
            continue
        known = RowGradient(fields.lse.float(), fields.entropy.float(), by_sequence[where], None)

        def differentiated() -> Iterator[tuple[int, int, Tensor]]:
            for start, end in columns(head.vocab):
                if keep:
                    tile = buffer[len(rows) * start : len(rows) * end].view(len(rows), end - start)
                else:  # a pair too long to keep is recomputed, as in linear_logprob's backward
                    tile = multiply(some, weight[start:end], buffer)
                out = tile if tile.dtype == torch.float32 else scratch[: tile.numel()].view_as(tile)
                differentiate(tile, start, head, some_labels, known, out)
                yield start, end, out

        gradients.add(differentiated(), some, weight, rows)
    return Preference(losses.mean(), losses, _moments(sums, tokens, slice(None)))


def _add(sums: Tensor, fields: TokenLogprob, sequence: Tensor) -> None:
    """Add the tokens' logp, alignments and entropy to the sums [4, 2P] of their sequences."""
    sampled, greedy = fields.logp + 2 * fields.lse - fields.lse2, fields.logp + fields.lse - fields.max_logit
    sums.index_add_(1, sequence, torch.stack((fields.logp, sampled, greedy, fields.entropy)))


def _moments(sums: Tensor, tokens: Tensor, which: slice) -> SequenceMoments:
    logp, sampled, greedy, entropy = sums[:, which].float()
    return SequenceMoments(logp, tokens[which], sampled, greedy, entropy)


def _loss_gradient(
    loss: PairedLoss,
    sums: Tensor,
    tokens: Tensor,
    reference_logp: Tensor | None,
    first: int,
    last: int,
    losses: Tensor,
) -> Tensor:
    """d (mean loss) / d logp of each of the 2P sequences, zero outside the chunk; fills losses[first:last]."""
    pairs = len(losses)
    halves = (slice(first, last), slice(pairs + first, pairs + last))
    references = [None if reference_logp is None else reference_logp[half].detach() for half in halves]
    out = torch.zeros(2 * pairs)
    with torch.enable_grad():
        chosen, rejected = (_moments(sums, tokens, half) for half in halves)
        leaves = [m.logp.detach().requires_grad_() for m in (chosen, rejected)]
        found = loss(chosen._replace(logp=leaves[0]), rejected._replace(logp=leaves[1]), *references)
        if not isinstance(found, Tensor) or found.shape != (last - first,):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            fail(OP, f"loss must return one value a pair, shape [{last - first}], got {shape}")
        if found.requires_grad:
            gradients = torch.autograd.grad(found.sum() / pairs, leaves, allow_unused=True)
            for half, gradient in zip(halves, gradients, strict=True):
                if gradient is not None:
                    out[half] = gradient
    losses[first:last] = found.detach()
    return out
