"""Triton kernels that keep the highest scores of each row, of each head or of a whole layer.

`selection.py` specifies them; of equal scores the first are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The radix select over a group reads 31 bits in these digits: shift and number of bins.
_DIGITS = ((20, 2048), (10, 1024), (0, 1024))
# Rows of one program of the group kernels.
_ROWS = 8


@triton.jit(do_not_specialize=["N", "kept", "stride_row"])
def row_kernel(scores, mask, N, kept, stride_row, COLUMNS: tl.constexpr):
    """Mark the `kept` highest scores of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    # [COLUMNS]
    o_k = tl.arange(0, COLUMNS)
    b_score = tl.load(scores + i_row * stride_row + o_k, mask=o_k < N, other=0.0)
    # Bits of floats that are not negative sort as integers.
    b_key = tl.where(o_k < N, b_score.to(tl.int32, bitcast=True), -1)
    i_key = 0
    for i in range(31):
        i_try = i_key | (1 << (30 - i))
        i_key = tl.where(tl.sum((b_key >= i_try).to(tl.int32), 0) >= kept, i_try, i_key)
    b_above = (b_key > i_key).to(tl.int32)
    b_equal = (b_key == i_key).to(tl.int32)
    m_tie = (b_equal > 0) & (tl.cumsum(b_equal, 0) <= kept - tl.sum(b_above, 0))
    m_keep = (b_above > 0) | m_tie
    tl.store(mask + i_row * N + o_k, m_keep.to(tl.uint8), mask=o_k < N)


@triton.jit
def _free_keys(scores, mask, o_row, m_row, N, stride_row, COLUMNS: tl.constexpr):
    """Sortable scores of the blocks that are not kept yet, -1 for all others."""
    o_k = tl.arange(0, COLUMNS)[None, :]
    m_k = m_row[:, None] & (o_k < N)
    # [ROWS, COLUMNS]
    b_kept = tl.load(mask + o_row[:, None] * N + o_k, mask=m_k, other=1)
    b_score = tl.load(scores + o_row[:, None] * stride_row + o_k, mask=m_k, other=0.0)
    return tl.where(b_kept == 0, b_score.to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=["N", "N_ROWS", "stride_row"])
def digit_kernel(
    scores,
    mask,
    prefix,
    histogram,
    N,
    N_ROWS,
    stride_row,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Count the next digit of those keys of a group that begin with its prefix."""
    i_group = tl.program_id(1)
    o_local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_row = i_group.to(tl.int64) * N_ROWS + o_local
    b_key = _free_keys(scores, mask, o_row, o_local < N_ROWS, N, stride_row, COLUMNS)
    # [ROWS * COLUMNS]
    b_key = tl.reshape(b_key, (ROWS * COLUMNS,))
    b_digit = b_key >> SHIFT
    m_key = b_key >= 0
    if not FIRST:
        m_key = m_key & (b_digit // BINS == tl.load(prefix + i_group))
        b_digit = b_digit % BINS
    # [BINS]
    b_count = tl.histogram(tl.where(m_key, b_digit, 0), BINS, mask=m_key)
    o_bin = tl.arange(0, BINS)
    tl.atomic_add(
        histogram + i_group.to(tl.int64) * BINS + o_bin, b_count, mask=b_count > 0, sem="relaxed"
    )


@triton.jit
def narrow_kernel(histogram, prefix, left, BINS: tl.constexpr):
    """Append to a group's prefix the digit in which its last kept key lies."""
    i_group = tl.program_id(0)
    i_left = tl.load(left + i_group)
    # [BINS]
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(histogram + i_group.to(tl.int64) * BINS + o_bin)
    b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0)
    i_digit = tl.sum((b_above + b_count >= i_left).to(tl.int32), 0) - 1
    i_above = tl.sum(tl.where(o_bin == i_digit, b_above, 0), 0)
    tl.store(prefix + i_group, tl.load(prefix + i_group) * BINS + i_digit)
    tl.store(left + i_group, i_left - i_above)


@triton.jit(do_not_specialize=["N", "N_ROWS", "stride_row"])
def tie_kernel(
    scores,
    mask,
    prefix,
    left,
    ties,
    N,
    N_ROWS,
    stride_row,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """COUNT the keys of each row that equal the group's threshold, or else keep what is due."""
    i_group = tl.program_id(1)
    o_local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_local < N_ROWS
    o_row = i_group.to(tl.int64) * N_ROWS + o_local
    # [ROWS, COLUMNS]
    b_key = _free_keys(scores, mask, o_row, m_row, N, stride_row, COLUMNS)
    i_key = tl.load(prefix + i_group)
    b_equal = (b_key == i_key).to(tl.int32)
    if COUNT:
        tl.store(ties + o_row, tl.sum(b_equal, 1), mask=m_row)
    else:
        # Ties up to this row's last, less its own: those of the rows before.
        b_before = tl.load(ties + o_row, mask=m_row, other=0) - tl.sum(b_equal, 1)
        b_rank = tl.cumsum(b_equal, 1) + b_before[:, None]
        m_keep = (b_key > i_key) | ((b_equal > 0) & (b_rank <= tl.load(left + i_group)))
        o_k = tl.arange(0, COLUMNS)[None, :]
        p_mask = mask + o_row[:, None] * N + o_k
        tl.store(p_mask, m_keep.to(tl.uint8), mask=m_keep & m_row[:, None] & (o_k < N))


def keep_highest(scores: Tensor, per_row: int, more: int = 0, shared_from: int = 1) -> Tensor:
    """Mask of the highest scores of each row, and then of the highest of the rest.

    Nothing waits for the device. Of equal scores those first in memory order are kept.

    Args:
        scores: `[B, H, R, N]` float32, none negative or NaN.
        per_row: Blocks that every row keeps, at least 1 and at most `N`.
        more: Blocks that every row may keep besides, in the mean of the rows that share.
        shared_from: First dimension that shares these: 2 for the rows of a head, 1 for all heads.

    Returns:
        `[B, H, R, N]` bool.
    """
    columns = scores.shape[-1]
    flat = scores.float().flatten(0, 2)
    mask = torch.empty(flat.shape, dtype=torch.uint8, device=scores.device)
    size = triton.next_power_of_2(columns)
    with torch.cuda.device_of(scores):
        row_kernel[flat.shape[0],](
            flat,
            mask,
            columns,
            per_row,
            flat.stride(0),
            COLUMNS=size,
            num_warps=min(8, max(1, size // 1024)),
            enable_fp_fusion=True,
        )
        if more:
            groups = scores.shape[:shared_from].numel()
            _keep_more(flat, mask, groups, more * (flat.shape[0] // groups), size)
    return mask.view(torch.bool).view(scores.shape)


def _keep_more(scores: Tensor, mask: Tensor, groups: int, count: int, size: int) -> None:
    """Mark in each group of rows the `count` highest scores that are not marked yet."""
    num_rows, columns = scores.shape[0] // groups, scores.shape[1]
    rows = max(1, min(_ROWS, 8192 // size))
    grid = (triton.cdiv(num_rows, rows), groups)
    shape = (columns, num_rows, scores.stride(0))
    prefix = torch.zeros(groups, dtype=torch.int32, device=mask.device)
    left = torch.full_like(prefix, count)
    for shift, bins in _DIGITS:
        histogram = prefix.new_zeros(groups, bins)
        digit_kernel[grid](
            scores,
            mask,
            prefix,
            histogram,
            *shape,
            COLUMNS=size,
            ROWS=rows,
            SHIFT=shift,
            BINS=bins,
            FIRST=shift == _DIGITS[0][0],
            num_warps=8,
            enable_fp_fusion=True,
        )
        narrow_kernel[groups,](histogram, prefix, left, BINS=bins, enable_fp_fusion=True)
    ties = prefix.new_empty(groups, num_rows)
    tie_kernel[grid](
        scores,
        mask,
        prefix,
        left,
        ties,
        *shape,
        COLUMNS=size,
        ROWS=rows,
        COUNT=True,
        num_warps=8,
        enable_fp_fusion=True,
    )
    tie_kernel[grid](
        scores,
        mask,
        prefix,
        left,
        ties.cumsum(1, dtype=torch.int32),
        *shape,
        COLUMNS=size,
        ROWS=rows,
        COUNT=False,
        num_warps=8,
        enable_fp_fusion=True,
    )
