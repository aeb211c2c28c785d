"""linear_preference: a paired loss from the LM head, with its gradients made in the forward.

The logits of a chunk of pairs are kept just until their loss is known; then they turn into the gradient in
place. Three GEMMs do the work of `linear_logprob`'s four.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyengine import reference
from pyengine.ops.backend import backend
from pyengine.ops.common import fail, instruction_set, launched, library, traced
from pyengine.ops.logit_tiles import (
    Gradients,
    Head,
    RowGradient,
    check_head,
    check_labels,
    check_numbers,
    columns,
    differentiate,
    fake_gradients,
    finish,
    fold,
    in_place,
    kept_rows,
    make_head,
    multiply,
    new_state,
    operator_gradients,
    triton_runs,
)
from pyengine.reference import PairedLoss, Preference, SequenceMoments, TokenLogprob, is_top1

OP = "linear_preference"
library.define(
    "linear_preference(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? reference_logp, int loss, "
    "float temperature, float? softcap, int ignore_index, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Logits that a chunk of pairs may keep: a pair of 2 x 512 tokens at V = 128,256, 540 MB in fp32, half a GB less than
# TRL's chunked head takes for it. Chunks that kept 80M took 6 to 9 % more of a training step's time there, and one
# pair of 2 x 128 a chunk 8 % more of the op's: the weight's gradient is read and written for each.
KEPT_LOGITS = 2**27


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
        Preference: loss (scalar, fp32), whose backward hands out the gradients of hidden, weight and bias, once;
        losses [P]; moments of all 2P responses (fp32, tokens int64) and how many of their tokens are top-1 (int64;
        ties count), all detached. A response without tokens has log-probability 0.

    Raises:
        ValueError: a shape, dtype, device, number or target is out of range, or `loss` returns another shape.
    """
    if hidden.dim() != 3 or len(hidden) % 2 or 0 in hidden.shape:
        fail(OP, f"hidden must have shape [2P, T, D] with P, T >= 1, got {list(hidden.shape)}")
    check_head(OP, hidden, weight, bias, target)
    check_numbers(OP, temperature, softcap)
    if reference_logp is not None and reference_logp.shape != hidden.shape[:1]:
        fail(OP, f"reference_logp must have shape [{len(hidden)}], got {list(reference_logp.shape)}")
    if reference_logp is not None and reference_logp.device != hidden.device:
        fail(OP, f"reference_logp is on {reference_logp.device}, hidden on {hidden.device}")
    if backend(OP, hidden) == "reference":
        launched(OP, "reference")
        check_labels(OP, target.flatten(), len(weight), ignore_index)
        options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
        found = reference.linear_preference(
            hidden, weight, target, loss, reference_logp=reference_logp, bias=bias, **options
        )
        moments = SequenceMoments(*(m if m.dtype == torch.int64 else m.float() for m in found.moments))
        return Preference(found.loss.float(), found.losses.float(), moments, found.top1)
    given = (hidden, weight, bias)
    tracked = torch.is_grad_enabled()
    wanted = [tracked and tensor is not None and tensor.requires_grad for tensor in given]
    if traced(hidden):
        wanted[0] = tracked  # while tracing, what the model made does not say that it requires a gradient
        numbers = (temperature, softcap, ignore_index)
        mean, losses, sums, tokens, *_ = torch.ops.pyengine.linear_preference(
            *given, target, reference_logp, _handle(loss), *numbers, wanted
        )
        sums = sums.detach()
        return Preference(mean, losses.detach(), _moments(sums, tokens, slice(None)), sums[4].long())
    with torch.no_grad():
        head = make_head(weight, bias, temperature, softcap, ignore_index)
        gradients = Gradients(hidden.flatten(0, 1), weight, bias, wanted)
        result = _forward(hidden, weight, target, loss, reference_logp, head, gradients)
    if not any(wanted):
        return result
    to_hidden, to_weight, to_bias = gradients.results(weight, bias)
    to_hidden = None if to_hidden is None else to_hidden.view(hidden.shape)
    return result._replace(loss=_Precomputed.apply(result.loss, *given, to_hidden, to_weight, to_bias))


# A compiled graph calls an operator, and an operator takes no function: it finds the loss by its place here. Held for
# the life of the process, as the graph may be called as long; a method that is bound anew is the same loss.
_LOSSES: list[PairedLoss] = []


@torch._dynamo.assume_constant_result
def _handle(loss: PairedLoss) -> int:
    if getattr(loss, "__closure__", None):  # the graph is not guarded on what a closure holds
        fail(OP, "under torch.compile the loss must not be a closure: give a module's function or a bound method")
    if loss not in _LOSSES:
        _LOSSES.append(loss)
    return _LOSSES.index(loss)


def _operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reference_logp: Tensor | None,
    loss: int,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The forward for compiled graphs: loss, losses, moments and top-1 [5, 2P], tokens, gradients."""
    head = make_head(weight, bias, temperature, softcap, ignore_index)
    gradients = Gradients(hidden.flatten(0, 1), weight, bias, wanted)
    mean, losses, moments, top1 = _forward(hidden, weight, target, _LOSSES[loss], reference_logp, head, gradients)
    found = operator_gradients(gradients.results(weight, bias), (hidden, weight, bias), fp16=torch.float32)
    return mean, losses, torch.stack((moments.logp, *moments[2:], top1.float())), moments.tokens, *found


def _operator_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    rows = len(hidden)
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(rows // 2, dtype=torch.float32),
        hidden.new_empty((5, rows), dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.int64),
        *fake_gradients((hidden, weight, bias), rest[-1], fp16=torch.float32),
    )


def _operator_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.wanted, ctx.types = inputs[-1], [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[4:])


def _operator_autograd(ctx, grad, *_):  # type: ignore[no-untyped-def]
    # Of fp16 they are fp32 still: a loss scale of 2^16 is no number of fp16.
    known = zip(ctx.saved_tensors, ctx.types, ctx.wanted, strict=True)
    scaled = [(g * grad.to(g.dtype)).to(kind) if want else None for g, kind, want in known]
    return (*scaled, *(None,) * 7)


for key in ("CPU", "CUDA"):
    library.impl("linear_preference", _operator, key)
torch.library.register_fake("pyengine::linear_preference", _operator_fake, lib=library)
torch.library.register_autograd(
    "pyengine::linear_preference", _operator_autograd, setup_context=_operator_setup, lib=library
)


class _Precomputed(torch.autograd.Function):
    """A loss whose gradients are known. They are scaled in place and handed out, so only once: a scaled copy
    of the weight's would cost as much time as a fifth of the GEMMs."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, *gradients):  # type: ignore[no-untyped-def]
        ctx.gradients, ctx.types = gradients, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_preference: its gradients were handed out by an earlier backward; call it again")
        if grad.is_cuda or grad.item() != 1:  # to look would synchronise
            gradients = [None if g is None else g.mul_(grad) for g in gradients]
        typed = [None if g is None else g.to(kind) for g, kind in zip(gradients, ctx.types, strict=True)]
        return (None, *typed, None, None, None)


def _chunks(counts: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of pairs whose tokens sum to at most `limit`, or a single longer pair; counts: tokens of each."""
    start, used = 0, 0
    for pair, count in enumerate(counts):
        if used and used + count > limit:
            yield start, pair
            start, used = pair, 0
        used += count
    yield start, len(counts)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: PairedLoss,
    reference_logp: Tensor | None,
    head: Head,
    gradients: Gradients,
) -> Preference:
    launched(OP, "triton" if triton_runs(hidden) else instruction_set())
    pairs, length = len(hidden) // 2, target.shape[1]
    flat, labels = hidden.flatten(0, 1), target.flatten()
    kept = kept_rows(OP, labels, head.vocab, head.ignore_index)
    tokens = (target != head.ignore_index).sum(-1)
    counts = [length] * (2 * pairs) if triton_runs(hidden) else tokens.tolist()
    ends = [0, *accumulate(counts)]  # sequence i has the rows kept[ends[i] : ends[i + 1]]
    chosen_and_rejected = [a + b for a, b in zip(counts[:pairs], counts[pairs:], strict=True)]
    sums = torch.zeros(5, 2 * pairs, dtype=torch.float64, device=hidden.device)
    losses = hidden.new_empty(pairs, dtype=torch.float32)
    limit, widest = max(1, KEPT_LOGITS // head.vocab), next(columns(head.vocab))[1]
    buffer = scratch = hidden.new_empty(0)
    for first, last in _chunks(chosen_and_rejected, limit):
        halves = (slice(first, last), slice(pairs + first, pairs + last))
        rows = torch.cat([kept[ends[half.start] : ends[half.stop]] for half in halves])
        some, some_labels = flat[rows], labels[rows]
        # The ids below `keep` have their logits kept: all, or of a longer pair as many tiles as there is room for.
        keep = KEPT_LOGITS // max(1, len(rows)) // widest * widest if len(rows) > limit else head.vocab
        keep = keep if gradients.wanted else 0
        size = len(rows) * (keep + (widest if keep < head.vocab else 0))
        if buffer.numel() < size:  # once or twice: fresh memory costs a page fault every 4 kB
            buffer = hidden.new_empty(size)
        if not in_place(buffer) and scratch.numel() < len(rows) * widest:
            scratch = hidden.new_empty(len(rows) * widest, dtype=torch.float32)
        state = new_state(some_labels)
        for start, end in columns(head.vocab):
            to = buffer[len(rows) * min(start, keep) :]
            fold(multiply(some, weight[start:end], to), start, head, some_labels, state)
        fields = finish(state, head, some_labels)
        _add(sums, fields, rows, length)
        by_sequence = _loss_gradient(loss, sums, tokens, reference_logp, halves, losses, gradients.wanted)
        if not gradients.wanted or len(rows) == 0:
            continue
        by_logp = by_sequence[rows // length]
        known = RowGradient(fields.lse.float(), fields.entropy.float(), by_logp, None)

        def differentiated() -> Iterator[tuple[int, int, Tensor]]:
            for start, end in columns(head.vocab):
                if start < keep:
                    tile = buffer[len(rows) * start : len(rows) * end].view(len(rows), end - start)
                else:  # recomputed, as in linear_logprob's backward
                    tile = multiply(some, weight[start:end], buffer[len(rows) * keep :])
                yield start, end, differentiate(tile, start, head, some_labels, known, scratch)

        gradients.add(differentiated(), some, weight, rows)
    return Preference(losses.mean(), losses, _moments(sums, tokens, slice(None)), sums[4].long())


def _add(sums: Tensor, fields: TokenLogprob, rows: Tensor, length: int) -> None:
    """Add the tokens' logp, alignments, entropy and top-1 to the sums [5, 2P] of their sequences.

    By way of the padded layout, in which the order of the additions is fixed: index_add_ on a GPU has none.
    """
    sampled, greedy = fields.logp + 2 * fields.lse - fields.lse2, fields.logp + fields.lse - fields.max_logit
    top1 = is_top1(fields).to(fields.logp.dtype)
    padded = sums.new_zeros(len(sums), sums.shape[1] * length)
    padded[:, rows] = torch.stack((fields.logp, sampled, greedy, fields.entropy, top1)).to(sums.dtype)
    sums += padded.view(len(sums), -1, length).sum(-1)


def _moments(sums: Tensor, tokens: Tensor, which: slice) -> SequenceMoments:
    logp, sampled, greedy, entropy, _ = sums[:, which].float()
    return SequenceMoments(logp, tokens[which], sampled, greedy, entropy)


def _loss_gradient(
    loss: PairedLoss,
    sums: Tensor,
    tokens: Tensor,
    reference_logp: Tensor | None,
    halves: tuple[slice, slice],
    losses: Tensor,
    wanted: bool,
) -> Tensor:
    """d (mean loss) / d logp of each of the 2P sequences, zero outside the chunk; fills the chunk's losses."""
    pairs = len(losses)
    references = [None if reference_logp is None else reference_logp[half].detach() for half in halves]
    out = losses.new_zeros(2 * pairs)
    with torch.set_grad_enabled(wanted), _above_autograd():
        chosen, rejected = (_moments(sums, tokens, half) for half in halves)
        leaves = [m.logp.detach().requires_grad_(wanted) for m in (chosen, rejected)]
        found = loss(chosen._replace(logp=leaves[0]), rejected._replace(logp=leaves[1]), *references)
        if not isinstance(found, Tensor) or found.shape != leaves[0].shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            fail(OP, f"loss must return one value a pair, shape {list(leaves[0].shape)}, got {shape}")
        losses[halves[0]] = found.detach()
        if not wanted:
            return out
        if not found.requires_grad:
            fail(OP, "loss must depend on the log-probabilities: what it returned carries no gradient")
        gradients = torch.autograd.grad(found.sum() / pairs, leaves, allow_unused=True)
    for half, gradient in zip(halves, gradients, strict=True):
        if gradient is not None:
            out[half] = gradient
    return out


def _above_autograd() -> AbstractContextManager:
    """Lets the loss build a graph. An operator with a gradient formula, as compiled graphs call, runs below
    autograd, where nothing requires a gradient; torch has no public way back up (2.13)."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
