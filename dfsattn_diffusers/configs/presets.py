"""Named configs, as differences from the defaults (which are the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import DFSAttnConfig

DEFAULT_PRESET = "balanced"

# Every refresh is dense: few dense steps at the start, and more of them later on. Below about 4,000
# tokens dense attention is too short for sparsity to pay.
_BEYOND: dict[str, Any] = dict(
    order=("hilbert3d", "hilbert2d", "hilbert_fw", "hilbert_fh"),
    tail="moment", tail_pool=64, budget="layer", selection="error", residual_pool=1,
    residual_rank=8, refreshes=99, min_tokens=4096,
)  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quality": dict(
        _BEYOND, dense_fraction=0.12, keep_ratios=(0.2,), refresh_interval=0.08,
        few_step_ratios=(1, 0.8, 0.55, 0.4, 0.3, 0.24, 0.2, 0.16),
    ),
    "balanced": dict(
        _BEYOND, dense_fraction=0.1, keep_ratios=(0.1,), refresh_interval=0.08,
        refresh_growth=1.08,
        few_step_ratios=(0.9, 0.58, 0.38, 0.26, 0.18, 0.13, 0.1, 0.08),
    ),
    "fast": dict(
        _BEYOND, dense_fraction=0.12, keep_ratios=(0.1,), refresh_interval=0.12,
        refresh_growth=1.15,
        few_step_ratios=(0.75, 0.45, 0.28, 0.19, 0.13, 0.1, 0.08, 0.06),
    ),
    "turbo": dict(
        _BEYOND, dense_fraction=0.06, keep_ratios=(0.05,), refresh_interval=0.12,
        refresh_growth=1.28,
        few_step_ratios=(0.6, 0.35, 0.21, 0.14, 0.1, 0.07, 0.055, 0.045),
    ),
}  # fmt: skip
# What `few_step_ratios` stands in for, but for `keep_ratios` and for maps of each branch.
_SCHEDULE = {
    "dense_fraction", "refreshes", "refresh_interval", "refresh_growth", "residual_pool",
    "residual_rank",
}  # fmt: skip


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
        **overrides: Fields that replace those of `config`. On a preset's, `keep_ratios` scales what
            short runs keep by its first value, other fields of the schedule make short runs follow
            the long one, both unless `few_step_ratios` is among them; and `residual_pool=None`
            needs no `residual_rank=None` beside it.

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
        overrides = _implied(resolved, overrides) | overrides
    else:
        raise ValueError(
            f"Unknown preset {config!r}; known presets are {', '.join(_PRESETS)}. A config file "
            "needs the ending .json, .yaml or .yml."
        )
    return resolved.replace(**overrides) if overrides else resolved


def _implied(preset: DFSAttnConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that go with others."""
    implied: dict[str, Any] = {}
    if preset.few_step_ratios is not None and "keep_ratios" in overrides:
        # Replacing checks them.
        ratios = preset.replace(keep_ratios=overrides["keep_ratios"]).keep_ratios
        factor = ratios[0] / preset.keep_ratios[0]
        implied["few_step_ratios"] = [min(1.0, factor * r) for r in preset.few_step_ratios]
    if _SCHEDULE & set(overrides):
        implied["few_step_ratios"] = None
    if overrides.get("residual_pool", ...) is None:
        implied["residual_rank"] = None
    return implied
