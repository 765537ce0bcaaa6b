"""Rows of tensors where heads may differ in which ones they mean."""

from __future__ import annotations

from torch import Tensor


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of `[B, H, N, D]` at `[R]`, or at each head's own `[B, H, R]`, as `[B, H, R, D]`."""
    if rows.ndim == 1:
        return x.index_select(2, rows)
    return x.gather(2, rows.long()[..., None].expand(-1, -1, -1, x.shape[3]))
