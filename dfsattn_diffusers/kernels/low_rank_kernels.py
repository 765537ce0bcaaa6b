"""Triton kernels that measure residuals in few directions, without one at full precision.

The specification is `residual.measure_residual` and `low_rank.LowRank.of`. Both outputs are read
twice: for the products that directions come from, and for the coefficients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fast import arch_of
from .low_rank import MIX, ROUNDS, RUN, SMALLEST, TINY, LowRank

_ROUNDS, _SMALLEST, _TINY = tl.constexpr(ROUNDS), tl.constexpr(SMALLEST), tl.constexpr(TINY)
_MIX, _MIX_AGAIN = map(tl.constexpr, MIX)
# Directions follow from sums over all rows, where roundings to bf16 average out: they turn by far
# less than shows in 4-bit codes. The interpreter multiplies bf16 matrices wrongly.
_OPERANDS = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
# Runs of one loop step; programs that sum products, about as many as run at once on the largest
# GPUs; bytes of their sums. Not yet measured.
_ROWS, _PROGRAMS, _SUM_BYTES = 32, 640, 2**24
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _mean_lack(
    exact, out, rows, lengths, stride_eb, stride_en, stride_eh, stride_ob, stride_on, stride_oh,
    stride_rbh, stride_lb, H, R, i_bh, o_run, POOL: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Means of `exact - out` over runs `o_run`, `[ROWS, D]` float32; 0 for runs without tokens."""
    i_b, i_h = i_bh // H, i_bh % H
    # [ROWS]
    m_run = o_run < R
    i_length = tl.load(lengths + i_b * stride_lb + o_run, mask=m_run, other=0)
    p_rows = rows + i_bh * stride_rbh + o_run * POOL
    # [1, D]
    o_d = tl.arange(0, D)[None, :]
    p_exact = exact + i_b * stride_eb + i_h * stride_eh + o_d
    p_out = out + i_b * stride_ob + i_h * stride_oh + o_d
    # [ROWS, D]
    b_lack = tl.zeros([o_run.shape[0], D], tl.float32)
    for i in range(POOL):
        o_row = tl.load(p_rows + i, mask=m_run, other=0).to(tl.int64)[:, None]
        # Padding may be NaN: it is not read.
        m_real = (i < i_length)[:, None]
        b_exact = tl.load(p_exact + o_row * stride_en, mask=m_real, other=0.0).to(tl.float32)
        b_out = tl.load(p_out + o_row * stride_on, mask=m_real, other=0.0).to(tl.float32)
        b_lack += b_exact - b_out
    return b_lack * (1.0 / tl.maximum(i_length, 1).to(tl.float32))[:, None]


@triton.jit(do_not_specialize=["stride_rbh", "stride_lb", "H", "R", "SPAN"])
def gram_kernel(
    exact, out, rows, lengths, sums, stride_eb, stride_en, stride_eh, stride_ob, stride_on,
    stride_oh, stride_rbh, stride_lb, H, R, SPAN,
    POOL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products of all pairs of columns, summed over `SPAN` runs of one head."""
    # Heads are the fast axis of the grid: those of one token lie side by side in memory.
    i_bh, i_span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # [D, D]
    b_sum = tl.zeros([D, D], tl.float32)
    for i_run in range(i_span * SPAN, tl.minimum(i_span * SPAN + SPAN, R), ROWS):
        b_lack = _mean_lack(
            exact, out, rows, lengths, stride_eb, stride_en, stride_eh, stride_ob, stride_on,
            stride_oh, stride_rbh, stride_lb, H, R, i_bh, i_run + tl.arange(0, ROWS), POOL, D,
        ).to(_OPERANDS)  # fmt: skip
        b_sum = tl.dot(tl.trans(b_lack), b_lack, b_sum)
    o_d = tl.arange(0, D)
    p_sum = sums + (i_bh * tl.num_programs(1) + i_span) * D * D
    tl.store(p_sum + o_d[:, None] * D + o_d[None, :], b_sum)


@triton.jit(do_not_specialize=["SPANS"])
def directions_kernel(sums, basis, SPANS, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """The main directions of one head; `ROWS` is a power of two from `K` on."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_d, o_k = tl.arange(0, D), tl.arange(0, ROWS)
    # [D, D]
    p_sum = sums + i_bh * SPANS * D * D + o_d[:, None] * D + o_d[None, :]
    b_gram = tl.zeros([D, D], tl.float32)
    for _ in range(SPANS):
        b_gram += tl.load(p_sum)
        p_sum += D * D
    # [ROWS, D]
    o_place = o_k[:, None] * D + o_d[None, :]
    b_bits = (o_place.to(tl.int64) + 1) * _MIX & 0x7FFFFFFF
    b_bits = (b_bits ^ b_bits >> 15) * _MIX_AGAIN & 0x7FFFFFFF
    b_basis = (b_bits ^ b_bits >> 15).to(tl.float32) / 2147483648.0 - 0.5
    for _ in range(_ROUNDS):
        b_done = tl.zeros([ROWS, D], tl.float32)
        for k in range(K):
            m_k = (o_k == k)[:, None]
            # [D]; the matrix is symmetric
            b_row = tl.sum(tl.where(m_k, b_basis, 0.0), 0)
            b_row = tl.sum(b_gram * b_row[:, None], 0)
            b_row /= tl.maximum(tl.sqrt(tl.sum(b_row * b_row, 0)), _TINY)
            for _again in tl.static_range(2):
                # [ROWS]
                b_part = tl.sum(b_done * b_row[None, :], 1)
                b_row -= tl.sum(b_done * b_part[:, None], 0)
            b_norm = tl.sqrt(tl.sum(b_row * b_row, 0))
            b_row = tl.where(b_norm > _SMALLEST, b_row / tl.maximum(b_norm, _TINY), 0.0)
            b_done = tl.where(m_k, b_row[None, :], b_done)
        b_basis = b_done
    tl.store(basis + i_bh * K * D + o_place, b_basis, mask=(o_k < K)[:, None])


@triton.jit
def _encode(b_lack, p_direction, p_scale, D: tl.constexpr):
    """4-bit codes of one direction's coefficients, `[ROWS]` int32; stores their scale."""
    # [ROWS]
    b_coefficient = tl.sum(b_lack * tl.load(p_direction + tl.arange(0, D))[None, :], 1)
    b_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(b_coefficient), 0), 7.5), _TINY)
    # To the nearest bf16, ties to even: the interpreter's cast would cut it off.
    i_bits = b_scale.to(tl.int32, bitcast=True)
    i_bits = (i_bits + 0x7FFF + ((i_bits >> 16) & 1)) & -0x10000
    b_scale = i_bits.to(tl.float32, bitcast=True)
    tl.store(p_scale, b_scale.to(tl.bfloat16))
    b_code = tl.div_rn(b_coefficient, b_scale) + 7.5
    # Added to 2 ** 23 it is rounded as torch rounds, ties to even, and ends up in the lowest bits.
    b_code = tl.minimum(tl.maximum(b_code, 0.0), 15.0) + 8388608.0
    return b_code.to(tl.int32, bitcast=True) & 15


@triton.jit(do_not_specialize=["stride_rbh", "stride_lb", "H", "R"])
def codes_kernel(
    exact, out, rows, lengths, basis, codes, scales, stride_eb, stride_en, stride_eh, stride_ob,
    stride_on, stride_oh, stride_rbh, stride_lb, H, R,
    POOL: tl.constexpr, K: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Coefficients of the `RUN` runs that share scales, in one head."""
    i_bh, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # [RUN]
    o_run = i_part * RUN + tl.arange(0, RUN)
    # [RUN, D]
    b_lack = _mean_lack(
        exact, out, rows, lengths, stride_eb, stride_en, stride_eh, stride_ob, stride_on,
        stride_oh, stride_rbh, stride_lb, H, R, i_bh, o_run, POOL, D,
    )  # fmt: skip
    p_basis, p_scales = basis + i_bh * K * D, scales + (i_bh * tl.num_programs(1) + i_part) * K
    p_codes = codes + (i_bh * R + o_run) * (K // 2)
    for k in tl.static_range(0, K, 2):
        b_low = _encode(b_lack, p_basis + k * D, p_scales + k, D)
        b_high = _encode(b_lack, p_basis + k * D + D, p_scales + k + 1, D)
        tl.store(p_codes + k // 2, (b_low | b_high << 4).to(tl.uint8), mask=o_run < R)


def can_measure(exact: Tensor, out: Tensor) -> bool:
    """Whether `measure` serves these: head dims that fill a matrix product, rows contiguous."""
    fits = out.shape[3] in (16, 32, 64, 128) and exact.stride(3) == out.stride(3) == 1
    return fits and exact.dtype in _DTYPES and out.dtype in _DTYPES


def measure(exact: Tensor, out: Tensor, rows: Tensor, lengths: Tensor, rank: int) -> LowRank:
    """`residual.measure_residual` in `rank` directions of each head. Waits for nothing."""
    batch, _, heads, head_dim = out.shape
    sums = _sum_products(exact, out, rows, lengths)
    basis = _find_directions(sums, rank).view(batch, heads, rank, head_dim)
    return _encode_in(basis, exact, out, rows, lengths)


def _sum_products(exact: Tensor, out: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """`[B * H, SPANS, D, D]` float32, whose sums over `SPANS` are the heads' gram matrices."""
    batch, _, heads, head_dim = out.shape
    steps = triton.cdiv(lengths.shape[1], _ROWS)
    programs = min(_PROGRAMS, _SUM_BYTES // (4 * head_dim**2))
    per_span = triton.cdiv(steps, max(1, programs // (batch * heads)))
    spans = triton.cdiv(steps, per_span)
    sums = out.new_empty(batch * heads, spans, head_dim, head_dim, dtype=torch.float32)
    where, sizes = _arguments(exact, out, rows, lengths)
    with torch.cuda.device_of(out):
        gram_kernel[batch * heads, spans](
            *where, sums, *sizes, per_span * _ROWS, POOL=rows.shape[-1] // lengths.shape[1],
            D=head_dim, ROWS=_ROWS, num_warps=warps(head_dim),
            num_stages=stages(arch_of(out)),
        )  # fmt: skip
    return sums


def _find_directions(sums: Tensor, rank: int) -> Tensor:
    """`[B * H, rank, D]` float32 of `_sum_products`."""
    heads, spans, head_dim, _ = sums.shape
    basis = sums.new_empty(heads, rank, head_dim)
    with torch.cuda.device_of(sums):
        directions_kernel[heads,](
            sums, basis, spans, K=rank, D=head_dim, ROWS=triton.next_power_of_2(rank),
            num_warps=warps(head_dim),
        )  # fmt: skip
    return basis


def _encode_in(
    basis: Tensor, exact: Tensor, out: Tensor, rows: Tensor, lengths: Tensor
) -> LowRank:
    """What is left of the residual in the directions of `basis`."""
    batch, heads, rank, head_dim = basis.shape
    runs = lengths.shape[1]
    parts = triton.cdiv(runs, RUN)
    codes = basis.new_empty(batch, heads, runs, rank // 2, dtype=torch.uint8)
    scales = basis.new_empty(batch, heads, parts, rank, dtype=torch.bfloat16)
    where, sizes = _arguments(exact, out, rows, lengths)
    with torch.cuda.device_of(out):
        codes_kernel[batch * heads, parts](
            *where, basis, codes, scales, *sizes, POOL=rows.shape[-1] // runs, K=rank, RUN=RUN,
            D=head_dim, num_warps=warps(head_dim),
        )  # fmt: skip
    return LowRank(codes, scales, basis)


def _arguments(exact, out, rows, lengths) -> tuple[tuple, tuple]:
    """What both kernels that read the outputs take: tensors; strides, heads and runs."""
    heads, runs = out.shape[2], lengths.shape[1]
    sizes = (
        *exact.stride()[:3],
        *out.stride()[:3],
        0 if rows.ndim == 1 else rows.shape[-1],
        0 if lengths.shape[0] == 1 else runs,
        heads,
        runs,
    )
    return (exact, out, rows.contiguous(), lengths.contiguous()), sizes


def warps(head_dim: int) -> int:
    """Of one program of any kernel."""
    return max(1, head_dim // 16)


def stages(arch: int) -> int:
    """Depth of the pipeline over runs; Triton 3.6 fails to build one for sm100."""
    return 1 if 100 <= arch < 120 else 3
