"""Puts processors and hook on one transformer, watches over them, and takes them off again."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from .hook import StepClock, TransformerHook
from .processors import ModelAdapter, adapter_for
from .state import DFSAttnState

logger = logging.getLogger(__name__)

# Attribute under which a transformer knows the attachment it carries.
_ATTRIBUTE = "_dfsattn_attachment"


def attachment_of(transformer: torch.nn.Module) -> Attachment | None:
    """The attachment that a transformer carries, if any."""
    return vars(transformer).get(_ATTRIBUTE)


def restore_stock(transformer: torch.nn.Module) -> None:
    """Replace processors of ours that remember no original by the model's stock ones."""
    adapter = adapter_for(transformer)
    for key, processor in transformer.attn_processors.items():
        if getattr(processor, "is_dfsattn", False):
            attn = transformer.get_submodule(key.removesuffix(".processor"))
            stock = adapter.stock_processor(key, attn)
            _copy_settings(processor, stock)
            attn.set_processor(stock)


def _copy_settings(source: Any, target: Any) -> None:
    """Carry the attention backend and parallelism, which the user may set at any time, over."""
    for setting in ("_attention_backend", "_parallel_config"):
        if hasattr(target, setting):
            setattr(target, setting, getattr(source, setting, None))


def _device_of(module: torch.nn.Module) -> torch.device:
    """Where a layer's weights are; the CPU if it has none."""
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


class Attachment:
    """DFSAttn on one transformer.

    Args:
        transformer: The denoiser.
        adapter: What is known of its class.
        state: Of the pipeline.
        clock: Of the pipeline.
        name: Of the transformer within the pipeline.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        adapter: ModelAdapter,
        state: DFSAttnState,
        clock: StepClock,
        name: str,
    ):
        self.transformer = transformer
        self._adapter = adapter
        self._state = state
        self._name = name
        self._originals = dict(transformer.attn_processors)
        self._modules = {
            key: transformer.get_submodule(key.removesuffix(".processor"))
            for key in self._originals
            if adapter.is_sparse_layer(key)
        }
        beyond = [layer for layer in state.config.dense_layers if layer >= len(self._modules)]
        if beyond:
            raise ValueError(
                f"dense_layers must name layers from 0 to {len(self._modules) - 1} of the "
                f"{name}; got {beyond}."
            )
        self._ours = {
            key: adapter.processor_class(state, layer) for layer, key in enumerate(self._modules)
        }
        for key, processor in self._ours.items():
            _copy_settings(self._originals[key], processor)
        self._hook = TransformerHook(transformer, adapter, state, clock, name, self._watch)

    def attach(self) -> None:
        self._refuse_context_parallel()
        for key, module in self._modules.items():
            module.set_processor(self._ours[key])
        self._hook.install()
        setattr(self.transformer, _ATTRIBUTE, self)

    def detach(self) -> None:
        """Put the very processors back that were there before, where ours still stand."""
        self.abandon()
        self._return_after_fusing()
        for key, module in self._modules.items():
            if module.processor is self._ours[key]:
                _copy_settings(self._ours[key], self._originals[key])
                module.set_processor(self._originals[key])

    def abandon(self) -> None:
        """Stop listening and leave the processors as they are."""
        self._hook.remove()
        delattr(self.transformer, _ATTRIBUTE)

    def _watch(self) -> bool:
        """Before every forward: tells whether any of our processors is still in place."""
        self._refuse_context_parallel()
        self._return_after_fusing()
        ours = [m for key, m in self._modules.items() if m.processor is self._ours[key]]
        if ours:
            config = self._state.config
            if config.residual_pool is not None:
                sparse = [m for m in ours if m.processor.layer not in config.dense_layers]
                self._state.residuals.layers[self._name] = Counter(map(_device_of, sparse))
            return True
        logger.warning("All DFSAttn processors were replaced by others: DFSAttn is off.")
        self.abandon()
        return False

    def _return_after_fusing(self) -> None:
        """Put ours back where fusing projections silently put the host's."""
        saved = getattr(self.transformer, "original_attn_processors", None) or {}
        for key, module in self._modules.items():
            # What unfusing brings back shall never be ours: DFSAttn may be off by then.
            if saved.get(key) is self._ours[key]:
                saved[key] = self._originals[key]
            if isinstance(module.processor, self._adapter.silent_replacements):
                self._originals[key] = module.processor
                module.set_processor(self._ours[key])

    def _refuse_context_parallel(self) -> None:
        holders = [self.transformer, *(module.processor for module in self._modules.values())]
        for holder in holders:
            config = getattr(holder, "_parallel_config", None)
            config = getattr(config, "context_parallel_config", config)
            if config is None:
                continue
            if (getattr(config, "ring_degree", None) or 1) > 1:
                raise ValueError(
                    f"Ring context parallelism (ring_degree={config.ring_degree}) cannot work with "
                    "DFSAttn: no rank sees all keys, so none can choose among them. Run without "
                    "context parallelism."
                )
            if (getattr(config, "ulysses_degree", None) or 1) > 1:
                raise ValueError(
                    f"Ulysses context parallelism (ulysses_degree={config.ulysses_degree}) is not "
                    "supported by this release of DFSAttn. Run without context parallelism."
                )
