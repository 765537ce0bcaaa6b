"""What the benchmarks share: a stopwatch, and the record that goes with every file of numbers."""

import json
import platform
import statistics
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from dfsattn_diffusers.configs import resolve_config

# All attention in 8 bits, dense and sparse; or all but what corrections are measured by.
FP8 = dict(precision="fp8", dense_precision="fp8")
CHANGES = {
    "fp8": FP8,
    "fp8 but corrections": FP8 | {"correction_precision": "full"},
    "int8": dict(precision="int8", dense_precision="int8"),
}

# Dense baselines: diffusers' attention backend, and whether padding is trimmed first.
BASELINES = {
    "dense, as shipped": ("native", False),
    "dense": ("native", True),
    "dense, cuDNN": ("_native_cudnn", True),
}


def config_named(label):
    """A preset, or one with a change of `CHANGES`: "PRESET, fp8"."""
    preset, _, change = label.partition(", ")
    return resolve_config(preset, **CHANGES[change] if change else {})


def completed(config):
    """A config as it was written, with the defaults of fields that came later."""
    return None if config is None else resolve_config(config).to_dict()


def milliseconds(function, iterations, warmup=3, before=None):
    """Median time of a call after `warmup` calls: CUDA events, or the clock where no GPU is.

    `before` is called ahead of each timed call; work it leaves the GPU hides the host's time.
    """
    for _ in range(warmup):
        function()
    measure = _on_gpu if torch.cuda.is_available() else _on_cpu
    times = []
    for _ in range(iterations):
        if before is not None:
            before()
        times.append(measure(function))
    return statistics.median(times)


def device_ms(function, iterations):
    """Of a call on the GPU alone: behind other work, which outlasts what the host does for it."""
    other = torch.empty(2**30, device="cuda", dtype=torch.uint8)

    def occupy():
        for _ in range(8):
            other.zero_()

    return milliseconds(function, iterations, before=occupy)


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


class OutOfTime(Exception):
    """There is no time left to begin another measurement."""


class Record:
    """Samples of one subject in a file of several, written one by one; a later call adds to them.

    Samples of another GPU or release of torch or triton are dropped, not mixed with new ones.

    Args:
        path: JSON file.
        name: Of the subject.
        deadline: On the clock of `time.monotonic`.
        iterations: Samples wanted of each kind.
    """

    def __init__(self, path, name, deadline, iterations):
        self._path, self._name = Path(path), name
        self._deadline, self._iterations = deadline, iterations
        here, old = about(), self._read().get(name, {})
        same = all(old.get(key) == here[key] for key in ("gpu", "torch", "triton"))
        self.data = old if same else here | {"ms": {}, "peak_gib": {}}

    def lacks(self, key):
        return len(self.data["ms"].get(key, ())) < self._iterations

    def follow(self, name, settings):
        """Drop what was measured under this name with other settings."""
        known = self.data.setdefault("settings", {})
        if completed(known.get(name)) == settings:
            return
        known[name] = settings
        ms = self.data["ms"]
        # Keys end in two words for the kind of step; one name may begin with another.
        self.data["ms"] = {key: ms[key] for key in ms if key.rsplit(" ", 2)[0] != name}
        for kept in ("composed_s", "whole_run_s", "peak_gib", "profile"):
            self.data.get(kept, {}).pop(name, None)

    def check_time(self):
        if time.monotonic() > self._deadline:
            raise OutOfTime

    def time(self, key, function):
        """Add one sample."""
        self.check_time()
        self.data["ms"].setdefault(key, []).append(milliseconds(function, 1, warmup=0))
        self.save(date=about()["date"])

    @contextmanager
    def peak_memory(self, key):
        """Note the most GPU memory that was in use, in GiB, if all goes well."""
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        yield
        self.save(peak_gib=self.data["peak_gib"] | {key: torch.cuda.max_memory_allocated() / 2**30})

    def save(self, **more):
        self.data |= more
        write_json(self._path, self._read() | {self._name: self.data})

    def _read(self):
        return json.loads(self._path.read_text()) if self._path.exists() else {}


class Rows:
    """Rows of one run, in its file as soon as they are there; whatever it held before is lost.

    Args:
        path: JSON file; None writes nothing.
        about: What stands above the rows.
    """

    def __init__(self, path, about):
        self._path, self._about, self.rows = path, about, []

    def add(self, row):
        self.rows.append(row)
        if self._path is not None:
            write_json(self._path, self._about | {"rows": self.rows})


def write_json(path, data):
    """Write `data` and its newline, folders included; never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    new.replace(path)


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
