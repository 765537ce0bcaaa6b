"""An environment report for bug reports: `python -m dfsattn_diffusers.env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

HOST = ("diffusers", "transformers", "accelerate", "safetensors", "imageio", "imageio-ffmpeg")
EXTRAS = ("pyyaml", "sentencepiece", "protobuf", "ftfy", "flash-attn-4")


def environment() -> dict[str, str]:
    """Describe what this process runs on, one fact a row; never raises, an absent part says so."""
    rows: dict[str, Callable[[], str]] = {
        "dfsattn_diffusers": _package,
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform,
        "cpu": _cpu,
        "torch": _torch,
        "triton": lambda: _version("triton"),
        **{name: lambda name=name: _version(name) for name in HOST},
        "devices": lambda: "; ".join(_devices()) or "no GPU",
        "attention backends": _backends,
        "optional": lambda: ", ".join(f"{name} {_version(name)}" for name in EXTRAS),
    }
    return {name: _guarded(describe) for name, describe in rows.items()}


def main() -> None:
    rows = environment()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _guarded(describe: Callable[[], str]) -> str:
    # A report about a broken installation must survive whatever is broken.
    try:
        return describe()
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _package() -> str:
    from . import __version__

    return __version__


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _torch() -> str:
    import torch

    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    else:
        build = "CPU only"
    return f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)"


def _devices() -> Iterator[str]:
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "Apple MPS"


def _backends() -> str:
    import torch

    from .kernels import BlockMap, explain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device)
    dense = BlockMap.full(1, 1, 1, 1, query_block=128, key_block=128, device=device)
    return f"on {device} {explain(q, q, q, dense)}"


if __name__ == "__main__":
    main()
