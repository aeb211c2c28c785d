"""What the bindings of the C++ and CUDA kernels are told: one dict for an op, which csrc/arguments.h reads by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyengine.ops.common import DTYPE_CODE, unit_stride
from pyengine.reference import BlockSelection, TiltSample


def row_arguments(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | float | None,
    mask: Tensor | None,
    temperature: Tensor | float,
    seed: Tensor | float,
    position: Tensor | float,
) -> dict[str, Any]:
    """The rows of tilt_sample and tilt_fold; see csrc/tilt_args.h. A GPU's parameters are tensors."""
    batch, vocab = logits.shape
    return {
        "batch": batch,
        "vocab": vocab,
        "heads": 0 if values is None else values.shape[0],
        "logits": unit_stride(logits),
        "logits_type": DTYPE_CODE[logits.dtype],
        "values": None if values is None else unit_stride(values),
        "values_type": 0 if values is None else DTYPE_CODE[values.dtype],
        "weights": weights,
        "mask": None if mask is None else unit_stride(mask),
        "temperature": temperature,
        "seed": seed,
        "position": position,
    }


def tilt_arguments(
    rows: dict[str, Any],
    top_k: Tensor | float,
    top_p: Tensor | float,
    min_p: Tensor | float,
    gumbel: bool,
    out: TiltSample,
) -> dict[str, Any]:
    """All of tilt_sample: `rows`, which it changes, with the filters and the outputs."""
    rows["top_k"], rows["top_p"], rows["min_p"], rows["gumbel"] = top_k, top_p, min_p, gumbel
    rows["token"], rows["logp_base"], rows["logp_policy"], rows["kl"], rows["valid"] = out
    return rows


def select_arguments(
    given: Tensor,
    probe: Tensor | None,
    weights: Tensor,
    reference: Tensor | None,
    lsc: bool,
    beta: float,
    seed: Tensor | float,
    position: Tensor | float,
    out: BlockSelection,
) -> dict[str, Any]:
    """All of select_block; see csrc/select_args.h. `given` are scores, or hidden states where there is a probe."""
    batch, branches, width = given.shape
    return {
        "batch": batch,
        "branches": branches,
        "heads": width if probe is None else len(probe),
        "given": given,
        "given_type": DTYPE_CODE[given.dtype],
        "probe": probe,
        "probe_type": 0 if probe is None else DTYPE_CODE[probe.dtype],
        "width": width,
        "weights": weights,
        "reference": reference,
        "lsc": lsc,
        "beta": beta,
        "seed": seed,
        "position": position,
        "index": out.index,
        "probability": out.probability,
        "utility": out.utility,
    }
