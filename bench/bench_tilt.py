"""tilt_sample beside its PyTorch peers, for the same outputs: token, both log-probabilities, KL.

One thread, unless threads are what is compared. Peers are the clumsy eager form (softmax + multinomial), three
inverse-CDF forms by cumsum, the fastest of which counts as the best, that one compiled, the sort-based filters,
and Gumbel noise by exponential_. Ratios are of medians in one run, all taking turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from pyengine import ops

TESTS = ("tilt", "tilt_gumbel", "team")
VOCABS = (128_256, 151_936)
BATCHES = (1, 8, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def outputs(base, tilted, policy, token):
    kl = (policy * (tilted - base)).sum(-1)
    return token[:, 0], base.gather(-1, token)[:, 0], tilted.gather(-1, token)[:, 0], kl


def eager_multinomial(logits, values, weight):
    """What one writes first."""
    base = torch.log_softmax(logits.float(), -1)
    tilted = torch.log_softmax(logits.float() + weight * values.float(), -1)
    policy = tilted.exp()
    return outputs(base, tilted, policy, torch.multinomial(policy, 1))


def inverse_cdf(policy):
    cdf = policy.cumsum(-1)
    return torch.searchsorted(cdf, torch.rand_like(cdf[:, :1]) * cdf[:, -1:]).clamp_(max=cdf.shape[-1] - 1)


def cumsum_log_softmax(logits, values, weight):
    base = torch.log_softmax(logits.float(), -1)
    tilted = torch.log_softmax(logits.float() + weight * values.float(), -1)
    policy = tilted.exp()
    return outputs(base, tilted, policy, inverse_cdf(policy))


def cumsum_softmax(logits, values, weight, expectation=lambda p, x: (p * x).sum(-1)):
    """No log-softmax: log-probabilities of the drawn token only, KL = E[delta] - log Z."""
    delta = weight * values.float()
    policy, base = torch.softmax(logits.float() + delta, -1), torch.softmax(logits.float(), -1)
    token = inverse_cdf(policy)
    logp_policy, logp_base = policy.gather(-1, token).log()[:, 0], base.gather(-1, token).log()[:, 0]
    log_z = delta.gather(-1, token)[:, 0] - (logp_policy - logp_base)
    return token[:, 0], logp_base, logp_policy, expectation(policy, delta) - log_z


def cumsum_softmax_dot(logits, values, weight):
    """The same, with the expectation as a batched dot product."""
    return cumsum_softmax(logits, values, weight, torch.linalg.vecdot)


def sample(base, tilted):
    """Draws from what a filter left of `tilted`."""
    policy = tilted.exp()
    token = torch.multinomial(policy, 1)
    kl = torch.where(policy > 0, policy * (tilted - base), 0.0).sum(-1)
    return token[:, 0], base.gather(-1, token)[:, 0], tilted.gather(-1, token)[:, 0], kl


def eager_top_p(logits, values, weight, top_p=0.95, top_k=None):
    """Sort-based top-k and top-p, as in transformers' logits processors."""
    base = torch.log_softmax(logits.float(), -1)
    tilted = logits.float() + weight * values.float()
    if top_k:
        tilted = tilted.masked_fill(tilted < tilted.topk(top_k, -1).values[:, -1:], -torch.inf)
    ordered, order = tilted.sort(-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[:, -1] = False
    kept = tilted.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return sample(base, torch.log_softmax(kept, -1))


def eager_filters(logits, values, weight):
    return eager_top_p(logits, values, weight, top_k=50)


def eager_gumbel(logits, values, weight):
    """argmax(p / Exp(1)), the form without logarithms that engines use."""
    base = torch.log_softmax(logits.float(), -1)
    tilted = torch.log_softmax(logits.float() + weight * values.float(), -1)
    policy = tilted.exp()
    token = (policy / torch.empty_like(policy).exponential_()).argmax(-1, keepdim=True)
    return outputs(base, tilted, policy, token)


def ours(logits, values, weight, **parameters):
    return ops.tilt_sample(logits, values[None], weight, seed=1, position=0, **parameters)


def plain_sum(logits, values, weight):
    """The rate that memory and one add an element allow."""
    return logits.sum(-1), values.sum(-1)


PLAIN = "plain sum"
UNFILTERED = {
    "pyengine": ours,
    PLAIN: plain_sum,
    "eager multinomial": eager_multinomial,
    "eager cumsum (log_softmax)": cumsum_log_softmax,
    "eager cumsum (softmax)": cumsum_softmax,
    "eager cumsum (softmax, dot)": cumsum_softmax_dot,
}
KINDS = {
    "unfiltered": UNFILTERED,
    "top-k 50, top-p 0.95": {"pyengine": lambda *a: ours(*a, top_k=50, top_p=0.95), "eager sort": eager_filters},
    "top-p 0.95": {"pyengine": lambda *a: ours(*a, top_p=0.95), "eager sort": eager_top_p},
    "gumbel": {"pyengine": lambda *a: ours(*a, method="gumbel"), "eager exponential": eager_gumbel},
}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(batch, vocab, dtype):
    torch.manual_seed(batch)
    return (torch.randn(batch, vocab) * 3).to(dtype), torch.randn(batch, vocab).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_peers(race, rows, one_thread, kind, vocab, batch, dtype):
    logits, values = inputs(batch, vocab, DTYPES[dtype])
    forms = dict(KINDS[kind])
    if kind == "unfiltered":
        torch._dynamo.reset()
        forms["compiled cumsum"] = torch.compile(cumsum_softmax_dot, dynamic=False)
    peers = {name: partial(form, logits, values, 1.0) for name, form in forms.items() if name != "pyengine"}
    for peer in peers.values():
        peer()  # compiles
    raced = race(
        partial(forms["pyengine"], logits, values, 1.0), peers, rounds=max(5, min(200, 400 // batch)), warm=True
    )
    if raced is None:
        return
    times, samples = raced
    slower = {name: round(t / times["pyengine"], 2) for name, t in times.items() if name not in ("pyengine", PLAIN)}
    row = {
        "kind": kind,
        "vocab": vocab,
        "dtype": dtype,
        "batch": batch,
        "threads": 1,
        "median_us_per_row": {name: round(t * 1e6 / batch, 1) for name, t in times.items()},
        "times_slower": slower,
        "gb_per_s": round((logits.nbytes + values.nbytes) / times["pyengine"] / 1e9, 1),
    }
    if PLAIN in times:
        row["fraction_of_plain_sum_rate"] = round(times[PLAIN] / times["pyengine"], 3)
        row["best_eager_cumsum"] = min(t for name, t in slower.items() if name.startswith("eager cumsum"))
    rows.append(row | {"samples": samples if batch > 1 else {name: s[:50] for name, s in samples.items()}})


@pytest.mark.parametrize("neighbour", ["idle", "spinning neighbour", "after a torch.mm"])
@pytest.mark.parametrize("batch", [2, 8, 64])
def test_two_threads_and_one_as_peers(rows, one_thread, batch, neighbour):
    """In turns, because both must meet the same machine. A neighbour is a process that never sleeps."""
    logits, values = inputs(batch, VOCABS[0], torch.float32)
    square, seconds = torch.randn(256, 256), {1: [], 2: []}
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = subprocess.Popen(spin) if neighbour.startswith("spinning") else None
    try:
        for _ in range(60):  # long enough to see how often a contested team is tried again
            for threads in seconds:
                for _ in range(max(6, 160 // batch)):
                    if neighbour.startswith("after"):
                        torch.set_num_threads(2)
                        torch.mm(square, square)  # torch's own workers go on spinning for a while
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    ours(logits, values, 1.0)
                    seconds[threads].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(1)
        if spinning:
            spinning.kill()
            spinning.wait()
    two, one = statistics.median(seconds[2]), statistics.median(seconds[1])
    rows.append(
        {
            "kind": f"two threads against one, {neighbour}",
            "vocab": VOCABS[0],
            "dtype": "fp32",
            "batch": batch,
            "median_us_per_row": {"two threads": round(two * 1e6 / batch, 1), "one": round(one * 1e6 / batch, 1)},
            "times_faster": round(one / two, 3),
            "times_faster_by_mean": round(sum(seconds[1]) / sum(seconds[2]), 3),
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_smoke(benchmark, kind):
    """Every formulation gives a token in range and the same KL on the same rows."""
    logits, values = inputs(2, VOCABS[0], torch.float32)
    kls = []
    for name, form in KINDS[kind].items():
        if form is not plain_sum:
            token, _, _, kl = form(logits, values, 1.0)[:4]
            assert ((token >= 0) & (token < VOCABS[0])).all(), name
            kls.append(kl)
    for kl in kls[1:]:
        torch.testing.assert_close(kl, kls[0], atol=2e-3, rtol=1e-3)
    benchmark.pedantic(KINDS[kind]["pyengine"], (logits, values, 1.0), rounds=1)
