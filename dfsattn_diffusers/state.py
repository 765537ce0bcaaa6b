"""What is known during one generation: step, branch, token layout, block map of each layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .configs import DFSAttnConfig
from .kernels import BlockMap, PackedBlockMap
from .kernels.low_rank import LowRank
from .layout import TokenGeometry, TokenLayout
from .memory import ResidualLedger
from .report import MapUse, Report, RunRecord, Stopwatch
from .schedule import Decision, any_reuse, config_for_steps, decide
from .selection import Selection
from .text import TextLengths

# Generations that a report goes back.
_REMEMBERED_RUNS = 8


@dataclass(frozen=True)
class Position:
    """Where a transformer call stands in its generation.

    Attributes:
        step: Denoising step, from 0.
        num_steps: Steps of the whole run.
        branch: Guidance branch: the host's name for it, or the call's ordinal within the step.
    """

    step: int
    num_steps: int
    branch: str


@dataclass(frozen=True)
class Forward:
    """One call of one transformer: who calls, when, and over which tokens.

    Attributes:
        model: Name of the transformer within its pipeline.
        position: Where the call stands in its generation.
        geometry: The tokens as the model lays them out.
        text: Valid text tokens; None means all.
        device: Of the activations.
    """

    model: str
    position: Position
    geometry: TokenGeometry
    text: TextLengths | None
    device: torch.device

    def text_lengths(self, device: torch.device) -> Tensor | None:
        """`[B]` valid text tokens per batch row on a layer's device; None means all."""
        return None if self.text is None else self.text.rows.to(device)


@dataclass(frozen=True)
class Kept:
    """What one refresh of a layer leaves for the calls to come.

    Attributes:
        packed: The block map; None before the first refresh.
        choice: `[B, H]` the heads' curves, which the map goes with; None for the first.
        residual: What sparse attention lacked; None without a correction.
    """

    packed: PackedBlockMap | None = None
    choice: Tensor | None = None
    residual: Tensor | LowRank | None = None


@dataclass
class _Cached:
    segment: int
    batch: int
    geometry: TokenGeometry
    kept: Kept
    use: MapUse


class DFSAttnState:
    """State of one pipeline, shared by the processors of all its transformers.

    The hook says where a generation stands (`begin_run`, `begin_forward`, `end_forward`);
    processors ask what to do (`decide`, `layout`, `kept`) and hand back what they selected
    (`store`). Nothing here reads from the device.

    Args:
        config: The method's settings.

    Attributes:
        settings: What the run that is on follows: `config`, or what it says for short runs.
    """

    def __init__(self, config: DFSAttnConfig):
        self.config = self.settings = config
        self.forward: Forward | None = None
        # Device, dtype and head dim of calls that the backend is known to serve.
        self.served: set[tuple] = set()
        # Told layer, query, key, map and curves of every sparse call, for `analysis`.
        self.observer: Callable[[int, Tensor, Tensor, BlockMap, Tensor | None], None] | None = None
        self.residuals = ResidualLedger(config)
        self._runs: deque[RunRecord] = deque(maxlen=_REMEMBERED_RUNS)
        self._maps: dict[tuple[str, int, str], _Cached] = {}
        self._layouts: dict[tuple[TokenGeometry, torch.device], TokenLayout] = {}
        self._stopwatch: Stopwatch | None = None

    def __repr__(self) -> str:
        where = "idle"
        if self.forward is not None:
            position = self.forward.position
            where = f"step {position.step} of {position.num_steps}, branch {position.branch!r}"
        return f"DFSAttnState({where}, {len(self._maps)} block maps, {len(self._runs)} runs)"

    def begin_run(self, num_steps: int) -> None:
        """Start a generation: maps of the last one are dropped."""
        self.drop_maps()
        self.settings = config_for_steps(self.config, num_steps)
        self._runs.append(RunRecord(num_steps))

    def begin_forward(self, forward: Forward) -> None:
        if not self._runs:
            self.begin_run(forward.position.num_steps)
        if forward.position.num_steps != self._runs[-1].num_steps:
            self._learn_length(forward.position.num_steps)
        self.forward = forward
        self._runs[-1].steps.add(forward.position.step)
        self._stopwatch = Stopwatch(forward.device)

    def _learn_length(self, num_steps: int) -> None:
        """The run that is on has another number of steps than was known at its start."""
        self._runs[-1].num_steps = num_steps
        settings = config_for_steps(self.config, num_steps)
        if settings != self.settings:
            # What is kept was made for the others.
            self.drop_maps()
            self.settings = settings

    def end_forward(self) -> None:
        if self._stopwatch is not None:
            self._stopwatch.stop()
            self._runs[-1].stopwatches.append(self._stopwatch)
            self._stopwatch = None

    def drop_maps(self) -> None:
        """Free the block maps and layouts; the report of past runs stays."""
        self.forward = None
        self._maps.clear()
        self.residuals.clear()
        self._layouts.clear()

    def reset(self) -> None:
        """Forget everything, reports included."""
        self.drop_maps()
        self._runs.clear()

    def report(self) -> Report:
        """Summary of the latest generations. Waits for the device."""
        return Report(tuple(run.summary() for run in self._runs))

    def decide(self, layer: int, batch: int) -> Decision:
        """What layer number `layer` does in this forward, with `batch` rows."""
        forward, cached = self._require_forward(), self._cached(layer, batch)
        return decide(
            forward.position.step,
            forward.position.num_steps,
            layer,
            self.settings,
            video_tokens=forward.geometry.video_tokens,
            cached_segment=cached.segment if cached else None,
        )

    def check_memory(self, like: Tensor) -> None:
        """Raise `MemoryError` where residuals of `[B, rows, H, D]` like this one cannot fit."""
        forward, config = self._require_forward(), self.settings
        corrected = config.residual_pool and any_reuse(config, forward.position.num_steps)
        if not corrected or forward.geometry.video_tokens < config.min_tokens:
            return
        held = (cached.kept.residual for cached in self._maps.values())
        self.residuals.enter(forward.model, self._branch(len(like)), forward.geometry, like, held)

    def note_dense(self, reason: str) -> None:
        self._runs[-1].modes["dense"] += 1
        self._runs[-1].dense_reasons[reason] += 1

    def layout(self, device: torch.device) -> TokenLayout:
        """Token layout of this forward on a layer's device, built once for each."""
        forward = self._require_forward()
        key = forward.geometry, device
        if key not in self._layouts:
            self._layouts[key] = TokenLayout.build(
                forward.geometry,
                order=self.settings.order,
                tile_size=self.settings.tile_size,
                query_block=self.settings.query_block,
                key_block=self.settings.key_block,
                device=device,
            )
        return self._layouts[key]

    def kept(self, layer: int, batch: int) -> Kept:
        """What `decide` said to reuse."""
        cached = self._cached(layer, batch)
        cached.use.calls += 1
        self._runs[-1].modes["reuse"] += 1
        return cached.kept

    def store(self, layer: int, batch: int, segment: int, selection: Selection, kept: Kept) -> None:
        """Keep a new selection for the calls to come."""
        # The tail does a little work for everything that is not kept.
        tail = self.settings.tail_cost
        density = selection.density * (1 - tail) + tail
        use = MapUse(density, selection.recall, calls=1, dense=kept.residual is not None)
        self._runs[-1].modes["refresh"] += 1
        self._runs[-1].maps.append(use)
        geometry = self.forward.geometry
        self._maps[self._key(layer, batch)] = _Cached(segment, batch, geometry, kept, use)

    def _branch(self, batch: int) -> str:
        """The branch, or what those that share their maps have in common."""
        if self.settings.share_maps_across_branches:
            return f"{batch} x {self.forward.geometry}"
        return self.forward.position.branch

    def _key(self, layer: int, batch: int) -> tuple[str, int, str]:
        return self.forward.model, layer, self._branch(batch)

    def _cached(self, layer: int, batch: int) -> _Cached | None:
        cached = self._maps.get(self._key(layer, batch))
        fits = cached and cached.batch == batch and cached.geometry == self.forward.geometry
        return cached if fits else None

    def _require_forward(self) -> Forward:
        if self.forward is None:
            raise RuntimeError(
                "A DFSAttn processor ran outside a call of its transformer. Call the transformer "
                "itself, not its blocks; if its hooks were removed by hand, call disable_dfsattn "
                "and enable_dfsattn again."
            )
        return self.forward
