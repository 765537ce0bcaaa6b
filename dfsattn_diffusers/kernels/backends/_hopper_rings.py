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
    "TensorDescriptor", "await_turn", "clear_rows", "fence_async_shared", "fetch", "gl", "gluon",
    "grant_turn", "make_ring", "receive", "receive_if", "release", "slot", "warpgroup_mma",
    "warpgroup_mma_wait",
]

# The names of triton 3.9, else those of 3.6.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Gluon has no named barriers. Triton takes 0 to 3 here; 6 and 7 are the warpgroups' turns, at 5
# they meet; one that computes alone meets itself at 6.
_AWAIT_6 = gl.constexpr("bar.sync 6, 256; mov.b32 $0, $1;")
_AWAIT_7 = gl.constexpr("bar.sync 7, 256; mov.b32 $0, $1;")
_GRANT_6 = gl.constexpr("bar.arrive 6, 256; mov.b32 $0, $1;")
_GRANT_7 = gl.constexpr("bar.arrive 7, 256; mov.b32 $0, $1;")
_MEET = gl.constexpr("bar.sync 5, 256; mov.b32 $0, $1;")
_MEET_ALONE = gl.constexpr("bar.sync 6, 128; mov.b32 $0, $1;")


@gluon.jit
def _call(ASM: gl.constexpr, i_any):
    # Inline assembly must have an operand and a result.
    gl.inline_asm_elementwise(ASM, "=r,r", [i_any], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_turn(W: gl.constexpr, i_any):
    """Until the other warpgroup grants warpgroup W a turn."""
    _call(_AWAIT_6 if W == 0 else _AWAIT_7, i_any)


@gluon.jit
def grant_turn(W: gl.constexpr, i_any):
    """Warpgroup W, the other one, may go on."""
    _call(_GRANT_6 if W == 0 else _GRANT_7, i_any)


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
    """This warpgroup is done with the i-th tile."""
    mbarrier.arrive(_slot(ring[2], i), count=1)


@gluon.jit
def fetch(ring, i, source, i_b, i_h, i_row, i_column):
    """A part of one head's matrix as the ring's i-th tile, once all are done with its slot."""
    _wait(ring[2], i, 1)
    mbarrier.expect(_slot(ring[1], i), source.block_type.nbytes)
    _load(source, [i_b, i_h, i_row, i_column], _slot(ring[1], i), _slot(ring[0], i))


@gluon.jit
def clear_rows(b_tile, i_end, WARPGROUPS: gl.constexpr, W: gl.constexpr):
    """Zero a tile in shared memory from row `i_end` on: warpgroup W its share of the tile."""
    SLICE: gl.constexpr = 32
    SHARE: gl.constexpr = b_tile.shape[0] // WARPGROUPS
    D: gl.constexpr = b_tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    o_n = gl.arange(0, SLICE, gl.SliceLayout(1, LAYOUT))
    for START in gl.static_range(W * SHARE, W * SHARE + SHARE, SLICE):
        b_slice = b_tile.slice(START, SLICE)
        # [SLICE, D]
        b_x = b_slice.load(LAYOUT)
        b_slice.store(gl.where((START + o_n < i_end)[:, None], b_x, 0.0).to(b_x.dtype))
    # The tensor cores read past the caches of ordinary stores.
    fence_async_shared()
    _call(_MEET if WARPGROUPS == 2 else _MEET_ALONE, i_end)
