"""Everything that is timed on a GPU, in one run of minutes: one JSON with versions, rates, ratios and raw samples.

    python bench/gpu.py --out gpu.json [--budget 270] [--step test_cuda=0 ...]
    python bench/gpu.py --device cpu --small --out gpu.json    # walks the sections; its times mean nothing

Sections run in the order of their importance and the JSON is rewritten after every row, so that a time-out keeps
what was measured. Runs that are compared take turns. Before each sample a buffer of many times the L2 is written
and read again: no run finds its inputs in the cache, nor lines that must be written back, and its launches queue
up behind. Fractions are of the rates of this machine, measured first.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec

import bench_branching
import bench_linear_preference
import bench_tilt
import bench_tree_attention as bench_tree
import predicted
import rig as harness
import roofline
import torch
from bench_linear_logprob import trl
from rig import Rig, Skipped, backends, gpu_only, speedup, under
from torch.nn.functional import cross_entropy, linear

from pyengine import ops
from pyengine.decode.step import HORIZON, Draw, Graph, Step
from pyengine.ops import common, flash, logit_tiles

LOGPROB, PREFERENCE, HEAD = (
    sys.modules[f"pyengine.ops.{op}"] for op in ("linear_logprob", "linear_preference", "head_tilt")
)
SHIPPED_CHUNK = 32_768


def head_sizes(rig: Rig) -> tuple[int, int, int]:
    return (16, 32, 3000) if rig.small else (8192, 4096, 128_256)  # tokens, width, vocabulary


def copies(rig: Rig) -> dict:
    size = 2**20 if rig.small else 2**32
    source = rig.normal(size // rig.dtype.itemsize)
    target = torch.empty_like(source)
    row = rig.race("copy", {"copy": lambda: target.copy_(source), "read": source.sum}, seconds=1, bytes=size)
    rates = {"copy": 2 * size / row["ms"]["copy"] * 1e3, "read": size / row["ms"]["read"] * 1e3}
    return row | {"bytes_per_s": rates}


def floors(rig: Rig):
    """What this machine reaches by itself: rates that all fractions are of."""
    row = copies(rig)
    yield row
    copy_rate = row["bytes_per_s"]["copy"]
    tokens, width, vocab = head_sizes(rig)
    hidden, weight = rig.normal(tokens, width), rig.normal(vocab, width, scale=width**-0.5)
    shapes = [(tokens, vocab), (tokens, 16_384), (8192, 8192), (4096, 4096)]
    runs = {f"tiles of {n} x {c}": partial(gemms, hidden, weight, n, c) for n, c in shapes}
    row = rig.race("head GEMM", runs, seconds=2, tokens=tokens, width=width, vocab=vocab)
    row["flop_per_s"] = {name: 2 * tokens * width * vocab / t * 1e3 for name, t in row["ms"].items()}
    rig.rates |= {"copy_bytes_per_s": copy_rate, "gemm_flop_per_s": max(row["flop_per_s"].values())}
    yield row


def gemms(hidden, weight, tokens: int, columns: int, passes: int = 1) -> None:
    """The head's product in tiles; 3 passes: with both gradients; 4: the product once more before them."""
    gradients = logit_tiles.Gradients(hidden, weight, None, [passes > 1, passes > 1, False])
    buffer = hidden.new_empty(min(tokens, len(hidden)) * min(columns, len(weight)))
    starts = range(0, len(weight), columns)
    with torch.no_grad():
        for rows in torch.arange(len(hidden), device=hidden.device).split(tokens):
            some = hidden[rows]
            tiles = ((s, min(s + columns, len(weight))) for s in starts)
            products = ((s, e, logit_tiles.multiply(some, weight[s:e], buffer)) for s, e in tiles)
            if passes == 1:
                any(False for _ in products)
                continue
            if passes == 4:
                for s in starts:
                    logit_tiles.multiply(some, weight[s : s + columns], buffer)
            gradients.add(products, some, weight, rows)
        gradients.results(weight, None)


def kl(result):
    return result[3] if isinstance(result, tuple) else None


def tilt_inputs(rig: Rig, batch: int, vocab: int):
    torch.manual_seed(batch)
    given = rig.normal(batch, vocab, scale=3.0), rig.normal(batch, vocab), 1.0
    return given, 2 * given[0].numel() * given[0].element_size()


def tilt(rig: Rig, vocab: int = 128_256):
    vocab = 3000 if rig.small else vocab
    for batch in (2,) if rig.small else (64, 256, 1, 8):
        given, moved = tilt_inputs(rig, batch, vocab)
        torch._dynamo.reset()
        compiled = torch.compile(
            bench_tilt.cumsum_softmax_dot, dynamic=False, backend="inductor" if rig.gpu else "eager"
        )
        runs = backends(rig, partial(bench_tilt.ours, *given))
        runs |= backends(rig, partial(bench_tilt.ours, *given, method="gumbel"), ", gumbel")
        forms = {n: f for n, f in bench_tilt.UNFILTERED.items() if n.startswith("eager")} | {"compiled": compiled}
        forms["eager exponential"] = bench_tilt.eager_gumbel
        runs |= {name: partial(form, *given) for name, form in forms.items()}
        half = torch.empty_like(given[0])
        runs["copy of as many bytes"] = lambda: half.copy_(given[0])
        row = rig.race("tilt_sample", runs, compare=kl, batch=batch, vocab=vocab)
        rig.against(row, moved=moved, target=0.85 if batch >= 64 else None)
        speedup(row, "compiled", 3)
        yield row


def top_k_first(logits, values, weight, top_k, top_p):
    """The eager filters of who knows that top-k comes first: nothing is sorted but the k."""
    base = torch.log_softmax(logits.float(), -1)
    tilted, ids = (logits.float() + weight * values.float()).topk(top_k, -1)
    p = tilted.softmax(-1)
    kept = torch.log_softmax(tilted.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf), -1)
    drawn, *rest = bench_tilt.sample(base.gather(-1, ids), kept)
    return ids.gather(-1, drawn[:, None])[:, 0], *rest


def flashinfer(logits, values, weight, top_k, top_p):
    """The token alone: no log-probabilities, no KL."""
    from flashinfer import sampling

    tilted = logits.float() + weight * values.float()
    if top_k:
        return sampling.top_k_top_p_sampling_from_logits(tilted, top_k, top_p)
    return sampling.top_p_sampling_from_probs(tilted.softmax(-1), top_p)


def filters(rig: Rig):
    vocab = 3000 if rig.small else 128_256
    for batch in (2,) if rig.small else (256, 64):
        given, moved = tilt_inputs(rig, batch, vocab)
        for top_k, top_p in ((50, 0.95), (0, 0.95)):
            parameters = {"top_k": top_k, "top_p": top_p}
            runs = backends(rig, partial(bench_tilt.ours, *given, **parameters))
            runs["eager sort"] = partial(bench_tilt.eager_top_p, *given, **parameters)
            if top_k:
                runs["eager top-k first"] = partial(top_k_first, *given, **parameters)
            runs["flashinfer, token alone"] = partial(flashinfer, *given, **parameters)
            row = rig.race("tilt_sample, filtered", runs, compare=kl, batch=batch, vocab=vocab, **parameters)
            yield rig.against(row, moved=moved, target=0.5 if batch == 256 else None)


def head_tilt(rig: Rig):
    """The fused head against GEMM and tilt_sample; `crossover`: the batches at which the fused form is faster."""
    _, width, vocab = head_sizes(rig)
    weight, value_weight = (rig.normal(n, vocab, width, scale=width**-0.5) for n in (1, 1))
    faster = {}
    for heads in (1, 0):
        for batch in (3,) if rig.small else (1, 8, 16, 32, 64, 128, 256):
            hidden = rig.normal(batch, width)
            tilted = (value_weight, 1.0) if heads else ()
            call = partial(ops.head_tilt_sample, hidden, weight[0], *tilted, seed=1)
            runs = {
                "pyengine fused": under(call, (HEAD, "fuses", lambda batch, on_gpu: True)),
                "pyengine in two steps": under(call, (HEAD, "fuses", lambda batch, on_gpu: False)),
            }
            row = rig.race("head_tilt_sample", runs, 1.0, kl, batch=batch, width=width, vocab=vocab, value_heads=heads)
            elements = (1 + heads) * vocab * width
            moved, flops = elements * rig.dtype.itemsize, 2 * batch * elements
            rig.against(row, moved, flops, 0.85 if batch <= 64 else None, of="pyengine fused")
            times = list(row["ms"].values())
            faster.setdefault(f"{heads} value heads", {})[batch] = len(times) == 2 and times[0] <= times[1]
            yield row | {"crossover": faster}


def forward(function, hidden, weight, target):
    with torch.no_grad():
        return function(hidden, weight, target)


def both(function, *tensors):
    """Forward and backward, the gradients dropped."""
    out = function(*tensors)
    out.sum().backward()
    for x in tensors:
        x.grad = None
    return out


def logp_of(result):
    return result if isinstance(result, torch.Tensor) and result.dim() == 1 else None


def ours(hidden, weight, target):
    return ops.linear_logprob(hidden, weight, target).logp


def fused(hidden, weight, target):
    return common.triton_kernels("linear_logprob").fused_forward(hidden, weight, None, target)[0]


def cut_cross_entropy(hidden, weight, target):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none")


def liger(hidden, weight, target):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)


def whole_logits(hidden, weight, target):
    return -cross_entropy(linear(hidden, weight).float(), target, reduction="none")


def linear_inputs(rig: Rig):
    torch.manual_seed(0)
    tokens, width, vocab = head_sizes(rig)
    hidden, weight = rig.normal(tokens, width), rig.normal(vocab, width, scale=width**-0.5)
    sizes = {"tokens": tokens, "width": width, "vocab": vocab}
    return (hidden.requires_grad_(), weight.requires_grad_(), rig.targets(vocab, tokens)), sizes


def linear_logprob(rig: Rig):
    given, sizes = linear_inputs(rig)
    chunks = (SHIPPED_CHUNK,) if rig.small else (SHIPPED_CHUNK, 131_072, 8192)
    peers = {f"TRL, chunk {c}": partial(trl, chunk=c) for c in chunks}
    peers |= {"cut-cross-entropy, no moments": cut_cross_entropy, "whole logits, no moments": whole_logits}
    for what, step, passes in (("forward", forward, 1), ("forward+backward", both, 4)):
        runs = {"pyengine": partial(step, ours, *given)}
        if passes == 1:
            runs["pyengine, fused kernel"] = gpu_only(rig, partial(step, fused, *given))
        runs |= {name: partial(step, peer, *given) for name, peer in peers.items()}
        if passes > 1:
            runs["Liger fused linear CE, mean alone"] = partial(step, liger, *given)
        runs["the GEMMs alone"] = partial(gemms, *given[:2], logit_tiles.TOKENS_GPU, logit_tiles.COLUMNS, passes)
        row = rig.race(f"linear_logprob, {what}", runs, 3, logp_of, **sizes)
        flops = passes * 2 * sizes["tokens"] * sizes["width"] * sizes["vocab"]
        rig.against(row, flops=flops, target=0.85 if passes == 1 else None)
        speedup(row, f"TRL, chunk {SHIPPED_CHUNK}", 1.2)
        speedup(row, "TRL", 1.2)
        yield row


def tiles(rig: Rig):
    """linear_logprob in tiles of several sizes; choose TOKENS_GPU and COLUMNS of logit_tiles.py by this."""
    given, sizes = linear_inputs(rig)
    shapes = [(n, c) for n in (2048, 4096, 8192) for c in (4096, 8192, 16_384, 32_768)]
    for what, step, passes in (("forward", forward, 1), ("forward+backward", both, 4)):
        runs = {}
        for n, c in shapes[:2] if rig.small else shapes:
            at = (logit_tiles, "TOKENS_GPU", n), (logit_tiles, "COLUMNS", c), (LOGPROB, "COLUMNS", c)
            runs[f"pyengine, tiles of {n} x {c}"] = under(partial(step, ours, *given), *at)
        flops = passes * 2 * sizes["tokens"] * sizes["width"] * sizes["vocab"]
        yield rig.against(rig.race(f"linear_logprob in tiles, {what}", runs, 4, logp_of, **sizes), flops=flops)


def linear_preference(rig: Rig):
    tokens, width, vocab = head_sizes(rig)
    pairs, length = (2, tokens // 4) if rig.small else (16, tokens // 32)
    hidden, weight = rig.normal(2 * pairs, length, width), rig.normal(vocab, width, scale=width**-0.5)
    given = hidden.requires_grad_(), weight.requires_grad_(), rig.targets(vocab, 2 * pairs, length)
    shipped = PREFERENCE.KEPT_LOGITS
    runs = {f"pyengine, {shipped / 2**20:g}M logits kept": partial(both, bench_linear_preference.ours, *given)}
    for kept in (2**28, 2**29, 2**30):
        for c in (4096, 16_384):
            call = partial(both, bench_linear_preference.ours, *given)
            at = (PREFERENCE, "KEPT_LOGITS", kept), (logit_tiles, "COLUMNS", c)
            runs[f"pyengine, {kept >> 20}M logits kept, tiles of {c}"] = under(call, *at)
    for chunk in (SHIPPED_CHUNK,) if rig.small else (SHIPPED_CHUNK, 131_072, 8192):
        runs[f"TRL, chunk {chunk}"] = partial(both, partial(bench_linear_preference.trl, chunk=chunk), *given)
    runs["Liger chunked DPO, no WPO weights"] = partial(both, bench_linear_preference.liger, *given)
    flat = hidden.detach().flatten(0, 1)
    runs["the GEMMs alone"] = partial(gemms, flat, weight, logit_tiles.TOKENS_GPU, logit_tiles.COLUMNS, 3)
    sizes = {"pairs": pairs, "length": length, "width": width, "vocab": vocab}
    row = rig.race("linear_preference, WPO, forward+backward", runs, 4, **sizes)
    rig.against(row, flops=3 * 2 * tokens * width * vocab, target=0.8)
    speedup(row, f"TRL, chunk {SHIPPED_CHUNK}", 1.2)
    speedup(row, "TRL", 1.2)
    yield row


def logits_logprob(rig: Rig):
    tokens, _, vocab = head_sizes(rig)
    logits, target = rig.normal(tokens, vocab, scale=3.0).requires_grad_(), rig.targets(vocab, tokens)
    forms = {
        "pyengine": lambda x, t: ops.logits_logprob(x, t).logp,
        "cross_entropy, no moments": lambda x, t: -cross_entropy(x.float(), t, reduction="none"),
    }
    for what, passes in (("forward", 1), ("forward+backward", 3)):
        runs = {name: partial(both, form, logits, target) for name, form in forms.items()}
        if passes == 1:
            runs = {name: partial(form, logits.detach(), target) for name, form in forms.items()}
        row = rig.race(f"logits_logprob, {what}", runs, compare=logp_of, tokens=tokens, vocab=vocab)
        yield rig.against(row, moved=passes * logits.numel() * logits.element_size())


def select_block(rig: Rig):
    batch, candidates, width = (4, 4, 64) if rig.small else (64, 16, 4096)
    hidden, probe = rig.normal(batch, candidates, width), rig.normal(1, width, scale=width**-0.5)
    runs = backends(rig, lambda: ops.select_block(hidden=hidden, probe=probe))
    runs["einsum and argmax"] = lambda: torch.einsum("bkd,rd->bkr", hidden, probe).sum(-1).argmax(-1)
    row = rig.race("select_block", runs, batch=batch, candidates=candidates, width=width)
    yield rig.against(row, moved=hidden.numel() * hidden.element_size())


def tree_attention(rig: Rig):
    """A decode step of one layer of Llama 3.1 8B, against SDPA over keys and values copied for each branch."""
    small = {"heads": 4, "key_heads": 2, "width": 32} if rig.small else {}
    heads, key_heads, width = small.values() if small else (bench_tree.HEADS, bench_tree.KEY_HEADS, bench_tree.WIDTH)
    for prompts, prefix, branches in ((2, 130, 3),) if rig.small else ((8, 2048, 16), (8, 8192, 16), (1, 2048, 16)):
        layout = {"prompts": prompts, "device": rig.device, "kernel": not rig.gpu} | small
        flashes = rig.gpu and find_spec("flash_attn") is not None
        if flashes:
            layout["page"] = flash.PAGE
        query, stores, tree = bench_tree.problem(prefix, branches, rig.dtype, **layout)
        key, value = bench_tree.replicated(query, stores, tree)
        runs = {
            "pyengine": partial(ops.tree_attention, query, *stores, tree),
            "SDPA, enable_gqa": partial(bench_tree.by_enable_gqa, query, key, value),
            "SDPA, folded": partial(bench_tree.by_folding, query, key, value),
        }
        if flashes:
            tables = (stores, tree, query.shape[3] ** -0.5, 0.0, None)
            runs["pyengine, flash-attn"] = partial(flash.tree_attention, query, None, None, *tables)
        sizes = {"prompts": prompts, "prefix": prefix, "branches": branches}
        row = rig.race("tree_attention", runs, compare=lambda result: result, **sizes)
        tokens = prompts * (prefix + branches * bench_tree.TAIL)
        flops = 4 * prompts * branches * heads * width * (prefix + bench_tree.TAIL)
        moved = 2 * tokens * key_heads * width * rig.dtype.itemsize
        rig.against(row, moved, flops, 0.7 if prompts == 8 else None)
        speedup(row, "SDPA", 4)
        yield row


class Replayed(bench_branching.Ours):
    """The same block through the engine's step, which is replayed from a graph."""

    @torch.inference_mode()
    def block(self):
        self.decoder.waits = True
        frontier = self.group.fork()
        draws = [
            Draw(1.0, 0, 1.0, 0.0, j, self.position, self.tokens, False, frozenset(), (), 0.0) for j in range(self.k)
        ]
        step = Step(self.decoder, [(self.group.stems[0], j) for j in range(self.k)], draws, frontier)
        graph = self.decoder.captured.setdefault(step.key, Graph(step))
        if graph.state is not step:
            graph.state.take(step)
        for i in range(self.tokens):
            graph()
            if (i + 1) % HORIZON == 0:
                graph.state.read(HORIZON)
        self.group.note(self.tokens, graph.state.frontier())
        self.group.commit(ops.select_block(hidden=graph.state.last[-1][None, : self.k], probe=self.probe).index)
        self.position += self.tokens


def decode(rig: Rig):
    """Blocks of an 8 B Llama with random weights: K branches of one prompt, steps launched anew and replayed."""
    shape = roofline.MODELS["8B"]
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
    sizes |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab}
    sizes |= {"max_position_embeddings": 16_384}
    sizes = bench_branching.SIZES | {"hidden_size": 192, "num_hidden_layers": 2} if rig.small else sizes
    with rig.device:
        model = bench_branching.make(**sizes, dtype=rig.dtype)
    prefix, tokens = (100, 16) if rig.small else (2048, 16)
    for branches in (1, 16):
        prompt = bench_branching.prompt_of(model, prefix)
        for name, kind in (("replayed", Replayed), ("launched", bench_branching.Ours)):
            ours = kind(model, prompt, branches, tokens)
            row = rig.race(f"a block, {name}", {"pyengine": ours.block}, 5, prefix=prefix, branches=branches)
            ours.close()
            keys = prefix + branches * tokens // 2
            moved = tokens * (shape.weights * shape.bytes + keys * shape.token_bytes)
            rig.against(row, moved, tokens * 2 * shape.weights * branches, 0.8 if name == "replayed" else None)
            yield row | {"ms_a_step": row["ms"]["pyengine"] / tokens}


def graph(rig: Rig):
    """A captured tilt_sample: what a replay takes, and that it draws by the position of its time."""
    if not rig.gpu:
        raise Skipped("CUDA graphs need a GPU")
    batch, vocab = 64, 128_256
    (logits, values, weight), moved = tilt_inputs(rig, batch, vocab)
    position = torch.zeros(batch, dtype=torch.int64, device=rig.device)
    call = partial(ops.tilt_sample, logits, values[None], weight, seed=1, position=position)
    runs, anew = {}, {}
    for name, run in backends(rig, call).items():
        if name == "pyengine cuda" and not common.cuda_built():
            continue
        run()  # compiles before the capture
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = run()
        drawn = []
        for step in range(3):
            position.fill_(step)
            captured.replay()
            drawn.append(out.token.clone())
            anew[f"{name}: replay {step} is the call"] = torch.equal(drawn[-1], run().token)
        anew[f"{name}: replays differ"] = not torch.equal(drawn[0], drawn[1])
        runs |= {f"{name}, replayed": captured.replay, f"{name}, called": run}
    row = rig.race("tilt_sample in a CUDA graph", runs, batch=batch, vocab=vocab)
    yield rig.against(row, moved=moved) | {"checks": anew}


SECTIONS = {
    "floors": floors,
    "tilt": tilt,
    "linear_logprob": linear_logprob,
    "linear_preference": linear_preference,
    "head_tilt": head_tilt,
    "tree_attention": tree_attention,
    "filters": filters,
    "logits_logprob": logits_logprob,
    "select_block": select_block,
    "graph": graph,
    "decode": decode,
    "tiles": tiles,
    "tilt, V = 151,936": partial(tilt, vocab=151_936),
}


if __name__ == "__main__":
    harness.main(__doc__, {name: predicted.beside(section) for name, section in SECTIONS.items()})
