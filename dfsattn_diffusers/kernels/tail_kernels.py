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


# By compute capability; 80 and 86 are not measured. On an H200, 24 x 119,040 x 128, at density
# 0.1, 13.0 ms with pools of 32 and 7.6 with 64; 64 pools and 8 warps took 14.2 and 7.9.
SETTINGS = {
    80: LaunchSettings(32, 8, 2),
    86: LaunchSettings(32, 8, 2),
    90: LaunchSettings(32, 4, 3),
}
SETTINGS |= {89: SETTINGS[86], 100: SETTINGS[80], 120: SETTINGS[86]}

# Of the pooling kernel: warps, and tokens of each pool that are loaded at a time. So an H200 reads
# keys and values at 4.1 TB/s; with 8 or 16 tokens at 3.4 or 3.0.
_WARPS, _ROWS = 4, 4


@triton.jit
def _load_tokens(x, o_row, stride_n, m_real, D: tl.constexpr):
    """A token of each pool, `[POOLS, D]` float32; 0 where it is none, since padding may be NaN."""
    p_x = x + o_row[:, None] * stride_n + tl.arange(0, D)[None, :]
    return tl.load(p_x, mask=m_real[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "P", "stride_lengths"])
def pool_kernel(
    k,
    v,
    lengths,
    energy,
    keys,
    values,
    bias,
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
    POOLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some pools of one head: their tail or, without values, their moments."""
    i_bh = tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    # [POOLS]
    o_p = tl.program_id(0) * POOLS + tl.arange(0, POOLS)
    m_p = o_p < P
    i_length = tl.load(lengths + i_b * stride_lengths + o_p, mask=m_p, other=0)
    f_count = tl.maximum(i_length, 1).to(tl.float32)
    o_row = o_p.to(tl.int64) * SIZE
    p_k, p_v = k + i_b * stride_kb + i_h * stride_kh, v
    if v is not None:
        p_v += i_b * stride_vb + i_h * stride_vh
    # [POOLS, D]; a thread adds up tokens of its own, nothing moves between threads
    b_near = tl.zeros([POOLS, D], tl.float32)
    for j in tl.static_range(ROWS):
        b_near += _load_tokens(p_k, o_row + j, stride_kn, j < i_length, D)
    b_near /= tl.minimum(f_count, ROWS)[:, None]
    b_zero = tl.zeros([POOLS, D], tl.float32)
    b_k, b_square, b_v = b_zero, b_zero, b_zero
    for i in range(0, SIZE, ROWS):
        # Sums of sums: one after the other would round as often as there are tokens.
        b_part, b_part_square = b_zero, b_zero
        for j in tl.static_range(ROWS):
            m_real = i + j < i_length
            b_token = _load_tokens(p_k, o_row + i + j, stride_kn, m_real, D)
            # Near the mean, so that squares lose few digits to its own.
            b_token = tl.where(m_real[:, None], b_token - b_near, 0.0)
            b_part += b_token
            b_part_square += b_token * b_token
            if v is not None:
                b_v += _load_tokens(p_v, o_row + i + j, stride_vn, m_real, D)
        b_k += b_part
        b_square += b_part_square
    b_k /= f_count[:, None]
    b_variance = tl.maximum(b_square / f_count[:, None] - b_k * b_k, 0.0)
    b_k += b_near
    o_pool, o_d = i_bh.to(tl.int64) * P + o_p, tl.arange(0, D)
    o_out, m_out = o_pool[:, None] * D + o_d[None, :], m_p[:, None]
    tl.store(keys + o_out, b_k.to(keys.dtype.element_ty), mask=m_out)
    if v is None:
        tl.store(variance + o_out, b_variance, mask=m_out)
    else:
        b_v = (b_v / f_count[:, None]).to(values.dtype.element_ty)
        tl.store(values + o_out, b_v, mask=m_out)
        # [POOLS]
        b_bias = tl.log(i_length.to(tl.float32))
        if energy is not None:
            b_energy = tl.load(energy + i_bh.to(tl.int64) * D + o_d)
            b_spread = tl.sqrt(tl.sum(b_energy[None, :] * b_variance, 1))
            b_bias += b_spread + tl.log(0.5 + 0.5 * tl.exp(-2.0 * b_spread))
        tl.store(bias + o_pool, b_bias, mask=m_p)


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
def _hide(b_bias, i_bits, POOLS: tl.constexpr, PER_BLOCK: tl.constexpr):
    """-inf for the pools of kept blocks."""
    m_kept = ((i_bits >> (tl.arange(0, POOLS) // PER_BLOCK)) & 1) > 0
    return tl.where(m_kept, float("-inf"), b_bias)


@triton.jit(
    do_not_specialize=["H", "N_Q", "P", "N_BLOCKS", "N_BYTES", "order_stride"]
)
def add_kernel(
    q,
    keys,
    values,
    bias,
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
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    POOLS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
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
    # [QUERIES], in base 2
    b_max = tl.load(p_lse, mask=m_q, other=float("-inf")) * LOG2_E
    b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)

    p_pools, p_bias = i_bh.to(tl.int64) * P * D + o_d[None, :], bias + i_bh.to(tl.int64) * P
    p_bits, scale_log2 = bits + i_row * N_BYTES, scale * LOG2_E
    BLOCKS: tl.constexpr = POOLS // PER_BLOCK
    # [POOLS]
    o_step = tl.arange(0, POOLS)
    # One step ahead: loads of single words are not pipelined.
    i_bits = _kept(p_bits, 0, N_BYTES, BLOCKS)
    b_bias = tl.load(p_bias + o_step, mask=o_step < P, other=float("-inf"))
    for i_p in range(0, P, POOLS):
        b_now = _hide(b_bias * LOG2_E, i_bits, POOLS, PER_BLOCK)
        o_next = i_p + POOLS + o_step
        b_bias = tl.load(p_bias + o_next, mask=o_next < P, other=float("-inf"))
        i_bits = _kept(p_bits, tl.minimum(i_p + POOLS, P - 1) // PER_BLOCK, N_BYTES, BLOCKS)
        # [POOLS, D]; behind the last pool it once more, which the bias hides
        o_pool = p_pools + tl.minimum(i_p + o_step, P - 1).to(tl.int64)[:, None] * D
        b_k, b_v = tl.load(keys + o_pool), tl.load(values + o_pool)
        # [QUERIES, POOLS]
        b_s = tl.dot(b_q, tl.trans(b_k)) * scale_log2 + b_now[None, :]
        # [QUERIES]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay = tl.exp2(b_max - b_shift)
        # [QUERIES, POOLS]
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None])
        b_max = b_new

    b_lse = (b_max + tl.log2(b_sum)) / LOG2_E
    tl.store(p_lse, b_lse, mask=m_q)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    tl.store(p_out + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_out[:, None])


_INTERPRETED = not isinstance(add_kernel, triton.JITFunction)
# The interpreter multiplies bfloat16 matrices wrongly.
_DTYPES = (torch.float16, torch.float32) if _INTERPRETED else (torch.bfloat16, torch.float16)


def settings_for(x: Tensor) -> LaunchSettings:
    """The table's entry for x's device."""
    return SETTINGS[max(known for known in SETTINGS if known <= arch_of(x))]


def pools_per_step(settings: LaunchSettings, per_block: int) -> int:
    """Pools of one loop step, at least those of one key block and at most those of 64."""
    return min(max(settings.pools, per_block), 64 * per_block)


def pools_at_once(head_dim: int) -> int:
    """Pools of one program of the pooling kernel: a thread has 16 bytes of a token."""
    return max(1, 8 * 32 * _WARPS // head_dim)


def can_pool(k: Tensor, v: Tensor, pool: int) -> bool:
    """Whether `pool` serves these: powers of two, rows contiguous."""
    sizes = (pool, k.shape[-1])
    powers = all(size & (size - 1) == 0 for size in sizes) and pool <= 128 and k.shape[-1] <= 256
    return powers and k.dtype != torch.float64 and k.stride(-1) == v.stride(-1) == 1


def pool(
    k: Tensor, v: Tensor, size: int, lengths: Tensor, energy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bias of a tail, as `tail.pool_tail` says."""
    batch, heads, pools = *k.shape[:2], lengths.shape[1]
    keys = k.new_empty(batch, heads, pools, k.shape[-1])
    values = torch.empty_like(keys)
    bias = k.new_empty(batch, heads, pools, dtype=torch.float32)
    energy = None if energy is None else energy.contiguous()
    _pool(k, v, size, lengths, energy, keys, values, bias, None)
    return keys, values, bias


def moments(x: Tensor, size: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, as `tail.pool_moments` says."""
    mean = x.new_empty(*x.shape[:2], lengths.shape[1], x.shape[-1], dtype=torch.float32)
    variance = torch.empty_like(mean)
    _pool(x, None, size, lengths, None, mean, None, None, variance)
    return mean, variance


def _pool(k, v, size, lengths, energy, keys, values, bias, variance):
    batch, heads, _, head_dim = k.shape
    pools, lengths = lengths.shape[1], lengths.contiguous()
    at_once = pools_at_once(head_dim)
    with torch.cuda.device_of(k):
        pool_kernel[triton.cdiv(pools, at_once), batch * heads](
            k,
            v,
            lengths,
            energy,
            keys,
            values,
            bias,
            variance,
            *k.stride()[:3],
            *(k if v is None else v).stride()[:3],
            pools if lengths.shape[0] > 1 else 0,
            heads,
            pools,
            SIZE=size,
            D=head_dim,
            POOLS=at_once,
            ROWS=min(_ROWS, size),
            num_warps=_WARPS,
            # Or builds that leave something out would round the rest otherwise.
            enable_fp_fusion=False,
        )


def can_add(call) -> bool:
    """Whether `add` serves this call: its precision, head dim, query block and pools of a block."""
    per_block = call.tail.keys.shape[2] // call.block_map.num_key_blocks
    return (
        per_block & (per_block - 1) == 0
        and call.q.dtype in _DTYPES
        and call.q.shape[-1] in (64, 128)
        and call.block_map.query_block in (64, 128)
    )


def add(call) -> None:
    """Let the tail's pools join the call's softmax; `tail.add_tail` says how. Waits for nothing."""
    block_map, tail, size = call.block_map, call.tail, call.block_map.query_block
    batch, heads, num_queries, head_dim = call.q.shape
    pools, num_rows = tail.keys.shape[2], block_map.counts.shape[2]
    settings = settings_for(call.q)
    order, order_stride = call.order_and_stride()
    per_block = pools // block_map.num_key_blocks
    with torch.cuda.device_of(call.q):
        add_kernel[num_rows, batch * heads](
            call.q,
            tail.keys.contiguous(),
            tail.values.contiguous(),
            tail.bias.contiguous(),
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
            D=head_dim,
            QUERIES=size,
            POOLS=pools_per_step(settings, per_block),
            PER_BLOCK=per_block,
            ORDERED=order is not None,
            num_warps=max(4, settings.num_warps * size // 128),
            num_stages=settings.num_stages,
            enable_fp_fusion=True,
        )
