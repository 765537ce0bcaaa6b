"""The contract between selection and kernels: which key blocks each query block reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .fast import fast

# Where keys and values of two heads are more than a cache holds: 32 MB a head at head dim 128.
_MANY_KEYS = 2**16


@dataclass(frozen=True)
class BlockMap:
    """The kept key blocks of every query block. Nothing here waits for the device.

    Attributes:
        counts: `[B, H, nQ]` int32, kept key blocks per query block.
        indices: `[B, H, nQ, max_count]` int32, ascending in the first `counts` entries, 0 after.
            A row with `counts == num_key_blocks` keeps every block and lists none.
        num_key_blocks: Key blocks of the sequence, `nK`.
        query_block: Query tokens per block.
        key_block: Key tokens per block.
    """

    counts: Tensor
    indices: Tensor
    num_key_blocks: int
    query_block: int
    key_block: int

    def __post_init__(self):
        for name, value in (("counts", self.counts), ("indices", self.indices)):
            if value.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {value.dtype}; convert it with .int()")
        if self.counts.ndim != 3 or self.indices.shape[:-1] != self.counts.shape:
            raise ValueError(
                "counts must be [B, H, nQ] and indices [B, H, nQ, max_count], got "
                f"{list(self.counts.shape)} and {list(self.indices.shape)}"
            )
        if self.counts.device != self.indices.device:
            raise ValueError(
                "counts and indices must be on one device, got "
                f"{self.counts.device} and {self.indices.device}; move one of them"
            )
        for name in ("num_key_blocks", "query_block", "key_block"):
            _check_positive(name, getattr(self, name))

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, query_block: int, key_block: int, max_count: int | None = None
    ) -> BlockMap:
        """Build the map from a boolean mask, on the mask's device.

        Args:
            mask: `[B, H, nQ, nK]` bool, True where query block and key block meet.
            query_block: Query tokens per block.
            key_block: Key tokens per block.
            max_count: Upper bound, known on the host, of the counts of rows that are not full; it
                sets the width of `indices`. Rows above it keep their first `max_count` blocks
                only. None means `nK`, which is always enough.
        """
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise ValueError(
                f"mask must be a [B, H, nQ, nK] bool tensor, got {mask.dtype} {list(mask.shape)}"
            )
        num_key_blocks = mask.shape[-1]
        width = num_key_blocks if max_count is None else max_count
        _check_positive("max_count", width)
        if kernels := fast("map_kernels", mask):
            lists = kernels.list_blocks(mask, num_key_blocks, width, packed=False)
            return cls(*lists, num_key_blocks, query_block, key_block)
        rank = mask.cumsum(-1, dtype=torch.int32)
        counts = rank[..., -1]
        full = counts == num_key_blocks
        # Blocks that are not listed go to one more column, which is cut off.
        listed = mask & (rank <= width) & ~full[..., None]
        column = torch.where(listed, rank - 1, width).long()
        block = torch.arange(num_key_blocks, dtype=torch.int32, device=mask.device)
        indices = block.new_zeros(*mask.shape[:-1], width + 1)
        indices.scatter_(-1, column, block.expand(mask.shape))
        return cls(
            torch.where(full, counts, counts.clamp(max=width)),
            indices[..., :width].contiguous(),
            num_key_blocks,
            query_block,
            key_block,
        )

    @classmethod
    def full(
        cls,
        batch: int,
        heads: int,
        num_query_blocks: int,
        num_key_blocks: int,
        *,
        query_block: int,
        key_block: int,
        device: torch.device | str = "cpu",
    ) -> BlockMap:
        """The map that keeps everything: dense attention."""
        shape = (batch, heads, num_query_blocks)
        counts = torch.full(shape, num_key_blocks, dtype=torch.int32, device=device)
        indices = counts.new_zeros(*shape, 1)
        return cls(counts, indices, num_key_blocks, query_block, key_block)

    def to_mask(self) -> Tensor:
        """`[B, H, nQ, nK]` bool, the mask this map stands for."""
        counts = self.counts[..., None]
        entry = torch.arange(self.indices.shape[-1], device=counts.device)
        column = torch.where(entry < counts, self.indices, self.num_key_blocks).long()
        mask = torch.zeros(
            *self.counts.shape, self.num_key_blocks + 1, dtype=torch.bool, device=counts.device
        )
        mask.scatter_(-1, column, True)
        return mask[..., :-1] | (counts == self.num_key_blocks)

    def pack(self) -> PackedBlockMap:
        """The same map in one bit per block, for keeping."""
        return PackedBlockMap(
            self.bits,
            self.indices.shape[-1],
            self.num_key_blocks,
            self.query_block,
            self.key_block,
            vars(self).get("by_count"),
        )

    @cached_property
    def bits(self) -> Tensor:
        """`[B, H, nQ, ceil(nK / 8)]` uint8 as in `PackedBlockMap`; computed once."""
        if kernels := fast("map_kernels", self.counts):
            return kernels.pack_bits(self.counts, self.indices, self.num_key_blocks)
        mask = F.pad(self.to_mask().to(torch.uint8), (0, -self.num_key_blocks % 8))
        bits = mask.unflatten(-1, (-1, 8)) << torch.arange(8, device=mask.device).to(torch.uint8)
        return bits.sum(-1, dtype=torch.uint8)

    @cached_property
    def by_count(self) -> Tensor:
        """`[B * H * nQ]` int32, rows of the flattened counts in the order to take them; cached.

        Long ones first, up to a factor of two: what comes last then fills up what is uneven. Among
        these as they come, so that keys and values of a head stay in the cache. Of long sequences
        head by head, long ones first in each, and only rows below half the mean after all others:
        that wants half as many heads at a time, and rows of one length go through it together.
        """
        counts = self.counts.flatten(0, 1)
        size = counts.float()
        if self.num_key_blocks * self.key_block < _MANY_KEYS:
            # A float's exponent is one byte to sort by.
            key = (size.view(torch.int32) >> 23).to(torch.uint8)
        else:
            long = (2 * size >= size.mean()).int()
            head = torch.arange(len(counts), dtype=torch.int32, device=counts.device)[:, None]
            # Which class, head and length in one number, the last one lowest.
            key = (long * len(counts) - head) * (self.num_key_blocks + 1) + counts
        return key.flatten().argsort(descending=True, stable=True).int()


@dataclass(frozen=True)
class PackedBlockMap:
    """A `BlockMap` in one bit per block, rows padded to whole bytes.

    Attributes:
        bits: `[B, H, nQ, ceil(nK / 8)]` uint8; bit `i` of byte `j` is key block `8 * j + i`.
        max_count: Width of the map's `indices`.
        num_key_blocks, query_block, key_block: As in `BlockMap`.
        by_count: As in `BlockMap`, where a kernel had asked for it before the map was packed.
    """

    bits: Tensor
    max_count: int
    num_key_blocks: int
    query_block: int
    key_block: int
    by_count: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.bits.nbytes + (0 if self.by_count is None else self.by_count.nbytes)

    def unpack(self) -> BlockMap:
        """The map that was packed, exactly."""
        block_map = self._listed()
        vars(block_map)["bits"] = self.bits
        if self.by_count is not None:
            vars(block_map)["by_count"] = self.by_count
        return block_map

    def _listed(self) -> BlockMap:
        if kernels := fast("map_kernels", self.bits):
            lists = kernels.list_blocks(self.bits, self.num_key_blocks, self.max_count, packed=True)
            return BlockMap(*lists, self.num_key_blocks, self.query_block, self.key_block)
        bit = torch.arange(8, device=self.bits.device).to(torch.uint8)
        mask = (self.bits[..., None] >> bit & 1).flatten(-2)[..., : self.num_key_blocks].bool()
        return BlockMap.from_mask(
            mask,
            query_block=self.query_block,
            key_block=self.key_block,
            max_count=self.max_count,
        )


def block_lengths(k: Tensor, key_block: int, key_lengths: Tensor | None) -> Tensor:
    """`[B, nK]` int32, real keys of each block, never beyond the end of the sequence."""
    start = torch.arange(0, k.shape[2], key_block, dtype=torch.int32, device=k.device)
    room = (k.shape[2] - start).clamp(max=key_block).expand(k.shape[0], -1)
    return (room if key_lengths is None else torch.minimum(room, key_lengths)).contiguous()


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
