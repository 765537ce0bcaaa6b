"""Triton kernel that adds residuals; `residual.add_residual` is the specification."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


@triton.jit(do_not_specialize=["N", "R", "stride_sbh"])
def lack_kernel(
    out, residual, slots, stride_ob, stride_on, stride_oh, stride_sbh, H, N, R,
    POOL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of one head."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    # [ROWS]
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < N
    o_run = tl.load(slots + i_bh * stride_sbh + o_n, mask=m_n, other=0) // POOL
    # [ROWS, D]
    o_d = tl.arange(0, D)[None, :]
    p_out = out + i_b * stride_ob + i_h * stride_oh + o_n.to(tl.int64)[:, None] * stride_on + o_d
    b_out = tl.load(p_out, mask=m_n[:, None], other=0.0)
    p_lack = residual + (i_bh * R + o_run)[:, None] * D + o_d
    b_lack = tl.load(p_lack, mask=m_n[:, None], other=0.0)
    b_out = b_out.to(tl.float32) + b_lack.to(tl.float32)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_n[:, None])


def add(out: Tensor, residual: Tensor, slots: Tensor, pool: int) -> None:
    """`residual.add_residual`, for head dims that are powers of two."""
    batch, tokens, heads, head_dim = out.shape
    with torch.cuda.device_of(out):
        lack_kernel[triton.cdiv(tokens, _ROWS), batch * heads](
            out,
            residual.contiguous(),
            slots.contiguous(),
            *out.stride()[:3],
            0 if slots.ndim == 1 else tokens,
            heads,
            tokens,
            residual.shape[2],
            POOL=pool,
            D=head_dim,
            ROWS=_ROWS,
        )
