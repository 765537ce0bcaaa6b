"""Text encoder of the tiny Wan pipeline: every token learns to tell the whole scene.

Flow matching alone teaches so small a model which words occur, long before it teaches which shape
a word belongs to. So the encoder first learns to read, from captions without clips, and is then
fixed.
"""

import time

import torch
import torch.nn.functional as F
from procedural_clips import BACKDROPS, COLOURS, MOTIONS, SHAPES, SIZES, TEXTURES
from tiny_wan_models import encode_tokens
from training_tools import cosine, steps_until, update

# The answers of one shape, then those of the scene; a shape that is not there is None throughout.
SHAPE_ANSWERS = {
    "kind": (None, *SHAPES),
    "colour": (None, *COLOURS),
    "texture": (None, *TEXTURES),
    "size": (None, *SIZES),
    "motion": (None, *MOTIONS),
}
SCENE_ANSWERS = {"colour": tuple(COLOURS), "backdrop": BACKDROPS}
MAX_SHAPES = 2
BATCH = 128  # 256 at this rate got stuck at telling which words occur
RATE = 2e-3
ANSWERS = [*SCENE_ANSWERS.values(), *(list(SHAPE_ANSWERS.values()) * MAX_SHAPES)]


def answers(scene):
    """What there is to know of a scene: an index into each of `ANSWERS`."""
    told = [getattr(scene, name) for name in SCENE_ANSWERS]
    for shape in [*scene.shapes, *[None] * (MAX_SHAPES - len(scene.shapes))]:
        told += [getattr(shape, name, None) for name in SHAPE_ANSWERS]
    return [choices.index(answer) for choices, answer in zip(ANSWERS, told, strict=True)]


def train_text_encoder(tokenizer, encoder, source, seconds, log):
    """Train `encoder` in place and fix it; returns the share of tokens that know their scene."""
    device = encoder.device
    head = torch.nn.Linear(encoder.config.d_model, sum(map(len, ANSWERS))).to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01)

    def read():
        """Logits of every question `[tokens, choices]`, the right choices `[tokens, questions]`."""
        scenes = source.scenes(BATCH)
        hidden, mask = encode_tokens(tokenizer, encoder, [scene.caption for scene in scenes])
        real = mask.bool()
        right = torch.tensor([answers(scene) for scene in scenes], device=device)
        right = right[:, None].expand(-1, real.shape[1], -1)[real]
        return head(hidden[real]).split(list(map(len, ANSWERS)), -1), right

    encoder.train()
    for step, share in steps_until(time.perf_counter() + seconds):
        logits, right = read()
        losses = [F.cross_entropy(x, y) for x, y in zip(logits, right.unbind(-1), strict=True)]
        loss = torch.stack(losses).sum()
        update([optimizer], loss, min(1.0, (step + 1) / 100) * cosine(RATE, 1e-5, share))
        if step % 200 == 199:
            log("text", step=step + 1, loss=loss.item())
    encoder.requires_grad_(False).eval()
    with torch.no_grad():
        logits, right = read()
        chosen = torch.stack([x.argmax(-1) for x in logits], -1)
    known = (chosen == right).all(-1).float().mean().item()
    log("text", step=step + 1, tokens_that_know_all=known)
    return known
