"""Train a tiny HunyuanVideo or CogVideoX for the fidelity benchmark, on the tiny Wan's latents.

    python scripts/train_witness.py --family hunyuan_video \
        --output benchmarks/witnesses/hunyuan_video --report outputs/hunyuan_video

The HunyuanVideo there took one H100 and `--seconds 520`, when all clips were whole ones and AdamW
was the optimizer; the CogVideoX took `--family cogvideox --seconds 440`. Text encoder and VAE are
those of the package, fixed. Clips are drawn on the device, nothing is downloaded. Stages end by the
clock: the same seed gives the same recipe, not the same bits.
"""

import argparse
from pathlib import Path

import torch
from clip_trainer import LATENT_FRAMES, PROMPTS, SHEET_SIZES, Trainer, stages
from procedural_clips import FRAMES, PLAIN, ClipSource
from training_tools import Log, pack, save_sheet
from witness_families import FAMILIES
from witnesses import PATCH, Witness, load_tiny_parts, save_witness

# Of the time, for the stages of `clip_trainer`; the rest is for saving and sampling.
SHARES, RESUMED_SHARES = (0.1, 0.25, 0.25, 0.33), (0.0, 0.2, 0.25, 0.47)


def sample(family, folder, report, device, sizes, steps, log):
    """Generate the prompts with the saved witness and put them on contact sheets."""
    witness = Witness(family, device, folder)
    scale = witness.vae.config.scale_factor_spatial * PATCH
    for height, width in sizes:
        grid = LATENT_FRAMES, height // scale, width // scale
        latents = witness.generate(PROMPTS, range(len(PROMPTS)), grid, steps, guidance=4.0)
        video = witness.decode(latents)
        path = report / f"sheet_{height}x{width}.png"
        save_sheet(video.permute(0, 4, 1, 2, 3) * 2 - 1, PROMPTS, path)
        log("sample", sheet=path.name, finite=bool(latents.isfinite().all()))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--family", required=True, choices=[name for name in FAMILIES if name != "wan"])
    add("--output", type=Path, required=True, help="folder of the finished witness")
    add("--report", type=Path, required=True, help="folder of the log, sheets and tar parts")
    add("--seconds", type=float, default=285, help="for everything")
    add("--seed", type=int, default=0)
    add("--resume", type=Path, help="folder of an earlier witness to go on from")
    add("--no-compile", dest="compiled", action="store_false")
    add("--smoke", action="store_true", help="every stage at toy sizes, to test on a CPU")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    args.report.mkdir(parents=True, exist_ok=True)
    log = Log(args.report / "train_log.jsonl")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log("start", family=args.family, device=name, torch=torch.__version__, seed=args.seed)

    family = FAMILIES[args.family]()
    tokenizer, text_encoder, vae = load_tiny_parts(device)
    if args.resume is None:
        transformer = family.build(vae.config.z_dim, depth=1 if args.smoke else 2)
    else:
        transformer = family.transformer_class.from_pretrained(args.resume, subfolder="transformer")
    source = ClipSource(args.seed, device, PLAIN)
    trainer = Trainer(
        family, transformer, tokenizer, text_encoder, vae, source, log, args.compiled
    )
    shares = SHARES if args.resume is None else RESUMED_SHARES
    plan = stages(*(share * args.seconds for share in shares))
    sizes, steps = SHEET_SIZES, 25
    if args.smoke:
        sizes, steps = ((16, 24),), 2
        tiny = (FRAMES, 16, 24), (1, 16, 24)
        plan = [(stage, tiny, LATENT_FRAMES * 16 * 24, *rest) for stage, _, _, *rest in plan]
    for share, (stage, grids, pixels, seconds, *rest) in zip(shares, plan, strict=True):
        if not share:
            continue
        trainer.train(stage, grids, pixels, seconds, *rest)
        save_witness(trainer.averaged, family.scheduler(), args.output)
        log("save", **pack(args.output, args.report))
    sample(args.family, args.output, args.report, device, sizes, steps, log)
    log("end")


if __name__ == "__main__":
    main()
