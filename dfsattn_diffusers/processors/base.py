"""What the processors of all model families share: the choice between dense and sparse."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from ..attention import sparse_attention
from ..kernels import BlockMap, block_sparse_attention
from ..state import DFSAttnState
from .opaque import layer_handle, opaque_attend


class LayerProcessor:
    """Attention processor of one layer.

    A family's subclass projects, calls `attend`, and projects back. It is no `nn.Module`, so that
    it stays out of state dicts and offloading.

    Args:
        state: Of the pipeline.
        layer: Index among the transformer's sparse layers.
    """

    is_dfsattn = True
    # What users set on processors through the host; an attachment carries it over and back.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, state: DFSAttnState, layer: int):
        self.state = state
        self.layer = layer
        self.handle = layer_handle(self)

    def __setstate__(self, values: dict) -> None:
        # A copy is a layer of its own.
        self.__dict__.update(values, handle=layer_handle(self))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        mask_is_text_padding: bool = False,
    ) -> Tensor:
        """Attention as the state decides.

        Args:
            query, key, value: `[B, N, H, D]` in the model's order.
            attention_mask: Passed to dense attention.
            mask_is_text_padding: The mask says no more than the state's text lengths do, so that
                sparse attention can honour it.

        Returns:
            `[B, N, H, D]`.
        """
        if torch.compiler.is_compiling():
            return opaque_attend(
                self.handle, query, key, value, attention_mask, mask_is_text_padding
            )
        return self.attend_now(query, key, value, attention_mask, mask_is_text_padding)

    @torch.compiler.disable
    def attend_now(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        mask_is_text_padding: bool,
    ) -> Tensor:
        """`attend`, out of a compiler's sight: what it does may change from call to call."""
        state, batch = self.state, query.shape[0]
        decision = state.decide(self.layer, batch)
        self._check_tokens(query.shape[1])
        self._check_backend(query)
        reason = decision.reason
        if attention_mask is not None and not mask_is_text_padding:
            reason = reason or "attention mask"
        if reason:
            state.note_dense(reason)
            return self._attend_dense(query, key, value, attention_mask, mask_is_text_padding)
        block_map = state.block_map(self.layer, batch) if decision.mode == "reuse" else None
        out, selected = sparse_attention(
            query,
            key,
            value,
            state.layout(query.device),
            block_map,
            keep_ratio=decision.keep_ratio,
            budget=state.config.budget,
            selection=state.config.selection,
            tail=state.config.tail,
            tail_pool=state.config.tail_pool,
            text_lengths=state.forward.text_lengths(query.device),
            backend=state.config.backend,
        )
        if selected is not None:
            state.store(self.layer, batch, decision.segment, selected)
            block_map = selected.block_map
        if state.observer is not None:
            state.observer(self.layer, query, key, block_map)
        return out

    def _attend_dense(self, query, key, value, attention_mask, mask_is_text_padding) -> Tensor:
        """Attention by the user's backend; text padding is cut off, since masks cost speed."""
        tokens = kept = query.shape[1]
        text = self.state.forward.text
        if mask_is_text_padding and text is not None:
            kept = self.state.forward.geometry.video_tokens + text.longest
            query, key, value = (x[:, :kept] for x in (query, key, value))
            even = text.shortest == text.longest
            attention_mask = None if even else attention_mask[..., :kept]
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out if kept == tokens else F.pad(out, (0, 0, 0, 0, 0, tokens - kept))

    def _check_tokens(self, tokens: int) -> None:
        geometry = self.state.forward.geometry
        if tokens != geometry.tokens:
            raise ValueError(
                f"Attention got {tokens} tokens, but the grid {geometry.grid} with "
                f"{geometry.text_tokens} text tokens has {geometry.tokens}. Something changed the "
                "sequence between the transformer's input and its attention; disable it or call "
                "disable_dfsattn."
            )

    def _check_backend(self, query: Tensor) -> None:
        """Let the kernel do one token in the first step, not fail after all the dense ones."""
        config, token = self.state.config, query[:1, :1].transpose(1, 2)
        kind = query.device, query.dtype, query.shape[-1]
        if kind in self.state.served:
            return
        blocks = dict(query_block=config.query_block, key_block=config.key_block)
        one = BlockMap.full(1, query.shape[2], 1, 1, **blocks, device=query.device)
        block_sparse_attention(token, token, token, one, backend=config.backend)
        self.state.served.add(kind)
