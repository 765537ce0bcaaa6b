"""The tiny pipelines are real, deterministic, and see what the integration tests rely on."""

import pytest
import torch
from tiny_pipelines import FAMILIES, GRID, PROMPT, TEXT_LENGTH, run, tiny_hunyuan_video

OTHER_PROMPT = "a blue square rests on a table"


@pytest.fixture(params=FAMILIES)
def build(request):
    return FAMILIES[request.param]


def test_runs_are_finite_and_follow_only_the_seeds(build):
    pipe = build()
    latents = run(pipe)
    assert latents.isfinite().all() and latents.std() > 0.1
    assert torch.equal(run(pipe), latents)
    assert torch.equal(run(build()), latents)
    assert not torch.equal(run(pipe, seed=1), latents)
    assert not torch.equal(run(build(seed=1)), latents)


def test_building_leaves_the_global_random_state_alone(build):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(1), expected)


def test_prompt_and_guidance_reach_the_latents(build):
    pipe = build()
    latents = run(pipe)
    assert (run(pipe, prompt=OTHER_PROMPT) - latents).abs().max() > 0.05
    assert (run(pipe, guidance=False) - latents).abs().max() > 0.05


@pytest.mark.parametrize("guidance", [True, False])
def test_a_batch_is_its_prompts_one_by_one(build, guidance):
    pipe = build()
    batch = run(pipe, prompt=[PROMPT, OTHER_PROMPT], seed=[0, 1], guidance=guidance)
    first = run(pipe, seed=[0], guidance=guidance)
    second = run(pipe, prompt=OTHER_PROMPT, seed=[1], guidance=guidance)
    torch.testing.assert_close(batch, torch.cat([first, second]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_the_transformer_sees_the_grid_and_head_dim_asked_for(build, head_dim):
    pipe = build(heads=1, head_dim=head_dim)
    sequences = []

    def record(module, args, kwargs):
        sequences.append(args[0] if args else kwargs["hidden_states"])

    denoiser = pipe.transformer
    blocks = getattr(denoiser, "blocks", None) or denoiser.transformer_blocks
    blocks[0].register_forward_pre_hook(record, with_kwargs=True)
    run(pipe, steps=1)
    assert sequences[0].shape[1:] == (GRID[0] * GRID[1] * GRID[2], head_dim)


def test_wan22_uses_both_transformers():
    pipe = FAMILIES["wan2.2"]()
    calls = []
    for transformer in (pipe.transformer, pipe.transformer_2):
        transformer.register_forward_pre_hook(lambda module, _: calls.append(module))
    run(pipe, steps=4, guidance=False)
    assert calls == [pipe.transformer] * 2 + [pipe.transformer_2] * 2


def test_hunyuan_crops_exactly_its_stock_template():
    pipe = tiny_hunyuan_video()
    prompts = [PROMPT, OTHER_PROMPT]
    embeds, _, mask = pipe.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH)
    tokens = pipe.tokenizer(prompts, add_special_tokens=False).input_ids
    lengths = [len(prompt) + 1 for prompt in tokens]
    assert embeds.shape[:2] == mask.shape == (2, TEXT_LENGTH)
    assert mask.sum(1).tolist() == lengths
    assert lengths[0] != lengths[1] and max(lengths) < TEXT_LENGTH


def test_save_and_load_give_the_same_video(build, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run(type(pipe).from_pretrained(tmp_path)), run(pipe))


def test_the_vae_decodes(build):
    video = run(build(), steps=1, grid=(1, 2, 3), output_type="np")
    assert video.shape[0] == 1 and video.shape[2:] == (32, 48, 3)
    assert video.min() >= 0 and video.max() <= 1 and video.std() > 0
