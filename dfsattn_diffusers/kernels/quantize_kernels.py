"""Triton kernels of `quantize`: every tensor is read once, some keys once more for their mean."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import FAINT, LARGEST, LARGEST_VALUE, SAMPLE, SMALLEST

_SMALLEST, _SAMPLE, _VALUE = map(tl.constexpr, (SMALLEST, SAMPLE, LARGEST_VALUE))
_FAINT = tl.constexpr(FAINT)
_E4M3, _INT8 = (tl.constexpr(LARGEST[kind]) for kind in (torch.float8_e4m3fn, torch.int8))
# The interpreter loses the carry of a rounding: there numbers are rounded before the cast.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_e4m3(b_x):
    """Nearest numbers of e4m3, ties to even; `|x|` up to 448."""
    if _INTERPRETED:
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & -0x100000
        # Below 2 ** -6 numbers are multiples of 2 ** -9.
        b_small = (b_x + 24576.0) - 24576.0
        b_x = tl.where(tl.abs(b_x) < 0.015625, b_small, b_bits.to(tl.float32, bitcast=True))
    return b_x.to(tl.float8e4nv)


@triton.jit
def _to_int8(b_x):
    """Nearest whole numbers, ties to even; `|x|` up to 127."""
    return ((b_x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _load_block(x, o_n, i_b, i_h, i_block, i_length, stride_b, stride_h, stride_n,
                D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `o_n` of one block, 0 for those that are not real, `[BLOCK, D]` float32."""
    p_x = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    p_x = p_x + (i_block * BLOCK + o_n).to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]
    # Padding may be NaN: it is not read.
    return tl.load(p_x, mask=(o_n < i_length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _length(lengths, i_b, i_block, N, BLOCK: tl.constexpr):
    """Real tokens of a block: of `lengths`, or None where every block but the last is full."""
    i_length = tl.minimum(N - i_block * BLOCK, BLOCK)
    if lengths is not None:
        i_length = tl.load(lengths + i_b * tl.num_programs(0) + i_block)
    return i_length


@triton.jit
def _scales(b_x, LARGEST: tl.constexpr):
    """What a block's numbers are multiplied by, and what their codes are."""
    b_peak = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0), _SMALLEST)
    return tl.div_rn(1.0, b_peak) * LARGEST, tl.div_rn(b_peak, LARGEST)


@triton.jit(do_not_specialize=["H", "N"])
def sum_kernel(x, lengths, out, stride_b, stride_h, stride_n, H, N,
               D: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of every eighth real token of one block."""
    i_block, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    i_length = _length(lengths, i_b, i_block, N, BLOCK)
    o_n = tl.arange(0, BLOCK // _SAMPLE) * _SAMPLE
    # [BLOCK // _SAMPLE, D]
    b_x = _load_block(
        x, o_n, i_b, i_h, i_block, i_length, stride_b, stride_h, stride_n, D, BLOCK
    )
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_block
    tl.store(out + i_row * D + tl.arange(0, D), tl.sum(b_x, 0))


@triton.jit(do_not_specialize=["H", "N"])
def quantize_kernel(
    x, lengths, mean, out, scales, mean_logits, stride_b, stride_h, stride_n, H, N,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, WITH_LOGITS: tl.constexpr,
    TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """One block of one head."""
    i_block, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    i_length = _length(lengths, i_b, i_block, N, BLOCK)
    o_n, o_d = tl.arange(0, BLOCK), tl.arange(0, D)
    o_from = o_n
    if INTERLEAVED:
        o_from = o_n // 16 * 16 + o_n // 2 % 2 * 8 + o_n // 4 % 4 * 2 + o_n % 2
    # [BLOCK, D]
    b_x = _load_block(
        x, o_from, i_b, i_h, i_block, i_length, stride_b, stride_h, stride_n, D, BLOCK
    )
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_block
    if CENTRED or WITH_LOGITS:
        # [D]
        b_mean = tl.load(mean + i_bh * D + o_d)
    if WITH_LOGITS:
        tl.store(mean_logits + i_row * BLOCK + o_n, tl.sum(b_x * b_mean[None, :], 1))
    if CENTRED:
        b_x = tl.where((o_n < i_length)[:, None], b_x - b_mean[None, :], 0.0)
    WHOLE: tl.constexpr = out.dtype.element_ty == tl.int8
    NARROW: tl.constexpr = _INT8 if WHOLE else _E4M3
    LARGEST: tl.constexpr = _VALUE if TRANSPOSED else NARROW
    b_factor, b_scale = _scales(b_x, LARGEST)
    tl.store(scales + i_row, b_scale)
    # Saturates: the product may come out one rounding beyond the largest number.
    b_x = tl.minimum(tl.maximum(b_x * b_factor, -LARGEST), LARGEST)
    if TRANSPOSED:
        i_slots = tl.num_programs(0) * BLOCK
        p_out = out + (i_bh.to(tl.int64) * D + o_d)[:, None] * i_slots
        p_out = p_out + (i_block * BLOCK + o_n)[None, :]
        # [D, BLOCK]
        tl.store(p_out, to_e4m3(tl.trans(b_x)))
    else:
        p_out = out + (i_row * BLOCK + o_n)[:, None] * D + o_d[None, :]
        if WHOLE:
            tl.store(p_out, _to_int8(b_x))
        else:
            tl.store(p_out, to_e4m3(b_x))


@triton.jit
def _put_code(b_0, b_1, b_2, b_3, b_code, T: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Into four registers of four codes each the one of key T of 16."""
    # Keys 8 i + 2 j + k become 4 j + 2 i + k.
    WORD: tl.constexpr = T % 8 // 2 if INTERLEAVED else T // 4
    BYTE: tl.constexpr = T // 8 * 2 + T % 2 if INTERLEAVED else T % 4
    b_code = b_code << (8 * BYTE)
    if WORD == 0:
        b_0 |= b_code
    elif WORD == 1:
        b_1 |= b_code
    elif WORD == 2:
        b_2 |= b_code
    else:
        b_3 |= b_code
    return b_0, b_1, b_2, b_3


@triton.jit(do_not_specialize=["H", "N"])
def carry_kernel(
    x, lengths, out, scales, stride_b, stride_h, stride_n, H, N,
    D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """One block of one head's values in turn, four codes to an int32, transposed."""
    i_block, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    i_length = _length(lengths, i_b, i_block, N, BLOCK)
    o_d = tl.arange(0, D)
    # [16, D]; a whole block would leave registers for few programs at a time
    b_top = tl.zeros([16, D], tl.float32)
    for i in range(0, BLOCK, 16):
        o_n = i + tl.arange(0, 16)
        b_x = _load_block(
            x, o_n, i_b, i_h, i_block, i_length, stride_b, stride_h, stride_n, D, BLOCK
        )
        b_top = tl.maximum(b_top, tl.abs(b_x))
    b_factor, b_scale = _scales(b_top, _VALUE)
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_block
    tl.store(scales + i_row, b_scale)
    p_x = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + o_d
    p_x += (i_block * BLOCK).to(tl.int64) * stride_n
    i_words = tl.num_programs(0) * (BLOCK // 4)
    p_out = out + (i_bh.to(tl.int64) * D + o_d)[:, None] * i_words + i_block * (BLOCK // 4)
    # [D]
    b_rest = tl.zeros([D], tl.float32)
    # Thirty-two at a time: a half sector takes as long to write as a whole one.
    for i in range(0, BLOCK, 32):
        i_left = i_length - i
        if i_left >= 32:
            b_low, b_rest = _carry(p_x, stride_n, b_factor, b_rest, None, 0, D, INTERLEAVED)
            b_high, b_rest = _carry(p_x, stride_n, b_factor, b_rest, None, 16, D, INTERLEAVED)
        else:
            b_low, b_rest = _carry(p_x, stride_n, b_factor, b_rest, i_left, 0, D, INTERLEAVED)
            b_high, b_rest = _carry(p_x, stride_n, b_factor, b_rest, i_left, 16, D, INTERLEAVED)
        p_x += 32 * tl.cast(stride_n, tl.int64)
        # [D, 8]
        b_words = tl.reshape(tl.permute(tl.join(b_low, b_high), (0, 2, 1)), (D, 8))
        tl.store(p_out + i // 4 + tl.arange(0, 8)[None, :], b_words)


@triton.jit
def _carry(p_x, stride_n, b_factor, b_rest, i_left, FIRST: tl.constexpr, D: tl.constexpr,
           INTERLEAVED: tl.constexpr):
    """Codes of sixteen values of each column, `[D, 4]` int32, and what is left to carry.

    `i_left`: how many are real, from `p_x` on; None: all.
    """
    b_none = tl.zeros([D], tl.int32)
    b_0, b_1, b_2, b_3 = b_none, b_none, b_none, b_none
    for T in tl.static_range(16):
        p_token = p_x + (FIRST + T) * stride_n
        if i_left is None:
            b_token = tl.load(p_token)
        else:
            m_real = b_none + (FIRST + T) < i_left
            b_token = tl.load(p_token, mask=m_real, other=0.0)
        b_wanted = b_token.to(tl.float32) * b_factor + b_rest
        b_wanted = tl.minimum(tl.maximum(b_wanted, -_VALUE), _VALUE)
        b_code = to_e4m3(b_wanted)
        b_rest = b_wanted - b_code.to(tl.float32)
        b_code = b_code.to(tl.uint8, bitcast=True).to(tl.int32)
        if i_left is not None:
            b_code = tl.where(m_real, b_code, 0)
        b_0, b_1, b_2, b_3 = _put_code(b_0, b_1, b_2, b_3, b_code, T, INTERLEAVED)
    return tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (D, 4)), b_rest


@triton.jit(do_not_specialize=["N", "N_POOLS"])
def merge_kernel(k_scales, v_scales, pool_k_scales, pool_v_scales, out, N, N_POOLS,
                 SIZE: tl.constexpr):
    """One head's scales; `SIZE` at least as many as there are."""
    i_bh = tl.program_id(0)
    o_n = tl.arange(0, SIZE)
    m_n, i_end = o_n < N, N
    b_k = tl.load(k_scales + i_bh * N + o_n, mask=m_n, other=0.0)
    b_v = tl.load(v_scales + i_bh * N + o_n, mask=m_n, other=0.0)
    if pool_k_scales is not None:
        i_end = N + N_POOLS
        m_pool, o_pool = (o_n >= N) & (o_n < i_end), i_bh * N_POOLS + o_n - N
        b_k = tl.load(pool_k_scales + o_pool, mask=m_pool, other=b_k)
        b_v = tl.load(pool_v_scales + o_pool, mask=m_pool, other=b_v)
    # -inf behind the end
    b_log = tl.log2(b_v)
    b_log = tl.maximum(b_log, tl.max(b_log, 0) - _FAINT)
    p_out = out + (i_bh * i_end + o_n) * 2
    tl.store(p_out, b_k, mask=o_n < i_end)
    tl.store(p_out + 1, b_log, mask=o_n < i_end)


def sum_blocks(k: Tensor, lengths: Tensor | None, key_block: int) -> Tensor:
    """Sums of every eighth real token of each block, `[B, H, nK, D]` float32."""
    batch, heads, tokens, head_dim = k.shape
    blocks = triton.cdiv(tokens, key_block)
    out = k.new_empty(batch, heads, blocks, head_dim, dtype=torch.float32)
    with torch.cuda.device_of(k):
        sum_kernel[blocks, batch * heads](
            k, lengths, out, *k.stride()[:3], heads, tokens, D=head_dim, BLOCK=key_block,
            num_warps=2,
        )
    return out


def round_queries(
    q: Tensor, query_block: int, key_mean: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in `dtype`, their scales, and the logits of the keys' mean."""
    return _launch(q, query_block, None, key_mean, dtype, centred=False)


def round_keys(
    k: Tensor, v: Tensor, key_block: int, lengths: Tensor | None, key_mean: Tensor,
    interleaved: bool, dtype: torch.dtype, carried: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys in `dtype` and values in e4m3, and the scales of each."""
    k8, k_scales, _ = _launch(k, key_block, lengths, key_mean, dtype, centred=True)
    if carried:
        v8, v_scales = _round_in_turn(v, key_block, lengths, interleaved)
        return k8, v8, k_scales, v_scales
    v8, v_scales, _ = _launch(
        v, key_block, lengths, None, torch.float8_e4m3fn, centred=False, interleaved=interleaved
    )
    return k8, v8, k_scales, v_scales


def merge_scales(
    k_scales: Tensor, v_scales: Tensor, pool_k_scales: Tensor | None, pool_v_scales: Tensor | None
) -> Tensor:
    """Of blocks and, behind them, of pools, `[B, H, n, 2]`: keys' scales, logarithms of values'."""
    batch, heads, blocks = k_scales.shape
    pools = 0 if pool_k_scales is None else pool_k_scales.shape[-1]
    out = k_scales.new_empty(batch, heads, blocks + pools, 2)
    with torch.cuda.device_of(k_scales):
        merge_kernel[batch * heads,](
            k_scales, v_scales, pool_k_scales, pool_v_scales, out, blocks, pools,
            SIZE=triton.next_power_of_2(blocks + pools),
        )
    return out


def _round_in_turn(
    v: Tensor, size: int, lengths: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, head_dim = v.shape
    blocks = triton.cdiv(tokens, size)
    words = v.new_empty(batch, heads, head_dim, blocks * size // 4, dtype=torch.int32)
    scales = v.new_empty(batch, heads, blocks, dtype=torch.float32)
    with torch.cuda.device_of(v):
        carry_kernel[blocks, batch * heads](
            v, lengths, words, scales, *v.stride()[:3], heads, tokens, D=head_dim, BLOCK=size,
            # A column a thread: with two, triton 3.6 carried other rests on an H200.
            INTERLEAVED=interleaved, num_warps=head_dim // 32,
            # Or the rest carried would be of another number than the one that is specified.
            enable_fp_fusion=False,
        )
    return words.view(torch.float8_e4m3fn), scales


def _launch(x: Tensor, size: int, lengths: Tensor | None, mean: Tensor | None, dtype: torch.dtype,
            *, centred: bool, interleaved: bool = False):
    batch, heads, tokens, head_dim = x.shape
    blocks, transposed = triton.cdiv(tokens, size), mean is None
    shape = [blocks * size, head_dim]
    out = x.new_empty(batch, heads, *(shape[::-1] if transposed else shape), dtype=dtype)
    scales = x.new_empty(batch, heads, blocks, dtype=torch.float32)
    with_logits = mean is not None and not centred
    logits = x.new_empty(batch, heads, blocks * size, dtype=torch.float32) if with_logits else None
    with torch.cuda.device_of(x):
        quantize_kernel[blocks, batch * heads](
            x, lengths, mean, out, scales, logits, *x.stride()[:3], heads, tokens,
            D=head_dim, BLOCK=size, CENTRED=centred, WITH_LOGITS=with_logits,
            TRANSPOSED=transposed, INTERLEAVED=interleaved, num_warps=8,
        )
    return out, scales, logits
