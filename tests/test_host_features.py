"""Features of the host that change when, where or how often attention runs."""

import copy
import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    MagCacheConfig,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tiny_pipelines import FAMILIES, PROMPT, TEXT_LENGTH, run, tiny_hunyuan_video, tiny_wan

from dfsattn_diffusers import DFSAttnConfig, dense, disable_dfsattn, enable_dfsattn
from dfsattn_diffusers.processors import adapter_for
from dfsattn_diffusers.text import TextReader

BLOCKS = dict(tile_size=8, query_block=32, key_block=32)
SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), **BLOCKS)
EVERYTHING = DFSAttnConfig(dense_fraction=0, keep_ratios=(1.0,), **BLOCKS)
MAIN_FAMILIES = ("wan", "hunyuan_video", "cogvideox-5b")


def parameters(processor):
    return list(inspect.signature(type(processor).__call__).parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_take_what_the_stock_ones_take_in_the_same_order(family):
    transformer = FAMILIES[family]().transformer
    stock = transformer.attn_processors
    with enable_dfsattn(transformer):
        for name, ours in transformer.attn_processors.items():
            assert parameters(ours) == parameters(stock[name])
            attn = transformer.get_submodule(name.removesuffix(".processor"))
            rebuilt = adapter_for(transformer).stock_processor(name, attn)
            assert type(rebuilt) is type(stock[name])


FIRST_BLOCK = FirstBlockCacheConfig(threshold=0.3)
MAG = MagCacheConfig(threshold=0.3, num_inference_steps=8, mag_ratios=torch.ones(8))


@pytest.mark.parametrize(
    "family, cache", [*((family, FIRST_BLOCK) for family in MAIN_FAMILIES), ("wan2.2", MAG)]
)
def test_block_caches_skip_layers(family, cache):
    pipe = FAMILIES[family](layers=3)
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    transformers = [transformer for transformer in found if transformer is not None]
    for transformer in transformers:
        transformer.enable_cache(cache)
    stock = run(pipe, steps=8)
    with enable_dfsattn(pipe, SPARSE) as handle:
        sparse = run(pipe, steps=8)
        assert torch.equal(run(pipe, steps=8), sparse)
    calls = handle.report().runs[0].calls
    assert calls["refresh"] > 0 and not torch.equal(sparse, stock)
    assert torch.equal(run(pipe, steps=8), stock)
    for transformer in transformers:
        transformer.disable_cache()
    with enable_dfsattn(pipe, SPARSE) as handle:
        for transformer in transformers:
            transformer.enable_cache(cache)
        assert torch.equal(run(pipe, steps=8), sparse)
        for transformer in transformers:
            transformer.disable_cache()
        run(pipe, steps=8)
    assert sum(handle.report().runs[1].calls.values()) > sum(calls.values())


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("way", ["align", "offload"])
def test_accelerate_hooks_come_and_go(family, first, way):
    pipe = FAMILIES[family]()
    before, stock = pipe.transformer.attn_processors, run(pipe)

    def add():
        if way == "offload":
            cpu_offload(pipe.transformer, torch.device("cpu"))
        else:
            add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu"))

    if first == "theirs":
        add()
    with enable_dfsattn(pipe, SPARSE):
        if first == "ours":
            add()
        sparse = run(pipe)
        remove_hook_from_module(pipe.transformer, recurse=True)
        assert torch.equal(run(pipe), sparse)
        add()
        assert torch.equal(run(pipe), sparse)
    after = pipe.transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(pipe), stock)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("way", ["casting", "leaf_level", "block_level"])
def test_casting_and_group_offload_in_either_order(first, way):
    pipe = tiny_wan()

    def apply():
        if way == "casting":
            pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        else:
            pipe.transformer.enable_group_offload(
                torch.device("cpu"), offload_type=way, num_blocks_per_group=1
            )

    if first == "theirs":
        apply()
    with enable_dfsattn(pipe, SPARSE) as handle:
        if first == "ours":
            apply()
        sparse = run(pipe)
        assert torch.equal(run(pipe), sparse)
    stock = run(pipe)
    assert not torch.equal(stock, sparse)
    with enable_dfsattn(pipe, SPARSE):
        assert torch.equal(run(pipe), sparse)
    assert torch.equal(run(pipe), stock)
    assert handle.report().runs[0].calls["refresh"] > 0


def test_copies_and_saved_pipelines(tmp_path):
    pipe = tiny_wan()
    stock = run(pipe)
    handle = enable_dfsattn(pipe, SPARSE)
    sparse = run(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin), sparse)
    assert len(handle.report().runs) == 1
    disable_dfsattn(twin)
    assert torch.equal(run(twin), stock)
    assert torch.equal(run(pipe), sparse)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run(WanPipeline.from_pretrained(tmp_path)), stock)


def at_step(step, action):
    def callback(pipe, index, timestep, tensors):
        if index == step:
            action(pipe)
        return {}

    return callback


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, "wan2.2"])
def test_callbacks_enable_reset_interrupt_and_disable(family):
    pipe, handles = FAMILIES[family](), []
    stock = run(pipe, steps=6)
    enable = at_step(2, lambda pipe: handles.append(enable_dfsattn(pipe, SPARSE)))
    run(pipe, steps=6, callback_on_step_end=enable)
    (handle,) = handles
    report = handle.report().runs[0]
    assert (report.steps, report.num_steps, report.calls["dense"]) == (3, 6, 0)
    sparse = run(pipe, steps=6)

    def reset(pipe):
        assert handle.report().runs[-1].steps == 4
        handle.reset()
        assert str(handle.report()) == "DFSAttn: no generation yet"

    run(pipe, steps=6, callback_on_step_end=at_step(3, reset))
    assert [(r.steps, r.num_steps) for r in handle.report().runs] == [(2, 6)]
    assert torch.equal(run(pipe, steps=6), sparse)

    def interrupt(pipe):
        pipe._interrupt = True

    run(pipe, steps=6, callback_on_step_end=at_step(3, interrupt))
    assert handle.report().runs[-1].steps == 4
    assert torch.equal(run(pipe, steps=6), sparse)

    run(pipe, steps=6, callback_on_step_end=at_step(3, lambda pipe: handle.disable()))
    assert handle.report().runs[-1].steps == 4 and not handle.enabled
    assert torch.equal(run(pipe, steps=6), stock)


def test_nothing_is_kept_after_a_run():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE) as handle:
        run(pipe)
        assert not handle.state._maps and not handle.state._layouts
        assert handle._clock._timestep is None


def test_second_order_schedulers_have_more_timesteps_than_steps():
    pipe = tiny_wan()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with enable_dfsattn(pipe, SPARSE) as handle:
        assert torch.equal(run(pipe, steps=8), run(pipe, steps=8))
    report = handle.report().runs[0]
    assert report.steps == report.num_steps == 15
    assert report.calls == {"dense": 4 * 4, "refresh": 4 * 3, "reuse": 4 * 8}


@pytest.mark.parametrize("known", ["the pipeline", "another pipeline", "the transformer"])
def test_video_to_video_starts_inside_the_schedule(known):
    """It sets no cache context, and shares its transformer with the pipeline it came from."""
    source = tiny_wan()
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: source.components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (17, 144, 176, 3), dtype=np.uint8)
    arguments = dict(
        video=[Image.fromarray(frame) for frame in pixels],
        prompt=PROMPT,
        height=144,
        width=176,
        num_inference_steps=8,
        strength=0.75,
        output_type="latent",
        max_sequence_length=TEXT_LENGTH,
    )
    target = {"the pipeline": pipe, "another pipeline": source, "the transformer": pipe.transformer}
    with enable_dfsattn(target[known], SPARSE) as handle:
        for _ in range(2):
            pipe(**arguments, generator=torch.Generator().manual_seed(0))
    for report in handle.report().runs:
        assert (report.steps, report.num_steps) == (6, 8)
        assert report.calls == {"dense": 0, "refresh": 12, "reuse": 12}


@pytest.mark.parametrize("missing", ["transformer", "transformer_2"])
def test_wan22_with_one_of_its_transformers(missing):
    pipe = tiny_wan(two_transformers=True)
    other = pipe.transformer_2 if missing == "transformer" else pipe.transformer
    pipe.register_modules(**{missing: None})
    pipe.register_to_config(boundary_ratio=1.0 if missing == "transformer" else None)
    pipe.set_progress_bar_config(disable=True)
    before = other.attn_processors
    with enable_dfsattn(pipe, SPARSE) as handle:
        pipe(
            PROMPT,
            height=144,
            width=176,
            num_frames=17,
            num_inference_steps=8,
            output_type="latent",
            max_sequence_length=TEXT_LENGTH,
        )
    assert handle.report().runs[0].calls == {"dense": 8, "refresh": 12, "reuse": 12}
    assert all(other.attn_processors[name] is before[name] for name in before)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_several_videos_of_one_prompt(family):
    pipe = FAMILIES[family]()
    with enable_dfsattn(pipe, SPARSE):
        alone = run(pipe)
        pair = run(pipe, num_videos_per_prompt=2, seed=[0, 0])
        assert torch.equal(run(pipe), alone)
    torch.testing.assert_close(pair, alone.expand_as(pair), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 2, 1), (1, 9, 11)])
def test_single_frames_down_to_a_single_token(family, grid):
    pipe = FAMILIES[family]()
    dense = run(pipe, grid=grid)
    with enable_dfsattn(pipe, EVERYTHING):
        torch.testing.assert_close(run(pipe, grid=grid), dense, atol=1e-4, rtol=1e-4)
    with enable_dfsattn(pipe, SPARSE, dense_fraction=0, budget="layer") as handle:
        assert run(pipe, grid=grid).isfinite().all()
    assert (handle.report().runs[0].density == 1) == (grid[1] < 9)


def test_prompts_of_different_lengths_in_one_batch():
    pipe, prompts = tiny_hunyuan_video(), ["a", "a red circle moves over a blue square"]
    dense = run(pipe, prompt=prompts, seed=[0, 1])
    with enable_dfsattn(pipe, EVERYTHING):
        both = run(pipe, prompt=prompts, seed=[0, 1])
    torch.testing.assert_close(both, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, channels", [("latent_concat", 33), ("token_replace", 16)])
@pytest.mark.parametrize("text_length", [1, 7, 12])
def test_hunyuan_video_from_images(kind, channels, text_length):
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=kind,
        guidance_embeds=False,
    ).eval()
    inputs = dict(
        hidden_states=torch.randn(1, channels, 5, 18, 22),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 12, 16),
        encoder_attention_mask=(torch.arange(12) < text_length).float()[None],
        pooled_projections=torch.randn(1, 16),
    )
    with torch.no_grad():
        dense = transformer(**inputs).sample
        with enable_dfsattn(transformer, EVERYTHING):
            kept = transformer(**inputs).sample
        with enable_dfsattn(transformer, SPARSE, dense_fraction=0):
            sparse = transformer(**inputs).sample
    torch.testing.assert_close(kept, dense, atol=1e-4, rtol=1e-4)
    assert sparse.isfinite().all() and not torch.allclose(sparse, dense, atol=1e-4)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 9), (9, 9)])
def test_dense_steps_cut_text_padding_off(lengths, monkeypatch):
    """Without a mask where the rows are equally long, with as little as can be where not."""
    pipe = tiny_hunyuan_video()
    seen, real = [], dense.dispatch_attention_fn

    def spy(query, key, value, attn_mask=None, **settings):
        seen.append((query.shape[1], key.shape[1], attn_mask))
        return real(query, key, value, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(dense, "dispatch_attention_fn", spy)
    denoiser, (frames, height, width) = pipe.transformer, (5, 9, 11)
    config = denoiser.config
    make = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    inputs = dict(
        hidden_states=torch.randn(2, config.in_channels, frames, height, width, generator=make)
        .repeat_interleave(config.patch_size, 3)
        .repeat_interleave(config.patch_size, 4),
        timestep=torch.tensor([500, 500]),
        encoder_hidden_states=torch.randn(2, 9, config.text_embed_dim, generator=make),
        encoder_attention_mask=mask.int(),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=make),
        guidance=torch.tensor([6000.0, 6000.0]) if config.guidance_embeds else None,
        return_dict=False,
    )
    with torch.no_grad():
        stock = denoiser(**inputs)[0]
        with enable_dfsattn(denoiser, SPARSE):
            ours = denoiser(**inputs)[0]
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    tokens = frames * height * width + max(lengths)
    assert seen and all(shape[:2] == (tokens, tokens) for shape in seen)
    if lengths[0] == lengths[1]:
        assert all(mask is None for *_, mask in seen)
    else:
        assert all(mask.shape[-1] == tokens for *_, mask in seen)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_inference_mode(family):
    pipe = FAMILIES[family]()
    with enable_dfsattn(pipe, SPARSE, tail="mean", tail_pool=16):
        wanted = run(pipe)
        with torch.inference_mode():
            assert torch.equal(run(pipe), wanted)


def test_text_lengths_are_read_once_and_again_after_a_change():
    reader, mask = TextReader(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    lengths = reader.read(mask)
    assert (lengths.rows.tolist(), lengths.shortest, lengths.longest) == ([2, 1], 1, 2)
    assert reader.read(mask) is lengths
    mask[1] = 1
    assert reader.read(mask).rows.tolist() == [2, 3]
    with torch.inference_mode():
        other = torch.ones(1, 4)
        assert reader.read(other) is reader.read(other)
