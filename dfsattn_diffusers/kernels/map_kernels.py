"""Triton kernels between masks, block maps and packed block maps; `block_map.py` specifies them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N_BLOCKS", "WIDTH", "stride_row"])
def list_kernel(
    source, counts, indices, N_BLOCKS, WIDTH, stride_row, BLOCKS: tl.constexpr, PACKED: tl.constexpr
):
    """Count and list the kept blocks of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    # [BLOCKS]
    o_k = tl.arange(0, BLOCKS)
    m_k = o_k < N_BLOCKS
    if PACKED:
        b_byte = tl.load(source + i_row * stride_row + o_k // 8, mask=m_k, other=0)
        b_kept = (b_byte.to(tl.int32) >> (o_k % 8)) & 1
    else:
        b_kept = tl.load(source + i_row * stride_row + o_k, mask=m_k, other=0).to(tl.int32)
    b_rank = tl.cumsum(b_kept, 0)
    i_count = tl.sum(b_kept, 0)
    # A full row lists none.
    i_listed = tl.where(i_count == N_BLOCKS, 0, tl.minimum(i_count, WIDTH))
    p_row = indices + i_row * WIDTH
    tl.store(p_row + b_rank - 1, o_k, mask=(b_kept > 0) & (b_rank <= i_listed))
    tl.store(p_row + o_k, tl.zeros_like(o_k), mask=(o_k >= i_listed) & (o_k < WIDTH))
    i_count = tl.where(i_count == N_BLOCKS, i_count, i_listed)
    tl.store(counts + i_row, i_count)


@triton.jit(do_not_specialize=["N_BLOCKS", "N_BYTES", "WIDTH"])
def pack_kernel(
    counts, indices, bits, N_BLOCKS, N_BYTES, WIDTH, BYTES: tl.constexpr, STEPS: tl.constexpr
):
    """One bit per block of one row: a binary search of each block in the row's list."""
    i_row = tl.program_id(0).to(tl.int64)
    i_count = tl.load(counts + i_row)
    i_listed = tl.where(i_count == N_BLOCKS, 0, i_count)
    p_row = indices + i_row * WIDTH
    # [BYTES, 8]
    o_k = tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    b_low = tl.zeros_like(o_k)
    b_high = b_low + i_listed
    for _ in range(STEPS):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_less = m_open & (tl.load(p_row + b_middle, mask=m_open, other=0) < o_k)
        b_high = tl.where(m_open & ~m_less, b_middle, b_high)
        b_low = tl.where(m_less, b_middle + 1, b_low)
    m_kept = tl.load(p_row + b_low, mask=b_low < i_listed, other=-1) == o_k
    m_kept = (m_kept | (i_count == N_BLOCKS)) & (o_k < N_BLOCKS)
    # [BYTES]
    b_bits = tl.sum(m_kept.to(tl.int32) << (o_k % 8), 1)
    o_byte = tl.arange(0, BYTES)
    tl.store(bits + i_row * N_BYTES + o_byte, b_bits.to(tl.uint8), mask=o_byte < N_BYTES)


def list_blocks(
    source: Tensor, num_key_blocks: int, width: int, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """Counts and sorted indices of the kept blocks.

    Args:
        source: `[B, H, nQ, nK]` bool, or with `packed` `[B, H, nQ, ceil(nK / 8)]` uint8 bits.
        num_key_blocks: `nK`.
        width: Entries per row, `max_count`.
        packed: Which of the two `source` is.

    Returns:
        `[B, H, nQ]` and `[B, H, nQ, width]` int32, as `BlockMap` has them.
    """
    source = source.contiguous().view(torch.uint8)
    counts = torch.empty(source.shape[:-1], dtype=torch.int32, device=source.device)
    indices = torch.empty(*source.shape[:-1], width, dtype=torch.int32, device=source.device)
    # A scan over fewer elements than a warp has lanes is not to be trusted.
    blocks = max(64, triton.next_power_of_2(max(num_key_blocks, width)))
    with torch.cuda.device_of(source):
        list_kernel[counts.numel(),](
            source,
            counts,
            indices,
            num_key_blocks,
            width,
            source.shape[-1],
            BLOCKS=blocks,
            PACKED=packed,
            num_warps=_warps(blocks),
            enable_fp_fusion=True,
        )
    return counts, indices


def pack_bits(counts: Tensor, indices: Tensor, num_key_blocks: int) -> Tensor:
    """`[B, H, nQ, ceil(nK / 8)]` uint8, the bits of a `PackedBlockMap`, from a map's tensors."""
    num_bytes, width = -(-num_key_blocks // 8), indices.shape[-1]
    bits = torch.empty(*counts.shape, num_bytes, dtype=torch.uint8, device=counts.device)
    size = triton.next_power_of_2(num_bytes)
    with torch.cuda.device_of(counts):
        pack_kernel[counts.numel(),](
            counts.contiguous(),
            indices.contiguous(),
            bits,
            num_key_blocks,
            num_bytes,
            width,
            BYTES=size,
            STEPS=width.bit_length(),
            num_warps=_warps(8 * size),
            enable_fp_fusion=True,
        )
    return bits


def _warps(columns: int) -> int:
    """Warps of a program with one row: scans within a warp need no barrier."""
    return min(8, max(1, columns // 1024))
