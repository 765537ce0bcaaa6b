"""The maps against a slow, plain implementation of the paper, written from its sections 2.1-2.6."""

import math

import numpy as np
import pytest
import torch

from dfsattn_diffusers.attention import prepare, sparse_attention
from dfsattn_diffusers.curves import visiting_order
from dfsattn_diffusers.kernels.prologue import Stream
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout


def plain_paper_map(q, k, video, text, keep_ratio, tile, block):
    """Kept blocks and their scores for one head, in loops.

    Args:
        q, k: `[N, D]` float64 arrays in the model's order.
        video: Model positions of the video tokens along the curve.
        text: Model positions of the valid text tokens; text blocks follow the video's.
    """

    def pieces(positions, size):
        return [positions[i : i + size] for i in range(0, len(positions), size)]

    video_blocks, text_blocks = pieces(video, block), pieces(text, block)
    key_tiles = [
        (b, t) for b, blk in enumerate(video_blocks + text_blocks) for t in pieces(blk, tile)
    ]
    kept, all_scores = [], []
    for query_block in video_blocks:
        scores = np.zeros(len(video_blocks) + len(text_blocks))
        for query_tile in pieces(query_block, tile):
            q_mean = np.mean([q[i] for i in query_tile], axis=0)
            logits = [
                q_mean @ np.mean([k[j] for j in keys], axis=0) / math.sqrt(q.shape[1])
                for _, keys in key_tiles
            ]
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            for (b, _), weight in zip(key_tiles, weights):
                scores[b] += weight
        count = max(1, int(np.floor(keep_ratio * len(video_blocks) + 1e-6)))
        best = np.argsort(-scores[: len(video_blocks)], kind="stable")[:count]
        kept.append(set(best.tolist()) | {len(video_blocks) + t for t in range(len(text_blocks))})
        all_scores.append(scores / scores.sum())
    return kept, np.array(all_scores)


CASES = [
    ((5, 9, 11), (0, False), 16, 128),
    ((5, 9, 11), (41, False), 16, 128),
    ((3, 7, 13), (77, True), 16, 64),
    ((2, 5, 7), (9, True), 4, 16),
    ((1, 7, 9), (0, False), 8, 8),
    ((5, 1, 3), (5, False), 2, 4),
]


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("grid, text, tile, block", CASES, ids=str)
def test_maps_equal_the_papers(grid, text, tile, block, keep_ratio):
    torch.manual_seed(hash((grid, text, keep_ratio)) % 2**31)
    geometry = TokenGeometry(grid, *text)
    layout = TokenLayout.build(
        geometry, order="hilbert3d", tile_size=tile, query_block=block, key_block=block
    )
    batch, heads, dim = 2, 2, 16
    q, k, v = (3 * torch.randn(batch, geometry.tokens, heads, dim) for _ in range(3))
    valid = torch.tensor([text[0], text[0] // 2])
    prepared = prepare([Stream(q, k, v)], layout, text_lengths=valid)
    _, selection = sparse_attention(
        prepared, layout, keep_ratio=keep_ratio, text_lengths=valid, backend="reference"
    )
    mask = selection.block_map.to_mask()

    order = visiting_order("hilbert3d", grid)
    video = (order + (text[0] if text[1] else 0)).tolist()
    first_text = 0 if text[1] else geometry.video_tokens
    recalls = []
    for b in range(batch):
        text_positions = list(range(first_text, first_text + int(valid[b])))
        for h in range(heads):
            kept, scores = plain_paper_map(
                q[b, :, h].double().numpy(),
                k[b, :, h].double().numpy(),
                video,
                text_positions,
                keep_ratio,
                tile,
                block,
            )
            num_blocks = scores.shape[1]
            for i, wanted in enumerate(kept):
                got = set(mask[b, h, i].nonzero().flatten().tolist())
                empty_text = set(range(num_blocks, mask.shape[3]))
                assert got == wanted | empty_text, (b, h, i)
                recalls.append(sum(scores[i, j] for j in wanted))
            assert mask[b, h, len(kept) :].all()
    assert float(selection.recall) == pytest.approx(np.mean(recalls), rel=1e-4)


@pytest.mark.parametrize("budget", ["row", "head", "layer"])
def test_density_counts_token_pairs(budget):
    geometry = TokenGeometry((5, 9, 11), 41)
    layout = TokenLayout.build(
        geometry, order="hilbert3d", tile_size=16, query_block=64, key_block=64
    )
    q, k, v = torch.randn(3, 1, geometry.tokens, 3, 16).unbind(0)
    prepared = prepare([Stream(q, k, v)], layout)
    _, selection = sparse_attention(prepared, layout, keep_ratio=0.4, budget=budget)
    mask = selection.block_map.to_mask()[0].double()
    lengths = layout.lengths(64)[0].double()
    pairs = (mask * lengths[:, None] * lengths).sum() / mask.shape[0]
    assert float(selection.density) == pytest.approx(float(pairs) / geometry.tokens**2, rel=1e-5)


@pytest.mark.parametrize("budget", ["head", "layer"])
def test_shared_budgets_keep_as_much_in_all_and_more_of_the_mass(budget):
    torch.manual_seed(0)
    geometry = TokenGeometry((8, 12, 12))
    layout = TokenLayout.build(
        geometry, order="hilbert3d", tile_size=4, query_block=16, key_block=16
    )
    # Some heads are peaked, some are flat.
    q = torch.randn(1, geometry.tokens, 4, 16) * torch.tensor([0.5, 1, 3, 6])[:, None]
    k, v = torch.randn(2, 1, geometry.tokens, 4, 16).unbind(0)

    def select(budget):
        prepared = prepare([Stream(q, k, v)], layout)
        return sparse_attention(prepared, layout, keep_ratio=0.2, budget=budget)[1]

    row, shared = select("row"), select(budget)
    assert shared.recall > row.recall
    assert int(shared.block_map.counts.sum()) == int(row.block_map.counts.sum())
    assert int(shared.block_map.counts.min()) >= int(row.block_map.counts[0, 0, 0]) // 4
    if budget == "head":
        per_head = shared.block_map.counts.sum(2)
        assert torch.equal(per_head, row.block_map.counts.sum(2))
