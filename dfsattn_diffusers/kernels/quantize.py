"""Queries, keys and values in 8 bits with a scale per block: the specification, in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_map import block_lengths
from .fast import fast

if TYPE_CHECKING:
    from .tail import Tail

# The largest numbers of queries and keys. Whole numbers are three to four times as exact for them,
# as theirs are of one size. e4m3 has as many digits at 448 / 2^10 as at 448, down to a 28th of it,
# and then sums of products are numbers of float16, as is the factor that `gluon_fp8` has for them.
LARGEST = {torch.float8_e4m3fn: 448.0 * 2.0**-10, torch.int8: 127.0}
# Of values, always in e4m3: like those of weights, their sizes differ.
LARGEST_VALUE = 448.0
# How `quantize` rounds, by precision of an attention call.
ROUNDING: dict[str, dict[str, Any]] = {
    "fp8": dict(dtype=torch.float8_e4m3fn),
    "int8": dict(dtype=torch.int8, carried=True),
}
# Keys are centred by the mean of every so many of a block: all of them would be read once more.
SAMPLE = 8
# Values of which the largest is smaller by so many powers of two than a head's are not seen.
FAINT = 40.0
# Blocks of smaller numbers lose digits, so that no scale underflows and no sum overflows.
SMALLEST = 2.0**-64


@dataclass(frozen=True)
class QuantizedKeys:
    """Keys and values in 8 bits; `x = x8 * scale`, the mean taken off the keys.

    Slots fill whole blocks; those behind a block's real tokens hold 0, whatever they held.

    Attributes:
        k: `[B, H, nK * key_block, D]` e4m3 or int8, without `key_mean`.
        v: `[B, H, D, nK * key_block]` e4m3: Hopper multiplies 8-bit values with keys contiguous
            only; keys in order, or `interleaved`.
        k_scales, v_scales: `[B, H, nK]` float32.
        key_mean: `[B, H, D]` float32.
        carried: Whether what rounding took off a value was added to the next.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor
    v_scales: Tensor
    key_mean: Tensor
    carried: bool


@dataclass(frozen=True)
class Quantized(QuantizedKeys):
    """All that an attention call reads, in 8 bits.

    Attributes:
        q: `[B, H, nQ * query_block, D]` e4m3 or int8, as the keys.
        q_scales: `[B, H, nQ]` float32.
        mean_logits: `[B, H, nQ * query_block]` float32, `q . key_mean` of exact queries: what the
            unscaled log-sum-exp of centred keys lacks.
    """

    q: Tensor
    q_scales: Tensor
    mean_logits: Tensor


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_block: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
    **keys: Any,
) -> Quantized:
    """Round to 8 bits, each block scaled so that its largest number is the format's.

    Args:
        q: `[B, H, Nq, D]`.
        query_block: Tokens per block; the last one may be short.
        k, v, dtype, **keys: As of `quantize_keys`.
    """
    x = quantize_keys(k, v, dtype=dtype, **keys)
    rounding = _rounding_for([q], query_block)
    q8, q_scales, mean_logits = rounding.round_queries(q, query_block, x.key_mean, dtype)
    return Quantized(**vars(x), q=q8, q_scales=q_scales, mean_logits=mean_logits)


def quantize_keys(
    k: Tensor,
    v: Tensor,
    *,
    key_block: int,
    key_lengths: Tensor | None = None,
    key_mean: Tensor | None = None,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    carried: bool = False,
) -> QuantizedKeys:
    """Round to 8 bits, each block scaled so that its largest number is the format's.

    Softmax does not see a vector that is taken off all keys, so that any mean is exact; one near
    the true mean leaves little to round. All numbers must be finite, except in padding.

    Args:
        k, v: `[B, H, Nk, D]`.
        key_block: Tokens per block; the last one may be short.
        key_lengths: `[B, nK]` int32, real keys at the front of each key block; None: all are.
        key_mean: `[B, H, D]` float32 to take off the keys; None: the mean of each block's first key
            and every eighth after it.
        interleaved: Order the values' keys, 16 by 16, as 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6,
            7, 14, 15: then the weights that a thread has from Hopper's first product are those it
            needs for an 8-bit second. `key_block` must be a multiple of 16.
        dtype: Of queries and keys, `torch.float8_e4m3fn` or `torch.int8`.
        carried: What rounding takes off a value is added to the next key's in the block: neighbours
            weigh about the same, so that errors cancel in the output. Each is larger by itself.

    Source: SageAttention 2, Zhang et al., arXiv 2411.10958 (smoothed keys, per-block scales, whole
        numbers for queries and keys beside 8-bit floats for values);
        FlashAttention-3, Shah et al., arXiv 2407.08608 (values with keys contiguous).
    """
    lengths = None if key_lengths is None else block_lengths(k, key_block, key_lengths)
    rounding = _rounding_for([k, v], key_block)
    if key_mean is None:
        sums = rounding.sum_blocks(k, lengths, key_block).sum(2)
        key_mean = sums / _count_sampled(k.shape[2], key_block, lengths)
    key_mean = key_mean.contiguous()
    k8, v8, k_scales, v_scales = rounding.round_keys(
        k, v, key_block, lengths, key_mean, interleaved, dtype, carried
    )
    return QuantizedKeys(k8, v8, k_scales, v_scales, key_mean, carried)


def quantize_pools(
    tail: Tail, x: QuantizedKeys, *, key_block: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tail's pools as `quantize_keys` rounds keys and values, `key_block` of them to a scale.

    Args:
        tail: Pools of the keys and values of `x`.
        x: Whose mean comes off the pools too, so that they stay in the keys' softmax.
        key_block, interleaved: As of `quantize_keys`.

    Returns:
        Keys `[B, H, n * key_block, D]`, values `[B, H, D, n * key_block]`; scales `[B, H, n]`
        of each.
    """
    # An empty pool is 0 and no key: without the mean it would be the largest of its block.
    mean = x.key_mean[:, :, None].to(tail.keys.dtype)
    keys = torch.where((tail.bias == float("-inf"))[..., None], mean, tail.keys)
    return _rounding_for([keys, tail.values], key_block).round_keys(
        keys, tail.values, key_block, None, x.key_mean, interleaved, x.k.dtype, x.carried
    )


def scale_table(x: QuantizedKeys, pool_scales: Sequence[Tensor] = ()) -> Tensor:
    """What a kernel needs to know of each block to weigh its keys and add up its values.

    Args:
        x: Blocks of keys and values.
        pool_scales: The scales that `quantize_pools` returns, if any; they follow the blocks'.

    Returns:
        `[B, H, n, 2]` float32: the scale of the keys, the logarithm to base 2 of the values'. None
        is below the head's largest by more than 40: in units of values that are too small to be
        seen, sums of others would leave float32.
    """
    merge = _rounding_for([x.k]).merge_scales
    return merge(x.k_scales, x.v_scales, *(pool_scales or (None, None)))


def _rounding_for(tensors: Sequence[Tensor], *blocks: int) -> ModuleType:
    """The Triton kernels where they serve, on GPUs that know e4m3, powers of two from 32 on.

    Else this module, whose functions of the same names specify them.
    """
    like = tensors[0]
    contiguous = all(x.stride(-1) == 1 for x in tensors)
    powers = all(size >= 32 and size & (size - 1) == 0 for size in (like.shape[-1], *blocks))
    old = like.is_cuda and torch.cuda.get_device_capability(like.device) < (8, 9)
    kernels = fast("quantize_kernels", like) if contiguous and powers and not old else None
    return kernels or sys.modules[__name__]


def _count_sampled(tokens: int, key_block: int, lengths: Tensor | None) -> int | Tensor:
    """How many tokens `sum_blocks` adds up, or `[B, 1, 1]` where batch rows differ."""
    if lengths is None:
        whole, rest = divmod(tokens, key_block)
        return whole * -(-key_block // SAMPLE) + -(-rest // SAMPLE)
    return ((lengths + SAMPLE - 1) // SAMPLE).sum(1).clamp(min=1)[:, None, None]


def sum_blocks(k: Tensor, lengths: Tensor | None, key_block: int) -> Tensor:
    """Sums of every eighth real token of each block, `[B, H, nK, D]` float32."""
    return _to_blocks(k, key_block, lengths)[:, :, :, ::SAMPLE].sum(3)


def round_queries(
    q: Tensor, query_block: int, key_mean: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in `dtype`, their scales, and the logits of the keys' mean."""
    queries = _to_blocks(q, query_block)
    mean_logits = (queries @ key_mean[:, :, None, :, None]).flatten(2)
    return *_round_blocks(queries, dtype, LARGEST[dtype]), mean_logits


def round_keys(
    k: Tensor, v: Tensor, key_block: int, lengths: Tensor | None, key_mean: Tensor,
    interleaved: bool, dtype: torch.dtype, carried: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys in `dtype` and values in e4m3, and the scales of each."""
    k = k.float() - key_mean[:, :, None]
    k8, k_scales = _round_blocks(_to_blocks(k, key_block, lengths), dtype, LARGEST[dtype])
    v8, v_scales = _round_blocks(
        _to_blocks(v, key_block, lengths), torch.float8_e4m3fn, LARGEST_VALUE, carried
    )
    if carried:
        # Or padding would get what the last value left.
        real = _to_blocks(torch.ones_like(v[..., :1]), key_block, lengths).flatten(2, 3) > 0
        v8 = torch.where(real, v8.float(), 0.0).to(v8.dtype)
    if interleaved:
        # Keys 8 i + 2 j + k of 16 become 4 j + 2 i + k.
        v8 = v8.unflatten(2, (-1, 2, 4, 2)).transpose(3, 4).flatten(2, 5)
    return k8, v8.transpose(2, 3).contiguous(), k_scales, v_scales


def merge_scales(
    k_scales: Tensor, v_scales: Tensor, pool_k_scales: Tensor | None, pool_v_scales: Tensor | None
) -> Tensor:
    """`scale_table` of blocks' scales and, behind them, of pools'."""
    if pool_k_scales is not None:
        k_scales = torch.cat([k_scales, pool_k_scales], -1)
        v_scales = torch.cat([v_scales, pool_v_scales], -1)
    v_logs = v_scales.log2()
    return torch.stack([k_scales, v_logs.maximum(v_logs.amax(-1, keepdim=True) - FAINT)], -1)


def _to_blocks(x: Tensor, size: int, lengths: Tensor | None = None) -> Tensor:
    """`[B, H, blocks, size, D]` float32, 0 where there is no real token."""
    blocks = F.pad(x.float(), (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    if lengths is None:
        return blocks
    real = torch.arange(size, device=x.device) < lengths[..., None]
    return blocks.masked_fill(~real[:, None, :, :, None], 0)


def _round_blocks(
    blocks: Tensor, dtype: torch.dtype, largest: float, carried: bool = False
) -> tuple[Tensor, Tensor]:
    """Blocks `[B, H, blocks, size, D]` side by side in `dtype`, and their scales."""
    peaks = blocks.abs().amax((3, 4), keepdim=True).clamp(min=SMALLEST)
    scaled = blocks * (peaks.reciprocal() * largest)
    if carried:
        rest = 0.0
        for token in scaled.unbind(3):
            wanted = (token + rest).clamp(-largest, largest)
            rest = wanted - token.copy_(wanted.to(dtype))
    if dtype == torch.int8:
        scaled = scaled.round()
    # Saturates: the product may come out one rounding beyond the largest number.
    rounded = scaled.clamp(-largest, largest).to(dtype)
    return rounded.flatten(2, 3), peaks[..., 0, 0] / largest
