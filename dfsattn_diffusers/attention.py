"""The whole method on one screen: reorder, score, select, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import BlockMap, block_sparse_attention, pool_tail
from .layout import TokenLayout
from .score import pool_spread, pool_tiles, score_blocks
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
    selection: str = "mass",
    tail: str | None = None,
    tail_pool: int = 64,
    text_lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Selection | None]:
    """Attention over the key blocks that matter (DFSAttn, Hu et al., arXiv 2605.23445).

    Args:
        query, key, value: `[B, N, H, D]` in the model's order, after QK norm and rotary embedding.
        layout: Where the `N` tokens lie.
        block_map: Blocks to keep; None selects them from `query`, `key` and `value`.
        keep_ratio: Share of video key blocks that a new selection keeps.
        budget: Rows that share the budget of a new selection: "row", "head" or "layer".
        selection: What a new selection keeps: the most "mass", or the largest "error" of the tail.
        tail: What stands for the blocks that are not kept: None, pools' "mean", or "moment".
        tail_pool: Keys of one pool; divides the layout's key block.
        text_lengths: `[B]` valid text tokens per batch row; None means all.
        backend: A kernel backend's name, or "auto".

    Returns:
        The output, `[B, N, H, D]`, and the selection if it was made here.
    """
    scale = query.shape[-1] ** -0.5
    key_lengths = layout.lengths(layout.key_block, text_lengths)
    q, k, v = (layout.to_curve(x) for x in (query, key, value))
    selected = None
    if block_map is None:
        scores = _score(q, k, layout, text_lengths, scale)
        spread = None
        if selection == "error":
            spread = _spread(q, k, v, layout, tail_pool, text_lengths, scale)
        selected = _select(scores, spread, layout, keep_ratio, budget, text_lengths)
        block_map = selected.block_map
    pools = None
    if tail is not None:
        lengths = layout.lengths(tail_pool, text_lengths)
        pools = pool_tail(k, v, pool=tail_pool, lengths=lengths, moment=tail == "moment")
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    block_sparse_attention(
        q,
        k,
        v,
        block_map,
        scale=scale,
        key_lengths=key_lengths.expand(q.shape[0], -1),
        full_key_blocks=layout.full_key_blocks,
        tail=pools,
        output_order=layout.target,
        out=out.transpose(1, 2),
        backend=backend,
    )
    return out, selected


def _score(
    q: Tensor, k: Tensor, layout: TokenLayout, text_lengths: Tensor | None, scale: float
) -> Tensor:
    tile, video = layout.tile_size, layout.video_slots
    key_lengths = layout.lengths(tile, text_lengths)
    query_lengths = key_lengths[:, : video // tile]
    return score_blocks(
        pool_tiles(q[:, :, :video], query_lengths),
        pool_tiles(k, key_lengths),
        query_lengths,
        key_lengths,
        tiles_per_query_block=layout.query_block // tile,
        tiles_per_key_block=layout.key_block // tile,
        scale=scale,
    )


def _spread(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pool: int,
    text_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    video = layout.video_slots
    return pool_spread(
        q[:, :, :video],
        k,
        v,
        layout.lengths(layout.query_block, text_lengths)[:, : video // layout.query_block],
        layout.lengths(pool, text_lengths),
        pools_per_key_block=layout.key_block // pool,
        scale=scale,
    )


def _select(
    scores: Tensor,
    spread: Tensor | None,
    layout: TokenLayout,
    keep_ratio: float,
    budget: str,
    text_lengths: Tensor | None,
) -> Selection:
    text = layout.slots - layout.video_slots
    return select_blocks(
        scores,
        spread,
        keep_ratio=keep_ratio,
        query_lengths=layout.lengths(layout.query_block, text_lengths),
        key_lengths=layout.lengths(layout.key_block, text_lengths),
        num_video_key_blocks=-(-layout.geometry.video_tokens // layout.key_block),
        num_text_query_blocks=text // layout.query_block,
        num_text_key_blocks=text // layout.key_block,
        query_block=layout.query_block,
        key_block=layout.key_block,
        budget=budget,
    )
