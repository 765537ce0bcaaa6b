"""Attention as one operator that torch.compile does not look into: one graph for all layers."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

# Decisions made anew in every call must not be recorded: since torch 2.9, inductor can be told to
# cut CUDA graphs around an operator; before, the handle on the CPU keeps it from making any.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []

_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def layer_handle(layer: Any) -> Tensor:
    """A number for a layer processor, new in this process, which does not keep it alive.

    It is a 0-dim CPU tensor: graphs take those as inputs, where a Python int would be a constant
    and cost one graph for each layer.
    """
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


@torch.library.custom_op(
    "dfsattn::attend",
    mutates_args=(),
    schema="(Tensor handle, Tensor query, Tensor key, Tensor value, Tensor? attention_mask, "
    "bool mask_is_text_padding) -> Tensor",
    **({"tags": _TAGS} if _TAGS else {}),
)
def opaque_attend(
    handle: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    mask_is_text_padding: bool,
) -> Tensor:
    """`attend_now` of the layer processor with this handle; contiguous `[B, N, H, D]`."""
    layer = _layers[int(handle)]
    out = layer.attend_now(query, key, value, attention_mask, mask_is_text_padding)
    # The strides that were promised at compile time; dense backends return several.
    return out.contiguous()


@opaque_attend.register_fake
def _(handle, query, key, value, attention_mask, mask_is_text_padding):
    return torch.empty_like(query, memory_format=torch.contiguous_format)
