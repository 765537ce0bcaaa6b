"""Ideas that no preset has: each beside the baseline of the same cost that it changes.

    python scripts/fidelity_trials.py --output outputs/trials.json --witnesses wan --grids 17x32x32

Arguments and rows are those of benchmark_fidelity.py; a row also has what its idea is, what was
found for it (shares of the budget, or the number at which the cost is the baseline's), and the
paired difference to the baseline with its 95 % interval. What has to be found is found on prompts
and seeds of its own, but for numbers that only set the cost. A trial that fails leaves an error on
the screen and no row; the same command goes on where the last one was cut or failed.
"""

import inspect
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import mean
from unittest import mock

import benchmark_fidelity
import fidelity_report
import trial_ideas as ideas
from benchmark_fidelity import Benchmark
from benchmark_tools import write_json
from fidelity_variants import VARIANTS, Variant
from trial_probe import Probe, at_cost

EQUAL = 0.01  # difference in cost, relative, that passes for none
PRESETS = ("preset fast", "preset turbo")
BASELINES = ("paper", *PRESETS)


@dataclass(frozen=True)
class Trial:
    """An idea, and the variant that it changes.

    Attributes:
        baseline: Name of the variant.
        idea: Of `trial_ideas`; takes the baseline's `Probe`, or a number if `between` is given.
        changes: Config fields.
        between: Numbers between which the one that gives the baseline's cost is searched.
    """

    baseline: str
    idea: callable = ideas.unchanged
    changes: dict = field(default_factory=dict)
    between: tuple | None = None

    @property
    def variant(self):
        old = VARIANTS[self.baseline]
        return Variant(old.preset, old.changes | self.changes, reference=self.baseline)

    @property
    def meaning(self):
        return inspect.getdoc(getattr(self.idea, "func", self.idea))


def _of_presets(what, idea=ideas.unchanged, among=PRESETS, between=None, **changes):
    return {f"{name}, {what}": Trial(name, idea, changes, between) for name in among}


def _curves(*names):
    return dict(order=("hilbert3d", *names))


_PLANES = ("hilbert2d", "hilbert_fw", "hilbert_fh")
_MOMENTS, _LAYERS = ideas.second_moment_scores, ideas.of_layer
_LOSS, _ERROR, _DRIFT = ideas.budget_by_loss, ideas.budget_by_error, ideas.refresh_on_drift
TRIALS = {
    # 1. The budget over layers and over steps.
    **_of_presets("layers by loss", partial(_LOSS, group=_LAYERS), BASELINES),
    **_of_presets("layers by dropped mass", partial(_ERROR, of_residual=False), BASELINES),
    **_of_presets("layers by residual", partial(_ERROR, of_residual=True)),
    **_of_presets("steps by loss", partial(_LOSS, group=ideas.of_interval), BASELINES),
    **_of_presets("one threshold", ideas.one_threshold, between=(1e-5, 10.0)),
    # 2. Refresh when something has drifted.
    **_of_presets(
        "refresh when tiles drift", partial(_DRIFT, drift=ideas.tile_drift), between=(1e-5, 2.0)
    ),
    **_of_presets(
        "refresh when maps drift", partial(_DRIFT, drift=ideas.map_drift), between=(0.01, 1.0)
    ),
    # 3. Second moments in scores.
    **_of_presets("scores with moments of keys", partial(_MOMENTS, of_queries=False), BASELINES),
    **_of_presets("scores with moments of both", partial(_MOMENTS, of_queries=True), BASELINES),
    # 4. A dense last step; one for one at the start is a variant.
    **_of_presets("dense last step, intervals stretched", ideas.last_refresh_at_the_end),
    # 5. Curves: other axes, awkward grids, fewer and more of them.
    **{
        key: trial
        for curve in (ideas.width_first, ideas.height_first, ideas.stretched, ideas.squeezed)
        for key, trial in _of_presets(
            f"curve {curve.__name__.replace('_', ' ')}",
            partial(ideas.other_hilbert, curve=curve),
            BASELINES,
        ).items()
    },
    **_of_presets(
        "boxes by halving", partial(ideas.other_hilbert, curve=ideas.halved), BASELINES
    ),
    **_of_presets("1 curve", **_curves()),
    **_of_presets("2 curves", **_curves("hilbert2d")),
    **_of_presets("3 curves", **_curves("hilbert_fw", "hilbert_fh")),
    **_of_presets("5 curves", **_curves(*_PLANES, "cuboid")),
    **_of_presets("6 curves", **_curves(*_PLANES, "cuboid", "raster")),
    # 6. Guidance branches apart; some of the residuals renewed between the others.
    **_of_presets("branches by loss", partial(_LOSS, group=ideas.of_branch), BASELINES),
    **_of_presets("layers staggered", partial(ideas.staggered, group=_LAYERS)),
    **_of_presets("branches staggered", partial(ideas.staggered, group=ideas.of_branch)),
}


class TrialBenchmark(Benchmark):
    """Runs trials after the baselines that they need; one that fails stops no other."""

    def __init__(self, args, witnesses):
        super().__init__(args, witnesses)
        self._probes, self._exact = {}, {}

    def run(self):
        """Do what is missing until the time is over; tells if all is done."""
        args, witnesses, longest = self.args, self.witnesses, 0.0
        end = time.perf_counter() + args.seconds
        names = [TRIALS[name].baseline for name in args.variants if name in TRIALS]
        names = dict.fromkeys([*names, *args.variants])
        done, failed, asked = True, [], args.grids
        for name, witness in product(names, witnesses):
            for grid in asked or witnesses[witness].family.grids:
                began = time.perf_counter()
                if began + longest > end:
                    print("time is over: run the same command again to go on", flush=True)
                    return False
                args.variants, args.grids, args.seconds = [name], [grid], end - began
                self.witnesses = {witness: witnesses[witness]}
                try:
                    done &= super().run()
                    self._compare(name, witness, grid)
                except Exception:
                    traceback.print_exc()
                    failed.append(f"{witness}: {name}")
                    self.data["runs"] = [run for run in self.data["runs"] if run["cases"]]
                longest = max(longest, time.perf_counter() - began)
        print(*(f"failed: {what}" for what in failed), sep="\n", flush=True)
        return done and not failed

    def _measure(self, name, witness, grid, cases):
        measure, trial = partial(super()._measure, name, witness, grid, cases), TRIALS.get(name)
        if trial is None:
            return measure()
        run = self._run_of(name, witness, grid)
        run["idea"] = trial.meaning
        if trial.between:
            wanted = self._run_of(trial.baseline, witness, grid)["cases"][cases.start]["cost"]
            run["found"], result = at_cost(trial, measure, wanted)
            return result
        key = trial.baseline, witness, grid
        if key not in self._probes:
            self._probes[key] = Probe(self, *key, self._exact)
        with trial.idea(self._probes[key]) as run["found"]:
            return measure()

    def _run_of(self, name, witness, grid):
        at = name, witness, list(grid)
        runs = self.data["runs"]
        return next(r for r in runs if (r["variant"], r["witness"], r["grid"]) == at)

    def _compare(self, name, witness, grid):
        """Write beside a trial what it gains on its baseline, and say so."""
        trial, run = TRIALS.get(name), self._run_of(name, witness, grid)
        if trial is None or not run["cases"]:
            return
        pairs = list(zip(run["cases"], self._run_of(trial.baseline, witness, grid)["cases"]))
        gains = [ours["psnr"] - theirs["psnr"] for ours, theirs in pairs]
        cost = mean(ours["cost"] / theirs["cost"] for ours, theirs in pairs)
        low, high = fidelity_report.interval(gains)
        run["gain"] = {"psnr": mean(gains), "interval": [low, high], "relative_cost": cost}
        write_json(self.args.output, self.data)
        note = "" if abs(cost - 1) <= EQUAL else ", NOT AT EQUAL COST"
        gain = f"{mean(gains):+.2f} dB [{low:+.2f}, {high:+.2f}]"
        print(f"    {gain} at {cost:.4f} of the cost of {trial.baseline}{note}", flush=True)


@contextmanager
def _trials_in_place():
    """The fidelity benchmark measures trials and their baselines, and nothing else."""
    variants = {name: VARIANTS[name] for name in BASELINES}
    variants |= {name: trial.variant for name, trial in TRIALS.items()}
    header = [name.replace("the paper", "baseline") for name in fidelity_report.HEADER]
    with (
        mock.patch.dict(VARIANTS, variants, clear=True),
        mock.patch.object(fidelity_report, "HEADER", header),
        mock.patch.object(benchmark_fidelity, "Benchmark", TrialBenchmark),
    ):
        yield


def main(argv=None):
    with _trials_in_place():
        benchmark_fidelity.main(argv)


if __name__ == "__main__":
    main()
