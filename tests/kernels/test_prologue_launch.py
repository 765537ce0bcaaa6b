"""The prologue compiles for every kind of GPU, hardly spills, and moves whole vectors."""

import json
import sys

import pytest
from compiling import SHARED_MEMORY, built_by, compile_for

# Norm, head dim, heads, two streams, what is asked for.
CALLS = {
    "wan": ("rms_all_heads", 128, 40, False, ("rows",)),
    "wan, pooled": ("rms_all_heads", 128, 40, False, ("rows", "tiles")),
    "wan, slots": ("rms_all_heads", 128, 40, False, ("rows", "slots")),
    "wan, tiles alone": ("rms_all_heads", 128, 40, False, ("tiles",)),
    "halves": ("rms", 128, 24, False, ("rows", "halves")),
    "hunyuan": ("rms", 128, 24, True, ("rows", "tiles")),
    "hunyuan, slots": ("rms", 128, 24, True, ("rows", "slots")),
    "hunyuan, tiles alone": ("rms", 128, 24, True, ("tiles",)),
    "cogvideox": ("layer", 64, 48, False, ("rows",)),
    "cogvideox, slots": ("layer", 64, 48, False, ("rows", "slots")),
    "cogvideox, pooled": ("layer", 64, 48, False, ("rows", "tiles")),
    "cogvideox, tiles alone": ("layer", 64, 48, False, ("tiles",)),
    "cogvideox-2b": (None, 64, 30, False, ("rows", "tiles")),
}


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_fits_the_gpu(arch):
    pytest.importorskip("triton")
    builds = built_by(__file__, arch)
    assert len(builds) == len(CALLS)
    for build in builds:
        assert build["shared"] <= SHARED_MEMORY[arch] // 2, build
        # Some ptxas spill a few words, where that lets one more program run.
        assert build["spilled"] <= 32, build
        # Single values are no more than those of a norm's weights and biases.
        assert build["half_loads"] <= 4 and build["half_stores"] == 0, build


def compile_call(arch, norm, head_dim, heads, two, asked):
    import triton.language as tl

    from dfsattn_diffusers.kernels import prologue_kernels

    rows, tiles = "rows" in asked, "tiles" in asked
    settings = prologue_kernels.settings_for(norm, rows, tiles)
    tile = 16 if tiles else None
    slots, tokens, group, loads = prologue_kernels.launch_shape(
        heads, head_dim, tile, settings
    )
    constants = dict(
        NORM=norm, STEP=tl.float32, INTERLEAVED="halves" not in asked, H=heads, D=head_dim,
        SLOTS=slots, TOKENS=tokens, HEADS=group, LOADS=loads, PARTS=3 if rows else 2,
        PACKED=prologue_kernels.pairs_pay(norm),
    )  # fmt: skip
    types = dict(eps="fp32", source="*i32")
    kinds = dict.fromkeys(("q", "k", "v", "q_out", "k_out", "v_out"), "*bf16")
    present = dict.fromkeys(("q2", "k2", "v2"), two)
    for name in ("weight", "weight2", "bias", "bias2"):
        wanted = norm == "layer" or norm is not None and name.startswith("weight")
        present |= dict.fromkeys((f"q_{name}", f"k_{name}"), wanted and (two or name[-1] != "2"))
    kinds |= dict.fromkeys(present, "*bf16")
    kinds |= dict(q_tiles="*fp32", k_tiles="*fp32", lengths="*i32", cos="*fp32", sin="*fp32")
    kinds |= dict(slots="*i32", N="i32")
    present |= dict.fromkeys(("q_out", "k_out", "v_out"), rows)
    present |= dict.fromkeys(("slots", "N"), "slots" in asked)
    present |= dict.fromkeys(("q_tiles", "k_tiles", "lengths"), tiles)
    present |= dict.fromkeys(("cos", "sin"), norm is not None)
    for name, kind in kinds.items():
        if present.get(name, True):
            types[name] = kind
        else:
            constants[name] = None
    return compile_for(
        arch, prologue_kernels.prologue_kernel, constants, settings.num_warps, types=types,
        aligned=("stride_b", "stride_n", "stride_o"), fuse=False,
    )  # fmt: skip


if __name__ == "__main__":
    builds = [compile_call(int(sys.argv[1]), *call)[0] for call in CALLS.values()]
    print(json.dumps(builds, default=str))
