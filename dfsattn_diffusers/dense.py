"""Attention over all keys: by the user's backend, or in 8 bits by this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from .configs import DFSAttnConfig
from .kernels import BlockMap, block_sparse_attention


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: DFSAttnConfig,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    longest: int | None = None,
    **dispatch: Any,
) -> Tensor:
    """Softmax attention of every query over every key.

    Args:
        q, k, v: `[B, N, H, D]`, rows with padding at their end.
        config: Whether the kernels do it, and how.
        mask: `[B, 1, 1 or N, N]` as the user's backend takes it; None for none.
        lengths: `[B]` int32 tokens that are no padding, on q's device, where the mask says no more
            than they do; None for all, or where the mask says more.
        longest: Of the lengths, on the host. What is behind it is cut off, and with it the mask if
            all rows are as long, since masks cost speed.
        **dispatch: How diffusers calls the user's backend.

    Returns:
        `[B, N, H, D]`, 0 behind `longest`.
    """
    tokens = q.shape[1]
    q, k, v = (x[:, :longest] for x in (q, k, v))
    if config.dense_precision == "full" or (mask is not None and lengths is None):
        if longest is not None and mask is not None:
            mask = mask[..., :longest]
        out = dispatch_attention_fn(q, k, v, attn_mask=mask, **dispatch)
    else:
        out = _by_kernel(q, k, v, config, lengths if mask is not None else None)
    missing = tokens - out.shape[1]
    return F.pad(out, (0, 0, 0, 0, 0, missing)) if missing else out


def kernel_of(config: DFSAttnConfig) -> str:
    """The backend for dense attention: the config's, or "auto" where that is of other precision."""
    return config.backend if config.precision == config.dense_precision else "auto"


def _by_kernel(q, k, v, config: DFSAttnConfig, lengths: Tensor | None) -> Tensor:
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
        out=out.transpose(1, 2), precision=config.dense_precision, backend=kernel_of(config),
    )
    return out


def check_kernels(query: Tensor, config: DFSAttnConfig) -> None:
    """Let the kernels that a run will need do one token, `[1, 1, H, D]`, rather than fail late."""
    blocks = dict(query_block=config.query_block, key_block=config.key_block)
    token = query.transpose(1, 2)
    one = BlockMap.full(1, token.shape[1], 1, 1, **blocks, device=query.device)
    block_sparse_attention(
        token, token, token, one, precision=config.precision, backend=config.backend
    )
    if config.dense_precision != "full":
        try:
            _by_kernel(query, query, query, config, None)
        except ValueError as error:
            raise ValueError(f"dense_precision={config.dense_precision!r}: {error}") from None
