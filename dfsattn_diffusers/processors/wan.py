"""Wan 2.1 and 2.2: video alone in self-attention; cross-attention to text stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from ..layout import TokenGeometry
from .adapter import ModelAdapter, register_adapter
from .base import LayerProcessor
from .projections import rotary_of, stream_of


class WanDFSAttnProcessor(LayerProcessor):
    """Self-attention of one `WanTransformerBlock` (`attn1`)."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (
                project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
            )
        stream = stream_of(query, key, value, attn.norm_q, attn.norm_k, attn.heads)
        rotary = rotary_of(rotary_emb, query, float32_steps=False)
        out = self.attend([stream], rotary, attention_mask).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _tokens(
    transformer: torch.nn.Module, inputs: Mapping[str, Any]
) -> tuple[TokenGeometry, Tensor | None]:
    sizes = inputs["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    return TokenGeometry(tuple(size // side for size, side in zip(sizes, patch))), None


register_adapter(
    ModelAdapter(
        transformer_class="WanTransformer3DModel",
        processor_class=WanDFSAttnProcessor,
        is_sparse_layer=lambda name: name.endswith("attn1.processor"),
        tokens=_tokens,
        stock_processor=lambda name, attn: WanAttnProcessor(),
    )
)
