"""What happened in a generation: which calls ran dense or sparse, how dense, how well, how long."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Time between two points of a device's work, read later so that nothing waits meanwhile."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._end = None

    def stop(self) -> None:
        self._end = self._mark()

    def seconds(self) -> float:
        """Time from start to stop; 0 if it was never stopped. Waits for the device."""
        if self._end is None:
            return 0.0
        if not self._cuda:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class MapUse:
    """A block map's statistics, left on the device, and the calls that used it.

    Attributes:
        density, recall: 0-dim.
        calls: How many.
        dense: Whether the first of them did dense attention as well.
    """

    density: Tensor
    recall: Tensor
    calls: int = 0
    dense: bool = False


@dataclass
class RunRecord:
    """Notes of one generation, kept without reading anything from the device."""

    num_steps: int
    steps: set[int] = field(default_factory=set)
    modes: Counter = field(default_factory=Counter)
    dense_reasons: Counter = field(default_factory=Counter)
    maps: list[MapUse] = field(default_factory=list)
    stopwatches: list[Stopwatch] = field(default_factory=list)

    def summary(self) -> RunReport:
        calls = sum(self.modes.values())
        uses = sum(m.calls for m in self.maps)
        density = sum(m.calls * float(m.density) + m.dense for m in self.maps)
        density += self.modes["dense"]
        recall = sum(m.calls * float(m.recall) for m in self.maps)
        return RunReport(
            num_steps=self.num_steps,
            steps=len(self.steps),
            calls={mode: self.modes[mode] for mode in ("dense", "refresh", "reuse")},
            dense_reasons=dict(self.dense_reasons),
            density=density / calls if calls else 1.0,
            recall=recall / uses if uses else None,
            seconds=sum(watch.seconds() for watch in self.stopwatches),
        )


@dataclass(frozen=True)
class RunReport:
    """One generation.

    Attributes:
        num_steps: Denoising steps that the run was to have.
        steps: Denoising steps that ran.
        calls: Attention calls by mode: "dense", "refresh" (a map was computed), "reuse".
        dense_reasons: Why calls were dense, with their number.
        density: Attention work relative to dense, averaged over all calls.
        recall: Estimated share of the attention that sparse calls kept; None without any.
        seconds: Time spent in the transformers.
    """

    num_steps: int
    steps: int
    calls: dict[str, int]
    dense_reasons: dict[str, int]
    density: float
    recall: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {mode}" for mode, count in self.calls.items())
        recall = "no sparse call" if self.recall is None else f"{self.recall:.1%} (estimated)"
        lines = [
            f"steps    {self.steps} of {self.num_steps}",
            f"calls    {calls}",
            f"density  {self.density:.1%} of dense attention work, dense calls included",
            f"recall   {recall}",
            f"time     {self.seconds:.2f} s in the transformer",
        ]
        lines += [f"dense    {n} calls: {reason}" for reason, n in self.dense_reasons.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The latest generations, oldest first."""

    runs: tuple[RunReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"runs": [run.to_dict() for run in self.runs]}

    def __str__(self) -> str:
        if not self.runs:
            return "DFSAttn: no generation yet"
        return "\n".join(f"DFSAttn run {i}\n{run}" for i, run in enumerate(self.runs, 1))
