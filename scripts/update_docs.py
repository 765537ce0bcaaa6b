"""Write the tables of the documents from the presets and from the data in `benchmarks/`.

python scripts/update_docs.py            # rewrite
python scripts/update_docs.py --check    # fail if anything would change
"""

import argparse
import json
import re
import sys
from math import prod
from pathlib import Path
from statistics import mean

import model_report
from fidelity_report import (
    HEADER,
    drawing,
    groups,
    losses_in_8_bits,
    rows_of,
    title_of,
    usual_steps,
)

from dfsattn_diffusers import list_presets
from dfsattn_diffusers.configs import resolve_config
from dfsattn_diffusers.schedule import nominal_cost, refresh_steps, steps_of

ROOT = Path(__file__).parent.parent
STEPS = 50
# What a trial's line says of its grid.
TRIAL_GRIDS = {
    (17, 32, 32): "", (17, 22, 30): ", awkward grid", (17, 23, 31): ", awkward grid"
}  # fmt: skip


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def presets():
    rows, measured = [], preset_psnr()
    for name in list_presets():
        config = resolve_config(name)
        rows.append(
            [
                f"`{name}`",
                dense_steps(config),
                ", ".join(f"{ratio:g}" for ratio in config.keep_ratios),
                f"{config.query_block} x {config.key_block}",
                "one" if isinstance(config.order, str) else f"{len(config.order)}, by head",
                f"{config.tail}s of {config.tail_pool}" if config.tail else "dropped",
                residuals_of(config),
                f"{nominal_cost(config):.2f}",
                f"{measured[name]:.1f} dB" if name in measured else "",
            ]
        )
    header = ["preset", "dense steps", "kept ratios", "blocks", "curves", "the rest", "residuals"]
    return markdown([*header, "cost", "PSNR"], rows)


def dense_steps(config):
    start = f"first {steps_of(config.dense_fraction, STEPS)}"
    last = ", and the last" if config.last_step_dense else ""
    if config.residual_pool is None:
        return start + last
    first, second, *later = refresh_steps(config, STEPS)
    if config.refresh_growth > 1:
        return f"{start}, then {len(later) + 1} more{last}"
    return f"{start}, then every {second - first}th{last}"


def residuals_of(config):
    if config.residual_pool is None:
        return "none"
    shared = "" if config.residual_pool == 1 else f" of {config.residual_pool}"
    return f"{config.residual_rank or 'all'} directions{shared}"


def preset_psnr():
    """Mean over the cases of the largest grid of the package's tiny Wan, by preset as it is now."""
    runs = [run for run in fidelity_data()["runs"] if run["witness"] == "wan"]
    largest = max((prod(run["grid"]) for run in runs), default=0)
    measured = {}
    for run in runs:
        name = run["variant"].removeprefix("preset ")
        if name not in list_presets() or not run["cases"] or prod(run["grid"]) != largest:
            continue
        if resolve_config(run["config"]) == resolve_config(name, min_tokens=0):
            measured[name] = mean(case["psnr"] for case in run["cases"])
    return measured


def about(data):
    return (
        f"One {data['gpu']}, {data['dtype']}, torch {data['torch']}, triton {data['triton']}; "
        f"values new in each run, median of {data['iterations']}."
    )


def kernel_runs():
    paths = sorted((ROOT / "benchmarks").glob("kernel_*.json"))
    return [json.loads(path.read_text()) for path in paths]


def kernels():
    return "\n\n".join(map(kernel_table, kernel_runs()))


def tail():
    """What pools of 64 tokens add to a kernel's time, beside what they add to its products.

    At the lowest density: at others that is no more than two measurements differ by.
    """
    table = []
    for data in kernel_runs():
        alone, lowest = {}, min(row["density"] for row in data["rows"]) * 1.2
        for row in data["rows"]:
            if row["density"] > lowest:
                continue
            problem = row["shape"], row["density"], row.get("maps", "even")
            kernel = row["kernel"].partition(", tail of ")[0]
            if "pools" not in row:
                alone[(*problem, row["kernel"])] = row["ms"]
            elif (ms := alone.get((*problem, kernel))) is not None:
                added = row["ms"] / ms - 1
                cells = size_and_density(data, *problem)
                table.append(
                    [*cells, kernel, f"{ms:.2f}", f"{row['ms']:.2f}", f"{row['pools']:.1%}",
                     f"{added:.1%}", f"{added / row['pools']:.2f}"]
                )  # fmt: skip
    header = ["heads x tokens x head dim", "density", "kernel", "ms", "ms with pools"]
    return markdown([*header, "products added", "time added", "time to products"], table)


def size_and_density(data, shape, density, maps):
    size = " x ".join(f"{size:,}" for size in data["shapes"][shape])
    return size, f"{density:.2g}" + (", uneven" if maps == "uneven" else "")


def kernel_table(data):
    """One line for each problem, one column for each kernel."""
    measured = [row for row in data["rows"] if "pools" not in row]
    dense_first = sorted(measured, key=lambda row: row["density"] < 1)
    names = list(dict.fromkeys(row["kernel"] for row in dense_first))
    lines, dense, errors = {}, {}, {}
    for row in measured:
        maps = row.get("maps", "even")
        if row["density"] == 1:
            dense[row["shape"], maps] = {row["kernel"]: row}  # beside the densities that follow
            continue
        line = lines.setdefault((row["shape"], row["density"], maps), {})
        line |= {row["kernel"]: row} | dense.get((row["shape"], maps), {})
        if row.get("error") is not None:
            errors[row["kernel"]] = max(errors.get(row["kernel"], 0), row["error"])
    table = [
        [
            *size_and_density(data, *problem),
            *(
                f"{rows[name]['tflops']:.0f} ({rows[name]['ms']:.1f})" if name in rows else "-"
                for name in names
            ),
        ]
        for problem, rows in lines.items()
    ]
    header = ["heads x tokens x head dim", "density", *names]
    note = "Random maps; TFLOP/s of kept work, and ms."
    if errors:  # older files have none
        listed = "; ".join(f"{name} {error:.2%}" for name, error in errors.items())
        note += (
            " Largest errors relative to float32, Frobenius, over the query blocks compared: "
            f"{listed}."
        )
    return f"{about(data)} {note}\n\n{markdown(header, table)}"


def prologue():
    data = json.loads((ROOT / "benchmarks" / "prologue.json").read_text())
    rows = [
        [
            row["shape"],
            row["variant"],
            f"{row['ms']:.2f}",
            f"{row['gb_per_s']:,.0f}",
            f"{row['share_of_copy']:.0%}",
        ]
        for row in data["rows"]
        if row["kernel"] == "ours"
    ]
    header = ["shape", "output", "ms", "GB/s", "of the bandwidth of a copy"]
    return f"{about(data)}\n\n{markdown(header, rows)}"


def fidelity_data():
    path = ROOT / "benchmarks" / "fidelity.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def fidelity():
    data = fidelity_data()
    if not groups(data):
        return "Not measured yet: there is no `benchmarks/fidelity.json`."
    machine, settings = data["machine"], data["settings"]
    about = (
        f"{machine['gpu']}, torch {machine['torch']}, diffusers {machine['diffusers']}, "
        f"guidance {settings['guidance']:g}; {usual_steps(data)} steps where the name does not say "
        "otherwise. PSNR in dB and SSIM to the dense clip of the same seed, mean over cases; "
        "`worst` is the lowest PSNR of a case; `to the paper` is the mean paired difference in dB, "
        "with its 95 % bootstrap interval.\n\n"
        "![Quality against cost](fidelity.svg)"
    )
    panels = [
        f"### {title_of(witness, grid, runs)}\n\n{markdown(HEADER, rows_of(runs))}"
        for (witness, grid), runs in groups(data).items()
    ]
    return "\n\n".join([about, *panels])


def bits():
    return markdown(*losses_in_8_bits(fidelity_data()))


def trials():
    """A line for each idea and baseline, a column for each witness."""
    data = json.loads((ROOT / "benchmarks" / "trials.json").read_text())
    lines, names = {}, {}
    for run in data["runs"]:
        if "gain" not in run:
            continue  # a baseline
        where = TRIAL_GRIDS.get(tuple(run["grid"]))
        if where is None or abs(run["gain"]["relative_cost"] - 1) > 0.01:
            sys.exit(f"{run['variant']} of {run['witness']} has another grid or another cost")
        (low, high), gain = run["gain"]["interval"], run["gain"]["psnr"]
        names[run["witness"]] = None
        line = lines.setdefault(run["variant"] + where, {})
        line[run["witness"]] = f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]"
    rows = [
        [what, f"`{baseline.removeprefix('preset ')}`", *(line.get(name, "-") for name in names)]
        for (baseline, what), line in sorted(
            ((name.split(", ", 1), line) for name, line in lines.items()),
            key=lambda pair: pair[0][::-1],
        )
    ]
    return markdown(["idea", "in", *names], rows)


def model_data():
    path = ROOT / "benchmarks" / "model.json"
    return json.loads(path.read_text()) if path.exists() else {}


def models():
    data = model_data()
    records = [record for _, record, _, _ in model_report.whole_runs(data)]
    if not records:
        return "Not measured yet."
    software = {f"torch {x['torch']}, triton {x['triton']}" for x in records}
    return f"{'; '.join(sorted(software))}.\n\n{markdown(*model_report.runs(data))}"


def speed():
    return markdown(*model_report.fastest(model_data()))


def profile():
    return markdown(*model_report.profiles(model_data()))


# Each document's tables, by the name of the marks around them.
TABLES = {
    "README.md": {"speed": speed, "presets": presets},
    "docs/performance.md": {
        "kernels": kernels, "tail": tail, "prologue": prologue, "models": models,
        "profile": profile,
    },
    "docs/fidelity.md": {"fidelity": fidelity, "bits": bits, "trials": trials},
}
DRAWING = "docs/fidelity.svg"


def updated(path, text):
    for name, table in TABLES[path].items():
        marks = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        if not marks.search(text):
            sys.exit(f"{path} has no place marked <!-- {name} --> ... <!-- /{name} -->")
        new = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = marks.sub(lambda _, new=new: new, text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail on differences")
    args = parser.parse_args()
    paths = list(TABLES)
    if fidelity_data()["runs"]:
        paths.append(DRAWING)
    for path in paths:
        old = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        new = drawing(fidelity_data()) if path == DRAWING else updated(path, old)
        if args.check and new != old:
            sys.exit(f"{path} does not match the data: run python scripts/update_docs.py")
        if not args.check:
            (ROOT / path).write_text(new)


if __name__ == "__main__":
    main()
