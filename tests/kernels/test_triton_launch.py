"""The Triton kernel's launch table: every way to launch it is right, and fits its GPU."""

import dataclasses
import json
import sys

import pytest
import torch
from compiling import SHARED_MEMORY, built_by, compile_for
from kernel_cases import (
    ON_CUDA,
    TARGETS,
    assert_close,
    check_large_offsets,
    problem,
    segments,
    some_full_rows,
)

from dfsattn_diffusers.kernels.backends import load_backend

backend = load_backend("triton")

DEVICES = [
    pytest.param(target.values[1], marks=target.marks)
    for target in TARGETS
    if (target.values[0], target.values[2]) == ("triton", torch.float16)
]


@pytest.mark.parametrize("change", [segments, some_full_rows])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("key_tile", [32, 64, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_every_way_to_launch(monkeypatch, device, key_tile, tma, head_dim, change):
    settings_for = backend.settings_for

    def settings(call):
        if device == "cpu":
            return backend.LaunchSettings(key_tile, 8, 2, tma)
        table = settings_for(call)
        return dataclasses.replace(
            table, key_tile=min(key_tile, table.key_tile), tma=tma and table.tma
        )

    monkeypatch.setattr(backend, "settings_for", settings)
    tokens = 300 if device == "cpu" else 2500
    p = change(problem(device, torch.float16, num_queries=tokens, head_dim=head_dim, heads=1))
    out, lse = p.run("triton", return_lse=True)
    exact, eager = p.dense(torch.float64), p.dense(torch.float16)
    assert_close(out, exact[0], eager[0])
    assert_close(lse, exact[1], eager[1])


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_descriptors_cannot_read(monkeypatch, device):
    """An odd stride goes through pointers, even where the table says TMA."""
    settings = backend.LaunchSettings(64, 8, 2, tma=True)
    monkeypatch.setattr(backend, "settings_for", lambda call: settings)
    p = problem(device, torch.float16, num_queries=200)
    k = torch.zeros(2, 2, 200, 67, dtype=torch.float16, device=device)[..., :64]
    p = dataclasses.replace(p, k=k.copy_(p.k))
    assert_close(p.run("triton"), p.dense(torch.float64)[0], p.dense(torch.float16)[0])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_offsets_beyond_32_bits(device):
    """The last head starts beyond element 2 ** 31."""
    check_large_offsets(device, "triton")


@pytest.mark.parametrize("arch", sorted({arch for arch, _ in backend.SETTINGS}))
def test_fits_the_gpu(arch):
    """Compiled here for that GPU: shared memory within its limit, and no register spills."""
    builds = built_by(__file__, arch)
    assert len(builds) == len({(b["head_dim"], b["tma"]) for b in builds}) >= 2
    for build in builds:
        assert build["shared"] <= SHARED_MEMORY[arch], build
        # A few bytes outside the loop are all that ptxas leaves on sm120.
        assert build["spilled"] <= (16 if arch == 120 else 0), build
        assert build["wgmma"] == (arch == 90), build


def compile_kernel(arch, head_dim, settings):
    """One of the kernel's builds."""
    kernel, tile = backend.block_sparse_kernel, settings.key_tile
    constants = dict(
        D=head_dim, QUERY_BLOCK=128, KEY_BLOCK=128, KEY_TILE=tile, RAGGED=4, HAS_LENGTHS=True,
        ORDERED=True, WITH_LSE=False, TMA=settings.tma, lse=None,
    )
    types = dict.fromkeys(("counts", "indices", "key_lengths", "output_order"), "*i32")
    types |= {"out": "*bf16", "scale_log2": "fp32"}
    for name, rows in (("q", 128), ("k", tile), ("v", tile)):
        descriptor = f"tensordesc<bf16[1, 1, {rows}, {head_dim}]>"
        types[name] = descriptor if settings.tma else "*bf16"
    report, _ = compile_for(
        arch, kernel, constants, settings.num_warps, settings.num_stages, types
    )
    return report | dict(head_dim=head_dim, tma=settings.tma)


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    print(json.dumps([
        compile_kernel(arch, head_dim, dataclasses.replace(settings, tma=tma))
        for (arch, head_dim), settings in backend.SETTINGS.items()
        for tma in {False, settings.tma}
        if arch == wanted
    ]))
