"""One attention call, measured on some of its query blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMap
from ..kernels.prologue import pool_tiles
from ..layout import TokenLayout
from ..score import score_blocks
from .recall import block_logits, estimated_recall, exact_recall, key_radius, recall_bound

MEASURES = ("recall", "estimate", "bound", "bound_convex", "bound_tiles", "bound_cheap")


@dataclass(frozen=True)
class Measures:
    """Recall of `M` query blocks, each the mean over its rows; all are `[B, H, M]`.

    Attributes:
        recall: Share of the true attention mass inside the kept blocks.
        estimate: The same share by the block scores, of the same queries and keys.
        bound: Below recall: `recall_bound` with each row's largest deviation.
        bound_convex: Below recall: the same, with the mean put to use.
        bound_tiles: Below recall: the convex one over tiles in place of key blocks.
        bound_cheap: Below recall: `recall_bound` with the deviation from `key_radius`.
    """

    recall: Tensor
    estimate: Tensor
    bound: Tensor
    bound_convex: Tensor
    bound_tiles: Tensor
    bound_cheap: Tensor


@dataclass(frozen=True)
class MapView:
    """What a picture of one head's block map needs.

    Attributes:
        mask: `[B, nQ, nK]` bool, kept blocks.
        scores: `[B, nQv, nK]` block scores of the video's query blocks.
        frames: Slots at which a frame begins that no earlier slot belongs to, in the first batch
            row.
        text: Slot at which text begins; None without text.
        query_block, key_block: Slots per block.
    """

    mask: Tensor
    scores: Tensor
    frames: tuple[int, ...]
    text: int | None
    query_block: int
    key_block: int


def measure_recall(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    block_map: BlockMap,
    query_blocks: Sequence[int],
    text_lengths: Tensor | None = None,
) -> Measures:
    """Measure a block map on some of the video's query blocks. Nothing waits for the device.

    Args:
        query, key: `[B, H, P, D]` in curve order, as `sparse_attention` gets them.
        layout: Where the `N` tokens lie.
        block_map: Kept blocks.
        query_blocks: The `M` query blocks, each with at least one video token.
        text_lengths: `[B]` valid text tokens per batch row; None means all.
    """
    scale, size = query.shape[-1] ** -0.5, layout.query_block
    key_lengths = layout.lengths(layout.key_block, text_lengths)
    tile_lengths = layout.lengths(layout.tile_size, text_lengths)
    tiles_per_block = layout.key_block // layout.tile_size
    kept = block_map.to_mask()
    scores = _scores(query, key, layout, query_blocks, text_lengths, scale)
    radius = key_radius(key, key_lengths)[:, :, None]
    per_block = []
    for i, block in enumerate(query_blocks):
        end = min(layout.geometry.video_tokens, (block + 1) * size)
        q = query[:, :, block * size : end]
        mask = kept[:, :, block : block + 1]
        tiles = block_logits(q, key, tile_lengths, scale=scale)
        blocks = tiles.joined(tile_lengths, tiles_per_block)
        reach = scale * q.to(radius.dtype).norm(dim=-1)[..., None] * radius
        in_blocks = key_lengths[:, None, None], mask
        in_tiles = tile_lengths[:, None, None], mask.repeat_interleave(tiles_per_block, -1)
        recall, *bounds = (
            exact_recall(blocks.log_mass, mask),
            recall_bound(blocks.mean, blocks.deviation, *in_blocks),
            recall_bound(blocks.mean, blocks.deviation, *in_blocks, convex=True),
            recall_bound(tiles.mean, tiles.deviation, *in_tiles, convex=True),
            recall_bound(blocks.mean, reach, *in_blocks),
        )
        estimate = estimated_recall(scores[:, :, i], kept[:, :, block])
        per_block.append((recall.mean(-1), estimate, *(bound.mean(-1) for bound in bounds)))
    return Measures(*(torch.stack(blocks, -1) for blocks in zip(*per_block)))


def map_density(block_map: BlockMap, layout: TokenLayout, text_lengths: Tensor | None) -> Tensor:
    """Attention work relative to dense, `[B, H]`; its mean is `Selection.density`."""
    queries, keys = (
        layout.lengths(size, text_lengths).float()
        for size in (layout.query_block, layout.key_block)
    )
    kept_keys = (block_map.to_mask() * keys[:, None, None]).sum(-1)
    dense = queries.sum(-1) * keys.sum(-1)
    return (kept_keys * queries[:, None]).sum(-1) / dense[:, None]


def view_map(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    block_map: BlockMap,
    head: int,
    text_lengths: Tensor | None = None,
    choice: Tensor | None = None,
) -> MapView:
    """The block map of one head beside the scores of its current queries and keys.

    Args as in `measure_recall`; `choice` is `[B, H]`, the curve of each head, or None for the
    first. Waits for the device.

    Raises:
        ValueError: There is no such head.
    """
    if not 0 <= head < query.shape[1]:
        raise ValueError(f"head must be from 0 to {query.shape[1] - 1}, got {head}")
    query, key = query[:, head : head + 1], key[:, head : head + 1]
    blocks = range(layout.video_slots // layout.query_block)
    scale = query.shape[-1] ** -0.5
    scores = _scores(query, key, layout, blocks, text_lengths, scale)
    return MapView(
        mask=block_map.to_mask()[:, head].cpu(),
        scores=scores[:, 0].cpu(),
        frames=frame_starts(layout, 0 if choice is None else int(choice[0, head])),
        text=layout.video_slots if layout.geometry.text_tokens else None,
        query_block=layout.query_block,
        key_block=layout.key_block,
    )


def frame_starts(layout: TokenLayout, curve: int = 0) -> tuple[int, ...]:
    """Slots at which all later video tokens belong to later frames than all earlier ones do."""
    geometry = layout.geometry
    position = layout.targets[curve, : geometry.video_tokens].cpu()
    if geometry.text_first:
        position = position - geometry.text_tokens
    frame = position // (geometry.grid[1] * geometry.grid[2])
    latest_before = frame.cummax(0).values[:-1]
    earliest_after = frame.flip(0).cummin(0).values.flip(0)[1:]
    return tuple((torch.nonzero(earliest_after > latest_before).flatten() + 1).tolist())


def _scores(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    query_blocks: Sequence[int],
    text_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """Block scores of some query blocks, `[B, H, M, nK]`."""
    tile, size = layout.tile_size, layout.query_block
    queries = torch.cat([query[:, :, b * size : (b + 1) * size] for b in query_blocks], 2)
    key_lengths = layout.lengths(tile, text_lengths)
    per_block = size // tile
    query_lengths = torch.cat(
        [key_lengths[:, b * per_block : (b + 1) * per_block] for b in query_blocks], 1
    )
    return score_blocks(
        pool_tiles(queries, query_lengths),
        pool_tiles(key, key_lengths),
        query_lengths,
        key_lengths,
        tiles_per_query_block=per_block,
        tiles_per_key_block=layout.key_block // tile,
        scale=scale,
    )
