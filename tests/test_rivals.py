"""The rivals of the fidelity benchmark: exact at full budget, costs counted right, rules kept."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dfsattn_diffusers import enable_dfsattn
from dfsattn_diffusers.layout import TokenGeometry

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import rival_attention  # noqa: E402
import rivals  # noqa: E402
from tiny_pipelines import FAMILIES, run  # noqa: E402

GEOMETRIES = {
    "video alone": (TokenGeometry((5, 9, 11)), None),
    "text after": (TokenGeometry((4, 8, 16), 37), [5, 37]),
    "text before": (TokenGeometry((3, 13, 17), 20, text_first=True), None),
}


@pytest.fixture(params=GEOMETRIES)
def case(request):
    """Geometry, text lengths, and q, k, v of two batch rows with some structure in space."""
    geometry, lengths = GEOMETRIES[request.param]
    generator = torch.Generator().manual_seed(3)
    smooth = torch.randn(2, 2, 8, 16, generator=generator)
    smooth = F.interpolate(smooth.flatten(0, 1).mT, size=geometry.tokens).mT
    smooth = smooth.unflatten(0, (2, 2))
    q, k, v = (smooth + torch.randn(smooth.shape, generator=generator) for _ in range(3))
    return geometry, None if lengths is None else torch.tensor(lengths), q, k, v


def valid_tokens(geometry, lengths):
    """`[B, N]`: what is not text padding."""
    valid = torch.ones(2, geometry.tokens, dtype=torch.bool)
    if lengths is not None:
        place = torch.arange(geometry.tokens) - geometry.video_tokens
        valid &= place < lengths[:, None]
    return valid


def dense(q, k, v, valid):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])


def seen_keys(rule, q, k, geometry, share, lengths=None):
    """Output whose values name their token (zeros widen q and k to fit), and the cost."""
    tokens, dim = geometry.tokens, q.shape[-1]
    v = torch.eye(tokens).expand(*q.shape[:2], -1, -1).contiguous()
    q, k = (F.pad(x, (0, tokens - dim)) for x in (q * math.sqrt(tokens / dim), k))
    return rule(q, k, v, geometry, share, lengths)


@pytest.mark.parametrize("name", rivals.RIVALS)
@pytest.mark.parametrize("chunk", [2**28, 2**12])
def test_full_budget_is_dense(name, case, chunk, monkeypatch):
    geometry, lengths, q, k, v = case
    for module in (rivals, rival_attention):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    out, cost = rivals.RIVALS[name](q, k, v, geometry, 1.0, lengths)
    valid = valid_tokens(geometry, lengths)
    expected = dense(q, k, v, valid)
    real = valid[:, None, :, None]
    torch.testing.assert_close(out * real, expected * real, atol=1e-5, rtol=1e-5)
    assert float(cost) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in rivals.RIVALS if "PISA" not in name])
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_cost_is_the_share_of_pairs_that_are_seen(name, case, share):
    """With values that name their token, the output tells which keys each query saw."""
    geometry, lengths, q, k, _ = case
    out, cost = seen_keys(rivals.RIVALS[name], q, k, geometry, share, lengths)
    valid = valid_tokens(geometry, lengths)
    seen = (out > 0) & valid[:, None, :, None]
    assert not (seen & ~valid[:, None, None]).any()
    pairs = seen.sum((1, 2, 3)) / 2 / valid.sum(1) ** 2
    assert float(cost) == pytest.approx(float(pairs.mean()), rel=1e-5)
    weights = seen * (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    expected = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    real = valid[:, None, :, None]
    torch.testing.assert_close(out * real, expected * real, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_cost_meets_the_share_on_larger_grids(name):
    geometry = TokenGeometry((9, 16, 16))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, geometry.tokens, 16, generator=generator) for _ in range(3))
    _, cost = rivals.RIVALS[name](q, k, v, geometry, 0.3)
    assert float(cost) == pytest.approx(0.3, rel=0.12)


def test_sliding_window_is_a_box_of_one_size():
    geometry = TokenGeometry((8, 8, 16))
    q = k = torch.zeros(1, 1, geometry.tokens, 16)
    out, _ = seen_keys(rivals.sliding_window, q, k, geometry, 0.2)
    seen = (out[0, 0] > 0).unflatten(1, geometry.grid)
    window = rivals.window_of(geometry.grid, 0.2)
    size = math.prod(window) * 128
    assert bool((seen.flatten(1).sum(1) == size).all())
    for row in seen[::97]:
        where = row.nonzero()
        extent = where.amax(0) - where.amin(0) + 1
        assert extent.tolist() == [w * t for w, t in zip(window, rival_attention.TILE)]


def test_tiles_hold_every_token_once_at_their_front():
    for grid in ((8, 16, 32), (5, 9, 11), (1, 1, 1)):
        tiles = rival_attention.tiles(grid)
        assert tiles[tiles >= 0].sort().values.tolist() == list(range(math.prod(grid)))
        assert bool(((tiles >= 0)[:, 1:] <= (tiles >= 0)[:, :-1]).all())


def test_radial_reach_halves_as_the_distance_doubles():
    bands = rivals.radial_bands(9, 64, 0.4)
    assert bands[0] == bands[1] and bands[2] == bands[3] == bands[1] // 2
    assert bands[4] == bands[7] == bands[1] // 4 and bands[8] == bands[1] // 8
    geometry = TokenGeometry((9, 8, 8))
    q = k = torch.zeros(1, 1, geometry.tokens, 16)
    out, _ = seen_keys(rivals.radial, q, k, geometry, 0.4)
    assert bool((out[0, 0, :, :64] > 0).all())  # the first frame


def test_cumulative_mass_is_common_to_all_rows():
    mass = torch.rand(2, 3, 7, 11, generator=torch.Generator().manual_seed(0))
    mass = mass.square().softmax(-1)
    work = torch.randint(1, 9, (2, 1, 7, 11), generator=torch.Generator().manual_seed(1))
    kept = rivals.keep_mass(mass, work, 0.4)
    ordered, order = mass.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    chosen = kept.gather(-1, order)
    chosen[..., 0], before[..., 0] = False, 2.0  # kept whatever the mass
    for row in range(2):
        assert before[row][chosen[row]].max() <= before[row][~chosen[row]].min()
    used = (kept * work).sum((1, 2, 3)) / (work.sum((1, 2, 3)) * 3)
    assert bool((used <= 0.4 + 1e-6).all()) and bool((used > 0.37).all())


def test_k_means_finds_separate_groups():
    centres = torch.tensor([[-9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    truth = torch.arange(90) // 30
    x = centres[truth] + 0.1 * torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    label, means, size = rivals.k_means(x[None, None], 3, rounds=4)
    assert label[0, 0].tolist() == truth.tolist() and size[0, 0].tolist() == [30] * 3
    torch.testing.assert_close(means[0, 0], centres, atol=0.1, rtol=0)


def test_piecewise_is_exact_to_first_order():
    """Nothing is lost where blocks have one covariance and logits barely vary inside blocks."""
    geometry = TokenGeometry((4, 8, 16))
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(64, 16, generator=generator)
    inside = 0.05 * (inside - inside.mean(0))
    blocks = torch.randn(8, 1, 16, generator=generator)
    k = (blocks + inside).flatten(0, 1)[None, None]
    values = torch.randn(64, 16, generator=generator)
    v = (torch.randn(8, 1, 16, generator=generator) + values).flatten(0, 1)[None, None]
    q = torch.randn(1, 1, 512, 16, generator=generator)
    exact = F.scaled_dot_product_attention(q, k, v)
    out, cost = rivals.piecewise(q, k, v, geometry, 0.3)
    error = (out - exact).norm() / exact.norm()
    means_alone, _ = rivals.piecewise(q, k, v - values.repeat(8, 1) + values.mean(0), geometry, 0.3)
    assert error < 2e-3 < (means_alone - exact).norm() / exact.norm()
    kept, blocks = 2, 8  # floor((0.3 * 512 - 8 - 8) / 63)
    assert float(cost) == pytest.approx((kept * 64 + blocks - kept + 16 / 2) / 512)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox-5b"])
def test_rivals_take_the_place_of_ours(family):
    def everything(q, k, v, geometry, share, text_lengths):
        return rivals.radial(q, k, v, geometry, 1.0, text_lengths)

    pipe = FAMILIES[family]()
    expected = run(pipe, steps=4)
    with enable_dfsattn(pipe, "paper") as handle:
        with rivals.in_place_of_ours(everything) as costs:
            out = run(pipe, steps=4)
        dense_calls = handle.report().runs[-1].calls["dense"]
        ours = run(pipe, steps=4)
        calls = handle.report().runs[-1].calls
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours, out)
    assert len(costs) == calls["refresh"] + calls["reuse"] > 0 and dense_calls == calls["dense"]
