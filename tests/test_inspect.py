"""Recording a running pipeline, the pictures of it, and the command that makes them."""

import json
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from test_syncs import SyncCounter
from tiny_pipelines import FAMILIES, run, tiny_wan
from torch.utils._python_dispatch import TorchDispatchMode

from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn
from dfsattn_diffusers.analysis import MEASURES, average, record_attention, to_rows
from dfsattn_diffusers.cli import inspect, pictures

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)
ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


class OpCounter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_recording_changes_nothing(device, family):
    if device == "cpu":
        pipe, config = FAMILIES[family](), SPARSE
    else:
        pipe = FAMILIES[family](head_dim=64).to(device, torch.bfloat16)
        config = SPARSE.replace(query_block=64, key_block=64)
    with enable_dfsattn(pipe, config) as handle:
        plain = run(pipe)
        random_state = torch.get_rng_state()
        with record_attention(handle, queries=2) as records:
            recorded = run(pipe)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.equal(recorded, plain)
        runs = handle.report().runs
    calls = runs[-1].calls
    assert runs[0].calls == calls and runs[0].recall == runs[1].recall
    assert len(records) == calls["refresh"] + calls["reuse"] > 0

    rows = to_rows(records)
    assert json.loads(json.dumps(rows)) == rows
    heads = pipe.transformer.config.num_attention_heads
    assert {row["head"] for row in rows} == set(range(heads))
    for row in rows:
        assert all(math.isfinite(row[name]) for name in ("density", *MEASURES, "error"))
        assert 0 <= row["bound_cheap"] <= row["bound"] + 1e-6
        assert row["bound"] <= row["bound_convex"] + 1e-6 <= row["recall"] + 2e-6 <= 1 + 3e-6
        assert row["bound_tiles"] <= row["recall"] + 1e-6
        assert row["error"] == pytest.approx(row["estimate"] - row["recall"], abs=1e-6)
    sparse_steps = {row["step"] for row in rows}
    assert sparse_steps == {1, 2, 3}
    density = average(rows, "density", by=())[()]
    assert runs[-1].density == pytest.approx(
        (density * len(records) + calls["dense"]) / sum(calls.values()), abs=1e-6
    )


def test_keeping_everything_has_recall_one():
    pipe = tiny_wan()
    with (
        enable_dfsattn(pipe, SPARSE, dense_fraction=0, keep_ratios=(1.0,)) as handle,
        record_attention(handle) as records,
    ):
        run(pipe, steps=2)
    for row in to_rows(records):
        assert all(row[name] == 1 for name in ("density", *MEASURES) if name != "estimate")
        assert row["estimate"] == pytest.approx(1)


def test_what_is_recorded_can_be_chosen():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE) as handle:
        chosen = dict(queries=3, layers=[1], steps=[2, 3], views=[(1, 0), (0, 1)], seed=5)
        with record_attention(handle, **chosen) as records:
            run(pipe)
        with record_attention(handle, **chosen) as again:
            run(pipe)
    assert {(r.layer, r.position.step) for r in records} == {(1, 2), (1, 3)}
    assert all(list(r.views) == [0] for r in records)
    assert all(len(set(r.query_blocks)) == 3 and max(r.query_blocks) < 16 for r in records)
    assert len({r.query_blocks for r in records}) > 1
    assert to_rows(records) == to_rows(again)


def test_recording_ends():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE) as handle:
        # The first run also tries the backend and draws the curve.
        run(pipe)
        with OpCounter() as before:
            plain = run(pipe)

        def interrupt(pipe, step, timestep, kwargs):
            if step == 2:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt), record_attention(handle) as records:
            run(pipe, callback_on_step_end=interrupt)
        assert {record.position.step for record in records} == {1, 2}
        count = len(records)
        with OpCounter() as after:
            out = run(pipe)
        # Once it is over, not one operation is left of it.
        assert after.count == before.count and len(records) == count
        assert torch.equal(out, plain)


def test_wrong_use_is_refused():
    with enable_dfsattn(tiny_wan(), SPARSE) as handle:
        twice = pytest.raises(RuntimeError, match="recorded already; end that recording first")
        with record_attention(handle), twice, record_attention(handle):
            pass
        none = pytest.raises(ValueError, match="what enable_dfsattn returned, got NoneType; a bare")
        with none, record_attention(None):
            pass
        few = pytest.raises(ValueError, match="queries must be at least 1, got 0")
        with few, record_attention(handle, queries=0):
            pass
        with record_attention(handle):
            pass


def test_recording_waits_for_nothing():
    pipe = tiny_wan()
    counts = {}
    with enable_dfsattn(pipe, SPARSE) as handle:
        run(pipe)
        for recorded in (False, True):
            for steps in (4, 12):
                with SyncCounter() as counter:
                    if recorded:
                        with record_attention(handle):
                            run(pipe, steps=steps)
                    else:
                        run(pipe, steps=steps)
                counts[recorded, steps] = counter.count
    # On the CPU the reference kernel looks at counts; that is the same with and without.
    assert counts[True, 4] == counts[False, 4] and counts[True, 12] == counts[False, 12]


def luminance(colour):
    return float(np.dot(colour, (0.3, 0.6, 0.1)))


def test_heat_map_shows_the_numbers():
    values = np.array([[0.1, 0.5, 0.9, np.nan]])
    labels = dict(row_labels=["0"], column_labels=list("0123"))
    picture = pictures.heat_map(values, title="t", row_axis="r", column_axis="c", **labels)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    low, middle, high = (pictures._colour(v, 0.1, 0.9) for v in (0.1, 0.5, 0.9))
    assert luminance(low) < luminance(middle) < luminance(high)
    seen = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    assert {low, middle, high, pictures._MISSING} <= seen
    # Left to right in this order, missing last.
    columns = [
        np.argwhere((picture[:, : picture.shape[1] - 100] == c).all(-1))[:, 1].mean()
        for c in (low, middle, high, pictures._MISSING)
    ]
    assert columns == sorted(columns)


def test_labels_thin_out_and_limits_hold():
    values = np.full((60, 50), 0.5)
    labels = dict(row_labels=[f"l{i}" for i in range(60)], column_labels=list(map(str, range(50))))
    axes = dict(title="t", row_axis="r", column_axis="c")
    picture = pictures.heat_map(values, **axes, **labels, limits=(0, 1))
    assert picture.shape[0] < 1000 and picture.shape[1] < 1000
    pictures.heat_map(np.full((1, 1), np.nan), **axes, row_labels=["0"], column_labels=["0"])


@pytest.mark.parametrize("size", [1, 12, 300])
def test_block_map_lights_what_is_kept(size):
    rng = np.random.default_rng(0)
    mask, scores = rng.random((size, size)) < 0.3, rng.random((size, size))
    for shades in (scores, None):
        picture = pictures.block_map(mask, shades, title="t")
        cell = max(1, min(24, 720 // size))
        left, top = pictures._MARGIN + 58, pictures._MARGIN + 28
        cells = picture[top : top + size * cell : cell, left : left + size * cell : cell]
        red, blue = cells[..., 0].astype(int), cells[..., 2].astype(int)
        assert np.array_equal(red > blue, mask)
        if shades is not None and size > 1:
            bright = cells @ np.array([0.3, 0.6, 0.1])
            for where in (mask, ~mask):
                share = (scores / scores.max(-1, keepdims=True))[where]
                assert np.corrcoef(share, bright[where])[0, 1] > 0.9


def test_text_and_frames_are_marked():
    mask = np.zeros((10, 10), bool)
    plain = pictures.block_map(mask, title="t")
    lines = dict(row_lines=[2.5], column_lines=[2.5], text_row=8, text_column=8)
    marked = pictures.block_map(mask, title="t", **lines)
    top, left = pictures._MARGIN + 28, pictures._MARGIN + 58
    changed = (plain != marked).any(-1)[top : top + 240, left : left + 240]
    for axis in (0, 1):
        assert np.flatnonzero(changed.all(axis)).tolist() == [60, 192]
    assert changed.sum() == 2 * 2 * 240 - 4


def test_command_end_to_end(tmp_path, capsys):
    size = "--height 64 --width 64 --frames 9 --device cpu"
    options = [*size.split(), "--output", str(tmp_path / "new" / "folder")]
    inspect.main(["--steps", "3", "--preset", "paper", "--queries", "2", *options])
    out = capsys.readouterr().out
    for word in ("layer", "density", "recall", "estimate", "error", "bound", "all"):
        assert word in out
    folder = tmp_path / "new" / "folder"
    content = json.loads((folder / "recall.json").read_text())
    assert content["run"]["preset"] == "paper"
    assert content["config"]["keep_ratios"] == [0.3, 0.2, 0.1]
    layers = content["layers"]
    assert [layer["layer"] for layer in layers] == list(range(len(layers))) and len(layers) > 1
    for layer in layers:
        rows = [row for row in content["records"] if row["layer"] == layer["layer"]]
        assert layer["recall"] == pytest.approx(sum(r["recall"] for r in rows) / len(rows))
        assert layer["bound"] <= layer["recall"] <= 1
    names = {path.name for path in folder.glob("*.png")}
    assert {"recall_layer_step.png", "recall_layer_head.png", "error_layer_step.png"} <= names
    assert {"map_layer0_head0_step1.png", "map_layer0_head0_step2.png"} <= names
    for name in names:
        assert iio.imread(folder / name).ndim == 3

    # Too few tokens for this preset: it says so instead of drawing nothing.
    with pytest.raises(SystemExit, match="(?s)No attention call was sparse.*fewer than 4096"):
        inspect.main(["--steps", "1", "--preset", "balanced", *options])
