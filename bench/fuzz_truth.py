"""What the ops' docstrings promise, in float64 NumPy, and judges that hold one row of an answer against it.

Nothing here imports the engine or torch's formulas. A judge raises AssertionError, and returns False where a threshold
lies within rounding of a filter's edge, so that only the parts of the answer that do not depend on it were judged.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
BLOCK = 1024  # tokens whose masses the first uniform chooses among


class Row(NamedTuple):
    logits: Array  # [V]
    values: Array | None  # [R, V]
    weights: Array | None  # [R]
    mask: Array | None  # [V]


def philox(seed: int, position: int, stream: int, counters: Array) -> Array:
    """Philox4x32-10 of Salmon et al. (2011), words [N, 4]."""
    seed, position, low = seed % 2**64, position % 2**64, np.uint64(0xFFFFFFFF)
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    x = [np.full(len(counters), word, np.uint64) for word in (position & 0xFFFFFFFF, position >> 32, stream)]
    x.append(counters.astype(np.uint64))
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        x = [(b >> shift) ^ x[1] ^ np.uint64(keys[0]), b & low, (a >> shift) ^ x[3] ^ np.uint64(keys[1]), a & low]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return np.stack(x, 1)


def uniforms(seed: int, position: int, stream: int) -> tuple[float, float]:
    w = [int(word) for word in philox(seed, position, stream, np.zeros(1))[0]]
    return ((w[0] << 32 | w[1]) >> 11) * 2.0**-53, ((w[2] << 32 | w[3]) >> 11) * 2.0**-53


def noise(seed: int, position: int, vocab: int) -> Array:
    """Gumbel noise [V] in nats; token i takes word i % 4 of counter i // 4."""
    words = philox(seed, position, 2, np.arange((vocab + 3) // 4)).reshape(-1)[:vocab]
    return -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32))


def log_softmax(x: Array) -> Array:
    under = x - x.max()
    return under - np.log(np.exp(under).sum())


class Law(NamedTuple):
    """Base and tilted logits in nats [V], -inf where forbidden, and by how much rounding may move either [V]."""

    base: Array
    tilted: Array
    slack: Array


def law_of(row: Row, temperature: float) -> Law | None:
    """None for a bad row."""
    allowed = row.logits != -np.inf
    if row.mask is not None:
        allowed &= row.mask
    logits = np.where(allowed, row.logits, -np.inf)
    t = temperature or 1.0
    delta, size = np.zeros(len(logits)), np.zeros(len(logits))
    if row.values is not None and row.weights is not None:
        for weight, values in zip(row.weights, row.values, strict=True):
            if weight != 0:
                part = np.where(allowed, weight * values, 0.0)
                delta, size = delta + part, size + np.abs(np.where(np.isfinite(part), part, 0.0))
    if not allowed.any() or not (logits < np.inf).all() or not (delta < np.inf).all():
        return None
    base, tilted = logits / t, logits / t + delta
    if not (tilted > -np.inf).any():  # the base policy decides
        tilted, size = base, 0 * size
    size = np.abs(np.where(np.isfinite(base), base, 0.0)) + size
    return Law(base, tilted, size * 4e-7 + 1e-6)


def hazy(law: Law) -> bool:
    """Whether heads that cancel each other leave a token's rounding so large that its mass is anybody's guess."""
    possible = law.tilted > -np.inf
    surely = (law.tilted - law.slack)[possible].max()
    return bool(((law.slack > 0.05) & (law.tilted + law.slack > surely - 20))[possible].any())


def kept_counts(law: Law, order: Array, row: dict[str, float]) -> tuple[int, int]:
    """The fewest and the most tokens, from the front of `order`, that the filters may keep."""
    z = law.tilted[order]
    n = int((z > -np.inf).sum())
    if row["top_k"] > 0:
        n = min(n, int(row["top_k"]))
    weight = np.exp(z[:n] - z[0])
    slack = 3e-6 + 4 * min(float(law.slack[order[0]]), 1.0)
    fewest = most = n
    if row["top_p"] < 1:
        share = np.cumsum(weight) / weight.sum()
        most = min(most, int((share < row["top_p"] + slack).sum()) + 1)
        fewest = min(fewest, int((share < row["top_p"] - slack).sum()) + 1)
    if row["min_p"] > 0:
        most = min(most, int((weight >= row["min_p"] * (1 - 2 * slack)).sum()))
        fewest = min(fewest, int((weight >= row["min_p"] * (1 + 2 * slack)).sum()))
    return max(1, fewest), max(1, most)


def check_row(
    tokens: Row, row: dict[str, float], gumbel: bool, token: int, logp_base: float, logp_policy: float, kl: float,
    valid: bool,
) -> bool:  # fmt: skip
    law = law_of(tokens, row["temperature"])
    assert valid == (law is not None), f"valid is {valid}"
    if law is None:
        assert token == 0, f"token {token} of a bad row"
        assert math.isnan(logp_base) and math.isnan(logp_policy) and math.isnan(kl), "a bad row has numbers"  # noqa: PT018
        return True
    assert 0 <= token < len(law.base), f"token {token}"
    assert law.tilted[token] > -np.inf, f"token {token} is forbidden"
    base = log_softmax(law.base)
    near(logp_base, base[token], law.slack[token] + law.slack[law.base.argmax()], "logp_base")
    if hazy(law):
        return False
    if row["temperature"] == 0:
        gap = law.tilted.max() - law.tilted[token]
        assert gap <= 2 * law.slack[token], f"greedy token {token} is {gap} below the best"
        if tokens.values is None:
            assert token == law.tilted.argmax(), f"greedy token {token}, not {law.tilted.argmax()}"
        near(kl, -base[token], 2 * law.slack[token] + law.slack.max(where=law.base > -np.inf, initial=0), "greedy kl")
        assert logp_policy == 0, f"greedy logp_policy {logp_policy}"
        return True
    order = np.lexsort((np.arange(len(law.base)), -law.tilted))
    fewest, most = kept_counts(law, order, row)
    edge, after = (law.tilted[order[min(i, len(order) - 1)]] for i in (most - 1, most))
    apart = most == len(order) or after == -np.inf or edge - after > 4 * law.slack[order[most - 1]]
    exact = tokens.values is None or tokens.weights is None or not tokens.weights.any()
    tie = most < len(order) and edge == after and exact
    if fewest != most or not (apart or tie):
        gap = edge - law.tilted[token]
        assert gap <= 4 * law.slack[order[most - 1]], f"token {token} is {gap} below the last kept"
        return False
    kept = np.full(len(order), -np.inf)
    kept[order[:most]] = law.tilted[order[:most]]
    assert kept[token] > -np.inf, f"token {token} is filtered out"
    check_numbers(law, kept, base, token, logp_policy, kl)
    check_draw(law, kept, row, gumbel, token, filtered=most < int((law.tilted > -np.inf).sum()))
    return True


def check_numbers(law: Law, kept: Array, base: Array, token: int, logp_policy: float, kl: float) -> None:
    policy = log_softmax(kept)
    top = law.slack[kept.argmax()] + law.slack[law.base.argmax()]
    near(logp_policy, policy[token], law.slack[token] + top, "logp_policy")
    p = np.exp(policy)
    terms = np.where(p > 0, p * (policy - np.where(p > 0, base, 0.0)), 0.0)
    slack = 20 * ((p * law.slack).sum() + top)
    near(kl, terms.sum(), slack, "kl")
    assert kl >= -1e-5 - slack, f"kl {kl}"


def near(found: float, want: float, slack: float, what: str) -> None:
    if abs(found) == np.inf and abs(want) > 3.4e38:  # answers are fp32
        want = math.copysign(np.inf, want)
        assert found == want, f"{what} {found}, not {want}"
        return
    assert abs(found - want) <= slack + 1e-5 + 2e-6 * abs(want), f"{what} {found}, not {want}"


def check_draw(law: Law, kept: Array, row: dict[str, float], gumbel: bool, token: int, filtered: bool) -> None:
    seed, position = int(row["seed"]), int(row["position"])
    if gumbel:
        score = kept + noise(seed, position, len(kept))
        gap, best = score.max() - score[token], score.argmax()
        bound = 2 * (law.slack[token] + law.slack[best]) + 1e-6
        assert gap <= bound, f"token {token} scores {gap} below {best}"
        return
    first, second = uniforms(seed, position, 0)
    p = np.exp(log_softmax(kept))
    slack = 1e-5 + 4 * min(1.0, float((p * law.slack).sum()))
    if filtered:
        inside(p, token, first, slack, "token")
        return
    starts = np.arange(0, len(p), BLOCK)
    blocks, block = np.add.reduceat(p, starts), token // BLOCK
    within = p[block * BLOCK : (block + 1) * BLOCK] / blocks[block]
    # Filters that keep every token draw from all of them at once: the first uniform, over the whole row.
    if row["top_p"] < 1 or row["min_p"] > 0 or 0 < row["top_k"] < len(p):
        inside(p, token, first, slack, "token")
        return
    inside(blocks, block, first, slack, "block")
    inside(within, token % BLOCK, second, slack, "token in its block")


def inside(p: Array, index: int, uniform: float, slack: float, what: str) -> None:
    end = np.cumsum(p)
    low, high = end[index] - p[index], end[index]
    last = not p[index + 1 :].any()
    assert low - slack <= uniform and (last or uniform <= high + slack), (  # noqa: PT018
        f"{what} {index} of [{low}, {high}], the uniform is {uniform}"
    )


def check_selection(
    scores: Array, weights: Array, against: Array | None, lsc: bool, beta: float, seed: int, position: int,
    index: int, probability: Array, utility: Array,
) -> None:  # fmt: skip
    utilities, size = np.zeros(len(scores)), np.zeros(len(scores))
    for r, weight in enumerate(weights):
        if weight == 0:
            continue
        score = scores[:, r] if against is None else scores[:, r] - against[r]
        spread = 1e-6 * (np.abs(scores[:, r]) + 1e-30)
        if lsc:
            score = np.minimum(score, 0) - np.log1p(np.exp(-np.abs(score)))
            spread = spread * np.minimum(1, np.exp(np.where(score == 0, -745, 0))) + 1e-6 * np.abs(score)
        utilities = utilities + weight * score
        size = size + np.abs(weight) * np.where(np.isfinite(spread), spread, 0.0)
    utilities = np.where(np.isnan(utilities), -np.inf, utilities)
    slack = 2 * size + 1e-7 * np.where(np.isfinite(utilities), np.abs(utilities), 0) + 1e-30
    same = (utility == utilities) | (np.abs(utility - utilities) <= slack)
    beyond = np.abs(utilities) > 3.4e38
    assert (same | beyond).all(), f"utility {utility}, not {utilities}"
    top = utilities.max()
    gap = np.where(utilities == top, 0.0, utilities - top)
    chosen = gap[index]
    if beta == 0:
        assert -chosen <= 2 * slack.max(), f"index {index} is {-chosen} below the best"
        assert probability[index] == 1 and probability.sum() == 1, f"probability {probability}"  # noqa: PT018
        return
    reach = np.float32(beta)
    p = np.exp(gap / float(reach))
    p /= p.sum()
    moved = np.minimum(1.0, 4 * slack.max() / float(reach) + 1e-5 * (1 + np.abs(np.log(np.maximum(p, 1e-30)))))
    assert (np.abs(probability - p) <= moved).all(), f"probability {probability}, not {p}"
    inside(p, index, uniforms(seed, position, 1)[0], float(np.max(moved)) * 2, "index")


def check_logprob(
    row: Array, target: int, temperature: float, softcap: float | None, found: dict[str, float], gradient: Array,
    dtype: Any,
) -> None:  # fmt: skip
    if target == -100:
        assert set(found.values()) == {0.0}, f"an ignored row has {found}"
        assert not gradient.any(), "an ignored row has a gradient"
        return
    capped = row if softcap is None else softcap * np.tanh(row / softcap)
    capped = np.where(row == -np.inf, -np.inf if softcap is None else -softcap, capped)
    x = capped / temperature
    bad = np.isnan(row).any() or (x == np.inf).any() or (x == -np.inf).all()
    if softcap is not None and not bad:
        bad = (row == np.inf).any()
    if bad:
        if softcap is None or np.isnan(row).any():
            assert all(math.isnan(v) for v in found.values()), f"a bad row has {found}"
        return
    top = x.max()
    under = x - top
    lse = np.log(np.exp(under).sum())
    twice = np.log(np.exp(2 * under).sum())
    p = np.exp(under - lse)
    entropy = lse - np.where(p > 0, p * np.where(p > 0, under, 0), 0).sum()
    magnitude = float(np.abs(x[np.isfinite(x)]).max())
    if magnitude > 1.7e38:
        return  # differences are beyond what fp32 outputs hold
    slack = 4e-7 * magnitude + 1e-6
    at = abs(float(x[target])) * 4e-7 if np.isfinite(x[target]) else 0.0
    if np.isfinite(x[target]):
        near(found["logp"], under[target] - lse, 2 * slack + at, "logp")
    else:
        assert found["logp"] == -np.inf, f"logp {found['logp']} of a forbidden target"
    near(found["lse"], top + lse, slack, "lse")
    near(found["lse2"], 2 * top + twice, 2 * slack, "lse2")
    near(found["max_logit"], top, slack, "max_logit")
    spread = (p * np.where(np.isfinite(x), np.abs(x), 0)).sum()
    near(found["entropy"], entropy, 4e-6 * (1 + spread) + 4 * min(slack, 1.0) * (1 + entropy), "entropy")
    if softcap is not None or not np.isfinite(x).all() or magnitude > 1e3:
        return
    one = np.zeros(len(x))
    one[target] = 1
    logp = under - lse
    want = (one - p - p * (logp + entropy)) / temperature
    if np.abs(want).max() > 6e4:
        return  # beyond fp16
    ulp = {"torch.float32": 2e-6, "torch.bfloat16": 2.0**-8, "torch.float16": 2.0**-11}[str(dtype)]
    bound = np.abs(want) * ulp * 1.02 + 3e-6 * (1 + entropy) * (slack * 1e6) / temperature + 6e-8
    assert (np.abs(gradient - want) <= bound).all(), f"gradient off by {np.abs(gradient - want).max()}"


def check_attention(found: Any, query: Any, stores: Any, tails: Any, tree: Any, options: dict[str, Any]) -> None:
    keys, values = (x.double().numpy() for x in stores)
    tail_keys, tail_values = (x.double().numpy() for x in tails)
    q, out, page = query.double().numpy(), found.double().numpy(), keys.shape[2]
    _, tokens, heads, width = q.shape
    group, leaf, scale = heads // keys.shape[1], tail_keys.shape[2], options["scale"]
    scale = width**-0.5 if scale is None else scale
    firsts, lengths, pages = tree.first_row.tolist(), tree.prefix_len.tolist(), tree.pages.numpy()
    for prompt, length in enumerate(lengths):
        where = [(pages[prompt, i // page], i % page) for i in range(length)]
        for row in range(firsts[prompt], firsts[prompt + 1]):
            tail = int(tree.tail_len[row])
            assert tail or not out[row].any(), f"row {row} is idle and gives {out[row][out[row] != 0][:3]}"
            own = [(int(tree.leaves[row, i // leaf]), i % leaf) for i in range(tail)]
            for head in range(heads):
                kv = head // group
                k = np.array([keys[a, kv, b] for a, b in where] + [tail_keys[a, kv, b] for a, b in own])
                v = np.array([values[a, kv, b] for a, b in where] + [tail_values[a, kv, b] for a, b in own])
                for token in range(tokens if tail else 0):
                    here = length + tail - tokens + token
                    x = k[: here + 1] @ q[row, token, head] * scale
                    if options["softcap"] is not None:
                        x = options["softcap"] * np.tanh(x / options["softcap"])
                    if options["window"] is not None:
                        x[: max(0, here + 1 - options["window"])] = -np.inf
                    sink = -np.inf if options["sinks"] is None else float(options["sinks"][head])
                    e = np.exp(x - max(x.max(), sink))
                    want = e @ v[: here + 1] / (e.sum() + np.exp(sink - max(x.max(), sink)))
                    slack = 3e-5 if query.element_size() == 4 else 3e-2
                    assert np.allclose(out[row, token, head], want, atol=slack, rtol=slack), (
                        f"row {row}, token {token}, head {head}: {out[row, token, head][:3]}, not {want[:3]}"
                    )
