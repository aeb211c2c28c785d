"""linear_preference (WPO-weighted DPO) beside its peers: forward and backward of a paired loss from the LM head.

Peers: the same loss on TRL's chunked log-probability, as shipped and at its best chunk, and Liger's chunked DPO
(which has no WPO weights). The floor is three GEMMs in tiles. All threads of the machine.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from pyengine import ops
from pyengine.ops.logit_tiles import COLUMNS, columns

SIZES = [(128_256, 1024), (151_936, 1024), (128_256, 256)]
PAIRS, LENGTH = 4, 128
TRL_SHIPPED, TRL_BEST = 32_768, 1024


def problem(vocab, width, pairs=PAIRS, length=LENGTH):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2 * pairs, length, width), torch.randn(vocab, width) * width**-0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, vocab, (2 * pairs, length))


def wpo(chosen, rejected, reference_chosen, reference_rejected):
    weight = (chosen.sampled / chosen.tokens + rejected.sampled / rejected.tokens).exp().clamp(max=1)
    return -weight * logsigmoid(0.1 * (chosen.logp - rejected.logp))


def ours(hidden, weight, target):
    return ops.linear_preference(hidden, weight, target, wpo).loss


def trl(hidden, weight, target, chunk):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    flat, outputs = hidden.flatten(0, 1), ("log_sum_sq_probs",)
    logp, _, square, *_ = ChunkedLogProbFunction.apply(
        flat, weight, None, target.flatten(), 1.0, chunk, None, 1.0, outputs
    )
    logp, alignment = logp.view(target.shape), (logp.detach() - square).view(target.shape)
    (chosen, rejected), (a, b) = logp.sum(-1).chunk(2), alignment.mean(-1).chunk(2)
    return -((a + b).exp().clamp(max=1) * logsigmoid(0.1 * (chosen - rejected))).mean()


def liger(hidden, weight, target):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)(weight, hidden, target)[0]


def both(function, hidden, weight, target, *options):
    function(hidden, weight, target, *options).backward()
    hidden.grad = weight.grad = None


def three_gemms(hidden, weight):
    with torch.no_grad():
        flat, vocab = hidden.flatten(0, 1), len(weight)
        buffer = torch.empty(len(flat) * COLUMNS)
        to_hidden, to_weight = torch.zeros_like(flat), torch.empty_like(weight)
        for start, end in columns(vocab):
            tile = buffer[: len(flat) * (end - start)].view(len(flat), end - start)
            torch.mm(flat, weight[start:end].T, out=tile)
            to_hidden.addmm_(tile, weight[start:end])
            torch.mm(tile.T, flat, out=to_weight[start:end])


@pytest.mark.parametrize(("vocab", "width"), SIZES)
def test_peers(race, peak, rows, vocab, width):
    given = problem(vocab, width)
    peers = {
        "three GEMMs in tiles": lambda: three_gemms(*given[:2]),
        f"TRL, chunk {TRL_SHIPPED} (as shipped)": lambda: both(trl, *given, TRL_SHIPPED),
        f"TRL, chunk {TRL_BEST} (its best)": lambda: both(trl, *given, TRL_BEST),
    }
    if width == 256:  # half a minute a round at 1,024
        peers["Liger chunked DPO (no WPO weights)"] = lambda: both(liger, *given)
    raced = race(lambda: both(ours, *given), peers, rounds=3)
    if raced is None:
        return
    times, samples = raced
    megabytes = {
        "pyengine": lambda: both(ours, *given),
        "TRL as shipped": lambda: both(trl, *given, TRL_SHIPPED),
        "TRL at its best": lambda: both(trl, *given, TRL_BEST),
    }
    rows.append(
        {
            "what": "forward+backward",
            "pairs": PAIRS,
            "length": LENGTH,
            "vocab": vocab,
            "width": width,
            "seconds": {name: round(t, 4) for name, t in times.items()},
            "times_slower": {name: round(t / times["pyengine"], 3) for name, t in times.items()},
            "times_three_gemms": round(times["pyengine"] / times["three GEMMs in tiles"], 3),
            "extra_peak_megabytes": {name: round(peak(run) / 1e6) for name, run in megabytes.items()},
            "samples": samples,
        }
    )


def test_smoke(benchmark):
    given = problem(3000, 16, pairs=2, length=5)
    loss = benchmark.pedantic(ours, given, rounds=1)
    logp = torch.nn.functional.linear(given[0], given[1]).log_softmax(-1)
    sums = logp.gather(-1, given[2][..., None])[..., 0].sum(-1)
    square = (2 * logp).logsumexp(-1)
    weight = (logp.gather(-1, given[2][..., None])[..., 0] - square).mean(-1).detach()
    weights = (weight[:2] + weight[2:]).exp().clamp(max=1)
    torch.testing.assert_close(loss, -(weights * logsigmoid(0.1 * (sums[:2] - sums[2:]))).mean())
    three_gemms(*given[:2])
