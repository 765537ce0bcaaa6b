"""Triton kernel of the hierarchical scores: block scores without a tile matrix.

The specification is the torch code in `score.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fast import arch_of


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the score kernel.

    Attributes:
        query_tiles: Rows of one program.
        key_tiles: Columns of one loop step.
        num_warps: Of one program.
        num_stages: Depth of the pipeline over key tiles.
    """

    query_tiles: int
    key_tiles: int
    num_warps: int
    num_stages: int


# By compute capability, for head dims up to 128; 80 and 86 are not measured. On an H200, 24 x 7,448
# tiles of 128, 2.4 ms; 128 x 64 with 8 warps took 2.6.
SETTINGS = {
    80: LaunchSettings(64, 64, 4, 2),
    86: LaunchSettings(64, 32, 4, 2),
    90: LaunchSettings(64, 128, 4, 3),
}
SETTINGS |= {89: SETTINGS[86], 100: SETTINGS[80], 120: SETTINGS[86]}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _logits(b_q, p_k, p_length, i_k, T_K, D: tl.constexpr, KEYS: tl.constexpr):
    """Unscaled logits of one step, -inf for tiles without keys."""
    # [KEYS]
    o_k = i_k + tl.arange(0, KEYS)
    m_k = o_k < T_K
    # [KEYS, D]
    b_k = tl.load(p_k + o_k[:, None] * D + tl.arange(0, D)[None, :], mask=m_k[:, None], other=0.0)
    m_real = tl.load(p_length + o_k, mask=m_k, other=0) > 0
    # [QUERIES, KEYS]
    return tl.where(m_real[None, :], tl.dot(b_q, tl.trans(b_k)), float("-inf"))


@triton.jit(do_not_specialize=["H", "T_Q", "T_K", "stride_ql", "stride_kl"])
def score_kernel(
    q,
    k,
    query_lengths,
    key_lengths,
    scores,
    scale_log2,
    H,
    T_Q,
    T_K,
    stride_ql,
    stride_kl,
    D: tl.constexpr,
    PER_QUERY_BLOCK: tl.constexpr,
    PER_KEY_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Scores of `QUERIES / PER_QUERY_BLOCK` query blocks of one head over all key blocks."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    ROWS: tl.constexpr = QUERIES // PER_QUERY_BLOCK
    COLUMNS: tl.constexpr = KEYS // PER_KEY_BLOCK
    # [QUERIES]
    o_q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    m_q = o_q < T_Q
    p_q = q + (i_bh.to(tl.int64) * T_Q + o_q)[:, None] * D + tl.arange(0, D)[None, :]
    # [QUERIES, D]
    b_q = tl.load(p_q, mask=m_q[:, None], other=0.0)
    p_k = k + i_bh.to(tl.int64) * T_K * D
    p_length = key_lengths + i_b * stride_kl

    # Pass 1: maximum and sum of every row, [QUERIES]
    b_max = tl.full([QUERIES], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERIES], tl.float32)
    for i_k in range(0, T_K, KEYS):
        b_s = _logits(b_q, p_k, p_length, i_k, T_K, D, KEYS)
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(b_p, 1)
        b_max = b_new
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)

    # Weight of a row: 1 / (its sum x real rows of its block), 0 where it is no real row.
    b_real = tl.load(query_lengths + i_b * stride_ql + o_q, mask=m_q, other=0) > 0
    # [ROWS, PER_QUERY_BLOCK]
    b_real = tl.reshape(b_real.to(tl.float32), (ROWS, PER_QUERY_BLOCK))
    b_weight = b_real / tl.maximum(tl.sum(b_real, 1), 1.0)[:, None]
    # [QUERIES]
    b_weight = tl.reshape(b_weight, (QUERIES,)) / tl.where(b_sum == 0.0, 1.0, b_sum)

    # [ROWS]
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_columns = T_K // PER_KEY_BLOCK
    p_row = scores + (i_bh.to(tl.int64) * (T_Q // PER_QUERY_BLOCK) + o_row) * i_columns
    # Pass 2: the same logits again, summed over blocks.
    for i_k in range(0, T_K, KEYS):
        b_s = _logits(b_q, p_k, p_length, i_k, T_K, D, KEYS)
        b_p = tl.exp2(b_s * scale_log2 - b_max[:, None])
        # [QUERIES, COLUMNS]
        b_p = tl.sum(tl.reshape(b_p, (QUERIES, COLUMNS, PER_KEY_BLOCK)), 2) * b_weight[:, None]
        # [ROWS, COLUMNS]
        b_score = tl.sum(tl.reshape(b_p, (ROWS, PER_QUERY_BLOCK, COLUMNS)), 1)
        o_column = i_k // PER_KEY_BLOCK + tl.arange(0, COLUMNS)
        m_score = (o_row < T_Q // PER_QUERY_BLOCK)[:, None] & (o_column < i_columns)[None, :]
        tl.store(p_row[:, None] + o_column[None, :], b_score, mask=m_score)


def settings_for(x: Tensor) -> LaunchSettings:
    """The table's entry for x's device."""
    return SETTINGS[max(known for known in SETTINGS if known <= arch_of(x))]


def can_score(query_tiles: Tensor, tiles_per_query_block: int, tiles_per_key_block: int) -> bool:
    """Whether `block_scores` serves these tiles: powers of two, not too large for a program."""
    settings = settings_for(query_tiles)
    return (
        query_tiles.dtype in _DTYPES
        and query_tiles.shape[-1] in (16, 32, 64, 128)
        and settings.query_tiles % tiles_per_query_block == 0
        and settings.key_tiles % tiles_per_key_block == 0
    )


def block_scores(
    query_tiles: Tensor,
    key_tiles: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    tiles_per_query_block: int,
    tiles_per_key_block: int,
    scale: float,
) -> Tensor:
    """Estimated share of attention of each key block, in two passes over the tiles.

    Float32 tiles are rounded to float16, which has TF32's digits at twice the speed; what is beyond
    its range is clamped. Others are multiplied as they are. Sums are float32. Same input, same
    bits.

    Args:
        query_tiles: `[B, H, Tq, D]` float32, bfloat16 or float16.
        key_tiles: `[B, H, Tk, D]`, of the same dtype.
        query_lengths: `[B or 1, Tq]` int32, tokens per query tile; empty tiles do not count.
        key_lengths: `[B or 1, Tk]` int32, tokens per key tile; empty tiles get nothing.
        tiles_per_query_block: Divides `Tq`; a power of two.
        tiles_per_key_block: Divides `Tk`; a power of two.
        scale: Of the logits, as in the attention itself.

    Returns:
        `[B, H, Tq / tiles_per_query_block, Tk / tiles_per_key_block]` float32; rows sum to 1, or
        to 0 without real queries.

    Raises:
        ValueError: `can_score` says no.

    Source: DFSAttn, Hu et al., arXiv 2605.23445; `score.score_blocks` is the specification.
    """
    batch, heads, num_queries, head_dim = query_tiles.shape
    num_keys = key_tiles.shape[2]
    settings = settings_for(query_tiles)
    if not can_score(query_tiles, tiles_per_query_block, tiles_per_key_block):
        raise ValueError(
            f"block_scores needs head dim 16, 32, 64 or 128 and tiles per block that divide "
            f"{settings.query_tiles} (queries) and {settings.key_tiles} (keys), got {head_dim}, "
            f"{tiles_per_query_block} and {tiles_per_key_block}; use score.score_blocks"
        )
    query_tiles, key_tiles = _halved(query_tiles), _halved(key_tiles)
    query_lengths, key_lengths = query_lengths.contiguous(), key_lengths.contiguous()
    rows, columns = num_queries // tiles_per_query_block, num_keys // tiles_per_key_block
    scores = query_tiles.new_empty(batch, heads, rows, columns, dtype=torch.float32)
    with torch.cuda.device_of(query_tiles):
        score_kernel[triton.cdiv(num_queries, settings.query_tiles), batch * heads](
            query_tiles,
            key_tiles,
            query_lengths,
            key_lengths,
            scores,
            scale * math.log2(math.e),
            heads,
            num_queries,
            num_keys,
            num_queries if query_lengths.shape[0] > 1 else 0,
            num_keys if key_lengths.shape[0] > 1 else 0,
            D=head_dim,
            PER_QUERY_BLOCK=tiles_per_query_block,
            PER_KEY_BLOCK=tiles_per_key_block,
            QUERIES=settings.query_tiles,
            KEYS=settings.key_tiles,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            enable_fp_fusion=True,
        )
    return scores


def _halved(tiles: Tensor) -> Tensor:
    """Contiguous tiles of a precision for tensor cores."""
    if tiles.dtype == torch.float32:
        limit = torch.finfo(torch.float16).max
        tiles = tiles.clamp(-limit, limit).to(torch.float16)
    return tiles.contiguous()
