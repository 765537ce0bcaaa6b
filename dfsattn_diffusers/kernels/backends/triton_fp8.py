"""Triton kernel in 8 bits for sm89 and sm90: of both products' operands, all else is float32.

Chosen by `precision="fp8"` or "int8". `quantize` says what is rounded and how.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..quantize import ROUNDING, Quantized, quantize
from ..quantize_kernels import to_e4m3
from . import AttentionCall, refused_size
from .triton import _block_at, _count_whole

NAME = "triton_fp8"
PRECISIONS = ("fp8", "int8")


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the kernel.

    Attributes:
        key_tile: Keys per loop step; smaller blocks of keys make it smaller.
        num_warps: For 128 queries; 64 queries take half.
        num_stages: Depth of the pipeline over key tiles.
        tma: Whether q, k and v are read through tensor descriptors.
    """

    key_tile: int
    num_warps: int
    num_stages: int
    tma: bool = False


# By compute capability and head dim: the largest that compile without spills; not yet measured.
SETTINGS = {
    (89, 64): LaunchSettings(64, 8, 3),
    (89, 128): LaunchSettings(64, 8, 2),
    (90, 64): LaunchSettings(128, 8, 3, tma=True),
    (90, 128): LaunchSettings(128, 8, 3, tma=True),
}


@triton.jit
def _load_tile(source, i_head, i_row, i_column, COLUMNS,
               ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """A tile of one head's matrix, `[ROWS, WIDTH]`; it is never ragged.

    `i_head` counts heads with TMA, elements without.
    """
    if TMA:
        b_x = source.load([i_head, i_row, i_column]).reshape(ROWS, WIDTH)
    else:
        o_row = (i_row + tl.arange(0, ROWS)).to(tl.int64)
        p_x = source + i_head + o_row[:, None] * COLUMNS
        b_x = tl.load(p_x + i_column + tl.arange(0, WIDTH)[None, :])
    return b_x


@triton.jit
def _attend(b_q, b_k, b_v, m_k, b_out, b_max, b_sum, b_scale, b_value_scale, MASKED: tl.constexpr):
    """One step of the online softmax, in base 2, over weights times their value block's scale."""
    # [QUERIES, KEYS]
    b_s = tl.dot(b_q, tl.trans(b_k)).to(tl.float32)
    if MASKED:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    b_log = tl.log2(b_value_scale)
    # [QUERIES]
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * b_scale + b_log)
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
    b_decay = tl.exp2(b_max - b_shift)
    # Weights reach 256 of e4m3's 448, a power of two that cancels against their sum.
    # [QUERIES, KEYS]
    b_p = tl.exp2(b_s * b_scale + (b_log + 8.0 - b_shift)[:, None])
    b_sum = b_sum * b_decay + tl.sum(b_p, 1) / b_value_scale
    # A sum of its own per step: Hopper's 8-bit products keep 14 bits of theirs.
    # [QUERIES, D]
    b_out = b_out * b_decay[:, None] + tl.dot(to_e4m3(b_p), tl.trans(b_v))
    return b_out, b_new, b_sum


@triton.jit(
    do_not_specialize=["N_Q", "N_K", "NUM_BLOCKS", "MAX_COUNT", "full_key_blocks", "order_stride"]
)
def block_sparse_kernel(
    q, k, v, q_scales, k_scales, v_scales, mean_logits, out, lse, counts, indices, key_lengths,
    output_order, order_stride, scale, stride_ob, stride_oh, stride_on,
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
    i_slots = NUM_BLOCKS * KEY_BLOCK
    if TMA:
        i_head_q, i_head_k, i_head_v = i_bh, i_bh, i_bh
    else:
        i_head_q = i_bh.to(tl.int64) * tl.num_programs(0) * QUERY_BLOCK * D
        i_head_k = i_bh.to(tl.int64) * i_slots * D
        i_head_v = i_head_k
    p_k_scale = k_scales + i_bh.to(tl.int64) * NUM_BLOCKS
    p_v_scale = v_scales + i_bh.to(tl.int64) * NUM_BLOCKS
    b_q_scale = tl.load(q_scales + i_row) * (scale * 1.4426950408889634)

    # [QUERY_BLOCK, D]
    b_q = _load_tile(q, i_head_q, i_q * QUERY_BLOCK, 0, D, QUERY_BLOCK, D, TMA)
    b_out = tl.zeros([QUERY_BLOCK, D], tl.float32)
    # [QUERY_BLOCK]
    b_max = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERY_BLOCK], tl.float32)

    i_next = _block_at(p_blocks, 0, i_listed)
    for i in range(0, i_whole * TILES):
        i_k = i_next * KEY_BLOCK + i % TILES * KEY_TILE
        b_scale = b_q_scale * tl.load(p_k_scale + i_next)
        b_value_scale = tl.load(p_v_scale + i_next)
        # One step ahead: loads of keys that wait for an index in flight are not pipelined well.
        i_next = _block_at(p_blocks, (i + 1) // TILES, i_listed)
        # [KEY_TILE, D]
        b_k = _load_tile(k, i_head_k, i_k, 0, D, KEY_TILE, D, TMA)
        # [D, KEY_TILE]
        b_v = _load_tile(v, i_head_v, 0, i_k, i_slots, D, KEY_TILE, TMA)
        b_out, b_max, b_sum = _attend(
            b_q, b_k, b_v, None, b_out, b_max, b_sum, b_scale, b_value_scale, False
        )

    for i in tl.range(i_whole * TILES, i_count * TILES, num_stages=1):
        i_block = _block_at(p_blocks, i // TILES, i_listed)
        i_k = i_block * KEY_BLOCK + i % TILES * KEY_TILE
        b_scale = b_q_scale * tl.load(p_k_scale + i_block)
        b_value_scale = tl.load(p_v_scale + i_block)
        i_end = tl.minimum(i_block * KEY_BLOCK + KEY_BLOCK, N_K)
        if HAS_LENGTHS:
            i_length = tl.load(key_lengths + i_b * NUM_BLOCKS + i_block)
            i_end = tl.minimum(i_end, i_block * KEY_BLOCK + i_length)
        m_k = i_k + tl.arange(0, KEY_TILE) < i_end
        # [KEY_TILE, D]
        b_k = _load_tile(k, i_head_k, i_k, 0, D, KEY_TILE, D, TMA)
        # [D, KEY_TILE]
        b_v = _load_tile(v, i_head_v, 0, i_k, i_slots, D, KEY_TILE, TMA)
        b_out, b_max, b_sum = _attend(
            b_q, b_k, b_v, m_k, b_out, b_max, b_sum, b_scale, b_value_scale, True
        )

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
        p_mean = mean_logits + i_row * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
        b_lse = (b_max + tl.log2(b_sum / 256.0)) * 0.6931471805599453 + tl.load(p_mean) * scale
        tl.store(lse + i_bh.to(tl.int64) * N_Q + o_q, b_lse, mask=m_q)


_INTERPRETED = not isinstance(block_sparse_kernel, triton.JITFunction)
# The interpreter rounds to bfloat16 wrongly.
_DTYPES = (torch.float16, torch.float32) if _INTERPRETED else (torch.bfloat16, torch.float16)
_ARCHS = sorted({arch for arch, _ in SETTINGS})


def why_not(call: AttentionCall) -> str | None:
    """Reason why this kernel cannot do the call."""
    if call.q.device.type != "cuda" and not _INTERPRETED:
        return f"it needs CUDA tensors, got {call.q.device.type}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, this torch is built for ROCm"
    if call.q.is_cuda and _arch(call.q.device) not in _ARCHS:
        major, minor = divmod(_arch(call.q.device), 10)
        return f"it needs compute capability 8.9 or 9.0, got {major}.{minor}"
    return refused_size(call, _DTYPES)


def rank(call: AttentionCall) -> int | None:
    """Of its precision, the one for every GPU that has it."""
    return 1 if call.q.is_cuda else None


def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def settings_for(call: AttentionCall) -> LaunchSettings:
    """The table's entry for the call's device and head dim."""
    return SETTINGS[_arch(call.q.device) if call.q.is_cuda else 89, call.q.shape[-1]]


def forward(call: AttentionCall) -> None:
    """Quantise, then fill `call.out` and `call.lse`."""
    quantized = quantize(
        call.q, call.k, call.v, query_block=call.block_map.query_block,
        key_block=call.block_map.key_block, key_lengths=call.key_lengths,
        **ROUNDING[call.precision],
    )
    launch(call, quantized, settings_for(call))


def launch(call: AttentionCall, x: Quantized, settings: LaunchSettings) -> None:
    """Run the kernel on what `quantize` made; benchmarks pass settings of their own."""
    block_map, key_lengths = call.block_map, call.key_lengths
    order, order_stride = call.order_and_stride()
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, num_blocks = block_map.counts.shape[-1], block_map.num_key_blocks
    query_block, key_block = block_map.query_block, block_map.key_block
    key_tile = min(settings.key_tile, key_block)
    q, k, v = x.q, x.k, x.v
    if settings.tma:
        q, k = _describe(q, query_block, head_dim), _describe(k, key_tile, head_dim)
        v = _describe(v, head_dim, key_tile)
    ragged = num_blocks - call.full_key_blocks
    with torch.cuda.device_of(call.q):
        block_sparse_kernel[num_rows, batch * heads](
            q, k, v, x.q_scales, x.k_scales, x.v_scales, x.mean_logits, call.out, call.lse,
            block_map.counts.contiguous(), block_map.indices.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            order, order_stride, call.scale, *call.out.stride()[:3],
            heads, num_queries, call.k.shape[2], num_blocks, block_map.indices.shape[-1],
            call.full_key_blocks,
            D=head_dim, QUERY_BLOCK=query_block, KEY_BLOCK=key_block, KEY_TILE=key_tile,
            RAGGED=triton.next_power_of_2(ragged) if ragged else 0,
            HAS_LENGTHS=key_lengths is not None, ORDERED=order is not None,
            WITH_LSE=call.lse is not None, TMA=settings.tma,
            num_warps=max(4, settings.num_warps * query_block // 128),
            num_stages=settings.num_stages, enable_fp_fusion=True,
        )


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [1, rows, columns])
