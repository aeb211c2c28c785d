"""What a decode step must move and compute, so that a measured time can be put beside the floor.

    python bench/roofline.py                        # a table for an 8 B Llama on an H200
    python bench/roofline.py --model 100M --device 2-core-epyc

Bytes: the weights once a step; the keys and values of each prompt's prefix once for all K branches (tree), or once for
each branch (replicated); the logits written and read. FLOPs: two a weight and row, four a key, query head and
dimension. The floor is the larger of bytes / bandwidth and FLOPs / rate, phase by phase, as phases do not overlap.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer with gated MLPs; head width = hidden / heads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    bytes: int  # of a number

    @property
    def width(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Those that a step multiplies with: all but the embedding table."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.width
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocab

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.width * self.bytes


@dataclass(frozen=True)
class Device:
    """bandwidth in bytes a second, flops of the model's type a second; both as measured, not as printed."""

    bandwidth: float
    flops: float


MODELS = {
    "8B": Model(4096, 14336, 32, 32, 8, 128_256, 2),
    "100M": Model(768, 2048, 12, 12, 4, 32_000, 4),
}
DEVICES = {
    "H200": Device(4.3e12, 700e9 * 1e3),
    "H100": Device(3.0e12, 650e9 * 1e3),
    "2-core-epyc": Device(33e9, 200e9),  # torch.sum over 400 MB; oneDNN sgemm of 1,024 rows
}


@dataclass(frozen=True)
class Step:
    """Seconds of one decode step of B prompts with K branches each, tails of S tokens."""

    products: float
    attention: float
    sampling: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.sampling


def step(model: Model, device: Device, prompts: int, branches: int, prefix: int, tail: int, tree: bool) -> Step:
    """The floor of a step; `tree` reads a prefix once for all its branches."""
    rows = prompts * branches
    keys = prompts * (prefix + branches * tail) if tree else rows * (prefix + tail)
    pairs = rows * (prefix + tail) * model.heads * model.width * model.layers

    def floor(moved: float, computed: float) -> float:
        return max(moved / device.bandwidth, computed / device.flops)

    return Step(
        products=floor(model.weights * model.bytes, 2 * model.weights * rows),
        attention=floor(keys * model.token_bytes, 4 * pairs),
        sampling=floor(2 * rows * model.vocab * model.bytes, 0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="8B")
    parser.add_argument("--device", choices=DEVICES, default="H200")
    parser.add_argument("--tail", type=int, default=16, help="tokens of a branch")
    chosen = parser.parse_args()
    model, device = MODELS[chosen.model], DEVICES[chosen.device]
    print(
        f"{chosen.model} on {chosen.device}: milliseconds a step, tree / replicated, and how many times slower that is"
    )
    print(f"{'B':>3} {'P':>6} " + "".join(f"{f'K={k}':>22}" for k in (1, 4, 8, 16, 32)))
    for prompts in (1, 8, 32):
        for prefix in (2048, 8192):
            cells = []
            for k in (1, 4, 8, 16, 32):
                tree, copied = (step(model, device, prompts, k, prefix, chosen.tail, t).total for t in (True, False))
                cells.append(f"{tree * 1e3:8.2f} /{copied * 1e3:7.2f} {copied / tree:4.1f}")
            print(f"{prompts:>3} {prefix:>6} " + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
