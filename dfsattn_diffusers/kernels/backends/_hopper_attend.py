"""A warpgroup's pipeline through a row in 16 bits on sm90: products, softmax, products."""

from __future__ import annotations

from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_rings import gl, gluon, warpgroup_mma, warpgroup_mma_wait
from ._hopper_rows import clear_padding, hide_padding, multiply_keys


@gluon.jit
def _softmax(b_s, b_max, b_sum, scale_log2, MASKED: gl.constexpr):
    """One step of the online softmax, in base 2."""
    # [ROWS]
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2)
    b_shift = gl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_decay = gl.exp2(b_max - b_shift)
    # [ROWS, KEYS]
    b_p = gl.exp2(b_s * scale_log2 - b_shift[:, None])
    return b_p, b_new, b_sum * b_decay + gl.sum(b_p, 1), b_decay


@gluon.jit
def _as_operand(b_p, DTYPE: gl.constexpr, OUT: gl.constexpr):
    # Moves nothing: the registers of a product are laid out as those of a left operand.
    LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    return gl.convert_layout(b_p.to(DTYPE), LAYOUT)


@gluon.jit
def attend(b_q, k_ring, v_ring, b_out, b_max, b_sum, i_tile, i_first, i_end, row, scale_log2,
           W: gl.constexpr, WHOLE: gl.constexpr, CLEAR: gl.constexpr):
    """Tiles `i_first` to `i_end` of a row, values one step after keys.

    Args:
        i_tile: The row's first tile in the rings.
        W: Which of the two warpgroups this is. What one waits for, the other's work hides.
        row: Its tiles, those of key blocks, and of whole ones among these; the blocks, how many of
            them are listed, all keys, the blocks' lengths or None; its pools and the tile for their
            bias, or None.
        WHOLE: These are of whole key blocks. Others are hidden in part, or pools with a bias.
    """
    ROWS: gl.constexpr = b_q.shape[0]
    LOGITS: gl.constexpr = b_max.type.layout.parent
    OUT: gl.constexpr = b_out.type.layout
    DTYPE: gl.constexpr = b_q.dtype
    KEYS: gl.constexpr = k_ring[0].shape[1]
    POOLS: gl.constexpr = not WHOLE and row[7] is not None
    pools, b_bias_tile = row[7], row[8]
    if WHOLE and b_q.shape[1] == 64:
        # Read once a row and not once a tile: 3 % faster. At head dim 128 even a half costs 6 %.
        b_q = b_q.load(gl.DotOperandLayout(operand_index=0, parent=LOGITS, k_width=2))
    i = i_tile + i_first
    if POOLS:
        b_bias = tails.load_bias(i_first - row[1], pools, scale_log2, KEYS)
        tails.put_bias(b_bias, b_bias_tile)
    b_s = multiply_keys(b_q, rings.receive(k_ring, i), LOGITS)
    if POOLS:
        b_s = tails.add_bias(b_s, b_bias_tile, ROWS, LOGITS)
        # In flight while the products run.
        b_bias = tails.load_bias(i_first + 1 - row[1], pools, scale_log2, KEYS)
    # [ROWS, KEYS]
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    rings.release(k_ring, i)
    if not WHOLE:
        b_s = hide_padding(b_s, i_first, row)
    if POOLS:
        tails.put_bias(b_bias, b_bias_tile)
    b_p, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, scale_log2, not WHOLE)
    b_p = _as_operand(b_p, DTYPE, OUT)
    if not WHOLE:
        # Whole blocks may have come before.
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]

    for i in range(i_tile + i_first + 1, i_tile + i_end):
        if not WHOLE and CLEAR:
            clear_padding(v_ring, i - 1, i - 1 - i_tile, row, W)
        b_s = multiply_keys(b_q, rings.receive(k_ring, i), LOGITS)
        if POOLS:
            b_s = tails.add_bias(b_s, b_bias_tile, ROWS, LOGITS)
        b_out = warpgroup_mma(b_p, rings.receive(v_ring, i - 1), b_out, is_async=True)
        if POOLS:
            b_bias = tails.load_bias(i - i_tile + 1 - row[1], pools, scale_log2, KEYS)
        # [ROWS, KEYS]
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        rings.release(k_ring, i)
        if not WHOLE:
            b_s = hide_padding(b_s, i - i_tile, row)
        if POOLS:
            tails.put_bias(b_bias, b_bias_tile)
        b_next, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, scale_log2, not WHOLE)
        b_next = _as_operand(b_next, DTYPE, OUT)
        # [ROWS, D]
        b_out = warpgroup_mma_wait(0, deps=[b_out])
        rings.release(v_ring, i - 1)
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
        b_p = b_next

    i_last = i_tile + i_end - 1
    if not WHOLE and CLEAR:
        clear_padding(v_ring, i_last, i_end - 1, row, W)
    b_out = warpgroup_mma(b_p, rings.receive(v_ring, i_last), b_out, is_async=True)
    # [ROWS, D]
    b_out = warpgroup_mma_wait(0, deps=[b_out])
    rings.release(v_ring, i_last)
    return b_out, b_max, b_sum
