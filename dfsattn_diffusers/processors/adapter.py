"""What has to be known of a model family, and the registry of those that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import TokenGeometry


@dataclass(frozen=True)
class ModelAdapter:
    """One model family.

    Attributes:
        transformer_class: Name of the diffusers transformer class.
        processor_class: Built as `processor_class(state, layer)` for each sparse layer.
        is_sparse_layer: Tells by name which of `transformer.attn_processors` are video attention.
        tokens: From the transformer and the arguments of its forward to the token geometry and
            the `[B, text tokens]` mask of valid text, padding last (None where all are valid).
        stock_processor: From a processor's name and its attention module to a stock processor.
        silent_replacements: Processor classes that the host puts in without being asked for a
            processor, such as those of fused projections; ours go back in their place.
    """

    transformer_class: str
    processor_class: type
    is_sparse_layer: Callable[[str], bool]
    tokens: Callable[[torch.nn.Module, Mapping[str, Any]], tuple[TokenGeometry, Tensor | None]]
    stock_processor: Callable[[str, torch.nn.Module], Any]
    silent_replacements: tuple[type, ...] = ()


_ADAPTERS: dict[str, ModelAdapter] = {}


def register_adapter(adapter: ModelAdapter) -> None:
    """Make a model family known; a second one for the same class raises `ValueError`."""
    if adapter.transformer_class in _ADAPTERS:
        raise ValueError(f"{adapter.transformer_class} is registered already.")
    _ADAPTERS[adapter.transformer_class] = adapter


def adapter_for(transformer: Any) -> ModelAdapter:
    """The adapter of a transformer, by the exact name of its class or of a base class.

    Raises:
        ValueError: The class is not known.
    """
    for base in type(transformer).__mro__:
        if base.__name__ in _ADAPTERS:
            return _ADAPTERS[base.__name__]
    raise ValueError(
        f"{type(transformer).__name__} is not supported; supported transformers are "
        f"{', '.join(list_models())}."
    )


def list_models() -> tuple[str, ...]:
    """Names of the supported transformer classes."""
    return tuple(sorted(_ADAPTERS))
