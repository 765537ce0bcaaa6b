"""The public function: checks its arguments once, chooses a backend, explains the choice."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backends import AttentionCall, list_backends, load_backend, precisions_of
from .block_map import BlockMap
from .tail import Tail, add_tail

__all__ = ["Explanation", "block_sparse_attention", "explain", "list_backends"]


@dataclass(frozen=True)
class Explanation:
    """What `backend="auto"` chooses for a call.

    Attributes:
        backend: The choice.
        rejected: Reason against each of the others, by name.
    """

    backend: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.backend} ({others})" if others else self.backend


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    full_key_blocks: int | None = None,
    tail: Tail | None = None,
    output_order: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    precision: str = "full",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of the blocks that its block keeps.

    `nQ = ceil(Nq / query_block)` and `nK = ceil(Nk / key_block)`; last blocks may be short. The
    last dimension of q, k, v and out must be contiguous, other strides are free.

    Args:
        q: `[B, H, Nq, D]`.
        k, v: `[B, H, Nk, D]`, of q's dtype and device.
        block_map: Kept key blocks, `[B, H, nQ]` rows over `nK` key blocks.
        scale: Of the logits, positive; `D ** -0.5` by default.
        key_lengths: `[B, nK]` int32, real keys at the front of each key block, 0 for an empty
            one; what lies behind them is never used, not even if it is NaN. None means that every
            block is full but for the end of the sequence.
        full_key_blocks: Key blocks before this index are full in every batch row, so that kernels
            need no check there. `Nk // key_block` by default, 0 with `key_lengths`.
        tail: Pools of the keys and values (`pool_tail`) that stand for the blocks a row does not
            keep; `add_tail` states the formula. None drops these blocks.
        output_order: `[Nq]` or, where heads differ, `[B, H, Nq]` int32, the row of `out` where each
            query's result goes; -1 drops it.
        out: `[B, H, M, D]` of q's dtype to write into; rows that no query maps to stay as they
            are. `M = Nq` without `output_order`.
        return_lse: Also return the log-sum-exp of each query's logits.
        backend: A name from `list_backends()`, which never falls back, or "auto".
        precision: Of the products: "full", that of the inputs; "fp8", e4m3 (`quantize`); or "int8",
            whole numbers for queries and keys. None ever falls back to another.

    Returns:
        `out`, and with `return_lse` also the natural log-sum-exp, `[B, H, Nq]` float32 in q's
        order. A query without any key gives 0 and -inf.

    Raises:
        RuntimeError: A gradient would be needed; there is no backward pass.
        ValueError: Arguments do not fit each other, or the named backend cannot do the call.

    Source: DFSAttn, Hu et al., arXiv 2605.23445; `backends/reference.py` is the specification.
    """
    call = _checked_call(
        q, k, v, block_map, scale, key_lengths, full_key_blocks, tail, output_order, out,
        return_lse, precision,
    )
    if backend == "auto":
        backend = _choose(call).backend
    if backend not in list_backends():
        known = ", ".join(["auto", *list_backends()])
        raise ValueError(f"backend must be one of {known}, got {backend!r}")
    module = load_backend(backend)
    reason = _why_not(module, call)
    if reason is not None:
        raise ValueError(
            f"backend {backend!r} cannot do this call: {reason}; or pass backend='auto'"
        )
    left = tail is not None and not getattr(module, "takes_tail", lambda call: False)(call)
    if left and call.lse is None:
        # Whoever adds the tail must know the weight of what is kept.
        call = replace(call, lse=_empty_lse(q))
    module.forward(call)
    if left:
        add_tail(call)
    return (call.out, call.lse) if return_lse else call.out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    full_key_blocks: int | None = None,
    tail: Tail | None = None,
    output_order: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    precision: str = "full",
) -> Explanation:
    """What `backend="auto"` would choose for this call, and why not the others.

    Takes the arguments of `block_sparse_attention` and computes nothing.
    """
    return _choose(
        _checked_call(
            q, k, v, block_map, scale, key_lengths, full_key_blocks, tail, output_order, out,
            return_lse, precision,
        )
    )


def _why_not(module, call: AttentionCall) -> str | None:
    reason = module.why_not(call)
    offered = precisions_of(module)
    if reason is None and call.precision not in offered:
        names = " or ".join(map(repr, offered))
        reason = f"its precision is {names}, not {call.precision!r}"
    return reason


def _choose(call: AttentionCall) -> Explanation:
    ranks, rejected = {}, {}
    for module in map(load_backend, list_backends()):
        reason = _why_not(module, call)
        if reason is None and (rank := module.rank(call)) is None:
            reason = f"auto does not use it on {call.q.device.type}"
        if reason is None:
            ranks[module.NAME] = rank
        else:
            rejected[module.NAME] = reason
    if not ranks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise ValueError(f"precision must be 'full' here, got {call.precision!r}; {reasons}")
    best = max(ranks, key=ranks.get)
    rejected |= {name: f"slower than {best}" for name in ranks if name != best}
    return Explanation(best, rejected)


def _checked_call(
    q, k, v, block_map, scale, key_lengths, full_key_blocks, tail, output_order, out, return_lse,
    precision,
) -> AttentionCall:
    _check_tensors(q, k, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(
            "q, k and v must not require gradients, got one that does: there is no backward pass; "
            "call it under torch.no_grad()"
        )
    _check_map(q, k, block_map)
    if tail is not None:
        _check_tail(q, tail, block_map)
    batch, _, num_queries, head_dim = q.shape
    num_blocks, key_block = block_map.num_key_blocks, block_map.key_block

    scale = head_dim**-0.5 if scale is None else float(scale)
    if not (0 < scale < math.inf):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if key_lengths is not None:
        _check_int32("key_lengths", key_lengths, q.device, [batch, num_blocks])
    whole = k.shape[2] // key_block
    if full_key_blocks is None:
        full_key_blocks = whole if key_lengths is None else 0
    if not isinstance(full_key_blocks, int) or not 0 <= full_key_blocks <= whole:
        raise ValueError(
            f"full_key_blocks must be an int from 0 to {whole}, the whole blocks of {k.shape[2]} "
            f"keys, got {full_key_blocks!r}"
        )
    if output_order is not None:
        _check_int32("output_order", output_order, q.device, [num_queries], [*q.shape[:3]])
        if out is None:
            raise ValueError("output_order needs out, the tensor that it points into, got None")
    out = _check_out(q, out, ordered=output_order is not None)
    lse = _empty_lse(q) if return_lse else None
    return AttentionCall(
        q, k, v, block_map, scale, key_lengths, full_key_blocks, output_order, out, lse, tail,
        precision,
    )


def _empty_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating [B, H, N, D] tensor with no empty dimension, got "
                f"{x.dtype} {list(x.shape)}"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name}'s last dimension must be contiguous, got strides {x.stride()}; "
                f"call {name}.contiguous()"
            )
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(
                f"{name} must have q's dtype and device, {q.dtype} on {q.device}, got {x.dtype} on "
                f"{x.device}; call {name}.to(q)"
            )
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "k and v must share their shape, and B, H, D with q, got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )


def _check_map(q: Tensor, k: Tensor, block_map: BlockMap) -> None:
    if not isinstance(block_map, BlockMap):
        raise ValueError(
            f"block_map must be a BlockMap, got {type(block_map).__name__}; build one with "
            "BlockMap.from_mask"
        )
    rows = [*q.shape[:2], -(-q.shape[2] // block_map.query_block)]
    if list(block_map.counts.shape) != rows:
        raise ValueError(
            f"block_map must have rows [B, H, nQ] = {rows} for {q.shape[2]} queries in blocks of "
            f"{block_map.query_block}, got {list(block_map.counts.shape)}"
        )
    num_blocks = -(-k.shape[2] // block_map.key_block)
    if block_map.num_key_blocks != num_blocks:
        raise ValueError(
            f"block_map must have {num_blocks} key blocks for {k.shape[2]} keys in blocks of "
            f"{block_map.key_block}, got {block_map.num_key_blocks}"
        )
    if block_map.counts.device != q.device:
        raise ValueError(
            f"block_map must be on q's device, {q.device}, got {block_map.counts.device}"
        )


def _check_int32(name: str, x: Tensor, device: torch.device, *shapes: list[int]) -> None:
    if x.dtype != torch.int32 or list(x.shape) not in shapes or x.device != device:
        raise ValueError(
            f"{name} must be int32 {' or '.join(map(str, shapes))} on {device}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )


def _check_tail(q: Tensor, tail: Tail, block_map: BlockMap) -> None:
    if not isinstance(tail, Tail):
        raise ValueError(f"tail must be a Tail, got {type(tail).__name__}; make one by pool_tail")
    batch, heads, _, head_dim = q.shape
    pools, blocks = tail.keys.shape[2], block_map.num_key_blocks
    if pools % blocks or block_map.key_block % max(1, pools // blocks):
        raise ValueError(
            f"tail must have as many pools for each of the {blocks} key blocks, of a size that "
            f"divides {block_map.key_block}, got {pools} in all"
        )
    wanted = dict.fromkeys(("keys", "values"), ([batch, heads, pools, head_dim], q.dtype))
    wanted["bias"] = [batch, heads, pools], torch.float32
    for name, (shape, dtype) in wanted.items():
        x = getattr(tail, name)
        if (list(x.shape), x.dtype, x.device) != (shape, dtype, q.device):
            raise ValueError(
                f"tail.{name} must be {dtype} {shape} on {q.device}, got {x.dtype} {list(x.shape)} "
                f"on {x.device}; make it by pool_tail"
            )


def _check_out(q: Tensor, out: Tensor | None, *, ordered: bool) -> Tensor:
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, heads, num_queries, head_dim = q.shape
    fits = out.ndim == 4 and (*out.shape[:2], out.shape[3]) == (batch, heads, head_dim)
    if not fits or not (ordered or out.shape[2] == num_queries):
        rows = "M" if ordered else num_queries
        raise ValueError(
            f"out must be [{batch}, {heads}, {rows}, {head_dim}], got {list(out.shape)}"
        )
    if (out.dtype, out.device) != (q.dtype, q.device) or out.stride(-1) != 1:
        raise ValueError(
            f"out must be {q.dtype} on {q.device} with its last dimension contiguous, got "
            f"{out.dtype} on {out.device} with strides {out.stride()}"
        )
    return out
