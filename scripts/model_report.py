"""Tables of the data of `benchmark_model.py`: whole runs, fastest ones, where a step's time goes.

Each function takes the data and returns a header and rows. What was measured under a preset's name
that has other settings by now is left out.
"""

from benchmark_tools import BASELINES, config_named
from step_profile import PARTS

from dfsattn_diffusers import list_presets
from dfsattn_diffusers.configs import resolve_config


def _is_current(record, label):
    return resolve_config(record["settings"][label]) == config_named(label)


def whole_runs(data):
    """Name, record, label and seconds of each whole run."""
    for name, record in data.items():
        for label, seconds in record.get("composed_s", {}).items():
            if _is_current(record, label):
                yield name, record, label, seconds


def runs(data):
    """A row for each model and preset."""
    rows = []
    for name, record, label, seconds in whole_runs(data):
        ours = seconds["ours"]
        dense = [
            f"{seconds[way]:.0f} (x {seconds[way] / ours:.2f})" if way in seconds else ""
            for way in BASELINES
        ]
        gpu = record["gpu"].removeprefix("NVIDIA ")
        really = record.get("whole_run_s", {}).get(label)
        times = [f"{ours:.0f}", "" if really is None else f"{really:.0f}", *dense]
        rows.append([name, size_of(record), record["steps"], gpu, f"`{label}`", *times])
    header = ["model", "frames x height x width", "steps", "GPU", "preset"]
    header += ["DFSAttn, s", "really run, s"]
    return [*header, *(f"{way.replace(',', '')}, s" for way in BASELINES)], rows


def fastest(data):
    """Each model's fastest preset, and the same in int8, where an H200 ran it."""
    timed, took = {}, {}
    for name, record, label, seconds in whole_runs(data):
        took[name, label] = seconds["ours"]
        if record["gpu"].endswith("H200") and label in list_presets():
            timed.setdefault(name, []).append((seconds["ours"], label, record, seconds))
    rows = []
    for name, presets in timed.items():
        ours, preset, record, seconds = min(presets)
        shipped = seconds.get("dense, as shipped", seconds["dense"])
        cudnn = seconds["dense, cuDNN"]
        source = record["source"].split("/")[-1].removesuffix("-Diffusers")
        row = [source, size_of(record), f"{shipped / 60:.1f} min", f"{cudnn / 60:.1f} min"]
        eight = took.get((name, f"{preset}, int8"))
        eight = f"{eight / 60:.1f} min (x {shipped / eight:.1f})" if eight else ""
        row += [f"**{ours / 60:.1f} min** (`{preset}`)", f"x {shipped / ours:.1f}", eight]
        rows.append(row)
    header = ["model", "frames x height x width", "diffusers", "its cuDNN backend", "DFSAttn"]
    return [*header, "speed-up", "in 8 bits"], rows


def profiles(data):
    """Seconds of one step of each kind, by what takes them."""
    rows = []
    for name, record in data.items():
        for label, steps in record.get("profile", {}).items():
            if label in BASELINES or _is_current(record, label):
                rows += profile_rows(name, label, steps)
    return ["model", "step", *PARTS, "together"], rows


def profile_rows(name, label, steps):
    """Of one model and baseline or preset."""
    rows = []
    for kind, parts in steps.items():
        seconds = [parts[part] / 1000 for part in PARTS]
        step = label if label in BASELINES else f"`{label}`, {kind}"
        rows.append([name, step, *(f"{x:.2f}" for x in [*seconds, sum(seconds)])])
    return rows


def size_of(record):
    return " x ".join(map(str, record["size"]))
