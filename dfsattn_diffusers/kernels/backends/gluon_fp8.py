"""Warp-specialised Gluon kernel in 8 bits for sm90: `gluon_hopper` with 8-bit operands.

Chosen by `precision="fp8"` or "int8". `quantize` says what is rounded and how; it orders values so
that weights go from one product's registers to the other's without being moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import ROUNDING, quantize, quantize_pools
from . import AttentionCall
from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_bytes import (
    OCTAVE,
    ORIGIN,
    add_sum,
    as_operand,
    make_ones,
    no_sum,
    pack,
    peak,
    scale_and_hide,
    start_sum,
    times_rows,
)
from ._hopper_rings import TensorDescriptor, gl, gluon, warpgroup_mma, warpgroup_mma_wait
from ._hopper_rows import (
    COUNTS,
    block_at,
    listed_blocks,
    make_row_ring,
    multiply_keys,
    produce,
    real_keys,
    receive_row,
    store_rows,
)
from .gluon_hopper import QUERY_BLOCK, pool_size, refused

NAME = "gluon_fp8"
PRECISIONS = ("fp8", "int8")
_KINDS = {torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8}


# Slots of the rings of key and of value blocks, by head dim and key block.
NUM_STAGES = {(128, 128): 4, (128, 64): 8, (64, 128): 8, (64, 64): 8}


@gluon.jit
def _scales_at(i_block, scales, NUM_SCALES):
    """Scale of a block's keys, logarithm of its values' scale; of any block beyond the last."""
    p_scales = scales + 2 * gl.minimum(i_block, NUM_SCALES - 1)
    return gl.load(p_scales), gl.load(p_scales + 1)


@gluon.jit
def _raise(b_max, b_s, b_scale):
    """The running maximum of logits in base 2, or what is near it."""
    b_peak = gl.convert_layout(peak(b_s, b_scale), b_max.type.layout, assert_trivial=True)
    return gl.maximum(b_max, b_peak)


@gluon.jit
def _weigh(b_s, b_max, b_new, b_sum, b_scale, b_ratio, MASKED: gl.constexpr):
    """Weights, packed; the sum of those before, and a factor for their output.

    The output is a multiple of its last value block's scale. `b_ratio`: of that of the block before
    to that of this one.
    """
    # [ROWS]
    b_shift = gl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_decay = gl.exp2(b_max - b_shift)
    # Weights reach 256 of e4m3's 448, a power of two that cancels against their sum.
    b_packed = pack(b_s, b_scale * OCTAVE, ((8.0 + ORIGIN) - b_shift) * OCTAVE)
    return b_packed, times_rows(b_sum, b_decay), b_decay * b_ratio


@gluon.jit
def _multiply_values(b_p, b_v, OUT: gl.constexpr):
    """Starts p times v, transposed in memory: a sum of its own, since products keep 14 bits."""
    ROWS: gl.constexpr = b_p.shape[0]
    D: gl.constexpr = b_v.shape[0]
    b_zero = gl.zeros([ROWS, D], gl.float32, OUT)
    return warpgroup_mma(b_p, b_v.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _add(b_out, b_decay, b_product):
    OUT: gl.constexpr = b_out.type.layout
    return b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None] + b_product


@gluon.jit
def _attend_whole(b_q, k_ring, v_ring, b_ones, b_out, b_max, b_sum, i_tile, i_whole, p_blocks,
                  i_listed, scales, b_q_scale, NUM_BLOCKS):
    """A row's first `i_whole` blocks, without masks, values one step after keys."""
    LOGITS: gl.constexpr = b_max.type.layout.parent
    OUT: gl.constexpr = b_out.type.layout
    b_k_scale, b_log = _scales_at(block_at(p_blocks, 0, i_listed), scales, NUM_BLOCKS)
    b_next_scale, b_next_log = _scales_at(block_at(p_blocks, 1, i_listed), scales, NUM_BLOCKS)
    i_block = block_at(p_blocks, 2, i_listed)
    b_s = multiply_keys(b_q, rings.receive(k_ring, i_tile), LOGITS)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    rings.release(k_ring, i_tile)
    b_scale = b_q_scale * b_k_scale
    b_new = _raise(b_max, b_s, b_scale)
    b_packed, b_sum, b_decay = _weigh(b_s, b_max, b_new, b_sum, b_scale, 1.0, False)
    b_max, b_scale = b_new, b_q_scale * b_next_scale
    rings.receive_if(i_whole > 1, k_ring, i_tile + 1)

    for i in range(1, i_whole):
        # Scales one step ahead, and two steps the index that they wait for.
        b_later_scale, b_later_log = _scales_at(i_block, scales, NUM_BLOCKS)
        i_block = block_at(p_blocks, i + 2, i_listed)
        # Before any product starts, else ptxas lets none overlap.
        b_operand = as_operand(b_packed, OUT)
        b_part = start_sum(b_operand, b_ones)
        b_s = multiply_keys(b_q, rings.slot(k_ring, i_tile + i), LOGITS)
        b_v = rings.receive(v_ring, i_tile + i - 1)
        # Triton 3.9 gives each product weights in registers of its own: not both at a time.
        b_part = warpgroup_mma_wait(1, deps=[b_part])
        b_sum = add_sum(b_sum, b_part)
        b_product = _multiply_values(b_operand, b_v, OUT)
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        b_new = _raise(b_max, b_s, b_scale)
        # ptxas does not move the wait for the product across this branch and its loop.
        rings.receive_if(i + 1 < i_whole, k_ring, i_tile + i + 1)
        # [ROWS, D]
        b_product = warpgroup_mma_wait(0, deps=[b_product])
        # Together: between a release and a wait there is a barrier of the warpgroup.
        rings.release(k_ring, i_tile + i)
        rings.release(v_ring, i_tile + i - 1)
        b_out = _add(b_out, b_decay, b_product)
        b_packed, b_sum, b_decay = _weigh(
            b_s, b_max, b_new, b_sum, b_scale, gl.exp2(b_log - b_next_log), False
        )
        b_max, b_scale = b_new, b_q_scale * b_later_scale
        b_log, b_next_log = b_next_log, b_later_log

    b_operand = as_operand(b_packed, OUT)
    b_part = start_sum(b_operand, b_ones)
    b_v = rings.receive(v_ring, i_tile + i_whole - 1)
    b_product = _multiply_values(b_operand, b_v, OUT)
    # [ROWS, D]
    b_product, b_part = warpgroup_mma_wait(0, deps=[b_product, b_part])
    rings.release(v_ring, i_tile + i_whole - 1)
    return _add(b_out, b_decay, b_product), b_max, add_sum(b_sum, b_part), b_log


@gluon.jit
def _attend_one(b_q, k_ring, v_ring, b_ones, b_out, b_max, b_sum, i_tile, b_scale, b_ratio, i_keys,
                b_bias):
    """One tile: of a block of which `i_keys` keys are real, or of pools with their bias."""
    LOGITS: gl.constexpr = b_max.type.layout.parent
    OUT: gl.constexpr = b_out.type.layout
    KEYS: gl.constexpr = k_ring[0].shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    b_s = multiply_keys(b_q, rings.receive(k_ring, i_tile), LOGITS)
    # [KEYS]
    b_hidden = gl.where(gl.arange(0, KEYS, COLUMNS) < i_keys, 0.0, float("-inf"))
    if b_bias is not None:
        b_hidden += gl.convert_layout(b_bias, COLUMNS)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    rings.release(k_ring, i_tile)
    b_s = scale_and_hide(b_s, b_scale, b_hidden)
    b_new = _raise(b_max, b_s, 1.0)
    b_packed, b_sum, b_decay = _weigh(b_s, b_max, b_new, b_sum, 1.0, b_ratio, True)
    b_operand = as_operand(b_packed, OUT)
    b_part = start_sum(b_operand, b_ones)
    b_product = _multiply_values(b_operand, rings.receive(v_ring, i_tile), OUT)
    # [ROWS, D]
    b_product, b_part = warpgroup_mma_wait(0, deps=[b_product, b_part])
    rings.release(v_ring, i_tile)
    return _add(b_out, b_decay, b_product), b_new, add_sum(b_sum, b_part)


@gluon.jit
def _consume(
    q_ring, k_ring, v_ring, b_ones, q_scales, scales, mean_logits, out, lse, indices,
    key_lengths, output_order, order_stride, bits, bias, scale, stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, HAS_LENGTHS: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr, POOL: gl.constexpr, W: gl.constexpr,
):
    """One of two warpgroups: its half of each row's queries against all of the row's keys."""
    ROWS: gl.constexpr = q_ring[0].shape[1]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    # A head's pools have their scales behind those of its key blocks.
    NUM_SCALES = NUM_BLOCKS
    if POOL > 0:
        NUM_SCALES += tails.num_tiles(0, NUM_BLOCKS, POOL)
    i_tile, i_queries, i_more = 0, W, 1
    while i_more != 0:
        b_q, i_b, i_h, i_q, i_count, i_whole, i_more = receive_row(q_ring, i_queries)
        i_bh = i_b * H + i_h
        i_row = i_bh * NUM_ROWS + i_q
        p_blocks, i_listed = listed_blocks(i_row, i_count, indices, NUM_BLOCKS, MAX_COUNT)
        p_scales = scales + i_bh.to(gl.int64) * (2 * NUM_SCALES)
        b_q_scale = gl.load(q_scales + i_row) * (scale * 1.4426950408889634)
        # [ROWS]
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
        # [ROWS, 4]
        b_sum = no_sum(ROWS)
        # [ROWS, D]
        b_out = gl.zeros([ROWS, D], gl.float32, OUT)
        b_last_log = 0.0
        # The same tile, since no count is negative. ptxas must not know: it would compute parts of
        # the tile's descriptor for whole blocks alone, and use them where there are none as well.
        b_q_again = rings.slot(q_ring, i_queries + gl.where(i_count < 0, 1, 0))
        if i_whole > 0:
            b_out, b_max, b_sum, b_last_log = _attend_whole(
                b_q, k_ring, v_ring, b_ones, b_out, b_max, b_sum, i_tile, i_whole, p_blocks,
                i_listed, p_scales, b_q_scale, NUM_BLOCKS,
            )
        i_end, p_lengths = i_count, None
        if HAS_LENGTHS:
            p_lengths = key_lengths + i_b * NUM_BLOCKS
        if POOL > 0:
            i_end += tails.num_tiles(i_count, NUM_BLOCKS, POOL)
            pools = tails.pools_at(bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, KEYS // POOL)
            b_next_bias = tails.load_bias(i_whole - i_count, pools, 1.0, KEYS)
        row = (i_end, i_count, i_whole, p_blocks, i_listed, N_K, p_lengths)
        for i in range(i_whole, i_end):
            i_keys = KEYS
            if i < i_count:
                i_keys = real_keys(i, row, KEYS)
            # Pools follow the last key block, as do their scales.
            i_block = block_at(p_blocks, i, i_listed)
            i_block = gl.where(i < i_count, i_block, NUM_BLOCKS + i - i_count)
            b_k_scale, b_log = _scales_at(i_block, p_scales, NUM_SCALES)
            b_bias = None
            if POOL > 0:
                # One step ahead, to be there before the products are.
                b_bias = b_next_bias
                b_next_bias = tails.load_bias(i + 1 - i_count, pools, 1.0, KEYS)
            b_out, b_max, b_sum = _attend_one(
                b_q_again, k_ring, v_ring, b_ones, b_out, b_max, b_sum, i_tile + i,
                b_q_scale * b_k_scale, gl.exp2(b_last_log - b_log), i_keys, b_bias,
            )
            b_last_log = b_log
        i_tile += i_end
        rings.release(q_ring, i_queries)
        i_queries += 2

        # [ROWS]
        b_sum = gl.convert_layout(gl.max(b_sum, 1), gl.SliceLayout(1, LOGITS))
        # A row without keys has sum 0 and maximum -inf.
        b_lse = (b_max - 8.0 + gl.log2(b_sum)) * 0.6931471805599453
        if WITH_LSE:
            o_mean = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
            b_lse += gl.load(mean_logits + i_row.to(gl.int64) * 2 * ROWS + o_mean) * scale
        store_rows(
            b_out * gl.exp2(b_last_log), b_sum, b_lse, out, lse, output_order, order_stride, i_bh,
            i_b, i_h, (i_q * 2 + W) * ROWS, stride_ob, stride_oh, stride_on, N_Q, ORDERED, WITH_LSE,
        )


@gluon.jit(do_not_specialize=COUNTS)
def block_sparse_kernel(
    q, k, v, q_scales, scales, mean_logits, out, lse, rows, next_row, counts, indices,
    key_lengths, output_order, order_stride, pool_keys, pool_values, bias, bits, scale,
    stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    POOL: gl.constexpr,
):
    """Query blocks of all heads, which programs take from `rows` one by one."""
    q_ring = make_row_ring(q.dtype, ROWS, D)
    k_ring = rings.make_ring(k.dtype, STAGES, KEYS, D, 2)
    v_ring = rings.make_ring(v.dtype, STAGES, D, KEYS, 2)
    b_ones = make_ones(v.dtype, KEYS)
    rings.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                q_ring, k_ring, v_ring, b_ones, q_scales, scales, mean_logits, out, lse,
                indices, key_lengths, output_order, order_stride, bits, bias, scale, stride_ob,
                stride_oh, stride_on, H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                HAS_LENGTHS, ORDERED, WITH_LSE, POOL, 0,
            )),
            (_consume, (
                q_ring, k_ring, v_ring, b_ones, q_scales, scales, mean_logits, out, lse,
                indices, key_lengths, output_order, order_stride, bits, bias, scale, stride_ob,
                stride_oh, stride_on, H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                HAS_LENGTHS, ORDERED, WITH_LSE, POOL, 1,
            )),
            (produce, (
                q, k, v, q_ring, k_ring, v_ring, rows, next_row, counts, indices, H, NUM_WORK,
                NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks, True, pool_keys, pool_values,
                POOL,
            )),
        ],
        [4, 1],
        # Registers of the workers; the first consumer gets as many as the second.
        [240, 24],
    )


def rank(call: AttentionCall) -> int:
    """1.5 times as fast as `triton_fp8` on an H200, or more."""
    return 2


def why_not(call: AttentionCall) -> str | None:
    """Reason why this kernel cannot do the call."""
    return refused(call)


def takes_tail(call: AttentionCall) -> bool:
    """Always: pools are quantised too."""
    return call.tail is not None


def forward(call: AttentionCall) -> None:
    """Quantise, then fill `call.out` and `call.lse`, with the tail."""
    block_map, key_lengths, tail = call.block_map, call.key_lengths, call.tail
    order, order_stride = call.order_and_stride()
    x = quantize(
        call.q, call.k, call.v, query_block=block_map.query_block, key_block=block_map.key_block,
        key_lengths=key_lengths, interleaved=True, **ROUNDING[call.precision],
    )
    k_scales, v_scales, pool_keys, pool_values = x.k_scales, x.v_scales, None, None
    if tail is not None:
        pool_keys, pool_values, *pool_scales = quantize_pools(
            tail, x, key_block=block_map.key_block, interleaved=True
        )
        k_scales = torch.cat([k_scales, pool_scales[0]], -1)
        v_scales = torch.cat([v_scales, pool_scales[1]], -1)
    v_logs = v_scales.log2()
    # In units of values too small to be seen, sums of others would leave float32.
    v_logs = v_logs.maximum(v_logs.amax(-1, keepdim=True) - 40)
    scales = torch.stack([k_scales, v_logs], -1)
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, key_block = block_map.counts.shape[-1], block_map.key_block
    num_work = batch * heads * num_rows
    device = torch.cuda.get_device_properties(call.q.device)
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[min(num_work, device.multi_processor_count),](
            _describe(x.q, QUERY_BLOCK // 2, head_dim), _describe(x.k, key_block, head_dim),
            _describe(x.v, head_dim, key_block),
            x.q_scales, scales, x.mean_logits, call.out, call.lse,
            block_map.by_count, block_map.counts.new_zeros(1),
            block_map.counts.contiguous(), block_map.indices.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            order, order_stride,
            None if tail is None else _describe(pool_keys, key_block, head_dim),
            None if tail is None else _describe(pool_values, head_dim, key_block),
            None if tail is None else tail.bias.contiguous(),
            None if tail is None else block_map.bits,
            call.scale, *call.out.stride()[:3],
            heads, num_queries, call.k.shape[2], num_work, num_rows, block_map.num_key_blocks,
            block_map.indices.shape[-1], call.full_key_blocks,
            D=head_dim, ROWS=QUERY_BLOCK // 2, KEYS=key_block,
            STAGES=NUM_STAGES[head_dim, key_block], HAS_LENGTHS=key_lengths is not None,
            ORDERED=order is not None, WITH_LSE=call.lse is not None,
            POOL=pool_size(tail, block_map),
            # 12 warps with the other partitions': 65536 / 384 registers, in multiples of 8.
            num_warps=4, maxnreg=168, enable_fp_fusion=True,
        )


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    tile = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(tile, _KINDS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile, layout)
