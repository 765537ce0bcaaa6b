"""The Gluon kernel: it fits sm90, is right on a GPU, and says what it cannot."""

import json

import pytest
import torch
from compiling import SHARED_MEMORY, built_by, compile_gluon
from kernel_cases import (
    ON_CUDA,
    assert_close,
    check_large_offsets,
    segments,
    several_rows,
    some_full_rows,
)
from sass import spills_of_tiles, undefined_reads
from test_tail import check as check_tail

from dfsattn_diffusers.kernels import BlockMap, api, explain
from dfsattn_diffusers.kernels.backends import load_backend

backend = load_backend("gluon_hopper")
if not hasattr(backend, "NUM_STAGES"):
    pytest.skip(backend.why_not(None), allow_module_level=True)

# Head dim, key block, dtype, whether lengths, an order and the log-sum-exp are asked for, and keys
# of the tail's pools or 0.
BUILDS = [
    (128, 128, "bfloat16", False, 0),
    (128, 128, "bfloat16", True, 0),
    (128, 64, "bfloat16", False, 0),
    (64, 128, "float16", True, 0),
    (128, 128, "bfloat16", False, 32),
    (128, 128, "bfloat16", True, 32),
    (128, 64, "bfloat16", True, 32),
    (64, 128, "float16", False, 64),
    (64, 64, "float16", True, 16),
]


def explained(q, query_block=128, key_block=128):
    rows, columns = -(-q.shape[2] // query_block), -(-q.shape[2] // key_block)
    block_map = BlockMap.full(
        *q.shape[:2], rows, columns, query_block=query_block, key_block=key_block, device=q.device
    )
    return explain(q, q, q, block_map)


def test_refuses_other_devices():
    reason = explained(torch.ones(1, 1, 64, 64)).rejected["gluon_hopper"]
    assert reason == "it needs a CUDA device of capability 9.0, got cpu"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dtype=torch.float32), "it needs torch.bfloat16 or torch.float16, got torch.float32"),
        (dict(head_dim=32), "head dim 64 or 128, got 128, 128 and 32"),
        (dict(query_block=64), "it needs query blocks of 128, .* got 64, 128 and 64"),
        (dict(key_block=32), "key blocks of 64 or 128 .* got 128, 32 and 64"),
        (dict(stride=67), "it needs q's address and strides in multiples of 16 bytes"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_refuses_what_it_cannot_do(monkeypatch, device, changes, message):
    if device == "cpu":
        monkeypatch.setattr(backend, "_is_hopper", lambda device: True)
    size = dict(dtype=torch.float16, head_dim=64, query_block=128, key_block=128, stride=64)
    size |= changes
    stride = max(size["stride"], size["head_dim"])
    q = torch.ones(1, 1, 256, stride, dtype=size["dtype"], device=device)[..., : size["head_dim"]]
    choice = explained(q, size["query_block"], size["key_block"])
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(choice.rejected["gluon_hopper"])


@pytest.mark.parametrize("change", [segments, some_full_rows])
@pytest.mark.parametrize("sizes", backend.NUM_STAGES)
@pytest.mark.parametrize("fewest", [False, True])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_many_rows(monkeypatch, device, fewest, sizes, change):
    """More than the GPU does at a time."""
    if fewest:
        monkeypatch.setitem(backend.NUM_STAGES, sizes, 2)
    p = change(several_rows(device, sizes, num_queries=4500))
    p.mask[:, 0, 3:9] = False
    out, lse = p.run("gluon_hopper", return_lse=True)
    exact, eager = p.dense(torch.float64), p.dense(torch.bfloat16)
    assert_close(out, exact[0], eager[0])
    assert_close(lse, exact[1], eager[1])


@pytest.mark.parametrize("change", [segments, some_full_rows])
@pytest.mark.parametrize("sizes", backend.NUM_STAGES)
@pytest.mark.parametrize("pool", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_tail(monkeypatch, device, pool, sizes, change):
    """In the kernel itself, tiles of full pools and of short ones."""
    monkeypatch.setattr(api, "add_tail", None)
    p = change(several_rows(device, sizes, num_queries=2300, num_keys=17_000))
    check_tail(p, pool, True, "gluon_hopper")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_offsets_beyond_32_bits(device):
    """The last head starts beyond element 2 ** 31."""
    check_large_offsets(device, "gluon_hopper")


def test_the_check_of_machine_code_sees_an_unset_descriptor():
    code = """
        /*0000*/ UMOV UR4, 0x1 ;
        /*0010*/ UMOV UR5, 0x2 ;
        /*0020*/ @P0 BRA `(.L_x_1) ;
        /*0030*/ UIADD3.64 UR6, UR4, 0x2, URZ ;
    .L_x_1:
        /*0040*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/ EXIT ;
    """
    assert undefined_reads(code) == ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"]
    assert undefined_reads(code.replace("@P0 BRA `(.L_x_1)", "NOP")) == []
    # With queries in registers only the keys are described.
    assert undefined_reads(code.replace("R24, gdesc[UR4]", "R24, R8, gdesc[UR2]")) == []


def test_the_check_of_machine_code_sees_what_is_spilled_for_each_tile():
    code = """
    .L_x_1:
        /*0000*/ STL [R2], R1 ;
    .L_x_2:
        /*0010*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/ @!P1 BRA `(.L_x_4) ;
    .L_x_3:
        /*0030*/ STL [R3], R4 ;
        /*0040*/ @P0 BRA `(.L_x_2) ;
        /*0050*/ STL [R6], R5 ;
        /*0060*/ @P2 BRA `(.L_x_1) ;
        /*0070*/ EXIT ;
    .L_x_4:
        /*0080*/ @!P1 BRA `(.L_x_4) ;
        /*0090*/ BRA `(.L_x_3) ;
    """
    # In the loop around it, a row's, spills do not matter; a wait beside the loop belongs to it.
    assert spills_of_tiles(code) == ["STL [R3], R4"]
    assert spills_of_tiles(code.replace("STL [R3], R4", "LDL R4, [R3]")) == []
    waiting = code.replace("/*0090*/", "/*0088*/ STL [R8], R7 ;\n /*0090*/")
    assert spills_of_tiles(waiting) == ["STL [R3], R4", "STL [R8], R7"]


def test_fits_the_gpu():
    """Compiled here for sm90: shared memory within its limit, next to no spills, no waits."""
    builds = built_by(__file__)
    assert len(builds) == len(BUILDS)
    for (head_dim, key_block, _, everything, pool), build in zip(BUILDS, builds):
        assert build["shared"] <= SHARED_MEMORY[90], build
        # What the kernel computes once: offsets for rows, for pools and for clearing padding.
        allowed = (0, 40, 64)[everything + bool(pool)] if head_dim == key_block == 128 else 0
        assert build["spilled"] <= allowed, build
        # Of each tile nothing, but where all is asked for at once: two words in loops of pools.
        most = 4 if allowed and everything and pool else 0
        assert len(build["spilled_by_tile"]) <= most, build
        assert not build["serialized"], build
        # Else the request for more registers was dropped in silence.
        assert {40, 232} <= set(build["budgets"]), build
        assert build["undefined"] == [], build


def compile_for_hopper(head_dim, key_block, dtype, everything, pool):
    """Compile the kernel without a GPU and ask ptxas what it takes."""
    kernel = backend.block_sparse_kernel
    x = torch.zeros(1, 1, 256, head_dim, dtype=getattr(torch, dtype))
    ints, floats = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    keys = backend.describe_rows(x, key_block)
    values = dict(
        q=backend.describe_rows(x, 64), k=keys, v=keys, out=x, scale_log2=0.1,
        rows=ints, next_row=ints, counts=ints, indices=ints,
        lse=floats if everything else None, key_lengths=ints if everything else None,
        output_order=ints if everything else None, order_stride=300 if everything else None,
        pool_keys=keys if pool else None, pool_values=keys if pool else None,
        bias=floats if pool else None, bits=ints.to(torch.uint8) if pool else None,
    )
    constants = dict(
        D=head_dim, ROWS=64, KEYS=key_block, STAGES=backend.NUM_STAGES[head_dim, key_block],
        HAS_LENGTHS=everything, ORDERED=everything, WITH_LSE=everything, POOL=pool,
    )
    return compile_gluon(kernel, values, constants)[0]


if __name__ == "__main__":
    print(json.dumps([compile_for_hopper(*build) for build in BUILDS]))
