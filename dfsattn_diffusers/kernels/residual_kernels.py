"""Triton kernels that add residuals; `residual.add_residual` is the specification."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .low_rank import RUN, LowRank

_ROWS = 32


@triton.jit
def _rows_at(
    out, slots, stride_ob, stride_on, stride_oh, stride_sbh, H, N,
    POOL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """This program's head, its rows' runs and which rows there are, their addresses and values."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    # [ROWS]
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < N
    o_run = tl.load(slots + i_bh * stride_sbh + o_n, mask=m_n, other=0) // POOL
    # [ROWS, D]
    o_d = tl.arange(0, D)[None, :]
    p_out = out + i_b * stride_ob + i_h * stride_oh + o_n.to(tl.int64)[:, None] * stride_on + o_d
    b_out = tl.load(p_out, mask=m_n[:, None], other=0.0).to(tl.float32)
    return i_bh, o_run, m_n, p_out, b_out


@triton.jit(do_not_specialize=["N", "R", "stride_sbh"])
def lack_kernel(
    out, residual, slots, stride_ob, stride_on, stride_oh, stride_sbh, H, N, R,
    POOL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of one head."""
    i_bh, o_run, m_n, p_out, b_out = _rows_at(
        out, slots, stride_ob, stride_on, stride_oh, stride_sbh, H, N, POOL, D, ROWS
    )
    # [ROWS, D]
    p_lack = residual + (i_bh * R + o_run)[:, None] * D + tl.arange(0, D)[None, :]
    b_out += tl.load(p_lack, mask=m_n[:, None], other=0.0).to(tl.float32)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_n[:, None])


@triton.jit(do_not_specialize=["N", "R", "stride_sbh"])
def low_rank_kernel(
    out, codes, scales, basis, slots, stride_ob, stride_on, stride_oh, stride_sbh, H, N, R,
    POOL: tl.constexpr, K: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same where runs have coefficients of `K` directions."""
    i_bh, o_run, m_n, p_out, b_out = _rows_at(
        out, slots, stride_ob, stride_on, stride_oh, stride_sbh, H, N, POOL, D, ROWS
    )
    # [ROWS]
    p_codes = codes + (i_bh * R + o_run) * (K // 2)
    p_scales = scales + (i_bh * tl.cdiv(R, RUN) + o_run // RUN) * K
    for k in tl.static_range(K):
        # [ROWS]
        b_code = (tl.load(p_codes + k // 2, mask=m_n, other=0).to(tl.int32) >> (k % 2 * 4)) & 15
        b_scale = tl.load(p_scales + k, mask=m_n, other=0.0).to(tl.float32)
        # [D]
        b_basis = tl.load(basis + (i_bh * K + k) * D + tl.arange(0, D))
        b_out += ((b_code.to(tl.float32) - 7.5) * b_scale)[:, None] * b_basis[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_n[:, None])


def add(out: Tensor, residual: Tensor | LowRank, slots: Tensor, pool: int) -> None:
    """`residual.add_residual`, for head dims that are powers of two."""
    batch, tokens, heads, head_dim = out.shape
    kernel, parts, sizes = lack_kernel, (residual,), {}
    runs = residual.shape[2] if isinstance(residual, Tensor) else residual.codes.shape[2]
    if isinstance(residual, LowRank):
        kernel, parts = low_rank_kernel, (residual.codes, residual.scales, residual.basis)
        sizes = dict(K=residual.basis.shape[2], RUN=RUN)
    with torch.cuda.device_of(out):
        kernel[triton.cdiv(tokens, _ROWS), batch * heads](
            out,
            *(part.contiguous() for part in parts),
            slots.contiguous(),
            *out.stride()[:3],
            0 if slots.ndim == 1 else tokens,
            heads,
            tokens,
            runs,
            POOL=pool,
            D=head_dim,
            ROWS=_ROWS,
            **sizes,
        )
