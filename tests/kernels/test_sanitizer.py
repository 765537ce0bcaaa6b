"""NVIDIA's compute-sanitizer finds no wrong address and no race in kernels, on small problems."""

import inspect
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from compiling import printed_by
from kernel_cases import ON_CUDA, problem, segments, some_full_rows
from test_tail import tail_of

from dfsattn_diffusers.kernels.backends import load_backend

TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)
HOPPER = ["gluon_hopper", "gluon_fp8"]
pytestmark = [*ON_CUDA, pytest.mark.skipif(TOOL is None, reason="compute-sanitizer not installed")]


def sanitize(check, backends, *options):
    """What the tool prints about this file run as a program."""
    known = all(hasattr(load_backend(name), "forward") for name in backends)
    if not known or backends == HOPPER and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU or this triton cannot run them")
    text = printed_by(__file__, *backends, under=[TOOL, "--tool", check, *options])
    assert "all finite" in text, text
    return text


@pytest.mark.parametrize("backends", [HOPPER, ["triton", "triton_fp8"]], ids=lambda x: x[0])
def test_no_wrong_address(backends):
    assert "ERROR SUMMARY: 0 errors" in sanitize("memcheck", backends)


def test_no_race_between_warps():
    """But for reports of triton's own hand-over of the partitions, at lines of the launched kernel.

    The tool does not follow it; all that our code shares stands in functions that this one calls.
    """
    text = sanitize("racecheck", HOPPER, "--racecheck-report", "all", "--print-limit", "0")
    places = re.findall(r"(?:Write|Read) Thread \(.*?\) at .* in (\S+):(\d+)", text)
    hazards = int(re.search(r"SUMMARY: (\d+) hazard", text)[1])
    assert hazards == 0 or places, text[-3000:]
    own = {Path(load_backend(name).__file__).name: launched_lines(name) for name in HOPPER}
    ours = {(file, line) for file, line in places if int(line) not in own.get(file, [])}
    assert not ours, ours


def launched_lines(name):
    lines, start = inspect.getsourcelines(load_backend(name).block_sparse_kernel.fn)
    return range(start, start + len(lines))


def main(backends):
    for head_dim in (64, 128):
        for change in (segments, some_full_rows):
            p = problem(
                "cuda", torch.bfloat16, num_queries=500, head_dim=head_dim, heads=1, density=0.4
            )
            p = change(p)
            for backend in backends:
                precision = getattr(load_backend(backend), "PRECISION", "full")
                outs = [p.run(backend, precision=precision)]
                if backend == "gluon_hopper":
                    outs.append(p.run(backend, tail=tail_of(p, 16, False)))
                assert all(bool(out.isfinite().all()) for out in outs)
    print("all finite")


if __name__ == "__main__":
    main(sys.argv[1:])
