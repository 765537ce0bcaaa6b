import pytest
import torch

from dfsattn_diffusers.kernels import BlockMap, PackedBlockMap

BLOCKS = dict(query_block=128, key_block=64)


def random_mask(rows=13, columns=21, density=0.3, seed=0):
    make = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 3, rows, columns, generator=make) < density
    mask[0, 0, 0], mask[1, 2, -1] = False, True
    return mask


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 21])
def test_round_trips(columns):
    mask = random_mask(columns=columns)
    block_map = BlockMap.from_mask(mask, **BLOCKS)
    assert torch.equal(block_map.to_mask(), mask)
    packed = block_map.pack()
    assert packed.bits.dtype == torch.uint8
    assert packed.nbytes == 2 * 3 * 13 * -(-columns // 8)
    again = packed.unpack()
    assert torch.equal(again.counts, block_map.counts)
    assert torch.equal(again.indices, block_map.indices)
    assert (again.num_key_blocks, again.query_block, again.key_block) == (columns, 128, 64)


def test_entries_are_ascending_and_zero_after_the_count():
    mask = random_mask()
    block_map = BlockMap.from_mask(mask, **BLOCKS)
    for place in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        row, indices = mask[tuple(place)], block_map.indices[tuple(place)]
        kept = row.nonzero().flatten().int()
        assert block_map.counts[tuple(place)] == len(kept)
        listed = kept if not row.all() else kept[:0]
        assert torch.equal(indices[: len(listed)], listed)
        assert not indices[len(listed) :].any()


def test_full_rows_need_no_width():
    mask = random_mask()
    mask[:, :, -1] = True
    widest = int(mask[:, :, :-1].sum(-1).max())
    block_map = BlockMap.from_mask(mask, **BLOCKS, max_count=widest)
    assert block_map.indices.shape[-1] == widest < mask.shape[-1]
    assert torch.equal(block_map.to_mask(), mask)
    assert torch.equal(block_map.pack().unpack().to_mask(), mask)


def test_too_small_max_count_keeps_the_first_blocks():
    mask = random_mask(density=0.6)
    kept = BlockMap.from_mask(mask, **BLOCKS, max_count=4).to_mask()
    full = mask.all(-1, keepdim=True)
    assert torch.equal(kept, mask & ((mask.cumsum(-1) <= 4) | full))


def test_full():
    block_map = BlockMap.full(2, 3, 4, 5, **BLOCKS)
    assert block_map.to_mask().all()
    assert block_map.to_mask().shape == (2, 3, 4, 5)


def test_long_rows_are_taken_first_and_else_as_they_come():
    counts = [[1, 9, 15, 2], [3, 8, 0, 16]]
    mask = torch.arange(16) < torch.tensor(counts)[None, ..., None]
    block_map = BlockMap.from_mask(mask, query_block=128, key_block=128)
    # From 16 on, then 8 to 15, then 2 and 3, then 1, then none.
    assert block_map.by_count.tolist() == [7, 1, 2, 5, 3, 4, 0, 6]
    assert block_map.by_count.dtype == torch.int32


def test_rows_of_even_maps_are_taken_as_they_come():
    block_map = BlockMap.full(2, 3, 5, 7, query_block=128, key_block=128, device="cpu")
    assert block_map.by_count.tolist() == list(range(30))


def test_rows_of_long_sequences_are_taken_head_by_head():
    counts = torch.tensor([[[100, 9, 300, 300], [200, 40, 250, 3]]], dtype=torch.int32)
    block_map = BlockMap(counts, counts.new_zeros(1, 2, 4, 300), 1024, **BLOCKS)
    # The mean is 150: of each head the rows from 75 on, long ones first, then the others so.
    assert block_map.by_count.tolist() == [2, 3, 0, 6, 4, 1, 5, 7]
    assert block_map.by_count.dtype == torch.int32


def test_what_kernels_asked_for_stays_with_the_packed_map():
    block_map = BlockMap.full(1, 2, 3, 5, **BLOCKS)
    assert block_map.pack().by_count is None
    order = block_map.by_count
    packed = block_map.pack()
    assert packed.unpack().by_count is order
    assert packed.nbytes == packed.bits.nbytes + 6 * 4


def test_maps_of_the_largest_model_fit():
    """HunyuanVideo 720p, 60 layers, two branches: at most 300 MiB."""
    packed = BlockMap.full(1, 24, 931, 931, **BLOCKS).pack()
    assert isinstance(packed, PackedBlockMap)
    assert packed.bits.untyped_storage().nbytes() == packed.nbytes
    assert 60 * 2 * packed.nbytes <= 300 * 2**20


def test_maps_of_the_largest_model_fit_with_the_order_of_their_rows():
    """HunyuanVideo 720p, 60 layers: at most 300 MB."""
    block_map = BlockMap.full(1, 24, 931, 931, **BLOCKS)
    assert block_map.by_count is not None
    packed = block_map.pack()
    held = [packed.bits.untyped_storage().nbytes(), packed.by_count.untyped_storage().nbytes()]
    assert sum(held) == packed.nbytes
    assert 60 * packed.nbytes <= 300e6


def test_nothing_depends_on_values():
    """On the meta device there are no values: whatever waits for one fails."""
    mask = torch.ones(1, 2, 3, 9, dtype=torch.bool, device="meta")
    packed = BlockMap.from_mask(mask, **BLOCKS, max_count=5).pack()
    assert packed.unpack().to_mask().shape == mask.shape


def test_bad_input():
    counts = torch.zeros(1, 1, 2, dtype=torch.int32)
    indices = torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="counts must be int32, got torch.int64"):
        BlockMap(counts.long(), indices, 3, **BLOCKS)
    with pytest.raises(ValueError, match=r"indices \[B, H, nQ, max_count\], got .*\[1, 1, 1, 3\]"):
        BlockMap(counts, indices[:, :, :1], 3, **BLOCKS)
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        BlockMap(counts, indices.to("meta"), 3, **BLOCKS)
    with pytest.raises(ValueError, match="num_key_blocks must be a positive int, got 0"):
        BlockMap(counts, indices, 0, **BLOCKS)
    with pytest.raises(ValueError, match="mask must be .* bool tensor, got torch.float32"):
        BlockMap.from_mask(torch.ones(1, 1, 2, 2), **BLOCKS)
    with pytest.raises(ValueError, match="max_count must be a positive int, got 0"):
        BlockMap.from_mask(random_mask(), **BLOCKS, max_count=0)
