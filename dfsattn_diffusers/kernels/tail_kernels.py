"""Triton kernels of the tail: pooling keys and values, and the pass that adds the pools.

The specification is the torch code in `tail.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fast import arch_of


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the adding kernel.

    Attributes:
        pools: Pools of one loop step.
        num_warps: Of one program with 128 queries.
        num_stages: Depth of the pipeline over pools.
    """

    pools: int
    num_warps: int
    num_stages: int


# By compute capability, for means; 80 and 86 are not measured. On an H200, 24 x 119,040 x 128, at
# density 0.1, 13.0 ms with pools of 32 and 7.6 with 64; 64 pools and 8 warps took 14.2 and 7.9.
SETTINGS = {
    80: LaunchSettings(32, 8, 2),
    86: LaunchSettings(32, 8, 2),
    90: LaunchSettings(32, 4, 3),
}
SETTINGS |= {89: SETTINGS[86], 100: SETTINGS[80], 120: SETTINGS[86]}
# For moments.
MOMENT_SETTINGS = SETTINGS | {90: LaunchSettings(64, 8, 3)}


@triton.jit(do_not_specialize=["H", "P", "stride_lengths"])
def pool_kernel(
    k,
    v,
    lengths,
    keys,
    values,
    variance,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_lengths,
    H,
    P,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    MOMENT: tl.constexpr,
):
    """One pool of one head."""
    i_p, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_length = tl.load(lengths + i_b * stride_lengths + i_p)
    # [SIZE]
    o_n = tl.arange(0, SIZE)
    m_n = o_n < i_length
    o_row = i_p.to(tl.int64) * SIZE + o_n
    o_d = tl.arange(0, D)
    f_count = tl.maximum(i_length, 1).to(tl.float32)
    p_k = k + i_b * stride_kb + i_h * stride_kh + o_row[:, None] * stride_kn + o_d[None, :]
    p_v = v + i_b * stride_vb + i_h * stride_vh + o_row[:, None] * stride_vn + o_d[None, :]
    # [SIZE, D]; padding may be NaN: it is not read
    b_k = tl.load(p_k, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_v = tl.load(p_v, mask=m_n[:, None], other=0.0).to(tl.float32)
    # [D]
    b_mean = tl.sum(b_k, 0) / f_count
    o_out = (i_bh.to(tl.int64) * P + i_p) * D + o_d
    tl.store(keys + o_out, b_mean.to(keys.dtype.element_ty))
    tl.store(values + o_out, (tl.sum(b_v, 0) / f_count).to(values.dtype.element_ty))
    if MOMENT:
        b_k = tl.where(m_n[:, None], b_k - b_mean[None, :], 0.0)
        b_variance = tl.sum(b_k * b_k, 0) / f_count
        if variance.dtype.element_ty == tl.float16:
            b_variance = tl.minimum(b_variance, 65504.0)
        tl.store(variance + o_out, b_variance.to(variance.dtype.element_ty))


@triton.jit
def _kept(p_bits, i_block, N_BYTES, BLOCKS: tl.constexpr):
    """Bits of `BLOCKS` blocks from `i_block` on, a power of two of them, in one number."""
    WORD: tl.constexpr = tl.int64 if BLOCKS > 32 else tl.int32
    i_byte = i_block // 8
    i_bits = tl.load(p_bits + i_byte).to(WORD) >> (i_block % 8)
    for B in tl.static_range(1, BLOCKS // 8):
        i_next = tl.load(p_bits + i_byte + B, mask=i_byte + B < N_BYTES, other=0)
        i_bits |= i_next.to(WORD) << (8 * B)
    return i_bits


@triton.jit
def _weigh(i_bits, b_count, POOLS: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Logarithm of the tokens that each pool of a step stands for, -inf in kept blocks."""
    m_kept = ((i_bits >> (tl.arange(0, POOLS) // PER_BLOCK)) & 1) > 0
    return tl.where(m_kept, float("-inf"), b_count)


@triton.jit
def _join(b_q, b_square, b_k, b_v, b_variance, b_weight, b_out, b_max, b_sum, scale_log2, scale,
          MOMENT: tl.constexpr):  # fmt: skip
    """One step of the online softmax, in base 2."""
    # [QUERIES, POOLS]
    b_s = tl.dot(b_q, tl.trans(b_k)) * scale_log2 + b_weight[None, :]
    if MOMENT:
        b_spread = tl.sqrt(tl.dot(b_square, tl.trans(b_variance)) * scale) * 1.4426950408889634
        # The upper of a pool's two halves; the other's weight joins below.
        b_s += b_spread - 1.0
    # [QUERIES]
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_decay = tl.exp2(b_max - b_shift)
    # [QUERIES, POOLS]
    b_s -= b_shift[:, None]
    b_p = tl.exp2(b_s)
    if MOMENT:
        b_p += tl.exp2(b_s - 2.0 * b_spread)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None])
    return b_out, b_new, b_sum


@triton.jit(
    do_not_specialize=["H", "N_Q", "P", "N_BLOCKS", "N_BYTES", "full_pools", "order_stride"]
)
def add_kernel(
    q,
    keys,
    values,
    variance,
    log_counts,
    out,
    lse,
    counts,
    bits,
    output_order,
    order_stride,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_ob,
    stride_oh,
    stride_on,
    H,
    N_Q,
    P,
    N_BLOCKS,
    N_BYTES,
    full_pools,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    POOLS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    MOMENT: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """One query block of one head: its softmax goes on over the pools of what it does not keep."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    i_q, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_q
    if tl.load(counts + i_row) == N_BLOCKS:
        return
    # [QUERIES]
    o_q = i_q * QUERIES + tl.arange(0, QUERIES)
    m_q = o_q < N_Q
    o_out = o_q
    if ORDERED:
        p_order = output_order + i_bh.to(tl.int64) * order_stride
        o_out = tl.load(p_order + o_q, mask=m_q, other=-1)
    m_out = m_q & (o_out >= 0)
    o_d = tl.arange(0, D)
    p_q = q + i_b * stride_qb + i_h * stride_qh + o_q.to(tl.int64)[:, None] * stride_qn
    p_out = out + i_b * stride_ob + i_h * stride_oh + o_out.to(tl.int64)[:, None] * stride_on
    p_lse = lse + i_bh.to(tl.int64) * N_Q + o_q
    # [QUERIES, D]
    b_q = tl.load(p_q + o_d[None, :], mask=m_q[:, None], other=0.0)
    b_out = tl.load(p_out + o_d[None, :], mask=m_out[:, None], other=0.0).to(tl.float32)
    b_square = b_q
    if MOMENT:
        # Times the scale: squares of float16 stay within its range.
        b_square = b_q.to(tl.float32)
        b_square = (b_square * b_square * scale).to(b_q.dtype)
    # [QUERIES], in base 2
    b_max = tl.load(p_lse, mask=m_q, other=float("-inf")) * LOG2_E
    b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)

    p_pools = i_bh.to(tl.int64) * P * D + o_d[None, :]
    p_bits, scale_log2 = bits + i_row * N_BYTES, scale * LOG2_E
    BLOCKS: tl.constexpr = POOLS // PER_BLOCK
    # [POOLS]
    o_step = tl.arange(0, POOLS)
    i_whole = full_pools // POOLS * POOLS
    # One step ahead: loads of bits are not pipelined.
    i_next = _kept(p_bits, 0, N_BYTES, BLOCKS)
    for i_p in range(0, i_whole, POOLS):
        b_weight = _weigh(i_next, tl.log2(1.0 * SIZE), POOLS, PER_BLOCK)
        i_last = tl.minimum(i_p + POOLS, P - 1) // PER_BLOCK
        i_next = _kept(p_bits, i_last, N_BYTES, BLOCKS)
        # [POOLS, D]
        o_pool = p_pools + (i_p + o_step).to(tl.int64)[:, None] * D
        b_k, b_v = tl.load(keys + o_pool), tl.load(values + o_pool)
        b_variance = tl.load(variance + o_pool) if MOMENT else b_k
        b_out, b_max, b_sum = _join(
            b_q, b_square, b_k, b_v, b_variance, b_weight, b_out, b_max, b_sum, scale_log2, scale,
            MOMENT,
        )  # fmt: skip

    # Pools of other lengths, and those behind the end.
    for i_p in tl.range(i_whole, P, POOLS, num_stages=1):
        m_p = i_p + o_step < P
        b_count = tl.load(log_counts + i_b * P + i_p + o_step, mask=m_p, other=float("-inf"))
        i_bits = _kept(p_bits, i_p // PER_BLOCK, N_BYTES, BLOCKS)
        b_weight = _weigh(i_bits, b_count * LOG2_E, POOLS, PER_BLOCK)
        # [POOLS, D]
        o_pool = p_pools + (i_p + o_step).to(tl.int64)[:, None] * D
        b_k = tl.load(keys + o_pool, mask=m_p[:, None], other=0.0)
        b_v = tl.load(values + o_pool, mask=m_p[:, None], other=0.0)
        b_variance = tl.load(variance + o_pool, mask=m_p[:, None], other=0.0) if MOMENT else b_k
        b_out, b_max, b_sum = _join(
            b_q, b_square, b_k, b_v, b_variance, b_weight, b_out, b_max, b_sum, scale_log2, scale,
            MOMENT,
        )  # fmt: skip

    b_lse = (b_max + tl.log2(b_sum)) / LOG2_E
    tl.store(p_lse, b_lse, mask=m_q)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    tl.store(p_out + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_out[:, None])


_INTERPRETED = not isinstance(add_kernel, triton.JITFunction)
# The interpreter multiplies bfloat16 matrices wrongly.
_DTYPES = (torch.float16, torch.float32) if _INTERPRETED else (torch.bfloat16, torch.float16)


def settings_for(x: Tensor, moment: bool) -> LaunchSettings:
    """The table's entry for x's device."""
    table = MOMENT_SETTINGS if moment else SETTINGS
    return table[max(known for known in table if known <= arch_of(x))]


def pools_per_step(
    settings: LaunchSettings, head_dim: int, moment: bool, per_block: int
) -> int:
    """Pools of one loop step, at least those of one key block and at most those of 64."""
    # Squares of queries and a third product take the registers of half the pools.
    pools = settings.pools // 2 if moment and head_dim == 128 else settings.pools
    return min(max(pools, per_block), 64 * per_block)


def can_pool(k: Tensor, v: Tensor, pool: int) -> bool:
    """Whether `pool` serves these: powers of two, rows contiguous."""
    sizes = (pool, k.shape[-1])
    powers = all(size & (size - 1) == 0 for size in sizes) and pool <= 128 and k.shape[-1] <= 256
    return powers and k.dtype != torch.float64 and k.stride(-1) == v.stride(-1) == 1


def pool(
    k: Tensor, v: Tensor, size: int, lengths: Tensor, moment: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means of keys and of values, and the variance of keys or None, read once.

    Args:
        k, v: `[B, H, P * size, D]`, last dimension contiguous.
        size: Keys of one pool.
        lengths: `[B or 1, P]` int32, real keys at the front of each pool.
        moment: Whether to compute the variance.

    Returns:
        Each `[B, H, P, D]` in the inputs' dtype; 0 for a pool without keys.
    """
    batch, heads, _, head_dim = k.shape
    pools, lengths = lengths.shape[1], lengths.contiguous()
    keys = k.new_empty(batch, heads, pools, head_dim)
    values = torch.empty_like(keys)
    variance = torch.empty_like(keys) if moment else None
    with torch.cuda.device_of(k):
        pool_kernel[pools, batch * heads](
            k,
            v,
            lengths,
            keys,
            values,
            variance,
            *k.stride()[:3],
            *v.stride()[:3],
            pools if lengths.shape[0] > 1 else 0,
            heads,
            pools,
            SIZE=size,
            D=head_dim,
            MOMENT=moment,
            num_warps=min(8, max(1, size * head_dim // 1024)),
            enable_fp_fusion=True,
        )
    return keys, values, variance


def can_add(call) -> bool:
    """Whether `add` serves this call: its precision, head dim and query block."""
    return (
        call.q.dtype in _DTYPES
        and call.q.shape[-1] in (64, 128)
        and call.block_map.query_block in (64, 128)
    )


def add(call) -> None:
    """Let the tail's pools join the call's softmax; `tail.add_tail` says how. Waits for nothing."""
    block_map, tail, size = call.block_map, call.tail, call.block_map.query_block
    batch, heads, num_queries, head_dim = call.q.shape
    pools, num_rows = tail.keys.shape[2], block_map.counts.shape[2]
    moment = tail.variance is not None
    settings = settings_for(call.q, moment)
    order, order_stride = call.order_and_stride()
    per_block = pools // block_map.num_key_blocks
    with torch.cuda.device_of(call.q):
        add_kernel[num_rows, batch * heads](
            call.q,
            tail.keys.contiguous(),
            tail.values.contiguous(),
            None if tail.variance is None else tail.variance.contiguous(),
            tail.log_counts.contiguous(),
            call.out,
            call.lse,
            block_map.counts.contiguous(),
            block_map.bits,
            order,
            order_stride,
            call.scale,
            *call.q.stride()[:3],
            *call.out.stride()[:3],
            heads,
            num_queries,
            pools,
            block_map.num_key_blocks,
            block_map.bits.shape[-1],
            call.full_key_blocks * per_block,
            D=head_dim,
            QUERIES=size,
            POOLS=pools_per_step(settings, head_dim, moment, per_block),
            PER_BLOCK=per_block,
            SIZE=block_map.key_block // per_block,
            MOMENT=moment,
            ORDERED=order is not None,
            num_warps=max(4, settings.num_warps * size // 128),
            num_stages=settings.num_stages,
            enable_fp_fusion=True,
        )
