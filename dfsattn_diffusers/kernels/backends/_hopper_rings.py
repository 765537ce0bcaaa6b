"""What the Gluon kernels for sm90 stand on: rings of tiles, from a loading warp to warpgroups."""

from __future__ import annotations

import triton

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if not (3, 6) <= _VERSION <= (3, 9):
    # Gluon is experimental: other releases call things differently.
    raise ImportError(f"it needs triton 3.6 to 3.9, this is {triton.__version__}")

from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

__all__ = [
    "TensorDescriptor", "clear_rows", "fence_async_shared", "fetch", "fetch_values", "gl", "gluon",
    "make_ring", "read_note", "receive", "receive_if", "release", "sixteen_bytes", "slot",
    "warpgroup_mma", "warpgroup_mma_wait", "with_notes", "write_notes",
]

# The names of triton 3.9, else those of 3.6.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Gluon has no named barriers; triton takes 0 to 3 here. An operand and a result are a must.
_MEET = gl.constexpr("bar.sync 5, 256; mov.b32 $0, $1;")


@gluon.constexpr_function
def sixteen_bytes(head_dim, num_warps, rows=1):
    """A layout of rows in 16 bits: a thread has 16 bytes of each of `rows` rows, side by side."""
    return gl.BlockedLayout([rows, 8], [256 // head_dim, head_dim // 8], [num_warps, 1], [1, 0])


@gluon.jit
def make_ring(DTYPE: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
              READERS: gl.constexpr):
    """Shared memory for tiles, and for each a barrier when it is full and one when it is free."""
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    tiles = gl.allocate_shared_memory(DTYPE, [SLOTS, ROWS, D], TILE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return tiles, full, free


@gluon.jit
def with_notes(ring):
    """The ring, with room for 32 numbers that go with each tile."""
    SLOTS: gl.constexpr = ring[0].shape[0]
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = gl.allocate_shared_memory(gl.int32, [SLOTS, 32], FLAT)
    return ring[0], ring[1], ring[2], notes


@gluon.jit
def _slot(buffers, i):
    SLOTS: gl.constexpr = buffers.shape[0]
    return buffers.index(i % SLOTS)


@gluon.jit
def _wait(barriers, i, FLIP: gl.constexpr):
    SLOTS: gl.constexpr = barriers.shape[0]
    mbarrier.wait(_slot(barriers, i), ((i // SLOTS) & 1) ^ FLIP)


@gluon.jit
def receive(ring, i):
    """The i-th tile of the ring, once it has arrived."""
    _wait(ring[1], i, 0)
    return _slot(ring[0], i)


@gluon.jit
def receive_if(m_any, ring, i):
    """Wait for the i-th tile, if there is one."""
    if m_any:
        _wait(ring[1], i, 0)


@gluon.jit
def slot(ring, i):
    """Where the i-th tile is, without waiting for it."""
    return _slot(ring[0], i)


@gluon.jit
def release(ring, i):
    """This warpgroup is done with the i-th tile and its notes: triton has it meet before."""
    mbarrier.arrive(_slot(ring[2], i), count=1)


@gluon.jit
def fetch(ring, i, source, i_b, i_h, i_row, i_column):
    """A part of one head's matrix as the ring's i-th tile, once all are done with its slot."""
    _wait(ring[2], i, 1)
    mbarrier.expect(_slot(ring[1], i), source.block_type.nbytes)
    _load(source, [i_b, i_h, i_row, i_column], _slot(ring[1], i), _slot(ring[0], i))


@gluon.jit
def fetch_values(ring, i, source, i_b, i_h, i_n, TRANSPOSED: gl.constexpr):
    """As `fetch`, rows from `i_n` on, which are columns where the source is transposed."""
    if TRANSPOSED:
        fetch(ring, i, source, i_b, i_h, 0, i_n)
    else:
        fetch(ring, i, source, i_b, i_h, i_n, 0)


@gluon.jit
def write_notes(ring, i, numbers):
    """Numbers that go with the i-th tile, once all are done with its slot; `fetch` sends them."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_place = gl.arange(0, 32, LANES)
    b_notes = gl.full([32], 0, gl.int32, LANES)
    for PLACE in gl.static_range(len(numbers)):
        b_notes = gl.where(o_place == PLACE, numbers[PLACE], b_notes)
    _wait(ring[2], i, 1)
    _slot(ring[3], i).store(b_notes)
    # Every lane has stored its number, and one of them announces the tile.
    _barrier()


@gluon.jit
def read_note(ring, i, PLACE: gl.constexpr):
    """One of the numbers that go with the i-th tile, once it has arrived."""
    # A sum of one makes a scalar of it.
    ANY: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(_slot(ring[3], i).slice(PLACE, 1).load(ANY), 0)


@gluon.jit
def clear_rows(b_tile, i_end, W: gl.constexpr):
    """Zero a tile in shared memory from row `i_end` on: warpgroup W of two its half of the tile."""
    SLICE: gl.constexpr = 32
    HALF: gl.constexpr = b_tile.shape[0] // 2
    D: gl.constexpr = b_tile.shape[1]
    LAYOUT: gl.constexpr = sixteen_bytes(D, gl.num_warps())
    o_n = gl.arange(0, SLICE, gl.SliceLayout(1, LAYOUT))
    for START in gl.static_range(W * HALF, W * HALF + HALF, SLICE):
        b_slice = b_tile.slice(START, SLICE)
        # [SLICE, D]
        b_x = b_slice.load(LAYOUT)
        b_slice.store(gl.where((START + o_n < i_end)[:, None], b_x, 0.0).to(b_x.dtype))
    # The tensor cores read past the caches of ordinary stores.
    fence_async_shared()
    gl.inline_asm_elementwise(_MEET, "=r,r", [i_end], dtype=gl.int32, is_pure=False, pack=1)
