"""Pools of keys and values that stand for the blocks a row does not keep: the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import AttentionCall
from .backends.reference import store
from .fast import fast
from .rows import take_rows

# Largest slice of the pools' logits that is in memory at a time.
_CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Tail:
    """Pools of consecutive keys, `P = nK * (key_block // pool)`.

    Attributes:
        keys, values: `[B, H, P, D]` means over real tokens, in the keys' dtype; 0 for empty pools.
        log_counts: `[B, P]` float32, log of the real tokens; -inf for an empty pool.
        variance: `[B, H, P, D]` population variance of the keys in their dtype, or None.
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    variance: Tensor | None = None


def pool_tail(k: Tensor, v: Tensor, *, pool: int, lengths: Tensor, moment: bool) -> Tail:
    """Pool keys and values.

    Args:
        k, v: `[B, H, P * pool, D]`; what lies behind a pool's length is never used.
        pool: Keys of one pool.
        lengths: `[B or 1, P]` int32, real keys at the front of each pool.
        moment: Also compute the variance of the keys.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    _check_pools(k, v, pool, lengths)
    log_counts = lengths.float().log().expand(k.shape[0], -1)
    kernels = fast("tail_kernels", k)
    if kernels and kernels.can_pool(k, v, pool):
        keys, values, variance = kernels.pool(k, v, pool, lengths, moment)
        return Tail(keys, values, log_counts, variance)
    real = (torch.arange(pool, device=k.device) < lengths[..., None])[:, None, :, :, None]
    count = lengths.clamp(min=1)[:, None, :, None]
    wide = torch.promote_types(k.dtype, torch.float32)

    def split(x):
        return x.unflatten(2, (-1, pool)).to(wide).masked_fill(~real, 0)

    keys = split(k)
    mean, value, variance = keys.sum(3) / count, split(v).sum(3) / count, None
    if moment:
        centred = (keys - mean[:, :, :, None]).masked_fill_(~real, 0)
        variance = centred.square_().sum(3) / count
        variance = variance.clamp(max=torch.finfo(k.dtype).max).to(k.dtype)
    return Tail(mean.to(k.dtype), value.to(v.dtype), log_counts, variance)


def add_tail(call: AttentionCall) -> None:
    """Let the tail's pools of every block that a row does not keep join its softmax, in place.

    A pool of `n` keys has the logit `scale * q . mean(k) + log n`, and with a variance
    `+ log cosh s`, `s = scale * sqrt(sum_d q_d^2 var_d(k))`: the log-mean-exp of two equal halves
    at `-s` and `s`. That is `s^2 / 2` where the spread is small, as for a normal distribution, and
    grows like `s` where it is not: there half the variance would let a pool outweigh its own keys.

    Args:
        call: Done, with its tail and log-sum-exp; `out` and `lse` are updated.

    Source: block means in place of what is dropped: PISA, arXiv 2602.01077, Sol-Attn, 2607.24027.
    """
    kernels = fast("tail_kernels", call.q)
    if kernels and kernels.can_add(call):
        kernels.add(call)
        return
    block_map, tail = call.block_map, call.tail
    wide = torch.promote_types(call.q.dtype, torch.float32)
    batch, heads, num_queries, _ = call.q.shape
    pools, size = tail.keys.shape[2], block_map.query_block
    keys, values = (x.to(wide) for x in (tail.keys, tail.values))
    variance = None if tail.variance is None else tail.variance.to(wide)
    dropped = ~block_map.to_mask()
    order, out = call.output_order, call.out
    if order is not None:
        out = take_rows(out, order.clamp(min=0))

    rows = max(1, _CHUNK_ELEMENTS // (batch * heads * pools * size))
    for start in range(0, block_map.counts.shape[2], rows):
        part = slice(start * size, min((start + rows) * size, num_queries))
        q, lse = call.q[:, :, part].to(wide), call.lse[:, :, part, None]
        logits = (q @ keys.transpose(2, 3)).mul_(call.scale).add_(tail.log_counts[:, None, None])
        spread = None
        if tail.variance is not None:
            spread = (q.square() @ variance.transpose(2, 3)).sqrt_().mul_(call.scale)
            # The upper of a pool's two halves; the other's weight joins below.
            logits += spread
        absent = dropped[:, :, start : start + rows].repeat_interleave(size, 2)[:, :, : q.shape[2]]
        absent = absent.repeat_interleave(pools // block_map.num_key_blocks, 3)
        logits.masked_fill_(~absent, float("-inf"))
        peak = torch.maximum(logits.amax(-1, keepdim=True), lse)
        peak = peak.masked_fill(peak == float("-inf"), 0)
        weights, kept = logits.sub_(peak).exp_(), (lse - peak).exp()
        if spread is not None:
            weights *= spread.mul_(-2).exp_().add_(1).mul_(0.5)
        total = weights.sum(-1, keepdim=True) + kept
        sums = out[:, :, part].to(wide) * kept + weights @ values
        out[:, :, part] = (sums / total).masked_fill_(total == 0, 0).to(out.dtype)
        call.lse[:, :, part] = (peak + total.log()).squeeze(-1)
    if order is not None:
        store(out, order, call.out)


def _check_pools(k: Tensor, v: Tensor, pool: int, lengths: Tensor) -> None:
    if k.ndim != 4 or k.shape != v.shape or not k.is_floating_point():
        raise ValueError(
            f"k and v must be floating [B, H, N, D] tensors of one shape, got {k.dtype} "
            f"{list(k.shape)} and {v.dtype} {list(v.shape)}"
        )
    if (v.dtype, v.device) != (k.dtype, k.device):
        raise ValueError(
            f"v must have k's dtype and device, {k.dtype} on {k.device}, got {v.dtype} on "
            f"{v.device}; call v.to(k)"
        )
    if not isinstance(pool, int) or pool < 1 or k.shape[2] % pool:
        raise ValueError(
            f"pool must be a positive int that divides the {k.shape[2]} slots of k, got {pool!r}; "
            "pad k and v to whole key blocks"
        )
    pools = k.shape[2] // pool
    fits = lengths.ndim == 2 and lengths.shape[0] in (1, k.shape[0]) and lengths.shape[1] == pools
    if lengths.dtype != torch.int32 or not fits or lengths.device != k.device:
        raise ValueError(
            f"lengths must be int32 [{k.shape[0]} or 1, {pools}] on {k.device}, got "
            f"{lengths.dtype} {list(lengths.shape)} on {lengths.device}"
        )
