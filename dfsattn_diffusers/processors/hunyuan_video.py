"""HunyuanVideo: joint attention of video, then text with padding; the token refiner stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from ..layout import TokenGeometry
from .adapter import ModelAdapter, register_adapter
from .base import LayerProcessor
from .rotary import norm_and_rotate


class HunyuanVideoDFSAttnProcessor(LayerProcessor):
    """Joint attention of one dual-stream or single-stream block."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video_tokens = hidden_states.shape[1]
        video = slice(0, video_tokens)
        if attn.add_q_proj is None:
            # Single-stream blocks project both streams with the same weights.
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = norm_and_rotate(query, attn.norm_q, image_rotary_emb, video)
        key = norm_and_rotate(key, attn.norm_k, image_rotary_emb, video)

        if attn.add_q_proj is not None:
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(2, (attn.heads, -1))
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            if attn.norm_added_q is not None:
                text_query = attn.norm_added_q(text_query)
            if attn.norm_added_k is not None:
                text_key = attn.norm_added_k(text_key)
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)

        out = self.attend(query, key, value, attention_mask, mask_is_text_padding=True)
        out = out.flatten(2).to(query.dtype)
        video_out, text_out = out[:, :video_tokens], out[:, video_tokens:]
        if attn.to_out is not None:
            video_out = attn.to_out[1](attn.to_out[0](video_out))
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return video_out, text_out


def _tokens(
    transformer: torch.nn.Module, inputs: Mapping[str, Any]
) -> tuple[TokenGeometry, Tensor | None]:
    frames, height, width = inputs["hidden_states"].shape[2:]
    side, side_t = transformer.config.patch_size, transformer.config.patch_size_t
    text_tokens = inputs["encoder_hidden_states"].shape[1]
    geometry = TokenGeometry((frames // side_t, height // side, width // side), text_tokens)
    return geometry, inputs["encoder_attention_mask"]


def _is_refiner(name: str) -> bool:
    return name.startswith("context_embedder.")


register_adapter(
    ModelAdapter(
        transformer_class="HunyuanVideoTransformer3DModel",
        processor_class=HunyuanVideoDFSAttnProcessor,
        is_sparse_layer=lambda name: not _is_refiner(name),
        tokens=_tokens,
        stock_processor=lambda name, attn: (
            AttnProcessor2_0() if _is_refiner(name) else HunyuanVideoAttnProcessor2_0()
        ),
    )
)
