"""The pipeline that the package carries, and the demo over it."""

from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from dfsattn_diffusers import enable_dfsattn
from dfsattn_diffusers.cli import demo

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(demo.TINY_WAN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small():
    size = sum(path.stat().st_size for path in demo.TINY_WAN.rglob("*") if path.is_file())
    assert size <= 24e6


def test_it_is_a_wan_of_ordinary_parts(pipe):
    kinds = {name: type(part).__name__ for name, part in pipe.components.items()}
    assert kinds["text_encoder"] == "UMT5EncoderModel"
    assert kinds["vae"] == "AutoencoderKLWan"
    assert kinds["transformer"] == "WanTransformer3DModel"
    assert pipe.transformer.config.attention_head_dim in (64, 128)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_its_vae_reconstructs_fresh_clips(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from procedural_clips import FRAMES, PLAIN, ClipSource

    source = ClipSource(seed=777, device=torch.device("cpu"), world=PLAIN)
    _, clips = source.draw(4, FRAMES, 128, 128)
    vae = AutoencoderKLWan.from_pretrained(demo.TINY_WAN, subfolder="vae")
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(x[None]).latent_dist.mode()).sample[0] for x in clips]
    error = (torch.stack(decoded) - clips).square().flatten(1).mean(1) / 4
    assert -10 * error.log10().mean() >= 30


def test_the_caption_decides_the_colours(pipe):
    """One small clip: its corner is as green, and its middle as red, as the caption says."""
    video = pipe(
        "a large red circle stays still over a green background",
        height=128,
        width=128,
        num_frames=9,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    red, green, blue = video.float().mean((0, 2, 3))
    assert blue < red and blue < green


def test_demo_end_to_end(tmp_path, capsys):
    options = "--steps 4 --height 96 --width 96 --frames 9 --preset paper --seed 1 --device cpu"
    demo.main([*options.split(), "--output", str(tmp_path / "new" / "folder")])
    out = capsys.readouterr().out
    for word in ("seconds", "density", "recall", "PSNR dB", "SSIM", "speed-up"):
        assert word in out
    frames = iio.imread(tmp_path / "new" / "folder" / "demo.mp4")
    assert frames.shape[0] == 9 and frames.shape[2] == 2 * 2 * 96
    assert iio.imread(tmp_path / "new" / "folder" / "demo.png").ndim == 3


def test_sparse_follows_dense(pipe):
    def generate():
        return pipe(
            "a blue square moves up over a yellow background",
            height=96,
            width=96,
            num_frames=9,
            num_inference_steps=6,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    dense = generate()
    errors = []
    for ratio in (1.0, 0.6, 0.2):
        with enable_dfsattn(pipe, "paper", keep_ratios=(ratio,), query_block=16, key_block=16):
            errors.append(float((generate() - dense).square().mean()))
    assert errors[0] < 1e-6 < errors[1] < errors[2]


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--preset", "best"])
    assert "invalid choice: 'best'" in capsys.readouterr().err
