"""Named configs, as differences from the defaults (which are the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import DFSAttnConfig

DEFAULT_PRESET = "balanced"

# Below about 4,000 tokens dense attention is too short for sparsity to pay.
_BEYOND: dict[str, Any] = dict(
    tail="mean", tail_pool=32, budget="layer", selection="error", min_tokens=4096
)
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quality": dict(_BEYOND, keep_ratios=(0.5, 0.4, 0.3), key_block=64),
    "balanced": dict(_BEYOND, keep_ratios=(0.4, 0.3, 0.2)),
    "fast": dict(_BEYOND),
    "turbo": dict(_BEYOND, dense_fraction=0.18, keep_ratios=(0.2, 0.12, 0.08)),
}


def list_presets() -> tuple[str, ...]:
    """Names that `enable_dfsattn` and `resolve_config` accept."""
    return tuple(_PRESETS)


def resolve_config(
    config: DFSAttnConfig | Mapping[str, Any] | str | Path, **overrides: Any
) -> DFSAttnConfig:
    """Turn any accepted form of a config into a `DFSAttnConfig`.

    Args:
        config: A config, a mapping of its fields, a preset's name, or the path of a JSON or YAML
            file. A string with a config file's ending is a path, any other a preset.
        **overrides: Fields that replace those of `config`.

    Raises:
        ValueError: The preset or a field is unknown, or a value is out of range.
        FileNotFoundError: The file does not exist.
    """
    if isinstance(config, DFSAttnConfig):
        resolved = config
    elif isinstance(config, Mapping):
        resolved = DFSAttnConfig.from_dict(config)
    elif isinstance(config, Path) or str(config).lower().endswith((".json", ".yaml", ".yml")):
        resolved = DFSAttnConfig.load(config)
    elif config in _PRESETS:
        resolved = DFSAttnConfig(**_PRESETS[config])
    else:
        raise ValueError(
            f"Unknown preset {config!r}; known presets are {', '.join(_PRESETS)}. A config file "
            "needs the ending .json, .yaml or .yml."
        )
    return resolved.replace(**overrides) if overrides else resolved
