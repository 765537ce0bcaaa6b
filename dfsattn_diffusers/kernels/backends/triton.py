"""Portable Triton kernel for NVIDIA GPUs from sm80 on: one program per head and query block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import AttentionCall, refused_size

NAME = "triton"


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the kernel.

    Attributes:
        key_tile: Keys per loop step; smaller blocks of queries or keys make it smaller.
        num_warps: For 128 queries; 64 queries take half.
        num_stages: Depth of the pipeline over key tiles.
        tma: Whether q, k and v are read through tensor descriptors where their strides allow it.
    """

    key_tile: int
    num_warps: int
    num_stages: int
    tma: bool = False


# By compute capability and head dim: the largest that compile without register spills.
SETTINGS = {
    (80, 64): LaunchSettings(64, 4, 3),
    (80, 128): LaunchSettings(32, 8, 3),
    (86, 64): LaunchSettings(64, 4, 3),
    (86, 128): LaunchSettings(32, 8, 3),
    # H200, TFLOP/s of kept work: 410 at head dim 64 (8 warps 340), 520 at 128 (2 stages 478).
    (90, 64): LaunchSettings(128, 4, 3, tma=True),
    (90, 128): LaunchSettings(128, 8, 3, tma=True),
    (100, 64): LaunchSettings(128, 8, 3, tma=True),
    (100, 128): LaunchSettings(128, 8, 3, tma=True),
}
SETTINGS |= {(arch, d): SETTINGS[86, d] for arch in (89, 120) for d in (64, 128)}


@triton.jit
def _load_tile(source, i_b, i_h, i_n, i_end, stride_b, stride_h, stride_n,
               D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows from `i_n` on of one head, `[ROWS, D]`; BOUNDED reads none from `i_end` on, gives 0."""
    o_n = i_n + tl.arange(0, ROWS)
    if TMA:
        # [1, 1, ROWS, D]
        b_x = source.load([i_b, i_h, i_n, 0]).reshape(ROWS, D)
        if BOUNDED:
            b_x = tl.where((o_n < i_end)[:, None], b_x, 0.0)
    else:
        p_x = source + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
        p_x = p_x + o_n.to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]
        # [ROWS, D]
        b_x = tl.load(p_x, mask=(o_n < i_end)[:, None], other=0.0) if BOUNDED else tl.load(p_x)
    return b_x


@triton.jit
def _block_at(p_blocks, i, i_listed):
    """The row's i-th key block: listed, or i itself where nothing is."""
    m_listed = (i >= 0) & (i < i_listed)
    return tl.where(m_listed, tl.load(p_blocks + i, mask=m_listed, other=0), i)


@triton.jit
def _count_whole(p_blocks, i_count, i_listed, full_key_blocks, RAGGED: tl.constexpr):
    """How many of the row's first blocks are sure to be whole; at most RAGGED others exist."""
    i_whole = i_count
    if RAGGED > 0:
        # [RAGGED]
        b_last = _block_at(p_blocks, i_count - 1 - tl.arange(0, RAGGED), i_listed)
        i_whole -= tl.sum((b_last >= full_key_blocks).to(tl.int32), 0)
    return i_whole


@triton.jit
def _attend(b_q, b_k, b_v, m_k, b_out, b_max, b_sum, scale_log2, MASKED: tl.constexpr):
    """One step of the online softmax, in base 2."""
    # [QUERIES, KEYS]
    b_s = tl.dot(b_q, tl.trans(b_k))
    if MASKED:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    # [QUERIES]
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_decay = tl.exp2(b_max - b_shift)
    # [QUERIES, KEYS]
    b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None])
    return b_out, b_new, b_sum


@triton.jit(
    do_not_specialize=["N_Q", "N_K", "NUM_BLOCKS", "MAX_COUNT", "full_key_blocks", "order_stride"]
)
def block_sparse_kernel(
    q, k, v, out, lse, counts, indices, key_lengths, output_order, order_stride, scale_log2,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    H, N_Q, N_K, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
    D: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, KEY_TILE: tl.constexpr,
    RAGGED: tl.constexpr, HAS_LENGTHS: tl.constexpr, ORDERED: tl.constexpr,
    WITH_LSE: tl.constexpr, TMA: tl.constexpr,
):
    """One query block of one head."""
    # Last query blocks first: dense rows of text are there and take longest.
    i_q, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    i_row = i_bh.to(tl.int64) * tl.num_programs(0) + i_q
    i_count = tl.load(counts + i_row)
    p_blocks = indices + i_row * MAX_COUNT
    i_listed = tl.where(i_count == NUM_BLOCKS, 0, i_count)
    i_whole = _count_whole(p_blocks, i_count, i_listed, full_key_blocks, RAGGED)
    TILES: tl.constexpr = KEY_BLOCK // KEY_TILE

    # [QUERY_BLOCK, D]
    b_q = _load_tile(q, i_b, i_h, i_q * QUERY_BLOCK, N_Q, stride_qb, stride_qh, stride_qn,
                     D, QUERY_BLOCK, TMA, not TMA)
    b_out = tl.zeros([QUERY_BLOCK, D], tl.float32)
    # [QUERY_BLOCK]
    b_max = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERY_BLOCK], tl.float32)

    i_next = _block_at(p_blocks, 0, i_listed)
    for i in range(0, i_whole * TILES):
        i_k = i_next * KEY_BLOCK + i % TILES * KEY_TILE
        # One step ahead: loads of keys that wait for an index in flight are not pipelined well.
        i_next = _block_at(p_blocks, (i + 1) // TILES, i_listed)
        # [KEY_TILE, D]
        b_k = _load_tile(k, i_b, i_h, i_k, N_K, stride_kb, stride_kh, stride_kn,
                         D, KEY_TILE, TMA, False)
        b_v = _load_tile(v, i_b, i_h, i_k, N_K, stride_vb, stride_vh, stride_vn,
                         D, KEY_TILE, TMA, False)
        b_out, b_max, b_sum = _attend(b_q, b_k, b_v, None, b_out, b_max, b_sum, scale_log2, False)

    for i in tl.range(i_whole * TILES, i_count * TILES, num_stages=1):
        i_block = _block_at(p_blocks, i // TILES, i_listed)
        i_k = i_block * KEY_BLOCK + i % TILES * KEY_TILE
        i_end = tl.minimum(i_block * KEY_BLOCK + KEY_BLOCK, N_K)
        if HAS_LENGTHS:
            i_length = tl.load(key_lengths + i_b * NUM_BLOCKS + i_block)
            i_end = tl.minimum(i_end, i_block * KEY_BLOCK + i_length)
        m_k = i_k + tl.arange(0, KEY_TILE) < i_end
        # [KEY_TILE, D]
        b_k = _load_tile(k, i_b, i_h, i_k, i_end, stride_kb, stride_kh, stride_kn,
                         D, KEY_TILE, TMA, not TMA)
        # Padding may be NaN, and 0 * NaN is not 0.
        b_v = _load_tile(v, i_b, i_h, i_k, i_end, stride_vb, stride_vh, stride_vn,
                         D, KEY_TILE, TMA, True)
        b_out, b_max, b_sum = _attend(b_q, b_k, b_v, m_k, b_out, b_max, b_sum, scale_log2, True)

    # [QUERY_BLOCK]
    o_q = i_q * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    m_q = o_q < N_Q
    o_out = o_q
    if ORDERED:
        p_order = output_order + i_bh.to(tl.int64) * order_stride
        o_out = tl.load(p_order + o_q, mask=m_q, other=-1)
    # A row without keys has sum 0 and maximum -inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    p_out = out + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    p_out = p_out + o_out.to(tl.int64)[:, None] * stride_on + tl.arange(0, D)[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=(m_q & (o_out >= 0))[:, None])
    if WITH_LSE:
        b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
        tl.store(lse + i_bh.to(tl.int64) * N_Q + o_q, b_lse, mask=m_q)


_INTERPRETED = not isinstance(block_sparse_kernel, triton.JITFunction)
# The interpreter multiplies bfloat16 matrices wrongly.
_DTYPES = (torch.float16, torch.float32) if _INTERPRETED else (torch.bfloat16, torch.float16)


def why_not(call: AttentionCall) -> str | None:
    """Reason why this kernel cannot do the call."""
    if call.q.device.type != "cuda" and not _INTERPRETED:
        return f"it needs CUDA tensors, got {call.q.device.type}"
    if torch.version.hip is not None:
        return "it is tuned for NVIDIA GPUs, this torch is built for ROCm"
    if call.q.is_cuda and torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return "it needs compute capability 8.0 or higher"
    return refused_size(call, _DTYPES)


def rank(call: AttentionCall) -> int | None:
    """Of the products' own precision, the one for every GPU."""
    return 2 if call.q.is_cuda else None


def settings_for(call: AttentionCall) -> LaunchSettings:
    """The table's entry for the call's device and head dim."""
    arch = 80
    if call.q.is_cuda:
        major, minor = torch.cuda.get_device_capability(call.q.device)
        arch = max(known for known, _ in SETTINGS if known <= major * 10 + minor)
    return SETTINGS[arch, call.q.shape[-1]]


def forward(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    launch(call, settings_for(call))


def launch(call: AttentionCall, settings: LaunchSettings) -> None:
    """Run the kernel; benchmarks pass settings of their own."""
    block_map = call.block_map
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, num_blocks = block_map.counts.shape[-1], block_map.num_key_blocks
    query_block, key_block = block_map.query_block, block_map.key_block
    key_tile = min(settings.key_tile, query_block, key_block)
    q, k, v = call.q, call.k, call.v
    tma = settings.tma and all(map(_can_describe, (q, k, v)))
    if tma:
        q = TensorDescriptor.from_tensor(q, [1, 1, query_block, head_dim])
        k, v = (TensorDescriptor.from_tensor(x, [1, 1, key_tile, head_dim]) for x in (k, v))
    strides = [s for x in (call.q, call.k, call.v, call.out) for s in x.stride()[:3]]
    key_lengths = call.key_lengths
    order, order_stride = call.order_and_stride()
    ragged = num_blocks - call.full_key_blocks
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[num_rows, batch * heads](
            q, k, v, call.out, call.lse, block_map.counts.contiguous(),
            block_map.indices.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            order, order_stride,
            call.scale * math.log2(math.e),
            *strides,
            heads, num_queries, call.k.shape[2], num_blocks, block_map.indices.shape[-1],
            call.full_key_blocks,
            D=head_dim, QUERY_BLOCK=query_block, KEY_BLOCK=key_block, KEY_TILE=key_tile,
            RAGGED=triton.next_power_of_2(ragged) if ragged else 0,
            HAS_LENGTHS=key_lengths is not None, ORDERED=order is not None,
            WITH_LSE=call.lse is not None, TMA=tma,
            num_warps=max(4, settings.num_warps * query_block // 128),
            num_stages=settings.num_stages,
            enable_fp_fusion=True,
        )


def _can_describe(x: Tensor) -> bool:
    """Whether the copy engine can read x: base and strides in multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)
