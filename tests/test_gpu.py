"""Whole pipelines on a CUDA GPU, through the Triton kernel: `pytest -m gpu`."""

import warnings

import pytest
import torch
from tiny_pipelines import FAMILIES, run, transformers

from dfsattn_diffusers import DFSAttnConfig, DFSAttnProcessor, disable_dfsattn, enable_dfsattn
from dfsattn_diffusers.kernels import fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

EVERYTHING = DFSAttnConfig(dense_fraction=0, keep_ratios=(1.0,), backend="triton")
SPARSE = DFSAttnConfig(
    keep_ratios=(0.5, 0.4, 0.3), query_block=64, key_block=64, budget="layer", backend="triton"
)


BEYOND = SPARSE.replace(tail="moment", tail_pool=32, selection="error")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=[SPARSE, BEYOND], ids=["paper", "beyond"])
def config(request):
    return request.param


def build(family, dtype=torch.bfloat16, head_dim=64):
    return FAMILIES[family](head_dim=head_dim).to("cuda", dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keeping_everything_equals_dense(family, dtype, head_dim):
    pipe = build(family, dtype, head_dim)
    dense = run(pipe, steps=2).float()
    with enable_dfsattn(pipe, EVERYTHING):
        sparse = run(pipe, steps=2).float()
    exact = run(pipe.to(torch.float32), steps=2)
    eager_error = (dense - exact).norm() / exact.norm()
    assert (sparse - exact).norm() / exact.norm() <= 1.5 * eager_error


def test_runs_repeat_and_leave_no_trace(family, config):
    pipe = build(family)
    stock = run(pipe)
    with enable_dfsattn(pipe, config) as handle:
        first, second = run(pipe), run(pipe)
    assert torch.equal(first, second) and first.isfinite().all()
    assert not torch.equal(first, stock)
    assert torch.equal(run(pipe), stock)
    report = handle.report().runs[-1]
    assert report.calls["reuse"] >= 0 < report.calls["refresh"] and report.seconds > 0


def test_kernels_agree_with_torch(family, config, monkeypatch):
    """Attention alone in Triton, and with it prologue, scores, maps and tail; else all in torch."""
    pipe = build(family)

    def video(backend):
        with enable_dfsattn(pipe, config, backend=backend):
            return run(pipe).float()

    videos = {"all": video("triton")}
    monkeypatch.setattr(fast, "_load", lambda name: None)
    videos |= {"attention": video("triton"), "none": video("reference")}
    pipe.to(torch.float32)
    exact = video("reference")
    error = {name: (video - exact).norm() / exact.norm() for name, video in videos.items()}
    # Rounding may tip a block over the edge of the selection, in each.
    assert error["attention"] <= 2 * error["none"] + 1e-2
    assert error["all"] <= 2 * error["none"] + 1e-2


def sync_warnings(pipe, steps):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(pipe, steps=steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


@pytest.mark.parametrize("way", ["enable", "bare"])
def test_no_sync_in_the_step_loop(family, config, way):
    pipe = build(family)
    run(pipe)
    stock = {steps: sync_warnings(pipe, steps) for steps in (4, 12)}
    if way == "enable":
        enable_dfsattn(pipe, config)
    else:
        for transformer in transformers(pipe).values():
            transformer.set_attn_processor(DFSAttnProcessor(config))
    run(pipe)
    ours = {steps: sync_warnings(pipe, steps) for steps in (4, 12)}
    disable_dfsattn(pipe)
    # What a new token layout costs once per run must not grow with the steps.
    assert ours[12] - ours[4] == stock[12] - stock[4]
    # HunyuanVideo's two prompts have masks, of which each is read once.
    masks = 2 if family == "hunyuan_video" else 0
    assert ours[4] - stock[4] <= 4 * len(transformers(pipe)) + masks


def test_cpu_offload_before_and_after(family):
    wanted = None
    for offload_first in (None, True, False):
        pipe = FAMILIES[family](head_dim=64).to(torch.bfloat16)
        if offload_first is None:
            pipe.to("cuda")
        if offload_first:
            pipe.enable_model_cpu_offload()
        handle = enable_dfsattn(pipe, SPARSE)
        if offload_first is False:
            pipe.enable_model_cpu_offload()
        videos = [run(pipe).cpu() for _ in range(2)]
        wanted = videos[0] if wanted is None else wanted
        assert torch.equal(videos[0], wanted) and torch.equal(videos[1], wanted)
        assert all(r.calls["refresh"] for r in handle.report().runs)
        handle.disable()
        assert run(pipe).isfinite().all()
