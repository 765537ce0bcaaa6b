"""How the Gluon kernel for sm90 reads the pools that stand for blocks a row does not keep.

A tile holds as many pools as a key block has keys: those of `POOL` key blocks, where a pool has
`POOL` keys.
"""

from __future__ import annotations

from . import _hopper_rings as rings
from ._hopper_rings import gl, gluon

# Whole bytes of a row's bits for every tile, and one register for them.
SIZES = (8, 16, 32, 64)


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
def row_at(bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, POOLS: gl.constexpr, POOL: gl.constexpr):
    """Where a row's bits are, and its head's bias of each pool."""
    i_row = (i_bh * NUM_ROWS + i_q).to(gl.int64)
    p_bias = bias + i_bh.to(gl.int64) * num_tiles(0, NUM_BLOCKS, POOL) * POOLS
    return bits + i_row * ((NUM_BLOCKS + 7) // 8), p_bias


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
def weigh(b_s, i_bits, p_bias, i, scale_log2, POOL: gl.constexpr):
    """Logits of the i-th tile with each pool's bias, before the scale.

    Args:
        i_bits: The key blocks to hide, as `kept_bits` has them.
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
    b_bias = gl.load(p_bias + i * POOLS + o_step)
    b_bias = gl.where(m_kept, float("-inf"), b_bias * (1.4426950408889634 / scale_log2))
    # [ROWS, POOLS]
    return b_s + b_bias[None, :]
