"""Trials of ideas: each changes what it says, at its baseline's cost, and the rows are written."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny_pipelines import FAMILIES, run

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_fidelity  # noqa: E402
import fidelity_trials  # noqa: E402
import trial_ideas as ideas  # noqa: E402
import trial_probe  # noqa: E402
from fidelity_trials import TRIALS, Trial  # noqa: E402
from fidelity_variants import VARIANTS, Variant  # noqa: E402
from test_witness import random_witness  # noqa: E402

from dfsattn_diffusers import curves, enable_dfsattn  # noqa: E402
from dfsattn_diffusers.kernels import BlockMap  # noqa: E402
from dfsattn_diffusers.kernels.prologue import Stream  # noqa: E402
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout  # noqa: E402
from dfsattn_diffusers.score import score_blocks  # noqa: E402
from dfsattn_diffusers.state import DFSAttnState  # noqa: E402

GRID, STEPS = (4, 8, 10), 16
BLOCKS = dict(tile_size=4, query_block=16, key_block=16, tail_pool=8, min_tokens=0)
SPARSE = BLOCKS | dict(keep_ratios=(0.3,), dense_fraction=0.1)
SPARSE |= dict(refresh_interval=0.25, refresh_growth=1.0)
BASELINE = Variant("fast", SPARSE)


class Tiny:
    """A witness of the tests' pipelines."""

    def __init__(self, family):
        torch.manual_seed(0)
        self.pipe = FAMILIES[family]()

    def generate(self, prompts, seeds, grid, steps, guidance):
        return run(self.pipe, steps=steps, grid=grid)


@pytest.fixture(scope="module")
def wan():
    return Tiny("wan")


@pytest.fixture(scope="module")
def probe(wan):
    with mock.patch.dict(VARIANTS, tiny=BASELINE):
        made = probe_of(wan)
        assert made.calls  # noted now: tests stub its runs
        yield made


def probe_of(witness):
    args = SimpleNamespace(steps=STEPS, guidance=4.0)
    stub = SimpleNamespace(witnesses={"tiny": witness}, args=args)
    return trial_probe.Probe(stub, "tiny", "tiny", GRID, {})


def watch(witness, idea, variant=BASELINE):
    """What a run under an idea did: its calls by layer and branch, density by layer, and cost."""
    decide, store, calls, density = DFSAttnState.decide, DFSAttnState.store, {}, Counter()

    def decided(state, layer, batch):
        decision, position = decide_now(state, layer, batch), state.forward.position
        calls.setdefault((layer, position.branch), []).append(decision)
        return decision

    def stored(state, layer, batch, segment, selection, kept):
        density[layer] += float(selection.density)
        density["steps"] += isinstance(selection.block_map, BlockMap)
        return store(state, layer, batch, segment, selection, kept)

    with idea as found, enable_dfsattn(witness.pipe, "fast", **variant.changes) as handle:
        decide_now = DFSAttnState.decide
        with mock.patch.multiple(DFSAttnState, decide=decided, store=stored):
            video = run(witness.pipe, steps=STEPS, grid=GRID)
    assert DFSAttnState.decide is decide
    cost = handle.report().runs[-1].density
    return SimpleNamespace(calls=calls, density=density, cost=cost, video=video, found=found)


@pytest.fixture(scope="module")
def plain(wan):
    return watch(wan, ideas.unchanged(None))


def refreshes(watched):
    """Steps of refreshes by layer and branch."""
    return {
        key: [step for step, decision in enumerate(calls) if decision.mode == "refresh"]
        for key, calls in watched.calls.items()
    }


def test_budget_over_layers(wan, plain, probe):
    assert plain.density[0] == pytest.approx(plain.density[1])
    for idea in (
        ideas.budget_by_error(probe, of_residual=False),
        ideas.budget_by_error(probe, of_residual=True),
        ideas._rationed(probe, ideas.of_layer, {0: 9.0, 1: 1.0}),
    ):
        ours = watch(wan, idea)
        assert ours.cost == pytest.approx(plain.cost, rel=0.01)
        assert set(ours.found) == {"0", "1"}
        more, less = sorted((0, 1), key=lambda layer: -ours.found[str(layer)])
        if ours.found[str(more)] > 1.2 * ours.found[str(less)]:
            assert ours.density[more] > ours.density[less]
    # Three times as much, but for the limits.
    assert ours.density[0] > 1.5 * ours.density[1]


def test_budget_by_loss_over_layers_steps_and_branches(wan, plain, probe, monkeypatch):
    seen = {ideas.of_layer: {}, ideas.of_interval: {}, ideas.of_branch: {}}
    for group in seen:
        losses = iter((4.0, 1.0, -1.0, 1.0, 1.0))
        monkeypatch.setattr(trial_probe.Probe, "_run", lambda *_, losses=losses: next(losses))
        monkeypatch.setitem(probe.__dict__, "_loss", 0.0)
        ours = watch(wan, ideas.budget_by_loss(probe, group))
        assert ours.cost == pytest.approx(plain.cost, rel=0.01)
        for (layer, branch), calls in ours.calls.items():
            for decision in calls:
                if not decision.reason:
                    at = group(decision, layer, branch)
                    seen[group].setdefault(at, set()).add(decision.keep_ratio)
        least, *_, most = sorted(max(ratios) for ratios in seen[group].values())
        assert least < 0.25 and most > 0.35


def test_losses_are_of_runs_in_which_one_group_keeps_half(probe):
    losses = probe.losses(ideas.of_layer)
    assert set(losses) == {0, 1} and any(losses.values())


def test_one_threshold(wan, plain):
    few, many = (watch(wan, ideas.one_threshold(knob)) for knob in (0.5, 0.1))
    assert few.cost < many.cost
    shares = {layer: many.density[layer] / plain.density[layer] for layer in (0, 1)}
    assert shares[0] != pytest.approx(shares[1], rel=0.01)
    assert refreshes(few) == refreshes(plain)


@pytest.mark.parametrize("drift", [ideas.tile_drift, ideas.map_drift])
def test_refresh_on_drift(wan, plain, drift, monkeypatch):
    clock = refreshes(plain)
    always, never = (watch(wan, ideas.refresh_on_drift(k, drift)) for k in (-1.0, 1e9))
    first = clock[0, "cond"][0]
    assert all(steps == list(range(first, STEPS)) for steps in refreshes(always).values())
    assert all(steps == [first] for steps in refreshes(never).values())
    assert never.cost < plain.cost < always.cost

    measure = partial(measured, wan, lambda knob: ideas.refresh_on_drift(knob, drift))
    monkeypatch.setattr(trial_probe, "ATTEMPTS", 5)
    trial = SimpleNamespace(between=(1e-4, 1.0), idea=measure)
    found, cases = trial_probe.at_cost(trial, lambda: [measured.last], plain.cost)
    assert abs(cases[0]["cost"] / plain.cost - 1) < 0.2  # 16 steps of 2 layers
    ours = watch(wan, ideas.refresh_on_drift(found["number"], drift))
    assert ours.cost == pytest.approx(cases[0]["cost"])
    assert refreshes(ours) != clock


def measured(witness, idea, knob):
    """A context in which `measured.last` is a case at that number."""
    measured.last = {"cost": watch(witness, idea(knob)).cost}
    return mock.MagicMock()


@pytest.mark.parametrize("of_queries", [False, True])
def test_second_moment_scores(wan, plain, of_queries):
    """They are the softmax of mean and half of the variance, by a loop over pairs of tiles."""
    layout = TokenLayout.build(
        TokenGeometry((2, 4, 4)), order="hilbert3d", tile_size=4, query_block=8, key_block=8
    )
    q, k, v = torch.randn(3, 1, 32, 1, 6)
    lengths = layout.lengths(4)
    with ideas.second_moment_scores(None, of_queries):
        ours = ideas.attention.prepare([Stream(q, k, v)], layout).scores
    q, k = (layout.to_curve(x)[0, 0].view(8, 4, 6) for x in (q, k))
    logits = torch.empty(8, 8)
    for i in range(8):
        for j in range(8):
            square = (q[i] ** 2).mean(0) if of_queries else q[i].mean(0) ** 2
            mean = q[i].mean(0) * k[j].mean(0)
            both = square * (k[j] ** 2).mean(0)
            logits[i, j] = mean.sum() / 6**0.5 + (both - mean**2).sum() / 12
    wanted = logits.softmax(-1).view(4, 2, 4, 2).sum(3).mean(1)
    assert torch.allclose(ours[0, 0], wanted, atol=1e-5)
    means = [x.mean(1)[None, None] for x in (q, k)]
    usual = dict(tiles_per_query_block=2, tiles_per_key_block=2, scale=6**-0.5)
    assert not torch.allclose(ours, score_blocks(*means, lengths, lengths, **usual), atol=1e-3)

    changed = watch(wan, ideas.second_moment_scores(None, of_queries))
    assert changed.cost == pytest.approx(plain.cost, rel=1e-3)
    assert not torch.equal(changed.video, plain.video)


def test_last_refresh_at_the_end(wan, plain):
    stretched = watch(wan, ideas.last_refresh_at_the_end(None))
    for key, steps in refreshes(stretched).items():
        assert steps[-1] == STEPS - 1 and len(steps) == len(refreshes(plain)[key])
    assert stretched.cost == pytest.approx(plain.cost, rel=1e-3)


@pytest.mark.parametrize(
    "curve",
    [ideas.width_first, ideas.height_first, ideas.stretched, ideas.squeezed, ideas.halved],
)
def test_other_curves(curve):
    grid = (5, 6, 10)
    before = curves.visiting_order("hilbert3d", grid)
    with ideas.other_hilbert(None, curve):
        ours = curves.visiting_order("hilbert3d", grid)
    assert torch.equal(ours.sort().values, torch.arange(300)) and not torch.equal(ours, before)
    assert torch.equal(curves.visiting_order("hilbert3d", grid), before)


def test_a_squeezed_curve_leaves_no_frame_alone():
    """Of 17 frames, Hilbert's curve has one in a cube of its own; neighbours stay neighbours."""
    grid = (17, 32, 32)

    def frames_of_blocks():
        frames = curves.visiting_order("hilbert3d", grid) // (32 * 32)
        return [len(block.unique()) for block in frames.split(128)]

    assert 1 in frames_of_blocks()
    with ideas.other_hilbert(None, ideas.squeezed):
        assert 1 not in frames_of_blocks()


def test_halved_boxes_are_compact():
    """No block and no tile is long, where Hilbert's curve leaves a cube's cut side and returns."""
    grid = (13, 30, 45)
    place = torch.stack(curves._coordinates(grid), 1)

    def longest(size):
        parts = place[curves.visiting_order("hilbert3d", grid)].split(size)
        return max(int((part.amax(0) - part.amin(0)).max()) + 1 for part in parts)

    assert longest(128) > 20
    with ideas.other_hilbert(None, ideas.halved):
        assert longest(128) <= 9 and longest(16) <= 5


def test_staggered(wan, plain, probe):
    clock = refreshes(plain)
    for group, side in ((ideas.of_layer, 0), (ideas.of_branch, 1)):
        ours = refreshes(watch(wan, ideas.staggered(probe, group)))
        early, late = (
            next(s for key, s in ours.items() if key[side] == at)
            for at in ((0, 1), ("cond", "uncond"))[side]
        )
        usual = clock[0, "cond"]
        assert len(early) == len(late) == len(usual) and early[0] == late[0] == usual[0]
        assert all(a < b for a, b in zip(early[1:], late[1:]))


def test_branches_of_one_call_are_refused():
    with mock.patch.dict(VARIANTS, tiny=BASELINE):
        probe = probe_of(Tiny("cogvideox-2b"))
        with pytest.raises(ValueError, match="nothing to stagger"):
            ideas.staggered(probe, ideas.of_branch)


def test_rows_are_written_and_a_failure_stops_nothing(tmp_path, monkeypatch, capsys):
    random_witness("hunyuan_video", tmp_path / "hunyuan_video")
    monkeypatch.setattr(trial_probe, "PROBE_CASES", 1)
    monkeypatch.setattr(trial_probe, "ATTEMPTS", 2)
    changes = SPARSE | dict(query_block=32, key_block=32)
    names = ["broken", "by mass", "threshold"]
    trials = {
        "broken": Trial("preset turbo", lambda probe: 1 / 0),
        "by mass": Trial("preset turbo", partial(ideas.budget_by_error, of_residual=False)),
        "threshold": Trial("preset turbo", ideas.one_threshold, between=(1e-4, 1.0)),
    }
    monkeypatch.setattr(fidelity_trials, "TRIALS", trials)
    monkeypatch.setitem(VARIANTS, "preset turbo", Variant("turbo", changes))
    output = tmp_path / "trials.json"

    def measure():
        fidelity_trials.main(
            f"--output {output} --cache {tmp_path} --folder {tmp_path} --grids 3x4x8 --steps 12 "
            "--cases 1 --witnesses hunyuan_video --variants".split() + names
        )
        return json.loads(output.read_text()), capsys.readouterr()

    data, shown = measure()
    assert [run["variant"] for run in data["runs"]] == ["preset turbo", "by mass", "threshold"]
    assert "ZeroDivisionError" in shown.err and "failed: hunyuan_video: broken" in shown.out
    assert "to baseline" in shown.out and "not all is measured yet" in shown.out
    base, mass, threshold = data["runs"]
    for ours in (mass, threshold):
        assert ours["reference"] == "preset turbo" and ours["idea"] and ours["found"]
        gain = ours["cases"][0]["psnr"] - base["cases"][0]["psnr"]
        assert ours["gain"]["psnr"] == ours["gain"]["interval"][0] == pytest.approx(gain)
    # What is done is not done again.
    names.remove("broken")
    monkeypatch.setattr(benchmark_fidelity.Benchmark, "_measure", None)
    again, shown = measure()
    assert again == data and "all is measured" in shown.out
    assert "by mass" not in VARIANTS


def test_trials_are_sound():
    for name, trial in TRIALS.items():
        assert trial.meaning and name.startswith(f"{trial.baseline}, ")
        benchmark_fidelity.config_of(trial.variant)
