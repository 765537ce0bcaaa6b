"""Train the tiny Wan pipeline of the package: VAE first, then text encoder and transformer.

Every clip is drawn on the device (`procedural_clips`), nothing is downloaded, and each stage has a
budget in seconds, so that a run ends in time on any machine. The shipped weights took one H200
these commands; `benchmarks/tiny_wan_training.jsonl` holds the log of the first, that of the second
was lost with its machine:

    run() { python scripts/train_tiny_wan.py --output $1 --report $1_report ${@:2}; }
    run vae --vae-only --vae-seconds 150
    run all --vae vae/vae

The VAE learns a richer world than the transformer, which is too small for all of it. Stages end by
the clock: the same seed gives the same recipe, not the same bits.
"""

import argparse
import copy
import math
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from procedural_clips import FRAMES, PLAIN, RICH, ClipSource, vocabulary
from tiny_wan_models import build_text_encoder, build_tokenizer, build_transformer, embed_prompts
from tiny_wan_text import train_text_encoder
from tiny_wan_vae import build_vae, encode_clip, measure_vae, train_vae
from training_tools import Log, autocast, cosine, pack, save_sheet, steps_until, timed, update

SHIFT = 8.0  # of the sampler
# A clip is so redundant that its layout and motion are plain to see at 97 % noise: only above it
# does the caption decide, so training goes there often.
TRAINING_SHIFTS = (3.0, 40.0)
RESERVE = 30  # seconds kept for saving and sampling
# Height and width of a stage's clips, the first as often as the others together.
WARM = ((64, 64),)
SMALL = ((128, 128), (112, 144), (144, 112))
MIXED = ((128, 128), (256, 256), (256, 256), (112, 144))
# Batch, frames, height and width of the clips that the VAE sees: about as many pixels each.
VAE_SHAPES = (
    (8, 9, 128, 128),
    (8, 9, 128, 128),
    (32, 9, 64, 64),
    (4, 5, 256, 256),
    (2, FRAMES, 128, 128),
)
PROMPTS = (
    "a red circle moves right over a green background",
    "a blue square turns and a yellow star moves up over a purple background",
    "a large orange star bounces over a blue background",
    "a white triangle moves down over a red background that drifts right",
    "a cyan ring moves left over a blue background",
    "a large green cross moves up over an orange background",
)


class Trainer:
    def __init__(self, vae, source, log, compiled, former=None):
        self.vae, self.source, self.log, self.compiled = vae, source, log, compiled
        self.device = vae.device
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        if former is None:
            self.tokenizer = build_tokenizer(vocabulary())
            transformer = build_transformer(vae.config.z_dim)
            text_encoder = build_text_encoder(len(self.tokenizer))
        else:
            self.tokenizer = former.tokenizer
            transformer, text_encoder = former.transformer, former.text_encoder
        self.transformer = transformer.to(self.device, torch.float32).train()
        self.text_encoder = text_encoder.to(self.device, torch.float32).eval()
        self.text_encoder.requires_grad_(False)
        self.averaged = copy.deepcopy(self.transformer).eval()
        self.optimizer = torch.optim.AdamW(
            self.transformer.parameters(), betas=(0.9, 0.99), weight_decay=0.01
        )
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def draw(self, pixels, height, width):
        """Captions and normalised latents of fresh whole clips, as many as their frames allow."""
        batch = max(1, pixels // (height * width))
        captions, video = self.source.draw(batch, FRAMES, height, width)
        with autocast(self.device):
            mean, _ = encode_clip(self.vae, video)
        return captions, (mean.float() - self.mean) / self.std

    def loss(self, captions, latents):
        """Flow matching as sampled later: x = (1 - s) clip + s noise, target noise - clip."""
        captions = ["" if self.source.rng.random() < 0.1 else caption for caption in captions]
        low, high = map(math.log, TRAINING_SHIFTS)
        logit = torch.randn(len(latents), device=self.device)
        sigma = (logit + torch.empty_like(logit).uniform_(low, high)).sigmoid()
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        prompts = embed_prompts(self.tokenizer, self.text_encoder, captions)
        with autocast(self.device):
            velocity = self.transformer(noisy, 1000 * sigma, prompts, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - latents)

    def warm_up(self, pixels, grids):
        """Compile every grid; returns the seconds to draw a batch and to pass one both ways."""

        def step(data):
            self.loss(*data).backward()
            self.optimizer.zero_grad(set_to_none=True)

        for grid in (*grids, grids[0]):
            data = self.draw(pixels, *grid)
            try:
                step(data)
            except Exception:
                if not self.compiled:
                    raise
                traceback.print_exc()
                self.log("fallback", reason="the blocks do not compile here: going on without")
                self.compiled = False
                for block in self.transformer.blocks:
                    block._compiled_call_impl = None
                self.optimizer.zero_grad(set_to_none=True)
                step(data)
        timed(self.device, step, data)
        return timed(self.device, self.draw, pixels, *grid)[0], timed(self.device, step, data)[0]

    @torch.no_grad()
    def average(self, decay):
        target, latest = list(self.averaged.parameters()), list(self.transformer.parameters())
        torch._foreach_lerp_(target, latest, 1 - decay)

    def train(self, stage, grids, pixels, seconds, rates):
        deadline = time.perf_counter() + seconds
        drawing, passing = self.warm_up(pixels, grids)
        # Where drawing is dear, clips come back with other noise.
        fresh, pool, losses = min(1.0, 0.15 * passing / drawing), [], []
        self.log(stage, pixels=pixels, drawing=drawing, passing=passing, fresh=fresh)
        for step, share in steps_until(deadline):
            if not pool or self.source.rng.random() < fresh:
                common = self.source.rng.random() < 0.5
                grid = grids[0] if common else self.source.rng.choice(grids[1:] or grids)
                pool = [*pool[-63:], self.draw(pixels, *grid)]
                data = pool[-1]
            else:
                data = self.source.rng.choice(pool)
            loss = self.loss(*data)
            losses.append(loss.detach())
            update(self.optimizer, loss, min(1.0, (step + 1) / 100) * cosine(*rates, share))
            self.average(min(0.999, (step + 1) / (step + 10)))
            if step % 10 == 9:
                recent = torch.stack(losses[-50:]).mean().item()  # waits for the device
                if step % 50 == 49:
                    self.log(stage, step=step + 1, loss=recent)
        recent = torch.stack(losses[-200:]).mean().item()
        self.log(stage, step=step + 1, loss_of_last_200=recent)

    def save(self, folder):
        """Write the pipeline with averaged weights, the large ones in bf16."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
        transformer, text_encoder, vae = (
            copy.deepcopy(model).to("cpu") for model in (self.averaged, self.text_encoder, self.vae)
        )
        # diffusers loads in fp32, transformers in what was saved: the small encoder stays fp32.
        transformer.to(torch.bfloat16)
        vae.to(torch.bfloat16)
        pipe = WanPipeline(self.tokenizer, text_encoder, vae, scheduler, transformer)
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
    add("--warm-seconds", type=float, default=110, help="64 x 64 pixels, 1,088 tokens")
    add("--small-seconds", type=float, default=200, help="128 x 128 pixels, 4,352 tokens")
    add("--mixed-seconds", type=float, default=200, help="also 256 x 256 pixels, 17,408 tokens")
    add("--total-seconds", type=float, default=540, help="stages are cut to end the run in time")
    add("--no-compile", dest="compiled", action="store_false")
    add("--smoke", action="store_true", help="every stage at toy sizes, to test on a CPU")
    return parser.parse_args()


def main():
    args = parse_arguments()
    args.report.mkdir(parents=True, exist_ok=True)
    log = Log(args.report / "train_log.jsonl")
    shapes, steps = VAE_SHAPES, 25
    stages = [
        ("warm", WARM, 32 * 64**2, args.warm_seconds, (1e-3, 1e-3)),
        ("small", SMALL, 16 * 128**2, args.small_seconds, (1e-3, 5e-4)),
        ("mixed", MIXED, 4 * 256**2, args.mixed_seconds, (5e-4, 1e-5)),
    ]
    if args.smoke:
        shapes, steps = ((2, 5, 32, 32), (1, 9, 32, 48)), 2
        stages = [
            (name, [(h // 32 * 8, w // 32 * 8) for h, w in grids], 2 * 64**2, *rest)
            for name, grids, _, *rest in stages
        ]
    sizes = stages[2][1][:2]

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log("start", device=name, torch=torch.__version__, seed=args.seed)
    source = ClipSource(args.seed, device, RICH)
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
    trainer = Trainer(vae, source, log, args.compiled, former)
    if former is None:
        known = train_text_encoder(
            trainer.tokenizer, trainer.text_encoder, source, args.text_seconds, log
        )
        if known < 0.9 and not args.smoke:
            raise SystemExit("the text encoder does not read yet: raise --text-seconds")
    for stage, grids, pixels, seconds, rates in stages:
        if not seconds:
            continue
        seconds = min(seconds, args.total_seconds - RESERVE - log.seconds())
        trainer.train(stage, grids, pixels, seconds, rates)
        trainer.save(args.output)
        log("save", **pack(args.output, args.report))
    sample(args.output, args.report, device, sizes, steps, log)
    log("end")


if __name__ == "__main__":
    main()
