"""FlashAttention-4's block-sparse forward for sm90, where `flash-attn-4` is installed.

Written for the interface of flash-attn-4 4.0.0b36 and never yet run with it: by name only.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_map import BlockMap
from . import AttentionCall, capability, refused_size
from .reference import store

NAME = "fa4"

_DTYPES = (torch.bfloat16, torch.float16)
_INSTALL = "pip install 'flash-attn-4>=4.0.0b36'"


def why_not(call: AttentionCall) -> str | None:
    """Reason why that package cannot do the call."""
    if (found := capability(call.q.device)) != "9.0":
        return f"it needs a CUDA device of capability 9.0, got {found}"
    if call.key_lengths is not None:
        # Masks hide logits, but hidden values are still multiplied by 0: NaN stays NaN.
        return "it needs whole key blocks but for the end of the sequence, got key_lengths"
    if (reason := refused_size(call, _DTYPES)) is not None:
        return reason
    # Last: the import takes seconds.
    package = _package()
    return package if isinstance(package, str) else None


def rank(call: AttentionCall) -> None:
    """By name only."""


@cache
def _package() -> SimpleNamespace | str:
    """The function and the class that it needs, or why there are none."""
    try:
        forward = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        lists = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    except ImportError as error:
        return f"{error}; {_INSTALL}"
    except Exception as error:  # its compiler breaks in many ways, none of which may break "auto"
        return f"import of flash-attn-4 failed with {type(error).__name__}: {error}; {_INSTALL}"
    if "block_size" not in lists._fields:
        return f"its BlockSparseTensorsTorch has no block_size: it is too old; {_INSTALL}"
    return SimpleNamespace(forward=forward, lists=lists)


def forward(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`."""
    package, block_map = _package(), call.block_map
    counts = block_map.counts.contiguous()
    # Blocks where masks would be asked for: none. The end of the sequence is masked anyway, in
    # the last block of a list only: lists must ascend, as ours do.
    lists = package.lists(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=counts.new_zeros(*counts.shape, 1),
        full_block_cnt=counts,
        full_block_idx=_written_out(block_map),
        block_size=(block_map.query_block, block_map.key_block),
    )
    # It wants [B, N, H, D], and gives that; log-sum-exp is [B, H, N].
    out, lse = package.forward(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)),
        softmax_scale=call.scale,
        block_sparse_tensors=lists,
        return_lse=call.lse is not None,
    )
    store(out.transpose(1, 2), call.output_order, call.out)
    if call.lse is not None:
        call.lse.copy_(lse)


def _written_out(block_map: BlockMap) -> Tensor:
    """`[B, H, nQ, nK]` int32: lists in which rows that keep everything are listed too."""
    width = block_map.num_key_blocks
    listed = F.pad(block_map.indices, (0, max(0, width - block_map.indices.shape[-1])))
    every = torch.arange(width, dtype=torch.int32, device=listed.device)
    full = (block_map.counts == width)[..., None]
    return torch.where(full, every, listed[..., :width])
