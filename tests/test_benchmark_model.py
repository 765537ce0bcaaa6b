"""The benchmark of whole transformers: real sizes on no device, the whole script on tiny ones."""

import importlib
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfsattn_diffusers import enable_dfsattn
from dfsattn_diffusers.configs import resolve_config
from dfsattn_diffusers.processors import adapter_for
from dfsattn_diffusers.state import DFSAttnState

SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS = 8
# Billions of weights as published, video tokens.
PUBLISHED = {
    "hunyuan-720p": (12.8, 33 * 45 * 80),
    "hunyuan-480p": (12.8, 33 * 30 * 45),
    "wan-720p": (14.3, 21 * 45 * 80),
    "wan-480p": (14.3, 21 * 30 * 52),
    "cogvideox-5b": (5.57, 13 * 30 * 45),
    "cogvideox-1.5": (5.57, 11 * 48 * 85),
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture(params=["hunyuan-720p", "wan-480p", "cogvideox-5b", "cogvideox-1.5"])
def tiny(request, load):
    models = load("video_models")
    torch.manual_seed(0)
    return models.Denoising(models.TINY[request.param], "cpu", torch.float32, STEPS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_their_published_size(name, load):
    models = load("video_models")
    assert set(models.MODELS) == set(PUBLISHED)
    run = models.Denoising(models.MODELS[name], "meta", torch.bfloat16)
    weights, tokens = PUBLISHED[name]
    counted = sum(parameter.numel() for parameter in run.transformer.parameters())
    assert math.isclose(counted / 1e9, weights, rel_tol=0.01)

    seen, shapes = [], []

    def note(transformer, args, inputs):
        geometry, _ = adapter_for(transformer).tokens(transformer, inputs)
        seen.append(geometry.video_tokens)
        shapes.append(inputs["hidden_states"].shape)

    run.transformer.register_forward_pre_hook(note, with_kwargs=True)
    outputs = run.step(0)
    assert [out.shape for out in outputs] == shapes
    assert seen == [tokens] * len(run.family.branches)


def test_the_plan_is_what_a_whole_run_does(tiny, load):
    benchmark = load("benchmark_model")
    config = resolve_config("paper", **benchmark.TINY_CHANGES)
    kinds = [kind.split()[0] for kind in benchmark.plan(config, STEPS)]
    with enable_dfsattn(tiny, config) as handle:
        processors = tiny.transformer.attn_processors.values()
        layers = sum(getattr(processor, "is_dfsattn", False) for processor in processors)
        assert tiny.whole_run().isfinite().all()
    report = handle.report().runs[-1]
    calls = layers * len(tiny.family.branches)
    assert report.steps == STEPS
    assert report.calls == {mode: kinds.count(mode) * calls for mode in report.calls}


def test_every_sample_is_of_the_kind_it_says(tiny, load, tmp_path, monkeypatch):
    benchmark, tools = load("benchmark_model"), load("benchmark_tools")
    decide, time, modes = DFSAttnState.decide, tools.Record.time, []

    def noted(state, *args):
        decision = decide(state, *args)
        modes.append(decision.mode)
        return decision

    def checked(record, key, function):
        modes.clear()
        time(record, key, function)
        kind = key.split()[1] if key.startswith(("ours", "paper")) else None
        assert set(modes) == ({kind} if kind else set())

    monkeypatch.setattr(DFSAttnState, "decide", noted)
    monkeypatch.setattr(tools.Record, "time", checked)
    record = tools.Record(tmp_path / "model.json", "model", math.inf, iterations=2)
    config = resolve_config("paper", **benchmark.TINY_CHANGES)
    benchmark.sample_dense(tiny, record)
    benchmark.sample(tiny, "paper", config, STEPS, record)
    kinds = {f"paper {kind}" for kind in benchmark.plan(config, STEPS) if kind != "dense"}
    assert set(record.data["ms"]) == kinds | {"ours dense", *benchmark.baselines_of(tiny)}


def noted_steps(run, record, monkeypatch):
    """Steps of a model that are run untimed, and the keys that are timed, in one list."""
    step, time, events = run.step, record.time, []

    def timed(key, function):
        time(key, function)
        events[-1] = key

    monkeypatch.setattr(run, "step", lambda index: (events.append(index), step(index))[1])
    monkeypatch.setattr(record, "time", timed)
    return events


def test_each_mode_is_warm_before_it_is_timed(load, tmp_path, monkeypatch):
    """Or the first sample would hold what is compiled for it; once is enough."""
    benchmark, tools = load("benchmark_model"), load("benchmark_tools")
    run = load("video_models").Denoising(benchmark.TINY["wan-480p"], "cpu", torch.float32, STEPS)
    record = tools.Record(tmp_path / "model.json", "model", math.inf, iterations=1)
    events = noted_steps(run, record, monkeypatch)
    configs = {name: benchmark.config_of(name, tiny=True) for name in ("paper", "fast")}

    benchmark.sample(run, "paper", configs["paper"], STEPS, record)
    kinds = [f"{mode} {ratio}" for ratio in (0.3, 0.2, 0.1) for mode in ("refresh", "reuse")]
    # Steps 0, 2 and 3: dense, refresh, reuse.
    assert events == [0, 2, 3, "ours dense", *(f"paper {kind}" for kind in kinds)]

    events.clear()
    benchmark.sample(run, "paper", configs["paper"], STEPS, record)
    assert events == []
    benchmark.sample(run, "fast", configs["fast"], STEPS, record)
    assert events == [0, 1, "fast refresh 0.1", "fast reuse 0.1"]


@pytest.mark.parametrize(
    "kinds, wanted",
    [
        ("dense, refresh 3, reuse 3, refresh 2, reuse 2", "dense, refresh 3, reuse 3"),
        ("refresh 3, refresh 2, reuse 2", "refresh 2, reuse 2"),
        ("dense, refresh 3", "dense, refresh 3"),
        ("dense", "dense"),
    ],
)
def test_a_reuse_is_warmed_after_its_own_refresh(load, kinds, wanted):
    assert load("benchmark_model").warm_ups(kinds.split(", ")) == wanted.split(", ")


def test_trimming_changes_time_only(tiny):
    stock = dict(tiny.transformer.attn_processors)
    wanted = tiny.step(0)
    with tiny.trimmed():
        got = tiny.step(0)
    torch.testing.assert_close(got, wanted)
    assert tiny.transformer.attn_processors == stock


def test_what_is_wrong_is_not_timed(tiny, load):
    benchmark = load("benchmark_model")
    result = benchmark.gate(tiny, benchmark.TINY_CHANGES)
    assert result["ours"] < 1e-5
    with pytest.raises(SystemExit, match="not timed"):
        benchmark.gate(tiny, benchmark.TINY_CHANGES | {"keep_ratios": (0.3,)})


def test_the_whole_script_goes_on_where_time_was_up(load, tmp_path, capsys):
    benchmark = load("benchmark_model")
    output = tmp_path / "new" / "model.json"
    arguments = ["--tiny", "--models=wan-480p", f"--steps={STEPS}", f"--output={output}"]
    arguments += ["--presets", "paper", "fast", "--iters=1"]
    benchmark.main([*arguments, "--seconds=-1"])
    assert "run again" in capsys.readouterr().err and not output.exists()

    benchmark.main(arguments)
    first = json.loads(output.read_text())["wan-480p"]
    assert {"dense", "ours dense", "paper refresh 0.3", "fast reuse 0.1"} <= set(first["ms"])
    assert all(len(samples) == 1 for samples in first["ms"].values())

    benchmark.main([*arguments, "--whole-run"])
    second = json.loads(output.read_text())["wan-480p"]
    assert second["ms"] == first["ms"]
    assert set(second["whole_run_s"]) == {"paper", "fast"}
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| wan-480p |") for line in lines) == 2 + 2
    assert sum(" really run: " in line for line in lines) == 2

    # A preset that has other settings by now is timed again, and nothing else is.
    changed = json.loads(output.read_text())
    changed["wan-480p"]["settings"]["fast"]["keep_ratios"] = [0.9]
    output.write_text(json.dumps(changed))
    benchmark.main(arguments)
    third = json.loads(output.read_text())["wan-480p"]
    again = {key for key in third["ms"] if third["ms"][key] != first["ms"][key]}
    assert again == {key for key in third["ms"] if key.startswith("fast ")} != set()
    assert set(third["whole_run_s"]) == {"paper"} < set(second["whole_run_s"])
    assert third["settings"] == first["settings"]

    # Two dense steps, then refresh and reuse at each ratio.
    ms = {key: samples[0] for key, samples in first["ms"].items()}
    ours = 2 * ms["ours dense"] + sum(v for key, v in ms.items() if key.startswith("paper"))
    wanted = {"dense": STEPS * ms["dense"] / 1000, "ours": ours / 1000}
    assert second["composed_s"]["paper"] == pytest.approx(wanted)


def test_a_preset_is_added_up_though_time_is_up_for_the_next(load, tmp_path, monkeypatch):
    benchmark, output = load("benchmark_model"), tmp_path / "model.json"
    sample = benchmark.sample

    def cut(run, preset, *arguments):
        if preset == "fast":
            raise benchmark.OutOfTime
        sample(run, preset, *arguments)

    monkeypatch.setattr(benchmark, "sample", cut)
    arguments = ["--tiny", "--models=wan-480p", f"--steps={STEPS}", f"--output={output}"]
    benchmark.main([*arguments, "--presets", "paper", "fast", "--iters=1"])
    assert set(json.loads(output.read_text())["wan-480p"]["composed_s"]) == {"paper"}


def test_dense_steps_are_shared_by_presets_of_one_precision(load):
    benchmark = load("benchmark_model")

    def keys(label):
        config = benchmark.config_of(label, tiny=True)
        return [benchmark.key_of(kind, label, config) for kind in ("dense", "reuse 0.1")]

    assert keys("paper") == ["ours dense", "paper reuse 0.1"]
    assert keys("turbo, fp8") == ["ours dense, fp8", "turbo, fp8 reuse 0.1"]


def test_what_changed_is_dropped_under_its_own_name_alone(load, tmp_path):
    record = load("benchmark_tools").Record(tmp_path / "model.json", "model", math.inf, 1)
    labels = "turbo", "turbo, fp8", "turbo, fp8 but corrections"
    kept = {f"{label} {kind}" for label in labels for kind in ("refresh 0.05", "reuse 0.05")}
    kept |= {"dense", "dense, cuDNN", "dense, as shipped", "ours dense", "ours dense, fp8"}
    record.data["ms"] = dict.fromkeys(kept, [1.0])
    record.data["profile"] = dict.fromkeys(labels, {})
    record.data["settings"] = dict.fromkeys(labels, resolve_config("paper").to_dict())
    record.follow("turbo, fp8", resolve_config("turbo").to_dict())
    assert kept - set(record.data["ms"]) == {"turbo, fp8 refresh 0.05", "turbo, fp8 reuse 0.05"}
    assert set(record.data["profile"]) == {"turbo", "turbo, fp8 but corrections"}


def test_the_documents_table_comes_from_the_data(load, tmp_path, monkeypatch):
    docs = load("update_docs")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    assert docs.models() == "Not measured yet."
    record = dict(gpu="NVIDIA G", torch="2", triton="3", size=[129, 720, 1280], steps=50)
    # What was timed under a preset's name that has other settings by now is left out.
    record["settings"] = {"paper": {}, "fast": {"keep_ratios": [0.5]}}
    seconds = {"dense, as shipped": 900.0, "dense": 600.0, "dense, cuDNN": 500.0, "ours": 250.0}
    whole = {"composed_s": {"paper": seconds, "fast": seconds}, "whole_run_s": {"paper": 251.2}}
    data = {"hunyuan-720p": record | whole, "begun": record}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "model.json").write_text(json.dumps(data))
    about, _, *table = docs.models().splitlines()
    assert about == "torch 2, triton 3." and len(table) == 3
    cells = "hunyuan-720p", "129 x 720 x 1280", "50", "G", "`paper`", "250", "251"
    cells += "900 (x 3.60)", "600 (x 2.40)", "500 (x 2.00)"
    assert table[2] == f"| {' | '.join(cells)} |"

    faster = seconds | {"ours": 200.0}
    h200 = record | dict(gpu="NVIDIA H200", source="maker/Video-Diffusers")
    config_named = load("benchmark_tools").config_named
    labels = "paper", "turbo", "turbo, int8"
    h200["settings"] = {label: config_named(label).to_dict() for label in labels}
    # The fastest preset by itself, and in 8 bits beside it.
    eight = seconds | {"ours": 150.0}
    data["video"] = h200 | {"composed_s": {"paper": seconds, "turbo": faster, "turbo, int8": eight}}
    (tmp_path / "benchmarks" / "model.json").write_text(json.dumps(data))
    _, _, *rows = docs.speed().splitlines()
    cells = "Video", "129 x 720 x 1280", "15.0 min", "8.3 min", "**3.3 min** (`turbo`)", "x 4.5"
    assert rows == [f"| {' | '.join(cells)} | 2.5 min (x 6.0) |"]


@pytest.mark.parametrize("model", ["hunyuan-720p", "wan-480p", "cogvideox-5b"])
def test_compiled_blocks(model, load, tmp_path):
    output = tmp_path / "model.json"
    arguments = ["--tiny", f"--models={model}", f"--steps={STEPS}", "--iters=1", "--compile=eager"]
    load("benchmark_model").main([*arguments, f"--output={output}"])
    record = json.loads(output.read_text())[f"{model}, compiled"]
    assert record["gate"]["ours"] < 1e-5 and "ours" in record["composed_s"]["paper"]


@pytest.mark.parametrize("model, text", [("wan-480p", True), ("cogvideox-5b", False)])
def test_profiles(model, text, load, tmp_path, capsys):
    """Each kind of step once, and in every part something; run again, it is measured anew."""
    benchmark, output = load("benchmark_model"), tmp_path / "model.json"
    arguments = ["--tiny", f"--models={model}", f"--steps={STEPS}", "--profile"]
    for _ in range(2):
        benchmark.main([*arguments, f"--output={output}"])
    record = json.loads(output.read_text())[model]
    config = benchmark.config_of("paper", tiny=True)
    dense, steps = record["profile"]["dense"], record["profile"]["paper"]
    assert set(record["profile"]) == {"dense", "paper"} and set(dense) == {"dense"}
    assert list(steps) == list(dict.fromkeys(benchmark.plan(config, STEPS)))
    for parts in (dense["dense"], *steps.values()):
        assert list(parts) == list(load("step_profile").PARTS)
        ours = parts is not dense["dense"]
        assert (parts["around attention"] > 0) == ours
        assert parts["linear layers"] > 0 and parts["the rest"] > 0
    # The reference's attention is made of operators that have no name of their own.
    assert dense["dense"]["attention"] > 0 and (steps["reuse 0.3"]["attention"] > 0) == text
    assert f"| {model} | `paper`, reuse 0.3 |" in capsys.readouterr().out


def test_parts_of_a_step_are_all_of_it(load, monkeypatch):
    """On a GPU: kernels by name, and by whether they began in a span of ours."""
    profiles = load("step_profile")

    def event(name, start, took, device=torch.autograd.DeviceType.CUDA):
        span = SimpleNamespace(start=start, end=start + took, elapsed_us=lambda: took)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    events = [
        event("nvjet_tst_128x256", 0, 1000),
        event("dfsattn", 1000, 3000),
        event("prologue_kernel", 1000, 500),
        event("block_sparse_kernel", 1600, 2000),
        event("ampere_sgemm_32", 3700, 300),
        event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 4100, 700),
        event("void at::native::elementwise_kernel", 5000, 100),
        event("dfsattn", 900, 9999, torch.autograd.DeviceType.CPU),
    ]
    monkeypatch.setattr(profiles.torch.profiler, "profile", lambda **_: nullcontext(
        SimpleNamespace(events=lambda: events)
    ))  # fmt: skip
    parts = profiles.profile(SimpleNamespace(device="cuda", step=int), 0)
    assert parts == dict(zip(profiles.PARTS, (2.7, 0.8, 1.0, 0.1)))


def test_the_profiles_table(load):
    report = load("model_report")
    config = report.config_named("turbo, fp8").to_dict()
    parts = dict(zip(report.PARTS, (2000.0, 250.0, 1000.0, 750.0)))
    profile = {"dense, cuDNN": {"dense": parts}, "turbo, fp8": {"reuse 0.05": parts}}
    profile["fast"] = {"reuse 0.1": parts}  # as it was once
    record = dict(settings={"turbo, fp8": config, "fast": {}}, profile=profile)
    _, rows = report.profiles({"video": record, "begun": {}})
    seconds = ["2.00", "0.25", "1.00", "0.75", "4.00"]
    steps = ["dense, cuDNN", "`turbo, fp8`, reuse 0.05"]
    assert rows == [["video", step, *seconds] for step in steps]
