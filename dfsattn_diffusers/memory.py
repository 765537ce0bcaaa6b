"""Residuals that a run is going to keep, refused while nothing is lost where they cannot fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .configs import DFSAttnConfig
from .kernels.low_rank import LowRank, bytes_of
from .layout import TokenGeometry


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where that is not known."""
    # A GPU without memory of its own gets back what the host's page cache holds.
    if device.type != "cuda" or torch.cuda.get_device_properties(device).is_integrated:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    try:
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except RuntimeError:
        # An allocator that was plugged in tells nothing of what it holds in spare.
        return None
    return free + spare


class ResidualLedger:
    """What the residuals of one run will take, per device.

    It refuses only what is sure to fail: activations are not counted, neither are transformers
    and guidance branches that were not called yet.

    Args:
        config: The method's settings.

    Attributes:
        layers: Of each transformer: layers that may be sparse, by the device of their weights.
    """

    def __init__(self, config: DFSAttnConfig):
        self.layers: dict[str, Counter[torch.device]] = {}
        self._config = config
        # By transformer, branch and device: the tokens and rows it is for, layers and bytes.
        self._entries: dict[tuple[str, str, torch.device], tuple[Any, int, int]] = {}

    def clear(self) -> None:
        """The run is over."""
        self._entries = {}

    def enter(
        self,
        model: str,
        branch: str,
        geometry: TokenGeometry,
        like: Tensor,
        held: Iterable[Tensor | LowRank | None],
    ) -> None:
        """Count what calls like this one will keep; asks the device once for all of them.

        Args:
            model: Name of the transformer within its pipeline.
            branch: Guidance branch.
            geometry: Tokens of the call.
            like: `[B, rows, H, D]` of its dtype, on its device.
            held: Residuals kept so far.

        Raises:
            MemoryError: The run's residuals cannot fit.
        """
        key, call, config = (model, branch, like.device), (geometry, like.shape[0]), self._config
        if key in self._entries and self._entries[key][0] == call:
            return
        batch, _, heads, head_dim = like.shape
        slots = geometry.slots(max(config.query_block, config.key_block))
        runs, rank = slots // config.residual_pool, config.residual_rank
        size = runs * head_dim * like.element_size()
        if rank is not None:
            size = bytes_of(runs, head_dim, rank)
        size *= batch * heads
        # Offloading brings weights that are on no accelerator to where they are used.
        layers = sum(
            number
            for device, number in self.layers.get(model, {}).items()
            if device == like.device or device.type in ("cpu", "meta")
        )
        entries = {**self._entries, key: (call, layers, layers * size)}
        self._check(entries, like.device, held)
        self._entries = entries

    def _check(self, entries: dict, device: torch.device, held: Iterable) -> None:
        here = [entry for (_, _, where), entry in entries.items() if where == device]
        layers, need = sum(entry[1] for entry in here), sum(entry[2] for entry in here)
        free = free_memory(device) if need else None
        if free is None:
            return
        room = free + sum(r.nbytes for r in held if r is not None and r.device == device)
        if need <= room:
            return
        pool, block = self._config.residual_pool, self._config.query_block
        larger = [p for p in range(pool + 1, block + 1) if block % p == 0]
        fits = next((p for p in larger if need * pool // p <= room), None)
        advice = "Set residual_pool=None"
        if fits is not None:
            advice = f"Set residual_pool={fits}, which takes {_gb(need * pool // fits)}, or None"
        raise MemoryError(
            f"The residuals of residual_pool={pool} will take {_gb(need)} on {device}, for "
            f"{layers} layers in all transformers and guidance branches so far, but there is room "
            f"for {_gb(room)}. {advice}, or make a smaller video."
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
