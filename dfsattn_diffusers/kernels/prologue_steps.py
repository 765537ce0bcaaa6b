"""What a program of the prologue does to the heads of one step.

Whatever is loaded is flat, tables as wide as heads, so that all that meets has one layout in
registers; else every product would go through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(p_x, p_x2, o_x, m_x, m_second, other):
    """From one of two streams; not every triton loads vectors through a choice of pointers."""
    if p_x2 is None:
        b_x = tl.load(p_x + o_x, mask=m_x, other=other)
    else:
        b_x = tl.load(p_x + o_x, mask=m_x & ~m_second, other=other)
        b_x = tl.load(p_x2 + o_x, mask=m_x & m_second, other=b_x)
    return b_x


@triton.jit
def _heads(HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Which head and which of its `SIZE` values, `[1, HEADS * SIZE]` each."""
    o_x = tl.arange(0, HEADS * SIZE)[None, :]
    return o_x // SIZE, o_x % SIZE


@triton.jit
def _split(b_x, HEADS: tl.constexpr, D: tl.constexpr):
    return tl.split(tl.reshape(b_x, (b_x.shape[0], HEADS, D // 2, 2)))


@triton.jit
def load_heads(
    p_x, p_x2, i_h, H, m_x, m_second, stride_h, D: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Both members of every rotary pair of `HEADS` heads, as stored, `[.., HEADS, D / 2]` each."""
    if INTERLEAVED:
        o_h, o_d = _heads(HEADS, D)
        o_x = (i_h + o_h) * stride_h + o_d
        b_first, b_second = _split(
            _load(p_x, p_x2, o_x, m_x & (i_h + o_h < H), m_second, 0.0), HEADS, D
        )
    else:
        o_h, o_d = _heads(HEADS, D // 2)
        o_x, m_x = (i_h + o_h) * stride_h + o_d, m_x & (i_h + o_h < H)
        shape: tl.constexpr = (m_x.shape[0], HEADS, D // 2)
        b_first = tl.reshape(_load(p_x, p_x2, o_x, m_x, m_second, 0.0), shape)
        b_second = tl.reshape(_load(p_x, p_x2, o_x + D // 2, m_x, m_second, 0.0), shape)
    return b_first, b_second


@triton.jit
def load_shared(
    p_x, p_x2, m_x, m_second, other, D: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The same, as float32, where all heads have the same."""
    if INTERLEAVED:
        _, o_d = _heads(HEADS, D)
        b_first, b_second = _split(_load(p_x, p_x2, o_d, m_x, m_second, other), HEADS, D)
    else:
        _, o_d = _heads(HEADS, D // 2)
        shape: tl.constexpr = (m_x.shape[0], HEADS, D // 2)
        b_first = tl.reshape(_load(p_x, p_x2, o_d, m_x, m_second, other), shape)
        b_second = tl.reshape(_load(p_x, p_x2, o_d + D // 2, m_x, m_second, other), shape)
    return b_first.to(tl.float32), b_second.to(tl.float32)


@triton.jit
def store_heads(
    p_x, stride_h, b_first, b_second, i_h, H, m_x, D: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What `load_heads` loads."""
    kind: tl.constexpr = p_x.dtype.element_ty
    rows: tl.constexpr = b_first.shape[0]
    if INTERLEAVED:
        o_h, o_d = _heads(HEADS, D)
        b_x = tl.reshape(tl.join(b_first.to(kind), b_second.to(kind)), (rows, HEADS * D))
        p_x += (i_h + o_h).to(tl.int64) * stride_h + o_d
        tl.store(p_x, b_x, mask=m_x & (i_h + o_h < H))
    else:
        o_h, o_d = _heads(HEADS, D // 2)
        p_x += (i_h + o_h).to(tl.int64) * stride_h + o_d
        m_x = m_x & (i_h + o_h < H)
        tl.store(p_x, tl.reshape(b_first.to(kind), (rows, HEADS * D // 2)), mask=m_x)
        tl.store(p_x + D // 2, tl.reshape(b_second.to(kind), (rows, HEADS * D // 2)), mask=m_x)


@triton.jit
def round_pairs(b_first, b_second, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """Both to `DTYPE` and back to float32."""
    if PACKED and tl.bfloat16 == DTYPE:
        # One conversion for two numbers: those for one run at a quarter of the rate, each.
        b_first, b_second = tl.inline_asm_elementwise(
            "{ .reg .b32 p; cvt.rn.bf16x2.f32 p, $3, $2;"
            " shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000; }",
            "=r,=r,r,r", [b_first, b_second], (tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        return b_first, b_second
    return b_first.to(DTYPE).to(tl.float32), b_second.to(DTYPE).to(tl.float32)


@triton.jit
def each_value(o_out, SIZE: tl.constexpr):
    """`[TOKENS, HEADS]` slots for `SIZE` values of each head, flat."""
    tokens: tl.constexpr = o_out.shape[0]
    heads: tl.constexpr = o_out.shape[1]
    o_out = tl.broadcast_to(o_out[:, :, None], (tokens, heads, SIZE))
    o_out = tl.reshape(o_out, (tokens, heads * SIZE)).to(tl.int64)
    return tl.max_constancy(o_out, [1, SIZE])


@triton.jit
def norm_and_rotate(
    b_first, b_second, b_scale, w_first, w_second, bias_first, bias_second, b_cos, b_sin, m_real,
    eps, NORM: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Of heads as loaded, in float32; what is None is left out. Who stores it rounds it."""
    # [TOKENS, HEADS, D / 2]
    b_first, b_second = b_first.to(tl.float32), b_second.to(tl.float32)
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
            b_first, b_second = round_pairs(b_first, b_second, DTYPE, PACKED)
        if w_first is not None:
            b_first *= w_first.to(tl.float32)
            b_second *= w_second.to(tl.float32)
        if bias_first is not None:
            # Padding stays 0.
            b_first = tl.where(m_real[:, :, None], b_first + bias_first, 0.0)
            b_second = tl.where(m_real[:, :, None], b_second + bias_second, 0.0)
    if b_cos is not None:
        if NORM is not None:
            b_first, b_second = round_pairs(b_first, b_second, DTYPE, PACKED)
        b_x, b_y = round_pairs(b_first * b_cos, b_second * b_sin, STEP, PACKED)
        b_second, b_first = round_pairs(b_second * b_cos, b_first * b_sin, STEP, PACKED)
        b_first, b_second = b_x - b_y, b_second + b_first
    return b_first, b_second
