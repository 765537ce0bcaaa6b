"""The benchmarks: help, early errors, nothing without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ["benchmark_kernel", "benchmark_prologue"]


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
