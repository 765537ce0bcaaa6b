"""Model families. A file dropped into this folder registers itself."""

import importlib
import pkgutil

from .._versions import check_host_version

check_host_version()

from .adapter import ModelAdapter, adapter_for, list_models, register_adapter  # noqa: E402
from .base import LayerProcessor  # noqa: E402

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LayerProcessor", "ModelAdapter", "adapter_for", "list_models", "register_adapter"]
