"""Sparse outputs corrected by what they lacked when attention was dense."""

import pytest
import torch
from test_head_orders import CURVES
from test_schedule import modes
from tiny_pipelines import FAMILIES, run

from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn
from dfsattn_diffusers.layout import TokenGeometry
from dfsattn_diffusers.processors.base import LayerProcessor
from dfsattn_diffusers.schedule import config_for_steps, nominal_cost
from dfsattn_diffusers.selection import Selection
from dfsattn_diffusers.state import DFSAttnState, Forward, Kept, Position

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)


def test_the_last_dense_step_is_the_first_refresh():
    run = [mode for mode, _ in modes(50, SPARSE.replace(residual_pool=1))]
    assert [i for i, mode in enumerate(run) if mode == "refresh"] == [11, 23, 35]
    assert run[:11] == ["dense"] * 11 and run[49] == "reuse"
    # Dense refreshes as often as the fraction says would be most of a short run.
    few = [mode for mode, _ in modes(8, SPARSE.replace(residual_pool=1))]
    assert few == ["dense"] + (["refresh"] + ["reuse"] * 3 + ["refresh"] + ["reuse"] * 2)
    never_dense = SPARSE.replace(residual_pool=1, dense_fraction=0)
    assert modes(50, never_dense)[0][0] == "refresh"
    # Nothing comes after it that a map could serve.
    always_dense = SPARSE.replace(residual_pool=1, dense_fraction=1)
    assert {mode for mode, _ in modes(50, always_dense)} == {"dense"}


@pytest.mark.parametrize("num_steps", [4, 8, 20, 50])
@pytest.mark.parametrize("dense_fraction", [0, 0.25])
def test_cost_counts_dense_refreshes(num_steps, dense_fraction):
    config = SPARSE.replace(residual_pool=32, keep_ratios=(0.3,), refreshes=3)
    config = config.replace(dense_fraction=dense_fraction)
    work = {"dense": 1.0, "refresh": 1.3, "reuse": 0.3}
    wanted = sum(work[mode] for mode, _ in modes(num_steps, config)) / num_steps
    assert nominal_cost(config, num_steps) == pytest.approx(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_runs_follow_ratios_of_their_own(family):
    pipe = FAMILIES[family]()
    long = SPARSE.replace(residual_pool=1)
    short = SPARSE.replace(keep_ratios=(0.5, 0.5, 0.3), share_maps_across_branches=True)
    videos = {}
    for name, config in (
        ("both", long.replace(few_step_ratios=(1, 0.5, 0.5, 0.3))), ("long", long), ("short", short)
    ):  # fmt: skip
        with enable_dfsattn(pipe, config) as handle:
            videos[name] = [run(pipe, steps=steps) for steps in (4, 16, 4)]
            assert handle.config == config
    few, many, again = videos["both"]
    assert torch.equal(few, videos["short"][0]) and torch.equal(many, videos["long"][1])
    assert torch.equal(few, again) and not torch.equal(few, videos["long"][0])


def test_a_length_that_is_learnt_late_changes_what_the_run_follows():
    config = SPARSE.replace(residual_pool=1, few_step_ratios=(0.5, 0.3))
    state, device = DFSAttnState(config), torch.device("cpu")
    for num_steps, branch in ((50, "call 0"), (8, "call 1"), (8, "call 0")):
        position = Position(0, num_steps, branch)
        geometry = TokenGeometry((2, 3, 4))
        state.begin_forward(Forward("transformer", position, geometry, None, device))
        assert state.settings == config_for_steps(config, num_steps)
        state.end_forward()
    (only,) = state.report().runs
    assert only.num_steps == 8


@pytest.mark.parametrize("order", ["hilbert3d", CURVES], ids=["one curve", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_lost_until_the_input_changes(family, order, monkeypatch):
    """With a residual for every query, a second call on the same input is as good as dense."""
    pipe = FAMILIES[family]()
    attend, lost = LayerProcessor.attend_now, []

    def twice(self, *args):
        record = self.state._runs[-1]
        before = record.modes["refresh"]
        out = attend(self, *args)
        if record.modes["refresh"] > before:
            geometry = self.state.forward.geometry
            first = geometry.text_tokens if geometry.text_first else 0
            video = slice(first, first + geometry.video_tokens)
            again = attend(self, *args)
            lost.append(((again - out)[:, video].abs().max() / out[:, video].abs().max()).item())
        return out

    monkeypatch.setattr(LayerProcessor, "attend_now", twice)
    with enable_dfsattn(pipe, SPARSE, residual_pool=1, order=order):
        run(pipe, steps=8)
    assert lost and max(lost) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_it_brings_the_video_closer_to_dense(family):
    pipe = FAMILIES[family]()
    dense, errors, reports = run(pipe, steps=12), {}, {}
    for pool, rank in ((None, None), (32, None), (1, None), (1, 8)):
        config = SPARSE.replace(order=CURVES, residual_pool=pool, residual_rank=rank)
        with enable_dfsattn(pipe, config) as handle:
            first, second = run(pipe, steps=12), run(pipe, steps=12)
        assert torch.equal(first, second)
        errors[pool, rank] = (second - dense).square().mean().item()
        reports[pool, rank] = handle.report().runs[-1]
    assert errors[1, None] < errors[None, None] > errors[1, 8]
    sparse, closest = reports[None, None], reports[1, None]
    assert closest.calls["refresh"] == sparse.calls["refresh"]
    assert sum(closest.calls.values()) == sum(sparse.calls.values())
    assert 1 >= closest.density > sparse.density


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_may_share_a_correction(family):
    """Dense attention of one branch serves both: refreshes are had for half the work."""
    pipe = FAMILIES[family]()
    dense, videos, reports = run(pipe, steps=12), {}, {}
    for name, changes in (
        ("none", {}), ("own", dict(residual_pool=1)),
        ("shared", dict(residual_pool=1, share_maps_across_branches=True)),
    ):  # fmt: skip
        with enable_dfsattn(pipe, SPARSE, **changes) as handle:
            videos[name] = run(pipe, steps=12)
        reports[name] = handle.report().runs[-1]
    own, shared = reports["own"], reports["shared"]
    if "CogVideoX" in type(pipe).__name__:  # its branches are rows of one call
        assert torch.equal(videos["own"], videos["shared"])
        return
    assert shared.calls["refresh"] * 2 == own.calls["refresh"]
    assert sum(shared.calls.values()) == sum(own.calls.values())
    assert shared.density < own.density
    errors = {name: (video - dense).square().mean().item() for name, video in videos.items()}
    assert max(errors["own"], errors["shared"]) < errors["none"]


def test_config():
    with pytest.raises(ValueError, match="residual_pool must divide query_block; got .* 48 and"):
        DFSAttnConfig(residual_pool=48)
    with pytest.raises(ValueError, match="residual_pool must be at least 1; got 0"):
        DFSAttnConfig(residual_pool=0)
    even = "residual_rank must be even, 32 at most, and needs residual_pool"
    for rank, pool in ((3, 1), (34, 1), (4, None)):
        with pytest.raises(ValueError, match=even):
            DFSAttnConfig(residual_rank=rank, residual_pool=pool)


def test_branches_that_share_may_differ_in_their_text():
    """Each text length keeps its own map: none would be reused if they took turns in one place."""
    shared = SPARSE.replace(residual_pool=1, share_maps_across_branches=True)
    selection, calls = Selection(None, torch.tensor(0.5), torch.tensor(0.9)), {}
    for name, config in ("own", SPARSE.replace(residual_pool=1)), ("shared", shared):
        state, device = DFSAttnState(config), torch.device("cpu")
        for step in range(12):
            for branch, text in ("cond", 5), ("uncond", 3):
                geometry = TokenGeometry((2, 3, 4), text)
                state.begin_forward(
                    Forward("transformer", Position(step, 12, branch), geometry, None, device)
                )
                decision = state.decide(0, 1)
                calls.setdefault(name, []).append(decision.mode)
                if decision.mode == "refresh":
                    state.store(0, 1, decision.segment, selection, Kept())
                elif decision.mode == "reuse":
                    state.kept(0, 1)
                state.end_forward()
    assert calls["own"] == calls["shared"] and "reuse" in calls["own"]
