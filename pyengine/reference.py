"""Every op as plain PyTorch in fp64: the executable specification that all backends are tested against.

Nothing here is tuned. Each function states the mathematics once, in the order in which the
definition gives it, and draws with the same counter-based random numbers as the kernels, so that a
kernel's token can be compared with the reference's token and not only its law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024  # tokens; csrc/algebra.h kBlock
# Philox streams: one for each use of a (seed, position), so that no two draws share their bits.
TOKEN_STREAM, SELECT_STREAM, GUMBEL_STREAM = 0, 1, 2


class TiltSample(NamedTuple):
    """What `tilt_sample` returns; every field has shape [B]."""

    token: Tensor
    logp_base: Tensor
    logp_policy: Tensor
    kl: Tensor
    valid: Tensor


class TokenLogprob(NamedTuple):
    """What `linear_logprob` and `logits_logprob` return; every field is fp32 of shape [N], in nats.

    Only logp and entropy carry a gradient. The rest are moments for weights, which are detached.
    """

    logp: Tensor  # l_y - LSE(l)
    lse: Tensor  # LSE(l)
    lse2: Tensor  # LSE(2 l)
    max_logit: Tensor
    entropy: Tensor  # of softmax(l)


class SequenceMoments(NamedTuple):
    """Sums over the tokens of a response, each of shape [P]; what a paired loss is a function of.

    Only logp carries a gradient: weights made of the rest are detached (WPO).
    """

    logp: Tensor  # sum of log-probabilities
    tokens: Tensor  # how many, int64
    sampled: Tensor  # sum of l_y + LSE(l) - LSE(2 l), WPO's sampled alignment
    greedy: Tensor  # sum of l_y - max l, WPO's greedy alignment
    entropy: Tensor


PairedLoss = Callable[[SequenceMoments, SequenceMoments, Tensor | None, Tensor | None], Tensor]


class Preference(NamedTuple):
    """What `linear_preference` returns."""

    loss: Tensor  # scalar, the mean over pairs; the only field with a gradient
    losses: Tensor  # [P]
    moments: SequenceMoments  # of all 2P responses, chosen first
    top1: Tensor  # [2P], how many tokens no other is likelier than, int64


class BlockSelection(NamedTuple):
    """What `select_block` returns: index [B], probability [B, K], utility [B, K]."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    probability: Tensor
    utility: Tensor


def philox(seed: Tensor, position: Tensor, stream: int, counter: Tensor | int = 0) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits, as int64, for each (seed, position, stream, counter)."""
    low = 0xFFFFFFFF
    c0, c1 = position & low, (position >> 32) & low
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0) + counter
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps like uint64
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def uniforms(seed: Tensor, position: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Two fp64 uniforms in [0, 1) of 53 bits for each (seed, position); int64 [B] both."""
    c0, c1, c2, c3 = philox(seed, position, stream)

    def uniform(high: Tensor, rest: Tensor) -> Tensor:
        return ((high << 21) | (rest >> 11)).double() * 2.0**-53

    return uniform(c0, c1), uniform(c2, c3)


def gumbel(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [B, V], a pure function of (seed, position, token id).

    Token i takes word i % 4 of Philox counter i // 4. The exponential -log1p(-u), u = (word + 1/2) / 2^32,
    keeps its relative precision where it is small, which is where unlikely tokens win.
    """
    counter = torch.arange((vocab + 3) // 4, device=seed.device)
    shape = (len(seed), len(counter))
    words = philox(seed[:, None].expand(shape), position[:, None].expand(shape), GUMBEL_STREAM, counter)
    u = (torch.stack(words, -1).flatten(1)[:, :vocab].double() + 0.5) * 2.0**-32
    return -(-torch.log1p(-u)).log()


def _first_above(weights: Tensor, target: Tensor) -> Tensor:
    """Index of the first entry at which the running sum exceeds target; weights [B, N], target [B].

    Entries of weight 0 are never chosen; where rounding keeps the sum below target, the last
    positive entry is.
    """
    above = (weights.cumsum(-1) > target[:, None]) & (weights > 0)
    positive = weights > 0
    last = positive.shape[-1] - 1 - positive.flip(-1).to(torch.int8).argmax(-1)
    return torch.where(above.any(-1), above.to(torch.int8).argmax(-1), last)


def _kept(tilted: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Boolean [B, V]: what top-k, then top-p, then min-p leave, ties to the lowest id."""
    ordered, order = tilted.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(tilted.shape[-1], device=tilted.device)
    k = torch.where(top_k > 0, top_k, tilted.shape[-1])
    weight = torch.where(rank < k[:, None], (ordered - ordered[:, :1]).exp(), 0.0)
    before = weight.cumsum(-1) - weight
    within = (before < top_p[:, None] * weight.sum(-1, keepdim=True)) | (top_p >= 1)[:, None] | (rank == 0)
    likely = ordered - ordered[:, :1] >= min_p[:, None].log()
    keep = (rank < k[:, None]) & within & likely & (ordered > -math.inf)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def tilt_sample(
    logits: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    mask: Tensor | None = None,
    method: str = "inverse",
) -> TiltSample:
    """`pyengine.ops.tilt_sample` in fp64; all per-row parameters have shape [B]."""
    x = logits.double()
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf)
    vocab = x.shape[-1]
    greedy = temperature == 0
    base = x / torch.where(greedy, 1.0, temperature.double())[:, None]
    delta = torch.zeros_like(x)
    if values is not None and weights is not None:
        w = weights.double().T[:, :, None]
        delta = torch.where(w == 0, 0.0, w * values.double()).sum(0)
    delta = torch.where(x == -math.inf, 0.0, delta)  # no value revives a forbidden token
    forbidden = (base + delta == -math.inf).all(-1) & (base > -math.inf).any(-1)
    delta = torch.where(forbidden[:, None], 0.0, delta)  # the scorer forbids all: the base policy decides
    tilted = base + delta

    lse_base, lse_tilted = base.logsumexp(-1), tilted.logsumexp(-1)
    valid = lse_base.isfinite() & lse_tilted.isfinite()
    filtered = (((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)) & ~greedy
    safe = torch.where(valid[:, None], tilted, 0.0)
    keep = _kept(safe, torch.where(filtered, top_k, 0), top_p, min_p) | ~filtered[:, None]
    kept = torch.where(keep, safe, -math.inf)
    weight = (kept - kept.amax(-1, keepdim=True)).exp()

    # Hierarchical inverse CDF: a block of 1,024 tokens, then a token in it. A filtered row draws from
    # its kept tokens at once.
    u_block, u_token = uniforms(seed, position, TOKEN_STREAM)
    blocks = torch.nn.functional.pad(weight, (0, -vocab % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1)
    block = _first_above(sums, u_block * sums.sum(-1))
    chosen = blocks[torch.arange(len(block), device=block.device), block]
    in_block = _first_above(chosen, u_token * chosen.sum(-1))
    flat = _first_above(weight, u_block * weight.sum(-1))
    token = torch.where(filtered, flat, block * BLOCK + in_block)
    if method == "gumbel":
        token = (kept + gumbel(seed, position, vocab)).argmax(-1)
    token = torch.where(greedy, (torch.where(valid[:, None], x, 0.0) + delta).argmax(-1), token)
    token = torch.where(valid, token, 0)

    def at(row: Tensor) -> Tensor:
        return row.gather(-1, token[:, None])[:, 0]

    # Relative to the maxima: at a tiny temperature a logarithm is less than the last bit of a maximum.
    under_base, under_kept = (z - z.amax(-1, keepdim=True) for z in (torch.where(valid[:, None], base, 0.0), kept))
    log_base, log_kept = under_base.logsumexp(-1), under_kept.logsumexp(-1)
    logp_base, logp_policy = at(under_base) - log_base, at(under_kept) - log_kept
    policy = weight / weight.sum(-1, keepdim=True)
    kl = torch.where(weight > 0, policy * (under_kept - under_base), 0.0).sum(-1) - log_kept + log_base
    logp_policy = torch.where(greedy, 0.0, logp_policy)
    kl = torch.where(greedy, -logp_base, kl)
    invalid = ~valid
    return TiltSample(
        token,
        logp_base.masked_fill(invalid, math.nan).float(),
        logp_policy.masked_fill(invalid, math.nan).float(),
        kl.masked_fill(invalid, math.nan).float(),
        valid,
    )


def token_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """hidden [N, D], weight [V, D], bias [V] -> fp64 logits [N, V], capped as softcap * tanh(z / softcap)."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logits_logprob(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> TokenLogprob:
    """`pyengine.ops.logits_logprob` in fp64, outputs too: gradcheck needs them."""
    x = logits.double()
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    kept = target != ignore_index
    lse = x.logsumexp(-1)
    lse = torch.where(lse.isfinite(), lse, math.nan)  # NaN, +inf or -inf alone: a bad row
    log_p = x.log_softmax(-1)
    logp = log_p.gather(-1, torch.where(kept, target, 0)[:, None])[:, 0]
    possible = log_p > -math.inf  # 0 * log 0 = 0, also in the backward pass
    entropy = -torch.where(possible, log_p.exp() * torch.where(possible, log_p, 0.0), 0.0).sum(-1)
    moments = (lse.detach(), (2 * x).logsumexp(-1).detach(), x.amax(-1).detach())
    fields = (torch.where(lse.isnan(), math.nan, field) for field in (logp, *moments, entropy))
    return TokenLogprob(*(torch.where(kept, field, 0.0) for field in fields))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprob:
    """`pyengine.ops.linear_logprob` in fp64, with the whole [N, V] in memory."""
    logits = token_logits(hidden, weight, bias, softcap)
    return logits_logprob(logits, target, temperature=temperature, ignore_index=ignore_index)


def sequence_moments(tokens: TokenLogprob, kept: Tensor) -> SequenceMoments:
    """Sums over the last dimension of tokens [..., T]; kept marks the response's tokens."""
    logp = tokens.logp.detach()
    sampled, greedy = logp + 2 * tokens.lse - tokens.lse2, logp + tokens.lse - tokens.max_logit
    fields = (sampled, greedy, tokens.entropy.detach())
    sums = [torch.where(kept, field, 0.0).sum(-1) for field in (tokens.logp, *fields)]
    return SequenceMoments(sums[0], kept.sum(-1), *sums[1:])


def is_top1(tokens: TokenLogprob) -> Tensor:
    """Whether no token is likelier than the target, bool: l_y = max l up to the rounding of the sums; ties count."""
    logp, lse = tokens.logp.detach(), tokens.lse
    return logp + lse >= tokens.max_logit - 4 * torch.finfo(logp.dtype).eps * (logp.abs() + lse.abs())


def linear_preference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: PairedLoss,
    *,
    reference_logp: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Preference:
    """`pyengine.ops.linear_preference`, all pairs at once and by autograd."""
    flat = linear_logprob(
        hidden.flatten(0, 1),
        weight,
        target.flatten(),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    tokens = TokenLogprob(*(field.unflatten(0, target.shape) for field in flat))
    kept = target != ignore_index
    moments = sequence_moments(tokens, kept)
    pairs = len(target) // 2
    chosen, rejected = (SequenceMoments(*(f[half] for f in moments)) for half in (slice(pairs), slice(pairs, None)))
    references = (None, None) if reference_logp is None else reference_logp.split(pairs)
    losses = loss(chosen, rejected, *references)
    detached = SequenceMoments(*(f.detach() for f in moments))
    return Preference(losses.mean(), losses.detach(), detached, (is_top1(tokens) & kept).sum(-1))


def head_tilt_sample(
    hidden: Tensor,
    weight: Tensor,
    value_hidden: Tensor | None,
    value_weight: Tensor | None,
    weights: Tensor | None,
    *,
    bias: Tensor | None,
    value_bias: Tensor | None,
    softcap: float | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    mask: Tensor | None = None,
) -> TiltSample:
    """`pyengine.ops.head_tilt_sample` in fp64: both heads, then `tilt_sample` with Gumbel noise."""
    values = None
    if value_hidden is not None and value_weight is not None:
        values = value_hidden.double() @ value_weight.double().mT
        if value_bias is not None:
            values = values + value_bias.double()[:, None]
    return tilt_sample(
        token_logits(hidden, weight, bias, softcap),
        values,
        weights,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        position=position,
        mask=mask,
        method="gumbel",
    )


def select_block(
    scores: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    *,
    transform: str,
    beta: float,
    seed: Tensor,
    position: Tensor,
) -> BlockSelection:
    """`pyengine.ops.select_block` in fp64: utility = transform(scores) . weights, then argmax or a softmax draw."""
    w, r = weights.double(), scores.double()
    if transform == "lsc":
        r = torch.nn.functional.logsigmoid(r if reference is None else r - reference.double()[:, None])
    utility = torch.where(w == 0, 0.0, r * w).sum(-1)
    utility = torch.where(utility.isnan(), -math.inf, utility)
    best = utility.argmax(-1)
    if beta == 0:
        probability = torch.nn.functional.one_hot(best, utility.shape[-1]).double()
        return BlockSelection(best, probability.float(), utility.float())
    top = utility.amax(-1, keepdim=True)
    gap = torch.where(utility == top, 0.0, utility - top)  # inf - inf: equally good or bad
    probability = (gap / beta).softmax(-1)
    u, _ = uniforms(seed, position, SELECT_STREAM)
    return BlockSelection(_first_above(probability, u), probability.float(), utility.float())


class Tree(NamedTuple):
    """Which keys each row of `tree_attention` sees: B paged prefixes and, for each of N rows, one tail.

    Everything is int32. A row's sequence is its prompt's prefix, then its own tail: token j of the tail of row n lies
    in leaf leaves[n, j // LEAF] at j % LEAF, of tail stores [leaves, Hkv, LEAF, D]. A row without a tail is idle (it
    pads a bucket): nothing is written for it, and its output is 0.
    """

    pages: Tensor  # [B, T]: page t of prompt b
    prefix_len: Tensor  # [B], tokens
    first_row: Tensor  # [B + 1]: the rows of prompt b are first_row[b] .. first_row[b + 1] - 1
    leaves: Tensor  # [N, L]: leaf l of row n's tail, -1 after its last; no leaf is there twice
    tail_len: Tensor  # [N]: tokens in each row's tail, the S new ones among them; 0: idle


def tree_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tree: Tree,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the S newest tokens of N rows [N, S, Hq, D]; see `ops.tree_attention` for the arguments."""
    heads, width = query.shape[2:]
    group = heads // prefix_key.shape[1]
    out = torch.empty_like(query, dtype=torch.float32)
    leaf = tail_key.shape[2]
    for b, (start, stop) in enumerate(zip(tree.first_row[:-1].tolist(), tree.first_row[1:].tolist(), strict=True)):
        length = int(tree.prefix_len[b])
        prefix = [
            store[tree.pages[b].long()].transpose(0, 1).flatten(1, 2)[:, :length]
            for store in (prefix_key, prefix_value)
        ]
        for row in range(start, stop):
            tail = int(tree.tail_len[row])
            if tail == 0:
                out[row] = 0
                continue
            leaves = tree.leaves[row, : -(-tail // leaf)].long()
            own = (store[leaves].transpose(0, 1).flatten(1, 2)[:, :tail] for store in (tail_key, tail_value))
            key, value = (
                torch.cat(both, 1).double().repeat_interleave(group, 0) for both in zip(prefix, own, strict=True)
            )
            logits = query[row].double().transpose(0, 1) @ key.transpose(1, 2)
            logits *= width**-0.5 if scale is None else scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            at = torch.arange(length + tail, device=query.device)
            ahead = at[-query.shape[1] :, None] - at  # how far each key lies behind its query
            hidden = (ahead < 0) | (ahead >= (window or at.numel()))
            logits = logits.masked_fill(hidden, -torch.inf)
            if sinks is not None:  # a logit without a value
                logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, query.shape[1], 1)], -1)
            weight = torch.softmax(logits, -1)[..., : length + tail]
            out[row] = (weight @ value).transpose(0, 1).float()
    return out.to(query.dtype)
