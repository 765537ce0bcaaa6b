"""How the Gluon kernel for sm90 reads the pools that stand for blocks a row does not keep.

A tile holds as many pools as a key block has keys: those of `POOL` key blocks, where a pool has
`POOL` keys.
"""

from __future__ import annotations

import math

from . import _hopper_rings as rings
from ._hopper_rings import gl, gluon

# Whole bytes of a row's bits for every tile, and one register for them.
SIZES = (8, 16, 32, 64)


@gluon.constexpr_function
def log2_of(pool):
    """The weight of a full pool, in base 2."""
    return math.log2(pool)


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
def row_at(bits, log_counts, i_bh, i_b, i_q, NUM_ROWS, NUM_BLOCKS, PER_BLOCK: gl.constexpr):
    """Where a row's bits are, and its logarithms of the pools' keys."""
    i_row = (i_bh * NUM_ROWS + i_q).to(gl.int64)
    return bits + i_row * ((NUM_BLOCKS + 7) // 8), log_counts + i_b * NUM_BLOCKS * PER_BLOCK


@gluon.jit
def kept_bits(p_bits, i, NUM_BLOCKS, POOL: gl.constexpr):
    """A number whose bits say which key blocks of the i-th tile the row keeps."""
    WORD: gl.constexpr = gl.int64 if POOL > 32 else gl.int32
    # Behind the row's last byte any will do: no pool is there.
    i_last = (NUM_BLOCKS - 1) // 8
    i_byte = i * (POOL // 8)
    i_bits = gl.load(p_bits + gl.minimum(i_byte, i_last)).to(WORD)
    for B in gl.static_range(1, POOL // 8):
        i_bits |= gl.load(p_bits + gl.minimum(i_byte + B, i_last)).to(WORD) << (8 * B)
    return i_bits


@gluon.jit
def weigh(b_s, i_bits, p_log_counts, i, i_full, NUM_BLOCKS, scale_log2, POOL: gl.constexpr):
    """Logits of the i-th tile, to which the weight of a full pool is still to be added.

    Args:
        i_bits: The key blocks to hide, as `kept_bits` has them.
        i_full: Pools of tiles before this one are full.
    """
    LOGITS: gl.constexpr = b_s.type.layout
    POOLS: gl.constexpr = b_s.shape[1]
    PER_BLOCK: gl.constexpr = POOLS // POOL
    # Blocks of 8 columns, over which the layout repeats: a thread's shift, then a constant.
    GROUP: gl.constexpr = 8 // PER_BLOCK if PER_BLOCK < 8 else 1
    # [POOLS]
    o_step = gl.arange(0, POOLS, gl.SliceLayout(0, LOGITS))
    o_block = o_step // PER_BLOCK
    m_kept = (((i_bits >> (o_block % GROUP)) >> (o_block // GROUP * GROUP)) & 1) != 0
    # [ROWS, POOLS]
    b_s = gl.where(m_kept[None, :], float("-inf"), b_s)
    if i >= i_full:
        # Short pools weigh less, those behind the end nothing.
        o_pool = i * POOLS + o_step
        m_pool = o_pool < NUM_BLOCKS * PER_BLOCK
        b_log = gl.load(p_log_counts + o_pool, mask=m_pool, other=float("-inf"))
        b_less = (b_log * 1.4426950408889634 - log2_of(POOL)) * (1.0 / scale_log2)
        b_s += b_less[None, :]
    return b_s
