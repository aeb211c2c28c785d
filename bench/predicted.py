"""What bench/results/sass.json foresees of a timed row: the share of the bandwidth's floor that it reaches on an H200.

An op takes as long as its bytes at the share that its streaming kernel allows, at least as long as one program of that
kernel, and then as long as one warp of the kernel that ends a row, with what a launch costs where the two do not
overlap. The first run on a GPU judges these numbers, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import sass

LAUNCH = 1e-6  # seconds from a kernel's end to the next one's start
HEADS, KEY_HEADS, WIDTH = 32, 8, 128  # of tree_attention's rows
SPAN, SPLITS, WIDEST = 256, 8, 1024  # kernels/tree_attention.py


def tilt_bytes(row: dict) -> int:
    return 4 * row["batch"] * row["vocab"]


def logits_bytes(row: dict) -> int:
    return 2 * row["tokens"] * row["vocab"]


def tree_bytes(row: dict) -> int:
    return 4 * row["prompts"] * (row["prefix"] + 16 * row["branches"]) * KEY_HEADS * WIDTH


def tree_turns(row: dict) -> int:
    """Tiles of 32 tokens that one program of tree_attention reads."""
    span = SPAN
    while span < WIDEST and span * SPLITS < row["prefix"]:
        span *= 2
    return span // 32


def sums_bytes(row: dict) -> int:
    """What the splits of tree_attention write and read again."""
    splits = max(min(-(-row["prefix"] // SPAN), SPLITS), -(-row["prefix"] // WIDEST)) + 1
    return 2 * splits * row["prompts"] * row["branches"] * HEADS * WIDTH * 4


class Op(NamedTuple):
    """Which kernel streams its bytes, which one ends a row, and what a launch between them costs in seconds."""

    streams: str
    ends: str
    gap: float
    bytes: Callable[[dict], int]
    besides: Callable[[dict], int] = lambda row: 0
    turns: Callable[[dict], int] = lambda row: 1


TILT, LOGITS, TREE = "tilt bf16, ", "logits bf16, ", "tree bf16, "
# Of CUDA's tilt_draw the count finds the shortest way, a bad row's, so that its op is not foreseen.
OPS = {
    "tilt_sample": (
        "pyengine triton",
        Op("tilt bf16, tilt_blocks_kernel", "tilt bf16, tilt_draw_kernel", 0, tilt_bytes),
    ),
    "logits_logprob, forward": ("pyengine", Op(LOGITS + "fold_kernel", LOGITS + "finish_kernel", LAUNCH, logits_bytes)),
    "tree_attention": (
        "pyengine",
        Op(TREE + "tree_attention_kernel", TREE + "merge_kernel", LAUNCH, tree_bytes, sums_bytes, tree_turns),
    ),
}


def fractions(row: dict) -> dict[str, float]:
    """{run: share of the floor that is foreseen} of a row of bench/gpu.py, where the count knows its op."""
    if row["what"] not in OPS:
        return {}
    kernels = {}
    for compiler in json.loads(sass.TABLE.read_text()).values():
        kernels |= {name: by_arch["sm_90"] for name, by_arch in compiler["kernels"].items()}
    run, op = OPS[row["what"]]
    floor = op.bytes(row) / sass.BANDWIDTH
    streaming = (floor + op.besides(row) / sass.BANDWIDTH) / kernels[op.streams]["share"]
    streaming = max(streaming, op.turns(row) * kernels[op.streams]["chain"] / sass.CLOCK)
    return {run: round(floor / (streaming + op.gap + kernels[op.ends]["chain"] / sass.CLOCK), 3)}


def beside(section: Callable) -> Callable:
    """A section of bench/gpu.py with what was foreseen beside what was measured; small sizes have nothing."""

    def rows(rig):
        for row in section(rig):
            found = {} if rig.small else fractions(row)
            yield row | ({"predicted_fraction_of_floor": found} if found else {})

    return rows
