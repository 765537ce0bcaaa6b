"""The kernels of block maps against the torch code of `BlockMap`: the same bits."""

import pytest
import torch
from kernel_cases import ON_CUDA

from dfsattn_diffusers.kernels import BlockMap

map_kernels = pytest.importorskip("dfsattn_diffusers.kernels.map_kernels")

DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
BLOCKS = dict(query_block=128, key_block=64)


def random_mask(columns, density):
    make = torch.Generator().manual_seed(columns)
    mask = torch.rand(2, 3, 3, columns, generator=make) < density
    mask[0, 0, 0], mask[1, 2, -1] = False, True
    return mask


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize("columns", [1, 8, 9, 256, 591])
@pytest.mark.parametrize("width", [None, 5, 700])
def test_same_as_torch(device, columns, density, width):
    mask = random_mask(columns, density)
    wanted = BlockMap.from_mask(mask, **BLOCKS, max_count=width)
    packed = wanted.pack()
    width = wanted.indices.shape[-1]
    for source, is_packed in ((mask, False), (packed.bits, True)):
        if is_packed:
            wanted = packed.unpack()
        counts, indices = map_kernels.list_blocks(
            source.to(device), columns, width, packed=is_packed
        )
        assert (counts.dtype, indices.dtype) == (torch.int32, torch.int32)
        assert torch.equal(counts.cpu(), wanted.counts)
        assert torch.equal(indices.cpu(), wanted.indices)
        bits = map_kernels.pack_bits(counts, indices, columns)
        assert bits.dtype == torch.uint8 and torch.equal(bits.cpu(), packed.bits)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_maps_use_them(device):
    mask = random_mask(591, 0.3)
    wanted, got = (BlockMap.from_mask(m, **BLOCKS, max_count=200) for m in (mask, mask.to(device)))
    assert torch.equal(got.pack().bits.cpu(), wanted.pack().bits)
    assert torch.equal(got.pack().unpack().indices.cpu(), wanted.indices)
    assert torch.equal(got.pack().unpack().counts.cpu(), wanted.counts)
