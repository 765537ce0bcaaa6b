"""Config fields in JSON and YAML files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Write plain data to a file of the kind that its ending says."""
    if _is_yaml(path):
        text = _import_yaml().safe_dump(dict(fields), sort_keys=False)
    else:
        text = json.dumps(fields, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def read_fields(path: Path) -> Mapping[str, Any]:
    """Read plain data from a file of the kind that its ending says."""
    reader = _import_yaml().safe_load if _is_yaml(path) else json.loads
    fields = reader(path.read_text(encoding="utf-8"))
    if not isinstance(fields, Mapping):
        raise ValueError(
            f"{path} must hold one mapping of config fields; got {type(fields).__name__}."
        )
    return fields


def _is_yaml(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"A config file ends in .json, .yaml or .yml; got {str(path)!r}.")
    return suffix != ".json"


def _import_yaml():
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "YAML config files need PyYAML: pip install 'dfsattn_diffusers[yaml]', or use .json."
        ) from error
    return yaml
