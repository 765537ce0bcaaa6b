"""Exact attention restricted to kept blocks: tensors in, tensors out."""

from .api import block_sparse_attention, explain, list_backends
from .block_map import BlockMap, PackedBlockMap
from .tail import Tail, pool_tail

__all__ = [
    "BlockMap",
    "PackedBlockMap",
    "Tail",
    "block_sparse_attention",
    "explain",
    "list_backends",
    "pool_tail",
]
