"""The witnesses: tiny models of the three families, their losses and their stock pipelines.

Each family learns and is sampled by the conventions of its real models. Text comes from the tiny
Wan pipeline's encoder, latents are those of its VAE, normalised: `[B, C, F, H, W]`.
"""

import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_wan_models import PROMPT_TOKENS
from torch import nn
from training_tools import autocast

SHIFT = 8.0  # of the flow-matching samplers
TEXT_WIDTH = 128
JOINT_TEXT_TOKENS = 64
MOST_WORDS = 32  # more than any caption has
# Nothing was distilled into the guidance embedding: it always sees one value. The pipeline makes
# 1000 times it in bf16, where the usual 6 becomes 6016: another embedding than in training.
EMBEDDED_GUIDANCE = 8.0
# Tokens of the training's largest clips; fidelity is measured there and on an awkward grid.
TRAINED_GRID = (17, 32, 32)


def _flow(latents, logit):
    """Flow matching: x = (1 - s) clip + s noise; returns x, s and the target, noise - clip."""
    sigma = logit.sigmoid()
    noise = torch.randn_like(latents)
    return torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1)), sigma, noise - latents


def _initialise(transformer, norms=()):
    """Start as the trained ones did: every block adds nothing at first."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if "norm" in name and name.endswith(".linear"):
                nn.init.zeros_(module.weight)  # modulation, gates included
        for norm in norms:
            # Few words among thousands of video tokens: sharper logits let them be heard.
            if getattr(module, norm, None) is not None:
                nn.init.constant_(getattr(module, norm).weight, 1.5)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class _FewWords(WanAttnProcessor):
    """Cross-attention to words and to some of the padding, which weighs as much as all of it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, *_):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.log_weights)


class Wan:
    """Flow matching, text by cross-attention, guidance in two calls."""

    name, text_tokens = "wan", PROMPT_TOKENS
    # The pipeline takes even sides alone.
    grids = TRAINED_GRID, (17, 22, 30)
    transformer_class, scheduler_class = WanTransformer3DModel, UniPCMultistepScheduler

    def __init__(self):
        self._few_words = _FewWords()

    def loss(self, transformer, latents, logit, text, mask):
        noisy, sigma, target = _flow(latents, logit)
        text = self._shorten(transformer, text, mask)
        with autocast(latents.device):
            velocity = transformer(noisy, 1000 * sigma, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), target)

    def _shorten(self, transformer, text, mask):
        """The first `MOST_WORDS` tokens; nearly all others are padding, and the same vector."""
        words, mask = mask.sum(1, keepdim=True), mask[:, :MOST_WORDS]
        weight = (text.shape[1] - words) / (MOST_WORDS - words)
        self._few_words.log_weights = (
            torch.where(mask.bool(), 1.0, weight).log().to(torch.bfloat16)[:, None, None]
        )
        for block in transformer.blocks:
            block.attn2.processor = self._few_words
        return text[:, :MOST_WORDS]

    def pipeline(self, transformer, scheduler, vae):
        # WanPipeline reads its scale factors from the VAE.
        return WanPipeline(None, None, vae, scheduler, transformer)

    def generate(self, pipe, noise, text, mask, empty, empty_mask, steps, guidance):
        _, _, frames, height, width = noise.shape
        return pipe(
            latents=noise,
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            num_frames=(frames - 1) * pipe.vae_scale_factor_temporal + 1,
            height=height * pipe.vae_scale_factor_spatial,
            width=width * pipe.vae_scale_factor_spatial,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).frames


class HunyuanVideo:
    """Flow matching, joint attention with padded text, true guidance in two calls."""

    name, text_tokens = "hunyuan_video", JOINT_TEXT_TOKENS
    grids = TRAINED_GRID, (17, 23, 31)
    transformer_class = HunyuanVideoTransformer3DModel
    scheduler_class = FlowMatchEulerDiscreteScheduler

    def build(self, channels, depth=2):
        """By default 2 dual- and 6 single-stream blocks of 2 heads x 128: 11 million parameters."""
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=2,
            attention_head_dim=128,
            num_layers=depth,
            num_single_layers=3 * depth,
            num_refiner_layers=1,
            mlp_ratio=3.0,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
        )
        return _initialise(transformer, ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))

    def scheduler(self):
        return FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def loss(self, transformer, latents, logit, text, mask):
        noisy, sigma, target = _flow(latents, logit)
        guidance = torch.full_like(sigma, 1000 * EMBEDDED_GUIDANCE)
        pooled = self._pool(text, mask)
        with autocast(latents.device):
            velocity = transformer(
                noisy, 1000 * sigma, text, mask, pooled, guidance, return_dict=False
            )[0]
        return F.mse_loss(velocity.float(), target)

    def pipeline(self, transformer, scheduler, vae):
        return HunyuanVideoPipeline(None, None, transformer, None, scheduler, None, None)

    def generate(self, pipe, noise, text, mask, empty, empty_mask, steps, guidance):
        return pipe(
            latents=noise,
            prompt_embeds=text,
            pooled_prompt_embeds=self._pool(text, mask),
            prompt_attention_mask=mask,
            negative_prompt_embeds=empty,
            negative_pooled_prompt_embeds=self._pool(empty, empty_mask),
            negative_prompt_attention_mask=empty_mask,
            num_inference_steps=steps,
            guidance_scale=EMBEDDED_GUIDANCE,
            true_cfg_scale=guidance,
            output_type="latent",
        ).frames

    @staticmethod
    def _pool(text, mask):
        """Mean of the real tokens, in the place of CLIP's vector."""
        return text.sum(1) / mask.sum(1, keepdim=True)


class CogVideoX:
    """v-prediction of DDIM with zero terminal SNR, joint attention, guidance in one batch."""

    name, text_tokens = "cogvideox", JOINT_TEXT_TOKENS
    grids = TRAINED_GRID, (17, 23, 31)
    transformer_class, scheduler_class = CogVideoXTransformer3DModel, CogVideoXDDIMScheduler

    def __init__(self):
        self._levels, self._rotary = None, {}

    def build(self, channels, depth=2):
        """By default 8 blocks of 4 heads x 64: 10 million parameters."""
        transformer = CogVideoXTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=4,
            attention_head_dim=64,
            time_embed_dim=128,
            text_embed_dim=TEXT_WIDTH,
            num_layers=4 * depth,
            sample_height=64,
            sample_width=64,
            sample_frames=33,
            temporal_compression_ratio=2,
            max_text_seq_length=JOINT_TEXT_TOKENS,
            use_rotary_positional_embeddings=True,
        )
        return _initialise(transformer, ("norm_q", "norm_k"))

    def scheduler(self):
        # The real ones shift the SNR by 3 and 1. Clips this redundant need more noise, as in
        # the other witnesses.
        return CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            timestep_spacing="trailing",
            snr_shift_scale=8.0,
        )

    def loss(self, transformer, latents, logit, text, mask):
        signal, spread, timestep = self._level(logit)
        noise = torch.randn_like(latents)
        noisy, target = signal * latents + spread * noise, signal * noise - spread * latents
        with autocast(latents.device):
            velocity = transformer(
                noisy.transpose(1, 2),
                text,
                timestep,
                image_rotary_emb=self._rotate(transformer, noisy),
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float().transpose(1, 2), target)

    def pipeline(self, transformer, scheduler, vae):
        return CogVideoXPipeline(None, None, None, transformer, scheduler)

    def generate(self, pipe, noise, text, mask, empty, empty_mask, steps, guidance):
        height, width = (side * pipe.vae_scale_factor_spatial for side in noise.shape[3:])
        frames = pipe(
            latents=noise.transpose(1, 2).to(text.dtype),
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            height=height,
            width=width,
            num_frames=(noise.shape[2] - 1) * pipe.vae_scale_factor_temporal + 1,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).frames
        return frames.transpose(1, 2)

    def _level(self, logit):
        """Shares of signal and noise `[B, 1, 1, 1, 1]`, and the timestep, nearest to a log ratio.

        One draw in twenty is pure noise: sampling starts there, and no finite ratio reaches it.
        """
        if self._levels is None:
            kept = self.scheduler().alphas_cumprod.to(logit.device, torch.float32)
            self._levels = kept.sqrt(), (1 - kept).sqrt()
        signal, spread = self._levels
        last = len(signal) - 1
        ratios = spread[:last].log() - signal[:last].log()
        timestep = torch.searchsorted(ratios, logit).clamp(max=last)
        timestep[torch.rand_like(logit) < 0.05] = last
        return *(x[timestep].view(-1, 1, 1, 1, 1) for x in (signal, spread)), timestep

    def _rotate(self, transformer, noisy):
        """The pipeline's own rotary embedding of a grid."""
        grid = noisy.shape[2:]
        if grid not in self._rotary:
            pipe = self.pipeline(transformer, self.scheduler(), None)
            height, width = (side * pipe.vae_scale_factor_spatial for side in grid[1:])
            self._rotary[grid] = pipe._prepare_rotary_positional_embeddings(
                height, width, grid[0], noisy.device
            )
        return self._rotary[grid]


FAMILIES = {family.name: family for family in (Wan, HunyuanVideo, CogVideoX)}
