"""How the Gluon kernel for sm90 reads the pools that stand for blocks a row does not keep.

A tile holds as many pools as it would keys: those of `POOL` such tiles, where a pool has `POOL`
keys.
"""

from __future__ import annotations

from . import _hopper_rings as rings
from ._hopper_rings import gl, gluon


@gluon.jit
def num_tiles(i_count, NUM_BLOCKS, POOL: gl.constexpr):
    """Tiles of pools that a row reads; none where it keeps every block."""
    return gl.where(i_count == NUM_BLOCKS, 0, (NUM_BLOCKS + POOL - 1) // POOL)


@gluon.jit
def fetch_pools(k_ring, v_ring, i_tile, i_end, keys, values, i_b, i_h):
    """The loading warp's part: tiles `i_tile` to `i_end` of the rings, zeros behind the end."""
    KEYS: gl.constexpr = k_ring[0].shape[1]
    for i in range(i_tile, i_end):
        rings.fetch(k_ring, i, keys, i_b, i_h, (i - i_tile) * KEYS, 0)
        if i > i_tile:
            rings.fetch(v_ring, i - 1, values, i_b, i_h, (i - 1 - i_tile) * KEYS, 0)
    if i_end > i_tile:
        rings.fetch(v_ring, i_end - 1, values, i_b, i_h, (i_end - 1 - i_tile) * KEYS, 0)


@gluon.jit
def row_at(bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, KEYS: gl.constexpr, POOL: gl.constexpr):
    """Where a row's bits are, its head's bias of each pool, key blocks, and pools of each."""
    PER_BLOCK: gl.constexpr = KEYS // POOL
    p_bits = bits + (i_bh * NUM_ROWS + i_q).to(gl.int64) * ((NUM_BLOCKS + 7) // 8)
    return p_bits, bias + i_bh.to(gl.int64) * NUM_BLOCKS * PER_BLOCK, NUM_BLOCKS, PER_BLOCK


@gluon.jit
def bias_of(i, o_k, pools, scale_log2):
    """Bias of the i-th tile's pools, before the scale; -inf in kept blocks and behind the end."""
    p_bits, p_bias, NUM_BLOCKS, PER_BLOCK = pools
    o_pool = i * o_k.shape[0] + o_k
    o_block = o_pool // PER_BLOCK
    m_there = o_block < NUM_BLOCKS
    b_bits = gl.load(p_bits + o_block // 8, mask=m_there, other=255).to(gl.int32)
    b_bias = gl.load(p_bias + o_pool, mask=m_there, other=0.0)
    b_bias *= 1.4426950408889634 / scale_log2
    return gl.where((b_bits >> (o_block % 8)) & 1 != 0, float("-inf"), b_bias)
