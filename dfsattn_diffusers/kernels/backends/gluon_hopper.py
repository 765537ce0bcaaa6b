"""Warp-specialised Gluon kernel for sm90: one warp loads, two warpgroups compute in turns.

At head dim 64 one warpgroup can do a row by itself, in a program that leaves a multiprocessor room
for a second one: while one program is between two rows, the other multiplies. `launch` does it with
settings of `NARROW`, which nothing chooses before they are timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import AttentionCall, capability
from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_attend import attend
from ._hopper_rings import TensorDescriptor, gl, gluon
from ._hopper_rows import COUNTS, count_whole, num_rounds, produce, row_at, store_rows

NAME = "gluon_hopper"

QUERY_BLOCK = 128
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the kernel.

    Attributes:
        num_stages: Slots of the rings of key and of value tiles; at least 2.
        tile: Keys of a product, a part of a key block or all of it.
        warpgroups: 2 that share a row, or 1.
        queries: Rows whose queries are in shared memory, 2 to load the next row's meanwhile.
        early: Whether the wait for the next keys comes before the one for the last product.
        programs: Per multiprocessor, each of which takes row after row; None for one per row.
    """

    num_stages: int
    tile: int
    warpgroups: int = 2
    queries: int = 2
    early: bool = False
    programs: int | None = 1


# At the kernel's start, by warpgroups that compute. With the loading warp's they are 12 warps, of
# which one program fits a multiprocessor's 65536 registers, or 8, of which two do.
MAX_REGISTERS = {2: 168, 1: 128}

# By head dim and key block.
SETTINGS = {
    (128, 128): LaunchSettings(2, tile=128),
    (128, 64): LaunchSettings(3, tile=64),
    (64, 128): LaunchSettings(3, tile=128),
    (64, 64): LaunchSettings(6, tile=64),
}
# With one warpgroup, to replace those above where it is faster; not measured yet.
NARROW = {
    (64, 128): LaunchSettings(5, tile=64, warpgroups=1, early=True, programs=2),
    (64, 64): LaunchSettings(5, tile=64, warpgroups=1, early=True, programs=2),
}


@gluon.jit
def _consume(
    q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths, output_order,
    order_stride, bits, bias, scale_log2, stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    POOL: gl.constexpr, PER_BLOCK: gl.constexpr, EARLY: gl.constexpr,
    WARPGROUPS: gl.constexpr, W: gl.constexpr,
):
    """Warpgroup W: its share of each row's queries against all that the row reads."""
    ROWS: gl.constexpr = q_ring[0].shape[1]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    i_tile, i_queries = 0, W
    if W == 1:
        # The first turn is the other warpgroup's.
        rings.grant_turn(0, NUM_WORK)
    for i_round in range(num_rounds(NUM_WORK)):
        i_bh, i_q, i_count, p_blocks, i_listed = row_at(
            i_round, rows, counts, indices, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT
        )
        i_b, i_h = i_bh // H, i_bh % H
        i_whole = count_whole(p_blocks, i_count, i_listed, NUM_BLOCKS, full_key_blocks) * PER_BLOCK
        i_kept = i_count * PER_BLOCK
        p_lengths, pools = None, None
        if HAS_LENGTHS:
            p_lengths = key_lengths + i_b * NUM_BLOCKS
        i_end = i_kept
        if POOL > 0:
            i_end = i_kept + tails.num_tiles(i_count, NUM_BLOCKS, PER_BLOCK, POOL)
            pools = tails.row_at(
                bits, bias, i_bh, i_q, NUM_ROWS, NUM_BLOCKS, KEYS * PER_BLOCK, POOL
            )
        row = (i_end, i_kept, i_whole, p_blocks, i_listed, N_K, p_lengths, pools)
        # [ROWS]
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
        b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
        # [ROWS, D]
        b_out = gl.zeros([ROWS, D], gl.float32, OUT)
        b_q = rings.receive(q_ring, i_queries)
        # The same tile, since no count is negative. ptxas must not know: it would compute parts of
        # the tile's descriptor for whole blocks alone, and use them where there are none as well.
        b_q_again = rings.slot(q_ring, i_queries + gl.where(i_count < 0, 1, 0))
        if i_whole > 0:
            b_out, b_max, b_sum = attend(
                b_q, k_ring, v_ring, b_out, b_max, b_sum, i_tile, 0, i_whole, row, scale_log2,
                PER_BLOCK, WARPGROUPS, W, EARLY, True, HAS_LENGTHS,
            )
        if i_whole < i_end:
            b_out, b_max, b_sum = attend(
                b_q_again, k_ring, v_ring, b_out, b_max, b_sum, i_tile, i_whole, i_end, row,
                scale_log2, PER_BLOCK, WARPGROUPS, W, EARLY, False, HAS_LENGTHS,
            )
        i_tile += i_end
        rings.release(q_ring, i_queries)
        i_queries += WARPGROUPS

        # A row without keys has sum 0 and maximum -inf.
        b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
        store_rows(
            b_out, b_sum, b_lse, out, lse, output_order, order_stride, i_bh, i_b, i_h,
            (i_q * WARPGROUPS + W) * ROWS, stride_ob, stride_oh, stride_on, N_Q, ORDERED, WITH_LSE,
        )
    if WARPGROUPS == 2 and W == 0:
        # Take the other's last grant: no barrier may stay half full.
        rings.await_turn(0, NUM_WORK)


@gluon.jit(do_not_specialize=COUNTS)
def block_sparse_kernel(
    q, k, v, out, lse, rows, counts, indices, key_lengths, output_order, order_stride,
    pool_keys, pool_values, bias, bits, scale_log2, stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    PER_BLOCK: gl.constexpr, QUERIES: gl.constexpr, WARPGROUPS: gl.constexpr, EARLY: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    POOL: gl.constexpr,
):
    """Query blocks of all heads, as `rows` deals them to the programs."""
    # A row's queries are a tile for each warpgroup.
    q_ring = rings.make_ring(q.dtype, QUERIES * WARPGROUPS, ROWS, D, 1)
    k_ring = rings.make_ring(q.dtype, STAGES, KEYS, D, WARPGROUPS)
    v_ring = rings.make_ring(q.dtype, STAGES, KEYS, D, WARPGROUPS)
    rings.fence_async_shared()
    # Registers are those of the workers; the first consumer gets what is left.
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (
                    q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths,
                    output_order, order_stride, bits, bias, scale_log2, stride_ob, stride_oh,
                    stride_on, H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                    full_key_blocks, HAS_LENGTHS, ORDERED, WITH_LSE, POOL, PER_BLOCK,
                    EARLY, 1, 0,
                )),
                (produce, (
                    q, k, v, q_ring, k_ring, v_ring, rows, counts, indices, H, NUM_WORK, NUM_ROWS,
                    NUM_BLOCKS, MAX_COUNT, False, pool_keys, pool_values, POOL, PER_BLOCK, 1,
                )),
            ],
            [1],
            [32],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths,
                    output_order, order_stride, bits, bias, scale_log2, stride_ob, stride_oh,
                    stride_on, H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                    full_key_blocks, HAS_LENGTHS, ORDERED, WITH_LSE, POOL, PER_BLOCK,
                    EARLY, 2, 0,
                )),
                (_consume, (
                    q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths,
                    output_order, order_stride, bits, bias, scale_log2, stride_ob, stride_oh,
                    stride_on, H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT,
                    full_key_blocks, HAS_LENGTHS, ORDERED, WITH_LSE, POOL, PER_BLOCK,
                    EARLY, 2, 1,
                )),
                (produce, (
                    q, k, v, q_ring, k_ring, v_ring, rows, counts, indices, H, NUM_WORK, NUM_ROWS,
                    NUM_BLOCKS, MAX_COUNT, False, pool_keys, pool_values, POOL, PER_BLOCK, 2,
                )),
            ],
            [4, 1],
            [232, 40],
        )


def why_not(call: AttentionCall) -> str | None:
    """Reason why this kernel cannot do the call."""
    reason = refused(call)
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if reason is None and not _can_describe(x):
            return f"it needs {name}'s address and strides in multiples of 16 bytes"
    return reason


def refused(call: AttentionCall) -> str | None:
    """Why not, whatever the precision of the products."""
    head_dim, block_map = call.q.shape[-1], call.block_map
    if not _is_hopper(call.q.device):
        return f"it needs a CUDA device of capability 9.0, got {capability(call.q.device)}"
    if call.q.dtype not in _DTYPES:
        return f"it needs {' or '.join(map(str, _DTYPES))}, got {call.q.dtype}"
    blocks = (block_map.query_block, block_map.key_block)
    if blocks[0] != QUERY_BLOCK or (head_dim, blocks[1]) not in SETTINGS:
        return (
            f"it needs query blocks of 128, key blocks of 64 or 128 and head dim 64 or 128, got "
            f"{blocks[0]}, {blocks[1]} and {head_dim}"
        )
    return None


def takes_tail(call: AttentionCall) -> bool:
    """Whether the kernel reads the call's pools itself."""
    tail = call.tail
    return tail is not None and _can_describe(tail.keys) and _can_describe(tail.values)


def _pool_size(call: AttentionCall) -> int:
    block_map = call.block_map
    return block_map.num_key_blocks * block_map.key_block // call.tail.keys.shape[2]


def rank(call: AttentionCall) -> int:
    """1.24 times as fast as `triton` at head dim 128; at 64 it saves the pass of a tail."""
    return 3 if call.q.shape[-1] == 128 or takes_tail(call) else 1


def _is_hopper(device: torch.device) -> bool:
    return capability(device) == "9.0"


def _strides(x: Tensor) -> list[int]:
    """Of x, where a dimension of size 1 has any that the copy engine takes."""
    return [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride())] + [1]


def _can_describe(x: Tensor) -> bool:
    """Whether the copy engine can read x: base and strides in multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in _strides(x)[:-1]]
    return x.data_ptr() % 16 == 0 and all(0 < s < 2**40 and s % 16 == 0 for s in strides)


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    tile = [1, 1, rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(tile, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), _strides(x), tile, layout)


def settings_for(call: AttentionCall) -> LaunchSettings:
    """The table's entry for the call's head dim and key block."""
    return SETTINGS[call.q.shape[-1], call.block_map.key_block]


def forward(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`, with the tail where `takes_tail` says so."""
    launch(call, settings_for(call))


def launch(call: AttentionCall, settings: LaunchSettings) -> None:
    """Run the kernel; benchmarks pass settings of their own."""
    block_map, key_lengths = call.block_map, call.key_lengths
    order, order_stride = call.order_and_stride()
    tail = call.tail if takes_tail(call) else None
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, tile = block_map.counts.shape[-1], settings.tile
    num_work = batch * heads * num_rows
    programs = num_work
    if settings.programs is not None:
        device = torch.cuda.get_device_properties(call.q.device)
        programs = min(num_work, device.multi_processor_count * settings.programs)
    query_rows = QUERY_BLOCK // settings.warpgroups
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[programs,](
            _describe(call.q, query_rows), _describe(call.k, tile),
            _describe(call.v, tile), call.out, call.lse, block_map.by_count,
            block_map.counts.contiguous(), block_map.indices.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            order, order_stride,
            None if tail is None else _describe(tail.keys, tile),
            None if tail is None else _describe(tail.values, tile),
            None if tail is None else tail.bias.contiguous(),
            None if tail is None else block_map.bits,
            call.scale * math.log2(math.e),
            *call.out.stride()[:3],
            heads, num_queries, call.k.shape[2], num_work, num_rows, block_map.num_key_blocks,
            block_map.indices.shape[-1], call.full_key_blocks,
            D=head_dim, ROWS=query_rows, KEYS=tile, STAGES=settings.num_stages,
            PER_BLOCK=block_map.key_block // tile, QUERIES=settings.queries,
            WARPGROUPS=settings.warpgroups, EARLY=settings.early,
            HAS_LENGTHS=key_lengths is not None, ORDERED=order is not None,
            WITH_LSE=call.lse is not None, POOL=0 if tail is None else _pool_size(call),
            num_warps=4, maxnreg=MAX_REGISTERS[settings.warpgroups], enable_fp_fusion=True,
        )
