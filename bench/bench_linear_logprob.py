"""linear_logprob beside its peers: token log-probabilities and WPO's moment from the LM head.

Peers: TRL's chunked log-probability as shipped (chunk 32,768) and at its best chunk, cut-cross-entropy,
F.linear_cross_entropy, all as installed; the floor is the same GEMM in the same tiles with nothing around it.
All threads of the machine. `make bench` times everything.
"""

from __future__ import annotations

import pytest
import torch

from pyengine import ops
from pyengine.ops.logit_tiles import COLUMNS, columns

SIZES = [(128_256, 1024), (151_936, 1024), (128_256, 256)]
TOKENS = 1024
TRL_SHIPPED, TRL_BEST = 32_768, 1024


def problem(vocab, width, rows=TOKENS):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) * width**-0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocab, (rows,))


def trl(hidden, weight, target, chunk):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, chunk, None, 1.0, ("log_sum_sq_probs",))[0]


def cut_cross_entropy(hidden, weight, target):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none", impl="torch_compile")


def torch_linear_cross_entropy(hidden, weight, target):
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="none")


def forward(function, hidden, weight, target, *options):
    with torch.no_grad():
        function(hidden, weight, target, *options)


def both(function, hidden, weight, target, *options):
    function(hidden, weight, target, *options).sum().backward()
    hidden.grad = weight.grad = None


def ours(hidden, weight, target):
    return ops.linear_logprob(hidden, weight, target).logp


def gemms(hidden, weight, backward):
    """The tiles' GEMMs alone: one forward; backward the recomputation and two gradients more."""
    with torch.no_grad():
        rows, vocab = len(hidden), len(weight)
        buffer = torch.empty(rows * COLUMNS)
        to_hidden, to_weight = torch.zeros_like(hidden), torch.empty_like(weight) if backward else None
        for again in (False, True) if backward else (False,):
            for start, end in columns(vocab):
                tile = buffer[: rows * (end - start)].view(rows, end - start)
                torch.mm(hidden, weight[start:end].T, out=tile)
                if again:
                    to_hidden.addmm_(tile, weight[start:end])
                    torch.mm(tile.T, hidden, out=to_weight[start:end])


@pytest.mark.parametrize(("vocab", "width"), SIZES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_peers(race, peak, rows, vocab, width, backward):
    hidden, weight, target = problem(vocab, width)
    step = both if backward else forward
    peers = {
        "GEMMs in tiles": lambda: gemms(hidden, weight, backward),
        f"TRL, chunk {TRL_SHIPPED} (as shipped)": lambda: step(trl, hidden, weight, target, TRL_SHIPPED),
        f"TRL, chunk {TRL_BEST} (its best)": lambda: step(trl, hidden, weight, target, TRL_BEST),
    }
    if width == 256:  # minutes a round at 1,024
        peers["cut-cross-entropy (torch_compile, no moments)"] = lambda: step(cut_cross_entropy, hidden, weight, target)
    if not backward:
        peers["F.linear_cross_entropy (no moments)"] = lambda: step(torch_linear_cross_entropy, hidden, weight, target)
    raced = race(lambda: step(ours, hidden, weight, target), peers, rounds=3)
    if raced is None:
        return
    times, samples = raced
    logits = TOKENS * vocab * 4
    flops = 2 * TOKENS * vocab * width * (4 if backward else 1)
    rows.append(
        {
            "what": "forward+backward" if backward else "forward",
            "tokens": TOKENS,
            "vocab": vocab,
            "width": width,
            "seconds": {name: round(t, 4) for name, t in times.items()},
            "times_slower": {name: round(t / times["pyengine"], 3) for name, t in times.items()},
            "times_the_gemms": round(times["pyengine"] / times["GEMMs in tiles"], 3),
            "gflops": round(flops / times["pyengine"] / 1e9),
            "extra_peak_of_logits": {
                "pyengine": round(peak(lambda: step(ours, hidden, weight, target)) / logits, 3),
                "TRL as shipped": round(peak(lambda: step(trl, hidden, weight, target, TRL_SHIPPED)) / logits, 3),
                "TRL at its best": round(peak(lambda: step(trl, hidden, weight, target, TRL_BEST)) / logits, 3),
            },
            "samples": samples,
        }
    )


def test_smoke(benchmark):
    """Ours and what is installed anyway agree on small sizes."""
    hidden, weight, target = problem(3000, 16, rows=20)
    found = benchmark.pedantic(ours, (hidden, weight, target), rounds=1)
    usual = torch.nn.functional.linear(hidden, weight).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found, usual, atol=1e-5, rtol=1e-5)
    both(ours, hidden, weight, target)
    gemms(hidden, weight, True)
