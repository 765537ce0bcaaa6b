"""Whole video transformers at full size with random weights, and what their pipelines feed them.

    run = Denoising(MODELS["wan-480p"], device="cuda", dtype=torch.bfloat16)
    run.step(0)                      # all transformer calls of a denoising step
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0


@dataclass(frozen=True)
class Family:
    """The transformer and scheduler classes, and the calls of one step by `cache_context` name."""

    transformer: str
    scheduler: str
    branches: tuple[str, ...]
    text_tokens: int
    # Of these, tokens of a prompt where the rest is padding that a mask hides.
    valid_text: int | None = None
    scheduler_config: dict = field(default_factory=dict)


FAMILIES = {
    "wan": Family(
        "WanTransformer3DModel", "UniPCMultistepScheduler", ("cond", "uncond"), 512,
        scheduler_config=dict(prediction_type="flow_prediction", use_flow_sigmas=True),
    ),
    "hunyuan_video": Family(
        "HunyuanVideoTransformer3DModel", "FlowMatchEulerDiscreteScheduler", ("cond",), 256, 40,
        scheduler_config=dict(shift=7.0),
    ),
    "cogvideox": Family(
        "CogVideoXTransformer3DModel", "CogVideoXDDIMScheduler", ("cond_uncond",), 226,
        scheduler_config=dict(prediction_type="v_prediction", timestep_spacing="trailing"),
    ),
}


@dataclass(frozen=True)
class VideoModel:
    """A published checkpoint's shape.

    Attributes:
        source: Where its `transformer/config.json` lies.
        config: That file's fields; those left out are the class's defaults.
        size: Frames, height and width of the video, in pixels.
    """

    family: str
    source: str
    size: tuple[int, int, int]
    config: dict


_HUNYUAN = dict(num_attention_heads=24, attention_head_dim=128, num_layers=20, num_single_layers=40)
_WAN = dict(num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824)
_COG = dict(
    num_attention_heads=48, attention_head_dim=64, num_layers=42,
    use_rotary_positional_embeddings=True,
)
_COG_15 = _COG | dict(patch_size_t=2, patch_bias=False, sample_height=96, sample_width=170)

_hunyuan = "hunyuan_video", "hunyuanvideo-community/HunyuanVideo"
_wan = "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
MODELS = {
    "hunyuan-720p": VideoModel(*_hunyuan, (129, 720, 1280), _HUNYUAN),
    "hunyuan-480p": VideoModel(*_hunyuan, (129, 480, 720), _HUNYUAN),
    "wan-720p": VideoModel(*_wan, (81, 720, 1280), _WAN),
    "wan-480p": VideoModel(*_wan, (81, 480, 832), _WAN),
    "cogvideox-5b": VideoModel("cogvideox", "zai-org/CogVideoX-5b", (49, 480, 720), _COG),
    "cogvideox-1.5": VideoModel("cogvideox", "zai-org/CogVideoX1.5-5B", (81, 768, 1360), _COG_15),
}

_SMALL = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)
TINY = {
    "hunyuan-720p": VideoModel(*_hunyuan, (17, 96, 128), _SMALL | dict(
        num_single_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6))),
    "wan-480p": VideoModel(*_wan, (17, 96, 128), _SMALL | dict(
        ffn_dim=32, freq_dim=16, text_dim=16)),
    "cogvideox-5b": VideoModel("cogvideox", "zai-org/CogVideoX-5b", (17, 96, 128), _COG | _SMALL
        | dict(text_embed_dim=16, time_embed_dim=16)),
    "cogvideox-1.5": VideoModel("cogvideox", "zai-org/CogVideoX1.5-5B", (17, 96, 128), _COG_15
        | _SMALL | dict(text_embed_dim=16, time_embed_dim=16)),
}  # fmt: skip


def build(model, device, dtype):
    """The transformer, filled on `device` without a copy elsewhere; activations stay near 1."""
    kind = getattr(diffusers, FAMILIES[model.family].transformer)
    with init_empty_weights(include_buffers=False):
        transformer = kind(**model.config).eval().requires_grad_(False)
    exact = kind._keep_in_fp32_modules or ()
    for path, module in transformer.named_modules():
        for name, meta in module.named_parameters(recurse=False):
            kept = set(exact) & {*path.split("."), name}
            value = torch.empty(meta.shape, device=device, dtype=torch.float32 if kept else dtype)
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
            else:
                value.fill_(float(name == "weight"))
            module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    return transformer.to(device)


class Denoising:
    """A pipeline's loop without its text encoder and VAE; `enable_dfsattn` takes it for one.

    Args:
        model: What to run.
        steps: Denoising steps of the run.
        guidance: Scale, where the family guides by a second branch or batch row.
    """

    def __init__(self, model, device, dtype, steps=50, guidance=6.0):
        self.model, self.family = model, FAMILIES[model.family]
        self.transformer = build(model, device, dtype)
        self.scheduler = getattr(diffusers, self.family.scheduler)(**self.family.scheduler_config)
        self.scheduler.set_timesteps(steps, device=device)
        self.device, self._dtype, self._guidance = device, dtype, guidance
        self._current_timestep = None
        self._rows = 2 if model.family == "cogvideox" else 1
        self.latents = self._randn(self._latent_shape())
        self._inputs = {name: self._make_inputs() for name in self.family.branches}

    def compile_blocks(self, backend):
        """Regional compilation, without graph breaks."""
        names = "blocks", "transformer_blocks", "single_transformer_blocks"
        for blocks in (getattr(self.transformer, name, ()) for name in names):
            for block in blocks:
                block.compile(fullgraph=True, backend=backend)

    def step(self, index):
        """Outputs of the transformer's calls in step number `index`, as the pipeline makes them."""
        self._current_timestep = timestep = self.scheduler.timesteps[index]
        latents = torch.cat([self.latents] * self._rows).to(self._dtype)
        outputs = []
        for name in self.family.branches:
            with torch.no_grad(), self.transformer.cache_context(name):
                outputs += self.transformer(
                    hidden_states=latents,
                    timestep=timestep.expand(self._rows),
                    return_dict=False,
                    **self._inputs[name],
                )
        return outputs

    def whole_run(self):
        """All steps, guided, from fresh noise to `latents`."""
        self.latents = self._randn(self._latent_shape())
        self.scheduler.set_timesteps(len(self.scheduler.timesteps), device=self.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        for index, timestep in enumerate(self.scheduler.timesteps):
            outputs = [row for out in self.step(index) for row in out.float().split(1)]
            if self.model.family == "cogvideox":
                outputs.reverse()
            noise = outputs[0]
            if len(outputs) > 1:
                noise = outputs[1] + self._guidance * (outputs[0] - outputs[1])
            self.latents = self.scheduler.step(noise, timestep, self.latents, return_dict=False)[0]
        self._current_timestep = None
        return self.latents

    @contextmanager
    def trimmed(self):
        """Without padded text and its mask: what a dense baseline can have for nothing."""
        stock = dict(self.transformer.attn_processors)
        inputs, self._inputs = self._inputs, {k: _trim(v) for k, v in self._inputs.items()}
        for name, processor in stock.items():
            if type(processor) is HunyuanVideoAttnProcessor2_0:
                self._attention(name).set_processor(UnmaskedProcessor())
        try:
            yield
        finally:
            self._inputs = inputs
            for name, processor in stock.items():
                self._attention(name).set_processor(processor)

    def _attention(self, name):
        return self.transformer.get_submodule(name.removesuffix(".processor"))

    def _latent_shape(self):
        (frames, height, width), config = self.model.size, self.transformer.config
        frames = (frames - 1) // 4 + 1
        if self.model.family != "cogvideox":
            return 1, config.in_channels, frames, height // 8, width // 8
        patch = config.patch_size_t or 1
        return 1, math.ceil(frames / patch) * patch, config.in_channels, height // 8, width // 8

    def _make_inputs(self):
        config, device = self.transformer.config, self.device
        width = config.text_dim if self.model.family == "wan" else config.text_embed_dim
        text = self._randn((self._rows, self.family.text_tokens, width)).to(self._dtype)
        inputs = dict(encoder_hidden_states=text)
        if self.model.family == "cogvideox":
            inputs["image_rotary_emb"] = self._rotary()
        if self.family.valid_text is not None:
            valid = torch.arange(self.family.text_tokens, device=device) < self.family.valid_text
            inputs["encoder_attention_mask"] = valid[None].to(self._dtype)
            inputs["pooled_projections"] = text[:, 0, : config.pooled_projection_dim]
            inputs["guidance"] = torch.full((1,), 6000.0, device=device, dtype=self._dtype)
        return inputs

    def _rotary(self):
        config = self.transformer.config
        _, frames, _, height, width = self._latent_shape()
        grid = height // config.patch_size, width // config.patch_size
        crops = dict(crops_coords=((0, 0), grid))
        if config.patch_size_t:
            frames //= config.patch_size_t
            crops = dict(crops_coords=None, grid_type="slice", max_size=grid)
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, grid_size=grid, temporal_size=frames, device=self.device,
            **crops,
        )

    def _randn(self, shape):
        return torch.randn(shape, device=self.device)


def _trim(inputs):
    if "encoder_attention_mask" not in inputs:
        return inputs
    valid = int(inputs["encoder_attention_mask"].sum())
    names = "encoder_hidden_states", "encoder_attention_mask"
    return inputs | {name: inputs[name][:, :valid] for name in names}


class UnmaskedProcessor(HunyuanVideoAttnProcessor2_0):
    """The stock processor for text without padding, where a mask only slows attention down."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 image_rotary_emb=None):  # fmt: skip
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)
