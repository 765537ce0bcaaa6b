"""Implementations of `block_sparse_attention`: drop a module into this folder and it exists.

A backend module has
    NAME: its own module name, also what users call it;
    PRECISIONS: of its products, ("full",) where the module says nothing;
    rank(call) -> int | None: of those that can do the call, "auto" takes the highest, as measured;
        None where it is to be had by name only;
    why_not(call) -> str | None: the reason why it cannot do this call;
    forward(call): fills `call.out` and, where it is not None, `call.lse`;
    takes_tail(call) -> bool: whether `forward` also lets `call.tail` join in, as `add_tail` would;
        it does not where the module says nothing. Then `add_tail` follows and needs `call.lse`.
Modules whose names begin with an underscore are helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..block_map import BlockMap

if TYPE_CHECKING:
    from ..tail import Tail


@dataclass(frozen=True)
class AttentionCall:
    """Checked arguments of one `block_sparse_attention`, all optional ones filled in.

    Attributes:
        q: `[B, H, Nq, D]`.
        k, v: `[B, H, Nk, D]`.
        key_lengths: `[B, nK]` int32 or None, real keys at the front of each key block.
        full_key_blocks: Key blocks before this index are full in every batch row.
        output_order: `[Nq]` or `[B, H, Nq]` int32 or None, the row of `out` for each query; -1
            drops it.
        out: `[B, H, M, D]`, to be written.
        lse: `[B, H, Nq]` float32 or None, to be written.
        tail: Pools for the blocks that rows do not keep, or None.
        precision: Of the products: "full", "fp8" or "int8".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_map: BlockMap
    scale: float
    key_lengths: Tensor | None
    full_key_blocks: int
    output_order: Tensor | None
    out: Tensor
    lse: Tensor | None
    tail: Tail | None = None
    precision: str = "full"

    def order_and_stride(self) -> tuple[Tensor, int] | tuple[None, None]:
        """The order, contiguous, and elements between two heads' orders, 0 where all share one."""
        order = self.output_order
        if order is None:
            return None, None
        return order.contiguous(), order.shape[-1] if order.ndim == 3 else 0


def capability(device: torch.device) -> str:
    """A CUDA device's compute capability, the type of any other."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def refused_size(call: AttentionCall, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why not, for kernels of these dtypes, head dims 64 and 128, blocks of 64 and 128."""
    head_dim = call.q.shape[-1]
    blocks = (call.block_map.query_block, call.block_map.key_block)
    if call.q.dtype not in dtypes:
        return f"it needs {' or '.join(map(str, dtypes))}, got {call.q.dtype}"
    if head_dim not in (64, 128):
        return f"it needs head dim 64 or 128, got {head_dim}"
    if any(size not in (64, 128) for size in blocks):
        return f"it needs query and key blocks of 64 or 128, got {blocks[0]} and {blocks[1]}"
    return None


def list_backends() -> list[str]:
    """Names of all backends, whether this machine can run them or not."""
    return list(_names())


@cache
def _names() -> tuple[str, ...]:
    # Once: to look through the folder takes longer than to launch a kernel.
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def precisions_of(module: ModuleType | SimpleNamespace) -> tuple[str, ...]:
    """Those that a backend offers."""
    return getattr(module, "PRECISIONS", ("full",))


@cache
def load_backend(name: str) -> ModuleType | SimpleNamespace:
    """The backend module; one that cannot be imported here says so in `why_not`."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        reason = f"{error}; install or upgrade what is missing"
        return SimpleNamespace(NAME=name, why_not=lambda call: reason)
