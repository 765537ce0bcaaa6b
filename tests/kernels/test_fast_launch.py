"""The kernels of scores and maps compile for every GPU of their tables, and fit it."""

import json
import sys

import pytest
from compiling import SHARED_MEMORY, built_by, compile_for

ARCHS = sorted(SHARED_MEMORY)


@pytest.mark.parametrize("arch", ARCHS)
def test_fits_the_gpu(arch):
    pytest.importorskip("triton")
    builds = built_by(__file__, arch)
    assert len(builds) >= 8
    for build in builds:
        assert build["shared"] <= SHARED_MEMORY[arch], build
        # A few numbers may be put aside, a dozen where that was faster on a GPU.
        aside = {"add_kernel": 48, "directions_kernel": 16, "codes_kernel": 16}
        assert build["spilled"] <= aside.get(build["kernel"], 0), build
        products = build["kernel"] in ("score_kernel", "add_kernel", "gram_kernel")
        assert build["wgmma"] == (arch == 90 and products), build


def builds(arch):
    from dfsattn_diffusers.kernels import (
        low_rank,
        low_rank_kernels,
        map_kernels,
        residual_kernels,
        tail_kernels,
        tile_scores,
        top_blocks,
    )

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
    halves = dict.fromkeys(("q", "k", "v", "keys", "values", "out"), "*bf16")
    halves |= dict(bias="*fp32", energy="*fp32", lse="*fp32", bits="*u8", scale="fp32")
    halves |= dict.fromkeys(("lengths", "counts", "output_order"), "*i32")
    for head_dim in (64, 128):
        s = tail_kernels.SETTINGS[arch]
        yield compile_for(
            arch,
            tail_kernels.add_kernel,
            dict(
                D=head_dim,
                QUERIES=128,
                POOLS=tail_kernels.pools_per_step(s, per_block=4),
                PER_BLOCK=4,
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
    pooled = halves | dict(variance="*fp32")
    for size, nothing in (
        (32, ["variance"]),
        (128, ["variance"]),
        (64, ["v", "energy", "values", "bias"]),
    ):
        pools = tail_kernels.pools_at_once(128)
        sizes = dict(SIZE=size, D=128, POOLS=pools, ROWS=tail_kernels._ROWS)
        yield compile_for(
            arch,
            tail_kernels.pool_kernel,
            sizes | dict.fromkeys(nothing),
            types={
                name: kind
                for name, kind in pooled.items()
                if name in tail_kernels.pool_kernel.arg_names and name not in nothing
            },
        )
    lack = dict(out="*bf16", residual="*bf16", slots="*i32")
    for pool in (1, 32):
        yield compile_for(
            arch,
            residual_kernels.lack_kernel,
            dict(POOL=pool, D=128, ROWS=32),
            4,
            types=lack,
        )
    codes = dict(out="*bf16", codes="*u8", scales="*bf16", basis="*fp32", slots="*i32")
    for pool, rank, head_dim in ((1, 8, 128), (4, 4, 64)):
        sizes = dict(POOL=pool, K=rank, RUN=low_rank.RUN, D=head_dim, ROWS=residual_kernels._ROWS)
        yield compile_for(arch, residual_kernels.low_rank_kernel, sizes, types=codes)
    measured = dict.fromkeys(("exact", "out", "scales"), "*bf16")
    measured |= dict.fromkeys(("rows", "lengths"), "*i32") | dict(codes="*u8")
    measured |= dict.fromkeys(("sums", "basis"), "*fp32")
    for pool, rank, head_dim in ((1, 4, 64), (1, 8, 64), (4, 4, 64), (1, 4, 128), (1, 8, 128)):
        rows = dict(POOL=pool, D=head_dim)
        for kernel, constants in (
            (low_rank_kernels.gram_kernel, rows | dict(ROWS=low_rank_kernels._ROWS)),
            (low_rank_kernels.directions_kernel, dict(K=rank, D=head_dim, ROWS=rank)),
            (low_rank_kernels.codes_kernel, rows | dict(K=rank, RUN=low_rank.RUN)),
        ):
            types = {name: kind for name, kind in measured.items() if name in kernel.arg_names}
            warps, stages = low_rank_kernels.warps(head_dim), low_rank_kernels.stages(arch)
            yield compile_for(arch, kernel, constants, warps, stages, types)
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
    print(json.dumps([report for report, _ in builds(int(sys.argv[1]))]))
