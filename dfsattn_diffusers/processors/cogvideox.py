"""CogVideoX (2B, 5B, 1.5): joint attention of text, then video; guidance in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from torch import Tensor

from ..layout import TokenGeometry
from .adapter import ModelAdapter, register_adapter
from .base import LayerProcessor
from .rotary import norm_and_rotate


class CogVideoXDFSAttnProcessor(LayerProcessor):
    """Joint attention of one `CogVideoXBlock` (`attn1`), projections fused or not."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text_tokens = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        batch, tokens, _ = hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.unflatten(0, (batch, attn.heads))

        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (
                project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
            )
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        video = slice(text_tokens, tokens)
        query = norm_and_rotate(query, attn.norm_q, image_rotary_emb, video)
        key = norm_and_rotate(key, attn.norm_k, image_rotary_emb, video)

        out = self.attend(query, key, value, attention_mask).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text_tokens:], out[:, :text_tokens]


def _tokens(
    transformer: torch.nn.Module, inputs: Mapping[str, Any]
) -> tuple[TokenGeometry, Tensor | None]:
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    side, side_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
    grid = -(-frames // side_t), height // side, width // side
    text_tokens = inputs["encoder_hidden_states"].shape[1]
    return TokenGeometry(grid, text_tokens, text_first=True), None


register_adapter(
    ModelAdapter(
        transformer_class="CogVideoXTransformer3DModel",
        processor_class=CogVideoXDFSAttnProcessor,
        is_sparse_layer=lambda name: True,
        tokens=_tokens,
        stock_processor=lambda name, attn: (
            FusedCogVideoXAttnProcessor2_0()
            if attn.fused_projections
            else CogVideoXAttnProcessor2_0()
        ),
        silent_replacements=(FusedCogVideoXAttnProcessor2_0,),
    )
)
