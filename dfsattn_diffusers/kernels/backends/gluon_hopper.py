"""Warp-specialised Gluon kernel for sm90: one warp loads, two warpgroups compute."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import AttentionCall, capability
from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_attend import attend
from ._hopper_rings import TensorDescriptor, gl, gluon
from ._hopper_rows import COUNTS, listed_blocks, make_row_ring, produce, receive_row, store_rows

if TYPE_CHECKING:
    from ..block_map import BlockMap
    from ..tail import Tail

NAME = "gluon_hopper"

QUERY_BLOCK = 128
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Slots of the rings of key and of value blocks, by head dim and key block.
NUM_STAGES = {(128, 128): 2, (128, 64): 3, (64, 128): 5, (64, 64): 8}


@gluon.jit
def _consume(
    q_ring, k_ring, v_ring, bias_tiles, out, lse, indices, key_lengths, output_order, order_stride,
    bits, bias, scale_log2, stride_ob, stride_oh, stride_on, H, N_Q, N_K, NUM_ROWS, NUM_BLOCKS,
    MAX_COUNT, HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    POOL: gl.constexpr, W: gl.constexpr,
):
    """Warpgroup W of two: its half of each row's queries against all that the row reads."""
    ROWS: gl.constexpr = q_ring[0].shape[1]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    i_tile, i_queries, i_more = 0, W, 1
    while i_more != 0:
        b_q, i_b, i_h, i_q, i_count, i_whole, i_more = receive_row(q_ring, i_queries)
        i_bh = i_b * H + i_h
        i_row = i_bh * NUM_ROWS + i_q
        p_blocks, i_listed = listed_blocks(i_row, i_count, indices, NUM_BLOCKS, MAX_COUNT)
        p_lengths, pools, b_bias_tile = None, None, None
        if HAS_LENGTHS:
            p_lengths = key_lengths + i_b * NUM_BLOCKS
        i_end = i_count
        if POOL > 0:
            i_end = i_count + tails.num_tiles(i_count, NUM_BLOCKS, POOL)
            pools = tails.pools_at(bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, KEYS // POOL)
            b_bias_tile = bias_tiles.index(W)
        row = (i_end, i_count, i_whole, p_blocks, i_listed, N_K, p_lengths, pools, b_bias_tile)
        # [ROWS]
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
        b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
        # [ROWS, D]
        b_out = gl.zeros([ROWS, D], gl.float32, OUT)
        # The same tile, since no count is negative. ptxas must not know: it would compute parts of
        # the tile's descriptor for whole blocks alone, and use them where there are none as well.
        b_q_again = rings.slot(q_ring, i_queries + gl.where(i_count < 0, 1, 0))
        if i_whole > 0:
            b_out, b_max, b_sum = attend(
                b_q, k_ring, v_ring, b_out, b_max, b_sum, i_tile, 0, i_whole, row, scale_log2,
                W, True, HAS_LENGTHS,
            )
        if i_whole < i_end:
            b_out, b_max, b_sum = attend(
                b_q_again, k_ring, v_ring, b_out, b_max, b_sum, i_tile, i_whole, i_end, row,
                scale_log2, W, False, HAS_LENGTHS,
            )
        i_tile += i_end
        rings.release(q_ring, i_queries)
        i_queries += 2

        # A row without keys has sum 0 and maximum -inf.
        b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
        store_rows(
            b_out, b_sum, b_lse, out, lse, output_order, order_stride, i_bh, i_b, i_h,
            (i_q * 2 + W) * ROWS, stride_ob, stride_oh, stride_on, N_Q, ORDERED, WITH_LSE,
        )


@gluon.jit(do_not_specialize=COUNTS)
def block_sparse_kernel(
    q, k, v, out, lse, rows, next_row, counts, indices, key_lengths, output_order, order_stride,
    pool_keys, pool_values, bias, bits, scale_log2, stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    POOL: gl.constexpr,
):
    """Query blocks of all heads, which programs take from `rows` one by one."""
    q_ring = make_row_ring(q.dtype, 2, ROWS, D)
    k_ring = rings.make_ring(q.dtype, STAGES, KEYS, D, 2)
    v_ring = rings.make_ring(q.dtype, STAGES, KEYS, D, 2)
    bias_tiles = tails.make_bias_tiles(q.dtype, KEYS if POOL > 0 else 8)  # never none at all
    rings.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                q_ring, k_ring, v_ring, bias_tiles, out, lse, indices, key_lengths, output_order,
                order_stride, bits, bias, scale_log2, stride_ob, stride_oh, stride_on, H, N_Q, N_K,
                NUM_ROWS, NUM_BLOCKS, MAX_COUNT, HAS_LENGTHS, ORDERED, WITH_LSE, POOL, 0,
            )),
            (_consume, (
                q_ring, k_ring, v_ring, bias_tiles, out, lse, indices, key_lengths, output_order,
                order_stride, bits, bias, scale_log2, stride_ob, stride_oh, stride_on, H, N_Q, N_K,
                NUM_ROWS, NUM_BLOCKS, MAX_COUNT, HAS_LENGTHS, ORDERED, WITH_LSE, POOL, 1,
            )),
            (produce, (
                q, k, v, q_ring, k_ring, v_ring, rows, next_row, counts, indices, H, NUM_WORK,
                NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks, False, pool_keys, pool_values,
                POOL,
            )),
        ],
        [4, 1],
        # Registers of the workers; the first consumer gets as many as the second.
        [232, 40],
    )


def why_not(call: AttentionCall) -> str | None:
    """Reason why this kernel cannot do the call."""
    return refused(call, q=call.q, k=call.k, v=call.v)


def refused(call: AttentionCall, **read: Tensor) -> str | None:
    """Why not, whatever the precision of the products; `read`: by the copy engine, as they are."""
    head_dim, block_map = call.q.shape[-1], call.block_map
    if not _is_hopper(call.q.device):
        return f"it needs a CUDA device of capability 9.0, got {capability(call.q.device)}"
    if call.q.dtype not in _DTYPES:
        return f"it needs {' or '.join(map(str, _DTYPES))}, got {call.q.dtype}"
    blocks = (block_map.query_block, block_map.key_block)
    if blocks[0] != QUERY_BLOCK or (head_dim, blocks[1]) not in NUM_STAGES:
        return (
            f"it needs query blocks of 128, key blocks of 64 or 128 and head dim 64 or 128, got "
            f"{blocks[0]}, {blocks[1]} and {head_dim}"
        )
    for name, x in read.items():
        if not _can_describe(x):
            return f"it needs {name}'s address and strides in multiples of 16 bytes"
    return None


def takes_tail(call: AttentionCall) -> bool:
    """Whether the kernel reads the call's pools itself."""
    tail = call.tail
    return tail is not None and _can_describe(tail.keys) and _can_describe(tail.values)


def pool_size(tail: Tail | None, block_map: BlockMap) -> int:
    """Keys of one of the tail's pools; 0 without a tail."""
    if tail is None:
        return 0
    return block_map.num_key_blocks * block_map.key_block // tail.keys.shape[2]


def rank(call: AttentionCall) -> int:
    """1.2 to 1.4 times as fast as `triton` on an H200 at head dim 128, 1.1 to 1.3 at 64."""
    return 3


def _is_hopper(device: torch.device) -> bool:
    return capability(device) == "9.0"


def _strides(x: Tensor) -> list[int]:
    """Of x, where a dimension of size 1 has any that the copy engine takes."""
    return [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride())] + [1]


def _can_describe(x: Tensor) -> bool:
    """Whether the copy engine can read x: base and strides in multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in _strides(x)[:-1]]
    return x.data_ptr() % 16 == 0 and all(0 < s < 2**40 and s % 16 == 0 for s in strides)


def describe_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """For the copy engine: tiles of so many rows of `[B, H, N, D]`, which `refused` lets pass."""
    tile = [1, 1, rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(tile, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), _strides(x), tile, layout)


def forward(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, with the tail where `takes_tail` says so."""
    block_map, key_lengths = call.block_map, call.key_lengths
    order, order_stride = call.order_and_stride()
    tail = call.tail if takes_tail(call) else None
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, key_block = block_map.counts.shape[-1], block_map.key_block
    num_work = batch * heads * num_rows
    device = torch.cuda.get_device_properties(call.q.device)
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[min(num_work, device.multi_processor_count),](
            describe_rows(call.q, QUERY_BLOCK // 2), describe_rows(call.k, key_block),
            describe_rows(call.v, key_block), call.out, call.lse, block_map.by_count,
            block_map.counts.new_zeros(1), block_map.counts.contiguous(),
            block_map.indices.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            order, order_stride,
            None if tail is None else describe_rows(tail.keys, key_block),
            None if tail is None else describe_rows(tail.values, key_block),
            None if tail is None else tail.bias.contiguous(),
            None if tail is None else block_map.bits,
            call.scale * math.log2(math.e),
            *call.out.stride()[:3],
            heads, num_queries, call.k.shape[2], num_work, num_rows, block_map.num_key_blocks,
            block_map.indices.shape[-1], call.full_key_blocks,
            D=head_dim, ROWS=QUERY_BLOCK // 2, KEYS=key_block,
            STAGES=NUM_STAGES[head_dim, key_block], HAS_LENGTHS=key_lengths is not None,
            ORDERED=order is not None, WITH_LSE=call.lse is not None,
            POOL=pool_size(tail, block_map),
            # 12 warps with the other partitions': 65536 / 384 registers, in multiples of 8.
            num_warps=4, maxnreg=168, enable_fp_fusion=True,
        )
