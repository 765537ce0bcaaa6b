"""Whole pipelines through every Triton kernel, in the interpreter, against the torch code."""

import pytest
import torch
from tiny_pipelines import FAMILIES, run

from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn, score, selection
from dfsattn_diffusers.kernels import block_map, fast, prologue, tail

pytest.importorskip("triton")
from dfsattn_diffusers.kernels import prologue_kernels  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("tests/test_gpu.py does this on a GPU", allow_module_level=True)

SPARSE = DFSAttnConfig(
    dense_fraction=0, keep_ratios=(0.5,), query_block=64, key_block=64, backend="triton"
)
SHORT = dict(steps=2, guidance=False, grid=(2, 9, 11))
BEYOND = SPARSE.replace(budget="layer", selection="error", tail="moment", tail_pool=32)


@pytest.mark.parametrize("config", [SPARSE, BEYOND], ids=["paper", "beyond"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox-5b"])
def test_kernels_agree_with_torch(family, config, monkeypatch):
    pipe = FAMILIES[family](head_dim=64)
    dense = run(pipe, **SHORT)
    with enable_dfsattn(pipe, config.replace(backend="reference")):
        plain = run(pipe, **SHORT)
    used = set()

    def load(name, x):
        used.add(name)
        return fast._load(name)

    def few_programs(heads, head_dim, tile, settings):
        # The interpreter takes as long for a large one; test_prologue.py has those of a GPU.
        slots = tile or 64
        return slots, slots, heads, 1

    monkeypatch.setattr(prologue_kernels, "launch_shape", few_programs)
    for module in (block_map, prologue, score, selection, tail):
        monkeypatch.setattr(module, "fast", load)
    with enable_dfsattn(pipe, config) as handle:
        ours = run(pipe, **SHORT)
    calls = handle.report().runs[-1].calls
    assert calls["refresh"] == calls["reuse"] > 0
    wanted = {"map_kernels", "prologue_kernels", "tile_scores", "top_blocks"}
    assert used == wanted | ({"tail_kernels"} if config is BEYOND else set())
    # Rounding may tip a block over the edge of the selection.
    assert (ours - plain).norm() <= 0.1 * (plain - dense).norm() + 1e-4 * dense.norm()
