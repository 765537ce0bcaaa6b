"""What the fidelity benchmark compares: settings of ours, and rivals under the paper's schedule."""

from dataclasses import dataclass, field


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
# A curve for each head.
_CURVES = dict(order=("hilbert3d", "hilbert2d", "hilbert_fw", "hilbert_fh"))
_HEADS = dict(_MEAN, **_CURVES)
_HEADS_64 = dict(_BEST, **_CURVES)


def _residual(pool, dense_fraction=0.06, interval=0.08, keep=0.1, **changes):
    """Fewer dense steps at the start, more of them later on, as refreshes."""
    config = dict(
        _HEADS, residual_pool=pool, dense_fraction=dense_fraction, keep_ratios=(keep,),
        refreshes=99, refresh_interval=interval,
    )  # fmt: skip
    return _ours(**config | changes)


def _few_residual(steps, keep, refreshes, interval=0.25, **changes):
    config = dict(
        _HEADS, residual_pool=1, keep_ratios=(keep,), refreshes=refreshes,
        refresh_interval=interval,
    )  # fmt: skip
    return _few(steps, **config | changes)


def _fresh(steps, ratios, **changes):
    """A few-step run with new maps in every step."""
    config = dict(_HEADS_64, keep_ratios=ratios, refresh_interval=1 / steps)
    return _few(steps, **config | changes)


# Kept shares of 8, 7 and 3 sparse steps, at the paper's cost.
_STEEPEST = (0.8, 0.4, 0.25, 0.18, 0.14, 0.12, 0.1, 0.1)
_STEEP = (0.35, 0.24, 0.16, 0.11, 0.08, 0.07, 0.06)
_SLOPE = (0.25, 0.2, 0.17, 0.14, 0.12, 0.1, 0.09)
_GENTLE = (0.22, 0.16, 0.12)


# In order of importance: a run that is cut has done the first ones.
VARIANTS = {
    "dense, other kernel": Variant(preset=None),
    "paper": _ours(),
    # The presets as they are.
    "preset quality": _ours("quality", min_tokens=0),
    "preset balanced": _ours("balanced", min_tokens=0),
    "preset fast": _ours("fast", min_tokens=0),
    "preset turbo": _ours("turbo", min_tokens=0),
    # With pools' second moments.
    **{
        f"preset {name}, moments": _ours(name, min_tokens=0, tail="moment")
        for name in ("balanced", "fast", "turbo")
    },
    # In short runs.
    **{
        f"preset {name}, {steps} steps": Variant(
            name, dict(min_tokens=0), steps=steps, reference=f"paper, {steps} steps"
        )
        for steps in (8, 4)
        for name in ("balanced", "fast", "turbo")
    },
    # Their residuals kept in other ways.
    **{
        f"preset {name}, rank 4": _ours(name, min_tokens=0, residual_rank=4)
        for name in ("balanced", "fast", "turbo")
    },
    **{
        f"preset {name}, residuals of 64": _ours(
            name, min_tokens=0, residual_pool=64, residual_rank=None
        )
        for name in ("quality", "balanced", "fast", "turbo")
    },
    # At 0.42 of the paper's cost.
    "keep 0.04, dense every 16th step, residuals of 1": _residual(
        1, 0.04, interval=0.32, keep=0.04, tail_pool=64
    ),
    "keep 0.04, dense every 16th step, residuals of 32": _residual(
        32, 0.04, interval=0.32, keep=0.04, tail_pool=64
    ),
    "keep 0.04, dense every 16th step, rank 8": _residual(
        1, 0.04, interval=0.32, keep=0.04, tail_pool=64, residual_rank=8
    ),
    # Few-step runs, one dense step.
    "paper, 8 steps": _few(8),
    "best, 8 steps, a curve for each head": _few(8, **_HEADS_64),
    "best, 8 steps, a curve for each head, 64 x 64": _few(8, **_HEADS_64, query_block=64),
    "best, 8 steps, a curve for each head, tiles of 8": _few(8, **_HEADS_64, tile_size=8),
    "best, 8 steps, a curve for each head, means of 16": _few(8, **_HEADS_64 | dict(tail_pool=16)),
    "best, 8 steps, a curve for each head, keep 0.17": _few(8, **_HEADS_64, keep_ratios=(0.17,)),
    "8 steps, new maps, keep 0.35 to 0.06": _fresh(8, _STEEP),
    "8 steps, new maps, keep 0.25 to 0.09": _fresh(8, _SLOPE),
    "8 steps, new maps, keep 0.15": _fresh(8, (0.15,) * 7),
    "8 steps, new maps, keep 0.25 to 0.09, tiles of 8": _fresh(8, _SLOPE, tile_size=8),
    "8 steps, new maps, keep 0.25 to 0.09, 64 x 64": _fresh(8, _SLOPE, query_block=64),
    "8 steps, new maps, keep 0.25 to 0.09, moments": _fresh(8, _SLOPE, tail="moment"),
    "8 steps, new maps, keep 0.38 to 0.08, means of 64": _fresh(
        8, (0.38, 0.26, 0.17, 0.12, 0.1, 0.09, 0.08), tail_pool=64
    ),
    "8 steps, no dense step, keep 0.8 to 0.1": _fresh(8, _STEEPEST, dense_fraction=0),
    "8 steps, no dense step, keep 0.8 to 0.1, means of 64": _fresh(
        8, _STEEPEST, dense_fraction=0, tail_pool=64
    ),
    "8 steps, keep 0.1, rank 8 from the first": _few_residual(8, 0.1, 1, residual_rank=8),
    "8 steps, keep 0.13, residuals of 1 from the first": _few_residual(8, 0.13, 1),
    "8 steps, keep 0.02, residuals of 1 from the first and fifth": _few_residual(
        8, 0.02, 2, 0.5, tail_pool=64
    ),
    "paper, 4 steps": _few(4),
    "best, 4 steps, a curve for each head": _few(4, **_HEADS_64),
    "best, 4 steps, a curve for each head, 64 x 64": _few(4, **_HEADS_64, query_block=64),
    "best, 4 steps, a curve for each head, means of 16": _few(4, **_HEADS_64 | dict(tail_pool=16)),
    "best, 4 steps, a curve for each head, keep 0.17": _few(4, **_HEADS_64, keep_ratios=(0.17,)),
    "4 steps, new maps, keep 0.3 to 0.07": _fresh(4, (0.3, 0.14, 0.07)),
    "4 steps, new maps, keep 0.22 to 0.12": _fresh(4, _GENTLE),
    "4 steps, new maps, keep 0.22 to 0.12, tiles of 8": _fresh(4, _GENTLE, tile_size=8),
    "4 steps, new maps, keep 0.22 to 0.12, moments": _fresh(4, _GENTLE, tail="moment"),
    "4 steps, new maps, keep 0.22 to 0.12, mass": _fresh(4, _GENTLE, selection="mass"),
    "4 steps, new maps, keep 0.28 to 0.1, means of 64": _fresh(4, (0.28, 0.17, 0.1), tail_pool=64),
    "4 steps, no dense step, keep 0.55 to 0.2": _fresh(
        4, (0.55, 0.38, 0.28, 0.2), dense_fraction=0
    ),
    "4 steps, no dense step, keep 0.62 to 0.24, means of 64": _fresh(
        4, (0.62, 0.43, 0.31, 0.24), dense_fraction=0, tail_pool=64
    ),
    "4 steps, keep 0.12, residuals of 1 from the first": _few_residual(4, 0.12, 1),
    # A curve for each head, and residuals.
    "paper, a curve for each head": _ours(**_CURVES),
    "means of 32, layer budget, error, a curve for each head": _ours(**_HEADS),
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
    # Other papers' rules, at the paper's cost.
    "raster blocks": Variant(rival="raster blocks"),
    "sliding window (STA)": Variant(rival="sliding window (STA)"),
    "radial decay (Radial)": Variant(rival="radial decay (Radial)"),
    "cumulative mass (SpargeAttn)": Variant(rival="cumulative mass (SpargeAttn)"),
    "piecewise (PISA)": Variant(rival="piecewise (PISA)"),
    "clusters (SVG2)": Variant(rival="clusters (SVG2)"),
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
