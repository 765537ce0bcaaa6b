"""What the benchmarks share: a stopwatch, and the record that goes with every file of numbers."""

import json
import platform
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch


def milliseconds(function, iterations, warmup=3):
    """Median time of a call after `warmup` calls: CUDA events, or the clock where no GPU is."""
    for _ in range(warmup):
        function()
    measure = _on_gpu if torch.cuda.is_available() else _on_cpu
    return statistics.median(measure(function) for _ in range(iterations))


def about(**more):
    """On what and when numbers were taken, and `more` of how."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    cuda = torch.cuda.is_available()
    return dict(
        gpu=torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        torch=torch.__version__,
        triton=triton,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    )


def write_json(path, data):
    """Write `data` and its newline, folders included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def _on_gpu(function):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _on_cpu(function):
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)
