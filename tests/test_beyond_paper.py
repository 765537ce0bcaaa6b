"""What goes beyond the paper: tail, error-aware selection, other key blocks, a cost to meet."""

import math

import pytest
import torch
from tiny_pipelines import FAMILIES, run

from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn, list_presets
from dfsattn_diffusers.attention import prepare, sparse_attention
from dfsattn_diffusers.configs import resolve_config
from dfsattn_diffusers.kernels.prologue import Stream
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout
from dfsattn_diffusers.schedule import config_for_cost, decide, nominal_cost
from dfsattn_diffusers.score import pool_spread

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)
BEYOND = SPARSE.replace(key_block=16, tail="moment", tail_pool=8, budget="layer", selection="error")


def plain_tail_attention(q, k, v, kept, key_blocks, pool, energy):
    """One query over the keys of its kept blocks and the pools of all others, in float64 loops.

    Args:
        q: `[D]`.
        k, v: `[N, D]`.
        kept: Indices of kept blocks.
        key_blocks: Token positions of every block.
        energy: `[D]` mean squares of the scaled queries, or None without moments.
    """
    scale = q.shape[0] ** -0.5
    logits, values = [], []
    for block, tokens in enumerate(key_blocks):
        size = 1 if block in kept else pool
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            mean = k[part].mean(0)
            logit = scale * (q @ mean) + math.log(len(part))
            if energy is not None:
                spread = math.sqrt(energy @ (k[part] - mean).square().mean(0))
                logit += math.log(math.cosh(spread))
            logits.append(logit)
            values.append(v[part].mean(0))
    return torch.stack(logits).softmax(0) @ torch.stack(values)


@pytest.mark.parametrize("tail", ["mean", "moment"])
@pytest.mark.parametrize("text, first", [(0, False), (21, False), (21, True)])
def test_output_is_kept_keys_and_pools_of_the_rest(tail, text, first):
    make = torch.Generator().manual_seed(0)
    geometry = TokenGeometry((3, 7, 9), text, text_first=first)
    layout = TokenLayout.build(
        geometry, order="hilbert3d", tile_size=8, query_block=32, key_block=16
    )
    q, k, v = torch.randn(3, 2, geometry.tokens, 2, 16, generator=make).double()
    text_lengths = torch.tensor([9, 21]) if text else None
    prepared = prepare([Stream(q, k, v)], layout, text_lengths=text_lengths)
    out, selected = sparse_attention(
        prepared,
        layout,
        keep_ratio=0.3,
        budget="layer",
        selection="error",
        tail=tail,
        tail_pool=8,
        text_lengths=text_lengths,
    )
    mask, order = selected.block_map.to_mask(), layout.target().tolist()
    for b, h in ((0, 0), (1, 1)):
        lengths = layout.lengths(16, text_lengths).expand(2, -1)[b].tolist()
        energy = (q[b, order[: 3 * 7 * 9 : 16], h] * 16**-0.5).square().mean(0)
        blocks = [order[16 * i : 16 * i + n] for i, n in enumerate(lengths)]
        for row in range(0, mask.shape[2]):
            token = order[32 * row]
            kept = mask[b, h, row].nonzero().flatten().tolist()
            wanted = plain_tail_attention(
                q[b, token, h], k[b, :, h], v[b, :, h], kept, blocks, 8,
                energy if tail == "moment" else None,
            )
            # The pools' bias is float32.
            torch.testing.assert_close(out[b, token, h], wanted, rtol=1e-6, atol=1e-6)
    # A later step brings its own keys and values to the same map.
    again, nothing = sparse_attention(
        prepared, layout, selected.block_map, tail=tail, tail_pool=8, text_lengths=text_lengths
    )
    assert nothing is None and torch.equal(again, out)


def test_spread_is_that_of_the_pools():
    make = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 2, 96, 16, generator=make).double()
    query_lengths = torch.tensor([[32, 32, 5]], dtype=torch.int32)
    pool_lengths = torch.tensor([[8] * 10 + [3, 0], [8] * 12], dtype=torch.int32)
    spread = pool_spread(q, k, v, query_lengths, pool_lengths, pools_per_key_block=2, scale=0.25)
    assert spread.shape == (2, 2, 3, 6)
    for b, h, i, j in [(0, 0, 0, 0), (0, 1, 2, 5), (1, 0, 1, 5), (1, 1, 2, 3)]:
        queries = q[b, h, 32 * i : 32 * i + query_lengths[0, i]]
        square, weight = torch.zeros(2, 2, dtype=torch.float64), []
        for n in range(2):
            length = pool_lengths[b, 2 * j + n].item()
            start = 16 * j + 8 * n
            weight.append(length)
            if length:
                keys, values = (x[b, h, start : start + length] for x in (k, v))
                logits = 0.25**2 * (queries.square() @ keys.var(0, correction=0)).mean()
                square[n] = torch.stack([logits, values.var(0, correction=0).sum()])
        mean = (torch.tensor(weight).double() / sum(weight)) @ square
        torch.testing.assert_close(
            spread[b, h, i, j].double(), mean.prod().sqrt(), rtol=1e-4, atol=0
        )


def test_error_selection_keeps_what_the_tail_gets_most_wrong():
    """Half of the blocks hold constant keys and values, which a pool stands for without error."""
    make = torch.Generator().manual_seed(2)
    layout = TokenLayout.build(
        TokenGeometry((1, 16, 16), 0), order="raster", tile_size=8, query_block=32, key_block=32
    )
    q, k, v = torch.randn(3, 1, 256, 1, 16, generator=make)
    for x in (k, v):
        blocks = x.view(8, 32, 16)
        blocks[::2] = blocks[::2, :1].clone()
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v))
    )
    out, selected = sparse_attention(
        prepare([Stream(q, k, v)], layout),
        layout,
        keep_ratio=0.5,
        selection="error",
        tail="mean",
        tail_pool=32,
    )
    assert torch.equal(
        selected.block_map.to_mask()[0, 0], torch.tensor([False, True] * 4).expand(8, 8)
    )
    torch.testing.assert_close(out.transpose(1, 2).double(), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tail_brings_the_video_closer_to_dense(family):
    pipe = FAMILIES[family]()
    dense, errors = run(pipe), []
    for config in (SPARSE, SPARSE.replace(tail="mean", tail_pool=8)):
        with enable_dfsattn(pipe, config):
            errors.append((run(pipe) - dense).square().mean())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_together_on_a_pipeline(family):
    pipe = FAMILIES[family]()
    dense = run(pipe)
    with enable_dfsattn(pipe, BEYOND) as handle:
        first, second = run(pipe), run(pipe)
    assert torch.equal(first, second) and first.isfinite().all()
    assert not torch.equal(first, dense)
    report = handle.report().runs[-1]
    with enable_dfsattn(pipe, BEYOND.replace(tail=None, selection="mass")) as handle:
        run(pipe)
    dropped = handle.report().runs[-1]
    assert report.calls == dropped.calls
    # As much for an eighth of the keys that are not kept.
    assert report.density - dropped.density == pytest.approx(
        (1 - dropped.density) / 8, rel=0.02
    )
    keep_all = BEYOND.replace(dense_fraction=0, keep_ratios=(1.0,))
    with enable_dfsattn(pipe, keep_all):
        kept = run(pipe)
    torch.testing.assert_close(kept, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", list_presets())
@pytest.mark.parametrize("cost", [0.12, 0.3, 0.5, 0.9, 1.0])
def test_a_cost_is_met(preset, cost):
    start = resolve_config(preset)
    config = config_for_cost(start, cost)
    assert nominal_cost(config) == pytest.approx(cost, abs=1e-6)
    scaled = ("dense_fraction", "keep_ratios", "refresh_interval", "few_step_ratios")
    assert config.replace(**{name: getattr(start, name) for name in scaled}) == start
    assert (config.dense_fraction < start.dense_fraction) == (cost < nominal_cost(start))
    if start.few_step_ratios is not None:
        assert nominal_cost(config, 8) == pytest.approx(cost, abs=1e-5)


@pytest.mark.parametrize("num_steps", [4, 8, 20, 50])
def test_nominal_cost_is_that_of_the_schedule(num_steps):
    config = BEYOND.replace(keep_ratios=(0.3, 0.1))
    at = dict(video_tokens=10**6, cached_segment=None)
    ratios = [decide(i, num_steps, 0, config, **at).keep_ratio for i in range(num_steps)]
    work = [ratio + (1 - ratio) / 8 for ratio in ratios]
    assert nominal_cost(config, num_steps) == pytest.approx(sum(work) / num_steps)


def test_costs_that_cannot_be():
    for wrong in (0, 1.5, -1, "0.3", True):
        with pytest.raises(ValueError, match=r"cost must be a number in \(0, 1\]"):
            config_for_cost(SPARSE, wrong)
    with pytest.raises(ValueError, match="cost must be at least 0.020 here, what one dense step"):
        config_for_cost(SPARSE, 0.01)
    pipe = FAMILIES["wan"]()
    with enable_dfsattn(pipe, "paper", cost=0.2) as handle:
        assert nominal_cost(handle.config) == pytest.approx(0.2)
