"""How the Gluon kernel for sm90 reads the pools that stand for blocks a row does not keep.

A tile holds as many pools as it would keys: those of `POOL` such tiles, where a pool has `POOL`
keys.
"""

from __future__ import annotations

from . import _hopper_rings as rings
from ._hopper_rings import gl, gluon, warpgroup_mma


@gluon.jit
def num_tiles(i_count, NUM_BLOCKS, POOL: gl.constexpr):
    """Tiles of pools that a row reads; none where it keeps every block."""
    return gl.where(i_count == NUM_BLOCKS, 0, (NUM_BLOCKS + POOL - 1) // POOL)


@gluon.jit
def fetch_pools(k_ring, v_ring, i_tile, i_end, keys, values, i_b, i_h, TRANSPOSED: gl.constexpr):
    """The loading warp's part: tiles `i_tile` to `i_end` of the rings, zeros behind the end."""
    KEYS: gl.constexpr = k_ring[0].shape[1]
    for i in range(i_tile, i_end):
        rings.fetch(k_ring, i, keys, i_b, i_h, (i - i_tile) * KEYS, 0)
        if i > i_tile:
            i_pool = (i - 1 - i_tile) * KEYS
            rings.fetch_values(v_ring, i - 1, values, i_b, i_h, i_pool, TRANSPOSED)
    if i_end > i_tile:
        i_pool = (i_end - 1 - i_tile) * KEYS
        rings.fetch_values(v_ring, i_end - 1, values, i_b, i_h, i_pool, TRANSPOSED)


@gluon.constexpr_function
def _columns(keys):
    """A layout of `[keys, 16]`: each of a warpgroup's threads has a part of one row."""
    return gl.BlockedLayout([1, keys // 8], [keys // 4, 128 // keys], [4, 1], [1, 0])


@gluon.constexpr_function
def each_key(keys):
    """A layout of `[keys]`, as `load_bias` gives them."""
    return gl.SliceLayout(1, _columns(keys))


@gluon.jit
def make_bias_tiles(DTYPE: gl.constexpr, KEYS: gl.constexpr):
    """Shared memory for a tile's bias as 16 columns that count as keys; one for each warpgroup."""
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, 16], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [2, KEYS, 16], TILE)


@gluon.jit
def pools_at(bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, PER_BLOCK: gl.constexpr):
    """Where a row's bits are, and its head's bias of each pool; key blocks, pools of each."""
    p_bits = bits + (i_bh * NUM_ROWS + i_q).to(gl.int64) * ((NUM_BLOCKS + 7) // 8)
    p_bias = bias + i_bh.to(gl.int64) * NUM_BLOCKS * PER_BLOCK
    return p_bits, p_bias, NUM_BLOCKS, PER_BLOCK


@gluon.jit
def load_bias(i, pools, scale_log2, KEYS: gl.constexpr):
    """What the logits of the i-th tile of pools get before the scale, `[KEYS]`.

    -inf for pools of kept blocks and behind the end; 0 for tiles of keys, which are before the 0th.
    """
    p_bits, p_bias, NUM_BLOCKS, PER_BLOCK = pools
    o_pool = i * KEYS + gl.arange(0, KEYS, each_key(KEYS))
    o_block = o_pool // PER_BLOCK
    m_there = (o_pool >= 0) & (o_block < NUM_BLOCKS)
    b_bits = gl.load(p_bits + o_block // 8, mask=m_there, other=255).to(gl.int32)
    b_bias = gl.load(p_bias + o_pool, mask=m_there, other=0.0)
    b_bias *= 1.4426950408889634 / scale_log2
    b_bias = gl.where((b_bits >> (o_block % 8)) & 1 != 0, float("-inf"), b_bias)
    return gl.where(o_pool < 0, 0.0, b_bias)


@gluon.jit
def put_bias(b_bias, b_tile):
    """Bias of the next tile into shared memory: one column, and a second of what rounding left."""
    KEYS: gl.constexpr = b_tile.shape[0]
    DTYPE: gl.constexpr = b_tile.dtype
    # float16 ends at 65504.
    b_bias = gl.minimum(b_bias, 60000.0)
    # [KEYS]
    b_high = b_bias.to(DTYPE)
    b_low = gl.where(b_bias == float("-inf"), 0.0, b_bias - b_high.to(gl.float32)).to(DTYPE)
    # [1, 16]
    o_column = gl.arange(0, 16, gl.SliceLayout(0, _columns(KEYS)))[None, :]
    b_zero = gl.zeros([KEYS, 16], DTYPE, _columns(KEYS))
    b_columns = gl.where(o_column == 1, b_low[:, None], b_zero)
    b_tile.store(gl.where(o_column == 0, b_high[:, None], b_columns))
    # The tensor cores read past the caches of ordinary stores.
    rings.fence_async_shared()


@gluon.jit
def add_bias(b_s, b_tile, ROWS: gl.constexpr, LOGITS: gl.constexpr):
    """Goes on with the product of a tile's keys: ones times what `put_bias` left.

    The tensor cores add it in passing; the threads would take longer than for exponentials.
    """
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LOGITS, k_width=2)
    m_used = gl.arange(0, 16, gl.SliceLayout(0, LEFT))[None, :] < 2
    b_zero = gl.zeros([ROWS, 16], b_tile.dtype, LEFT)
    b_ones = gl.where(m_used, gl.full([ROWS, 16], 1.0, b_tile.dtype, LEFT), b_zero)
    return warpgroup_mma(b_ones, b_tile.permute((1, 0)), b_s, is_async=True)
