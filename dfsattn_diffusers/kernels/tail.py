"""Pools of keys and values that stand for the blocks a row does not keep: the specification."""

from __future__ import annotations

import math
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
        bias: `[B, H, P]` float32, to be added to a pool's logits; -inf for an empty pool.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


def pool_tail(
    k: Tensor, v: Tensor, *, pool: int, lengths: Tensor, energy: Tensor | None = None
) -> Tail:
    """Pool keys and values.

    The bias of a pool of `n` keys is `log n`, and with the queries' energy `+ log cosh s`,
    `s = sqrt(sum_d energy_d var_d(k))`: the log-mean-exp of two equal halves of its keys whose
    logits are `s` above and below their mean. That is `s^2 / 2` where the spread is small, as for
    a normal distribution, and grows like `s` where it is not: there half the variance would let a
    pool outweigh its own keys. One number for all queries of a head gains as much as one for each
    query, which would take another product as large as that of the logits (docs/fidelity.md).

    Args:
        k, v: `[B, H, P * pool, D]`; what lies behind a pool's length is never used.
        pool: Keys of one pool.
        lengths: `[B or 1, P]` int32, real keys at the front of each pool.
        energy: `[B, H, D]` float32, mean squares of the queries times the scale of the logits;
            None leaves the spread of the keys aside.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    _check_pools(k, v, pool, lengths)
    if energy is not None:
        _check_energy(k, energy)
    kernels = fast("tail_kernels", k)
    if kernels and kernels.can_pool(k, v, pool):
        return Tail(*kernels.pool(k, v, pool, lengths, energy))
    bias = lengths.float().log()[:, None].expand(*k.shape[:2], -1)
    value = _mean(_split(v, pool, lengths), lengths)
    if energy is None:
        mean = _mean(_split(k, pool, lengths), lengths)
    else:
        mean, variance = _moments(k, pool, lengths)
        # No matrix product: autocast would round it.
        spread = (variance * energy[:, :, None]).sum(-1).sqrt_()
        bias = bias + (torch.logaddexp(spread, -spread) - math.log(2)).float()
    return Tail(mean.to(k.dtype), value.to(v.dtype), bias)


def pool_moments(x: Tensor, *, pool: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of the pools of `x`.

    Args:
        x: `[B, H, P * pool, D]`; what lies behind a pool's length is never used.
        pool: Rows of one pool.
        lengths: `[B or 1, P]` int32, real rows at the front of each pool.

    Returns:
        Each `[B, H, P, D]`, float32 or wider; 0 for empty pools.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    _check_pools(x, x, pool, lengths)
    kernels = fast("tail_kernels", x)
    if kernels and kernels.can_pool(x, x, pool):
        return kernels.moments(x, pool, lengths)
    return _moments(x, pool, lengths)


def _moments(x: Tensor, pool: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    x = _split(x, pool, lengths)
    mean = _mean(x, lengths)
    centred = (x - mean[:, :, :, None]).masked_fill_(~_real(pool, lengths), 0)
    return mean, _mean(centred.square_(), lengths)


def _split(x: Tensor, pool: int, lengths: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.unflatten(2, (-1, pool)).to(wide).masked_fill(~_real(pool, lengths), 0)


def _real(pool: int, lengths: Tensor) -> Tensor:
    return (torch.arange(pool, device=lengths.device) < lengths[..., None])[:, None, :, :, None]


def _mean(x: Tensor, lengths: Tensor) -> Tensor:
    return x.sum(3) / lengths.clamp(min=1)[:, None, :, None]


def add_tail(call: AttentionCall) -> None:
    """Let the tail's pools of every block that a row does not keep join its softmax, in place.

    A pool has the logit `scale * q . mean(k) + bias`.

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
    dropped = ~block_map.to_mask()
    order, out = call.output_order, call.out
    if order is not None:
        out = take_rows(out, order.clamp(min=0))

    rows = max(1, _CHUNK_ELEMENTS // (batch * heads * pools * size))
    for start in range(0, block_map.counts.shape[2], rows):
        part = slice(start * size, min((start + rows) * size, num_queries))
        q, lse = call.q[:, :, part].to(wide), call.lse[:, :, part, None]
        logits = (q @ keys.transpose(2, 3)).mul_(call.scale).add_(tail.bias[:, :, None])
        absent = dropped[:, :, start : start + rows].repeat_interleave(size, 2)[:, :, : q.shape[2]]
        absent = absent.repeat_interleave(pools // block_map.num_key_blocks, 3)
        logits.masked_fill_(~absent, float("-inf"))
        peak = torch.maximum(logits.amax(-1, keepdim=True), lse)
        peak = peak.masked_fill(peak == float("-inf"), 0)
        weights, kept = logits.sub_(peak).exp_(), (lse - peak).exp()
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


def _check_energy(k: Tensor, energy: Tensor) -> None:
    wanted = [*k.shape[:2], k.shape[-1]]
    if (list(energy.shape), energy.dtype, energy.device) != (wanted, torch.float32, k.device):
        raise ValueError(
            f"energy must be torch.float32 {wanted} on {k.device}, got {energy.dtype} "
            f"{list(energy.shape)} on {energy.device}"
        )
