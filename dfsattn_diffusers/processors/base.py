"""What the processors of all model families share: the choice between dense and sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import prepare, sparse_attention
from ..dense import check_kernels, dense_attention
from ..kernels.prologue import Rotary, Stream, prepare_qkv, reference
from ..kernels.residual import add_residual, measure_residual
from ..state import DFSAttnState, Kept
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
        streams: Sequence[Stream],
        rotary: Rotary | None = None,
        attention_mask: Tensor | None = None,
        *,
        mask_is_text_padding: bool = False,
    ) -> Tensor:
        """Attention as the state decides.

        Args:
            streams: Projections in the model's order, `N` rows in all, and their QK norms.
            rotary: Rows to rotate after the norms.
            attention_mask: Passed to dense attention.
            mask_is_text_padding: The mask says no more than the state's text lengths do, so that
                sparse attention can honour it.

        Returns:
            `[B, N, H, D]`.
        """
        if torch.compiler.is_compiling():
            # A compiler fuses norms and rotary embedding by itself.
            x = reference(streams, rotary, heads_first=False)
            return opaque_attend(self.handle, x.q, x.k, x.v, attention_mask, mask_is_text_padding)
        return self.attend_now(streams, rotary, attention_mask, mask_is_text_padding)

    @torch.compiler.disable
    def attend_now(
        self,
        streams: Sequence[Stream],
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        mask_is_text_padding: bool,
    ) -> Tensor:
        """`attend`, out of a compiler's sight: what it does may change from call to call."""
        state, like, config = self.state, streams[0].q, self.state.settings
        call = streams, rotary, attention_mask, mask_is_text_padding
        decision = state.decide(self.layer, like.shape[0])
        self._check_tokens(sum(stream.q.shape[1] for stream in streams))
        self._check_backend(like)
        masked = attention_mask is not None and not mask_is_text_padding
        reason = decision.reason or ("attention mask" if masked else "")
        if not masked:
            state.check_memory(like)
        if reason:
            state.note_dense(reason)
            return self._attend_dense(*call)
        layout, text = state.layout(like.device), state.forward.text_lengths(like.device)
        reuse, pool = decision.mode == "reuse", config.residual_pool
        # Dense goes first: its tensors are gone before those in curve order are made.
        exact = None if reuse or pool is None else self._attend_dense(*call, correction=True)
        kept = state.kept(self.layer, like.shape[0]) if reuse else Kept()
        now = dict(text_lengths=text, keep_ratio=decision.keep_ratio)
        x = prepare(streams, layout, rotary, scored=not reuse, choice=kept.choice, **now)
        block_map = kept.packed.unpack() if reuse else None
        out, selected = sparse_attention(
            x, layout, block_map, **now, **config.per_call(exact=exact is not None)
        )
        if selected is not None:
            block_map, residual = selected.block_map, None
            if exact is not None:
                runs = layout.target(x.choice), layout.lengths(pool, text)
                residual, out = measure_residual(exact, out, *runs, config.residual_rank), exact
            kept = Kept(block_map.pack(), x.choice, residual)
            state.store(self.layer, like.shape[0], decision.segment, selected, kept)
        elif kept.residual is not None:
            add_residual(out, kept.residual, layout.restore(x.choice), pool)
        if state.observer is not None:
            state.observer(self.layer, x.q, x.k, block_map, x.choice)
        return out

    def _attend_dense(
        self, streams, rotary, attention_mask, mask_is_text_padding, correction=False
    ) -> Tensor:
        x = prepare_qkv(streams, rotary, heads_first=False)
        forward = self.state.forward
        return dense_attention(
            x.q, x.k, x.v, self.state.settings, correction=correction, mask=attention_mask,
            text=forward.text if mask_is_text_padding else None,
            video_tokens=forward.geometry.video_tokens,
            backend=self._attention_backend, parallel_config=self._parallel_config,
        )

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
        kind = query.device, query.dtype, query.shape[-1]
        if kind not in self.state.served:
            check_kernels(query[:1, :1], self.state.settings)
            self.state.served.add(kind)
