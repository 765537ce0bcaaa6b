"""The whole method on one screen: reorder, score, select, attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import BlockMap, block_sparse_attention, pool_tail
from .kernels.prologue import Rotary, Stream, norm_once, pool_qk, prepare_qkv
from .layout import TokenLayout
from .score import pool_spread, score_blocks
from .selection import Selection, highest_share, select_blocks


@dataclass(frozen=True)
class Ordered:
    """What attention reads, in curve order.

    Attributes:
        q, k, v: `[B, H, P, D]`.
        choice: `[B, H]` int64, the layout's curve of each head; None for the first.
        scores: `[B, H, nQv, nK]` float32 block scores, which a new selection needs; else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    choice: Tensor | None = None
    scores: Tensor | None = None


def prepare(
    streams: Sequence[Stream],
    layout: TokenLayout,
    rotary: Rotary | None = None,
    *,
    text_lengths: Tensor | None = None,
    scored: bool = True,
    keep_ratio: float = 1.0,
    choice: Tensor | None = None,
) -> Ordered:
    """Queries, keys and values in curve order, from projections in the model's order.

    Args:
        streams: One or two, whose rows are the layout's tokens.
        layout: Where the tokens lie.
        rotary: Rows to rotate, after the streams' norms.
        text_lengths: `[B]` valid text tokens per batch row; None means all.
        scored: Also score blocks and, where the layout has several curves, choose each head's by
            what its highest scores add up to.
        keep_ratio: Share of the video key blocks whose scores count for that.
        choice: The heads' curves, where they are known.
    """
    scores = None
    if scored and len(layout.targets) > 1:
        streams, rotary = norm_once(streams, rotary)
        scores, choice = _choose(streams, layout, rotary, text_lengths, keep_ratio)
    if choice is not None:
        x = prepare_qkv(streams, rotary, layout.target(), slots=layout.restore(choice))
        return Ordered(x.q, x.k, x.v, choice, scores)
    tile_lengths = layout.lengths(layout.tile_size, text_lengths) if scored else None
    x = prepare_qkv(streams, rotary, layout.target(), tile_lengths=tile_lengths)
    if scored:
        scores = _score(x.q_tiles, x.k_tiles, layout, text_lengths)
    return Ordered(x.q, x.k, x.v, None, scores)


def _choose(
    streams: Sequence[Stream],
    layout: TokenLayout,
    rotary: Rotary | None,
    text_lengths: Tensor | None,
    keep_ratio: float,
) -> tuple[Tensor, Tensor]:
    """Scores along the curve that serves each head best, and which it is. Nothing waits for it."""
    tile_lengths = layout.lengths(layout.tile_size, text_lengths)
    scores = most = choice = None
    for i, target in enumerate(layout.targets):
        tiles = pool_qk(streams, rotary, target, tile_lengths)
        new = _score(*tiles, layout, text_lengths)
        kept = highest_share(new, keep_ratio, layout.video_key_blocks)
        if scores is None:
            scores, most, choice = new, kept, torch.zeros_like(kept, dtype=torch.int64)
            continue
        better = kept > most
        scores = torch.where(better[..., None, None], new, scores)
        most, choice = torch.maximum(kept, most), choice.masked_fill(better, i)
    return scores, choice


def sparse_attention(
    prepared: Ordered,
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
        prepared: From `prepare`; with scores where `block_map` is None.
        layout: Where the `N` tokens lie.
        block_map: Blocks to keep; None selects them here.
        keep_ratio: Share of video key blocks that a new selection keeps.
        budget: Rows that share the budget of a new selection: "row", "head" or "layer".
        selection: What a new selection keeps: the most "mass", or the largest "error" of the tail.
        tail: What stands for the blocks that are not kept: None, pools' "mean", or "moment".
        tail_pool: Keys of one pool; divides the layout's key block.
        text_lengths: `[B]` valid text tokens per batch row; None means all.
        precision: Of the kernel's products: "full", "fp8" or "int8".
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
        spread = None
        if selection == "error":
            spread = _spread(q, k, v, layout, tail_pool, text_lengths, scale)
        selected = _select(prepared.scores, spread, layout, keep_ratio, budget, text_lengths)
        block_map = selected.block_map
    pools = None
    if tail is not None:
        lengths = layout.lengths(tail_pool, text_lengths)
        energy = _energy(q, layout, scale) if tail == "moment" else None
        pools = pool_tail(k, v, pool=tail_pool, lengths=lengths, energy=energy)
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
        output_order=layout.target(prepared.choice),
        out=out.transpose(1, 2),
        precision=precision,
        backend=backend,
    )
    return out, selected


def _score(
    q_tiles: Tensor, k_tiles: Tensor, layout: TokenLayout, text_lengths: Tensor | None
) -> Tensor:
    video = layout.video_slots // layout.tile_size
    key_lengths = layout.lengths(layout.tile_size, text_lengths)
    return score_blocks(
        q_tiles[:, :, :video].contiguous(),
        k_tiles,
        key_lengths[:, :video],
        key_lengths,
        tiles_per_query_block=layout.query_block // layout.tile_size,
        tiles_per_key_block=layout.key_block // layout.tile_size,
        scale=q_tiles.shape[-1] ** -0.5,
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


def _energy(q: Tensor, layout: TokenLayout, scale: float) -> Tensor:
    """Mean squares of the video's scaled queries, `[B, H, D]` float32, from every 16th of them."""
    sample = q[:, :, : layout.geometry.video_tokens : 16]
    wide = torch.promote_types(q.dtype, torch.float32)
    norms = torch.linalg.vector_norm(sample, dim=2, dtype=wide)
    return norms.square_().mul_(scale**2 / sample.shape[2]).float()


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
        num_video_key_blocks=layout.video_key_blocks,
        num_text_query_blocks=text // layout.query_block,
        num_text_key_blocks=text // layout.key_block,
        query_block=layout.query_block,
        key_block=layout.key_block,
        budget=budget,
    )
