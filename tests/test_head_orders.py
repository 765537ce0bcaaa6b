"""Heads that take different curves."""

import pytest
import torch
from tiny_pipelines import FAMILIES, run

from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn
from dfsattn_diffusers.attention import prepare, sparse_attention
from dfsattn_diffusers.kernels.prologue import Stream
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout

CURVES = ("hilbert3d", "hilbert2d", "hilbert_fw", "hilbert_fh")
TEXTS = [(0, False), (21, False), (21, True)]
SIZES = dict(tile_size=4, query_block=32, key_block=16)
SPARSE = DFSAttnConfig(
    keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32, order=CURVES
)


def layout_of(text, order=CURVES, grid=(6, 7, 9)):
    return TokenLayout.build(TokenGeometry(grid, *text), order=order, **SIZES)


def heads_along_curves(geometry, heads):
    """Queries and keys where head h attends to what is near along all axes but the h-th."""
    make = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(n) for n in geometry.grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], 1).float()
    text = torch.randn(geometry.text_tokens, 3, generator=make)
    places = torch.cat([text, places] if geometry.text_first else [places, text])
    streams = []
    for h in range(heads):
        reach = torch.ones(3)
        if h:
            reach[h - 1] = 100.0
        waves = torch.randn(3, 16, generator=make) / reach[:, None] / 2
        phase = places @ waves
        streams.append(torch.cat([phase.cos(), phase.sin()], 1))
    qk = torch.stack(streams, 1)[None].repeat(2, 1, 1, 1) * 4
    return qk, torch.randn(qk.shape, generator=make)


def call_of(text, keep_ratio):
    """A layout, `prepare`'s streams, and what they are prepared and attended with."""
    layout = layout_of(text)
    x, v = heads_along_curves(layout.geometry, 4)
    text_lengths = torch.tensor([9, 21]) if text[0] else None
    return layout, [Stream(x, x, v)], dict(text_lengths=text_lengths, keep_ratio=keep_ratio)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_reorder_then_restore_is_identity(text):
    layout = layout_of(text)
    choice = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]])
    x = torch.randn(2, layout.geometry.tokens, 4, 3)
    curve = layout.to_curve(x, choice)
    assert torch.equal(layout.from_curve(curve, choice), x)
    for b, h in ((0, 2), (1, 0)):
        alone = layout_of(text, CURVES[choice[b, h]])
        real = alone.target() >= 0
        assert torch.equal(alone.to_curve(x)[b, h][real], curve[b, h][real])
        assert torch.equal(layout.target(choice)[b, h], alone.target())
        assert torch.equal(layout.restore(choice)[b, h], alone.restore())


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_padding_is_at_the_same_slots(text):
    layout = layout_of(text)
    padding = layout.targets < 0
    assert torch.equal(padding, padding[:1].expand_as(padding))
    assert layout.targets.unique(dim=0).shape[0] == len(CURVES)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_every_head_takes_the_curve_that_keeps_most(text):
    layout, streams, how = call_of(text, 0.2)
    prepared = prepare(streams, layout, **how)
    video = layout.video_key_blocks
    kept, scores = [], []
    for name in CURVES:
        alone = prepare(streams, layout_of(text, name), **how)
        scores.append(alone.scores)
        count = max(1, int(0.2 * video))
        best = alone.scores[..., :video].sort(-1, descending=True).values[..., :count]
        kept.append(best.sum((2, 3)) / alone.scores.sum((2, 3)))
    wanted = torch.stack(kept).argmax(0)
    assert torch.equal(prepared.choice, wanted)
    assert wanted.unique().numel() > 1
    rows, heads = torch.meshgrid(torch.arange(2), torch.arange(4), indexing="ij")
    assert torch.equal(prepared.scores, torch.stack(scores)[wanted, rows, heads])


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_each_head_is_as_if_alone_on_its_curve(text):
    layout, streams, how = call_of(text, 0.3)
    x, v, text_lengths = streams[0].q, streams[0].v, how["text_lengths"]
    tail = dict(tail="mean", tail_pool=8, selection="error")
    prepared = prepare(streams, layout, **how)
    out, selected = sparse_attention(prepared, layout, **how, **tail)
    for b in range(2):
        for h, curve in enumerate(prepared.choice[b].tolist()):
            one = layout_of(text, CURVES[curve])
            part = (slice(b, b + 1), slice(None), slice(h, h + 1))
            at = how | dict(text_lengths=None if text_lengths is None else text_lengths[b : b + 1])
            alone = prepare([Stream(x[part], x[part], v[part])], one, **at)
            wanted, its = sparse_attention(alone, one, **at, **tail)
            mask = selected.block_map.to_mask()[b, h]
            assert torch.equal(mask, its.block_map.to_mask()[0, 0])
            torch.testing.assert_close(out[part], wanted)
    # The map is of use along these curves alone.
    again = prepare(streams, layout, scored=False, choice=prepared.choice)
    assert again.scores is None
    reused, _ = sparse_attention(again, layout, selected.block_map, **how, **tail)
    assert torch.equal(reused, out)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_pipeline(family):
    pipe = FAMILIES[family]()
    dense = run(pipe)
    with enable_dfsattn(pipe, SPARSE) as handle:
        first, second = run(pipe), run(pipe)
    assert torch.equal(first, second) and first.isfinite().all()
    with enable_dfsattn(pipe, SPARSE, order="hilbert3d") as single:
        one = run(pipe)
    assert not torch.equal(first, one) and not torch.equal(first, dense)
    report, its = handle.report().runs[-1], single.report().runs[-1]
    # Blocks that are not full lie elsewhere.
    assert report.density == pytest.approx(its.density, rel=0.01)
    assert report.recall >= its.recall - 0.01


def test_config():
    config = DFSAttnConfig(order=["hilbert3d", "raster"])
    assert config.order == ("hilbert3d", "raster")
    assert DFSAttnConfig.from_dict(config.to_dict()) == config
    for wrong in ((), ("hilbert3d", "peano"), ("raster", "raster")):
        with pytest.raises(ValueError, match="order must be one of hilbert3d, .* or several diff"):
            DFSAttnConfig(order=wrong)
    with pytest.raises(TypeError, match="order must be a sequence of names; got 3"):
        DFSAttnConfig(order=3)
