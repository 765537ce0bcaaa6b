"""What trials have to know first: what their baseline does and loses, and at which number it costs.
"""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from unittest import mock

import torch
from benchmark_fidelity import SEED, config_of
from fidelity_variants import VARIANTS
from procedural_clips import PLAIN, ClipSource
from trial_ideas import deciding

from dfsattn_diffusers import enable_dfsattn
from dfsattn_diffusers.processors import base
from dfsattn_diffusers.selection import row_budget
from dfsattn_diffusers.state import DFSAttnState

PROBE_CASES = 4
FIRST_SEED = 1000  # of the probe's noise
CLOSE = 0.003  # of the baseline's cost: there the search ends
ATTEMPTS = 12


class Probe:
    """What a baseline does and loses on a few cases that are not measured.

    Args:
        benchmark: Whose witnesses and settings these are.
        name: Of the baseline.
        witness: Name of the witness.
        grid: Tokens.
        exact: Dense latents by witness and grid, shared by baselines.
    """

    def __init__(self, benchmark, name, witness, grid, exact):
        self._variant, self._witness = VARIANTS[name], benchmark.witnesses[witness]
        scenes = ClipSource(SEED + 1, torch.device("cpu"), PLAIN).scenes(PROBE_CASES)
        seeds = range(FIRST_SEED, FIRST_SEED + PROBE_CASES)
        args = benchmark.args
        self._cases = [s.caption for s in scenes], seeds, grid, args.steps, args.guidance
        if (witness, grid) not in exact:
            exact[witness, grid] = self._witness.generate(*self._cases)
        self._exact = exact[witness, grid]
        self.blocks = -(-math.prod(grid) // config_of(self._variant)["key_block"])

    def budget(self, keep_ratio):
        """Key blocks of a row."""
        return row_budget(keep_ratio, self.blocks)

    @cached_property
    def calls(self):
        """Decision, layer and branch of every sparse call."""
        calls = []

        def note(decision, state, layer, batch):
            calls.append((decision, layer, state.forward.position.branch))
            return decision

        self._run(deciding(note))
        return calls

    @cached_property
    def _loss(self):
        return self._run(nullcontext())

    def losses(self, group):
        """Of each group of calls, how much the log of the error rises if it keeps half."""
        losses = {}
        for chosen in {group(*call) for call in self.calls}:

            def halve(decision, state, layer, batch, chosen=chosen):
                mine = group(decision, layer, state.forward.position.branch) == chosen
                ratio = decision.keep_ratio
                return replace(decision, keep_ratio=ratio / 2 if mine else ratio)

            losses[chosen] = self._run(deciding(halve)) - self._loss
        return losses

    def errors(self, of_residual):
        """Of each layer, its dropped mass in all refreshes, or its residuals' relative energy."""
        errors, lacks = Counter(), []
        store, measure = DFSAttnState.store, base.measure_residual

        def measured(exact, out, *rest):
            lacks.append((exact - out).float().square().sum() / exact.float().square().sum())
            return measure(exact, out, *rest)

        def stored(state, layer, batch, segment, selected, kept):
            errors[layer] += lacks.pop() if of_residual else 1 - selected.recall
            return store(state, layer, batch, segment, selected, kept)

        with (
            mock.patch.object(base, "measure_residual", measured),
            mock.patch.object(DFSAttnState, "store", stored),
        ):
            self._run(nullcontext())
        return {layer: float(error) for layer, error in errors.items()}

    def _run(self, idea):
        variant = self._variant
        with enable_dfsattn(self._witness.pipe, variant.preset, **variant.changes), idea:
            latents = self._witness.generate(*self._cases)
        return float((latents - self._exact).square().flatten(1).mean(1).log().mean())


def at_cost(trial, measure, wanted):
    """The number at which the cost is as wanted, by its name, and the cases measured there."""
    low, high = ((math.log(number), None) for number in trial.between)
    best = math.inf, None, None
    for _ in range(ATTEMPTS):
        part = 0.5
        if low[1] is not None and high[1] is not None and low[1] != high[1]:
            part = min(0.9, max(0.1, low[1] / (low[1] - high[1])))
        at = low[0] + part * (high[0] - low[0])
        with trial.idea(math.exp(at)):
            cases = measure()
        off = cases[0]["cost"] / wanted - 1
        best = min(best, (abs(off), math.exp(at), cases), key=lambda found: found[0])
        if abs(off) <= CLOSE:
            break
        low, high = ((at, off), high) if off > 0 else (low, (at, off))
    return {"number": best[1]}, best[2]
