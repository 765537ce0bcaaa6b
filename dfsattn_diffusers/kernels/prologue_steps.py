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
def _store_heads(
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
def _round(b_x, DTYPE: tl.constexpr):
    return b_x.to(DTYPE).to(tl.float32)


@triton.jit
def finish(
    b_first, b_second, b_scale, weight, weight2, w_first, w_second, bias_first, bias_second, b_cos,
    b_sin, out, tiles, slots, i_length, eps, i_h, i_n, o_p, o_row, o_slot, m_p, m_real, m_w,
    m_second, stride_oh, stride_on, H, T, N, NORM: tl.constexpr, STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Norm, rotate, store and pool what was loaded of `HEADS` heads from `i_h` on."""
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
            b_first, b_second = _round(b_first, DTYPE), _round(b_second, DTYPE)
        if weight is not None:
            if NORM == "rms_all_heads":
                w_first, w_second = load_heads(
                    weight, weight2, i_h, H, m_w, m_second, D, D, HEADS, INTERLEAVED
                )
            b_first *= w_first.to(tl.float32)
            b_second *= w_second.to(tl.float32)
        if bias_first is not None:
            # Padding stays 0.
            b_first = tl.where(m_real[:, :, None], b_first + bias_first, 0.0)
            b_second = tl.where(m_real[:, :, None], b_second + bias_second, 0.0)
        b_first, b_second = _round(b_first, DTYPE), _round(b_second, DTYPE)
    if b_cos is not None:
        b_turned = _round(b_first * b_cos, STEP) - _round(b_second * b_sin, STEP)
        b_second = _round(b_second * b_cos, STEP) + _round(b_first * b_sin, STEP)
        b_first, b_second = _round(b_turned, DTYPE), _round(b_second, DTYPE)
    if out is not None:
        o_out = o_p
        if slots is not None:
            # [TOKENS, HEADS]; padding stays where it is.
            o_h = (i_h + tl.arange(0, HEADS))[None, :]
            o_out = tl.load(slots + o_h * N + o_row, mask=m_real & (o_h < H), other=o_p)
            size: tl.constexpr = D if INTERLEAVED else D // 2
            o_out = tl.broadcast_to(o_out[:, :, None], (TOKENS, HEADS, size))
            o_out = tl.reshape(o_out, (TOKENS, HEADS * size)).to(tl.int64)
            o_out = tl.max_constancy(o_out, [1, size])
        p_out = out + o_out * stride_on
        _store_heads(p_out, stride_oh, b_first, b_second, i_h, H, m_p, D, HEADS, INTERLEAVED)
    if tiles is not None:
        # [1, HEADS, D / 2]
        m_pool = (o_slot < i_length)[:, :, None]
        b_first = tl.sum(tl.where(m_pool, b_first, 0.0), 0, keep_dims=True)
        b_second = tl.sum(tl.where(m_pool, b_second, 0.0), 0, keep_dims=True)
        i_count = tl.maximum(i_length, 1).to(tl.float32)
        stride_t = T.to(tl.int64) * D
        m_tile = tl.full([1, 1], True, tl.int1)
        if TOKENS < SLOTS:
            # The sum so far is in memory, as not all heads fit registers.
            b_old, b_old_second = load_heads(
                tiles, None, i_h, H, m_tile & (i_n > 0), None, stride_t, D, HEADS, INTERLEAVED
            )
            b_first, b_second = b_first + b_old, b_second + b_old_second
            i_count = tl.where(i_n + TOKENS < SLOTS, 1.0, i_count)
        _store_heads(
            tiles, stride_t, b_first / i_count, b_second / i_count, i_h, H, m_tile, D, HEADS,
            INTERLEAVED,
        )  # fmt: skip
