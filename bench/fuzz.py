"""Random calls of every op against a float64 truth in NumPy that shares no code with the engine.

python -m bench.fuzz --cases 200000 --seed 1 draws a call a case, with each instruction set of the machine in turn, and
prints how many were drawn, how many could be judged in part only and what was wrong. A case is named by (seed, number):
`--first N --cases 1` repeats it.

The truth is written from the ops' docstrings. A draw is judged by where its uniform lies in the cumulative law, so
that rounding may move a token only across a boundary that the uniform nearly hits; a filter likewise.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.fuzz_truth import Row, check_attention, check_logprob, check_row, check_selection
from pyengine import _C, ops
from pyengine.ops import linear as linear_ops
from pyengine.ops.settings import settings

Random = np.random.Generator
VOCABS = (1, 2, 3, 5, 7, 16, 31, 64, 100, 255, 257, 1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049, 3100, 5000)
TEMPERATURES = (1.0, 1.0, 0.7, 0.25, 1.7, 30.0, 1e4, 1e30, 0.0, 1e-3, 1e-5, 1e-9, 1e-20, 1e-37)
WEIGHTS = (0.0, 1.0, 0.5, -0.7, 3.0, 1e-6, 1e3, 1e10, -1e10)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


def strided(random: Random, x: torch.Tensor) -> torch.Tensor:
    """The same numbers, packed, in wider rows or with every second number of a row."""
    kind = random.integers(4)
    if kind == 0 or x.dim() < 2:
        return x
    if kind == 1:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + int(random.integers(1, 9))), torch.nan, dtype=x.dtype)
        view = wide[..., : x.shape[-1]]
    elif kind == 2:
        view = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)[..., ::2]
    else:
        view = torch.full((*x.shape[:-2], x.shape[-1], x.shape[-2]), torch.nan, dtype=x.dtype).mT
    return view.copy_(x)


def numbers(random: Random, *shape: int) -> torch.Tensor:
    """Logits or values of many kinds: spreads, ties, denormals, forbidden tokens, a lifted part, one peak."""
    x = random.standard_normal(shape) * random.choice([0.0, 1e-3, 1.0, 4.0, 40.0])
    kind = random.integers(9)
    if kind == 0:
        x = np.round(x)
    elif kind == 1:
        x = x * 1e-40
    elif kind == 2:
        x[..., shape[-1] // 2 :] += random.choice([30.0, 300.0, -300.0])
    elif kind == 3:
        x[..., random.integers(shape[-1])] += random.choice([5.0, 60.0, -60.0])
    elif kind == 4:
        x += random.choice([1e3, -1e3, 14.0, 1e4])
    if random.random() < 0.25:
        x[random.random(shape) < random.choice([0.1, 0.9, 1.0])] = -np.inf
    return torch.from_numpy(np.asarray(x)).float()


def spoiled(random: Random, x: torch.Tensor) -> torch.Tensor:
    """With a NaN or +inf somewhere, one time in 20."""
    if random.random() < 0.05:
        x.view(-1)[int(random.integers(x.numel()))] = float(random.choice([np.nan, np.inf]))
    return x


def wide_integer(random: Random) -> int:
    return (
        int(random.integers(-(2**63), 2**63 - 1, dtype=np.int64)) if random.random() < 0.5 else int(random.integers(9))
    )


def parameters(random: Random, batch: int, vocab: int) -> dict[str, Any]:
    """One number for all rows or a column, of each parameter."""
    draws: dict[str, Callable[[], float]] = {
        "temperature": lambda: float(random.choice(TEMPERATURES)),
        "top_k": lambda: int(random.choice([0, 1, 2, 5, vocab - 1, vocab, vocab + 1, 2**40])),
        "top_p": lambda: float(random.choice([1.0, 0.9, 0.5, 0.05, 1e-6, 0.999999, 0.0])),
        "min_p": lambda: float(random.choice([0.0, 0.05, 0.5, 1.0, 1e-9])),
        "seed": lambda: wide_integer(random),
        "position": lambda: wide_integer(random),
    }
    filters = random.random() < 0.5
    out: dict[str, Any] = {}
    for name, draw in draws.items():
        if not filters and name in ("top_k", "top_p", "min_p"):
            continue
        kind = torch.int64 if name in ("top_k", "seed", "position") else torch.float32
        given = [draw() for _ in range(batch)]
        out[name] = given[0] if random.random() < 0.3 else torch.tensor(given, dtype=kind)
    return out


def rows_of(given: dict[str, Any], batch: int) -> list[dict[str, float]]:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    columns = {n: given.get(n, default) for n, default in defaults.items()}
    columns = {n: c.tolist() if isinstance(c, torch.Tensor) else [c] * batch for n, c in columns.items()}
    single = {"temperature", "top_p", "min_p"}
    return [{n: float(np.float32(c[i])) if n in single else c[i] for n, c in columns.items()} for i in range(batch)]


def same_bits(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], what: str) -> None:
    for a, b in zip(found, want, strict=True):
        if not torch.equal(torch.nan_to_num(a.float(), nan=-7.0), torch.nan_to_num(b.float(), nan=-7.0)):
            raise AssertionError(f"{what}: {a.tolist()} and {b.tolist()}")


def at_row(value: Any, i: int) -> Any:
    return value[i : i + 1] if isinstance(value, torch.Tensor) else value


def case_tilt(random: Random) -> bool:
    batch, vocab, heads = int(random.integers(1, 4)), int(random.choice(VOCABS)), int(random.choice([0, 0, 1, 1, 2, 3]))
    dtype = DTYPES[random.integers(len(DTYPES))]
    logits = strided(random, spoiled(random, numbers(random, batch, vocab)).to(dtype))
    values = strided(random, spoiled(random, numbers(random, heads, batch, vocab)).to(dtype)) if heads else None
    weights = torch.from_numpy(random.choice(WEIGHTS, (batch, heads))).float() if heads else None
    mask = (
        torch.from_numpy(random.random((batch, vocab)) < random.choice([0.5, 0.95])) if random.random() < 0.3 else None
    )
    given, method = parameters(random, batch, vocab), ("gumbel" if random.random() < 0.4 else "inverse")
    found = ops.tilt_sample(logits, values, weights, mask=mask, method=method, **given)
    i = int(random.integers(batch))
    alone = ops.tilt_sample(
        logits[i : i + 1],
        None if values is None else values[:, i : i + 1],
        None if weights is None else weights[i : i + 1],
        mask=None if mask is None else mask[i : i + 1],
        method=method,
        **{n: at_row(v, i) for n, v in given.items()},
    )
    same_bits(tuple(f[i : i + 1] for f in found), tuple(alone), "a row with others and alone")
    whole = True
    for i, row in enumerate(rows_of(given, batch)):
        tokens = Row(
            logits[i].double().numpy(),
            None if values is None else values[:, i].double().numpy(),
            None if weights is None else weights[i].double().numpy(),
            None if mask is None else mask[i].numpy(),
        )
        whole &= check_row(tokens, row, method == "gumbel", *(f[i].item() for f in found))
    return whole


def case_head(random: Random) -> bool:
    """Products of small whole numbers are exact, so that the truth knows the logits to the bit."""
    batch, vocab, width = int(random.choice([1, 3, 70])), int(random.choice([1, 5, 1000, 1025, 4100])), 8
    heads = int(random.integers(3))
    dtype = DTYPES[random.integers(len(DTYPES))]

    def whole(*shape: int) -> torch.Tensor:
        return strided(random, torch.from_numpy(random.integers(-2, 3, shape)).to(dtype))

    hidden, weight = whole(batch, width), whole(vocab, width)
    value_weight = whole(heads, vocab, width) if heads else None
    weights = torch.from_numpy(random.choice([0.0, 0.5, 1.0, -2.0], (batch, heads))).float() if heads else None
    given = parameters(random, batch, vocab)
    found = ops.head_tilt_sample(hidden, weight, value_weight, weights, **given)
    logits = hidden.double() @ weight.double().T
    values = None if value_weight is None else hidden.double() @ value_weight.double().mT
    complete = True
    for i, row in enumerate(rows_of(given, batch)[:3]):
        tokens = Row(
            logits[i].numpy(),
            None if values is None else values[:, i].numpy(),
            None if weights is None else weights[i].double().numpy(),
            None,
        )
        complete &= check_row(tokens, row, True, *(f[i].item() for f in found))
    return complete


def case_select(random: Random) -> bool:
    batch, candidates, heads = int(random.integers(1, 4)), int(random.integers(1, 20)), int(random.integers(1, 4))
    dtype = DTYPES[random.integers(len(DTYPES))]
    scores = numbers(random, batch, candidates, heads)
    if random.random() < 0.2:
        scores.view(-1)[int(random.integers(scores.numel()))] = float(random.choice([np.nan, np.inf]))
    scores = strided(random, scores.to(dtype))
    weights = torch.from_numpy(random.choice([0.0, 1.0, 0.5, -2.0, 1e10], heads)).float()
    lsc = random.random() < 0.5
    reference = (
        torch.from_numpy(random.standard_normal((batch, heads))).float() if lsc and random.random() < 0.5 else None
    )
    beta = float(random.choice([0.0, 0.0, 1.0, 0.1, 1e-3, 1e-30, 1e3, 1e30]))
    seed, position = wide_integer(random), wide_integer(random)
    transform = "lsc" if lsc else "identity"
    options = {"transform": transform, "beta": beta, "seed": seed, "position": position}
    found = ops.select_block(scores, weights, reference=reference, **options)
    for i in range(batch):
        against = None if reference is None else reference[i].double().numpy()
        fields = (found.index[i].item(), found.probability[i].numpy(), found.utility[i].numpy())
        check_selection(
            scores[i].double().numpy(), weights.double().numpy(), against, lsc, beta, seed, position, *fields
        )
    return True


def case_logprob(random: Random) -> bool:
    rows, vocab = int(random.integers(1, 5)), int(random.choice(VOCABS))
    dtype = DTYPES[random.integers(len(DTYPES))]
    temperature = float(random.choice([t for t in TEMPERATURES if t > 0]))
    softcap = None if random.random() < 0.7 else float(random.choice([1.0, 30.0]))
    logits = strided(random, spoiled(random, numbers(random, rows, vocab)).to(dtype)).requires_grad_()
    target = torch.from_numpy(random.integers(0, vocab, rows))
    target[random.random(rows) < 0.2] = -100
    found = ops.logits_logprob(logits, target, temperature=temperature, softcap=softcap)
    (gradient,) = torch.autograd.grad(found.logp.sum() + found.entropy.sum(), logits)
    for i in range(rows):
        fields = {name: getattr(found, name)[i].item() for name in found._fields}
        row, number = logits[i].detach().double().numpy(), float(np.float32(temperature))
        check_logprob(row, int(target[i]), number, softcap, fields, gradient[i].double().numpy(), dtype)
    return True


def case_linear(random: Random) -> bool:
    """oneDNN's share of it is not ours to judge: up to FEW rows, where the kernels run."""
    rows, outputs, width = (int(random.integers(1, high)) for high in (33, 70, 100))
    x, weight = torch.randn(rows, width), torch.randn(outputs, width)
    bias = torch.randn(outputs) if random.random() < 0.5 else None
    x, weight = (torch.from_numpy(random.standard_normal(t.shape)).float() for t in (x, weight))
    found = linear_ops.linear(x, weight, bias)
    want = x.double().numpy() @ weight.double().numpy().T + (0 if bias is None else bias.double().numpy())
    bound = np.abs(x.double().numpy()) @ np.abs(weight.double().numpy()).T + 1
    assert (np.abs(found.double().numpy() - want) <= 1e-6 * bound).all(), "linear"
    assert torch.equal(linear_ops.linear(x[-1:], weight, bias), found[-1:]), "linear: a row with others and alone"
    gain = torch.from_numpy(random.standard_normal(width)).float()
    normed = linear_ops.rms_norm(x, gain, 1e-6).double().numpy()
    xs = x.double().numpy()
    want = xs / np.sqrt((xs**2).mean(-1, keepdims=True) + 1e-6) * gain.double().numpy()
    assert np.allclose(normed, want, atol=1e-5, rtol=1e-5), "rms_norm"
    return True


def case_attention(random: Random) -> bool:
    width, page, leaf = 16, 64, 16
    prompts, kv_heads, group = int(random.integers(1, 3)), int(random.integers(1, 3)), int(random.integers(1, 4))
    per = random.integers(1, 4, prompts)
    rows, tokens = int(per.sum()), int(random.integers(1, 4))
    tail_len = random.integers(tokens, 4 * leaf + 1, rows) * (random.random(rows) < 0.9)  # or idle
    leaves, count = np.full((rows, 5), -1), -(-tail_len // leaf) + random.integers(0, 2, rows)
    lengths = random.integers(0, 3 * page, prompts)
    dtype = DTYPES[random.integers(len(DTYPES))]

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape)).to(dtype)

    stores = [normal(3 * prompts, kv_heads, page, width) for _ in range(2)]
    pool = random.permutation(count.sum() + 1)
    for row, end in enumerate(np.cumsum(count)):
        leaves[row, : count[row]] = pool[end - count[row] : end]
    tails = [normal(len(pool), kv_heads, leaf, width) for _ in range(2)]
    query = normal(rows, tokens, kv_heads * group, width)
    pages = torch.from_numpy(random.permutation(3 * prompts).reshape(prompts, 3)).int()
    first = torch.from_numpy(np.concatenate([[0], np.cumsum(per)])).int()
    tree = ops.Tree(
        pages, torch.from_numpy(lengths).int(), first, *(torch.from_numpy(x).int() for x in (leaves, tail_len))
    )
    options = {
        "window": None if random.random() < 0.6 else int(random.integers(1, 150)),
        "softcap": None if random.random() < 0.7 else 5.0,
        "scale": [None, 0.0, 1.5][random.integers(3)],
        "sinks": None if random.random() < 0.7 else torch.from_numpy(random.standard_normal(kv_heads * group)).float(),
    }
    laid = (stores[0].mT.contiguous().mT, stores[1], tails[0].mT.contiguous().mT, tails[1])
    if random.random() < 0.2:  # any other layout is served by torch's attention
        laid = (stores[0], stores[1], tails[0], tails[1])
    found = ops.tree_attention(query, *laid, tree, **options)
    check_attention(found, query, stores, tails, tree, options)
    return True


CASES: tuple[tuple[float, Callable[[Random], bool]], ...] = (
    (0.55, case_tilt),
    (0.05, case_head),
    (0.14, case_select),
    (0.16, case_logprob),
    (0.05, case_linear),
    (0.05, case_attention),
)


def instruction_sets() -> list[str]:
    def there(name: str) -> bool:
        try:
            _C.instruction_set(name)
        except ValueError:
            return False
        return True

    return [name for name in ("portable", "avx2", "avx512") if there(name)]


def run_case(seed: int, number: int, isa: str) -> tuple[str, bool]:
    """The op's name and whether all of it could be judged. AssertionError says what is wrong."""
    random = np.random.default_rng([seed, number])
    chances, cases = zip(*CASES, strict=True)
    case = cases[int(random.choice(len(cases), p=chances))]
    before, settings.cpu_isa = settings.cpu_isa, isa
    try:
        return case.__name__.removeprefix("case_"), case(random)
    except AssertionError as error:
        raise AssertionError(f"case {number} of seed {seed}, {case.__name__}, {isa}: {error}") from error
    finally:
        settings.cpu_isa = before


def run(seed: int, first: int, cases: int, give_up: int = 20) -> tuple[Counter[str], list[str]]:
    """How many of each op ran and were judged in part, and what was wrong."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    sets = instruction_sets()
    for number in range(first, first + cases):
        try:
            name, whole = run_case(seed, number, sets[number % len(sets)])
            counts[name] += 1
            counts["judged in part"] += not whole
        except AssertionError as error:
            faults.append(str(error))
            if len(faults) == give_up:
                break
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    counts, faults = run(given.seed, given.first, given.cases)
    print(dict(counts), f"{len(faults)} wrong")
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
