"""Warp-specialised Gluon kernel for sm90: one warp loads, two warpgroups compute in turns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import AttentionCall, capability
from . import _hopper_rings as rings
from ._hopper_rings import TensorDescriptor, gl, gluon, warpgroup_mma, warpgroup_mma_wait

NAME = "gluon_hopper"

QUERY_BLOCK = 128
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the kernel.

    Attributes:
        num_stages: Slots of the rings of key and of value blocks.
        persistent: One program per multiprocessor that takes row after row, not one per row.
        early: Whether the wait for the next keys comes before the one for the last product.
    """

    num_stages: int
    persistent: bool = True
    early: bool = True


# By head dim and key block.
SETTINGS = {
    (128, 128): LaunchSettings(2, persistent=False, early=False),
    (128, 64): LaunchSettings(3, persistent=False, early=False),
    (64, 128): LaunchSettings(3, early=False),
    (64, 64): LaunchSettings(6, early=False),
}


@gluon.jit
def _block_at(p_blocks, i, i_listed):
    """The row's i-th key block: listed, or i itself where nothing is."""
    return gl.where(i < i_listed, gl.load(p_blocks + i, mask=i < i_listed, other=0), i)


@gluon.jit
def _num_rounds(NUM_WORK):
    """How many rows this program takes."""
    return (NUM_WORK - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _row_at(i_round, rows, counts, indices, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT):
    """Head and query block of this program's row, its key blocks, and how many are listed."""
    i_program, i_programs = gl.program_id(0), gl.num_programs(0)
    # Long rows come first: dealt back and forth they add up to about as much for every program.
    m_back = (i_round % 2 == 1) & (i_round < NUM_WORK // i_programs)
    i_place = gl.where(m_back, i_programs - 1 - i_program, i_program)
    i_row = gl.load(rows + i_round * i_programs + i_place)
    i_count = gl.load(counts + i_row)
    i_listed = gl.where(i_count == NUM_BLOCKS, 0, i_count)
    p_blocks = indices + i_row.to(gl.int64) * MAX_COUNT
    return i_row // NUM_ROWS, i_row % NUM_ROWS, i_count, p_blocks, i_listed


@gluon.jit
def _count_whole(p_blocks, i_count, i_listed, NUM_BLOCKS, full_key_blocks):
    """How many of the row's first blocks are sure to be whole, by bisection."""
    i_low, i_high = gl.maximum(i_count - (NUM_BLOCKS - full_key_blocks), 0), i_count
    while i_low < i_high:
        i_middle = (i_low + i_high) // 2
        m_whole = _block_at(p_blocks, i_middle, i_listed) < full_key_blocks
        i_low, i_high = gl.where(m_whole, i_middle + 1, i_low), gl.where(m_whole, i_high, i_middle)
    return i_low


@gluon.jit
def _produce(q_source, k_source, v_source, q_ring, k_ring, v_ring, rows, counts,
             indices, H, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT):
    """The loading warp: each row's queries, then keys one block ahead of values."""
    ROWS: gl.constexpr = q_ring[0].shape[1]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    i_tile, i_half = 0, 0
    for i_round in range(_num_rounds(NUM_WORK)):
        i_bh, i_q, i_count, p_blocks, i_listed = _row_at(
            i_round, rows, counts, indices, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT
        )
        i_b, i_h = i_bh // H, i_bh % H
        for W in gl.static_range(2):
            rings.fetch(q_ring, i_half + W, q_source, i_b, i_h, (i_q * 2 + W) * ROWS)
        i_half += 2
        i_block = _block_at(p_blocks, 0, i_listed)
        i_last = -1  # not `i_block`: the loop would not carry what starts as another name's value
        for i in range(i_count):
            rings.fetch(k_ring, i_tile + i, k_source, i_b, i_h, i_block * KEYS)
            # One step ahead: the index is in flight while the next step waits.
            i_next = _block_at(p_blocks, i + 1, i_listed)
            if i > 0:
                rings.fetch(v_ring, i_tile + i - 1, v_source, i_b, i_h, i_last * KEYS)
            i_last, i_block = i_block, i_next
        i_tile += i_count
        if i_count > 0:
            rings.fetch(v_ring, i_tile - 1, v_source, i_b, i_h, i_last * KEYS)


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
def _multiply_keys(b_q, b_k, LOGITS: gl.constexpr):
    """Starts q times k transposed."""
    ROWS: gl.constexpr = b_q.shape[0]
    KEYS: gl.constexpr = b_k.shape[0]
    b_zero = gl.zeros([ROWS, KEYS], gl.float32, LOGITS)
    return warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _as_operand(b_p, DTYPE: gl.constexpr, OUT: gl.constexpr):
    # Moves nothing: the registers of a product are laid out as those of a left operand.
    LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    return gl.convert_layout(b_p.to(DTYPE), LAYOUT)


@gluon.jit
def _attend_whole(b_q, k_ring, v_ring, b_out, b_max, b_sum, i_tile, i_end, scale_log2,
                  W: gl.constexpr, EARLY: gl.constexpr):
    """Blocks `i_tile` to `i_end` of the rings, without masks, values one step after keys."""
    LOGITS: gl.constexpr = b_max.type.layout.parent
    OUT: gl.constexpr = b_out.type.layout
    DTYPE: gl.constexpr = b_q.dtype
    b_s = _multiply_keys(b_q, rings.receive(k_ring, i_tile), LOGITS)
    # [ROWS, KEYS]
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    rings.release(k_ring, i_tile)
    b_p, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, scale_log2, False)
    b_p = _as_operand(b_p, DTYPE, OUT)
    if EARLY:
        rings.receive_if(i_tile + 1 < i_end, k_ring, i_tile + 1)

    for i in range(i_tile + 1, i_end):
        if not EARLY:
            rings.receive(k_ring, i)
        # In turns: while one warpgroup multiplies, the other takes exponentials.
        rings.await_turn(W, i)
        b_s = _multiply_keys(b_q, rings.slot(k_ring, i), LOGITS)
        b_out = warpgroup_mma(b_p, rings.receive(v_ring, i - 1), b_out, is_async=True)
        rings.grant_turn(1 - W, i)
        # [ROWS, KEYS]
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        rings.release(k_ring, i)
        b_next, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, scale_log2, False)
        b_next = _as_operand(b_next, DTYPE, OUT)
        if EARLY:
            # ptxas does not move the wait for the product across this branch and its loop.
            rings.receive_if(i + 1 < i_end, k_ring, i + 1)
        # [ROWS, D]
        b_out = warpgroup_mma_wait(0, deps=[b_out])
        rings.release(v_ring, i - 1)
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
        b_p = b_next

    b_out = warpgroup_mma(b_p, rings.receive(v_ring, i_end - 1), b_out, is_async=True)
    # [ROWS, D]
    b_out = warpgroup_mma_wait(0, deps=[b_out])
    rings.release(v_ring, i_end - 1)
    return b_out, b_max, b_sum


@gluon.jit
def _attend_masked(b_q, k_ring, v_ring, b_out, b_max, b_sum, i_tile, i_keys, scale_log2,
                   CLEAR: gl.constexpr):
    """One block, of which the first `i_keys` keys are real."""
    LOGITS: gl.constexpr = b_max.type.layout.parent
    OUT: gl.constexpr = b_out.type.layout
    DTYPE: gl.constexpr = b_q.dtype
    KEYS: gl.constexpr = k_ring[0].shape[1]
    b_s = _multiply_keys(b_q, rings.receive(k_ring, i_tile), LOGITS)
    # [ROWS, KEYS]
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    rings.release(k_ring, i_tile)
    m_k = gl.arange(0, KEYS, gl.SliceLayout(0, LOGITS)) < i_keys
    b_s = gl.where(m_k[None, :], b_s, float("-inf"))
    b_p, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, scale_log2, True)
    b_p = _as_operand(b_p, DTYPE, OUT)
    b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
    b_v = rings.receive(v_ring, i_tile)
    if CLEAR:
        # Padding may be NaN, and 0 * NaN is not 0.
        rings.clear_rows(b_v, i_keys)
    b_out = warpgroup_mma(b_p, b_v, b_out, is_async=True)
    # [ROWS, D]
    b_out = warpgroup_mma_wait(0, deps=[b_out])
    rings.release(v_ring, i_tile)
    return b_out, b_max, b_sum


@gluon.jit
def _consume(
    q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths, output_order, scale_log2,
    stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    W: gl.constexpr, HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """One of two warpgroups: its half of each row's queries against all of the row's keys."""
    ROWS: gl.constexpr = q_ring[0].shape[1]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    i_tile, i_half = 0, W
    if W == 1:
        # The first turn is the other warpgroup's.
        rings.grant_turn(0, NUM_WORK)
    for i_round in range(_num_rounds(NUM_WORK)):
        i_bh, i_q, i_count, p_blocks, i_listed = _row_at(
            i_round, rows, counts, indices, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT
        )
        i_b, i_h = i_bh // H, i_bh % H
        i_whole = _count_whole(p_blocks, i_count, i_listed, NUM_BLOCKS, full_key_blocks)
        # [ROWS]
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
        b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
        # [ROWS, D]
        b_out = gl.zeros([ROWS, D], gl.float32, OUT)
        b_q = rings.receive(q_ring, i_half)
        # The same tile, since no count is negative. ptxas must not know: it would compute parts of
        # the tile's descriptor for whole blocks alone, and use them where there are none as well.
        b_q_again = rings.slot(q_ring, i_half + gl.where(i_count < 0, 1, 0))
        if i_whole > 0:
            b_out, b_max, b_sum = _attend_whole(
                b_q, k_ring, v_ring, b_out, b_max, b_sum, i_tile, i_tile + i_whole, scale_log2,
                W, EARLY,
            )
        for i in range(i_whole, i_count):
            i_block = _block_at(p_blocks, i, i_listed)
            i_keys = N_K - i_block * KEYS
            if HAS_LENGTHS:
                i_keys = gl.minimum(i_keys, gl.load(key_lengths + i_b * NUM_BLOCKS + i_block))
            b_out, b_max, b_sum = _attend_masked(
                b_q_again, k_ring, v_ring, b_out, b_max, b_sum, i_tile + i, i_keys, scale_log2,
                HAS_LENGTHS,
            )
        rings.release(q_ring, i_half)
        i_half += 2
        i_tile += i_count

        # [ROWS]
        o_q = i_q * 2 * ROWS + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
        m_q = o_q < N_Q
        o_out = o_q
        if ORDERED:
            o_out = gl.load(output_order + o_q, mask=m_q, other=-1)
        if WITH_LSE:
            # A row without keys has sum 0 and maximum -inf.
            b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
            b_lse = gl.convert_layout(b_lse, gl.SliceLayout(1, OUT))
            gl.store(lse + i_bh.to(gl.int64) * N_Q + o_q, b_lse, mask=m_q)
        b_sum = gl.convert_layout(gl.where(b_sum == 0.0, 1.0, b_sum), gl.SliceLayout(1, OUT))
        p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
        p_out += o_out.to(gl.int64) * stride_on
        o_d = gl.arange(0, D, gl.SliceLayout(0, OUT))
        # [ROWS, D]
        b_out = (b_out * (1.0 / b_sum)[:, None]).to(q_ring[0].dtype)
        gl.store(p_out[:, None] + o_d[None, :], b_out, mask=(m_q & (o_out >= 0))[:, None])
    if W == 0:
        # Take the other's last grant: no barrier may stay half full.
        rings.await_turn(0, NUM_WORK)


_COUNTS = ["H", "N_Q", "N_K", "NUM_WORK", "NUM_ROWS", "NUM_BLOCKS", "MAX_COUNT", "full_key_blocks"]


@gluon.jit(do_not_specialize=_COUNTS)
def block_sparse_kernel(
    q, k, v, out, lse, rows, counts, indices, key_lengths, output_order, scale_log2,
    stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Query blocks of all heads, as `rows` deals them to the programs."""
    # A row's queries are a tile for each warpgroup; the next row's come meanwhile.
    q_ring = rings.make_ring(q.dtype, 4, ROWS, D, 1)
    k_ring = rings.make_ring(q.dtype, STAGES, KEYS, D, 2)
    v_ring = rings.make_ring(q.dtype, STAGES, KEYS, D, 2)
    rings.fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths, output_order,
                scale_log2, stride_ob, stride_oh, stride_on, H, N_Q, N_K, NUM_WORK, NUM_ROWS,
                NUM_BLOCKS, MAX_COUNT, full_key_blocks, 0, HAS_LENGTHS, ORDERED, WITH_LSE, EARLY,
            )),
            (_consume, (
                q_ring, k_ring, v_ring, out, lse, rows, counts, indices, key_lengths, output_order,
                scale_log2, stride_ob, stride_oh, stride_on, H, N_Q, N_K, NUM_WORK, NUM_ROWS,
                NUM_BLOCKS, MAX_COUNT, full_key_blocks, 1, HAS_LENGTHS, ORDERED, WITH_LSE, EARLY,
            )),
            (_produce, (
                q, k, v, q_ring, k_ring, v_ring, rows, counts, indices, H, NUM_WORK, NUM_ROWS,
                NUM_BLOCKS, MAX_COUNT,
            )),
        ],
        [4, 1],
        # Registers of the workers; the first consumer gets as many as the second.
        [232, 40],
    )


def why_not(call: AttentionCall) -> str | None:
    """Reason why this kernel cannot do the call."""
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
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if not _can_describe(x):
            return f"it needs {name}'s address and strides in multiples of 16 bytes"
    return None


def rank(call: AttentionCall) -> int:
    """1.24 times as fast as `triton` at head dim 128; at 64 no faster, where rows are uneven."""
    return 3 if call.q.shape[-1] == 128 else 1


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
    """Fill `call.out` and `call.lse`."""
    launch(call, settings_for(call))


def launch(call: AttentionCall, settings: LaunchSettings) -> None:
    """Run the kernel; benchmarks pass settings of their own."""
    block_map, key_lengths, order = call.block_map, call.key_lengths, call.output_order
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, key_block = block_map.counts.shape[-1], block_map.key_block
    num_work = batch * heads * num_rows
    device = torch.cuda.get_device_properties(call.q.device)
    programs = min(num_work, device.multi_processor_count) if settings.persistent else num_work
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[programs,](
            _describe(call.q, QUERY_BLOCK // 2), _describe(call.k, key_block),
            _describe(call.v, key_block), call.out, call.lse, block_map.by_count,
            block_map.counts.contiguous(), block_map.indices.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            None if order is None else order.contiguous(),
            call.scale * math.log2(math.e),
            *call.out.stride()[:3],
            heads, num_queries, call.k.shape[2], num_work, num_rows, block_map.num_key_blocks,
            block_map.indices.shape[-1], call.full_key_blocks,
            D=head_dim, ROWS=QUERY_BLOCK // 2, KEYS=key_block, STAGES=settings.num_stages,
            HAS_LENGTHS=key_lengths is not None, ORDERED=order is not None,
            WITH_LSE=call.lse is not None, EARLY=settings.early,
            # 12 warps with the other partitions': 65536 / 384 registers, in multiples of 8.
            num_warps=4, maxnreg=168, enable_fp_fusion=True,
        )
