"""From a model's projections and norms to the streams that attention prepares by itself."""

from __future__ import annotations

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from ..kernels.prologue import Norm, Rotary, Stream


def stream_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm_q: torch.nn.Module | None,
    norm_k: torch.nn.Module | None,
    heads: int,
) -> Stream:
    """Projections `[B, N, H * D]` of one token sequence, with their QK norms.

    A norm that is no more than its weights is left to attention, which does it in the same pass as
    everything else; any other (hooked, offloaded, cast, replaced) runs here, as the host runs it.
    """
    query, q_norm = _norm(query, norm_q, heads)
    key, k_norm = _norm(key, norm_k, heads)
    return Stream(query, key, value.unflatten(2, (heads, -1)), q_norm, k_norm)


def rotary_of(
    tables: tuple[Tensor, Tensor] | None, like: Tensor, first_row: int = 0, **convention: bool
) -> Rotary | None:
    """The host's cos and sin, where the activations are."""
    if tables is None:
        return None
    cos, sin = (table.to(like.device) for table in tables)
    return Rotary(cos, sin, first_row, **convention)


def _norm(x: Tensor, module: torch.nn.Module | None, heads: int) -> tuple[Tensor, Norm | None]:
    """x as `[B, N, H, D]` and the norm that is still to be done."""
    split = x.unflatten(2, (heads, -1))
    if module is None:
        return split, None
    over_all_heads = isinstance(module, torch.nn.RMSNorm)
    norm = _plain(module, split)
    if norm is not None:
        return split, norm
    return (module(x).unflatten(2, (heads, -1)) if over_all_heads else module(split)), None


def _plain(module: torch.nn.Module, x: Tensor) -> Norm | None:
    kinds = {torch.nn.RMSNorm: "rms_all_heads", RMSNorm: "rms", torch.nn.LayerNorm: "layer"}
    kind = kinds.get(type(module))
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    if kind is None or hooked or module.eps is None:
        return None
    weight, bias = module.weight, getattr(module, "bias", None)
    if bias is not None and (kind != "layer" or weight is None):
        return None
    size = x.shape[2] * x.shape[3] if kind == "rms_all_heads" else x.shape[3]
    for values in (weight, bias):
        if values is None:
            continue
        if (values.numel(), values.dtype, values.device) != (size, x.dtype, x.device):
            return None
    return Norm(kind, weight, bias, module.eps)
