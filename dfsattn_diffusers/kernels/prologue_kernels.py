"""Triton kernel of the prologue; `prologue.reference` is the specification.

A program takes a run of slots of one of q, k, v, a few tokens at a time, and goes over their heads
in groups that lie side by side in memory, so that a token's rotary table is read once. A norm over
all heads goes over them twice: with 4 tokens a program, all that is in flight fits a large GPU's
L2, so the second time comes from there or from L1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fast import arch_of
from .prologue import Norm, Prepared, Rotary, Stream


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the kernel.

    Attributes:
        slots: Of one program, where no tiles are pooled; else it is the tile.
        tokens: Of one step.
        elements: Of one step, so that `elements / tokens / D` heads are one.
        num_warps: Of one program.
        num_stages: Of the pipeline over heads.
    """

    slots: int
    tokens: int
    elements: int
    num_warps: int
    num_stages: int


# By compute capability: no spills.
SETTINGS = {80: LaunchSettings(16, 4, 4096, 4, 3), 86: LaunchSettings(16, 4, 4096, 4, 2)}
# Where tiles alone are asked for: whole ones, whose sums stay in registers.
ALONE = LaunchSettings(16, 16, 2048, 2, 2)

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_HEAD_DIMS = (16, 32, 64, 128, 256)


@triton.jit
def _load(p_x, p_x2, m_x, m_second, other):
    """From one of two streams; a choice of pointers would not load vectors."""
    if p_x2 is None:
        b_x = tl.load(p_x, mask=m_x, other=other)
    else:
        b_x = tl.load(p_x, mask=m_x & ~m_second, other=other)
        b_x = tl.load(p_x2, mask=m_x & m_second, other=b_x)
    return b_x


@triton.jit
def _load_pairs(p_x, p_x2, o_x, m_x, m_second, other, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both members of every rotary pair, `[.., D / 2]` float32 each."""
    if INTERLEAVED:
        o_x += tl.arange(0, D)[None, None, :]
        p_x += o_x
        if p_x2 is not None:
            p_x2 += o_x
        b_x = _load(p_x, p_x2, m_x, m_second, other)
        b_x = tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], D // 2, 2))
        b_first, b_second = tl.split(b_x)
    else:
        o_x += tl.arange(0, D // 2)[None, None, :]
        p_x += o_x
        p_half, p_half2 = p_x + D // 2, p_x2
        if p_x2 is not None:
            p_x2 += o_x
            p_half2 = p_x2 + D // 2
        b_first = _load(p_x, p_x2, m_x, m_second, other)
        b_second = _load(p_half, p_half2, m_x, m_second, other)
    return b_first.to(tl.float32), b_second.to(tl.float32)


@triton.jit
def _store_pairs(p_x, b_first, b_second, m_x, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    kind: tl.constexpr = p_x.dtype.element_ty
    if INTERLEAVED:
        b_x = tl.join(b_first.to(kind), b_second.to(kind))
        b_x = tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], D))
        tl.store(p_x + tl.arange(0, D)[None, None, :], b_x, mask=m_x)
    else:
        p_x += tl.arange(0, D // 2)[None, None, :]
        tl.store(p_x, b_first.to(kind), mask=m_x)
        tl.store(p_x + D // 2, b_second.to(kind), mask=m_x)


@triton.jit
def _round(b_x, DTYPE: tl.constexpr):
    return b_x.to(DTYPE).to(tl.float32)


@triton.jit
def _prepare(
    x, x2, weight, weight2, bias, bias2, out, tiles, source, slots, lengths, cos, sin, eps, i_tile,
    stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh, stride_on, stride_lengths,
    H, P, T, ROWS, N, FIRST_ROW, ROTATED, NORM: tl.constexpr, STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`SLOTS` slots of one of q, k, v, all heads."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    i_b = tl.program_id(1).to(tl.int64)
    x += i_b * stride_b
    if out is not None:
        out += i_b * stride_ob
    if x2 is not None:
        x2 += i_b * stride_b2
    if tiles is not None:
        i_length = tl.load(lengths + i_b * stride_lengths + i_tile)
        tiles += (i_b * H * T + i_tile) * D
    for i_n in range(0, SLOTS, TOKENS):
        # [TOKENS, 1, 1]
        o_slot = (i_n + tl.arange(0, TOKENS))[:, None, None]
        o_p = (i_tile * SLOTS + o_slot).to(tl.int64)
        m_p = o_p < P
        if source is not None:
            o_row = tl.load(source + o_p, mask=m_p, other=-1).to(tl.int64)
        else:
            o_row = tl.where(m_p, o_p, -1)
        m_real = o_row >= 0
        p_row, p_row2, m_second = x + o_row * stride_n, x2, o_row >= ROWS
        if x2 is not None:
            p_row2 = x2 + (o_row - ROWS) * stride_n2
        # [1 or TOKENS, 1, 1]
        o_w = tl.zeros([1 if x2 is None else TOKENS, 1, 1], tl.int32)
        if cos is not None:
            o_angle = o_row - FIRST_ROW
            m_turn = (o_angle >= 0) & (o_angle < ROTATED)
            # [TOKENS, 1, D / 2]
            b_cos, _ = _load_pairs(cos, None, o_angle * D, m_turn, None, 1.0, D, INTERLEAVED)
            _, b_sin = _load_pairs(sin, None, o_angle * D, m_turn, None, 0.0, D, INTERLEAVED)
        if NORM == "rms_all_heads":
            # [TOKENS, HEADS, D / 2]
            b_square = tl.zeros([TOKENS, HEADS, D // 2], tl.float32)
            for i_h in tl.range(0, H, HEADS, num_stages=STAGES):
                o_h = (i_h + tl.arange(0, HEADS))[None, :, None]
                b_first, b_second = _load_pairs(
                    p_row, p_row2, o_h * D, m_real & (o_h < H), m_second, 0.0, D, False
                )
                b_square += b_first * b_first + b_second * b_second
            # [TOKENS, 1, 1]
            b_square = tl.sum(tl.sum(b_square, 2, keep_dims=True), 1, keep_dims=True)
            b_scale = tl.rsqrt(b_square / (H * D) + eps)
        elif weight is not None:
            # [1 or TOKENS, 1, D / 2]
            w_first, w_second = _load_pairs(
                weight, weight2, o_w, o_w == 0, m_second, 0.0, D, INTERLEAVED
            )
        if bias is not None:
            bias_first, bias_second = _load_pairs(
                bias, bias2, o_w, o_w == 0, m_second, 0.0, D, INTERLEAVED
            )
        for i_h in tl.range(0, H, HEADS, num_stages=STAGES):
            # [1, HEADS, 1]
            o_h = (i_h + tl.arange(0, HEADS))[None, :, None]
            m_h = o_h < H
            # [TOKENS, HEADS, D / 2]
            b_first, b_second = _load_pairs(
                p_row, p_row2, o_h * D, m_real & m_h, m_second, 0.0, D, INTERLEAVED
            )
            if NORM is not None:
                if NORM == "layer":
                    b_mean = tl.sum(b_first + b_second, 2, keep_dims=True) / D
                    b_first -= b_mean
                    b_second -= b_mean
                if NORM != "rms_all_heads":
                    b_square = b_first * b_first + b_second * b_second
                    b_scale = tl.rsqrt(tl.sum(b_square, 2, keep_dims=True) / D + eps)
                b_first *= b_scale
                b_second *= b_scale
                if NORM == "rms":
                    b_first, b_second = _round(b_first, DTYPE), _round(b_second, DTYPE)
                if weight is not None:
                    if NORM == "rms_all_heads":
                        w_first, w_second = _load_pairs(
                            weight, weight2, o_w + o_h * D, m_h, m_second, 0.0, D, INTERLEAVED
                        )
                    b_first *= w_first
                    b_second *= w_second
                if bias is not None:
                    # Padding stays 0.
                    b_first = tl.where(m_real, b_first + bias_first, 0.0)
                    b_second = tl.where(m_real, b_second + bias_second, 0.0)
                b_first, b_second = _round(b_first, DTYPE), _round(b_second, DTYPE)
            if cos is not None:
                b_turned = _round(b_first * b_cos, STEP) - _round(b_second * b_sin, STEP)
                b_second = _round(b_second * b_cos, STEP) + _round(b_first * b_sin, STEP)
                b_first, b_second = _round(b_turned, DTYPE), _round(b_second, DTYPE)
            if out is not None:
                o_out = o_p
                if slots is not None:
                    # [TOKENS, HEADS, 1]; padding stays where it is.
                    p_slot = slots + (i_b * H + o_h) * N + o_row
                    o_out = tl.load(p_slot, mask=m_real & m_h, other=o_p).to(tl.int64)
                p_out = out + o_out * stride_on + o_h.to(tl.int64) * stride_oh
                _store_pairs(p_out, b_first, b_second, m_p & m_h, D, INTERLEAVED)
            if tiles is not None:
                # [1, HEADS, D / 2]
                m_pool = o_slot < i_length
                b_first = tl.sum(tl.where(m_pool, b_first, 0.0), 0, keep_dims=True)
                b_second = tl.sum(tl.where(m_pool, b_second, 0.0), 0, keep_dims=True)
                o_tile = o_h.to(tl.int64) * T * D
                i_count = tl.maximum(i_length, 1).to(tl.float32)
                if TOKENS < SLOTS:
                    # The sum so far is in memory, as not all heads fit registers.
                    b_old, b_old_second = _load_pairs(
                        tiles, None, o_tile, m_h & (i_n > 0), None, 0.0, D, INTERLEAVED
                    )
                    b_first, b_second = b_first + b_old, b_second + b_old_second
                    i_count = tl.where(i_n + TOKENS < SLOTS, 1.0, i_count)
                p_tile = tiles + o_tile
                _store_pairs(p_tile, b_first / i_count, b_second / i_count, m_h, D, INTERLEAVED)
        if tiles is not None and TOKENS < SLOTS:
            # Another thread may read what this one stored.
            tl.debug_barrier()


@triton.jit(
    do_not_specialize=["H", "P", "T", "ROWS", "N", "FIRST_ROW", "ROTATED", "stride_lengths"]
)
def prologue_kernel(
    q, k, v, q2, k2, v2, q_weight, k_weight, q_weight2, k_weight2, q_bias, k_bias, q_bias2, k_bias2,
    q_out, k_out, v_out, q_tiles, k_tiles, source, slots, lengths, cos, sin, eps,
    stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh, stride_on, stride_lengths,
    H, P, T, ROWS, N, FIRST_ROW, ROTATED, NORM: tl.constexpr, STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """q, k, v of the same slots are neighbours, so that their rotary tables come from L2."""
    i_tile, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    if i_part == 0:
        _prepare(
            q, q2, q_weight, q_weight2, q_bias, q_bias2, q_out, q_tiles, source, slots, lengths,
            cos, sin, eps, i_tile, stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh,
            stride_on, stride_lengths, H, P, T, ROWS, N, FIRST_ROW, ROTATED, NORM, STEP,
            INTERLEAVED, D, SLOTS, TOKENS, HEADS, STAGES,
        )  # fmt: skip
    elif i_part == 1:
        _prepare(
            k, k2, k_weight, k_weight2, k_bias, k_bias2, k_out, k_tiles, source, slots, lengths,
            cos, sin, eps, i_tile, stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh,
            stride_on, stride_lengths, H, P, T, ROWS, N, FIRST_ROW, ROTATED, NORM, STEP,
            INTERLEAVED, D, SLOTS, TOKENS, HEADS, STAGES,
        )  # fmt: skip
    else:
        if v_out is not None:  # without it there is no such part, yet it would be compiled
            _prepare(
                v, v2, None, None, None, None, v_out, None, source, slots, None, None, None, eps,
                i_tile, stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh, stride_on,
                stride_lengths, H, P, T, ROWS, N, FIRST_ROW, ROTATED, None, STEP, False, D, SLOTS,
                TOKENS, HEADS, STAGES,
            )  # fmt: skip


def settings_for(arch: int) -> LaunchSettings:
    """The table's entry for a compute capability."""
    return SETTINGS[max(known for known in SETTINGS if known <= arch)]


def launch_shape(
    heads: int, head_dim: int, tile: int | None, settings: LaunchSettings
) -> tuple[int, int, int]:
    """Slots of a program, tokens and heads of a step."""
    slots = tile or settings.slots
    tokens = min(slots, settings.tokens)
    group = min(triton.next_power_of_2(heads), max(1, settings.elements // (tokens * head_dim)))
    return slots, tokens, group


def can_prepare(
    streams: Sequence[Stream], rotary: Rotary | None, source: Tensor | None, lengths: Tensor | None
) -> bool:
    """Whether `prepare_qkv` serves this call's precision, shape and norms."""
    like = streams[0].q
    norms = [norm for stream in streams for norm in (stream.q_norm, stream.k_norm)]
    size = 1 if lengths is None else _slot_count(streams, source) // lengths.shape[1]
    return (
        like.dtype in _DTYPES
        and like.shape[3] in _HEAD_DIMS
        and len({_shape_of(norm) for norm in norms}) == 1
        and size & (size - 1) == 0
        and (rotary is None or rotary.cos.dtype in _DTYPES and rotary.sin.dtype in _DTYPES)
    )


def prepare_qkv(
    streams: Sequence[Stream],
    rotary: Rotary | None,
    source: Tensor | None,
    heads_first: bool,
    tile_lengths: Tensor | None,
    slots: Tensor | None = None,
    settings: LaunchSettings | None = None,
) -> Prepared:
    """`prologue.prepare_qkv` where `can_prepare` says yes."""
    like, count = streams[0].q, _slot_count(streams, source)
    batch, _, heads, head_dim = like.shape
    shape = (batch, heads, count, head_dim) if heads_first else (batch, count, heads, head_dim)
    # v of one stream in the model's order is in place.
    v = [streams[0].v] if source is None and len(streams) == 1 and not heads_first else []
    out = [like.new_empty(shape) for _ in range(3 - len(v))]
    to = out if heads_first else [x.transpose(1, 2) for x in out]
    return Prepared(*out, *v, *_launch(streams, rotary, source, to, tile_lengths, slots, settings))


def pool_qk(
    streams: Sequence[Stream], rotary: Rotary | None, source: Tensor | None, tile_lengths: Tensor,
    settings: LaunchSettings = ALONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prologue.pool_qk` where `can_prepare` says yes."""
    return _launch(streams, rotary, source, [], tile_lengths, settings=settings)


def _launch(
    streams: Sequence[Stream],
    rotary: Rotary | None,
    source: Tensor | None,
    out: list[Tensor],
    lengths: Tensor | None,
    slots: Tensor | None = None,
    settings: LaunchSettings | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill `out`, `[B, H, P, D]` of q, k and v, of q and k or none; return tiles."""
    first, second = streams[0], streams[1] if len(streams) == 2 else None
    batch, rows, heads, head_dim = first.q.shape
    x, x2 = _aligned(first), _aligned(second) if second else (None,) * 3
    norm, count = first.q_norm, _slot_count(streams, source)
    tiles, num_tiles, parts = (None, None), 0, len(out) or 2
    if lengths is not None:
        lengths, num_tiles = lengths.contiguous(), lengths.shape[1]
        shape = batch, heads, num_tiles, head_dim
        tiles = tuple(first.q.new_empty(shape, dtype=torch.float32) for _ in "qk")

    cos, sin, step, first_row, rotated = None, None, tl.float32, 0, 0
    if rotary is not None:
        cos, sin, first_row = rotary.cos.contiguous(), rotary.sin.contiguous(), rotary.first_row
        rotated = cos.numel() // head_dim
        if not rotary.float32_steps:
            step = _DTYPES[torch.promote_types(first.q.dtype, cos.dtype)]

    if settings is None:
        settings = settings_for(arch_of(first.q))
    tile = count // num_tiles if num_tiles else None
    size, tokens, group = launch_shape(heads, head_dim, tile, settings)
    with torch.cuda.device_of(first.q):
        prologue_kernel[triton.cdiv(count, size) * parts, batch](
            *x, *x2, *_parameters(first, second, "weight"), *_parameters(first, second, "bias"),
            *out, *[None] * (3 - len(out)), *tiles,
            source.contiguous() if source is not None else None,
            slots.contiguous() if slots is not None else None,
            lengths, cos, sin, 0.0 if norm is None else norm.eps, *x[0].stride()[:2],
            *(x2[0].stride()[:2] if second else (0, 0)),
            *(out[0].stride()[:3] if out else (0, 0, 0)),
            num_tiles if num_tiles and lengths.shape[0] > 1 else 0,
            heads, count, num_tiles, rows, None if slots is None else slots.shape[2],
            first_row, rotated, NORM=None if norm is None else norm.kind, STEP=step,
            INTERLEAVED=rotary is not None and rotary.interleaved, D=head_dim, SLOTS=size,
            TOKENS=tokens, HEADS=group, STAGES=settings.num_stages, PARTS=parts,
            num_warps=settings.num_warps,
            enable_fp_fusion=False,  # stock code rounds every product
        )  # fmt: skip
    return tiles


def _slot_count(streams: Sequence[Stream], source: Tensor | None) -> int:
    return sum(x.q.shape[1] for x in streams) if source is None else source.numel()


def _shape_of(norm: Norm | None) -> tuple | None:
    """What must be the same in all norms of a launch."""
    return norm and (norm.kind, norm.eps, norm.weight is None, norm.bias is None)


def _parameters(first: Stream, second: Stream | None, name: str) -> list[Tensor | None]:
    """Of q and k of the first stream, then of the second."""
    norms = [first.q_norm, first.k_norm]
    norms += [second.q_norm, second.k_norm] if second else [None, None]
    values = [getattr(norm, name) if norm else None for norm in norms]
    return [None if x is None else x.contiguous() for x in values]


def _aligned(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with common strides and heads side by side; copies only what models do not make."""
    parts = stream.q, stream.k, stream.v
    head_dim = stream.q.shape[3]
    if len({x.stride() for x in parts}) == 1 and stream.q.stride()[2:] == (head_dim, 1):
        return parts
    return tuple(x.contiguous() for x in parts)
