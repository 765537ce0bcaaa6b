"""When attention is dense, when a block map is computed, when it is reused."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .configs import DFSAttnConfig

Mode = Literal["dense", "refresh", "reuse"]
# Steps between refreshes that are dense as well: closer ones would be most of a short run.
LEAST_DENSE_INTERVAL = 4
# Runs of fewer steps than this are short ones.
FEW_STEPS = 12
# That stands for them where a cost is to be met.
_SHORT_RUN = 8
# Factor of a config of nearly no cost.
_LEAST = 1e-6


@dataclass(frozen=True)
class Decision:
    """What one attention call does.

    Attributes:
        mode: "dense", "refresh" (compute a map and use it; with a residual, dense as well) or
            "reuse" (use the last map).
        keep_ratio: Kept share of video key blocks; 1 where dense.
        segment: Refreshes that are due so far, less one; -1 where dense.
        reason: Why the call is dense; empty otherwise.
    """

    mode: Mode
    keep_ratio: float = 1.0
    segment: int = -1
    reason: str = ""


def steps_of(fraction: float, num_steps: int) -> int:
    """A share of the run in whole steps: nearest, halves down, at least one unless it is 0.

    50 steps at 0.25 give the paper's 12.
    """
    if fraction == 0:
        return 0
    return max(1, math.ceil(fraction * num_steps - 0.5))


def config_for_steps(config: DFSAttnConfig, num_steps: int) -> DFSAttnConfig:
    """The config that a run of so many steps follows: another in short runs, if it says so."""
    ratios = config.few_step_ratios
    if ratios is None or num_steps >= FEW_STEPS:
        return config
    spread = [ratios[step * len(ratios) // num_steps] for step in range(num_steps)]
    dense = spread.count(1.0)
    return config.replace(
        dense_fraction=dense / num_steps,
        last_step_dense=False,
        keep_ratios=spread[dense:] or [1.0],
        refreshes=None,
        refresh_interval=1 / num_steps,
        refresh_growth=1.0,
        share_maps_across_branches=True,
        residual_pool=None,
        residual_rank=None,
        few_step_ratios=None,
    )


def segment_of(step: int, num_steps: int, config: DFSAttnConfig) -> int:
    """Index of the map that is due in a step, counted from 0; -1 in the dense part."""
    return bisect_right(refresh_steps(config, num_steps), step) - 1


@lru_cache(maxsize=64)
def refresh_steps(config: DFSAttnConfig, num_steps: int) -> tuple[int, ...]:
    """The steps in which a new map is due."""
    due = float(steps_of(config.dense_fraction, num_steps))
    interval = float(steps_of(config.refresh_interval, num_steps))
    if config.residual_pool is not None:
        # A refresh is dense as well: the last dense step serves.
        due -= 0 < due < num_steps
        interval = max(interval, LEAST_DENSE_INTERVAL)
    steps: list[int] = []
    while len(steps) < (config.refreshes or len(config.keep_ratios)):
        if (step := math.floor(due + 0.5)) >= num_steps:
            break
        steps.append(step)
        due += interval
        interval *= config.refresh_growth
    return tuple(steps)


def decide(
    step: int,
    num_steps: int,
    layer: int,
    config: DFSAttnConfig,
    *,
    video_tokens: int,
    cached_segment: int | None,
) -> Decision:
    """Decide for one attention call.

    Args:
        step: Denoising step, from 0.
        num_steps: Steps of the whole run.
        layer: Index of the layer among those that can be sparse.
        config: The method's settings.
        video_tokens: Video tokens of this forward.
        cached_segment: Segment of the map that is at hand, None without one. A map of an earlier
            segment is out of date, so a layer that a block cache skipped refreshes when it runs.
    """
    if layer in config.dense_layers:
        return Decision("dense", reason="dense layer")
    if video_tokens < config.min_tokens:
        return Decision("dense", reason=f"fewer than {config.min_tokens} video tokens")
    if config.last_step_dense and step == num_steps - 1:
        return Decision("dense", reason="last step")
    segment = segment_of(step, num_steps, config)
    if segment < 0:
        return Decision("dense", reason="first part of the run")
    keep_ratio = config.keep_ratios[min(segment, len(config.keep_ratios) - 1)]
    mode = "reuse" if cached_segment == segment else "refresh"
    return Decision(mode, keep_ratio, segment)


@lru_cache(maxsize=64)
def any_reuse(config: DFSAttnConfig, num_steps: int) -> bool:
    """Whether any step would read what a refresh leaves."""
    return any(now.mode == "reuse" for now in decisions(config, num_steps))


def nominal_cost(config: DFSAttnConfig, num_steps: int = 50) -> float:
    """Attention work of a run relative to dense, from the schedule alone, tail included.

    Long videos come close to it; text, whole blocks and `dense_layers` add to it. Where guidance
    branches share dense refreshes, it counts them for each.
    """
    total, config = 0.0, config_for_steps(config, num_steps)
    for now in decisions(config, num_steps):
        if now.mode == "dense" or now.mode == "refresh" and config.residual_pool is not None:
            total += 1
        if now.mode != "dense":
            total += now.keep_ratio + (1 - now.keep_ratio) * config.tail_cost
    return total / num_steps


def decisions(config: DFSAttnConfig, num_steps: int) -> Iterator[Decision]:
    """What a layer does in each step of a run, if it is in no list and the video long enough."""
    cached, config = None, config_for_steps(config, num_steps)
    at = dict(layer=-1, config=config, video_tokens=config.min_tokens)
    for step in range(num_steps):
        now = decide(step, num_steps, cached_segment=cached, **at)
        cached = cached if now.mode == "dense" else now.segment
        yield now


def config_for_cost(config: DFSAttnConfig, cost: float, num_steps: int = 50) -> DFSAttnConfig:
    """A config of this nominal cost: its dense steps and its keep ratios are scaled alike.

    Args:
        config: Where to start from. `dense_fraction`, `keep_ratios` and `few_step_ratios` change,
            and where refreshes are dense and go on to the end of the run, `refresh_interval`; all
            else stays. `few_step_ratios` are made to meet the cost in a run of 8 steps; fewer take
            some percent more or less.
        cost: Attention work relative to dense over a run; in (0, 1].
        num_steps: Steps of that run; 12 at least where the config has `few_step_ratios`.

    Raises:
        ValueError: The cost is out of range, or less than one dense step and the tail take.
    """
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 < cost <= 1:
        raise ValueError(f"cost must be a number in (0, 1]; got {cost!r}.")
    few, config = config.few_step_ratios, config.replace(few_step_ratios=None)
    stretch = config.residual_pool is not None and config.refreshes is not None

    def scaled(dense: float, kept: float) -> DFSAttnConfig:
        interval = config.refresh_interval / dense if stretch else config.refresh_interval
        return config.replace(
            dense_fraction=min(1.0, config.dense_fraction * dense),
            refresh_interval=min(1.0, interval),
            keep_ratios=[min(1.0, ratio * kept) for ratio in config.keep_ratios],
        )

    def with_few(kept: float) -> DFSAttnConfig:
        return config.replace(few_step_ratios=[min(1.0, ratio * kept) for ratio in few])

    least = nominal_cost(scaled(_LEAST, _LEAST), num_steps)
    if cost < least:
        raise ValueError(
            f"cost must be at least {least:.3f} here, what one dense step, a dense last one, dense "
            f"refreshes and the tail take; got {cost}. Set dense_fraction=0, "
            "last_step_dense=False, residual_pool=None, a larger tail_pool or tail=None."
        )
    # Dense steps are whole; keep ratios make up for what they leave.
    ratios = config.keep_ratios
    dense, _ = _bracket(lambda x: nominal_cost(scaled(x, x), num_steps) < cost, ratios)
    _, kept = _bracket(lambda x: nominal_cost(scaled(dense, x), num_steps) < cost, ratios)
    if few is not None:
        _, short = _bracket(lambda x: nominal_cost(with_few(x), _SHORT_RUN) < cost, few)
        few = with_few(short).few_step_ratios
    return scaled(dense, kept).replace(few_step_ratios=few)


def _bracket(below: Callable[[float], bool], ratios: Iterable[float]) -> tuple[float, float]:
    """The factors next to where `below` turns false, from nothing to keeping everything."""
    low, high = _LEAST, 1 / min(ratios)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high
