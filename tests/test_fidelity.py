"""The fidelity benchmark, whole, with random witnesses: resuming, table, drawing, document."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import benchmark_fidelity  # noqa: E402
import fidelity_report  # noqa: E402
import update_docs  # noqa: E402
from fidelity_variants import VARIANTS  # noqa: E402
from rivals import RIVALS  # noqa: E402
from test_witness import random_witness  # noqa: E402

from dfsattn_diffusers import enable_dfsattn  # noqa: E402
from dfsattn_diffusers.configs import resolve_config  # noqa: E402

GRID = (4, 8, 12)
NAMES = ["dense, other kernel", "paper", "piecewise (PISA)", "radial decay (Radial)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("witnesses")
    for name in ("hunyuan_video", "cogvideox"):
        random_witness(name, folder / name)
    return folder


def measure(folder, output, *options, variants=NAMES, witnesses=("hunyuan_video", "cogvideox")):
    benchmark_fidelity.main(
        [
            *("--output", str(output), "--cache", str(output.parent / "cache")),
            *("--folder", str(folder), "--grids", "x".join(map(str, GRID))),
            *("--steps", "2", "--cases", "2", "--batch", "2"),
            *("--witnesses", *witnesses, "--variants", *variants, *options),
        ]
    )
    return json.loads(output.read_text()) if output.exists() else None


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "fidelity.json"
    return output, measure(folder, output)


def test_every_unit_is_measured(measured):
    _, data = measured
    assert {(r["witness"], r["variant"]) for r in data["runs"]} == {
        (witness, name) for witness in ("hunyuan_video", "cogvideox") for name in NAMES
    }
    for run in data["runs"]:
        assert [case["seed"] for case in run["cases"]] == [0, 1]
        assert [case["prompt"] for case in run["cases"]] == data["prompts"]
        exact = run["config"] is None
        for case in run["cases"]:
            assert (case["psnr"] > 50) == exact and (case["ssim"] > 0.999) == exact
            assert (case["cost"] == 1) == exact
            assert (case["recall"] is None) == (exact or run["rival"] is not None)
            sampled, bound = case["recall_sampled"], case["recall_bound"]
            assert (sampled is None) == (bound is None) == (case["recall"] is None)
            assert sampled is None or 0 < bound <= sampled < 1
    for witness in ("hunyuan_video", "cogvideox"):
        costs = {
            r["variant"]: r["cases"][0]["cost"] for r in data["runs"] if r["witness"] == witness
        }
        assert all(0 < costs[rival] - 0.5 < 0.3 for rival in NAMES[2:])
    # One dense step of two, then one of three video blocks, and 64 tokens of text.
    assert costs["paper"] == pytest.approx(0.5 + 0.5 * (384 * 192 + 64 * 448) / 448**2)


def test_copies_are_merged(measured, tmp_path):
    output, data = measured
    one, other, third = (tmp_path / f"{name}.json" for name in "abc")
    half = len(data["runs"]) // 2
    machine = data["machine"] | {"gpu": "G"}
    one.write_text(json.dumps(data | {"runs": data["runs"][half:]}))
    fewer = [run | {"cases": run["cases"][:1]} for run in data["runs"]]
    stale = fewer[0] | {"variant": "no longer a variant"}
    other.write_text(json.dumps(data | {"machine": machine, "runs": [*fewer[half:], stale]}))
    third.write_text(json.dumps(data | {"runs": data["runs"][:half]}))
    benchmark_fidelity.main(["--output", str(one), "--merge", str(other), str(third)])
    merged = json.loads(one.read_text())
    assert merged["machine"] == machine | {"gpu": f"{data['machine']['gpu']}, G"}
    wanted = json.loads(output.read_text())["runs"]
    assert sorted(map(str, merged["runs"])) == sorted(map(str, wanted))
    names = [run["variant"] for run in merged["runs"] if run["witness"] == "cogvideox"]
    assert names == [name for name in VARIANTS if name in NAMES]

    other.write_text(json.dumps(data | {"settings": {}}))
    with pytest.raises(SystemExit, match="b.json has other settings than"):
        benchmark_fidelity.main(["--output", str(one), "--merge", str(other)])


def test_the_paper_is_what_the_plugin_does(folder, measured):
    """One number of the file, made again by hand."""
    _, data = measured
    run = next(r for r in data["runs"] if r["variant"] == "paper")
    witness = benchmark_fidelity.Witness(
        run["witness"], torch.device("cpu"), folder / run["witness"]
    )
    at = (data["prompts"], (0, 1), GRID, 2, data["settings"]["guidance"])
    dense = witness.decode(witness.generate(*at))
    with enable_dfsattn(witness.pipe, "paper") as handle:
        sparse = witness.decode(witness.generate(*at))
    report = handle.report().runs[-1]
    mse = (sparse[1] - dense[1]).square().mean((1, 2, 3))
    case = run["cases"][1]
    assert case["psnr"] == pytest.approx(float((-10 * mse.log10()).mean()), abs=0.05)
    assert case["cost"] == pytest.approx(report.density)
    assert case["recall"] == pytest.approx(report.recall)


def test_a_second_run_measures_nothing_and_more_cases_extend(folder, measured, capsys, monkeypatch):
    output, data = measured
    monkeypatch.setattr(benchmark_fidelity.Benchmark, "_measure", None)
    assert measure(folder, output) == data
    assert "all is measured" in capsys.readouterr().out
    monkeypatch.undo()
    options = dict(variants=["paper"], witnesses=["cogvideox"])
    copy = output.with_name("copy.json")
    copy.write_text(output.read_text())
    longer = measure(folder, copy, "--cases", "3", **options)
    assert longer["prompts"][:2] == data["prompts"] and len(longer["prompts"]) == 3
    for old, new in zip(data["runs"], longer["runs"]):
        wanted = 3 if (old["variant"], old["witness"]) == ("paper", "cogvideox") else 2
        assert len(new["cases"]) == wanted and new["cases"][:2] == old["cases"]


def test_a_cut_run_goes_on(folder, tmp_path, capsys):
    output, options = tmp_path / "data.json", dict(witnesses=["cogvideox"], variants=NAMES[1:3])
    assert measure(folder, output, "--seconds", "-1", **options) is None
    assert "run the same command again" in capsys.readouterr().out
    data = measure(folder, output, "--batch", "1", **options)
    partial = json.loads(output.read_text())
    del partial["runs"][1]["cases"][1]
    output.write_text(json.dumps(partial))
    again = measure(folder, output, "--batch", "1", **options)
    whole, cut = (d["runs"][1]["cases"][1]["psnr"] for d in (data, again))
    assert whole == pytest.approx(cut, abs=1e-3)
    cache = list((tmp_path / "cache").iterdir())
    assert len(cache) == 2  # one for each case, made once


def test_changed_settings_are_measured_anew_or_refused(folder, tmp_path, monkeypatch):
    output, options = tmp_path / "data.json", dict(witnesses=["cogvideox"], variants=["paper"])
    before = measure(folder, output, **options)
    changed = benchmark_fidelity.VARIANTS["paper"].__class__("paper", {"keep_ratios": [0.7]})
    monkeypatch.setitem(benchmark_fidelity.VARIANTS, "paper", changed)
    after = measure(folder, output, **options)
    assert len(after["runs"]) == 1
    assert after["runs"][0]["cases"][0]["cost"] > before["runs"][0]["cases"][0]["cost"]
    with pytest.raises(SystemExit, match="name another --output"):
        measure(folder, output, "--guidance", "2", **options)


def test_fields_of_other_releases_are_skipped(folder, tmp_path, monkeypatch, capsys):
    unknown = benchmark_fidelity.VARIANTS["paper"].__class__("paper", {"telepathy": 3})
    monkeypatch.setitem(benchmark_fidelity.VARIANTS, "paper", unknown)
    output = tmp_path / "data.json"
    measure(folder, output, witnesses=["cogvideox"], variants=["paper"])
    assert "skipped paper" in capsys.readouterr().out and not output.exists()


def test_a_missing_witness_says_how_to_train_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="scripts/train_witness.py --family cogvideox"):
        measure(tmp_path, tmp_path / "data.json", witnesses=["cogvideox"])


def test_variants_are_sound():
    for name, variant in VARIANTS.items():
        assert variant.rival is None or variant.rival in RIVALS
        assert variant.reference in VARIANTS
        assert (VARIANTS[variant.reference].steps == variant.steps) or variant.preset is None
        if "tail" in variant.changes:
            continue  # known to later releases
        if variant.preset is not None:
            resolve_config(variant.preset, **variant.changes)
        assert name.strip() == name


def test_table_and_drawing(measured, capsys):
    output, data = measured
    benchmark_fidelity.main(["--output", str(output), "--list"])
    out = capsys.readouterr().out
    assert out.count("4 x 8 x 12 = 384 tokens, 2 cases") == 2
    svg = ElementTree.fromstring(fidelity_report.drawing(data))
    space = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f".//{space}circle")) == 2 * (len(NAMES) - 1)
    texts = [text.text for text in svg.iter(f"{space}text")]
    assert sum("noise floor" in text for text in texts) == 2
    for name in NAMES[1:]:
        assert out.count(f"\n{name} ") == 2 and texts.count(name) == 2


def test_paired_differences():
    def run(name, values):
        cases = [dict(cost=0.4, psnr=v, ssim=0.9, recall=0.8) for v in values]
        return dict(variant=name, reference="paper", config={}, cases=cases)

    runs = [run("paper", [20.0, 30.0, 25.0]), run("ours", [22.0, 31.0, 28.0, 99.0])]
    paper, ours = fidelity_report.rows_of(runs)
    assert paper[1:] == ["0.400", "25.00", "20.00", "0.9000", "", "0.800"]
    assert ours[2:4] == ["45.00", "22.00"] and ours[5].startswith("+2.00 [+1.00, +3.00]")
    for case in runs[0]["cases"]:
        case |= dict(recall_sampled=0.75, recall_bound=0.1)
    assert fidelity_report.rows_of(runs)[0][-1] == "0.800 (0.750, 0.100)"
    low, high = fidelity_report.interval([1.0, 2.0, 3.0, 4.0] * 25)
    half = 1.96 * 1.118 / 10
    assert low == pytest.approx(2.5 - half, abs=0.03) and high == pytest.approx(
        2.5 + half, abs=0.03
    )


def test_losses_in_8_bits_are_paired_with_the_preset():
    def run(name, witness, *values):
        cases = [dict(psnr=value) for value in values]
        return dict(variant=name, witness=witness, grid=[4, 8, 12], config={}, cases=cases)

    runs = [
        run("preset turbo", "wan", 30.0, 34.0),
        run("preset turbo, fp8 but corrections", "wan", 29.0, 31.0),
        run("preset turbo", "cogvideox", 30.0),
        run("preset turbo, int8", "cogvideox", 29.5),
        run("dense", "wan", 40.0),
        run("dense, int8", "wan", 39.0),
        run("preset fast, int8", "wan", 39.0),
    ]
    header, rows = fidelity_report.losses_in_8_bits(dict(runs=runs))
    assert header == ["preset", "8 bits", "wan, 4 x 8 x 12", "cogvideox, 4 x 8 x 12"]
    assert rows == [
        ["`turbo`", "fp8 but corrections", "-2.00 [-3.00, -1.00]", "-"],
        ["`turbo`", "int8", "-", "-0.50 [-0.50, -0.50]"],
    ]


def test_the_document_follows_the_data(measured, tmp_path, monkeypatch):
    _, data = measured
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    assert update_docs.fidelity().startswith("Not measured yet")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "fidelity.json").write_text(json.dumps(data))
    text = update_docs.fidelity()
    for witness, grid in fidelity_report.groups(data):
        assert f"### {witness}, {' x '.join(map(str, grid))}" in text
    assert text.count("| paper |") == 2
