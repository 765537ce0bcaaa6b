from .config import DFSAttnConfig
from .presets import list_presets, resolve_config

__all__ = ["DFSAttnConfig", "list_presets", "resolve_config"]
