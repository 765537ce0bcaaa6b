"""QK norm and rotary embedding where text and video share a sequence."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


def norm_and_rotate(
    x: Tensor, norm: torch.nn.Module | None, rotary: tuple[Tensor, Tensor] | None, video: slice
) -> Tensor:
    """QK norm of `[B, N, H, D]`, then rotary embedding of the video tokens, as the host does it."""
    x = x if norm is None else norm(x)
    if rotary is None:
        return x
    rotated = apply_rotary_emb(x[:, video], rotary, sequence_dim=1)
    return torch.cat([x[:, : video.start], rotated, x[:, video.stop :]], dim=1)
