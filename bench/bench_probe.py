"""Training a linear probe on the paper's preference set beside plain loops; what a probe costs a block.

Training: 40,067 pairs of 4,096-wide fp32 embeddings, L_QP, Adam, batches of 1,024, 150 epochs (Q-Probe, §5). Peers do
the same steps with autograd and torch.optim.Adam: a DataLoader over the pairs, whole batches by index, and whole
batches of the differences w - l. They are timed for a few epochs, which all take the same time; pyengine for a few and
for all 150. Inference: scoring and selection of K branches against the decoding of their block.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, TensorDataset

from pyengine import Probe, ops
from pyengine.decoder import BranchingDecoder
from pyengine.group import Group
from pyengine.scorers import Candidates
from pyengine.training.embeddings import Pairs
from pyengine.training.probe import train_probe

TESTS = ("training_probe", "embedding_probe")
ROWS, WIDTH, BATCH, RATE = 40_067, 4096, 1024, 5e-5
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}


def preferences(rows, width):
    """Pairs that a linear probe can order in part: chosen - rejected leans along one direction."""
    torch.manual_seed(0)
    lean = torch.randn(width) * width**-0.5
    chosen, rejected = torch.randn(rows, width), torch.randn(rows, width)
    chosen += lean
    return Pairs(chosen, rejected, torch.arange(rows), layer=-1)


def ours(pairs, epochs):
    return train_probe(pairs, "qp", epochs=epochs, lr=RATE, batch=BATCH, held_out=0, progress=False)


def first_probe(width):
    """The weights that `train_probe` starts from, with the same seed."""
    torch.manual_seed(0)
    probe = Probe(width)
    torch.nn.init.zeros_(probe.head.bias)
    probe.head.bias.requires_grad_(False)
    return probe.head


def descend(model, batches):
    """The plain loop over (chosen, rejected) or (differences, None). Returns the model and the rows' mean loss."""
    optimizer = torch.optim.Adam([model.weight], lr=RATE)
    losses = []
    for chosen, rejected in batches:
        margin = model(chosen) if rejected is None else model(chosen) - model(rejected)
        loss = -logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), len(chosen)))
    return model, sum(mean * count for mean, count in losses) / sum(count for _, count in losses)


def orders(rows, epochs):
    """The batches that `train_probe` visits, with the same seed."""
    order = torch.Generator().manual_seed(0)
    return (pick for _ in range(epochs) for pick in torch.randperm(rows, generator=order).split(BATCH))


def with_loader(pairs, epochs):
    loader = DataLoader(TensorDataset(pairs.chosen, pairs.rejected), BATCH, shuffle=True)
    return descend(first_probe(pairs.chosen.shape[1]), (both for _ in range(epochs) for both in loader))


def with_index(pairs, epochs):
    picks = orders(len(pairs.prompt), epochs)
    return descend(first_probe(pairs.chosen.shape[1]), ((pairs.chosen[p], pairs.rejected[p]) for p in picks))


def with_differences(pairs, epochs):
    gap = pairs.chosen - pairs.rejected
    picks = orders(len(pairs.prompt), epochs)
    return descend(first_probe(gap.shape[1]), ((gap[p], None) for p in picks))


PEERS = {
    "DataLoader over pairs": with_loader,
    "pairs by index": with_index,
    "differences by index": with_differences,
}


def test_peers(race, rows, peak):
    pairs, epochs = preferences(ROWS, WIDTH), 5
    raced = race(lambda: ours(pairs, epochs), {n: lambda f=f: f(pairs, epochs) for n, f in PEERS.items()}, rounds=3)
    if raced is None:
        return
    times, samples = raced
    extra = peak(lambda: ours(pairs, 1))
    start = time.perf_counter()
    whole = ours(pairs, 150)
    seconds = time.perf_counter() - start
    found, (peer, loss) = ours(pairs, 2), with_index(pairs, 2)
    rows.append(
        {
            "pairs": ROWS,
            "width": WIDTH,
            "batch": BATCH,
            "threads": torch.get_num_threads(),
            "seconds_150_epochs": round(seconds, 2),
            "loss_first_last": [round(whole.train_loss[0], 5), round(whole.train_loss[-1], 5)],
            "gigabytes_of_pairs": round(2 * pairs.chosen.nbytes / 1e9, 3),
            "gigabytes_beside_them": round(extra / 1e9, 3),
            "epochs_timed": epochs,
            "seconds": {name: round(t, 3) for name, t in times.items()},
            "times_slower": {name: round(t / times["pyengine"], 2) for name, t in times.items()},
            "gigabytes_per_second_of_differences": round(150 * 4e-9 * ROWS * WIDTH / seconds, 1),
            "largest_weight_difference_after_2_epochs": (found.probe.head.weight - peer.weight).abs().max().item(),
            "loss_difference_after_2_epochs": abs(statistics.mean(found.train_loss) - loss),
            "samples": samples,
        }
    )


class Block:
    """A block of 16 tokens for K branches, and the choice among them as the engine makes it."""

    def __init__(self, model, k, tokens, prefix, hidden=()):
        self.tokens, self.k = tokens, k
        self.probe = Probe(model.config.hidden_size, hidden=hidden)
        self.decoder = BranchingDecoder(model, (-1,), k, budget=2e9)
        self.group = Group(self.decoder, k, tokens)
        self.group.join([list(range(1, prefix + 1))])
        self.given = None

    @torch.inference_mode()
    def decode(self):
        frontier = self.group.fork()
        for step in range(self.tokens):
            token = ops.tilt_sample(frontier.logits, seed=torch.arange(self.k), position=step).token
            frontier = self.group.append(token)
        self.given = Candidates([""] * self.k, [[1]] * self.k, frontier.hidden, {}, lambda _: [])

    @torch.inference_mode()
    def choose(self):
        scores = self.probe.score(self.given)
        return ops.select_block(scores[None, :, None], torch.ones(1), beta=0.1, seed=1).index.tolist()


def language_model(**sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model():
    return language_model(**SIZES)


@pytest.mark.parametrize("hidden", [(), (256,)], ids=["linear", "mlp"])
@pytest.mark.parametrize("branches", [8, 16, 48])
def test_overhead_peers(rows, model, branches, hidden):
    block = Block(model, branches, 16, 256, hidden)
    seconds = {"decode": [], "choose": []}
    for _ in range(4):
        for name, times in seconds.items():
            start = time.perf_counter()
            getattr(block, name)()
            times.append(time.perf_counter() - start)
    block.group.close()
    decode, choose = (statistics.median(times[1:]) for times in seconds.values())
    rows.append(
        {
            "branches": branches,
            "tokens": 16,
            "prefix": 256,
            "hidden": list(hidden),
            "threads": torch.get_num_threads(),
            "milliseconds_decode": round(decode * 1e3, 1),
            "milliseconds_choose": round(choose * 1e3, 4),
            "share_of_decoding": round(choose / decode, 6),
        }
    )


def test_smoke(benchmark):
    """All loops end at the same weights at a small size; a block is decoded and chosen from."""
    pairs = preferences(2100, 64)
    found = benchmark.pedantic(ours, (pairs, 2), rounds=1).probe.head.weight
    for peer in (with_index, with_differences):
        torch.testing.assert_close(found, peer(pairs, 2)[0].weight, atol=1e-5, rtol=0)
    assert with_loader(pairs, 1)[1] > 0
    small = language_model(**SIZES | {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2})
    block = Block(small, 3, 4, 9)
    block.decode()
    assert 0 <= block.choose()[0] < 3
    block.group.close()
