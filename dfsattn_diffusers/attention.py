"""The whole method on one screen: reorder, score, select, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import BlockMap, block_sparse_attention
from .layout import TokenLayout
from .score import pool_tiles, score_blocks
from .selection import Selection, select_blocks


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    block_map: BlockMap | None = None,
    *,
    keep_ratio: float = 1.0,
    budget: str = "row",
    text_lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Selection | None]:
    """Attention over the key blocks that matter (DFSAttn, Hu et al., arXiv 2605.23445).

    Args:
        query, key, value: `[B, N, H, D]` in the model's order, after QK norm and rotary embedding.
        layout: Where the `N` tokens lie.
        block_map: Blocks to keep; None selects them from `query` and `key`.
        keep_ratio: Share of video key blocks that a new selection keeps.
        budget: Rows that share the budget of a new selection: "row", "head" or "layer".
        text_lengths: `[B]` valid text tokens per batch row; None means all.
        backend: A kernel backend's name, or "auto".

    Returns:
        The output, `[B, N, H, D]`, and the selection if it was made here.
    """
    scale = query.shape[-1] ** -0.5
    key_lengths = layout.lengths(layout.key_block, text_lengths)
    q, k, v = (layout.to_curve(x) for x in (query, key, value))
    selection = None
    if block_map is None:
        selection = _select(q, k, layout, keep_ratio, budget, text_lengths, key_lengths, scale)
        block_map = selection.block_map
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    block_sparse_attention(
        q,
        k,
        v,
        block_map,
        scale=scale,
        key_lengths=key_lengths.expand(q.shape[0], -1),
        full_key_blocks=layout.full_key_blocks,
        output_order=layout.target,
        out=out.transpose(1, 2),
        backend=backend,
    )
    return out, selection


def _select(
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    keep_ratio: float,
    budget: str,
    text_lengths: Tensor | None,
    key_lengths: Tensor,
    scale: float,
) -> Selection:
    tile, video = layout.tile_size, layout.video_slots
    key_tile_lengths = layout.lengths(tile, text_lengths)
    query_tile_lengths = key_tile_lengths[:, : video // tile]
    scores = score_blocks(
        pool_tiles(q[:, :, :video], query_tile_lengths),
        pool_tiles(k, key_tile_lengths),
        query_tile_lengths,
        key_tile_lengths,
        tiles_per_query_block=layout.query_block // tile,
        tiles_per_key_block=layout.key_block // tile,
        scale=scale,
    )
    text = layout.slots - video
    return select_blocks(
        scores,
        keep_ratio=keep_ratio,
        query_lengths=layout.lengths(layout.query_block, text_lengths),
        key_lengths=key_lengths,
        num_video_key_blocks=-(-layout.geometry.video_tokens // layout.key_block),
        num_text_query_blocks=text // layout.query_block,
        num_text_key_blocks=text // layout.key_block,
        query_block=layout.query_block,
        key_block=layout.key_block,
        budget=budget,
    )
