"""Generate a video with HunyuanVideo and DFSAttn: a stock diffusers script with one new line."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.utils import export_to_video

from dfsattn_diffusers import enable_dfsattn


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="hunyuanvideo-community/HunyuanVideo", help="folder or hub id")
    add("--prompt", default="A red fox runs through fresh snow", help="what the video shows")
    add("--negative-prompt", help="what it must not show; needs --true-cfg above 1")
    add("--height", type=int, default=720, help="in pixels")
    add("--width", type=int, default=1280, help="in pixels")
    add("--frames", type=int, default=129, help="24 make a second")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance", type=float, default=6.0, help="embedded guidance scale")
    add("--true-cfg", type=float, default=1.0, help="true guidance scale; 1 for none")
    add("--seed", type=int, default=0, help="of the starting noise")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--offload", action="store_true", help="keep each model in host memory until its turn")
    add("--preset", default="balanced", help="DFSAttn preset name or config file")
    add("--dense", action="store_true", help="stock attention, for comparison")
    add("--output", type=Path, default="outputs/hunyuan_video.mp4", help="video file to write")
    args = parser.parse_args(argv)
    if args.output.suffix != ".mp4":
        parser.error(f"--output must end in .mp4, got {args.output}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.open("ab").close()  # an unwritable path fails here, not after the generation

    pipe = HunyuanVideoPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.vae.enable_tiling()
    if args.offload:
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    handle = None if args.dense else enable_dfsattn(pipe, args.preset)  # the one new line
    video = pipe(
        prompt=args.prompt, negative_prompt=args.negative_prompt,
        height=args.height, width=args.width, num_frames=args.frames,
        num_inference_steps=args.steps, guidance_scale=args.guidance,
        true_cfg_scale=args.true_cfg,
        generator=torch.Generator().manual_seed(args.seed),
    ).frames[0]
    export_to_video(video, str(args.output), fps=24)
    print(f"wrote {args.output}")
    if handle is not None:
        print(handle.report())


if __name__ == "__main__":
    main()
