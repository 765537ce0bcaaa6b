"""Exact attention restricted to kept blocks: tensors in, tensors out."""

from .api import block_sparse_attention, explain, list_backends
from .block_map import BlockMap, PackedBlockMap
from .quantize import Quantized, quantize

__all__ = [
    "BlockMap",
    "PackedBlockMap",
    "Quantized",
    "block_sparse_attention",
    "explain",
    "list_backends",
    "quantize",
]
