"""Which tensors go through the Triton kernels of scores and maps; torch serves all others."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def fast(name: str, x: Tensor) -> ModuleType | None:
    """The module of Triton kernels `name` where it can serve x's device, else None."""
    if not x.is_cuda or torch.version.hip is not None:
        return None
    return _load(name) if torch.cuda.get_device_capability(x.device) >= (8, 0) else None


def arch_of(x: Tensor) -> int:
    """Compute capability of x's GPU, such as 90; on a CPU the one that the interpreter plays."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


@cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ImportError:
        return None
