"""Training of tiny video models: fresh clips, stages by the clock, averaged weights."""

import copy
import math
import random
import time
import traceback

import torch
from muon import Muon
from procedural_clips import FRAMES
from tiny_wan_models import embed_prompts
from tiny_wan_vae import encode_clip
from torch.optim import AdamW
from training_tools import agreed, autocast, cosine, steps_until, timed, update

# Range of the shift of a batch's noise levels. A clip is so redundant that its layout and motion
# are plain to see at 97 % noise: only above it does the caption decide, and training goes there
# often. Outlines come at the end.
CAPTION_SHIFTS, OUTLINE_SHIFTS = (6.0, 80.0), (3.0, 40.0)
LATENT_FRAMES = (FRAMES + 1) // 2
# Frames, height and width of a stage's clips, the first as often as the others together. Stills
# and short clips show a shape's word with its outline for a tenth of a whole clip's price.
WARM = ((FRAMES, 64, 64),)
STILLS = ((1, 128, 128), (5, 128, 128))
SMALL = ((FRAMES, 128, 128), (FRAMES, 112, 144), (1, 128, 128))
MIXED = ((FRAMES, 128, 128), (FRAMES, 256, 256), (FRAMES, 256, 256), (FRAMES, 112, 144),
         (1, 256, 256))
SHEET_SIZES = ((128, 128), (256, 256))
PROMPTS = (
    "a red circle moves right over a green background",
    "a blue square turns and a yellow star moves up over a purple background",
    "a large orange star bounces over a blue background",
    "a white triangle moves down over a red background that drifts right",
    "a cyan ring moves left over a blue background",
    "a large green cross moves up over an orange background",
)


def stages(warm, stills, small, mixed, smoke=False):
    """(name, clips, whole frames' pixels of a batch, seconds, rates, shifts): to 17,408 tokens.

    A latent frame counts as a whole frame: batches of all sizes have as many tokens.
    """
    table = [
        ("warm", WARM, 32 * 64**2, warm, (1e-3, 1e-3), CAPTION_SHIFTS),
        ("stills", STILLS, 16 * 128**2, stills, (1e-3, 1e-3), CAPTION_SHIFTS),
        ("small", SMALL, 16 * 128**2, small, (1e-3, 5e-4), CAPTION_SHIFTS),
        ("mixed", MIXED, 4 * 256**2, mixed, (5e-4, 1e-5), OUTLINE_SHIFTS),
    ]
    if smoke:
        table = [
            (name, [(f, h // 32 * 8, w // 32 * 8) for f, h, w in grids], 32**2, *rest)
            for name, grids, _, *rest in table
        ]
    return [
        (name, grids, pixels * LATENT_FRAMES, *rest) for name, grids, pixels, *rest in table
    ]


class Trainer:
    """Trains `transformer` in place; `averaged` holds its moving average.

    Args:
        family: Loss and conventions of the model, see `witness_families`.
        transformer: In any dtype.
        tokenizer, text_encoder: Fixed.
        vae: Fixed, on the device to train on.
        source: A `ClipSource`, with a seed of its own in each process.
        log: A `Log`.
        compiled: Whether to compile the blocks; goes on without where that fails.
    """

    def __init__(
        self, family, transformer, tokenizer, text_encoder, vae, source, log, compiled
    ):
        self.family, self.vae, self.source, self.log = family, vae, source, log
        self.compiled = compiled
        self.device = vae.device
        self.mean, self.std = latent_statistics(vae)
        self.tokenizer = tokenizer
        self.transformer = transformer.to(self.device, torch.float32).train()
        self.text_encoder = text_encoder.to(self.device, torch.float32).eval()
        self.text_encoder.requires_grad_(False)
        self.averaged = copy.deepcopy(self.transformer).eval()
        self.optimizers = optimizers_of(self.transformer)
        # All processes choose alike, or one would wait for another's larger clips.
        self.chooser = random.Random(0)
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            for block in blocks_of(self.transformer):
                block.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def draw(self, pixels, frames, height, width):
        """Captions and normalised latents of fresh clips, as many as their tokens allow."""
        batch = max(1, pixels // ((frames + 1) // 2 * height * width))
        captions, video = self.source.draw(batch, frames, height, width)
        with autocast(self.device):
            mean, _ = encode_clip(self.vae, video)
        return captions, (mean.float() - self.mean) / self.std

    def loss(self, captions, latents, shifts):
        captions = ["" if self.source.rng.random() < 0.1 else caption for caption in captions]
        # Fewer frames repeat less of what noise hides, and show as much at less of it.
        low, high = (
            math.log(shift) + 0.5 * math.log(latents.shape[2] / LATENT_FRAMES) for shift in shifts
        )
        logit = torch.randn(len(latents), device=self.device)
        logit = logit + torch.empty_like(logit).uniform_(low, high)
        text = embed_prompts(self.tokenizer, self.text_encoder, captions, self.family.text_tokens)
        return self.family.loss(self.transformer, latents, logit, *text)

    def warm_up(self, pixels, grids, shifts):
        """Compile every grid; returns the seconds to draw a batch and to pass one both ways."""

        def step(data):
            self.loss(*data, shifts).backward()
            self.transformer.zero_grad(set_to_none=True)

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
                for block in blocks_of(self.transformer):
                    block._compiled_call_impl = None
                self.transformer.zero_grad(set_to_none=True)
                step(data)
        timed(self.device, step, data)
        return timed(self.device, self.draw, pixels, *grid)[0], timed(self.device, step, data)[0]

    @torch.no_grad()
    def average(self, decay):
        target, latest = list(self.averaged.parameters()), list(self.transformer.parameters())
        torch._foreach_lerp_(target, latest, 1 - decay)

    def train(self, stage, grids, pixels, seconds, rates, shifts):
        deadline = time.perf_counter() + seconds
        drawing, passing = self.warm_up(pixels, grids, shifts)
        # Where drawing is dear, clips come back with other noise.
        fresh, pool, losses = agreed(min(1.0, 0.15 * passing / drawing)), [], []
        self.log(stage, pixels=pixels, drawing=drawing, passing=passing, fresh=fresh)
        for step, share in steps_until(deadline):
            if not pool or self.chooser.random() < fresh:
                common = self.chooser.random() < 0.5
                grid = grids[0] if common else self.chooser.choice(grids[1:] or grids)
                pool = [*pool[-63:], self.draw(pixels, *grid)]
                data = pool[-1]
            else:
                data = self.chooser.choice(pool)
            loss = self.loss(*data, shifts)
            losses.append(loss.detach())
            update(self.optimizers, loss, min(1.0, (step + 1) / 100) * cosine(*rates, share))
            self.average(min(0.999, (step + 1) / (step + 10)))
            if step % 10 == 9:
                recent = torch.stack(losses[-50:]).mean().item()  # waits for the device
                if step % 50 == 49:
                    self.log(stage, step=step + 1, loss=recent)
        recent = torch.stack(losses[-200:]).mean().item()
        self.log(stage, step=step + 1, loss_of_last_200=recent)


def blocks_of(transformer):
    """The repeated blocks: what the transformer's own lists hold."""
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    return [block for part in lists for block in part]


def optimizers_of(transformer):
    """Muon for the matrices of the blocks, AdamW for all else.

    In as many seconds Muon ended 7 % lower in loss than AdamW alone (one run of 500 s each).
    """
    matrices = [x for block in blocks_of(transformer) for x in block.parameters() if x.ndim == 2]
    taken = set(map(id, matrices))
    others = [x for x in transformer.parameters() if id(x) not in taken]
    fused = others[0].is_cuda
    return [Muon(matrices), AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)]


def latent_statistics(vae):
    """Mean and standard deviation of the latents by channel, `[1, C, 1, 1, 1]`."""
    return tuple(
        torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
