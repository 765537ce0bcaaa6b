"""Rows of each head in a few directions of its own, at 4 bits a coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 64  # rows that share a scale
ROUNDS = 4  # of the iteration that finds the directions
SMALLEST = 1e-5  # part of a row that makes a direction of its own
TINY = 1e-20
MIX = (0x2C1B3C6D, 0x297A2D39)  # odd factors that spread bits


@dataclass(frozen=True)
class LowRank:
    """`[B, H, R, D]` in `K` directions: a coefficient is a 4-bit code, less 7.5, times a scale.

    Attributes:
        codes: `[B, H, R, K / 2]` uint8, an even direction in the lower bits and the odd one after
            it in the upper.
        scales: `[B, H, ceil(R / RUN), K]` bfloat16.
        basis: `[B, H, K, D]` float32, orthonormal directions.
    """

    codes: Tensor
    scales: Tensor
    basis: Tensor

    @classmethod
    def of(cls, x: Tensor, rank: int) -> LowRank:
        """The main directions of `[B, H, R, D]` float32, without a wait for the device."""
        basis = _main_directions(x.mT @ x, rank)
        coefficients = x @ basis.mT
        runs = F.pad(coefficients, (0, 0, 0, -x.shape[2] % RUN)).unflatten(2, (-1, RUN))
        scales = (runs.abs().amax(3) / 7.5).clamp(min=TINY).to(torch.bfloat16)
        codes = runs / scales.float()[:, :, :, None] + 7.5
        codes = codes.round().clamp(0, 15).to(torch.uint8).flatten(2, 3)[:, :, : x.shape[2]]
        return cls(codes[..., ::2] | codes[..., 1::2] << 4, scales, basis)

    @classmethod
    def join(cls, parts: Sequence[LowRank]) -> LowRank:
        """Slices of heads as one."""
        columns = zip(*((part.codes, part.scales, part.basis) for part in parts))
        return cls(*(torch.cat(column, 1) for column in columns))

    def coefficients(self) -> Tensor:
        """`[B, H, R, K]` float32."""
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(3)
        scales = self.scales.float().repeat_interleave(RUN, 2)[:, :, : codes.shape[2]]
        return (codes - 7.5) * scales

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.scales, self.basis))


def bytes_of(rows: int, head_dim: int, rank: int) -> int:
    """Of one head's `LowRank`."""
    return rows * rank // 2 + 2 * rank * -(-rows // RUN) + 4 * rank * head_dim


def _main_directions(gram: Tensor, rank: int) -> Tensor:
    """`[B, H, rank, D]`, about the first eigenvectors of `[B, H, D, D]`: orthogonal iteration."""
    size = gram.shape[-1]
    # Noise that needs no generator, the same in every call and on every device.
    bits = torch.arange(1, 1 + rank * size, device=gram.device)
    for factor in MIX:
        bits = bits * factor & 0x7FFFFFFF
        bits = bits ^ bits >> 15
    start = bits.float() / 2**31 - 0.5
    basis = start.view(rank, size).expand(*gram.shape[:2], -1, -1)
    for _ in range(ROUNDS):
        basis = _orthonormal(basis @ gram)
    return basis


def _orthonormal(rows: Tensor) -> Tensor:
    """Gram and Schmidt's, twice, since once is not exact; a row without a part of its own is 0."""
    done = rows[..., :0, :]
    for row in rows.split(1, dim=-2):
        row = row / row.norm(dim=-1, keepdim=True).clamp(min=TINY)
        for _ in range(2):
            row = row - (row @ done.mT) @ done
        norm = row.norm(dim=-1, keepdim=True)
        row = torch.where(norm > SMALLEST, row / norm.clamp(min=TINY), 0.0)
        done = torch.cat((done, row), -2)
    return done
