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


_MOMENT = dict(tail="moment", budget="layer")
_ERROR = dict(_MOMENT, selection="error")
_MEAN = dict(_ERROR, tail="mean")
_BEST = dict(_ERROR, tail_pool=32, key_block=64)

# In order of importance: a run that is cut has done the first ones.
VARIANTS = {
    "dense, other kernel": Variant(preset=None),
    "paper": _ours(),
    # Towards more than the paper, one step at a time.
    "tail by means of 128": _ours(tail="mean", tail_pool=128),
    "tail by means of 16": _ours(tail="mean", tail_pool=16),
    "tail by means of 32, layer budget, error": _ours(**_MEAN, tail_pool=32),
    "tail by means of 32, layer budget, error, 128 x 64": _ours(
        **_MEAN, tail_pool=32, key_block=64
    ),
    "tail by moments of 128, layer budget": _ours(**_MOMENT, tail_pool=128),
    "tail by moments of 64, layer budget, error": _ours(**_ERROR, tail_pool=64),
    "tail by moments of 64, layer budget, error, 128 x 64": _ours(
        **_ERROR, tail_pool=64, key_block=64
    ),
    "tail by moments of 64, layer budget, error, 64 x 64": _ours(
        **_ERROR, tail_pool=64, key_block=64, query_block=64
    ),
    "tail by moments of 16, layer budget": _ours(**_MOMENT, tail_pool=16),
    "tail by moments of 32, layer budget, error, 128 x 64": _ours(**_BEST),
    "tail by moments of 32, dense 6 %, keep 0.2 to 0.05": _ours(
        **_BEST, dense_fraction=0.06, keep_ratios=(0.2, 0.15, 0.1, 0.05)
    ),
    "tail by moments of 32, one dense step, keep 0.15": _ours(
        **_BEST, dense_fraction=0.02, keep_ratios=(0.15,), refreshes=4
    ),
    "paper, 2 x as many maps": _ours(**_often(2)),
    "paper, 4 x as many maps": _ours(**_often(4)),
    "paper, new maps in every step": _ours(**_often(12)),
    "tail by means of 32, layer budget, error, 128 x 64, 4 x as many maps": _ours(
        **_MEAN, tail_pool=32, key_block=64, **_often(4)
    ),
    # Few-step runs, one dense step.
    "paper, 8 steps": _few(8),
    "ours, 8 steps": _few(8, **_BEST),
    "paper, 4 steps": _few(4),
    "ours, 4 steps": _few(4, **_BEST),
    # The presets as they are.
    "preset quality": _ours("quality", min_tokens=0),
    "preset balanced": _ours("balanced", min_tokens=0),
    "preset fast": _ours("fast", min_tokens=0),
    "preset turbo": _ours("turbo", min_tokens=0),
    # Other papers' rules, at the paper's cost.
    "raster blocks": Variant(rival="raster blocks"),
    "sliding window (STA)": Variant(rival="sliding window (STA)"),
    "radial decay (Radial)": Variant(rival="radial decay (Radial)"),
    "cumulative mass (SpargeAttn)": Variant(rival="cumulative mass (SpargeAttn)"),
    "clusters (SVG2)": Variant(rival="clusters (SVG2)"),
    "piecewise (PISA)": Variant(rival="piecewise (PISA)"),
    # One choice at a time.
    "paper, head budget": _ours(budget="head"),
    "paper, layer budget": _ours(budget="layer"),
    "paper, key blocks of 64": _ours(key_block=64),
    "paper, raster order": _ours(order="raster"),
    "paper, curve in each frame": _ours(order="hilbert2d"),
    "paper, boxes": _ours(order="cuboid"),
    "paper, dense 6 %": _ours(dense_fraction=0.06),
    "paper, dense 12 %": _ours(dense_fraction=0.12),
    "tail by means of 32, layer budget": _ours(tail="mean", tail_pool=32, budget="layer"),
    "tail by means of 64, layer budget": _ours(tail="mean", tail_pool=64, budget="layer"),
    "tail by moments of 32, layer budget": _ours(**_MOMENT, tail_pool=32),
    "tail by moments of 32, row budget": _ours(tail="moment", tail_pool=32),
    "tail by moments of 32, layer budget, error": _ours(**_ERROR, tail_pool=32),
}
