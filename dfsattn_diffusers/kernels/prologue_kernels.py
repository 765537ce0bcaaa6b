"""Triton kernel of the prologue; `prologue.reference` is the specification.

A program takes a run of slots of one of q, k, v, a few tokens at a time. All heads of a step are in
registers, every load before the first use: a norm over all heads reads them once, and a token's
rotary table is read once. Sums of a tile stay there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prologue import Norm, Prepared, Rotary, Stream
from .prologue_steps import (
    each_value,
    load_heads,
    load_shared,
    norm_and_rotate,
    round_pairs,
    store_heads,
)


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch the kernel.

    Attributes:
        slots: Of one program, where no tiles are pooled; else it is the tile.
        tokens: Of one step.
        elements: Of one load, so that `elements / tokens / D` heads are one. A thread should have 8
            side by side, 16 bytes.
        num_warps: Of one program.
    """

    slots: int
    tokens: int
    elements: int
    num_warps: int


# The fastest on an H200, by norm: for rows alone, and with tiles, of which each has 16 slots.
_SETTINGS = {
    "rms_all_heads": (LaunchSettings(2, 2, 2048, 4), LaunchSettings(16, 1, 1024, 4)),
    "rms": (LaunchSettings(2, 2, 1024, 4), LaunchSettings(16, 2, 2048, 4)),
    "layer": (LaunchSettings(2, 2, 1024, 4), LaunchSettings(16, 2, 1024, 4)),
    None: (LaunchSettings(2, 2, 1024, 4), LaunchSettings(16, 2, 2048, 4)),
}
_TILES_ALONE = LaunchSettings(16, 1, 1024, 4)

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_HEAD_DIMS = (16, 32, 64, 128, 256)


@triton.jit
def _prepare(
    x, x2, weight, weight2, bias, bias2, out, tiles, source, slots, lengths, cos, sin, eps, i_tile,
    stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh, stride_on, stride_lengths,
    P, T, ROWS, N, FIRST_ROW, ROTATED, NORM: tl.constexpr, STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, LOADS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`SLOTS` slots of one of q, k, v, all heads."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    i_b = tl.program_id(1).to(tl.int64)
    x += i_b * stride_b
    if out is not None:
        out += i_b * stride_ob
    if x2 is not None:
        x2 += i_b * stride_b2
    i_length, sums = None, ()
    if tiles is not None:
        i_length = tl.load(lengths + i_b * stride_lengths + i_tile)
        for _ in tl.static_range(2 * LOADS):
            sums += (tl.zeros([1, HEADS, D // 2], tl.float32),)
    if slots is not None:
        slots += i_b * H * N
    for i_n in range(0, SLOTS, TOKENS):
        # [TOKENS, 1]
        o_slot = (i_n + tl.arange(0, TOKENS))[:, None]
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
        loaded, placed = (), ()
        for i_load in tl.static_range(LOADS):
            loaded += (load_heads(
                p_row, p_row2, i_load * HEADS, H, m_real, m_second, D, D, HEADS, INTERLEAVED
            ),)  # fmt: skip
            if slots is not None:
                # [TOKENS, HEADS]; padding stays where it is.
                o_h = (i_load * HEADS + tl.arange(0, HEADS))[None, :]
                placed += (
                    tl.load(slots + o_h * N + o_row, mask=m_real & (o_h < H), other=o_p),
                )
            else:
                placed += (o_p,)
        b_cos, b_sin, b_scale, w_first, w_second = None, None, None, None, None
        bias_first, bias_second = None, None
        if cos is not None:
            o_angle = o_row - FIRST_ROW
            m_turn = (o_angle >= 0) & (o_angle < ROTATED)
            # [TOKENS, HEADS, D / 2]. Both entries are used, or vectors would be loaded in pieces.
            b_cos, b_same = load_shared(
                cos + o_angle * D, None, m_turn, None, 1.0, D, HEADS, INTERLEAVED
            )
            b_cos = tl.maximum(b_cos, b_same)
            b_same, b_sin = load_shared(
                sin + o_angle * D, None, m_turn, None, 0.0, D, HEADS, INTERLEAVED
            )
            b_sin = tl.maximum(b_same, b_sin)
        # [1 or TOKENS, 1]
        m_w = tl.full([1 if x2 is None else TOKENS, 1], True, tl.int1)
        if NORM == "rms_all_heads":
            b_square = tl.zeros([TOKENS, HEADS, D // 2], tl.float32)
            for i_load in tl.static_range(LOADS):
                b_first, b_second = loaded[i_load]
                b_first, b_second = b_first.to(tl.float32), b_second.to(tl.float32)
                b_square += b_first * b_first + b_second * b_second
            # [TOKENS, 1, 1]
            b_square = tl.sum(tl.sum(b_square, 2, keep_dims=True), 1, keep_dims=True)
            b_scale = tl.rsqrt(b_square / (H * D) + eps)
        elif weight is not None:
            # [1 or TOKENS, HEADS, D / 2]
            w_first, w_second = load_shared(
                weight, weight2, m_w, m_second, 0.0, D, HEADS, INTERLEAVED
            )
        if bias is not None:
            bias_first, bias_second = load_shared(
                bias, bias2, m_w, m_second, 0.0, D, HEADS, INTERLEAVED
            )
        old, sums = sums, ()
        for i_load in tl.static_range(LOADS):
            i_h = i_load * HEADS
            if NORM == "rms_all_heads" and weight is not None:
                w_first, w_second = load_heads(
                    weight, weight2, i_h, H, m_w, m_second, D, D, HEADS, INTERLEAVED
                )
            b_first, b_second = loaded[i_load]
            b_first, b_second = norm_and_rotate(
                b_first, b_second, b_scale, w_first, w_second, bias_first, bias_second, b_cos,
                b_sin, m_real, eps, NORM, STEP, D, DTYPE, PACKED,
            )  # fmt: skip
            if tiles is not None:
                # Else stores do it.
                b_first, b_second = round_pairs(b_first, b_second, DTYPE, PACKED)
            if out is not None:
                o_out = placed[i_load]
                if slots is not None:
                    o_out = each_value(o_out, D if INTERLEAVED else D // 2)
                p_out = out + o_out * stride_on
                store_heads(p_out, stride_oh, b_first, b_second, i_h, H, m_p, D, HEADS, INTERLEAVED)
            if tiles is not None:
                m_pool = (o_slot < i_length)[:, :, None]
                b_first, b_second = tl.where(m_pool, b_first, 0.0), tl.where(m_pool, b_second, 0.0)
                sums += (
                    old[2 * i_load] + tl.sum(b_first, 0, keep_dims=True),
                    old[2 * i_load + 1] + tl.sum(b_second, 0, keep_dims=True),
                )
    if tiles is not None:
        tiles += (i_b * H * T + i_tile) * D
        i_count = tl.maximum(i_length, 1).to(tl.float32)
        m_tile = tl.full([1, 1], True, tl.int1)
        for i_load in tl.static_range(LOADS):
            store_heads(
                tiles, T.to(tl.int64) * D, sums[2 * i_load] / i_count,
                sums[2 * i_load + 1] / i_count, i_load * HEADS, H, m_tile, D, HEADS, INTERLEAVED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["P", "T", "ROWS", "N", "FIRST_ROW", "ROTATED", "stride_lengths"])
def prologue_kernel(
    q, k, v, q2, k2, v2, q_weight, k_weight, q_weight2, k_weight2, q_bias, k_bias, q_bias2, k_bias2,
    q_out, k_out, v_out, q_tiles, k_tiles, source, slots, lengths, cos, sin, eps,
    stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh, stride_on, stride_lengths,
    P, T, ROWS, N, FIRST_ROW, ROTATED, NORM: tl.constexpr, STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, LOADS: tl.constexpr, PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """q, k, v of the same slots are neighbours, so that their rotary tables come from L2."""
    i_tile, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    if i_part == 0:
        _prepare(
            q, q2, q_weight, q_weight2, q_bias, q_bias2, q_out, q_tiles, source, slots, lengths,
            cos, sin, eps, i_tile, stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh,
            stride_on, stride_lengths, P, T, ROWS, N, FIRST_ROW, ROTATED, NORM, STEP,
            INTERLEAVED, H, D, SLOTS, TOKENS, HEADS, LOADS, PACKED,
        )  # fmt: skip
    elif i_part == 1:
        _prepare(
            k, k2, k_weight, k_weight2, k_bias, k_bias2, k_out, k_tiles, source, slots, lengths,
            cos, sin, eps, i_tile, stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh,
            stride_on, stride_lengths, P, T, ROWS, N, FIRST_ROW, ROTATED, NORM, STEP,
            INTERLEAVED, H, D, SLOTS, TOKENS, HEADS, LOADS, PACKED,
        )  # fmt: skip
    else:
        if v_out is not None:  # without it there is no such part, yet it would be compiled
            _prepare(
                v, v2, None, None, None, None, v_out, None, source, slots, None, None, None, eps,
                i_tile, stride_b, stride_n, stride_b2, stride_n2, stride_ob, stride_oh, stride_on,
                stride_lengths, P, T, ROWS, N, FIRST_ROW, ROTATED, None, STEP, True, H, D, SLOTS,
                TOKENS, HEADS, LOADS, PACKED,
            )  # fmt: skip


def settings_for(norm: str | None, rows: bool, tiles: bool) -> LaunchSettings:
    """How to launch for this kind of norm, what is asked for being rows, tiles or both."""
    return _SETTINGS[norm][tiles] if rows else _TILES_ALONE


def launch_shape(
    heads: int, head_dim: int, tile: int | None, settings: LaunchSettings
) -> tuple[int, int, int, int]:
    """Slots of a program, tokens of a step, heads of a load and loads of a step."""
    slots = tile or settings.slots
    tokens = min(slots, settings.tokens)
    all_heads = 1 << (heads - 1).bit_length()
    group = min(all_heads, max(1, settings.elements // (tokens * head_dim)))
    return slots, tokens, group, -(-heads // group)


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
    settings: LaunchSettings | None = None,
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
    kind = None if norm is None else norm.kind
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

    tile = count // num_tiles if num_tiles else None
    settings = settings or settings_for(kind, bool(out), tile is not None)
    size, tokens, group, loads = launch_shape(heads, head_dim, tile, settings)
    with torch.cuda.device_of(first.q):
        prologue_kernel[-(-count // size) * parts, batch](
            *x, *x2, *_parameters(first, second, "weight"), *_parameters(first, second, "bias"),
            *out, *[None] * (3 - len(out)), *tiles,
            source.contiguous() if source is not None else None,
            slots.contiguous() if slots is not None else None,
            lengths, cos, sin, 0.0 if norm is None else norm.eps, *x[0].stride()[:2],
            *(x2[0].stride()[:2] if second else (0, 0)),
            *(out[0].stride()[:3] if out else (0, 0, 0)),
            num_tiles if num_tiles and lengths.shape[0] > 1 else 0,
            count, num_tiles, rows, None if slots is None else slots.shape[2],
            first_row, rotated, NORM=kind, STEP=step,
            INTERLEAVED=rotary is None or rotary.interleaved, H=heads, D=head_dim,
            SLOTS=size, TOKENS=tokens, HEADS=group, LOADS=loads, PARTS=parts,
            # The interpreter runs no PTX; GPUs that lack this instruction `fast` keeps away.
            PACKED=first.q.is_cuda and pairs_pay(kind),
            num_warps=settings.num_warps,
            enable_fp_fusion=False,  # stock code rounds every product
        )  # fmt: skip
    return tiles


def pairs_pay(norm: str | None) -> bool:
    """Whether rounding in pairs is faster: by up to 14 % on an H200.

    With "rms" LLVM multiplies by the weights in bfloat16, two at once, where nothing stands between
    (else 3 % slower).
    """
    return norm != "rms"


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
