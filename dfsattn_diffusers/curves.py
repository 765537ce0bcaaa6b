"""Orders in which the tokens of a latent grid are visited."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CUBOID = (4, 4, 8)


@lru_cache(maxsize=32)
def visiting_order(name: str, grid: tuple[int, int, int]) -> Tensor:
    """Visiting order of a latent grid.

    Args:
        name: "hilbert3d" (space-time Hilbert curve), "hilbert2d" (Hilbert curve in each frame,
            frames one after the other), "hilbert_fw" and "hilbert_fh" (the same in the planes of
            time and width, row after row, and of time and height, column after column), "cuboid"
            (boxes of 4 x 4 x 8 tokens) or "raster".
        grid: Frames, height and width in tokens; any sizes of at least 1.

    Returns:
        `[F * H * W]` int64 on the CPU: entry i is the raster position of the i-th token visited.
        The tensor is shared between callers: do not write to it.

    Raises:
        ValueError: The name is unknown or the grid has an empty axis.
    """
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid must be three sizes of at least 1; got {grid}.")
    if name not in _CURVES:
        raise ValueError(f"order must be one of {', '.join(_CURVES)}; got {name!r}.")
    return torch.argsort(_CURVES[name](*_coordinates(grid), grid))


def inverse_order(order: Tensor) -> Tensor:
    """`[N]` permutation that undoes `order`: `order[inverse_order(order)]` counts up."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return inverse


def _coordinates(grid: tuple[int, int, int]) -> tuple[Tensor, ...]:
    axes = torch.meshgrid(*(torch.arange(size, device="cpu") for size in grid), indexing="ij")
    return tuple(axis.flatten() for axis in axes)


def _hilbert3d(f: Tensor, h: Tensor, w: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return _hilbert_index([f, h, w])


def _hilbert2d(f: Tensor, h: Tensor, w: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return _in_planes(f, h, w)


def _hilbert_fw(f: Tensor, h: Tensor, w: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return _in_planes(h, f, w)


def _hilbert_fh(f: Tensor, h: Tensor, w: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return _in_planes(w, f, h)


def _in_planes(plane: Tensor, *axes: Tensor) -> Tensor:
    index = _hilbert_index(list(axes))
    return plane * (int(index.max()) + 1) + index


def _cuboid(f: Tensor, h: Tensor, w: Tensor, grid: tuple[int, int, int]) -> Tensor:
    key = torch.zeros_like(f)
    for axis, side, size in zip((f, h, w), CUBOID, grid):
        key = key * (-(-size // side)) + axis // side
    for axis, side in zip((f, h, w), CUBOID):
        key = key * side + axis % side
    return key


def _raster(f: Tensor, h: Tensor, w: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return (f * grid[1] + h) * grid[2] + w


_CURVES = {
    "hilbert3d": _hilbert3d,
    "hilbert2d": _hilbert2d,
    "hilbert_fw": _hilbert_fw,
    "hilbert_fh": _hilbert_fh,
    "cuboid": _cuboid,
    "raster": _raster,
}


def _hilbert_index(coordinates: list[Tensor]) -> Tensor:
    """Position along the Hilbert curve of the smallest enclosing power-of-two cube.

    Clipping the cube keeps the order of the points that exist, so any grid works. Transposed-axes
    algorithm of J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004).

    Args:
        coordinates: One `[N]` int64 tensor per axis.

    Returns:
        `[N]` int64, distinct for distinct points.
    """
    x = [axis.clone() for axis in coordinates]
    bits = max(1, max(int(axis.max()) for axis in x).bit_length())
    levels = [1 << b for b in range(bits - 1, 0, -1)]

    for level in levels:
        low = level - 1
        for i in range(len(x)):
            # Per level: where bit i is set, invert the low bits of axis 0; else swap them.
            inverted = (x[i] & level) != 0
            swapped = torch.where(inverted, 0, (x[0] ^ x[i]) & low)
            x[0] = x[0] ^ torch.where(inverted, low, swapped)
            if i:
                x[i] = x[i] ^ swapped

    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    flips = torch.zeros_like(x[0])
    for level in levels:
        flips = flips ^ torch.where((x[-1] & level) != 0, level - 1, 0)
    x = [axis ^ flips for axis in x]

    index = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for axis in x:
            index = (index << 1) | ((axis >> bit) & 1)
    return index
