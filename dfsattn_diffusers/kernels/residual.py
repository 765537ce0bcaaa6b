"""What sparse attention lacked when both were computed, kept to correct later outputs."""

from __future__ import annotations

from torch import Tensor

from .fast import fast
from .low_rank import LowRank
from .prologue import pool_tiles
from .rows import take_rows

# Largest slice of the outputs in curve order that is in memory at a time.
_CHUNK_BYTES = 256 * 2**20


def measure_residual(
    exact: Tensor, out: Tensor, rows: Tensor, lengths: Tensor, rank: int | None = None
) -> Tensor | LowRank:
    """Means of `exact - out` over runs of slots.

    Args:
        exact, out: `[B, N, H, D]` attention without and with blocks left out.
        rows: `[P]` or `[B, H, P]` int32, the row of each slot; -1 for padding.
        lengths: `[B or 1, R]` int32, real tokens at the front of each of `R` equal runs.
        rank: Directions of each head to keep; None keeps all.

    Returns:
        `[B, H, R, D]` of the outputs' dtype, or `LowRank` for as much; 0 for a run without tokens.

    Source: window attention with its residual to full attention, shared between steps: Yuan et
    al., DiTFastAttn, arXiv 2406.08552. Here it is that of block-sparse attention, pooled.
    """
    kernels = None if rank is None else fast("low_rank_kernels", out)
    if kernels and kernels.can_measure(exact, out):
        return kernels.measure(exact, out, rows, lengths, rank)
    batch, _, heads, head_dim = out.shape
    residual, parts = None, []
    if rank is None:
        residual = out.new_empty(batch, heads, lengths.shape[1], head_dim)
    exact, out, rows = exact.transpose(1, 2), out.transpose(1, 2), rows.clamp(min=0)
    step = max(1, _CHUNK_BYTES // (4 * batch * rows.shape[-1] * head_dim))
    for start in range(0, heads, step):
        part = slice(start, start + step)
        at = rows if rows.ndim == 1 else rows[:, part]
        lack = take_rows(exact[:, part], at).float().sub_(take_rows(out[:, part], at))
        lack = pool_tiles(lack, lengths)
        if rank is None:
            residual[:, part] = lack
        else:
            parts.append(LowRank.of(lack, rank))
    return LowRank.join(parts) if residual is None else residual


def add_residual(out: Tensor, residual: Tensor | LowRank, slots: Tensor, pool: int) -> None:
    """Add to every row the residual of its run, in place.

    Args:
        out: `[B, N, H, D]`.
        residual: From `measure_residual`.
        slots: `[N]` or `[B, H, N]` int32, the slot of each row.
        pool: Slots of one run.
    """
    kernels, head_dim = fast("residual_kernels", out), out.shape[3]
    if kernels and head_dim & (head_dim - 1) == 0 and out.stride(3) == 1:
        kernels.add(out, residual, slots, pool)
        return
    runs = slots // pool
    if isinstance(residual, Tensor):
        out += take_rows(residual, runs).transpose(1, 2)
        return
    coefficients = take_rows(residual.coefficients(), runs)
    out += (coefficients @ residual.basis).transpose(1, 2).to(out.dtype)
