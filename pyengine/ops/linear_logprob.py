"""linear_logprob: token log-probabilities and their moments from the LM head, without the logits.

The product with the weight runs tile by tile in torch's own GEMM; a fused epilogue folds each tile into
running moments while it is in the cache, and the backward recomputes each tile and turns it into the
gradient in place. `[N, V]` never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyengine import reference
from pyengine.ops import common, logit_tiles
from pyengine.ops.backend import backend
from pyengine.ops.common import check_float, fail, instruction_set, launched, library
from pyengine.ops.logit_tiles import (
    COLUMNS,
    TOKENS,
    Gradients,
    Head,
    RowGradient,
    check_head,
    check_labels,
    check_numbers,
    check_target,
    columns,
    differentiate,
    fake_gradients,
    finish,
    fold,
    fused,
    gradient_into,
    in_place,
    kept_rows,
    make_head,
    multiply,
    new_state,
    operator_gradients,
    tokens,
    triton_runs,
    whole_rows,
)
from pyengine.reference import TokenLogprob

OP = "linear_logprob"
TWIN = "logits_logprob"

_SAMPLING = "float temperature, float? softcap, int ignore_index"
library.define(
    f"linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {_SAMPLING}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "linear_logprob_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor target, Tensor lse, Tensor entropy, {_SAMPLING}, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
library.define(f"logits_logprob(Tensor logits, Tensor target, {_SAMPLING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
library.define(
    "logits_logprob_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor logits, Tensor target, Tensor lse, "
    f"Tensor entropy, {_SAMPLING}) -> Tensor"
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprob:
    """Log-probability of each target under softmax(l), with the moments that weights are made of.

    l = c tanh(z / c) / temperature with z = hidden . weight^T + bias and c = softcap; without softcap,
    l = z / temperature. WPO's sampled alignment is logp + 2 lse - lse2, its greedy alignment
    logp + lse - max_logit; one exp an element gives all moments, so they cost next to nothing.

    Args:
        hidden: [..., D], fp32, bf16 or fp16.
        weight: [V, D], of the same type.
        target: int64 [...]; ignore_index marks rows to skip. They cost no product.
        bias: [V] or None.
        temperature, softcap: positive numbers.

    Returns:
        TokenLogprob, each field fp32 of target's shape, in nats. logp and entropy carry gradients to hidden,
        weight and bias; lse, lse2 and max_logit are detached. Ignored rows are 0 in every field and give no
        gradient. A row with NaN or +inf, or with -inf alone, is NaN in every field. A target whose logit is
        -inf has logp -inf.

    Raises:
        ValueError: a shape, dtype, device or number is out of range, or, on a CPU, a target is (on a GPU Triton's
            kernels make such a row NaN: to look would synchronise).
    """
    check_head(OP, hidden, weight, bias, target)
    check_numbers(OP, temperature, softcap)
    flat, rows = hidden.flatten(0, -2), target.flatten()
    if backend(OP, hidden) == "reference":
        launched(OP, "reference")
        check_labels(OP, rows, len(weight), ignore_index)
        numbers: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
        return _as_result(reference.linear_logprob(flat, weight, rows, bias=bias, **numbers), target)
    fields = torch.ops.pyengine.linear_logprob(flat, weight, bias, rows, temperature, softcap, ignore_index)
    return _as_result(fields, target)


def logits_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprob:
    """`linear_logprob` for people who hold logits: one pass over [..., V], nothing else of that size.

    Args:
        logits: [..., V], fp32, bf16 or fp16, before softcap and temperature. Rows may be strided.
        target, temperature, softcap, ignore_index: as in `linear_logprob`.

    Returns:
        As `linear_logprob`; the gradient goes to logits.

    Raises:
        ValueError: as `linear_logprob`.
    """
    check_float(TWIN, logits, "logits")
    if logits.dim() < 1 or logits.shape[-1] == 0 or logits.shape[:-1] != target.shape:
        fail(TWIN, f"target must have the shape of logits without V, got {list(target.shape)}, {list(logits.shape)}")
    check_target(TWIN, target, logits.device)
    check_numbers(TWIN, temperature, softcap)
    flat = logits.reshape(-1, logits.shape[-1])
    rows = target.flatten()
    if backend(TWIN, logits) == "reference":
        launched(TWIN, "reference")
        check_labels(TWIN, rows, logits.shape[-1], ignore_index)
        numbers: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "ignore_index": ignore_index}
        return _as_result(reference.logits_logprob(flat, rows, **numbers), target)
    fields = torch.ops.pyengine.logits_logprob(flat, rows, temperature, softcap, ignore_index)
    return _as_result(fields, target)


def _as_result(fields: tuple[Tensor, ...], target: Tensor) -> TokenLogprob:
    logp, lse, lse2, max_logit, entropy = (field.float().view(target.shape) for field in fields)
    return TokenLogprob(logp, lse.detach(), lse2.detach(), max_logit.detach(), entropy)


def _kernel(x: Tensor) -> str:
    return "triton" if triton_runs(x) else instruction_set()


def _scatter(fields: TokenLogprob, kept: Tensor, rows: int) -> tuple[Tensor, ...]:
    return tuple(field.new_zeros(rows).index_copy_(0, kept, field).float() for field in fields)


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    launched(OP, _kernel(hidden))
    head = make_head(weight, bias, temperature, softcap, ignore_index)
    if triton_runs(hidden) and len(hidden) <= logit_tiles.FUSED_TOKENS:
        return tuple(fused(hidden, weight, head, target.contiguous()))
    kept = kept_rows(OP, target, head.vocab, ignore_index)
    parts, step = [], tokens(hidden)
    buffer = hidden.new_empty(min(len(kept), step) * min(head.vocab, COLUMNS))
    for rows in kept.split(step):
        some, labels = hidden[rows], target[rows]
        state = new_state(labels)
        for start, end in columns(head.vocab):
            fold(multiply(some, weight[start:end], buffer), start, head, labels, state)
        parts.append(finish(state, head, labels))
    return _scatter(TokenLogprob(*(torch.cat(field) for field in zip(*parts, strict=True))), kept, len(target))


def _linear_logprob_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each empty unless wanted."""
    head = make_head(weight, bias, temperature, softcap, ignore_index)
    kept = kept_rows(OP, target, head.vocab, ignore_index)
    gradients, step = Gradients(hidden, weight, bias, wanted), tokens(hidden)
    buffer = hidden.new_empty(min(len(kept), step) * min(head.vocab, COLUMNS))
    scratch = buffer if in_place(buffer) else buffer.float()
    for rows in kept.split(step):
        if len(rows) == 0:
            continue
        some, labels = hidden[rows], target[rows]
        known = _row_gradient(grad_logp, grad_entropy, lse, entropy, rows)

        def recomputed() -> Iterator[tuple[int, int, Tensor]]:
            for start, end in columns(head.vocab):
                tile = multiply(some, weight[start:end], buffer)
                yield start, end, differentiate(tile, start, head, labels, known, scratch)

        gradients.add(recomputed(), some, weight, rows)
    given = (hidden, weight, bias)
    return tuple(operator_gradients(gradients.results(weight, bias), given))  # type: ignore[return-value]


def _row_gradient(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, lse: Tensor, entropy: Tensor, rows: Tensor
) -> RowGradient:
    by_logp = lse.new_zeros(len(rows)) if grad_logp is None else grad_logp[rows]
    return RowGradient(lse[rows], entropy[rows], by_logp, None if grad_entropy is None else grad_entropy[rows])


def _runs(target: Tensor, ignore_index: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of rows that are not ignored: logits are read where they lie."""
    if triton_runs(target):  # to look would synchronise, and the kernels skip ignored rows
        return iter([(0, len(target))])
    edges = torch.nn.functional.pad((target != ignore_index).to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return zip(edges[::2], edges[1::2], strict=True)


def _logits_logprob(
    logits: Tensor, target: Tensor, temperature: float, softcap: float | None, ignore_index: int
) -> tuple[Tensor, ...]:
    launched(TWIN, _kernel(logits))
    target = target.contiguous()
    logits, head = common.unit_stride(logits), Head(logits.shape[1], None, temperature, softcap, ignore_index)
    if triton_runs(logits):
        return tuple(whole_rows(logits, head, target))
    check_labels(TWIN, target, head.vocab, ignore_index)
    fields = [logits.new_zeros(len(target), dtype=torch.float32) for _ in TokenLogprob._fields]
    for start, end in _runs(target, ignore_index):
        state = new_state(target[start:end])
        fold(logits[start:end], 0, head, target[start:end], state)
        for out, field in zip(fields, finish(state, head, target[start:end]), strict=True):
            out[start:end] = field
    return tuple(fields)


def _logits_logprob_backward(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:
    target = target.contiguous()
    logits, head = common.unit_stride(logits), Head(logits.shape[1], None, temperature, softcap, ignore_index)
    # Triton writes every row, the ignored ones too: to clear them first would cost a third of the traffic.
    gradient = (logits.new_empty if triton_runs(logits) else logits.new_zeros)(logits.shape)
    direct = in_place(logits)
    step = max(1, len(target) if direct else TOKENS * COLUMNS // head.vocab)  # rows that a tile's scratch holds
    for first, last in _runs(target, ignore_index):
        for start in range(first, last, step):
            rows = torch.arange(start, min(start + step, last), device=logits.device)
            at = slice(start, start + len(rows))
            out = gradient[at] if direct else lse.new_empty(len(rows), head.vocab)
            known = _row_gradient(grad_logp, grad_entropy, lse, entropy, rows)
            gradient_into(out, logits[at], 0, head, target[at], known)
            if not direct:
                gradient[at] = out
    return gradient


def _fake_fields(rows: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return tuple(rows.new_empty(target.shape, dtype=torch.float32) for _ in TokenLogprob._fields)


def _fake_backward(
    by_logp: object, by_entropy: object, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(fake_gradients((hidden, weight, bias), rest[-1]))


def _setup(ctx: object, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)  # type: ignore[attr-defined]
    *tensors, temperature, softcap, ignore_index = inputs
    ctx.save_for_backward(*tensors, output[1], output[4])  # type: ignore[attr-defined]
    ctx.numbers = (temperature, softcap, ignore_index)  # type: ignore[attr-defined]


def _linear_autograd(ctx, grad_logp, _lse, _lse2, _max, grad_entropy):  # type: ignore[no-untyped-def]
    wanted = list(ctx.needs_input_grad[:3])
    if (grad_logp is None and grad_entropy is None) or not any(wanted):
        return (None,) * 7
    out = torch.ops.pyengine.linear_logprob_backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.numbers, wanted)
    return (*(gradient if want else None for gradient, want in zip(out, wanted, strict=True)), *(None,) * 4)


def _logits_autograd(ctx, grad_logp, _lse, _lse2, _max, grad_entropy):  # type: ignore[no-untyped-def]
    if (grad_logp is None and grad_entropy is None) or not ctx.needs_input_grad[0]:
        return (None,) * 5
    gradient = torch.ops.pyengine.logits_logprob_backward(grad_logp, grad_entropy, *ctx.saved_tensors, *ctx.numbers)
    return (gradient, *(None,) * 4)


for key in ("CPU", "CUDA"):
    library.impl("linear_logprob", _linear_logprob, key)
    library.impl("linear_logprob_backward", _linear_logprob_backward, key)
    library.impl("logits_logprob", _logits_logprob, key)
    library.impl("logits_logprob_backward", _logits_logprob_backward, key)
torch.library.register_fake(
    "pyengine::linear_logprob", lambda hidden, weight, bias, target, *_: _fake_fields(hidden, target), lib=library
)
torch.library.register_fake("pyengine::linear_logprob_backward", _fake_backward, lib=library)
torch.library.register_fake(
    "pyengine::logits_logprob", lambda logits, target, *_: _fake_fields(logits, target), lib=library
)
torch.library.register_fake(
    "pyengine::logits_logprob_backward", lambda a, b, logits, *_: logits.new_empty(logits.shape), lib=library
)
torch.library.register_autograd("pyengine::linear_logprob", _linear_autograd, setup_context=_setup, lib=library)
torch.library.register_autograd("pyengine::logits_logprob", _logits_autograd, setup_context=_setup, lib=library)
