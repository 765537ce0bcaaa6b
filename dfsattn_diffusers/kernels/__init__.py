"""Exact attention restricted to kept blocks: tensors in, tensors out."""

from .api import block_sparse_attention, explain, list_backends
from .block_map import BlockMap, PackedBlockMap
from .quantize import Quantized, quantize
from .tail import Tail, pool_moments, pool_tail

__all__ = [
    "BlockMap",
    "PackedBlockMap",
    "Quantized",
    "Tail",
    "block_sparse_attention",
    "explain",
    "list_backends",
    "pool_moments",
    "pool_tail",
    "quantize",
]
