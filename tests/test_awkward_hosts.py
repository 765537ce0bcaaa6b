"""Hosts that behave awkwardly: failed runs, copied timesteps, own loops, fusing, compiling."""

import math

import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from tiny_pipelines import PROMPT, TEXT_LENGTH, run, tiny_cogvideox, tiny_hunyuan_video, tiny_wan

from dfsattn_diffusers import DFSAttnConfig, DFSAttnProcessor, disable_dfsattn, enable_dfsattn
from dfsattn_diffusers.metrics import psnr

BLOCKS = dict(tile_size=8, query_block=32, key_block=32)
SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), **BLOCKS)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("way", ["bare", "transformer", "another pipeline"])
def test_timesteps_that_are_copies_from_the_second_step_on(guidance, way):
    """HunyuanVideo in bfloat16: latents, and with them timesteps, are float32 in step 0 only."""
    pipe = tiny_hunyuan_video().to(dtype=torch.bfloat16)
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe, steps=20, guidance=guidance)
    other = type(pipe)(**pipe.components)
    if way == "bare":
        pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE))
    else:
        enable_dfsattn(pipe.transformer if way == "transformer" else other, SPARSE)
    assert torch.equal(run(pipe, steps=20, guidance=guidance), wanted)
    assert torch.equal(run(pipe, steps=20, guidance=guidance), wanted)
    disable_dfsattn(pipe)


def test_a_failed_run_does_not_spoil_another_pipeline_of_the_same_transformer():
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    pipe = tiny_wan()
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    other = WanVideoToVideoPipeline(**{name: pipe.components[name] for name in names})
    other.set_progress_bar_config(disable=True)

    def go():
        latents = torch.randn(1, 16, 5, 18, 22, generator=torch.Generator().manual_seed(0))
        return other(
            prompt=PROMPT,
            height=144,
            width=176,
            num_inference_steps=8,
            latents=latents,
            output_type="latent",
            max_sequence_length=TEXT_LENGTH,
        ).frames

    with enable_dfsattn(pipe, SPARSE) as handle:
        good = go()
        with pytest.raises(Stop):
            run(pipe, steps=8, callback_on_step_end=stop)
        assert torch.equal(go(), good)
    assert handle.report().runs[-1].calls["reuse"] > 0


def test_two_videos_of_ones_own_loop():
    transformer = tiny_wan().transformer
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))

    def loop(seed):
        latents = torch.randn(1, 16, 5, 18, 22, generator=torch.Generator().manual_seed(seed))
        for timestep in torch.linspace(1000, 20, 50).tolist():
            velocity = transformer(latents, torch.tensor([timestep]), text).sample
            latents = latents - velocity / 50
        return latents

    with torch.no_grad(), enable_dfsattn(transformer, SPARSE) as handle:
        loop(0)
        second = loop(1)
        handle.reset()
        assert torch.equal(loop(1), second)


def test_a_timestep_per_token_is_no_schedule():
    pipe = tiny_wan()
    pipe.register_to_config(expand_timesteps=True)
    with enable_dfsattn(pipe.transformer, SPARSE) as handle:
        run(pipe, steps=8, prompt=[PROMPT] * 2, seed=[0, 1])
    assert [r.steps for r in handle.report().runs] == [8]


@pytest.mark.parametrize("what", ["whole", "blocks"])
def test_torch_compile(what):
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe, steps=6)
    enable_dfsattn(pipe, SPARSE)
    if what == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(run(pipe, steps=6), wanted, atol=1e-4, rtol=1e-4)


def test_bare_on_a_compiled_transformer():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe, steps=6)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE, num_inference_steps=6))
    torch.testing.assert_close(run(pipe, steps=6), wanted, atol=1e-4, rtol=1e-4)


def test_layers_on_another_device_than_the_inputs():
    transformer = tiny_wan().transformer
    latents, text = torch.randn(1, 16, 5, 18, 22), torch.randn(1, 5, 16)
    timestep, forward = torch.tensor([500.0]), transformer.forward
    # As accelerate does for a transformer that is spread over devices.
    transformer.forward = lambda *args: forward(latents, timestep, text)
    with torch.no_grad(), enable_dfsattn(transformer, SPARSE, dense_fraction=0):
        out = transformer(latents.to("meta"), timestep, text).sample
    assert out.isfinite().all()


@pytest.mark.parametrize("runs_while_fused", [0, 1])
@pytest.mark.parametrize("unfuse_first", [True, False])
def test_unfusing(runs_while_fused, unfuse_first):
    pipe = tiny_cogvideox("5b")
    before, stock = pipe.transformer.attn_processors, run(pipe)
    handle = enable_dfsattn(pipe, SPARSE)
    pipe.transformer.fuse_qkv_projections()
    for _ in range(runs_while_fused):
        run(pipe)
    steps = [pipe.transformer.unfuse_qkv_projections, handle.disable]
    for step in steps if unfuse_first else reversed(steps):
        step()
    after = pipe.transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(pipe), stock)


def test_an_attention_backend_set_while_enabled_stays():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE):
        pipe.transformer.set_attention_backend("_native_math")
    try:
        processors = pipe.transformer.attn_processors.values()
        assert {p._attention_backend for p in processors} == {"_native_math"}
    finally:
        pipe.transformer.set_attention_backend("native")


def test_psnr_of_videos_with_one_equal_frame():
    video = torch.rand(4, 16, 16, 3)
    other = video.clone()
    other[1:] = 1 - other[1:]
    assert math.isfinite(psnr(video, other)) and psnr(video, video) == math.inf
