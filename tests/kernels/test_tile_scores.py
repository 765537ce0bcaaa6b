"""Pooled tiles and block scores of the Triton kernels against the torch code of `score.py`."""

import pytest
import torch
from kernel_cases import ON_CUDA, RUNS, assert_close

from dfsattn_diffusers.score import score_blocks

tile_scores = pytest.importorskip("dfsattn_diffusers.kernels.tile_scores")

DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


def tiles(device, *, query_blocks=5, key_blocks=9, per_query=8, per_key=8, batch=2, head_dim=64):
    make = torch.Generator().manual_seed(query_blocks * 100 + key_blocks)
    q = torch.randn(batch, 3, query_blocks * per_query, head_dim, generator=make)
    k = torch.randn(batch, 3, key_blocks * per_key, head_dim, generator=make)
    query_lengths = torch.full((1, q.shape[2]), 16, dtype=torch.int32)
    key_lengths = torch.full((batch, k.shape[2]), 16, dtype=torch.int32)
    return [x.to(device) for x in (q, k, query_lengths, key_lengths)]


def check(q, k, query_lengths, key_lengths, per_query=8, per_key=8, scale=None):
    settings = dict(
        tiles_per_query_block=per_query,
        tiles_per_key_block=per_key,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    arguments = query_lengths, key_lengths
    got = tile_scores.block_scores(q, k, *arguments, **settings).cpu()
    # On the CPU these are torch code.
    arguments = [x.cpu() for x in arguments]
    exact = score_blocks(q.double().cpu(), k.double().cpu(), *arguments, **settings)
    # Eager code of the tiles' precision; the kernel rounds float32 tiles to float16.
    q, k = (x.half() if x.dtype == torch.float32 else x for x in (q.cpu(), k.cpu()))
    eager = score_blocks(q.float(), k.float(), *arguments, **settings)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    assert_close(got, exact, eager)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("query_blocks, key_blocks", [(1, 1), (5, 9), (17, 8), (8, 17)])
def test_scores(device, query_blocks, key_blocks):
    q, k, *lengths = tiles(device, query_blocks=query_blocks, key_blocks=key_blocks)
    scores = check(q, k, *lengths)
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))
    again = tile_scores.block_scores(
        q, k, *lengths, tiles_per_query_block=8, tiles_per_key_block=8, scale=q.shape[-1] ** -0.5
    )
    assert torch.equal(scores, again.cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_query, per_key", [(8, 4), (4, 8), (1, 1), (2, 16), (32, 32)])
def test_other_blocks(device, per_query, per_key):
    arguments = tiles(device, query_blocks=3, key_blocks=4, per_query=per_query, per_key=per_key)
    check(*arguments, per_query, per_key)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("device, dtype", RUNS)
def test_precisions(device, head_dim, dtype):
    q, k, *lengths = tiles(device, head_dim=head_dim)
    check(q.to(dtype), k.to(dtype), *lengths)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_tiles(device):
    """Ragged ends, a block without queries, one without keys, other lengths per batch row."""
    q, k, query_lengths, key_lengths = tiles(device)
    query_lengths[:, -11:-8], query_lengths[:, -8:] = 0, 0
    key_lengths[0, -3:], key_lengths[1, -20:], key_lengths[:, 8] = 0, 0, 3
    scores = check(q, k, query_lengths, key_lengths)
    assert not scores[:, :, -1].any() and not scores[1, :, :, -2:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_large_logits(device, scale):
    """Whole numbers, so that every precision has the same logits: rows become one-hot."""
    q, k, *lengths = tiles(device)
    check(q.round(), k.round(), *lengths, scale=scale)


@pytest.mark.parametrize("device", DEVICES)
def test_one_tile_gets_everything(device):
    q, k, *lengths = tiles(device)
    k[:, :, 21] = 100 * q[:, :, :1].mean(2)
    q[:] = q[:, :, :1]
    scores = check(q, k, *lengths)
    assert (scores[..., 21 // 8] > 0.99).all()


@pytest.mark.parametrize("device", DEVICES)
def test_beyond_the_range_of_float16(device):
    q, k, *lengths = tiles(device)
    k[:, :, 21] = 1e6 * q[:, :, :1].mean(2)
    settings = dict(tiles_per_query_block=8, tiles_per_key_block=8, scale=1.0)
    scores = tile_scores.block_scores(q, k, *lengths, **settings)
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))


def test_refuses_blocks_that_are_no_power_of_two():
    q, k, *lengths = tiles("cpu", per_query=3, query_blocks=8)
    with pytest.raises(ValueError, match="got 64, 3 and 8; use score.score_blocks"):
        tile_scores.block_scores(
            q, k, *lengths, tiles_per_query_block=3, tiles_per_key_block=8, scale=1.0
        )


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_no_tile_matrix(device):
    """What is new is far less than a matrix of tiles."""
    q, k, *lengths = tiles(device, query_blocks=200, key_blocks=200, batch=1)
    matrix = 4 * k.shape[1] * q.shape[2] * k.shape[2]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tile_scores.block_scores(
        q, k, *lengths, tiles_per_query_block=8, tiles_per_key_block=8, scale=1.0
    )
    assert torch.cuda.max_memory_allocated() - before <= matrix / 8
