"""The fp8 kernels compile for the GPUs of their table: 8-bit products, no spills."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from compiling import SHARED_MEMORY, built_by, compile_for

from dfsattn_diffusers.kernels.backends import load_backend

KINDS = ("fp8e4nv", "i8")  # of queries and keys
backend = load_backend("triton_fp8")
if not hasattr(backend, "SETTINGS"):
    pytest.skip(backend.why_not(None), allow_module_level=True)


@pytest.mark.parametrize("arch", sorted({arch for arch, _ in backend.SETTINGS}))
def test_fits_the_gpu(arch):
    builds = built_by(__file__, arch)
    assert len(builds) == 19
    for build in builds:
        assert build["shared"] <= SHARED_MEMORY[arch], build
        assert build["spilled"] == 0, build
        if build["kernel"] == "block_sparse_kernel":
            # Both products take 8-bit operands and give float32.
            kind = "wgmma.mma_async" if arch == 90 else "mma.sync"
            assert build["products"], build
            for product in build["products"]:
                assert product.startswith(kind), build
                assert ".f32.e4m3.e4m3" in product or "s8.s8" in product and build["whole"], build
            assert any("s8.s8" in product for product in build["products"]) == build["whole"], build
            # Weights come from registers in both loops, in steps of 32; queries from memory.
            steps = 2 * build["key_tile"] // 32
            assert arch != 90 or build["from_registers"] == steps < build["count"], build


def compile_products(arch, kernel, constants, types, num_warps, num_stages):
    """Also how the PTX multiplies, and from where."""
    report, ptx = compile_for(arch, kernel, constants, num_warps, num_stages, types)
    found = re.findall(r"(wgmma\.mma_async\S+|mma\.sync\S+)\s+\{[^}]*\},\s*(\S)", ptx)
    report |= dict(
        key_tile=constants.get("KEY_TILE"),
        whole="i8" in types["q" if "q" in types else "out"],
        products=sorted({name for name, _ in found}),
        count=len(found),
        from_registers=sum(operand == "{" for _, operand in found),
    )
    return report, ptx


def builds(arch):
    from dfsattn_diffusers.kernels import quantize_kernels as kernels

    pointers = dict.fromkeys(("counts", "indices", "key_lengths", "output_order"), "*i32")
    scales = ("q_scales", "k_scales", "v_scales", "mean_logits", "lse")
    pointers |= dict.fromkeys(scales, "*fp32") | dict(out="*bf16", scale="fp32")
    blocks = [(128, 128), (128, 64), (64, 64)]
    for kind, head_dim, (query_block, key_block) in itertools.product(KINDS, (64, 128), blocks):
        s = backend.SETTINGS[arch, head_dim]
        tile = min(s.key_tile, key_block)
        constants = dict(
            D=head_dim, QUERY_BLOCK=query_block, KEY_BLOCK=key_block, KEY_TILE=tile, RAGGED=4,
            HAS_LENGTHS=True, ORDERED=True, WITH_LSE=True, TMA=s.tma,
        )
        shapes = dict(q=(query_block, head_dim), k=(tile, head_dim), v=(head_dim, tile))
        kinds = dict(q=kind, k=kind, v="fp8e4nv")
        types = pointers | {
            name: f"tensordesc<{kinds[name]}[1, {rows}, {columns}]>" if s.tma else f"*{kinds[name]}"
            for name, (rows, columns) in shapes.items()
        }
        warps = max(4, s.num_warps * query_block // 128)
        yield compile_products(
            arch, backend.block_sparse_kernel, constants, types, warps, s.num_stages
        )
    types = dict(x="*bf16", lengths="*i32", mean="*fp32", scales="*fp32", mean_logits="*fp32")
    yield compile_products(
        arch, kernels.sum_kernel, dict(D=128, BLOCK=128), types | dict(out="*fp32"), 8, 3
    )
    for keys, kind in ((True, "fp8e4nv"), (False, "fp8e4nv"), (True, "i8")):
        constants = dict(
            D=128, BLOCK=128, CENTRED=keys, WITH_LOGITS=not keys,
            TRANSPOSED=not keys, INTERLEAVED=not keys,
        )
        constants |= dict(mean_logits=None) if keys else {}
        yield compile_products(
            arch, kernels.quantize_kernel, constants, types | dict(out=f"*{kind}"), 8, 3
        )
    # A single token may have a stride of 1, which is a constant then.
    for head_dim, constants in ((128, {}), (64, dict(stride_n=1))):
        constants = constants | dict(D=head_dim, BLOCK=128, INTERLEAVED=True)
        yield compile_products(
            arch, kernels.carry_kernel, constants, types | dict(out="*i32"), head_dim // 32, 3
        )
    scales = ("k_scales", "v_scales", "pool_k_scales", "pool_v_scales", "out")
    yield compile_products(
        arch, kernels.merge_kernel, dict(SIZE=2048), dict.fromkeys(scales, "*fp32"), 4, 3
    )


if __name__ == "__main__":
    made = list(builds(int(sys.argv[1])))
    if len(sys.argv) > 2:
        for i, (_, ptx) in enumerate(made):
            Path(sys.argv[2], f"{i}.ptx").write_text(ptx)
    print(json.dumps([report for report, _ in made]))
