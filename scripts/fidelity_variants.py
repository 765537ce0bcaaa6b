"""What the fidelity benchmark compares: settings of ours, and rivals under the paper's schedule."""

from dataclasses import dataclass, field

from benchmark_tools import CHANGES
from rivals import RIVALS

from dfsattn_diffusers import list_presets


@dataclass(frozen=True)
class Variant:
    """One way to generate.

    Attributes:
        preset: The preset that `changes` start from; None runs dense.
        changes: Config fields.
        rival: Name in `rivals.RIVALS` of the rule that takes our place.
        steps: Denoising steps; None means as many as the benchmark is asked for.
        reference: Name of the variant that paired differences refer to.
    """

    preset: str | None = "paper"
    changes: dict = field(default_factory=dict)
    rival: str | None = None
    steps: int | None = None
    reference: str = "paper"


def _ours(preset="paper", **changes):
    return Variant(preset, changes)


def _often(times):
    """The paper's ratios, each over several maps in place of one."""
    ratios = tuple(ratio for ratio in (0.3, 0.2, 0.1) for _ in range(times))
    return dict(keep_ratios=ratios, refresh_interval=0.25 / times)


def _few(steps, **changes):
    one = dict(dense_fraction=1 / steps)
    return Variant("paper", one | changes, steps=steps, reference=f"paper, {steps} steps")


_MEAN = dict(tail="mean", tail_pool=32, budget="layer", selection="error")
_MOMENT = dict(_MEAN, tail="moment")
_BEST = dict(_MEAN, key_block=64)
_SHARED = dict(share_maps_across_branches=True)
# A curve for each head.
_CURVES = dict(order=("hilbert3d", "hilbert2d", "hilbert_fw", "hilbert_fh"))
_HEADS = dict(_MEAN, **_CURVES)
_HEADS_64 = dict(_BEST, **_CURVES)
# The finest blocks, and the coarsest pools.
_FINE = dict(_HEADS_64, **_SHARED, query_block=64, tile_size=8, tail_pool=64)
# What the presets had before moments.
_MEANS = dict(tail="mean", tail_pool=32)
_PRESETS = list_presets()[1:]  # all but the paper
# What three of them had before intervals that grow.
_EVEN = {
    name: dict(refresh_interval=interval, refresh_growth=1.0)
    for name, interval in (("balanced", 0.1), ("fast", 0.16), ("turbo", 0.2))
}


def _preset(name, **changes):
    return _ours(name, min_tokens=0, **changes)


def _even(what, names=_PRESETS, **changes):
    """Presets with even intervals, and some other change."""
    return {
        f"preset {name}{', even intervals' * (name in _EVEN)}{what}": _preset(
            name, **_EVEN.get(name, {}) | changes
        )
        for name in names
    }


def _spent(preset, dense_fraction, every, keep):
    """About a preset's cost, spent in another way."""
    name = f"preset {preset}, dense {dense_fraction:.0%}, then every {every}th, keep {keep}"
    fields = dict(dense_fraction=dense_fraction, refresh_interval=every / 50, keep_ratios=(keep,))
    return {name: _preset(preset, **fields, refresh_growth=1.0)}


def _residual(pool, dense_fraction=0.06, interval=0.08, keep=0.1, **changes):
    """Fewer dense steps at the start, more of them later on, as refreshes."""
    config = dict(
        _HEADS, residual_pool=pool, dense_fraction=dense_fraction, keep_ratios=(keep,),
        refreshes=99, refresh_interval=interval,
    )  # fmt: skip
    return _ours(**config | changes)


def _least(keep, interval=0.32, pool=1, **changes):
    """At about 0.42 of the paper's cost."""
    return _residual(pool, 0.04, interval, keep, **dict(tail_pool=64) | changes)


_RANK_8 = dict(residual_rank=8)
_MOMENT_8 = dict(_RANK_8, tail="moment")


def _fresh(steps, ratios, base=_HEADS_64, **changes):
    """A few-step run with new maps in every step."""
    return _few(steps, **base | dict(keep_ratios=ratios, refresh_interval=1 / steps) | changes)


def _no_dense(steps, ratios, **changes):
    return _fresh(steps, ratios, dense_fraction=0, **changes)


# Kept shares of 8, 7, 4 and 3 sparse steps, near the paper's cost.
_STEEPEST = (0.8, 0.4, 0.25, 0.18, 0.14, 0.12, 0.1, 0.1)
_SMOOTH = (0.8, 0.5, 0.32, 0.22, 0.15, 0.1, 0.08, 0.06)
_SMOOTHER = (0.78, 0.48, 0.3, 0.21, 0.14, 0.09, 0.075, 0.055)
_SLOPE = (0.25, 0.2, 0.17, 0.14, 0.12, 0.1, 0.09)
_STEEP = (0.38, 0.26, 0.17, 0.12, 0.1, 0.09, 0.08)
_FINE_STEEP = (0.36, 0.25, 0.165, 0.115, 0.095, 0.085, 0.075)
_FOUR = (0.62, 0.43, 0.31, 0.24)
_FOUR_STEEP = (0.9, 0.34, 0.19, 0.11)
_FOUR_FLAT = (0.8, 0.34, 0.24, 0.16)
_GENTLE = (0.22, 0.16, 0.12)
_FINE_GENTLE = (0.27, 0.165, 0.095)

# The paper's schedule, made cheaper and dearer, for the best of them.
_OTHER_COSTS = {
    "0.23": dict(dense_fraction=0.12, keep_ratios=(0.18, 0.12, 0.08)),
    "0.49": dict(dense_fraction=0.34, keep_ratios=(0.3, 0.22, 0.15)),
}
_BEST_RIVALS = ("piecewise (PISA)", "raster blocks", "cumulative mass (SpargeAttn)")


# In order of importance: a run that is cut has done the first ones.
VARIANTS = {
    "dense, other kernel": Variant(preset=None),
    "paper": _ours(),
    # The presets as they are.
    **{f"preset {name}": _preset(name) for name in _PRESETS},
    # Attention in 8 bits: all of a dense run, all of a preset's, or all but corrections.
    **{
        f"dense, {change}": _ours(dense_fraction=1.0, **CHANGES[change])
        for change in ("fp8", "int8")
    },
    **{
        f"preset {name}, {change}": _preset(name, **changes)
        for change, changes in CHANGES.items()
        for name in ("fast", "turbo")
    },
    # In short runs.
    **{
        f"preset {name}, {steps} steps": Variant(
            name, dict(min_tokens=0), steps=steps, reference=f"paper, {steps} steps"
        )
        for steps in (30, 20, 8, 4)
        for name in _PRESETS
    },
    **{
        f"paper, {steps} steps": Variant(steps=steps, reference=f"paper, {steps} steps")
        for steps in (30, 20)
    },
    # A dense last step for one at the start.
    **{
        f"preset {name}, dense last step": _preset(
            name, dense_fraction=dense, last_step_dense=True
        )
        for name, dense in (("quality", 0.1), ("balanced", 0.08), ("fast", 0.1), ("turbo", 0.04))
    },
    "paper, dense last step": _ours(dense_fraction=0.22, last_step_dense=True),
    # Other growths of the intervals between dense steps.
    "preset quality, growth 1.05": _preset("quality", refresh_growth=1.05),
    "preset turbo, interval 0.16, growth 1.12": _preset(
        "turbo", refresh_interval=0.16, refresh_growth=1.12
    ),
    # At 0.42 of the paper's cost.
    "keep 0.038, dense every 16th step, rank 8, moments": _least(0.038, **_MOMENT_8),
    "keep 0.04, dense every 16th step, rank 8, moments": _least(0.04, **_MOMENT_8),
    "keep 0.02, dense every 12th step, rank 8, moments": _least(0.02, 0.24, **_MOMENT_8),
    "keep 0.04, dense every 16th step, rank 8": _least(0.04, **_RANK_8),
    "keep 0.04, dense every 16th step, residuals of 1": _least(0.04),
    "keep 0.04, dense every 16th step, residuals of 32": _least(0.04, pool=32),
    # One choice of the presets at a time.
    **_even("", _EVEN),
    "preset turbo, dense 4 %, faster growth": _preset(
        "turbo", dense_fraction=0.04, refresh_interval=0.08, refresh_growth=1.49
    ),
    **_spent("fast", 0.06, 5, 0.05),
    **_spent("fast", 0.06, 6, 0.08),
    **_spent("fast", 0.06, 8, 0.12),
    **_spent("fast", 0.12, 6, 0.04),
    **_spent("fast", 0.06, 4, 0.02),
    **_spent("turbo", 0.04, 8, 0.03),
    **_spent("turbo", 0.04, 7, 0.01),
    **_spent("turbo", 0.04, 12, 0.06),
    **_spent("turbo", 0.06, 8, 0.02),
    **_even(", shared across branches", ("fast", "turbo"), **_SHARED),
    "preset turbo, shared, dense every 6th step": _preset(
        "turbo", **_SHARED, refresh_interval=0.12, refresh_growth=1.0
    ),
    "keep 0.04, dense every 9th step, rank 8, moments, shared": _least(
        0.04, 0.18, **_MOMENT_8, **_SHARED
    ),
    **_even(", means of 32", **_MEANS),
    **_even(", moments of 32", _PRESETS[1:], tail_pool=32),
    **_even(", means of 32, rank 4", _PRESETS[1:], **_MEANS, residual_rank=4),
    **_even(", means of 32, residuals of 64", **_MEANS, residual_pool=64, residual_rank=None),
    **_even(", means of 32, shared across branches", ("fast", "turbo"), **_MEANS, **_SHARED),
    # Few-step runs.
    "paper, 8 steps": _few(8),
    "8 steps, no dense step, keep 0.78 to 0.055, 64 x 64, moments": _no_dense(
        8, _SMOOTHER, base=_FINE, tail="moment"
    ),
    "8 steps, no dense step, keep 0.8 to 0.06, 64 x 64, moments": _no_dense(
        8, _SMOOTH, base=_FINE, tail="moment"
    ),
    "8 steps, no dense step, keep 0.8 to 0.06, 64 x 64": _no_dense(8, _SMOOTH, base=_FINE),
    "8 steps, no dense step, keep 0.8 to 0.1": _no_dense(8, _STEEPEST),
    "8 steps, no dense step, keep 0.8 to 0.1, means of 64": _no_dense(
        8, _STEEPEST, tail_pool=64
    ),
    "8 steps, new maps, keep 0.36 to 0.075, 64 x 64, moments": _fresh(
        8, _FINE_STEEP, _FINE, tail="moment"
    ),
    "8 steps, new maps, keep 0.36 to 0.075, 64 x 64": _fresh(8, _FINE_STEEP, _FINE),
    "8 steps, new maps, keep 0.38 to 0.08, means of 64": _fresh(8, _STEEP, tail_pool=64),
    "8 steps, new maps, keep 0.38 to 0.08, means of 64, shared": _fresh(
        8, _STEEP, tail_pool=64, **_SHARED
    ),
    "8 steps, new maps, keep 0.25 to 0.09": _fresh(8, _SLOPE),
    "8 steps, new maps, keep 0.25 to 0.09, shared": _fresh(8, _SLOPE, **_SHARED),
    "8 steps, new maps, keep 0.25 to 0.09, tiles of 8": _fresh(8, _SLOPE, tile_size=8),
    "8 steps, new maps, keep 0.25 to 0.09, 64 x 64": _fresh(8, _SLOPE, query_block=64),
    "8 steps, new maps, keep 0.25 to 0.09, moments": _fresh(8, _SLOPE, tail="moment"),
    "8 steps, keep 0.1, rank 8 from the first": _few(
        8, **_HEADS, residual_pool=1, residual_rank=8, keep_ratios=(0.1,), refreshes=1
    ),
    "paper, 4 steps": _few(4),
    "4 steps, no dense step, keep 0.9 to 0.11, 64 x 64": _no_dense(4, _FOUR_STEEP, base=_FINE),
    "4 steps, no dense step, keep 0.9 to 0.11, 64 x 64, moments": _no_dense(
        4, _FOUR_STEEP, base=_FINE, tail="moment"
    ),
    "4 steps, no dense step, keep 0.8 to 0.16, 64 x 64": _no_dense(4, _FOUR_FLAT, base=_FINE),
    "4 steps, no dense step, keep 0.62 to 0.24, means of 64": _no_dense(4, _FOUR, tail_pool=64),
    "4 steps, new maps, keep 0.27 to 0.095, 64 x 64": _fresh(4, _FINE_GENTLE, _FINE),
    "4 steps, new maps, keep 0.22 to 0.12": _fresh(4, _GENTLE),
    "4 steps, new maps, keep 0.22 to 0.12, shared": _fresh(4, _GENTLE, **_SHARED),
    "4 steps, new maps, keep 0.22 to 0.12, tiles of 8": _fresh(4, _GENTLE, tile_size=8),
    "4 steps, new maps, keep 0.22 to 0.12, moments": _fresh(4, _GENTLE, tail="moment"),
    "4 steps, new maps, keep 0.22 to 0.12, mass": _fresh(4, _GENTLE, selection="mass"),
    # A curve for each head, and residuals.
    "paper, a curve for each head": _ours(**_CURVES),
    "paper, shared maps": _ours(**_SHARED),
    "means of 32, layer budget, error, a curve for each head": _ours(**_HEADS),
    "the same, shared maps": _ours(**_HEADS, **_SHARED),
    "the same, residuals of 128": _ours(**_HEADS, residual_pool=128),
    "the same, residuals of 32": _ours(**_HEADS, residual_pool=32),
    "the same, residuals of 1": _ours(**_HEADS, residual_pool=1),
    "the same, rank 8": _ours(**_HEADS, residual_pool=1, residual_rank=8),
    "keep 0.1, dense every 4th step, residuals of 1": _residual(1),
    "keep 0.1, dense every 4th step, residuals of 64": _residual(64),
    "keep 0.2, dense every 6th step, residuals of 64": _residual(64, interval=0.12, keep=0.2),
    "keep 0.1, dense every 8th step, residuals of 1": _residual(1, interval=0.16),
    "keep 0.1, dense every 8th step, residuals of 64": _residual(64, interval=0.16),
    "keep 0.05, dense every 6th step, residuals of 64": _residual(64, interval=0.12, keep=0.05),
    "keep 0.05, dense every 10th step, residuals of 1": _residual(1, interval=0.2, keep=0.05),
    # Other papers' rules, at the paper's cost, and the best of them at others.
    **{rival: Variant(rival=rival) for rival in RIVALS},
    **{
        f"{rival}, at {cost}": Variant(changes=changes, rival=rival)
        for cost, changes in _OTHER_COSTS.items()
        for rival in _BEST_RIVALS
    },
    # Towards more than the paper, one step at a time.
    "means of 128": _ours(tail="mean", tail_pool=128),
    "means of 16": _ours(tail="mean", tail_pool=16),
    "means of 32": _ours(tail="mean", tail_pool=32),
    "means of 32, layer budget": _ours(tail="mean", tail_pool=32, budget="layer"),
    "means of 32, layer budget, error": _ours(**_MEAN),
    "means of 32, layer budget, error, 128 x 64": _ours(**_BEST),
    "means of 32, layer budget, error, 64 x 64": _ours(**_BEST, query_block=64),
    "moments of 32, layer budget, error, 128 x 64": _ours(**_MOMENT, key_block=64),
    # Maps that follow the video more closely.
    "paper, 4 x as many maps": _ours(**_often(4)),
    "paper, new maps in every step": _ours(**_often(12)),
    "best, 4 x as many maps": _ours(**_BEST, **_often(4)),
    "best, new maps in every step": _ours(**_BEST, **_often(12)),
    # The same cost spent elsewhere.
    "best, steeper ratios": _ours(**_BEST, keep_ratios=(0.4, 0.15, 0.05)),
    "best, dense 12 %, keep 0.4 to 0.2": _ours(
        **_BEST, dense_fraction=0.12, keep_ratios=(0.4, 0.3, 0.2)
    ),
    "best, tiles of 8": _ours(**_BEST, tile_size=8),
    "best, raster order": _ours(**_BEST, order="raster"),
    "best, curve in each frame": _ours(**_BEST, order="hilbert2d"),
    "best, boxes": _ours(**_BEST, order="cuboid"),
    "best, dense 6 %, keep 0.2 to 0.05": _ours(
        **_BEST, dense_fraction=0.06, keep_ratios=(0.2, 0.15, 0.1, 0.05)
    ),
    # One choice at a time.
    "paper, head budget": _ours(budget="head"),
    "paper, layer budget": _ours(budget="layer"),
    "paper, key blocks of 64": _ours(key_block=64),
    "paper, raster order": _ours(order="raster"),
    "paper, curve in each frame": _ours(order="hilbert2d"),
    "paper, boxes": _ours(order="cuboid"),
    "paper, dense 6 %": _ours(dense_fraction=0.06),
    "paper, dense 12 %": _ours(dense_fraction=0.12),
}
