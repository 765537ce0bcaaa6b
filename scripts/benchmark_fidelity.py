"""How close sparse generations stay to the dense ones, at which cost: same seeds, paired cases.

    python scripts/benchmark_fidelity.py --output benchmarks/fidelity.json --seconds 560

Every result is written as soon as it is there; the same command goes on where the last one was
cut, and `--variants` or more `--cases` extend the file. The first variants of `fidelity_variants`
come first. Several GPUs share the work by `--witnesses`, each with a copy of the file; `--merge`
adds the copies up. Cost is the attention arithmetic of the whole run relative to dense, dense
steps included.
"""

import argparse
import hashlib
import json
import sys
import time
from contextlib import nullcontext
from itertools import product
from math import prod
from pathlib import Path
from statistics import mean

import diffusers
import torch
from benchmark_tools import about, completed, write_json
from fidelity_report import print_table
from fidelity_variants import VARIANTS
from procedural_clips import PLAIN, ClipSource
from rivals import RIVALS, in_place_of_ours
from torch.nn.attention import SDPBackend, sdpa_kernel
from witness_families import FAMILIES
from witnesses import Witness

from dfsattn_diffusers import __version__, enable_dfsattn
from dfsattn_diffusers.analysis import record_attention, to_rows
from dfsattn_diffusers.configs import resolve_config
from dfsattn_diffusers.metrics import psnr, ssim

SEED = 4321  # of the prompts; case number i starts from noise of seed i
SAME = 99.0  # dB written for equal clips, so that means stay finite


class Benchmark:
    """Runs and keeps the units of work: some cases of one variant, witness and grid.

    Args:
        args: Of the command line.
        witnesses: `Witness` by name.
    """

    def __init__(self, args, witnesses):
        self.args, self.witnesses = args, witnesses
        self.device = next(iter(witnesses.values())).device
        scenes = ClipSource(SEED, torch.device("cpu"), PLAIN).scenes(args.cases)
        self.prompts = [scene.caption for scene in scenes]
        self.data = self._open()
        self.dense = {}

    def run(self):
        """Do what is missing until the time is over; tells if all is done."""
        start, longest = time.perf_counter(), 0.0
        places = [
            (name, grid)
            for name, witness in self.witnesses.items()
            for grid in self.args.grids or witness.family.grids
        ]
        units = [(variant, *place) for variant, place in product(self.args.variants, places)]
        for number, (variant, witness, grid) in enumerate(units, 1):
            entry = self._entry(variant, witness, grid)
            while entry and len(entry["cases"]) < self.args.cases:
                began = time.perf_counter()
                if began - start + longest > self.args.seconds:
                    print("time is over: run the same command again to go on", flush=True)
                    return False
                first = len(entry["cases"])
                cases = range(first, min(first + self.args.batch, self.args.cases))
                entry["cases"] += self._measure(variant, witness, grid, cases)
                write_json(self.args.output, self.data)
                longest = max(longest, time.perf_counter() - began)
                mean = sum(case["psnr"] for case in entry["cases"]) / len(entry["cases"])
                print(
                    f"[{time.perf_counter() - start:5.0f} s, {number} of {len(units)}] {witness} "
                    f"{format_grid(grid)} {variant}: {mean:.2f} dB at cost "
                    f"{entry['cases'][-1]['cost']:.3f}",
                    flush=True,
                )
        return True

    def _open(self):
        machine = {key: value for key, value in about().items() if key != "date"}
        machine |= {"diffusers": diffusers.__version__, "dfsattn_diffusers": __version__}
        settings = {"guidance": self.args.guidance, "prompt_seed": SEED}
        new = {"machine": machine, "settings": settings, "prompts": self.prompts, "runs": []}
        if not self.args.output.exists():
            return new
        data = json.loads(self.args.output.read_text())
        # Every unit has a dense reference of the same GPU.
        gpus = dict.fromkeys([*data["machine"]["gpu"].split(", "), machine["gpu"]])
        machine["gpu"] = ", ".join(gpus)
        data["machine"]["gpu"] = machine["gpu"]
        for name in ("machine", "settings"):
            if data[name] != new[name]:
                sys.exit(
                    f"{self.args.output} was measured with {name} {data[name]}, this is "
                    f"{new[name]}: name another --output"
                )
        for run in data["runs"]:
            run["config"] = completed(run["config"])
        data["prompts"] = max(data["prompts"], self.prompts, key=len)
        return data

    def _entry(self, name, witness, grid):
        """The record of a unit, fresh if its settings changed; None if they are unknown here."""
        variant = VARIANTS[name]
        try:
            config = config_of(variant)
        except (TypeError, ValueError) as error:
            print(f"skipped {name}: {error}", flush=True)
            return None
        entry = {
            "variant": name,
            "witness": witness,
            "weights": self.witnesses[witness].fingerprint,
            "grid": list(grid),
            "steps": variant.steps or self.args.steps,
            "reference": variant.reference,
            "rival": variant.rival,
            "config": config,
        }
        for index, run in enumerate(self.data["runs"]):
            if all(run[key] == entry[key] for key in ("variant", "witness", "grid")):
                if all(run[key] == value for key, value in entry.items()):
                    return run
                del self.data["runs"][index]
                break
        entry["cases"] = []
        self.data["runs"].append(entry)
        return entry

    def _measure(self, name, witness, grid, cases):
        variant = VARIANTS[name]
        steps = variant.steps or self.args.steps
        reference = self._reference(witness, grid, steps, cases)
        began = time.perf_counter()
        cost, recall, rows = 1.0, None, []
        if variant.preset is None:
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                latents = self._generate(witness, grid, steps, cases)
        else:
            rival = RIVALS.get(variant.rival)
            pipe = self.witnesses[witness].pipe
            with (
                enable_dfsattn(pipe, variant.preset, **variant.changes) as handle,
                in_place_of_ours(rival) if rival else nullcontext() as costs,
                # A rival's choice is not what our observer sees.
                record_attention(handle, queries=1, steps=() if rival else sampled(steps)) as calls,
            ):
                latents = self._generate(witness, grid, steps, cases)
            rows = to_rows(calls)
            report = handle.report().runs[-1]
            cost, recall = report.density, report.recall
            if rival:
                # The report knows the dense calls only.
                exact = report.calls["dense"]
                cost = (float(sum(costs)) + exact) / (len(costs) + exact)
        seconds = time.perf_counter() - began
        common = {"cost": cost, "recall": recall, "seconds": seconds / len(cases)}
        for name, column in (("recall_sampled", "recall"), ("recall_bound", "bound_tiles")):
            common[name] = mean(row[column] for row in rows) if rows else None
        clips = self.witnesses[witness].decode(latents)
        return [
            {
                "prompt": self.prompts[case],
                "seed": case,
                "psnr": min(SAME, psnr(clip, dense)),
                "ssim": ssim(clip, dense),
                **common,
            }
            for case, clip, dense in zip(cases, clips, reference)
        ]

    def _reference(self, witness, grid, steps, cases):
        """Dense clips, made once: in memory, and as latents in the cache folder."""
        weights = self.witnesses[witness].fingerprint
        what = about()["gpu"], self.data["machine"], self.data["settings"], weights
        where = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
        key = f"{witness}_{format_grid(grid)}_{steps}_{cases.start}-{cases.stop}_{where}"
        if key not in self.dense:
            path = self.args.cache / f"{key}.pt"
            if path.exists():
                latents = torch.load(path).to(self.device)
            else:
                latents = self._generate(witness, grid, steps, cases)
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(latents.cpu(), path)
            self.dense[key] = self.witnesses[witness].decode(latents).cpu()
        return self.dense[key].to(self.device)

    def _generate(self, witness, grid, steps, cases):
        prompts = [self.prompts[case] for case in cases]
        return self.witnesses[witness].generate(prompts, cases, grid, steps, self.args.guidance)


def sampled(steps):
    """Steps whose recall is measured: each is some milliseconds a call."""
    return range(steps // 8, steps, max(1, steps // 6))


def merge(path, parts):
    """Add what copies of a file hold to it; of one unit that with the most cases stays.

    What other settings than a variant's present ones gave is left out.
    """
    files = {name: json.loads(name.read_text()) for name in (path, *parts)}
    data, gpus, units = files[path], [], {}
    for name, part in files.items():
        gpus += part["machine"].pop("gpu").split(", ")
        for what in ("machine", "settings", "prompts"):
            if part[what] != data[what]:
                sys.exit(f"{name} has other {what} than {path}: {part[what]}, not {data[what]}")
        for run in filter(is_current, part["runs"]):
            unit = run["witness"], tuple(run["grid"]), run["variant"]
            if unit not in units or len(run["cases"]) > len(units[unit]["cases"]):
                units[unit] = run
    places = {name: place for place, name in enumerate([*FAMILIES, *VARIANTS])}
    order = sorted(units, key=lambda unit: (places[unit[0]], -prod(unit[1]), places[unit[2]]))
    data["machine"]["gpu"] = ", ".join(dict.fromkeys(gpus))
    write_json(path, data | {"runs": [units[unit] for unit in order]})


def is_current(run):
    """Whether a variant of that name would be measured like this."""
    variant = VARIANTS.get(run["variant"])
    if variant is None:
        return False
    return (run["rival"], completed(run["config"])) == (variant.rival, config_of(variant))


def config_of(variant):
    """All fields of its config; None where nothing of ours runs."""
    if variant.preset is None:
        return None
    return resolve_config(variant.preset, **variant.changes).to_dict()


def format_grid(grid):
    return "x".join(map(str, grid))


def parse_grid(text):
    grid = tuple(int(size) for size in text.split("x"))
    if len(grid) != 3 or min(grid) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no grid like 17x32x32")
    return grid


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON file to write or to extend")
    add("--cache", type=Path, default=Path("outputs/fidelity"), help="folder of dense latents")
    add("--witnesses", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    add("--folder", type=Path, help="folder of the witnesses' folders, to take them from there")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add(
        "--grids",
        nargs="+",
        type=parse_grid,
        metavar="FxHxW",
        help="tokens; by default those of the training's largest clips, and an awkward grid",
    )
    add("--cases", type=int, default=8, help="pairs of prompt and seed")
    add("--batch", type=int, default=8, help="cases in one call")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, default=4.0)
    add("--seconds", type=float, default=1e9, help="start nothing that would end later than this")
    add("--list", action="store_true", help="print the data's table and measure nothing")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="add these to the data, no more")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.merge:
        merge(args.output, args.merge)
        return
    if args.list:
        print_table(json.loads(args.output.read_text()))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    witnesses = {
        name: Witness(name, device, args.folder / name if args.folder else None)
        for name in args.witnesses
    }
    benchmark = Benchmark(args, witnesses)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = benchmark.run()
    print_table(benchmark.data)
    print("all is measured" if done else "not all is measured yet")


if __name__ == "__main__":
    main()
