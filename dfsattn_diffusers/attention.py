"""The whole method on one screen: reorder, score, select, attend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .kernels import BlockMap, block_sparse_attention, pool_tail
from .kernels.prologue import Prepared, Rotary, Stream, prepare_qkv
from .layout import TokenLayout
from .score import pool_spread, score_blocks
from .selection import Selection, select_blocks


def prepare(
    streams: Sequence[Stream],
    layout: TokenLayout,
    rotary: Rotary | None = None,
    *,
    text_lengths: Tensor | None = None,
    pooled: bool = True,
) -> Prepared:
    """Queries, keys and values in curve order, from projections in the model's order.

    Args:
        streams: One or two, whose rows are the layout's tokens.
        layout: Where the tokens lie.
        rotary: Rows to rotate, after the streams' norms.
        text_lengths: `[B]` valid text tokens per batch row; None means all.
        pooled: Also pool tiles of queries and keys, which a new selection needs.
    """
    tile_lengths = layout.lengths(layout.tile_size, text_lengths) if pooled else None
    return prepare_qkv(streams, rotary, layout.target, tile_lengths=tile_lengths)


def sparse_attention(
    prepared: Prepared,
    layout: TokenLayout,
    block_map: BlockMap | None = None,
    *,
    keep_ratio: float = 1.0,
    budget: str = "row",
    selection: str = "mass",
    tail: str | None = None,
    tail_pool: int = 64,
    text_lengths: Tensor | None = None,
    precision: str = "full",
    backend: str = "auto",
) -> tuple[Tensor, Selection | None]:
    """Attention over the key blocks that matter (DFSAttn, Hu et al., arXiv 2605.23445).

    Args:
        prepared: From `prepare`; pooled where `block_map` is None.
        layout: Where the `N` tokens lie.
        block_map: Blocks to keep; None selects them here.
        keep_ratio: Share of video key blocks that a new selection keeps.
        budget: Rows that share the budget of a new selection: "row", "head" or "layer".
        selection: What a new selection keeps: the most "mass", or the largest "error" of the tail.
        tail: What stands for the blocks that are not kept: None, pools' "mean", or "moment".
        tail_pool: Keys of one pool; divides the layout's key block.
        text_lengths: `[B]` valid text tokens per batch row; None means all.
        precision: Of the kernel's products: "full" or "fp8".
        backend: A kernel backend's name, or "auto".

    Returns:
        The output in the model's order, `[B, N, H, D]`, and the selection if it was made here.
    """
    q, k, v = prepared.q, prepared.k, prepared.v
    batch, heads, _, head_dim = q.shape
    scale = head_dim**-0.5
    key_lengths = layout.lengths(layout.key_block, text_lengths)
    selected = None
    if block_map is None:
        scores, spread = _score(prepared, layout, text_lengths, scale), None
        if selection == "error":
            spread = _spread(q, k, v, layout, tail_pool, text_lengths, scale)
        selected = _select(scores, spread, layout, keep_ratio, budget, text_lengths)
        block_map = selected.block_map
    pools = None
    if tail is not None:
        lengths = layout.lengths(tail_pool, text_lengths)
        pools = pool_tail(k, v, pool=tail_pool, lengths=lengths, moment=tail == "moment")
    out = q.new_empty(batch, layout.geometry.tokens, heads, head_dim)
    block_sparse_attention(
        q,
        k,
        v,
        block_map,
        scale=scale,
        key_lengths=key_lengths.expand(batch, -1),
        full_key_blocks=layout.full_key_blocks,
        tail=pools,
        output_order=layout.target,
        out=out.transpose(1, 2),
        precision=precision,
        backend=backend,
    )
    return out, selected


def _score(
    prepared: Prepared, layout: TokenLayout, text_lengths: Tensor | None, scale: float
) -> Tensor:
    video = layout.video_slots // layout.tile_size
    key_lengths = layout.lengths(layout.tile_size, text_lengths)
    return score_blocks(
        prepared.q_tiles[:, :, :video].contiguous(),
        prepared.k_tiles,
        key_lengths[:, :video],
        key_lengths,
        tiles_per_query_block=layout.query_block // layout.tile_size,
        tiles_per_key_block=layout.key_block // layout.tile_size,
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
