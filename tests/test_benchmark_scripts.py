"""The benchmarks: help, early errors, nothing without a GPU; what is right, what is written."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfsattn_diffusers.kernels import block_sparse_attention, quantize

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ["benchmark_kernel", "benchmark_prologue"]


@pytest.fixture
def load(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def kernels(load, monkeypatch):
    """The kernel benchmark on a CPU, with a clock and a shape of its own."""
    module = load("benchmark_kernel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "about", lambda **more: dict.fromkeys(MACHINE, "1") | more)
    monkeypatch.setattr(module, "device_ms", lambda function, iterations: 2.0)
    monkeypatch.setattr(module, "SHAPES", {"wan-720p": (2, 300, 64)})
    monkeypatch.setattr(module, "dense_kernel", exact)
    random = partial(module.Problem.random, device="cpu")
    monkeypatch.setattr(module.Problem, "random", random)
    return module


MACHINE = "gpu", "torch", "triton", "date"


def exact(problem):
    """The right output in the inputs' precision, by the benchmark's own reference."""
    heads, rows = problem.mask.shape[1:3]
    dtype = problem.q.dtype
    blocks = [torch.cat([problem.row(h, i, torch.float32) for i in range(rows)])
              for h in range(heads)]
    return lambda: torch.stack(blocks)[None].to(dtype)


def exact_if(condition):
    def prepare(problem):
        run = exact(problem)
        return lambda: run() if condition(problem) else run() * 1.2

    return prepare


def rounded(problem):
    """As fp8 kernels round: q, k, v by block; weights, with their values' scale, from 256 down."""
    x = quantize(problem.q, problem.k, problem.v, query_block=128, key_block=128)
    tokens = problem.q.shape[2]

    def each(scales):
        return scales.repeat_interleave(128, -1)[..., :tokens]

    q, k = x.q.float()[:, :, :tokens], x.k.float()[:, :, :tokens]
    logits = (q * each(x.q_scales)[..., None]) @ (k * each(x.k_scales)[..., None]).mT
    mask = problem.mask.repeat_interleave(128, 2).repeat_interleave(128, 3)
    logits = (logits * q.shape[-1] ** -0.5).masked_fill(~mask[:, :, :tokens, :tokens], -torch.inf)
    scales = each(x.v_scales)[:, :, None]
    logits += scales.log()
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * 256
    total = (weights / scales).sum(-1, keepdim=True)
    values = x.v.float().mT[:, :, :tokens]
    return (weights.to(torch.float8_e4m3fn).float() @ values / total).to(problem.q.dtype)


def run(name, *arguments, **options):
    pytest.importorskip("triton")
    here = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, env=here, capture_output=True, text=True, **options)


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_option(name):
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    for option in ("shapes", "iters", "dtype", "settings", "seed", "output"):
        assert f"--{option}" in result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_it_says_so_and_writes_nothing(name, tmp_path):
    result = run(name, "--output", "new/result.json", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.endswith("this needs a CUDA GPU, and torch sees none\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "sora"], "invalid choice: 'sora'"),
        (["--variants", "none"], "invalid choice: 'none'"),
        (["--settings", "16,4"], "invalid launch_settings value: '16,4'"),
        (["--iters", "0"], "--iters must be at least 1, got 0"),
    ],
)
def test_prologue_refuses_bad_arguments(arguments, message):
    result = run("benchmark_prologue", *arguments)
    assert result.returncode == 2 and message in result.stderr


def timed(output):
    return [row["kernel"] for row in json.loads(output.read_text())["rows"]]


def test_rows_outlive_a_kernel_that_fails(kernels, monkeypatch, tmp_path, capsys):
    """One is wrong from the start, one late, one does not run; none of them costs the others."""

    def broken(problem):
        raise RuntimeError("no such instruction\nat 0x0")

    ours = {
        "ours: wrong": exact_if(lambda problem: False),
        "ours: wrong later": exact_if(lambda problem: problem.q.shape[2] == 1000),
        "ours: right": exact,
    }
    monkeypatch.setattr(kernels, "sparse_kernels", lambda settings, dtype: ours)
    monkeypatch.setattr(kernels, "FLEX", {"Flex": broken, "Flex, wrong": ours["ours: wrong"]})
    output = tmp_path / "new" / "kernel.json"
    with pytest.raises(SystemExit) as stop:
        kernels.main([f"--output={output}", "--densities", "0.5", "1"])
    late = [f"{name}, wan-720p, even {density}" for density in (0.5, 1)
            for name in ("ours: wrong later", "Flex, wrong")]
    assert stop.value.code == f"not timed: {'; '.join(['ours: wrong', *late])}"
    assert timed(output) == ["dense cuDNN (SDPA)", "ours: right"] * 2
    assert list(output.parent.iterdir()) == [output]
    out, err = capsys.readouterr()
    assert "Flex, wan-720p, even 0.5: no such instruction\n" in err
    assert "ours: wrong: wrong at [1, 3, 1000, 64], head 0, query block 0: error" in err
    rows = json.loads(output.read_text())["rows"]
    assert rows[0]["error"] is None and 1e-3 < rows[1]["error"] < 3e-3
    assert out.splitlines()[-1] == (
        f"| wan-720p | even | 1 | ours: right | 2.00 | {rows[-1]['tflops']:.0f} "
        f"| {rows[-1]['error']:.2%} |"
    )


def test_every_row_is_in_the_file_before_the_next_is_measured(kernels, monkeypatch, tmp_path):
    output, seen = tmp_path / "kernel.json", []

    def looking(problem):
        seen.append(timed(output) if output.exists() else None)
        return exact(problem)

    ours = {"ours: one": looking, "ours: two": looking}
    monkeypatch.setattr(kernels, "sparse_kernels", lambda settings, dtype: ours)
    kernels.main([f"--output={output}", "--no-flex"])
    dense = "dense cuDNN (SDPA)"
    # The gate looks twice at each.
    assert seen == [None] * 4 + [[dense], [dense, "ours: one"]]


def test_ours_has_to_run(kernels, monkeypatch, tmp_path):
    def late(problem):
        if problem.q.shape[2] != 1000:
            raise RuntimeError("out of memory")
        return exact(problem)

    ours = {"ours: late": late, "ours: right": exact}
    monkeypatch.setattr(kernels, "sparse_kernels", lambda settings, dtype: ours)
    with pytest.raises(SystemExit, match="not timed: ours: late, wan-720p"):
        kernels.main([f"--output={tmp_path / 'kernel.json'}", "--no-flex"])
    assert timed(tmp_path / "kernel.json") == ["dense cuDNN (SDPA)", "ours: right"]


def one_token(out):
    out[0, 1, 200] = out[0, 1, 201]


def one_token_halved(out):
    out[0, 1, 200] *= 0.5


def one_block(out):
    out[0, 1, 128:256] = out[0, 0, 128:256]


def one_head(out):
    out[0, 1] *= 1.2


def not_a_number(out):
    out[0, 1, 200, 0] = torch.nan


WRONG = [one_token, one_token_halved, one_block, one_head, not_a_number]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads, tokens, density", [(3, 1000, 0.3), (2, 4096, 0.1)])
def test_fp8_may_round_but_not_be_wrong(load, head_dim, heads, tokens, density):
    """Averages of many values are small beside the rounding of one; norms know."""
    problems = load("kernel_problems")
    torch.manual_seed(tokens + head_dim)
    sizes = heads, tokens, head_dim
    problem = problems.Problem.random(*sizes, density, torch.bfloat16, device="cpu")
    rows = [(head, row) for head in range(heads) for row in range(problem.mask.shape[2])]
    right = rounded(problem)
    assert 0.04 < problems.check(problem, right, rows, torch.float32, fp8=True) < 0.06
    with pytest.raises(problems.WrongOutput):
        problems.check(problem, right, rows, torch.float32)
    for spoil in WRONG:
        out = right.clone()
        spoil(out)
        with pytest.raises(problems.WrongOutput, match="head 1, query block [01]: error"):
            problems.check(problem, out, rows, torch.float32, fp8=True)


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
def test_full_precision_is_held_to_every_element(load, spoil):
    problems = load("kernel_problems")
    problem = problems.Problem.random(2, 300, 64, 0.5, torch.bfloat16, "uneven", device="cpu")
    out, rows = exact(problem)(), [(1, 0), (1, 1), (0, 2)]
    assert problems.check(problem, out, rows, torch.float64) < 3e-3
    spoil(out)
    with pytest.raises(problems.WrongOutput):
        problems.check(problem, out, rows, torch.float64)


def test_a_tail_is_checked_and_its_products_counted(load):
    problems = load("kernel_problems")
    problem = problems.Problem.random(2, 700, 64, 0.4, torch.float32, device="cpu").with_tail(64)
    rows = [(head, row) for head in range(2) for row in range(6)]
    out = block_sparse_attention(
        problem.q, problem.k, problem.v, problem.block_map, tail=problem.tail, backend="reference"
    )
    assert problems.check(problem, out, rows, torch.float64) < 1e-5
    with pytest.raises(problems.WrongOutput):
        problems.check(replace(problem, tail=None), out, rows, torch.float64)
    pools = 12  # of which the last has no tokens
    added = problem.flops() - replace(problem, tail=None).flops()
    assert added == 4 * 64 * 2 * 700 * pools


@pytest.mark.parametrize("broken", [False, True])
def test_prologue_rows_outlive_a_failure_and_the_fastest_is_named(
    load, monkeypatch, tmp_path, capsys, broken
):
    module = load("benchmark_prologue")
    times = iter([4.0, 3.0, 9.0, 1.0, 2.0, RuntimeError() if broken else 9.0])

    def device_ms(function, iterations):
        if isinstance(ms := next(times), RuntimeError):
            raise ms
        return ms

    class Problem:
        streams = ()

        def __init__(self, shape, dtype):
            pass

        def variant(self, name):
            return {}

    stubs = dict(
        about=lambda **more: dict.fromkeys(MACHINE, "1") | more, device_ms=device_ms,
        Problem=Problem, ours=lambda streams: None, check=lambda *args: None,
        moved_bytes=lambda *args: 10**6, copy_ms=lambda *args: 0.5, ROUNDED={},
    )
    for name, stub in stubs.items():
        monkeypatch.setattr(module, name, stub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    output = tmp_path / "prologue.json"
    arguments = [f"--output={output}", "--shapes", "wan-720p", "cogvideox"]
    arguments += ["--variants", "curve order", "--settings", "16,2,2048,4"]
    if broken:
        with pytest.raises(RuntimeError):
            module.main(arguments)
    else:
        module.main(arguments)
    kernels = ["ours", "ours, 16,2,2048,4", "eager torch"] * 2
    assert timed(output) == kernels[: 5 if broken else 6]
    out = capsys.readouterr().out
    assert ("fastest" in out) == (not broken)
    if not broken:
        assert out.splitlines()[-2:] == [
            "| wan-720p | curve order | ours, 16,2,2048,4 | 3.000 |",
            "| cogvideox | curve order | ours | 1.000 |",
        ]


@pytest.mark.parametrize("part", [None, "k", "v", "v_scales"])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_wrong_rounding_is_not_timed(load, monkeypatch, precision, part):
    module = load("benchmark_prologue")
    k, v = torch.randn(2, 1, 2, 200, 64)
    prepared = module.Prepared(None, k, v)
    monkeypatch.setattr(module, "ours", lambda streams, **arguments: prepared)
    right = module.quantize_keys

    def rounded(k, v, key_mean=None, **options):
        out = right(k, v, key_mean=key_mean, **options)
        if part is not None and key_mean is None:
            wrong = getattr(out, part).float() * -1.01
            out = replace(out, **{part: wrong.to(getattr(out, part).dtype)})
        return out

    monkeypatch.setattr(module, "quantize_keys", rounded)
    problem = SimpleNamespace(streams=(), variant=lambda name: {})
    jobs = module.jobs(problem, "small", f"keys and values, {precision}", {})
    if part is not None:
        with pytest.raises(SystemExit, match=f"{precision}, small is wrong in {part[0]}: "):
            list(jobs)
        return
    ((count, name, call),) = jobs
    assert name == "ours" and call().v.shape == (1, 2, 64, 256)
    slots = 2 * 256
    assert count == k.nbytes + v.nbytes + 2 * slots * 64 + 2 * 4 * slots // 128


def test_the_documents_have_a_line_for_each_problem(load):
    docs = load("update_docs")
    data = dict.fromkeys(MACHINE, "1") | dict(dtype="bfloat16", iterations=7)
    row = dict(shape="wan-720p", density=0.2, ms=45.58, tflops=513.0)
    dense, ours = row | dict(kernel="dense", density=1), row | dict(kernel="ours")
    data |= dict(shapes={"wan-720p": [40, 75_600, 128]}, rows=[dense, ours])
    about, _, header, _, line = docs.kernel_table(data).splitlines()
    assert header.endswith("| dense | ours |") and "rror" not in about
    assert line == "| 40 x 75,600 x 128 | 0.2 | 513 (45.6) | 513 (45.6) |"

    uneven = [x | dict(maps="uneven", tflops=500.0) for x in (dense, ours)]
    fp8 = row | dict(kernel="fp8", maps="uneven", tflops=700.0, error=0.0531)
    data["rows"] = [dense, ours | dict(error=0.001), *uneven, fp8, ours | dict(density=0.25)]
    about, _, header, _, *lines = docs.kernel_table(data).splitlines()
    assert header.endswith("| ours | fp8 |")
    assert about.endswith("compared: ours 0.10%; fp8 5.31%.")
    assert lines == [
        "| 40 x 75,600 x 128 | 0.2 | 513 (45.6) | 513 (45.6) | - |",
        "| 40 x 75,600 x 128 | 0.2, uneven | 500 (45.6) | 500 (45.6) | 700 (45.6) |",
        "| 40 x 75,600 x 128 | 0.25 | 513 (45.6) | 513 (45.6) | - |",
    ]
