"""Hierarchical scores: tiles of a few tokens are compared, blocks of tiles are ranked."""

from __future__ import annotations

from torch import Tensor

from .kernels import pool_moments
from .kernels.fast import fast

# Largest slice of the tile affinity that is in memory at a time.
_CHUNK_BYTES = 128 * 2**20


def score_blocks(
    query_tiles: Tensor,
    key_tiles: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    tiles_per_query_block: int,
    tiles_per_key_block: int,
    scale: float,
) -> Tensor:
    """Share of attention that each key block is estimated to get from each query block.

    Tile affinity is the softmax over all key tiles of `q_tile . k_tile * scale`. A block's score
    is its sum over the block's tiles, averaged over the query tiles, so that rows sum to 1 (Hu et
    al., arXiv 2605.23445). The tile matrix exists in slices of query blocks only, and on a GPU with
    Triton not at all.

    Args:
        query_tiles: `[B, H, Tq, D]` float32.
        key_tiles: `[B, H, Tk, D]` float32.
        query_lengths: `[B or 1, Tq]`, tokens per query tile; empty tiles do not count.
        key_lengths: `[B or 1, Tk]`, tokens per key tile; empty tiles get nothing.
        tiles_per_query_block: Divides `Tq`.
        tiles_per_key_block: Divides `Tk`.
        scale: Of the logits, as in the attention itself.

    Returns:
        `[B, H, nQ, nK]` float32.
    """
    kernels = fast("tile_scores", query_tiles)
    if kernels and kernels.can_score(query_tiles, tiles_per_query_block, tiles_per_key_block):
        return kernels.block_scores(
            query_tiles,
            key_tiles,
            query_lengths,
            key_lengths,
            tiles_per_query_block=tiles_per_query_block,
            tiles_per_key_block=tiles_per_key_block,
            scale=scale,
        )
    batch, heads, num_query_tiles, _ = query_tiles.shape
    num_key_tiles = key_tiles.shape[2]
    keys = key_tiles.transpose(2, 3) * scale
    empty = (key_lengths == 0)[:, None, None, :]
    weight = (query_lengths > 0).float().unflatten(1, (-1, tiles_per_query_block))
    weight = weight / weight.sum(2, keepdim=True).clamp(min=1)

    row_bytes = batch * heads * tiles_per_query_block * num_key_tiles * 4
    rows = max(1, _CHUNK_BYTES // row_bytes)
    num_query_blocks = num_query_tiles // tiles_per_query_block
    scores = query_tiles.new_empty(
        batch, heads, num_query_blocks, num_key_tiles // tiles_per_key_block
    )
    for start in range(0, num_query_blocks, rows):
        stop = min(start + rows, num_query_blocks)
        tiles = query_tiles[:, :, start * tiles_per_query_block : stop * tiles_per_query_block]
        affinity = (tiles @ keys).masked_fill_(empty, float("-inf")).softmax(-1)
        per_block = affinity.unflatten(3, (-1, tiles_per_key_block)).sum(4)
        per_block = per_block.unflatten(2, (-1, tiles_per_query_block))
        scores[:, :, start:stop] = (per_block * weight[:, None, start:stop, :, None]).sum(3)
    return scores


def pool_spread(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Tensor,
    pool_lengths: Tensor,
    *,
    pools_per_key_block: int,
    scale: float,
) -> Tensor:
    """How far pools of keys and values are from the tokens that they stand for.

    The standard deviation of a query's logits within a pool, `scale * sqrt(sum_d q_d^2 var_d(k))`,
    times that of the values, `sqrt(sum_d var_d(v))`: to first order, the error of attention that
    the pool would make per unit of its mass. Squares are averaged over a query block's queries and
    over a key block's tokens.

    Args:
        q: `[B, H, Pq, D]`.
        k, v: `[B, H, Pk, D]`.
        query_lengths: `[B or 1, nQ]` int32, real queries at the front of each query block.
        pool_lengths: `[B or 1, P]` int32, real keys at the front of each pool.
        pools_per_key_block: Divides `P`.
        scale: Of the logits.

    Returns:
        `[B, H, nQ, nK]` float32, not negative; 0 for blocks without keys or queries.
    """
    mean, variance = _moments(q, query_lengths)
    energy = variance + mean.square()
    weight = pool_lengths.float().unflatten(1, (-1, pools_per_key_block))
    weight = (weight / weight.sum(2, keepdim=True).clamp(min=1))[:, None, ..., None]

    def of_blocks(x):
        _, variance = _moments(x, pool_lengths)
        return (variance.unflatten(2, (-1, pools_per_key_block)) * weight).sum(3).float()

    values = of_blocks(v).sum(-1)
    return (energy.float() @ of_blocks(k).transpose(2, 3) * values[:, :, None]).sqrt_().mul_(scale)


def _moments(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return pool_moments(x, pool=x.shape[2] // lengths.shape[1], lengths=lengths)
