"""From projections to attention in one pass: QK norm, rotary embedding, order, pooled tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .fast import fast

NORM_KINDS = ("rms", "rms_all_heads", "layer")


@dataclass(frozen=True)
class Norm:
    """QK norm of one stream's queries or keys. Statistics are float32.

    Attributes:
        kind: "rms" and "layer" normalise each head, "rms_all_heads" all heads of a token together.
            "rms" rounds to x's dtype before the weight and after it, as diffusers' `RMSNorm` does;
            the others round once, as torch's norms do.
        weight, bias: `[D]`, or `[H * D]` over all heads, in x's dtype; None for 1 and 0. A bias
            needs kind "layer" and a weight.
        eps: Added to the variance.
    """

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of consecutive rows, `first_row` to `first_row + R`.

    Attributes:
        cos, sin: `R * D` values as the host passes them, `[R, D]` or `[1, R, 1, D]`. The two
            entries of a pair must be equal, which is not checked: either may be read.
        first_row: Counted over all streams.
        interleaved: Pairs are neighbours, else the halves of a head.
        float32_steps: Products and sums are float32, as in `apply_rotary_emb` of diffusers; else of
            the promoted dtype of x and the table, as in its Wan processor. Differs for half tables.
    """

    cos: Tensor
    sin: Tensor
    first_row: int = 0
    interleaved: bool = True
    float32_steps: bool = True


@dataclass(frozen=True)
class Stream:
    """Projections of one token sequence, `[B, N, H, D]` each; parts of a fused projection serve."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Prepared:
    """What attention and block scores read.

    Attributes:
        q, k, v: `[B, H, P, D]`, contiguous, or with `heads_first=False` `[B, P, H, D]`.
        q_tiles, k_tiles: `[B, H, T, D]` float32 means over each tile's real tokens of the rounded q
            and k, 0 for a tile without any; None unless asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_tiles: Tensor | None = None
    k_tiles: Tensor | None = None


def prepare_qkv(
    streams: Sequence[Stream],
    rotary: Rotary | None = None,
    source: Tensor | None = None,
    *,
    heads_first: bool = True,
    tile_lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> Prepared:
    """Norm, rotate and order queries, keys and values, with the roundings of the stock processors.

    Args:
        streams: One or two, such as video and text; their rows count on from one to the next.
        rotary: Rows to rotate after the norm; None for none.
        source: `[P]` int32, the row of each slot; -1 for padding, which becomes 0. None keeps the
            model's order, `P = N`.
        heads_first: Layout of the outputs. Without it, v of a single stream in the model's order is
            the input itself.
        tile_lengths: `[B or 1, T]` int32 real tokens at the front of each of `T` equal tiles; asks
            for pooled tiles.
        slots: `[B, H, N]` int32, the slot of each row in each batch row and head; None for source's
            own. `source` then says only in which order rows are read, each once, and which slots
            are padding, in every head. Not checked: each `slots[b, h]` and the padding slots are
            together 0 to `P - 1`, each once. Needs heads_first, and tiles are pooled apart.

    Returns:
        New tensors of the streams' dtype and device, but for v as above.

    Raises:
        ValueError: Arguments do not fit each other.

    Source: diffusers 0.42 (WanAttnProcessor, HunyuanVideoAttnProcessor2_0,
    CogVideoXAttnProcessor2_0); `reference` is the specification.
    """
    _check(streams, rotary, source, tile_lengths)
    if slots is not None:
        _check_slots(slots, streams, source, heads_first, tile_lengths)
    if kernels := _kernels_for(streams, rotary, source, tile_lengths):
        return kernels.prepare_qkv(streams, rotary, source, heads_first, tile_lengths, slots)
    return reference(
        streams, rotary, source, heads_first=heads_first, tile_lengths=tile_lengths, slots=slots
    )


def pool_qk(
    streams: Sequence[Stream],
    rotary: Rotary | None,
    source: Tensor | None,
    tile_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """The tiles of `prepare_qkv` alone: to score an order, nobody needs its q, k and v.

    Args:
        streams, rotary, source, tile_lengths: As of `prepare_qkv`.

    Returns:
        `q_tiles`, `k_tiles`, `[B, H, T, D]` float32.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    _check(streams, rotary, source, tile_lengths)
    if kernels := _kernels_for(streams, rotary, source, tile_lengths):
        return kernels.pool_qk(streams, rotary, source, tile_lengths)
    return pool_reference(streams, rotary, source, tile_lengths)


def norm_once(
    streams: Sequence[Stream], rotary: Rotary | None
) -> tuple[Sequence[Stream], Rotary | None]:
    """For several calls on the same streams: with norm and rotation done, where torch does them.

    A kernel does them for less than the memory that their results would take.
    """
    if _kernels_for(streams, rotary, None, None):
        return streams, rotary
    v = _join([stream.v for stream in streams])
    return [Stream(*_norm_and_rotate(streams, rotary), v)], None


def reference(
    streams: Sequence[Stream],
    rotary: Rotary | None = None,
    source: Tensor | None = None,
    *,
    heads_first: bool = True,
    tile_lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> Prepared:
    """`prepare_qkv` in torch, for any dtype and device."""
    q, k = _norm_and_rotate(streams, rotary)
    v = _join([stream.v for stream in streams])
    if slots is not None:
        return Prepared(*(_scatter(x, slots, source.numel()) for x in (q, k, v)))
    q, k, v = (_place(x, source, heads_first) for x in (q, k, v))
    if tile_lengths is None:
        return Prepared(q, k, v)
    tiles = (pool_tiles(x if heads_first else x.transpose(1, 2), tile_lengths) for x in (q, k))
    return Prepared(q, k, v, *tiles)


def pool_reference(
    streams: Sequence[Stream],
    rotary: Rotary | None,
    source: Tensor | None,
    tile_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """`pool_qk` in torch, for any dtype and device."""
    q, k = (_place(x, source, True) for x in _norm_and_rotate(streams, rotary))
    return pool_tiles(q, tile_lengths), pool_tiles(k, tile_lengths)


def apply_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """`norm` of `[B, N, H, D]`."""
    if norm is None:
        return x
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if norm.kind == "rms_all_heads":
        flat = x.flatten(2)
        return F.rms_norm(flat, flat.shape[-1:], norm.weight, norm.eps).view(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    x = wide.to(x.dtype)
    return x if norm.weight is None else x * norm.weight


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """`[B, N, H, D]` with the rows of `rotary` rotated."""
    head_dim = x.shape[-1]
    pairs = (-1, 2) if rotary.interleaved else (2, -1)
    member = -1 if rotary.interleaved else -2
    cos, sin = (table.reshape(-1, 1, head_dim) for table in (rotary.cos, rotary.sin))
    rows = slice(rotary.first_row, rotary.first_row + cos.shape[0])
    cos = cos.unflatten(-1, pairs).select(member, 0)
    sin = sin.unflatten(-1, pairs).select(member, 1)
    step = torch.float32 if rotary.float32_steps else x.dtype
    part = x[:, rows].to(torch.promote_types(x.dtype, step))
    first, second = part.unflatten(-1, pairs).unbind(member)
    out = x.clone()
    turned = out[:, rows].unflatten(-1, pairs)
    turned.select(member, 0).copy_(first * cos - second * sin)
    turned.select(member, 1).copy_(second * cos + first * sin)
    return out


def _kernels_for(streams, rotary, source, tile_lengths):
    """The Triton kernels where they serve this call, else None."""
    kernels = fast("prologue_kernels", streams[0].q)
    trained = torch.is_grad_enabled() and streams[0].q.requires_grad
    serve = kernels and not trained and kernels.can_prepare(streams, rotary, source, tile_lengths)
    return kernels if serve else None


def _norm_and_rotate(streams: Sequence[Stream], rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    q = _join([apply_norm(stream.q, stream.q_norm) for stream in streams])
    k = _join([apply_norm(stream.k, stream.k_norm) for stream in streams])
    return (q, k) if rotary is None else (rotate(q, rotary), rotate(k, rotary))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _place(x: Tensor, source: Tensor | None, heads_first: bool) -> Tensor:
    if source is None:
        return x.transpose(1, 2).contiguous() if heads_first else x
    x, rows = (x.transpose(1, 2), 2) if heads_first else (x, 1)
    padding = (source < 0).view(-1, *[1] * (x.ndim - 1 - rows))
    return x.index_select(rows, source.clamp(min=0)).masked_fill_(padding, 0)


def _scatter(x: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    x = x.transpose(1, 2)
    out = x.new_zeros((*x.shape[:2], num_slots, x.shape[3]))
    return out.scatter(2, slots.long()[..., None].expand_as(x), x)


def pool_tiles(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the real tokens of each tile.

    Args:
        x: `[B, H, P, D]`; what lies behind a tile's length is never used.
        lengths: `[B or 1, T]` int32, real tokens at the front of each of the `T` tiles.

    Returns:
        `[B, H, T, D]` float32; 0 for a tile without tokens.
    """
    tiles = x.unflatten(2, (lengths.shape[1], -1))
    real = torch.arange(tiles.shape[3], device=x.device) < lengths[..., None]
    total = tiles.masked_fill(~real[:, None, :, :, None], 0).sum(3, dtype=torch.float32)
    return total / lengths.clamp(min=1)[:, None, :, None]


def _check(streams, rotary, source, tile_lengths) -> None:
    if len(streams) not in (1, 2):
        raise ValueError(f"streams must be one or two, got {len(streams)}")
    like = streams[0].q
    for stream in streams:
        _check_stream(stream, like)
    batch, rows = like.shape[0], sum(stream.q.shape[1] for stream in streams)
    if rotary is not None:
        _check_rotary(rotary, rows, like)
    num_slots = rows
    if source is not None:
        if source.dtype != torch.int32 or source.ndim != 1 or source.device != like.device:
            raise ValueError(
                f"source must be int32 [P] on {like.device}, got {source.dtype} "
                f"{list(source.shape)} on {source.device}"
            )
        num_slots = source.numel()
    if tile_lengths is not None:
        shape = list(tile_lengths.shape)
        fits = len(shape) == 2 and shape[0] in (1, batch) and shape[1] and num_slots % shape[1] == 0
        if not fits or tile_lengths.dtype != torch.int32 or tile_lengths.device != like.device:
            raise ValueError(
                f"tile_lengths must be int32 [{batch} or 1, T] on {like.device}, T a divisor of "
                f"the {num_slots} slots, got {tile_lengths.dtype} {shape} on {tile_lengths.device}"
            )


def _check_slots(slots, streams, source, heads_first, tile_lengths) -> None:
    like, rows = streams[0].q, sum(stream.q.shape[1] for stream in streams)
    if source is None or source.numel() < rows:
        raise ValueError(
            f"slots needs a source of at least {rows} slots, got "
            f"{source if source is None else list(source.shape)}; name every row once, in the "
            "order to read them, and -1 for padding"
        )
    if not heads_first:
        raise ValueError(
            "slots needs heads_first=True, got False; leave out slots for rows with all heads "
            "side by side"
        )
    if tile_lengths is not None:
        raise ValueError(
            f"slots needs tile_lengths None, got {list(tile_lengths.shape)}; pool one order for "
            "all heads with pool_qk, or the returned q and k with pool_tiles"
        )
    wanted = [like.shape[0], like.shape[2], rows]
    if slots.dtype != torch.int32 or list(slots.shape) != wanted or slots.device != like.device:
        raise ValueError(
            f"slots must be int32 {wanted} on {like.device}, got {slots.dtype} "
            f"{list(slots.shape)} on {slots.device}; give every batch row and head its own"
        )


def _check_stream(stream: Stream, like: Tensor) -> None:
    shape, dtype, device = stream.q.shape, like.dtype, like.device
    if len(shape) != 4 or 0 in shape or not stream.q.is_floating_point() or shape[3] % 2:
        raise ValueError(
            "q must be a floating [B, N, H, D] tensor, D even, nothing empty, got "
            f"{stream.q.dtype} {list(shape)}"
        )
    batch, _, heads, head_dim = like.shape
    wanted = (batch, shape[1], heads, head_dim)
    for name, x in (("q", stream.q), ("k", stream.k), ("v", stream.v)):
        if x.shape != wanted or x.dtype != dtype or x.device != device:
            raise ValueError(
                f"{name} must be {dtype} {list(wanted)} on {device} like the other "
                f"projections, got {x.dtype} {list(x.shape)} on {x.device}"
            )
    for norm in filter(None, (stream.q_norm, stream.k_norm)):
        if norm.kind not in NORM_KINDS:
            raise ValueError(f"kind must be one of {', '.join(NORM_KINDS)}, got {norm.kind!r}")
        if norm.bias is not None and (norm.kind != "layer" or norm.weight is None):
            raise ValueError(f"bias needs kind 'layer' and a weight, got kind {norm.kind!r}")
        size = head_dim * heads if norm.kind == "rms_all_heads" else head_dim
        for name, x in (("weight", norm.weight), ("bias", norm.bias)):
            if x is None:
                continue
            if x.numel() != size or x.dtype != dtype or x.device != device:
                raise ValueError(
                    f"{name} of a {norm.kind!r} norm must be {dtype} [{size}] on {device}, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )


def _check_rotary(rotary: Rotary, rows: int, like: Tensor) -> None:
    head_dim, room = like.shape[3], rows - rotary.first_row
    for name, x in (("cos", rotary.cos), ("sin", rotary.sin)):
        count = x.numel() // head_dim
        like_cos = (x.shape, x.dtype) == (rotary.cos.shape, rotary.cos.dtype)
        fits = like_cos and x.shape[-1:] == (head_dim,)
        if not fits or rotary.first_row < 0 or count > room or x.device != like.device:
            raise ValueError(
                f"{name} must be [R, {head_dim}] on {like.device} like cos, R at most {room} rows "
                f"from first_row {rotary.first_row} on, got {x.dtype} {list(x.shape)} on {x.device}"
            )
