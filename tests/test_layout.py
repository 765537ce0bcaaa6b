import pytest
import torch

from dfsattn_diffusers.layout import TokenGeometry, TokenLayout

GRIDS = [(13, 30, 45), (21, 45, 80), (33, 45, 80), (1, 7, 9), (5, 1, 3)]
TEXTS = [(0, False), (77, False), (226, True), (256, False)]


def build(grid, text=(0, False), query_block=128, key_block=128, order="hilbert3d"):
    geometry = TokenGeometry(grid, *text)
    return TokenLayout.build(
        geometry, order=order, tile_size=16, query_block=query_block, key_block=key_block
    )


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_reorder_then_restore_is_identity(grid, text):
    layout = build(grid, text)
    x = torch.randn(1, layout.geometry.tokens, 2, 3)
    curve = layout.to_curve(x)
    assert curve.shape == (1, 2, layout.slots, 3) and curve.is_contiguous()
    assert torch.equal(layout.from_curve(curve), x)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_target_scatters_to_the_models_order(text):
    layout = build((5, 9, 11), text)
    x = torch.randn(2, layout.geometry.tokens, 2, 3)
    curve, real = layout.to_curve(x), layout.target() >= 0
    out = torch.full_like(x, float("nan"))
    out[:, layout.target()[real].long()] = curve[:, :, real].transpose(1, 2)
    assert torch.equal(out, x)
    assert curve.isfinite().all()


@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_text_and_video_never_share_a_block(text, blocks):
    layout = build((5, 9, 11), text, *blocks)
    first_text = 0 if text[1] else layout.geometry.video_tokens
    is_text = (layout.target() >= first_text) & (layout.target() < first_text + text[0])
    for size in (16, *blocks):
        kinds = is_text.view(-1, size)
        real = (layout.target() >= 0).view(-1, size)
        assert not ((kinds & real).any(1) & (~kinds & real).any(1)).any()
        assert torch.equal(layout.lengths(size)[0], real.sum(1).int())
        # Real tokens come first in every block.
        assert torch.equal(real, torch.arange(size) < real.sum(1, keepdim=True))
    assert (layout.lengths(layout.key_block)[0, : layout.full_key_blocks] == layout.key_block).all()


def test_lengths_follow_each_samples_text():
    layout = build((2, 5, 7), (200, False))
    lengths = layout.lengths(128, torch.tensor([200, 128, 3, 0]))
    assert lengths.tolist() == [[70, 128, 72], [70, 128, 0], [70, 3, 0], [70, 0, 0]]
