"""DFSAttn for diffusers: video generation with training-free sparse attention."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Loaded on first use, so that `dfsattn_diffusers.kernels` works where diffusers does not.
_HOMES = {
    "DFSAttnConfig": "configs",
    "DFSAttnHandle": "pipeline",
    "DFSAttnProcessor": "bare",
    "DFSAttnState": "state",
    "disable_dfsattn": "pipeline",
    "enable_dfsattn": "pipeline",
    "list_models": "processors",
    "list_presets": "configs",
}

__all__ = [
    "DFSAttnConfig",
    "DFSAttnHandle",
    "DFSAttnProcessor",
    "DFSAttnState",
    "disable_dfsattn",
    "enable_dfsattn",
    "list_models",
    "list_presets",
]

if TYPE_CHECKING:
    from .bare import DFSAttnProcessor
    from .configs import DFSAttnConfig, list_presets
    from .pipeline import DFSAttnHandle, disable_dfsattn, enable_dfsattn
    from .processors import list_models
    from .state import DFSAttnState


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
