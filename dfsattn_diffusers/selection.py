"""From block scores to the blocks that are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import BlockMap
from .kernels.fast import fast

# With a shared budget, the share of its own row budget that every row is sure of.
_ROW_FLOOR = 0.25


@dataclass(frozen=True)
class Selection:
    """What one attention call keeps.

    Attributes:
        block_map: The kept key blocks of every query block.
        density: 0-dim float32, attention work relative to dense.
        recall: 0-dim float32, estimated share of video queries' attention that is kept.
    """

    block_map: BlockMap
    density: Tensor
    recall: Tensor


def row_budget(keep_ratio: float, num_blocks: int) -> int:
    """Key blocks a row keeps: the ratio rounded down to whole blocks, at least one."""
    # The epsilon keeps 0.1 * 930 from becoming 92 in binary arithmetic.
    return max(1, math.floor(keep_ratio * num_blocks + 1e-6))


def select_blocks(
    scores: Tensor,
    spread: Tensor | None = None,
    *,
    keep_ratio: float,
    query_lengths: Tensor,
    key_lengths: Tensor,
    num_video_key_blocks: int,
    num_text_query_blocks: int,
    num_text_key_blocks: int,
    query_block: int,
    key_block: int,
    budget: str = "row",
) -> Selection:
    """Keep the highest-scored video blocks, all text keys, and everything for text queries.

    Args:
        scores: `[B, H, nQv, nK]` of the video query blocks over all key blocks, text last; rows
            sum to 1.
        spread: Of the scores' shape, the error per mass of what would stand for a block that is not
            kept; None keeps the highest scores, else those of highest score times spread are kept.
        keep_ratio: Share of the video key blocks to keep; text is outside this budget.
        query_lengths: `[B or 1, nQ]` real queries per query block, text last.
        key_lengths: `[B or 1, nK]` real keys per key block, text last.
        num_video_key_blocks: Leading key blocks that hold video tokens.
        num_text_query_blocks: Query blocks of text, at the end.
        num_text_key_blocks: Key blocks of text, at the end.
        query_block: Query tokens per block.
        key_block: Key tokens per block.
        budget: "row", "head" or "layer": rows among which the budget is shared. Batch rows never
            share.

    Returns:
        The selection; its block map has `nQ = nQv + num_text_query_blocks` rows.
    """
    batch, heads, num_rows, num_blocks = scores.shape
    text_start = num_blocks - num_text_key_blocks
    kept_per_row = row_budget(keep_ratio, num_video_key_blocks)

    mask = scores.new_zeros(
        batch, heads, num_rows + num_text_query_blocks, num_blocks, dtype=torch.bool
    )
    candidates = (scores if spread is None else scores * spread)[..., :num_video_key_blocks]
    mask[:, :, :num_rows, :num_video_key_blocks] = _keep_highest(candidates, kept_per_row, budget)
    mask[:, :, :, text_start:] = True
    mask[:, :, num_rows:] = True
    max_count = kept_per_row + num_text_key_blocks if budget == "row" else num_blocks
    block_map = BlockMap.from_mask(
        mask, query_block=query_block, key_block=key_block, max_count=max_count
    )
    recall = (scores * mask[:, :, :num_rows]).sum() / scores.sum()
    return Selection(block_map, _density(mask, query_lengths, key_lengths), recall)


def highest_share(scores: Tensor, keep_ratio: float, num_video_key_blocks: int) -> Tensor:
    """What the video blocks that each row would keep add up to, `[B, H]`: estimated recall.

    Args as in `select_blocks`, with a budget of each row's own.
    """
    video = scores[..., :num_video_key_blocks]
    mask = _keep_highest(video, row_budget(keep_ratio, num_video_key_blocks), "row")
    return (video * mask).sum((2, 3)) / scores.sum((2, 3))


def _keep_highest(scores: Tensor, kept_per_row: int, budget: str) -> Tensor:
    """Boolean mask of the highest scores: `kept_per_row` in each row, or as many in all."""
    sure = kept_per_row if budget == "row" else max(1, int(kept_per_row * _ROW_FLOOR))
    shared_from = 2 if budget == "head" else 1
    if kernels := fast("top_blocks", scores):
        return kernels.keep_highest(scores, sure, kept_per_row - sure, shared_from)
    mask = _top(scores, sure)
    if sure == kept_per_row:
        return mask
    rest = scores.masked_fill(mask, float("-inf")).flatten(shared_from)
    num_rows = math.prod(scores.shape[shared_from:-1])
    return mask | _top(rest, (kept_per_row - sure) * num_rows).view_as(scores)


def _top(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        mask.scatter_(-1, scores.topk(count, dim=-1, sorted=False).indices, True)
    return mask


def _density(mask: Tensor, query_lengths: Tensor, key_lengths: Tensor) -> Tensor:
    queries, keys = query_lengths.float(), key_lengths.float()
    per_row = torch.einsum("bhqk,bk->bhq", mask.float(), keys.expand(mask.shape[0], -1))
    work = (per_row * queries[:, None]).sum((1, 2))
    dense = mask.shape[1] * queries.sum(1) * keys.sum(1)
    return (work / dense).mean()
