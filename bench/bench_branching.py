"""Blockwise best-of-K decoding, tokens a second: this engine's branching cache beside what people do without one.

A Llama of 100 M parameters with random weights in fp32; K branches of M tokens, the best by a probe on the hidden
state is kept, and so on. Peers: `generate(num_return_sequences=K)` called for every block, and a loop that prefills
once and forks transformers' DynamicCache with `batch_repeat_interleave`. Times are of one block, without the prefill
that all share (generate repeats it every block, which is its price).
"""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
import transformers

from pyengine import ops
from pyengine.bench import turns
from pyengine.bench.contenders import Forked, Generated
from pyengine.bench.workload import Ask
from pyengine.cache import LEAF, PAGE
from pyengine.decoder import BranchingDecoder
from pyengine.group import Group
from pyengine.ops.linear import lent, quick_forwards

TESTS = ("cache", "decoder", "tree_attention")
TOKENS = 16
PLAIN = "pyengine, the model's products as torch runs them"
BY_TORCH, BY_ENGINE = "the model's products as torch runs them", "the model's products as the engine runs them"
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 16_384,
}


@pytest.fixture(scope="module")
def models():
    """Three equal ones: while ours decodes, its model is lent to it."""
    return make(**SIZES), make(**SIZES), make(**SIZES)


def make(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompt_of(model, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, model.config.vocab_size, (length,), generator=generator)


def probe_of(model):
    probe = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return probe.to(device=model.device, dtype=model.dtype)


class Ours:
    """The engine's loop without its bookkeeping for people: fork, draw, append, select, commit."""

    def __init__(self, model, prompt, k, tokens):
        self.k, self.tokens = k, tokens
        self.probe = probe_of(model)
        self.seed = torch.arange(k, device=model.device)
        self.decoder = BranchingDecoder(model, (-1,), k, budget=2e9)
        self.group = Group(self.decoder, k, tokens)
        self.group.join([prompt.tolist()])
        self.position = 0

    @torch.inference_mode()
    def block(self):
        frontier, drawn = self.group.fork(), []
        for step in range(self.tokens):
            drawn.append(ops.tilt_sample(frontier.logits, seed=self.seed, position=self.position + step).token)
            frontier = self.group.append(drawn[-1])
        picked = ops.select_block(hidden=frontier.hidden[-1][None], probe=self.probe).index
        self.group.commit(picked)
        self.position += self.tokens
        return torch.stack(drawn)[:, picked[0]]

    def close(self):
        self.group.close()

    @property
    def cache_bytes(self):
        cache = self.decoder.cache
        tokens = cache.pages_in_use * PAGE + self.k * cache.leaves_for(self.tokens) * LEAF
        return tokens * cache.token_bytes


def theirs(kind, model, prompt, k, tokens):
    """A peer of `pyengine bench throughput`, block by block; its answer does not end here."""
    return kind(model, probe_of(model), k, tokens, [Ask(prompt.tolist(), 10**6)], False)


def linears(model, rows):
    """Seconds that the model's own matrix products take in one step over so many rows."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(1, rows, m.in_features) for m in layers}
    with torch.inference_mode():
        start = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        return time.perf_counter() - start


def quick_linears(model, rows):
    with lent(quick_forwards(model)):
        for _ in range(TOKENS):
            linears(model, rows)


@pytest.mark.parametrize(
    ("prefix", "branches"),
    [(1024, 8), (4096, 8), (256, 8), (2048, 8), (2048, 16), (1024, 1), (1024, 2), (1024, 4), (1024, 16)],
)
def test_peers(rows, models, prefix, branches):
    model, peer, third = models
    prompt = prompt_of(model, prefix)
    ours = Ours(model, prompt, branches, TOKENS)
    norms = [lending for lending in quick_forwards(third) if type(lending[0]) is not torch.nn.Linear]
    with mock.patch("pyengine.decoder.quick_forwards", return_value=norms):
        plain = Ours(third, prompt, branches, TOKENS)
    peers = {"pyengine": ours, PLAIN: plain, "DynamicCache, forked": theirs(Forked, peer, prompt, branches, TOKENS)}
    products = {
        BY_TORCH: lambda: [linears(peer, branches) for _ in range(TOKENS)],
        BY_ENGINE: lambda: quick_linears(peer, branches),
    }
    runs = {**{name: one.block for name, one in peers.items()}, **products}
    turns.race(runs, 1)  # warms up
    times = turns.medians(turns.race(runs, 5))
    used = ours.cache_bytes
    ours.close()
    plain.close()
    times["generate for each block"] = turns.seconds_of(theirs(Generated, peer, prompt, branches, TOKENS).block)
    copied = branches * (prefix + TOKENS) * ours.decoder.cache.token_bytes
    rows.append(
        {
            "prefix": prefix,
            "branches": branches,
            "tokens": TOKENS,
            "threads": torch.get_num_threads(),
            "seconds_per_block": {name: round(t, 4) for name, t in times.items()},
            "times_slower": {name: round(t / times["pyengine"], 2) for name, t in times.items()},
            "branch_tokens_per_second": {
                name: round(branches * TOKENS / t, 1) for name, t in times.items() if name not in (*products, PLAIN)
            },
            "share_that_is_not_products": {
                "pyengine": round(1 - times[BY_ENGINE] / times["pyengine"], 3),
                PLAIN: round(1 - times[BY_TORCH] / times[PLAIN], 3),
            },
            "cache_bytes": used,
            "cache_bytes_replicated": copied,
            "cache_share": round(used / copied, 4),
        }
    )


def test_smoke(benchmark):
    """All three run at a small size."""
    small = make(**SIZES | {"hidden_size": 192, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100})
    prompt = prompt_of(small, 70)
    ours = Ours(small, prompt, 3, 4)
    tokens = benchmark.pedantic(ours.block, rounds=1)
    ours.close()
    assert tokens.shape == (4,)
    for kind in (Forked, Generated):
        peer = theirs(kind, small, prompt, 3, 4)
        peer.block()
        assert len(peer.batch.tokens[0]) == 4
    assert linears(small, 3) > 0
