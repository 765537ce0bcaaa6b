"""Exact attention restricted to kept blocks: tensors in, tensors out."""

from .api import block_sparse_attention, explain, list_backends
from .block_map import BlockMap, PackedBlockMap

__all__ = ["BlockMap", "PackedBlockMap", "block_sparse_attention", "explain", "list_backends"]
