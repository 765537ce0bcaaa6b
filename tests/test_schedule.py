import pytest

from dfsattn_diffusers.configs import DFSAttnConfig, list_presets, resolve_config
from dfsattn_diffusers.schedule import (
    FEW_STEPS,
    LEAST_DENSE_INTERVAL,
    any_reuse,
    config_for_steps,
    decide,
    decisions,
    nominal_cost,
    refresh_steps,
    segment_of,
    steps_of,
)

PAPER = DFSAttnConfig()


def modes(num_steps, config=PAPER, skip=()):
    """Mode and ratio of one layer over a run, with a block cache that skips some steps."""
    cached, out = None, []
    for step in range(num_steps):
        if step in skip:
            out.append(None)
            continue
        d = decide(step, num_steps, 3, config, video_tokens=9999, cached_segment=cached)
        cached = d.segment if d.mode != "dense" else cached
        out.append((d.mode, d.keep_ratio))
    return out


def test_fifty_steps_are_the_papers():
    run = modes(50)
    assert [mode for mode, _ in run[:12]] == ["dense"] * 12
    assert [step for step, (mode, _) in enumerate(run) if mode == "refresh"] == [12, 24, 36]
    assert [ratio for _, ratio in run[12:]] == [0.3] * 12 + [0.2] * 12 + [0.1] * 14


@pytest.mark.parametrize(
    "num_steps, dense, refreshes",
    [(4, 1, [1, 2, 3]), (7, 2, [2, 4, 6]), (8, 2, [2, 4, 6]), (20, 5, [5, 10, 15])],
)
def test_other_step_counts_scale(num_steps, dense, refreshes):
    run = modes(num_steps)
    assert [mode for mode, _ in run].count("dense") == dense
    assert [step for step, (mode, _) in enumerate(run) if mode == "refresh"] == refreshes


@pytest.mark.parametrize("num_steps", range(1, 101))
def test_any_run_starts_dense_and_never_raises_its_ratio(num_steps):
    run = modes(num_steps)
    ratios = [ratio for _, ratio in run]
    assert run[0][0] == "dense"
    assert ratios == sorted(ratios, reverse=True)
    assert sum(mode == "refresh" for mode, _ in run) <= 3


def test_a_skipped_refresh_is_made_up_for():
    run = modes(50, skip={12, 13, 24})
    assert run[14] == ("refresh", 0.3) and run[25] == ("refresh", 0.2)


def test_a_missing_map_is_built_whatever_the_step():
    late = decide(30, 50, 0, PAPER, video_tokens=9999, cached_segment=None)
    assert (late.mode, late.keep_ratio) == ("refresh", 0.2)


def test_more_refreshes_than_ratios_keep_the_last_ratio():
    config = DFSAttnConfig(keep_ratios=(0.4, 0.2), refreshes=5, refresh_interval=0.1)
    run = modes(50, config)
    assert [s for s, (mode, _) in enumerate(run) if mode == "refresh"] == [12, 17, 22, 27, 32]
    assert run[-1] == ("reuse", 0.2)


def test_intervals_may_grow():
    config = DFSAttnConfig(
        dense_fraction=0.06, keep_ratios=(0.1,), refreshes=99, refresh_interval=0.12,
        refresh_growth=1.28,
    )  # fmt: skip
    assert refresh_steps(config, 50) == (3, 9, 17, 27, 39)
    run = modes(50, config)
    assert [s for s, (mode, _) in enumerate(run) if mode == "refresh"] == [3, 9, 17, 27, 39]
    # Where refreshes are dense, the last dense step is the first of them.
    assert refresh_steps(config.replace(residual_pool=1), 50) == (2, 8, 16, 26, 38)
    assert refresh_steps(config.replace(refreshes=2), 50) == (3, 9)


@pytest.mark.parametrize("num_steps", range(2, 101))
@pytest.mark.parametrize("preset", list_presets())
def test_refreshes_of_a_preset_come_ever_later(preset, num_steps):
    steps = refresh_steps(resolve_config(preset, few_step_ratios=None), num_steps)
    gaps = [later - earlier for earlier, later in zip(steps, steps[1:])]
    least = LEAST_DENSE_INTERVAL if preset != "paper" else 1
    assert steps and steps[-1] < num_steps and min(gaps, default=least) >= least
    # Whole steps may take one back.
    assert all(later >= earlier - 1 for earlier, later in zip(gaps, gaps[1:]))


@pytest.mark.parametrize("preset, less", [("fast", 0.1), ("turbo", 0.04), ("paper", 0.22)])
def test_a_dense_last_step_costs_one_at_the_start(preset, less):
    config = resolve_config(preset)
    last = config.replace(dense_fraction=less, last_step_dense=True)
    assert steps_of(less, 50) == steps_of(config.dense_fraction, 50) - 1
    final = list(decisions(last, 50))[-1]
    assert (final.mode, final.reason) == ("dense", "last step")
    ratio = config.keep_ratios[-1]
    assert nominal_cost(last) == pytest.approx(nominal_cost(config), abs=0.2 * (1 - ratio) / 50)


def test_short_runs_with_ratios_of_their_own_have_no_dense_last_step():
    usual, last = resolve_config("turbo"), resolve_config("turbo", last_step_dense=True)
    assert list(decisions(last, 8)) == list(decisions(usual, 8))
    assert list(decisions(last.replace(few_step_ratios=None), 8))[-1].reason == "last step"


def test_what_a_run_reads_again():
    usual = resolve_config("fast", few_step_ratios=None)
    assert any_reuse(usual, 50) and not any_reuse(usual, 1)
    assert not any_reuse(usual.replace(last_step_dense=True), 2)
    assert not any_reuse(usual.replace(dense_fraction=1.0), 50)


def test_reasons_for_dense():
    config = DFSAttnConfig(dense_layers=(2,), min_tokens=100)
    at = dict(video_tokens=100, cached_segment=None)
    assert decide(20, 50, 2, config, **at).reason == "dense layer"
    assert decide(0, 50, 1, config, **at).reason == "first part of the run"
    few = decide(20, 50, 1, config, video_tokens=99, cached_segment=None)
    assert few.reason == "fewer than 100 video tokens"
    assert decide(20, 50, 1, config, **at).mode == "refresh"


def test_shares_in_whole_steps():
    assert steps_of(0.25, 50) == 12 and steps_of(0, 50) == 0 and steps_of(0.01, 4) == 1
    assert segment_of(0, 4, DFSAttnConfig(dense_fraction=0)) == 0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, FEW_STEPS - 1, FEW_STEPS])
def test_short_runs_spread_their_ratios_over_new_maps(num_steps):
    config = DFSAttnConfig(
        dense_fraction=0.5, refreshes=99, residual_pool=1, residual_rank=8,
        few_step_ratios=(1, 0.3, 0.2, 0.1),
    )  # fmt: skip
    settings = config_for_steps(config, num_steps)
    if num_steps >= FEW_STEPS:
        assert settings is config
        return
    assert settings.residual_pool is settings.residual_rank is None
    assert settings.share_maps_across_branches
    run = modes(num_steps, settings)
    assert all((mode == "dense") == (ratio == 1) and mode != "reuse" for mode, ratio in run)
    ratios = [ratio for _, ratio in run]
    assert ratios == sorted(ratios, reverse=True) and set(ratios) <= {1, 0.3, 0.2, 0.1}
    if num_steps == 8:
        assert ratios == [1] * 2 + [0.3] * 2 + [0.2] * 2 + [0.1] * 2
    assert nominal_cost(config, num_steps) == pytest.approx(sum(ratios) / num_steps)


def test_short_runs_need_no_dense_step():
    settings = config_for_steps(DFSAttnConfig(few_step_ratios=(0.8, 0.2)), 4)
    assert modes(4, settings) == [("refresh", 0.8)] * 2 + [("refresh", 0.2)] * 2
    only = config_for_steps(DFSAttnConfig(few_step_ratios=(1,)), 4)
    assert modes(4, only) == [("dense", 1.0)] * 4
