"""The kernels of scores and maps compile for every GPU of their tables, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHS = sorted(SHARED_MEMORY)


@pytest.mark.parametrize("arch", ARCHS)
def test_fits_the_gpu(arch):
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, __file__, str(arch)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    builds = json.loads(run.stdout.splitlines()[-1])
    assert len(builds) >= 8
    for build in builds:
        assert build["shared"] <= SHARED_MEMORY[arch], build
        assert build["spilled"] == 0, build
        products = build["kernel"] in ("score_kernel", "add_kernel")
        assert build["wgmma"] == (arch == 90 and products), build


def compile_for(
    arch, kernel, constants, num_warps=4, num_stages=3, types=(), *, aligned="stride_", fuse=True
):
    """Compile the kernel without a GPU and ask ptxas what it takes.

    Arguments whose name starts with `aligned` count as multiples of 16, as they are in practice.
    """
    import re
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = dict(types) | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name.startswith(aligned)
        },
    )
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        log = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return dict(
        kernel=kernel.fn.__name__,
        constants=str(constants),
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]),
        shared=built.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        half_loads=len(re.findall(r"ld\.global\S*\.b16", ptx)),
    )


def builds(arch):
    from dfsattn_diffusers.kernels import map_kernels, tail_kernels, tile_scores, top_blocks

    s = tile_scores.SETTINGS[arch]
    scores = dict(query_lengths="*i32", key_lengths="*i32", scores="*fp32", scale_log2="fp32")
    for kind, head_dim in (("*fp16", 64), ("*fp16", 128), ("*bf16", 128)):
        yield compile_for(
            arch,
            tile_scores.score_kernel,
            dict(
                D=head_dim,
                PER_QUERY_BLOCK=8,
                PER_KEY_BLOCK=8,
                QUERIES=s.query_tiles,
                KEYS=s.key_tiles,
            ),
            s.num_warps,
            s.num_stages,
            scores | dict(q=kind, k=kind),
        )
    s = tail_kernels.SETTINGS[arch]
    halves = dict.fromkeys(("q", "k", "v", "keys", "values", "variance", "out"), "*bf16")
    halves |= dict(log_counts="*fp32", lse="*fp32", bits="*u8", scale="fp32")
    halves |= dict.fromkeys(("lengths", "counts", "output_order"), "*i32")
    for head_dim, moment in ((64, True), (128, False), (128, True)):
        yield compile_for(
            arch,
            tail_kernels.add_kernel,
            dict(
                D=head_dim,
                QUERIES=128,
                POOLS=tail_kernels.pools_per_step(s, head_dim, moment),
                PER_BLOCK=4,
                MOMENT=moment,
                ORDERED=True,
            ),
            s.num_warps,
            s.num_stages,
            {
                name: kind
                for name, kind in halves.items()
                if name in tail_kernels.add_kernel.arg_names
            },
        )
    for size, warps in ((32, 4), (128, 8)):
        yield compile_for(
            arch,
            tail_kernels.pool_kernel,
            dict(SIZE=size, D=128, MOMENT=True),
            warps,
            types={
                name: kind
                for name, kind in halves.items()
                if name in tail_kernels.pool_kernel.arg_names
            },
        )
    pointers = dict.fromkeys(("counts", "indices", "prefix", "left", "ties", "histogram"), "*i32")
    pointers |= dict(source="*u8", bits="*u8", mask="*u8", scores="*fp32")
    for kernel, constants, warps in (
        (map_kernels.list_kernel, dict(BLOCKS=1024, PACKED=True), 1),
        (map_kernels.pack_kernel, dict(BYTES=128, STEPS=10), 1),
        (top_blocks.row_kernel, dict(COLUMNS=1024), 1),
        (top_blocks.digit_kernel, dict(COLUMNS=1024, ROWS=8, SHIFT=20, BINS=2048, FIRST=True), 8),
        (top_blocks.narrow_kernel, dict(BINS=2048), 4),
        (top_blocks.tie_kernel, dict(COLUMNS=1024, ROWS=8, COUNT=False), 8),
    ):
        types = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        yield compile_for(arch, kernel, constants, warps, types=types)


if __name__ == "__main__":
    print(json.dumps(list(builds(int(sys.argv[1])))))
