"""Warp-specialised Gluon kernel in 8 bits for sm90: `gluon_hopper` with 8-bit operands.

Chosen by `precision="fp8"` or "int8". `quantize` says what is rounded and how; queries are rounded
here, by the warpgroup that reads them. Values are ordered so that weights go from one product's
registers to the other's without being moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quantize import ROUNDING, quantize_keys, quantize_pools, scale_table
from . import AttentionCall
from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_attend_bytes import attend
from ._hopper_bytes import make_ones, multiply_vector, no_sum, round_queries
from ._hopper_rings import TensorDescriptor, gl, gluon
from ._hopper_rows import COUNTS, listed_blocks, make_row_ring, produce, receive_row, store_rows
from .gluon_hopper import QUERY_BLOCK, describe_rows, pool_size, refused

if TYPE_CHECKING:
    from ..tail import Tail

NAME = "gluon_fp8"
PRECISIONS = ("fp8", "int8")
_KINDS = {torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8}

# Slots of the rings of key and of value blocks, by head dim and key block.
NUM_STAGES = {(128, 128): 4, (128, 64): 8, (64, 128): 8, (64, 64): 8}


@gluon.jit
def _consume(
    q_ring, k_ring, v_ring, q_tiles, b_ones, bias_tiles, scales, key_mean, out, lse, indices,
    key_lengths, output_order, order_stride, bits, bias, scale, stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, HAS_LENGTHS: gl.constexpr,
    ORDERED: gl.constexpr, WITH_LSE: gl.constexpr, POOL: gl.constexpr, LAST: gl.constexpr,
    W: gl.constexpr,
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
        NUM_SCALES = NUM_BLOCKS + tails.num_tiles(0, NUM_BLOCKS, POOL)
    i_tile, i_queries, i_more = 0, W, 1
    while i_more != 0:
        b_wide, i_b, i_h, i_q, i_count, i_whole, i_more = receive_row(q_ring, i_queries)
        i_bh = i_b * H + i_h
        i_row = i_bh * NUM_ROWS + i_q
        p_blocks, i_listed = listed_blocks(i_row, i_count, indices, NUM_BLOCKS, MAX_COUNT)
        p_scales = scales + i_bh.to(gl.int64) * (2 * NUM_SCALES)
        b_q = q_tiles.index(W)
        b_q_scale = round_queries(b_wide, b_q) * (scale * 1.4426950408889634)
        if WITH_LSE:
            # [ROWS]
            b_mean_logits = multiply_vector(b_wide, key_mean + i_bh * D)
            b_mean_logits = gl.convert_layout(b_mean_logits, gl.SliceLayout(1, LOGITS))
        # The loading warp may fetch the next row's.
        rings.release(q_ring, i_queries)
        i_queries += 2
        # [ROWS]
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
        # [ROWS, 4]
        b_sum = no_sum(ROWS)
        # [ROWS, D]
        b_out = gl.zeros([ROWS, D], gl.float32, OUT)
        b_last_log = 0.0
        i_end, p_lengths, pools = i_count, None, None
        if HAS_LENGTHS:
            p_lengths = key_lengths + i_b * NUM_BLOCKS
        if POOL > 0:
            i_end = i_count + tails.num_tiles(i_count, NUM_BLOCKS, POOL)
            pools = tails.pools_at(bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, KEYS // POOL)
        row = (i_end, i_count, i_whole, p_blocks, i_listed, N_K, p_lengths, pools)
        if i_end > 0:
            b_out, b_last_log, b_max, b_sum = attend(
                b_q, k_ring, v_ring, b_ones, bias_tiles.index(W), b_out, b_max, b_sum, i_tile, row,
                (p_scales, NUM_BLOCKS, NUM_SCALES, b_q_scale), LAST,
            )
        i_tile += i_end

        # [ROWS]
        b_sum = gl.convert_layout(gl.max(b_sum, 1), gl.SliceLayout(1, LOGITS))
        # A row without keys has sum 0 and maximum -inf.
        b_lse = (b_max - 8.0 + gl.log2(b_sum)) * 0.6931471805599453
        if WITH_LSE:
            # What the log-sum-exp of centred keys lacks.
            b_lse += b_mean_logits * scale
        store_rows(
            b_out * gl.exp2(b_last_log), b_sum, b_lse, out, lse, output_order, order_stride, i_bh,
            i_b, i_h, (i_q * 2 + W) * ROWS, stride_ob, stride_oh, stride_on, N_Q, ORDERED, WITH_LSE,
        )


@gluon.jit(do_not_specialize=COUNTS)
def block_sparse_kernel(
    q, k, v, scales, key_mean, out, lse, rows, next_row, counts, indices,
    key_lengths, output_order, order_stride, pool_keys, pool_values, bias, bits, scale,
    stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    POOL: gl.constexpr, LAST: gl.constexpr,
):
    """Query blocks of all heads, which programs take from `rows` one by one."""
    q_ring = make_row_ring(q.dtype, 1, ROWS, D)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], k.dtype)
    q_tiles = gl.allocate_shared_memory(k.dtype, [2, ROWS, D], TILE)
    k_ring = rings.make_ring(k.dtype, STAGES, KEYS, D, 2)
    v_ring = rings.make_ring(v.dtype, STAGES, D, KEYS, 2)
    b_ones = make_ones(v.dtype, KEYS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SUMS: gl.constexpr = gl.int32 if k.dtype == gl.int8 else gl.float16
    bias_tiles = gl.allocate_shared_memory(SUMS, [2, KEYS], FLAT)
    rings.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                q_ring, k_ring, v_ring, q_tiles, b_ones, bias_tiles, scales, key_mean, out, lse,
                indices, key_lengths, output_order, order_stride, bits, bias, scale, stride_ob,
                stride_oh, stride_on, H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                HAS_LENGTHS, ORDERED, WITH_LSE, POOL, LAST, 0,
            )),
            (_consume, (
                q_ring, k_ring, v_ring, q_tiles, b_ones, bias_tiles, scales, key_mean, out, lse,
                indices, key_lengths, output_order, order_stride, bits, bias, scale, stride_ob,
                stride_oh, stride_on, H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                HAS_LENGTHS, ORDERED, WITH_LSE, POOL, LAST, 1,
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
    return refused(call, q=call.q)


def takes_tail(call: AttentionCall) -> bool:
    """Always: pools are quantised too."""
    return call.tail is not None


def forward(call: AttentionCall) -> None:
    """Quantise keys and values, then fill `call.out` and `call.lse`, with the tail."""
    block_map, key_lengths, tail = call.block_map, call.key_lengths, call.tail
    order, order_stride = call.order_and_stride()
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, key_block = block_map.counts.shape[-1], block_map.key_block
    x = quantize_keys(
        call.k, call.v, key_block=key_block, key_lengths=key_lengths, interleaved=True,
        **ROUNDING[call.precision],
    )
    pool_keys = pool_values = None
    pool_scales = []
    if tail is not None:
        pool_keys, pool_values, *pool_scales = quantize_pools(
            tail, x, key_block=key_block, interleaved=True
        )
    num_work = batch * heads * num_rows
    device = torch.cuda.get_device_properties(call.q.device)
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[min(num_work, device.multi_processor_count),](
            describe_rows(call.q, QUERY_BLOCK // 2), _describe(x.k, key_block, head_dim),
            _describe(x.v, head_dim, key_block), scale_table(x, pool_scales),
            None if call.lse is None else x.key_mean, call.out, call.lse, block_map.by_count,
            block_map.counts.new_zeros(1),
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
            POOL=pool_size(tail, block_map), LAST=_last_tile(tail, key_block),
            # 12 warps with the other partitions': 65536 / 384 registers, in multiples of 8.
            num_warps=4, maxnreg=168, enable_fp_fusion=True,
        )


def _last_tile(tail: Tail | None, key_block: int) -> int:
    """How many pools a row's last tile has room for, if it is read no further than need be."""
    if tail is None:
        return key_block
    # 32 are the fewest that an 8-bit product takes.
    return 1 << max(5, ((tail.keys.shape[2] - 1) % key_block).bit_length())


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    tile = [1, 1, rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(tile, _KINDS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile, layout)
