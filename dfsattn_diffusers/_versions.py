"""The one check of the host's version, made when anything that needs the host is imported."""

from __future__ import annotations

import importlib.metadata

# Tested range; the hooks that carry step and branch are not public API of diffusers.
OLDEST, NEXT = (0, 42), (0, 43)


def check_host_version() -> None:
    """Raise `ImportError` with an instruction unless diffusers is of the supported range."""
    wanted = f"diffusers>={_text(OLDEST)},<{_text(NEXT)}"
    try:
        found = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"dfsattn_diffusers needs diffusers: pip install '{wanted}'") from None
    if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < NEXT:
        raise ImportError(
            f"dfsattn_diffusers works with {wanted}; found {found}. Run: pip install '{wanted}'"
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
