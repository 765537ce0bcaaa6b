"""Generate one prompt dense and sparse, with the same seed, and compare: `make demo`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline

from dfsattn_diffusers import enable_dfsattn, list_presets
from dfsattn_diffusers.cli.video import frame_strip, side_by_side, write_image, write_video
from dfsattn_diffusers.configs.presets import DEFAULT_PRESET
from dfsattn_diffusers.metrics import psnr, ssim

TINY_WAN = Path(__file__).parent.parent / "assets" / "tiny_wan"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dfsattn_diffusers.cli.demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--prompt",
        default="a large orange star bounces over a blue background",
        help="a caption; the tiny model knows shapes, colours and motions",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale; 1 is off")
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, choices=list_presets(), help="sparse attention preset"
    )
    parser.add_argument("--height", type=int, default=128, help="pixels")
    parser.add_argument("--width", type=int, default=128, help="pixels")
    parser.add_argument("--frames", type=int, default=33, help="odd number of frames")
    parser.add_argument("--model", default=str(TINY_WAN), help="WanPipeline folder or hub id")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for results")
    return parser.parse_args(argv)


def generate(pipe: WanPipeline, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """One video `[F, H, W, 3]` in [0, 1], and the seconds it took."""
    start = time.perf_counter()
    video = pipe(
        args.prompt,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator("cpu").manual_seed(args.seed),
    ).frames[0]
    return video, time.perf_counter() - start


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in rows)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    dtype = {"vae": torch.float32, "default": weights}
    pipe = WanPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)

    if args.device.startswith("cuda"):
        # Neither side shall pay for loading libraries and compiling kernels.
        few = argparse.Namespace(**{**vars(args), "steps": 4})
        generate(pipe, few)
        # As long runs do things: they have all modes.
        with enable_dfsattn(pipe, args.preset, few_step_ratios=None):
            generate(pipe, few)

    print(f"prompt: {args.prompt}\n{args.steps} steps, seed {args.seed}, on {args.device}")
    pipe.set_progress_bar_config(desc="dense")
    dense, dense_seconds = generate(pipe, args)
    pipe.set_progress_bar_config(desc=f"sparse ({args.preset})")
    with enable_dfsattn(pipe, args.preset) as handle:
        sparse, sparse_seconds = generate(pipe, args)
    run = handle.report().runs[-1]

    videos = {"dense": dense, f"DFSAttn, preset {args.preset}": sparse}
    write_video(args.output / "demo.mp4", side_by_side(videos))
    write_image(args.output / "demo.png", frame_strip(videos))

    pair = torch.from_numpy(sparse), torch.from_numpy(dense)
    recall = "-" if run.recall is None else f"{run.recall:.3f}"
    print()
    print(
        table(
            [
                ("", "seconds", "density", "recall", "PSNR dB", "SSIM"),
                ("dense", f"{dense_seconds:.1f}", "1.000", "1.000", "", ""),
                (
                    args.preset,
                    f"{sparse_seconds:.1f}",
                    f"{run.density:.3f}",
                    recall,
                    f"{psnr(*pair):.2f}",
                    f"{ssim(*pair):.4f}",
                ),
            ]
        )
    )
    print(f"\nspeed-up {dense_seconds / sparse_seconds:.2f} x, text encoder and VAE included")
    print(f"wrote {args.output / 'demo.mp4'} and {args.output / 'demo.png'}")


if __name__ == "__main__":
    main()
