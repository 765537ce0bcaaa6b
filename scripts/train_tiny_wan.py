"""Train the tiny Wan pipeline of the package: VAE first, then text encoder and transformer.

Every clip is drawn on the device (`procedural_clips`), nothing is downloaded, and each stage has a
budget in seconds, so that a run ends in time on any machine; `torchrun` shares the work among GPUs.
The shipped weights took these commands, on an H200, from the third on an H100, the last on two.
`benchmarks/tiny_wan_training.jsonl` holds the log of each but the second, whose log was lost:

    run() { torchrun scripts/train_tiny_wan.py --output $1 --report $1_report ${@:2}; }
    run vae --vae-only --vae-seconds 150
    run text --vae vae/vae
    run captions --resume text --warm-seconds 180 --stills-seconds 0 --small-seconds 160 \
        --mixed-seconds 130
    run outlines --resume captions --warm-seconds 0 --stills-seconds 0 --small-seconds 0 \
        --mixed-seconds 165
    run calm --resume outlines --warm-seconds 0 --stills-seconds 0 --small-seconds 310 \
        --mixed-seconds 190
    run stills --resume calm --warm-seconds 0 --stills-seconds 215 --small-seconds 130 \
        --mixed-seconds 165 --total-seconds 548

The last two saw calmer scenes than those before: backgrounds of half the contrast, and two shapes
in every third clip in place of every second. All but the last saw whole clips only, with AdamW.

The VAE learns a richer world than the transformer, which is too small for all of it. Stages end by
the clock: the same seed gives the same recipe, not the same bits.
"""

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import torch
from clip_trainer import PROMPTS, SHEET_SIZES, Trainer, stages
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from procedural_clips import FRAMES, PLAIN, RICH, ClipSource, vocabulary
from tiny_wan_models import build_text_encoder, build_tokenizer, build_transformer
from tiny_wan_text import train_text_encoder
from tiny_wan_vae import build_vae, measure_vae, train_vae
from training_tools import Log, join, pack, rank, save_sheet
from witness_families import Wan

SHIFT = 8.0  # of the sampler
RESERVE = 30  # seconds kept for saving and sampling
# Batch, frames, height and width of the clips that the VAE sees: about as many pixels each.
VAE_SHAPES = (
    (8, 9, 128, 128),
    (8, 9, 128, 128),
    (32, 9, 64, 64),
    (4, 5, 256, 256),
    (2, FRAMES, 128, 128),
)


def save(trainer, folder):
    """Write the pipeline with averaged weights, the large ones in bf16."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    transformer, text_encoder, vae = (
        copy.deepcopy(model).to("cpu")
        for model in (trainer.averaged, trainer.text_encoder, trainer.vae)
    )
    # diffusers loads in fp32, transformers in what was saved: the small encoder stays fp32.
    transformer.to(torch.bfloat16)
    vae.to(torch.bfloat16)
    pipe = WanPipeline(trainer.tokenizer, text_encoder, vae, scheduler, transformer)
    pipe.save_pretrained(folder)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        text = (folder / name).read_text()  # transformers 4 knows only the second name
        (folder / name).write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def sample(folder, report, device, sizes, steps, log):
    """Generate the prompts with the saved pipeline and put them on contact sheets."""
    pipe = WanPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        pipe.transformer.to(torch.bfloat16)
    for height, width in sizes:
        start = time.perf_counter()
        video = pipe(
            list(PROMPTS),
            height=height,
            width=width,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator(device).manual_seed(0),
            output_type="pt",
        ).frames.float()
        path = report / f"sheet_{height}x{width}.png"
        save_sheet(video.transpose(1, 2) * 2 - 1, PROMPTS, path)
        taken, finite = time.perf_counter() - start, bool(video.isfinite().all())
        log("sample", sheet=path.name, taken=taken, finite=finite)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the finished pipeline")
    add("--report", type=Path, required=True, help="folder of the log, sheets and tar parts")
    add("--seed", type=int, default=0)
    add("--vae", type=Path, help="folder of a trained VAE to take instead of training one")
    add("--resume", type=Path, help="folder of an earlier run to go on from")
    add("--vae-only", action="store_true", help="train the VAE, save it in OUTPUT/vae and stop")
    add("--vae-seconds", type=float, default=115)
    add("--text-seconds", type=float, default=45, help="captions alone")
    add("--warm-seconds", type=float, default=40, help="64 x 64 pixels, 1,088 tokens")
    add("--stills-seconds", type=float, default=110, help="128 x 128 pixels, 1 and 5 frames")
    add("--small-seconds", type=float, default=90, help="128 x 128 pixels, 4,352 tokens")
    add("--mixed-seconds", type=float, default=110, help="also 256 x 256 pixels, 17,408 tokens")
    add("--total-seconds", type=float, default=540, help="stages are cut to end the run in time")
    add("--no-compile", dest="compiled", action="store_false")
    add("--smoke", action="store_true", help="every stage at toy sizes, to test on a CPU")
    return parser.parse_args()


def main():
    args = parse_arguments()
    device = join()
    args.report.mkdir(parents=True, exist_ok=True)
    log = Log(args.report / "train_log.jsonl")
    shapes, steps = VAE_SHAPES, 25
    seconds = args.warm_seconds, args.stills_seconds, args.small_seconds, args.mixed_seconds
    plan, sizes = stages(*seconds, args.smoke), SHEET_SIZES
    if args.smoke:
        shapes, sizes, steps = ((2, 5, 32, 32), (1, 9, 32, 48)), ((32, 32), (64, 64)), 2

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log("start", device=name, torch=torch.__version__, seed=args.seed)
    source = ClipSource(args.seed + rank(), device, RICH)
    former = None
    if args.resume is not None:
        former = WanPipeline.from_pretrained(args.resume)
        vae = former.vae.to(device, torch.float32).requires_grad_(False).eval()
    elif args.vae is None:
        vae = build_vae().to(device)
        train_vae(vae, source, shapes, args.vae_seconds, log)
    else:
        vae = AutoencoderKLWan.from_pretrained(args.vae).to(device).requires_grad_(False).eval()
    if former is None:
        measure_vae(vae, source, sizes, args.report / "sheet_vae.png", log)
    if args.vae_only:
        vae.save_pretrained(args.output / "vae")
        return
    source.world = replace(PLAIN, free_wording=True)
    if former is None:
        tokenizer = build_tokenizer(vocabulary())
        transformer = build_transformer(vae.config.z_dim)
        text_encoder = build_text_encoder(len(tokenizer))
    else:
        tokenizer = former.tokenizer
        transformer, text_encoder = former.transformer, former.text_encoder
    torch.manual_seed(args.seed + rank())  # of the noise; weights are equal by now
    trainer = Trainer(
        Wan(), transformer, tokenizer, text_encoder, vae, source, log, args.compiled
    )
    if former is None:
        known = train_text_encoder(
            trainer.tokenizer, trainer.text_encoder, source, args.text_seconds, log
        )
        if known < 0.9 and not args.smoke:
            raise SystemExit("the text encoder does not read yet: raise --text-seconds")
    for stage, grids, pixels, seconds, *rest in plan:
        if not seconds:
            continue
        seconds = min(seconds, args.total_seconds - RESERVE - log.seconds())
        trainer.train(stage, grids, pixels, seconds, *rest)
        if rank() == 0:
            save(trainer, args.output)
            log("save", **pack(args.output, args.report))
    if rank():
        return
    sample(args.output, args.report, device, sizes, steps, log)
    log("end")


if __name__ == "__main__":
    main()
