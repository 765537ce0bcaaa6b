"""Attention over all keys: by the user's backend, or in 8 bits by this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from .configs import DFSAttnConfig
from .kernels import BlockMap, block_sparse_attention
from .text import TextLengths


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: DFSAttnConfig,
    *,
    correction: bool = False,
    mask: Tensor | None = None,
    text: TextLengths | None = None,
    video_tokens: int = 0,
    **dispatch: Any,
) -> Tensor:
    """Softmax attention of every query over every key.

    Args:
        q, k, v: `[B, N, H, D]`.
        config: Whether the kernels do it, and how.
        correction: Whether a correction is measured by it.
        mask: `[B, 1, 1 or N, N]` as the user's backend takes it; None for none.
        text: Real tokens behind the video's, where the mask says no more than that; the padding
            behind the longest is cut off, and the mask if no other is left, since masks cost speed.
        video_tokens: Tokens ahead of the text.
        **dispatch: How diffusers calls the user's backend.

    Returns:
        `[B, N, H, D]`, 0 where padding was cut off.
    """
    tokens = q.shape[1]
    if text is not None:
        longest = video_tokens + text.longest
        q, k, v = (x[:, :longest] for x in (q, k, v))
        mask = None if text.shortest == text.longest else mask[..., :longest]
    precision = config.dense_precisions[correction]
    if precision == "full" or (mask is not None and text is None):
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, **dispatch)
    else:
        lengths = None if mask is None else video_tokens + text.rows.to(q.device)
        out = _by_kernel(q, k, v, config, precision, lengths)
    missing = tokens - out.shape[1]
    return F.pad(out, (0, 0, 0, 0, 0, missing)) if missing else out


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, config: DFSAttnConfig, precision: str,
    lengths: Tensor | None = None,
) -> Tensor:
    """By the config's kernel of this precision; `lengths`: `[B]` real tokens, None for all."""
    batch, tokens, heads, _ = q.shape
    query_block, key_block = config.query_block, config.key_block
    starts = torch.arange(0, tokens, key_block, dtype=torch.int32, device=q.device)
    block_map = BlockMap.full(
        batch, heads, -(-tokens // query_block), len(starts), query_block=query_block,
        key_block=key_block, device=q.device,
    )
    if lengths is not None:
        lengths = (lengths[:, None] - starts).clamp(0, key_block)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_sparse_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), block_map, key_lengths=lengths,
        out=out.transpose(1, 2), **config.kernel(precision),
    )
    return out


def check_kernels(token: Tensor, config: DFSAttnConfig) -> None:
    """Let the kernels that a run will need do one token, `[1, 1, H, D]`, rather than fail late."""
    _by_kernel(token, token, token, config, config.precision)
    dense, correction = config.dense_precisions
    for precision, name in {correction: "correction", dense: "dense"}.items():
        if precision not in ("full", config.precision):
            try:
                _by_kernel(token, token, token, config, precision)
            except ValueError as error:
                raise ValueError(f"{name}_precision={precision!r}: {error}") from None
