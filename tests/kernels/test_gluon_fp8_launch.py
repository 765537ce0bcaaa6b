"""The Gluon kernel in 8 bits: it fits sm90, moves no weights, and is right however launched."""

import json
import re

import pytest
import torch
from compiling import SHARED_MEMORY, built_by, compile_gluon
from kernel_cases import (
    NASTY,
    ON_CUDA,
    check_large_offsets,
    problem,
    segments,
    several_rows,
    some_full_rows,
)
from test_tail import tail_of
from test_triton_fp8 import check_fp8, nearest_logarithm

from dfsattn_diffusers.kernels import BlockMap, api, explain
from dfsattn_diffusers.kernels.backends import load_backend
from dfsattn_diffusers.kernels.quantize import ROUNDING

backend = load_backend("gluon_fp8")
if not hasattr(backend, "NUM_STAGES"):
    pytest.skip(backend.why_not(None), allow_module_level=True)


# Head dim, key block, whether lengths, an order and the log-sum-exp are asked for; keys of the
# tail's pools or 0, and pools that a row's last tile has room for.
SIZES = [
    (128, 128, False, 0, 128),
    (128, 128, True, 64, 32),
    (64, 128, True, 64, 32),
    (128, 128, True, 0, 128),
    (128, 64, True, 0, 64),
    (64, 128, True, 0, 128),
    (64, 64, False, 0, 64),
    (128, 128, False, 64, 64),
    (128, 128, False, 64, 128),
    (128, 64, True, 32, 64),
    (64, 64, False, 16, 32),
]
# All in one precision, the first ones in the other.
BUILDS = [(*sizes, "fp8") for sizes in SIZES] + [(*sizes, "int8") for sizes in SIZES[:3]]
GPU = [pytest.param("cuda", marks=ON_CUDA)]


def test_refuses_other_devices():
    p = problem(dtype=torch.float16, num_queries=1)
    with pytest.raises(ValueError, match="needs a CUDA device of capability 9.0, got cpu"):
        p.run("gluon_fp8", precision="fp8")


@pytest.mark.parametrize("device", GPU)
def test_is_chosen(device):
    p = problem(device, torch.bfloat16, num_queries=300)
    block_map = BlockMap.from_mask(p.mask, query_block=128, key_block=128)
    chosen = explain(p.q, p.k, p.v, block_map, precision="fp8")
    assert chosen.backend == "gluon_fp8"
    assert chosen.rejected["triton_fp8"] == "slower than gluon_fp8"


@pytest.mark.parametrize("change", NASTY)
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("device", GPU)
def test_nasty(device, precision, change):
    p = change(problem(device, torch.bfloat16, num_queries=300, seed=1))
    check_fp8(p, "gluon_fp8", nearest_logarithm, precision=precision)


@pytest.mark.parametrize("change", [segments, some_full_rows])
@pytest.mark.parametrize("sizes", backend.NUM_STAGES)
@pytest.mark.parametrize("fewest", [False, True])
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("device", GPU)
def test_many_rows(monkeypatch, device, precision, fewest, sizes, change):
    """More than the GPU has multiprocessors, so that a program takes several."""
    if fewest:
        monkeypatch.setitem(backend.NUM_STAGES, sizes, 2)
    p = change(several_rows(device, sizes, num_queries=4500))
    p.mask[:, 0, 3:9] = False
    check_fp8(p, "gluon_fp8", nearest_logarithm, precision=precision)


@pytest.mark.parametrize("change", [segments, some_full_rows])
@pytest.mark.parametrize("sizes", backend.NUM_STAGES)
@pytest.mark.parametrize("pool, precision", [
    (4, "fp8"), (16, "fp8"), (32, "fp8"), (64, "fp8"), (16, "int8"), (64, "int8"),
])
@pytest.mark.parametrize("device", GPU)
def test_tail(monkeypatch, device, pool, precision, sizes, change):
    """In the kernel itself, tiles of full pools and of short ones."""
    monkeypatch.setattr(api, "add_tail", None)
    p = change(several_rows(device, sizes, num_queries=2300, num_keys=17_000))
    check_fp8(p, "gluon_fp8", nearest_logarithm, tail_of(p, pool, True), precision)


@pytest.mark.parametrize("change", NASTY)
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("device", GPU)
def test_tail_of_nasty_problems(monkeypatch, device, precision, change):
    monkeypatch.setattr(api, "add_tail", None)
    p = change(problem(device, torch.bfloat16, num_queries=300, seed=2))
    check_fp8(p, "gluon_fp8", nearest_logarithm, tail_of(p, 32, False), precision)


@pytest.mark.parametrize("device", GPU)
def test_offsets_beyond_32_bits(device):
    """The last head starts beyond element 2 ** 31, in 8 bits too: 8.7 GB, and 6.5 in 8 bits."""
    check_large_offsets(device, "gluon_fp8", heads=1040, precision="fp8")


def test_fits_the_gpu():
    """Compiled here for sm90: within its shared memory, no spills in the loops, no waits."""
    builds = built_by(__file__)
    assert len(builds) == len(BUILDS)
    for (head_dim, key_block, everything, pool, last, precision), build in zip(BUILDS, builds):
        assert build["shared"] <= SHARED_MEMORY[90], build
        # Addresses, stored once a row, outside the loops of tiles; those of pools are more.
        spilled = {(128, 128): 64, (128, 64): 40}.get((head_dim, key_block), 16 if pool else 0)
        # In the loop of tiles that are not whole blocks, two words.
        by_tile = 2 if head_dim == key_block == 128 and everything else 0
        if precision == "int8" and head_dim == 128:
            # 64 logits of 32 bits and 64 outputs, and with pools all that can be asked for.
            spilled, by_tile = (256, 10) if pool else (64, 3)
        assert build["spilled"] <= spilled, build
        assert len(build["spilled_by_tile"]) <= by_tile, build
        # Else the request for more registers was dropped in silence.
        assert {24, 240} <= set(build["budgets"]), build
        assert not build["serialized"] and build["undefined"] == [], build
        kinds = {product.partition("k32.")[2] for product in build["products"]}
        logits = "s32.s8.s8" if precision == "int8" else "f16.e4m3.e4m3"
        assert kinds == {"f32.e4m3.e4m3", logits}, build
        # Of both warpgroups: the first tile and a loop of others, of whole blocks and not; a narrow
        # tile of pools. Weights, of the tile before and of the last one, are multiplied by values,
        # and by ones for their sum.
        narrow = pool > 0 and last < key_block
        keys = 2 * (4 + narrow) * head_dim // 32
        weights = 2 * 2 * ((3 + narrow) * key_block + narrow * last) // 32
        assert (build["count"], build["from_registers"]) == (keys + weights, weights), build


def compile_for_hopper(head_dim, key_block, everything, pool, last, precision):
    """Compile the kernel without a GPU and ask ptxas what it takes."""
    kernel = backend.block_sparse_kernel
    q = torch.zeros(1, 1, 256, head_dim, dtype=torch.bfloat16)
    k, v = q.to(ROUNDING[precision]["dtype"]), q.to(torch.float8_e4m3fn).transpose(2, 3)
    ints, floats = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    values = dict(
        q=backend.describe_rows(q, 64), k=backend._describe(k, key_block, head_dim),
        v=backend._describe(v.contiguous(), head_dim, key_block),
        out=q, rows=ints, next_row=ints, counts=ints, indices=ints, scale=0.1, scales=floats,
        lse=floats if everything else None, key_mean=floats if everything else None,
        key_lengths=ints if everything else None,
        output_order=ints if everything else None, order_stride=300 if everything else None,
    )
    if pool:
        values |= dict(
            pool_keys=values["k"], pool_values=values["v"], bias=floats, bits=ints.to(torch.uint8)
        )
    constants = dict(
        D=head_dim, ROWS=64, KEYS=key_block, STAGES=backend.NUM_STAGES[head_dim, key_block],
        HAS_LENGTHS=everything, ORDERED=everything, WITH_LSE=everything, POOL=pool,
        LAST=last,
    )
    report, ptx = compile_gluon(kernel, values, constants)
    products = re.findall(r"(wgmma\.mma_async\S+)\s+\{[^}]*\},\s*(\S)", ptx)
    return report | dict(
        products=sorted({name for name, _ in products}),
        count=len(products),
        from_registers=sum(operand == "{" for _, operand in products),
    )


if __name__ == "__main__":
    print(json.dumps([compile_for_hopper(*build) for build in BUILDS]))
