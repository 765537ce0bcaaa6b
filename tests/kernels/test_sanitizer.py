"""NVIDIA's compute-sanitizer finds no wrong address and no race in kernels, on small problems."""

import inspect
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from compiling import printed_by
from kernel_cases import problem, segments, some_full_rows
from test_tail import tail_of

from dfsattn_diffusers.kernels.backends import load_backend, precisions_of

TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)
HOPPER = ["gluon_hopper", "gluon_fp8"]
NEEDED = pytest.mark.skipif(
    TOOL is None or not torch.cuda.is_available(), reason="no CUDA GPU or no compute-sanitizer"
)


def sanitize(check, backends, *options):
    """What the tool prints about this file run as a program."""
    known = all(hasattr(load_backend(name), "forward") for name in backends)
    if not known or backends == HOPPER and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU or this triton cannot run them")
    text = printed_by(__file__, *backends, under=[TOOL, "--tool", check, *options])
    assert "all finite" in text, text
    return text


@pytest.mark.gpu
@NEEDED
@pytest.mark.parametrize("backends", [HOPPER, ["triton", "triton_fp8"]], ids=lambda x: x[0])
def test_no_wrong_address(backends):
    assert "ERROR SUMMARY: 0 errors" in sanitize("memcheck", backends)


@pytest.mark.gpu
@NEEDED
def test_no_race_between_warps():
    """But for reports of triton's own hand-over of the partitions, at lines of the launched kernel.

    The tool does not follow it; all that our code shares stands in functions that this one calls.
    """
    text = sanitize("racecheck", HOPPER, "--racecheck-report", "all", "--print-limit", "0")
    assert races(text, [load_backend(name).block_sparse_kernel.fn for name in HOPPER]) == []


def test_a_race_of_ours_is_told_from_tritons():
    """By where it stands, in reports of the tool's form."""
    lines, start = inspect.getsourcelines(sanitize)
    here = Path(__file__).name
    tritons = report(f"{here}:{start}") + report(f"{here}:{start + len(lines) - 1}")
    assert races(tritons + SUMMARY.format(2), [sanitize]) == []
    for place in ("_hopper_rings.py:117", f"{here}:{start - 1}", f"{here}:{start + len(lines)}"):
        found = races(tritons + report(place) + SUMMARY.format(3), [sanitize])
        assert found == [place]
    with pytest.raises(AssertionError):
        races(SUMMARY.format(1), [sanitize])


SUMMARY = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)\n"


def report(place):
    return (
        "========= Error: Potential RAW hazard detected at __shared__ 0x34705 in block (0,0,0) :\n"
        f"=========     Write Thread (31,0,0) at block_sparse_kernel+0xc6a0 in {place}\n"
        f"=========     Read Thread (288,0,0) at block_sparse_kernel+0x1b0 in {place}\n"
    )


def races(text, functions):
    """Where the reports of racecheck place what is in no line of these functions."""
    places = re.findall(r"(?:Write|Read) Thread \(.*?\) at .* in (\S+):(\d+)", text)
    hazards = int(re.search(r"SUMMARY: (\d+) hazard", text)[1])
    assert hazards == 0 or places, text[-3000:]
    known = set()
    for function in functions:
        lines, start = inspect.getsourcelines(function)
        file = Path(inspect.getsourcefile(function)).name
        known |= {(file, line) for line in range(start, start + len(lines))}
    return sorted({f"{file}:{line}" for file, line in places if (file, int(line)) not in known})


def main(backends):
    for head_dim in (64, 128):
        for change in (segments, some_full_rows):
            sizes = dict(num_queries=500, head_dim=head_dim, heads=1, density=0.4)
            p = change(problem("cuda", torch.bfloat16, **sizes))
            for backend in backends:
                offered = precisions_of(load_backend(backend))
                outs = [p.run(backend, precision=precision) for precision in offered]
                if backend == "gluon_hopper":
                    outs.append(p.run(backend, tail=tail_of(p, 16, False)))
                assert all(out.isfinite().all() for out in outs)
    print("all finite")


if __name__ == "__main__":
    main(sys.argv[1:])
