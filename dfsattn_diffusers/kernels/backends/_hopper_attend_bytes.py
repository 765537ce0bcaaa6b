"""A warpgroup's pipeline through a row in 8 bits on sm90: products, weights, products."""

from __future__ import annotations

from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_bytes import (
    OCTAVE,
    ORIGIN,
    add_sum,
    as_operand,
    codes_of,
    hide,
    in_sums,
    not_finer,
    pack,
    pack_codes,
    peak,
    scale_and_hide,
    start_sum,
    times_rows,
)
from ._hopper_rings import gl, gluon, warpgroup_mma, warpgroup_mma_wait
from ._hopper_rows import block_at, multiply_keys, real_keys


@gluon.jit
def _scales_at(i_block, table):
    """Scale of a block's keys, logarithm of its values' scale; of any block beyond the last."""
    scales, NUM_SCALES = table[0], table[2]
    p_scales = scales + 2 * gl.minimum(i_block, NUM_SCALES - 1)
    return gl.load(p_scales), gl.load(p_scales + 1)


@gluon.jit
def _shift(b_max, MASKED: gl.constexpr):
    """What weights are relative to: a row's maximum so far, if it has any key."""
    return gl.where(b_max == float("-inf"), 0.0, b_max) if MASKED else b_max


@gluon.jit
def _level(b_max, MASKED: gl.constexpr):
    """Of codes. Weights reach 256 of e4m3's 448, a power of two that cancels against their sum."""
    return ((8.0 + ORIGIN) - _shift(b_max, MASKED)) * OCTAVE


@gluon.jit
def _multiply_values(b_p, v_ring, i, OUT: gl.constexpr):
    """Starts the i-th tile's product with its weights, which may be of its first keys alone.

    Values are transposed in memory. A sum of its own, since products keep 14 bits.
    """
    ROWS: gl.constexpr = b_p.shape[0]
    D: gl.constexpr = v_ring[0].shape[1]
    b_v = rings.receive(v_ring, i).slice(0, b_p.shape[1], dim=1)
    b_zero = gl.zeros([ROWS, D], gl.float32, OUT)
    return warpgroup_mma(b_p, b_v.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _add(b_out, b_decay, b_product):
    OUT: gl.constexpr = b_out.type.layout
    return b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None] + b_product


@gluon.jit
def _finish(v_ring, b_ones, b_packed, b_decay, b_out, b_sum, i):
    """The output with the rings' i-th tile, and the sum of weights; nothing else is in flight."""
    OUT: gl.constexpr = b_out.type.layout
    b_operand = as_operand(b_packed, OUT)
    b_part = start_sum(b_operand, b_ones)
    b_product = _multiply_values(b_operand, v_ring, i, OUT)
    # [ROWS, D]
    b_product, b_part = warpgroup_mma_wait(0, deps=[b_product, b_part])
    rings.release(v_ring, i)
    return _add(b_out, b_decay, b_product), add_sum(b_sum, b_part)


@gluon.jit
def _step(b_q, k_ring, v_ring, b_ones, b_packed, b_decay, b_out, b_max, b_sum, i, m_more, b_scale,
          b_ratio, b_bias_tile, b_next_bias, KEYS: gl.constexpr):
    """Weights of the rings' i-th tile, or of its first `KEYS` keys; the output of those before.

    Args:
        b_packed, b_decay: Weights of the tile before, not yet multiplied by values, and the factor
            for the output before them; None at the row's first tile.
        m_more: Whether the row has another tile.
        b_scale, b_ratio: Of logits in base 2; of the scale of the values before to that of these,
            since the output is a multiple of its last values' scale.
        b_bias_tile, b_next_bias: Bias of these logits, of `_bias_of`, None for whole blocks; what
            to put there for the next tile, None of the last.
    """
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    EACH_ROW: gl.constexpr = b_max.type.layout
    OUT: gl.constexpr = b_out.type.layout
    MASKED: gl.constexpr = b_bias_tile is not None
    WIDE: gl.constexpr = b_q.dtype == gl.int8
    TWO: gl.constexpr = b_packed is not None
    b_first = None
    if MASKED and WIDE:
        b_scale = not_finer(b_scale)
        b_first = b_bias_tile.slice(0, KEYS).load(gl.SliceLayout(0, LOGITS))
    if TWO:
        b_k = rings.slot(k_ring, i)
        # Before any product starts, else ptxas lets none overlap.
        b_operand = as_operand(b_packed, OUT)
        b_part = start_sum(b_operand, b_ones)
    else:
        b_k = rings.receive(k_ring, i)
    b_s = multiply_keys(b_q, b_k.slice(0, KEYS), LOGITS, b_first)
    if TWO:
        # Triton 3.9 gives each product weights in registers of its own: not both at a time.
        b_part = warpgroup_mma_wait(1, deps=[b_part])
        b_sum = add_sum(b_sum, b_part)
        b_product = _multiply_values(b_operand, v_ring, i - 1, OUT)
    b_s = warpgroup_mma_wait(1 if TWO else 0, deps=[b_s])
    b_max = gl.convert_layout(b_max, gl.SliceLayout(1, LOGITS), assert_trivial=True)
    if MASKED and not WIDE:
        b_bias = b_bias_tile.slice(0, KEYS).load(gl.SliceLayout(0, LOGITS))
        b_s = scale_and_hide(b_s, b_scale, b_bias)
        b_scale = 1.0
    b_peak = gl.convert_layout(peak(b_s, b_scale), b_max.type.layout, assert_trivial=True)
    if MASKED and WIDE:
        b_peak = hide(b_peak, b_scale)
    # The running maximum, or what is near it.
    b_new = gl.maximum(b_max, b_peak)
    b_level = _level(b_new, MASKED)
    if WIDE:
        if MASKED:
            # What stands for -inf may be above a maximum of another scale.
            b_level = gl.where(b_peak == float("-inf"), -1.0, b_level)
        # While values are multiplied. Halves, half the work, would wait longer for the maximum.
        b_s = codes_of(b_s, b_scale * OCTAVE, b_level)
    if b_next_bias is not None:
        b_bias_tile.store(b_next_bias)
    # ptxas does not move the wait for the product across this branch and its loop.
    rings.receive_if(m_more, k_ring, i + 1)
    if TWO:
        # [ROWS, D]
        b_product = warpgroup_mma_wait(0, deps=[b_product])
    # Together: between a release and a wait there is a barrier of the warpgroup.
    rings.release(k_ring, i)
    if TWO:
        rings.release(v_ring, i - 1)
        b_out = _add(b_out, b_decay, b_product)
    b_packed = pack_codes(b_s) if WIDE else pack(b_s, b_scale * OCTAVE, b_level)
    b_decay = gl.exp2(b_max - _shift(b_new, MASKED))
    b_sum = times_rows(b_sum, b_decay)
    b_decay *= b_ratio
    b_max = gl.convert_layout(b_new, EACH_ROW, assert_trivial=True)
    b_decay = gl.convert_layout(b_decay, EACH_ROW, assert_trivial=True)
    return b_packed, b_decay, b_out, b_max, b_sum


@gluon.jit
def _scales_of(i, row, table):
    """Scale of the row's logits of its i-th tile, logarithm of its values' scale.

    Pools' are behind those of the last key block.
    """
    i_block = gl.where(i < row[1], block_at(row[3], i, row[4]), table[1] + i - row[1])
    b_k_scale, b_log = _scales_at(i_block, table)
    return table[3] * b_k_scale, b_log


@gluon.jit
def _bias_of(i, row, table, b_tile):
    """What the logits of the row's i-th tile get, `[KEYS]`: -inf for padding, that of pools.

    In float16, or as int32 that the sums of products begin with.
    """
    KEYS: gl.constexpr = b_tile.shape[0]
    i_count, pools = row[1], row[7]
    EACH: gl.constexpr = tails.each_key(KEYS)
    if pools is not None:
        b_bias = tails.load_bias(i - i_count, pools, 1.0, KEYS)
    else:
        b_bias = gl.zeros([KEYS], gl.float32, EACH)
    i_keys = KEYS
    if i < i_count:
        i_keys = real_keys(i, row, KEYS)
    b_bias = gl.where(gl.arange(0, KEYS, EACH) < i_keys, b_bias, float("-inf"))
    if b_tile.dtype == gl.int32:
        b_scale, _ = _scales_of(i, row, table)
        b_bias = in_sums(b_bias, b_scale)
    else:
        b_bias = b_bias.to(gl.float16)
    return b_bias


@gluon.jit
def attend(b_q, k_ring, v_ring, b_ones, b_bias_tile, b_out, b_max, b_sum, i_tile, row, table,
           LAST: gl.constexpr):
    """All tiles of a row, of which there is one at least; values one step after keys.

    Args:
        i_tile: The row's first tile in the rings.
        row: Its tiles, those of key blocks, and of whole ones among these; the blocks, how many of
            them are listed, all keys, the blocks' lengths or None; its pools or None.
        table: Its head's scales, how many key blocks it has, and how many scales; the scale of its
            queries, and of all logits.
        LAST: How much of the last tile is read, where the row has pools.

    Returns:
        The output in units of its last values, and their scale's logarithm; maximum and sum.
    """
    TILE: gl.constexpr = k_ring[0].shape[1]
    i_end, i_count, i_whole, p_blocks, i_listed = row[0], row[1], row[2], row[3], row[4]
    b_q_scale = table[3]
    # Of the first tile that is not a whole block: here, or each row would wait for it.
    b_bias = _bias_of(i_whole, row, table, b_bias_tile)
    b_scale, b_log = _scales_of(0, row, table)
    if i_whole > 0:
        b_next_scale, b_next_log = _scales_at(block_at(p_blocks, 1, i_listed), table)
        i_block = block_at(p_blocks, 2, i_listed)
        b_packed, b_decay, b_out, b_max, b_sum = _step(
            b_q, k_ring, v_ring, b_ones, None, None, b_out, b_max, b_sum, i_tile, i_end > 1,
            b_scale, 1.0, None, None, TILE,
        )
        b_scale = b_q_scale * b_next_scale
        for i in range(1, i_whole):
            # Scales one step ahead, and two steps the index that they wait for.
            b_later_scale, b_later_log = _scales_at(i_block, table)
            i_block = block_at(p_blocks, i + 2, i_listed)
            b_packed, b_decay, b_out, b_max, b_sum = _step(
                b_q, k_ring, v_ring, b_ones, b_packed, b_decay, b_out, b_max, b_sum, i_tile + i,
                i + 1 < i_end, b_scale, gl.exp2(b_log - b_next_log), None, None, TILE,
            )
            b_scale = b_q_scale * b_later_scale
            b_log, b_next_log = b_next_log, b_later_log
        b_bias_tile.store(b_bias)
    else:
        b_bias_tile.store(b_bias)
        b_packed, b_decay, b_out, b_max, b_sum = _step(
            b_q, k_ring, v_ring, b_ones, None, None, b_out, b_max, b_sum, i_tile, i_end > 1,
            b_scale, 1.0, b_bias_tile, _bias_of(1, row, table, b_bias_tile), TILE,
        )
    i_wide = i_end
    if LAST < TILE:
        # A row's only tile is read whole, which does no harm.
        i_wide = i_end - gl.where((i_end > i_count) & (i_end > 1), 1, 0)
    for i in range(i_tile + gl.maximum(i_whole, 1), i_tile + i_wide):
        b_biased_scale, b_next_log = _scales_of(i - i_tile, row, table)
        b_packed, b_decay, b_out, b_max, b_sum = _step(
            b_q, k_ring, v_ring, b_ones, b_packed, b_decay, b_out, b_max, b_sum, i,
            i + 1 < i_tile + i_end, b_biased_scale, gl.exp2(b_log - b_next_log),
            b_bias_tile, _bias_of(i - i_tile + 1, row, table, b_bias_tile), TILE,
        )
        b_log = b_next_log
    i_last = i_tile + i_end - 1
    if LAST < TILE:
        if i_wide < i_end:
            b_biased_scale, b_next_log = _scales_of(i_wide, row, table)
            b_narrow, b_decay, b_out, b_max, b_sum = _step(
                b_q, k_ring, v_ring, b_ones, b_packed, b_decay, b_out, b_max, b_sum, i_last, False,
                b_biased_scale, gl.exp2(b_log - b_next_log), b_bias_tile, None, LAST,
            )
            b_log = b_next_log
            b_out, b_sum = _finish(v_ring, b_ones, b_narrow, b_decay, b_out, b_sum, i_last)
        else:
            b_out, b_sum = _finish(v_ring, b_ones, b_packed, b_decay, b_out, b_sum, i_last)
    else:
        b_out, b_sum = _finish(v_ring, b_ones, b_packed, b_decay, b_out, b_sum, i_last)
    return b_out, b_log, b_max, b_sum
