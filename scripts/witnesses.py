"""Load a trained witness and generate clips with the family's stock diffusers pipeline."""

import copy
import hashlib
from pathlib import Path

import torch
from clip_trainer import latent_statistics
from diffusers import AutoencoderKLWan
from tiny_wan_models import embed_prompts
from tiny_wan_vae import decode_clip
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel
from witness_families import FAMILIES

from dfsattn_diffusers.cli.demo import TINY_WAN

ROOT = Path(__file__).parent.parent
PATCH = 2  # latents to a token, in height and in width


def folder_of(name):
    return TINY_WAN if name == "wan" else ROOT / "benchmarks" / "witnesses" / name


class Witness:
    """A tiny trained model, with text encoder and VAE of the tiny Wan pipeline.

    Args:
        name: Of the family.
        folder: With `transformer` and `scheduler`; `folder_of(name)` by default.
        device: To run on.
        dtype: Of the transformer, bf16 on a GPU and fp32 elsewhere by default.

    Attributes:
        folder: Where it was loaded from.
        fingerprint: Of the transformer's weights.

    Raises:
        FileNotFoundError: The witness was not trained yet.
    """

    def __init__(self, name, device, folder=None, dtype=None):
        self.family, self.device = FAMILIES[name](), device
        self.folder = folder = folder or folder_of(name)
        if not (folder / "transformer").is_dir():
            raise FileNotFoundError(
                f"There is no witness {name!r} in {folder}; train it: python "
                f"scripts/train_witness.py --family {name} --output {folder} --report outputs"
            )
        weights = sorted((folder / "transformer").glob("*.safetensors"))
        content = b"".join(path.read_bytes() for path in weights)
        self.fingerprint = hashlib.sha256(content).hexdigest()[:12]
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        # Loading in bf16 leaves in fp32 what the family wants so.
        transformer = self.family.transformer_class.from_pretrained(
            folder, subfolder="transformer", torch_dtype=self.dtype
        )
        scheduler = self.family.scheduler_class.from_pretrained(folder, subfolder="scheduler")
        self.tokenizer, self.text_encoder, self.vae = load_tiny_parts(device)
        self.pipe = self.family.pipeline(transformer.eval().to(device), scheduler, self.vae)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def generate(self, prompts, seeds, grid, steps, guidance):
        """Normalised latents `[B, C, F, H, W]` fp32; `grid` counts tokens, seeds are per clip."""
        frames, height, width = grid
        shape = self.vae.config.z_dim, frames, height * PATCH, width * PATCH
        # Drawn on the CPU, one generator a clip: the same noise on any device, in any batch.
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        text = [
            part for texts in (list(prompts), [""] * len(prompts)) for part in self._embed(texts)
        ]
        noise = torch.stack(noise).to(self.device)
        return self.family.generate(self.pipe, noise, *text, steps, guidance).float()

    @torch.no_grad()
    def decode(self, latents):
        """Clips `[B, F, H, W, 3]` in [0, 1], fp32."""
        mean, std = latent_statistics(self.vae)
        clips = [decode_clip(self.vae, clip[None] * std + mean)[0] for clip in latents]
        return (torch.stack(clips).permute(0, 2, 3, 4, 1) / 2 + 0.5).clamp(0, 1)

    def _embed(self, texts):
        text, mask = embed_prompts(
            self.tokenizer, self.text_encoder, texts, self.family.text_tokens
        )
        return text.to(self.dtype), mask


def load_tiny_parts(device):
    """Tokenizer, text encoder and VAE of the package's tiny Wan pipeline, fixed, in fp32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_WAN / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(TINY_WAN / "text_encoder")
    vae = AutoencoderKLWan.from_pretrained(TINY_WAN / "vae")
    parts = (part.to(device).requires_grad_(False).eval() for part in (text_encoder, vae))
    return tokenizer, *parts


def save_witness(transformer, scheduler, folder):
    """Write `transformer` in bf16, and its scheduler."""
    transformer = copy.deepcopy(transformer)
    torch.nn.Module.to(transformer, "cpu", torch.bfloat16)  # every part, and without a warning
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
