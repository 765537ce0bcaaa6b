"""Recall of the sparse attention calls of a running pipeline."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import BlockMap
from ..state import DFSAttnState, Position
from .measure import MEASURES, MapView, Measures, map_density, measure_recall, view_map


@dataclass(frozen=True)
class AttentionRecord:
    """One sparse attention call.

    Attributes:
        model: Name of the transformer within its pipeline.
        layer: Index among the transformer's sparse layers.
        position: Step, number of steps and guidance branch.
        query_blocks: The `M` query blocks that were measured.
        density: `[B, H]` attention work of the whole call relative to dense.
        measures: Recall, its estimate and its bounds, `[B, H, M]` each, on the call's device.
        views: Block maps by head, where they were asked for.
    """

    model: str
    layer: int
    position: Position
    query_blocks: tuple[int, ...]
    density: Tensor
    measures: Measures
    views: dict[int, MapView]

    def rows(self) -> list[dict[str, Any]]:
        """One row of plain data per batch row and head, means over the query blocks.

        `error` is the estimate less the recall. Waits for the device.
        """
        means = {name: getattr(self.measures, name).mean(-1) for name in MEASURES}
        means = {"density": self.density, **means, "error": means["estimate"] - means["recall"]}
        values = {name: mean.tolist() for name, mean in means.items()}
        where = dict(
            model=self.model,
            layer=self.layer,
            step=self.position.step,
            branch=self.position.branch,
        )
        batch, heads = self.density.shape
        return [
            {**where, "row": b, "head": h, **{name: x[b][h] for name, x in values.items()}}
            for b in range(batch)
            for h in range(heads)
        ]


@contextmanager
def record_attention(
    handle: Any,
    *,
    queries: int = 4,
    layers: Collection[int] | None = None,
    steps: Collection[int] | None = None,
    views: Collection[tuple[int, int]] = (),
    seed: int = 0,
) -> Iterator[list[AttentionRecord]]:
    """Measure the sparse calls of an enabled pipeline while it runs.

        with record_attention(handle) as records:
            pipe(prompt)
        rows = to_rows(records)

    What the pipeline computes stays the same, to the bit; only the time changes: a call is
    measured against all keys, for `queries` query blocks. Dense calls leave no record.

    Args:
        handle: What `enable_dfsattn` returned, or a `DFSAttnProcessor`'s `handle`.
        queries: Query blocks to draw for each call; all where there are fewer.
        layers: Sparse layers to measure; None means all.
        steps: Denoising steps to measure; None means all.
        views: Pairs of layer and head whose block map and scores are kept too.
        seed: Of the draw.

    Yields:
        The records, in the order of the calls.

    Raises:
        RuntimeError: The handle is recorded already.
        ValueError: `handle` is none, or `queries` is not positive.
    """
    if not isinstance(getattr(handle, "state", None), DFSAttnState):
        raise ValueError(
            f"handle must be what enable_dfsattn returned, got {type(handle).__name__}; a bare "
            "DFSAttnProcessor has its handle after its first call."
        )
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}.")
    state = handle.state
    if state.observer is not None:
        raise RuntimeError("These attention calls are recorded already; end that recording first.")
    generator = torch.Generator("cpu").manual_seed(seed)
    records: list[AttentionRecord] = []

    def observe(
        layer: int, query: Tensor, key: Tensor, block_map: BlockMap, choice: Tensor | None
    ) -> None:
        forward = state.forward
        if layers is not None and layer not in layers:
            return
        if steps is not None and forward.position.step not in steps:
            return
        layout, text_lengths = state.layout(query.device), forward.text_lengths(query.device)
        num_blocks = -(-forward.geometry.video_tokens // layout.query_block)
        drawn = torch.randperm(num_blocks, generator=generator, device="cpu")[:queries]
        query_blocks = tuple(sorted(drawn.tolist()))
        records.append(
            AttentionRecord(
                forward.model,
                layer,
                forward.position,
                query_blocks,
                map_density(block_map, layout, text_lengths),
                measure_recall(query, key, layout, block_map, query_blocks, text_lengths),
                {
                    head: view_map(query, key, layout, block_map, head, text_lengths, choice)
                    for chosen, head in views
                    if chosen == layer
                },
            )
        )

    state.observer = observe
    try:
        yield records
    finally:
        state.observer = None


def to_rows(records: Sequence[AttentionRecord]) -> list[dict[str, Any]]:
    """The records as plain data, ready for JSON: a row per layer, step, branch, row and head."""
    return [row for record in records for row in record.rows()]


def average(rows: Sequence[dict[str, Any]], name: str, by: Sequence[str]) -> dict[tuple, float]:
    """Mean of one column over all rows that agree in the columns `by`.

    average(rows, "recall", by=("layer", "step"))
    """
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row[name])
    return {key: sum(values) / len(values) for key, values in sorted(groups.items())}
