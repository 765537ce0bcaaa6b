"""One frozen dataclass that holds every choice of the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import (
    as_tuple,
    check_blocks,
    check_flag,
    check_fraction,
    check_int,
    check_number,
    check_ratios,
)
from .files import read_fields, write_fields

ORDERS = ("hilbert3d", "hilbert2d", "hilbert_fw", "hilbert_fh", "cuboid", "raster")
BUDGETS = ("row", "head", "layer")
SELECTIONS = ("mass", "error")
TAILS = (None, "mean", "moment")
PRECISIONS = ("full", "fp8", "int8")
_CHOICES = {
    "budget": BUDGETS,
    "selection": SELECTIONS,
    "tail": TAILS,
    "precision": PRECISIONS,
    "dense_precision": PRECISIONS,
    "correction_precision": (None, *PRECISIONS),
}


@dataclass(frozen=True)
class DFSAttnConfig:
    """What runs dense, what runs sparse, and how the kept blocks are chosen.

    The defaults are the method as published (Hu et al., arXiv 2605.23445). Fractions refer to the
    denoising steps of one generation, so the same config serves 4, 8, 20 or 50 steps.

    Args:
        dense_fraction: Share of the run, from its start, with dense attention; in [0, 1]. The
            global layout of a video is settled there: less is faster and drifts from the dense
            video. Any share above 0 is a step at least. Where a pipeline starts in the middle of
            its schedule (video to video), the steps before that count as gone.
        last_step_dense: Whether the last step of a run is dense as well, and what a run does beyond
            the steps that it announced. Not in short runs with ratios of their own.
        keep_ratios: Kept share of video key blocks, one value per refresh, each in (0, 1], never
            rising along the run. The last one holds until the end. Costs are proportional to it.
        refreshes: Number of times the block maps are computed, or None for one per keep ratio.
            A new map follows the video better; each costs about as much as a few key blocks.
        refresh_interval: Share of the run between the first two refreshes; in (0, 1].
        refresh_growth: What each interval between refreshes is of the one before; at least 1. A
            video changes most in its first steps.
        order: Curve along which video tokens are grouped into blocks: "hilbert3d" (space-time),
            "hilbert2d" (per frame), "hilbert_fw" and "hilbert_fh" (in planes of time and width, of
            time and height), and for comparison "cuboid" (3-D boxes) and "raster". Of several,
            each head takes the one whose kept blocks hold most of its estimated attention.
        tile_size: Tokens averaged into one tile for scoring; finer scores better, costs more.
        query_block: Query tokens that share one selection.
        key_block: Key tokens kept or dropped together.
        tail: Approximation of what is not kept: None drops it, as the paper does; "mean" lets the
            means of pools of keys and values stand for it; "moment" also corrects the pools'
            weights by the variance of their keys.
        tail_pool: Keys of one pool; divides key_block. Smaller is closer and costs more.
        budget: Rows among which the kept blocks are shared: "row" gives every query block the
            same number, "head" and "layer" give more to those that need more.
        selection: Ranking of blocks: "mass" is estimated attention mass; "error", for use with a
            tail, is mass times the spread of logits and of values within the pools, so that what
            the tail would get most wrong is kept.
        residual_pool: Queries that share a correction, None for no correction. With it a refresh
            is dense as well, and at least four steps from the next; what the sparse output lacks
            there, averaged over so many queries in curve order, is added to the sparse outputs
            until the next refresh. 1 is the closest and keeps an attention output in memory for
            every layer and branch; 128 takes 1/128. What a CUDA device has no room for raises
            `MemoryError` in the first calls of a run.
        residual_rank: Directions of each head in which the correction is kept, at 4 bits; an even
            number up to 32. None keeps it whole. With 8 of 128 dimensions it takes 1/64.
        few_step_ratios: Kept shares in runs of fewer than 12 steps, as of distilled models, where
            dense refreshes would be most of the work: spread over the steps, never rising, 1 for a
            dense one; a new map in each, shared across branches, and no correction, whatever other
            fields say. None: such runs are like long ones.
        dense_layers: Indices of layers that stay dense in every step.
        min_tokens: With fewer video tokens than this, attention stays dense.
        share_maps_across_branches: Use the first guidance branch's map, and its correction if there
            is one, for the others too, where branches are separate calls. Their errors are alike
            then, and guidance, a difference, lets less of them through; refreshes, the dense ones
            above all, are had at the price of one branch, the last of the first dense steps among
            them. A correction is less close so.
        precision: Of the kept blocks' products: "full", that of the model, or, on sm89 and sm90,
            "int8" (queries and keys whole numbers) or "fp8" (e4m3 for all): faster, and less exact,
            the latter by more.
        dense_precision: Of attention that stays dense: "full", by the user's backend, or "int8" or
            "fp8", by the kernels, where no mask but that of padding is in the way. Dense steps are
            most of what fast presets take; what goes wrong there stays in the video.
        correction_precision: Of dense attention that a correction is measured by, which repeats its
            errors until the next one; None is `dense_precision`. "full" beside that in "fp8" is
            closer to the dense video, where only the first steps are in 8 bits then.
        backend: Kernel: "auto" or a name from `dfsattn_diffusers.kernels.list_backends()`.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A value is out of range, or values do not fit together.
    """

    dense_fraction: float = 0.25
    keep_ratios: tuple[float, ...] = (0.3, 0.2, 0.1)
    refreshes: int | None = None
    refresh_interval: float = 0.25
    refresh_growth: float = 1.0
    order: str | tuple[str, ...] = "hilbert3d"
    tile_size: int = 16
    query_block: int = 128
    key_block: int = 128
    tail: str | None = None
    tail_pool: int = 64
    budget: str = "row"
    selection: str = "mass"
    residual_pool: int | None = None
    residual_rank: int | None = None
    few_step_ratios: tuple[float, ...] | None = None
    dense_layers: tuple[int, ...] = ()
    min_tokens: int = 0
    share_maps_across_branches: bool = False
    precision: str = "full"
    backend: str = "auto"
    last_step_dense: bool = False
    dense_precision: str = "full"
    correction_precision: str | None = None

    def __post_init__(self):
        sequences = ["keep_ratios", "dense_layers"]
        if self.few_step_ratios is not None:
            sequences.append("few_step_ratios")
        for name in sequences:
            object.__setattr__(self, name, as_tuple(name, getattr(self, name)))
        check_fraction("dense_fraction", self.dense_fraction, zero_allowed=True)
        check_fraction("refresh_interval", self.refresh_interval)
        check_number("refresh_growth", self.refresh_growth, least=1)
        check_ratios("keep_ratios", self.keep_ratios)
        if self.few_step_ratios is not None:
            check_ratios("few_step_ratios", self.few_step_ratios)
        self._check_order()
        if self.refreshes is not None:
            check_int("refreshes", self.refreshes, least=len(self.keep_ratios))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}; got "
                    f"{getattr(self, name)!r}."
                )
        check_blocks(self)
        if self.selection == "error" and self.tail is None:
            raise ValueError(
                'selection "error" ranks blocks by what the tail gets wrong; got tail=None. Set '
                'tail="mean" or "moment", or selection="mass".'
            )
        self._check_residual()
        for layer in self.dense_layers:
            check_int("dense_layers", layer, least=0)
        check_int("min_tokens", self.min_tokens, least=0)
        check_flag("last_step_dense", self.last_step_dense)
        check_flag("share_maps_across_branches", self.share_maps_across_branches)
        if not isinstance(self.backend, str) or not self.backend:
            raise TypeError(f'backend must be "auto" or a backend\'s name; got {self.backend!r}.')

    def _check_order(self) -> None:
        if not isinstance(self.order, str):
            object.__setattr__(self, "order", as_tuple("order", self.order, "names"))
        names = (self.order,) if isinstance(self.order, str) else self.order
        if not set(names) <= set(ORDERS) or len(set(names)) != len(names) or not names:
            raise ValueError(
                f"order must be one of {', '.join(ORDERS)}, or several different ones of them; got "
                f"{self.order!r}."
            )

    def _check_residual(self) -> None:
        if self.residual_rank is not None:
            check_int("residual_rank", self.residual_rank, least=2)
            if self.residual_rank % 2 or self.residual_rank > 32 or self.residual_pool is None:
                raise ValueError(
                    "residual_rank must be even, 32 at most, and needs residual_pool; got "
                    f"residual_rank {self.residual_rank} and residual_pool {self.residual_pool}."
                )
        if self.residual_pool is None:
            return
        check_int("residual_pool", self.residual_pool, least=1)
        if self.query_block % self.residual_pool:
            raise ValueError(
                f"residual_pool must divide query_block; got residual_pool {self.residual_pool} "
                f"and query_block {self.query_block}."
            )

    @property
    def tail_cost(self) -> float:
        """Work for a key that is not kept, relative to one that is: 0 where it is dropped."""
        return 0.0 if self.tail is None else 1 / self.tail_pool

    def kernel(self, precision: str) -> dict[str, str]:
        """Which kernel has products of this precision: `backend` where it is `precision`'s."""
        backend = self.backend if precision == self.precision else "auto"
        return dict(precision=precision, backend=backend)

    @property
    def dense_precisions(self) -> tuple[str, str]:
        """Of dense attention, and of that which a correction is measured by."""
        return self.dense_precision, self.correction_precision or self.dense_precision

    def per_call(self, exact: bool = False) -> dict[str, Any]:
        """Fields that every sparse attention call is made with, under their names.

        `exact`: for a correction, which would repeat the errors of 8 bits until the next one.
        """
        fields = {x: getattr(self, x) for x in ("budget", "selection", "tail", "tail_pool")}
        return fields | self.kernel("full" if exact else self.precision)

    def replace(self, **changes: Any) -> DFSAttnConfig:
        """A copy with some fields changed; an unknown name raises `ValueError`."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DFSAttnConfig:
        """Build a config from plain data; an unknown name raises `ValueError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"Unknown config field {', '.join(map(repr, unknown))}; known fields are "
                f"{', '.join(sorted(known))}."
            )
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the config to a `.json`, `.yaml` or `.yml` file."""
        write_fields(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> DFSAttnConfig:
        """Read a config from a `.json`, `.yaml` or `.yml` file; fields left out keep defaults."""
        return cls.from_dict(read_fields(Path(path)))
