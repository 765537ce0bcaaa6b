"""Recall, its estimate and its bounds, against sums written out in float64."""

import math

import pytest
import torch
from tiny_pipelines import FAMILIES, run

import dfsattn_diffusers.analysis.recall
from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn
from dfsattn_diffusers.analysis import (
    block_logits,
    estimated_recall,
    exact_recall,
    frame_starts,
    key_radius,
    map_density,
    measure_recall,
    recall_bound,
    view_map,
)
from dfsattn_diffusers.attention import prepare, sparse_attention
from dfsattn_diffusers.kernels.prologue import Stream
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)
ROUNDING = 1e-9
ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]

# Batch, heads, rows, head dim, and the real keys of each block; blocks hold 8.
SHAPES = [
    (1, 1, 1, 1, [[8]]),
    (1, 2, 5, 16, [[8, 8, 8, 8, 3]]),
    (2, 3, 7, 24, [[8, 1, 8, 0], [8, 8, 0, 5]]),
    (2, 1, 3, 64, [[0, 0, 0, 0, 0, 0, 1]]),
    (1, 4, 9, 8, [[1, 1, 1, 1, 1, 1, 1, 1, 1]]),
]
# From uniform attention to one-hot: logits of a tenth to thousands.
SHARPNESS = [0.0, 0.1, 1.0, 30.0, 1000.0]
SIZE = 8


def random_call(shape, sharpness, dtype=torch.float64, seed=0):
    batch, heads, rows, head_dim, lengths = shape
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    blocks = len(lengths[0])
    centres = torch.randn(batch, heads, blocks, 1, head_dim, **draw)
    k = centres + 0.5 * torch.randn(batch, heads, blocks, SIZE, head_dim, **draw)
    q = sharpness * torch.randn(batch, heads, rows, head_dim, **draw)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    padding = torch.arange(SIZE) >= lengths[..., None]
    k = k.masked_fill(padding[:, None, :, :, None], math.nan).flatten(2, 3)
    kept = torch.rand(batch, heads, rows, blocks, generator=generator) < 0.4
    return q.to(dtype), k.to(dtype), lengths, kept


def all_values(q, k, lengths, kept, scale):
    logits = block_logits(q, k, lengths, scale=scale)
    wide = lengths[:, None, None]
    reach = scale * q.to(logits.mean.dtype).norm(dim=-1)[..., None]
    reach = reach * key_radius(k, lengths)[:, :, None]
    return {
        "cheap": recall_bound(logits.mean, reach, wide, kept),
        "bound": recall_bound(logits.mean, logits.deviation, wide, kept),
        "convex": recall_bound(logits.mean, logits.deviation, wide, kept, convex=True),
        "recall": exact_recall(logits.log_mass, kept),
    }


def written_out(q, k, lengths, kept, scale):
    """Recall of each row, one at a time."""
    batch, heads, rows, _ = q.shape
    lengths = lengths.expand(batch, -1)
    result = torch.ones(batch, heads, rows, dtype=torch.float64)
    for b in range(batch):
        real = [j * SIZE + i for j, n in enumerate(lengths[b].tolist()) for i in range(n)]
        block = torch.tensor(real) // SIZE
        for h in range(heads):
            for r in range(rows):
                weights = (k[b, h, real].double() @ q[b, h, r].double() * scale).softmax(0)
                result[b, h, r] = weights[kept[b, h, r, block]].sum()
    return result


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recall_and_its_bounds(shape, sharpness):
    for seed in range(4):
        q, k, lengths, kept = random_call(shape, sharpness, seed=seed)
        values = all_values(q, k, lengths, kept, scale=shape[3] ** -0.5)
        wanted = written_out(q, k, lengths, kept, scale=shape[3] ** -0.5)
        some = (kept & (lengths[:, None, None] > 0)).any(-1)
        torch.testing.assert_close(values["recall"], wanted, atol=ROUNDING, rtol=0)
        assert (values["cheap"] >= 0).all() and (values["recall"] <= 1).all()
        assert (values["cheap"] <= values["bound"] + ROUNDING).all()
        assert (values["bound"] <= values["convex"] + ROUNDING).all()
        assert (values["convex"] <= wanted + ROUNDING).all()
        assert (values["recall"][~some] == 0).all() or not lengths.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharpness", SHARPNESS[:4])
def test_low_precision_inputs(sharpness, dtype):
    """Against float64 on the same numbers; logits round by their size times float32's step."""
    shape = SHAPES[2]
    q, k, lengths, kept = random_call(shape, sharpness, dtype)
    values = all_values(q, k, lengths, kept, scale=shape[3] ** -0.5)
    exact = all_values(q.double(), k.double(), lengths, kept, scale=shape[3] ** -0.5)
    largest = q.double().norm(dim=-1).max() * k.double().nan_to_num().norm(dim=-1).max()
    rounding = shape[3] * torch.finfo(torch.float32).eps * (1 + largest * shape[3] ** -0.5)
    for name, value in values.items():
        assert value.dtype == torch.float32
        assert (value - exact[name]).abs().max() <= rounding
    assert (values["convex"] <= values["recall"] + rounding).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeping_everything_or_nothing(shape):
    q, k, lengths, kept = random_call(shape, 30.0)
    for value in all_values(q, k, lengths, torch.ones_like(kept), scale=1.0).values():
        assert (value == 1).all()
    for value in all_values(q, k, lengths, torch.zeros_like(kept), scale=1.0).values():
        assert (value == 0).all()
    # Without any key there is nothing to lose.
    for value in all_values(q, k, torch.zeros_like(lengths), kept, scale=1.0).values():
        assert (value == 1).all()


def test_one_hot():
    k = torch.zeros(1, 1, 4 * SIZE, 4, dtype=torch.float64)
    k[0, 0, 2 * SIZE + 3, 1] = 1e4
    q = torch.eye(4, dtype=torch.float64)[None, None, 1:2] * 1e4
    lengths = torch.full((1, 4), SIZE)
    for j in range(4):
        kept = torch.arange(4) == j
        recall = exact_recall(block_logits(q, k, lengths, scale=0.5).log_mass, kept)
        assert float(recall) == (j == 2)


def test_bounds_are_reached():
    """Equal logits within blocks: all agree. Pairs at equal distance: the convex one still does."""
    lengths = torch.tensor([[SIZE, SIZE, SIZE]])
    kept = torch.tensor([True, False, False])
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64).repeat_interleave(SIZE)
    values = all_values(q, k.view(1, 1, -1, 1), lengths, kept, scale=1.0)
    for value in values.values():
        torch.testing.assert_close(value, values["recall"], atol=1e-12, rtol=0)
    k[SIZE:] += 1.5 * torch.tensor([1.0, -1.0]).repeat(SIZE)
    values = all_values(q, k.view(1, 1, -1, 1), lengths, kept, scale=1.0)
    torch.testing.assert_close(values["convex"], values["recall"], atol=1e-12, rtol=0)
    assert values["cheap"] == values["bound"] < values["convex"] - 0.01


def test_slices_do_not_matter(monkeypatch):
    q, k, lengths, kept = random_call(SHAPES[2], 1.0)
    whole = all_values(q, k, lengths, kept, scale=1.0)
    monkeypatch.setattr(dfsattn_diffusers.analysis.recall, "_CHUNK_BYTES", 1)
    for name, value in all_values(q, k, lengths, kept, scale=1.0).items():
        torch.testing.assert_close(value, whole[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finer_pieces_have_the_same_recall(shape):
    """Statistics of parts of blocks bound the same recall, and join to those of blocks."""
    q, k, lengths, kept = random_call(shape, 3.0)
    whole = all_values(q, k, lengths, kept, scale=0.3)
    halves = torch.stack([lengths.clamp(max=4), lengths.sub(4).clamp(min=0)], -1).flatten(1)
    finer = all_values(q, k, halves, kept.repeat_interleave(2, -1), scale=0.3)
    torch.testing.assert_close(finer["recall"], whole["recall"], atol=ROUNDING, rtol=0)
    assert (finer["convex"] <= whole["recall"] + ROUNDING).all()
    assert (finer["cheap"] <= finer["bound"] + ROUNDING).all()

    joined = block_logits(q, k, halves, scale=0.3).joined(halves, 2)
    wanted = block_logits(q, k, lengths, scale=0.3)
    for name in ("log_mass", "mean", "low", "high", "deviation"):
        got = getattr(joined, name)
        torch.testing.assert_close(got, getattr(wanted, name), atol=1e-12, rtol=0)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"k must hold 3 blocks of equal size.* got 8 keys; pad"):
        block_logits(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 8, 4), torch.ones(1, 3), scale=1)


GEOMETRIES = [
    TokenGeometry((3, 5, 7)),
    TokenGeometry((3, 5, 7), text_tokens=41, text_first=True),
    TokenGeometry((4, 4, 4), text_tokens=20),
]


@pytest.mark.parametrize("blocks", [(32, 32), (32, 16), (16, 32)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_one_call(device, geometry, blocks):
    """Over all query blocks, estimate and density are those of the selection."""
    sizes = dict(tile_size=8, query_block=blocks[0], key_block=blocks[1])
    layout = TokenLayout.build(geometry, order="hilbert3d", **sizes, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, geometry.tokens, 3, 16, generator=generator).to(device)
    padded = geometry.text_tokens and not geometry.text_first
    text_lengths = torch.tensor([7, 0], device=device) if padded else None
    prepared = prepare([Stream(2 * q, k, k)], layout, text_lengths=text_lengths)
    _, selection = sparse_attention(
        prepared, layout, keep_ratio=0.4, budget="layer", text_lengths=text_lengths
    )
    chosen = range(-(-geometry.video_tokens // blocks[0]))
    call = (prepared.q, prepared.k, layout, selection.block_map)
    measures = measure_recall(*call, chosen, text_lengths)
    assert measures.recall.shape == (2, 3, len(chosen))
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(measures.estimate.mean(), selection.recall, **close)
    density = map_density(selection.block_map, layout, text_lengths)
    torch.testing.assert_close(density.mean(), selection.density, **close)
    # Some blocks alone get the same values as among all.
    some = measure_recall(*call, [chosen[-1], 0], text_lengths)
    torch.testing.assert_close(some.recall, measures.recall[..., [-1, 0]], **close)
    torch.testing.assert_close(some.estimate, measures.estimate[..., [-1, 0]], **close)

    view = view_map(*call, head=1, text_lengths=text_lengths)
    mask = selection.block_map.to_mask()[:, 1].cpu()
    assert torch.equal(view.mask, mask)
    shares = estimated_recall(view.scores[:, chosen], mask[:, chosen])
    torch.testing.assert_close(shares, measures.estimate[:, 1].cpu(), **close)
    with pytest.raises(ValueError, match="head must be from 0 to 2, got 3"):
        view_map(*call, head=3)


def real_calls(pipe):
    """Queries, keys, layout, map and text lengths of every sparse call of a run."""
    calls = []
    with enable_dfsattn(pipe, SPARSE) as handle:
        state = handle.state

        def keep(layer, query, key, block_map, choice):
            lengths = state.forward.text_lengths(state.forward.device)
            calls.append((query, key, state.layout(query.device), block_map, lengths))

        state.observer = keep
        run(pipe)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_real_queries_and_keys(family):
    calls = real_calls(FAMILIES[family]())
    assert calls
    for query, key, layout, block_map, text_lengths in calls[::3]:
        geometry, size = layout.geometry, layout.query_block
        chosen = range(-(-geometry.video_tokens // size))
        measures = measure_recall(query, key, layout, block_map, chosen, text_lengths)

        # In the model's order, without a curve: who may see whom, and the whole softmax.
        slot = layout.restore()
        query, key = map(layout.from_curve, (query, key))
        kept = block_map.to_mask()[:, :, slot // size][..., slot // layout.key_block]
        logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double())
        logits = logits * query.shape[-1] ** -0.5
        if text_lengths is not None:
            hidden = torch.arange(geometry.tokens) >= geometry.video_tokens + text_lengths[:, None]
            logits = logits.masked_fill(hidden[:, None, None], -math.inf)
        rows = (logits.softmax(-1) * kept).sum(-1)
        for block in chosen:
            members = (slot // size == block) & (slot < geometry.video_tokens)
            wanted = rows[:, :, members].mean(-1)
            got = measures.recall[..., block].double()
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)

        assert (measures.bound_cheap <= measures.bound + 1e-5).all()
        assert (measures.bound <= measures.bound_convex + 1e-5).all()
        assert (measures.bound_convex <= measures.recall + 1e-5).all()
        assert (measures.bound_tiles <= measures.recall + 1e-5).all()
        assert (measures.recall <= 1).all() and (measures.bound_cheap >= 0).all()
        assert measures.estimate.isfinite().all()


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("order", ["hilbert3d", "hilbert2d", "hilbert_fw", "cuboid", "raster"])
def test_frame_starts(order, text_first):
    grid = (9, 5, 9)
    geometry = TokenGeometry(grid, text_tokens=4, text_first=text_first)
    layout = TokenLayout.build(geometry, order=order, tile_size=4, query_block=8, key_block=8)
    frame = (layout.target()[: geometry.video_tokens] - 4 * text_first) // (grid[1] * grid[2])
    wanted = [s for s in range(1, len(frame)) if frame[:s].max() < frame[s:].min()]
    assert list(frame_starts(layout)) == wanted
    if order in ("raster", "hilbert2d"):
        assert wanted == [45 * f for f in range(1, 9)]
    if order == "cuboid":
        assert wanted == [45 * 4, 45 * 8]
