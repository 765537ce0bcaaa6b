"""Training of the witnesses at toy sizes, and their stock pipelines."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, HunyuanVideoPipeline, WanPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import train_witness  # noqa: E402
from rivals import RIVALS, in_place_of_ours  # noqa: E402
from witness_families import FAMILIES, CogVideoX, HunyuanVideo, Wan  # noqa: E402
from witnesses import Witness, load_tiny_parts, save_witness  # noqa: E402

from dfsattn_diffusers import enable_dfsattn  # noqa: E402

CPU = torch.device("cpu")
GRID = (5, 4, 6)
PROMPTS = ["a red circle moves right over a green background", "a blue star turns"]
JOINT = ["hunyuan_video", "cogvideox"]


def random_witness(name, folder):
    """An untrained witness whose every weight matters."""
    family = FAMILIES[name]()
    torch.manual_seed(0)
    transformer = family.build(8, depth=1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save_witness(transformer, family.scheduler(), folder)
    return Witness(name, CPU, folder)


@pytest.fixture(scope="module", params=JOINT)
def witness(request, tmp_path_factory):
    return random_witness(request.param, tmp_path_factory.mktemp("witness"))


@pytest.mark.parametrize("name", JOINT)
def test_trains_saves_loads_and_samples(name, tmp_path):
    options = f"--family {name} --output {tmp_path / 'w'} --report {tmp_path / 'r'}"
    train_witness.main([*options.split(), "--seconds", "0", "--smoke", "--no-compile"])
    log = [json.loads(line) for line in (tmp_path / "r" / "train_log.jsonl").open()]
    assert [entry["stage"] for entry in log][-1] == "end"
    assert all(entry["finite"] for entry in log if entry["stage"] == "sample")
    assert len(list((tmp_path / "r").glob("*.png"))) == 1
    witness = Witness(name, CPU, tmp_path / "w")
    assert witness.generate(PROMPTS, (0, 1), GRID, 2, 4.0).isfinite().all()
    start = FAMILIES[name]().build(8, depth=1).state_dict()
    trained = witness.pipe.transformer.state_dict()
    assert trained.keys() == start.keys() and trained["proj_out.weight"].any()


@pytest.mark.parametrize("name", JOINT)
def test_full_size_fits_the_repository(name, tmp_path):
    family = FAMILIES[name]()
    save_witness(family.build(8), family.scheduler(), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 24e6


@pytest.mark.parametrize("name", JOINT)
def test_learns_one_clip(name):
    """Steps on one batch halve its loss: the target is what the model is asked for."""
    torch.manual_seed(0)
    family = FAMILIES[name]()
    transformer = family.build(8, depth=1)
    latents = torch.randn(1, 8, 1, 1, 1).expand(4, 8, 3, 4, 4).contiguous()
    text, mask = torch.randn(4, 64, 128), torch.ones(4, 64, dtype=torch.long)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = family.loss(transformer, latents, torch.full((4,), 2.0), text, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_stock_pipelines(witness, tmp_path):
    stock = {Wan: WanPipeline, HunyuanVideo: HunyuanVideoPipeline, CogVideoX: CogVideoXPipeline}
    assert type(witness.pipe) is stock[type(witness.family)]
    with pytest.raises(FileNotFoundError, match="train_witness.py --family"):
        Witness(witness.family.name, CPU, tmp_path)


def test_a_case_is_the_same_in_any_batch(witness):
    both = witness.generate(PROMPTS, (3, 4), GRID, 2, 4.0)
    second = witness.generate(PROMPTS[1:], (4,), GRID, 2, 4.0)
    assert both.shape == (2, 8, 5, 8, 12)
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)
    clips = witness.decode(both)
    assert clips.shape == (2, 9, 32, 48, 3) and clips.min() >= 0 and clips.max() <= 1


def test_decoding_is_the_vaes(witness):
    latents = torch.randn(1, 8, 3, 8, 12)
    config, shape = witness.vae.config, (1, 8, 1, 1, 1)
    mean, std = (torch.tensor(x).view(shape) for x in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        expected = witness.vae.decode(latents * std + mean).sample[0]
    clip = witness.decode(latents)[0].permute(3, 0, 1, 2) * 2 - 1
    torch.testing.assert_close(clip, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rival", [None, *RIVALS])
def test_runs_in_bf16_as_on_a_gpu(witness, rival):
    folder, name = witness.folder, witness.family.name
    small = Witness(name, CPU, folder, dtype=torch.bfloat16)
    with (
        enable_dfsattn(small.pipe, "paper", dense_fraction=0),
        in_place_of_ours(RIVALS[rival]) if rival else nullcontext(),
    ):
        latents = small.generate(PROMPTS, (0, 1), GRID, 1, 4.0)
    expected = witness.generate(PROMPTS, (0, 1), GRID, 1, 4.0)
    assert latents.dtype == torch.float32 and small.pipe.transformer.dtype == torch.bfloat16
    # 120 tokens are one block: all rules keep it.
    assert (latents - expected).norm() < 0.1 * expected.norm()


def test_prompt_seed_and_guidance_matter(witness):
    base = witness.generate(PROMPTS[:1], (0,), GRID, 2, 4.0)
    for other in ((PROMPTS[1:], (0,), 4.0), (PROMPTS[:1], (1,), 4.0), (PROMPTS[:1], (0,), 1.0)):
        prompts, seeds, guidance = other
        out = witness.generate(prompts, seeds, GRID, 2, guidance)
        assert (out - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_perfect_model_restores_the_clip(name):
    """The loss's target, handed to the scheduler step by step, leads from noise to the clip."""
    family = FAMILIES[name]()
    clip, noise = torch.randn(2, 1, 8, 3, 4, 4).unbind()
    scheduler = Witness(name, CPU).pipe.scheduler if name == "wan" else family.scheduler()
    scheduler.set_timesteps(10)
    x = noise
    for t in scheduler.timesteps:
        if name == "cogvideox":
            kept = scheduler.alphas_cumprod[t]
            target = kept.sqrt() * ((x - kept.sqrt() * clip) / (1 - kept).sqrt())
            target = target - (1 - kept).sqrt() * clip
        else:
            target = (x - clip) / (t / 1000)
        x = scheduler.step(target, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, clip, atol=2e-2, rtol=0)


def test_noise_levels_of_cogvideox():
    family = CogVideoX()
    logit = torch.linspace(-3, 6, 4000)
    torch.manual_seed(0)
    signal, spread, timestep = family._level(logit)
    signal, spread = signal.flatten(), spread.flatten()
    last = timestep == 999
    assert 0.03 < last.float().mean() < 0.08 and not signal[last].any()
    inside = ~last & (logit > -2)
    ratio = (spread / signal).log()[inside]
    assert (ratio - logit[inside]).abs().max() < 0.2
    torch.testing.assert_close(signal**2 + spread**2, torch.ones(4000))


def test_text_encoder_and_vae_are_fixed():
    _, *parts = load_tiny_parts(CPU)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
