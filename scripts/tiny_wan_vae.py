"""The tiny Wan VAE: build, whole-clip passes that train fast, training and measurement."""

import time

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from procedural_clips import FRAMES
from training_tools import autocast, cosine, psnr, save_sheet, steps_until, timed, update


def build_vae(channels=8):
    """4 x 4 pixels and 2 frames to one latent; half of the space by patches."""
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=channels,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    for name, module in vae.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            # Keeps the signal's size along the trunk; torch's default shrinks it at every layer.
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj")):
                module.weight.data.mul_(0.1)
    # Latents start with little noise, else nothing is learnt before they outgrow it.
    vae.quant_conv.weight.data[channels:] = 0.0
    vae.quant_conv.bias.data[channels:] = -6.0
    return vae


def _resample_frames(layer, x):
    """`[B, C, T, H, W]` through the 2-D half of a WanResample."""
    frames = x.transpose(1, 2)
    return layer.resample(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def _downsample(layer, x):
    """The first frame passes through time untouched, the rest by strides of two."""
    x = _resample_frames(layer, x)
    if layer.mode != "downsample3d" or x.shape[2] == 1:
        return x
    return torch.cat((x[:, :, :1], layer.time_conv(x)), 2)


def _upsample(layer, x):
    """The first latent gives one frame, every later one two."""
    if layer.mode == "upsample3d":
        pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat((x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)), 2)
    return _resample_frames(layer, x)


def encode_clip(vae, video):
    """Latent mean and log-variance of a whole clip at once; `vae.encode` does it by chunks."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size))
    for layer in encoder.down_blocks:
        x = _downsample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x)))
    return vae.quant_conv(encoder.conv_out(x)).chunk(2, dim=1)


def decode_clip(vae, latents):
    """A whole clip from its latents at once; `vae.decode` does it by frames, and clamps."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for layer in block.upsamplers or ():
            x = _upsample(layer, x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size)


def _loss(vae, video):
    with autocast(video.device):
        mean, log_variance = (moment.float() for moment in encode_clip(vae, video))
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        error = decode_clip(vae, latents).float() - video
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + 2 * error.square().mean() + 1e-4 * divergence, error


def _use_fastest_memory_format(vae, video, log):
    """3-D convolutions differ by several times between layouts, by machine and version: measure."""
    convolutions = [module for module in vae.modules() if isinstance(module, torch.nn.Conv3d)]

    def use(memory_format):
        for convolution in convolutions:
            convolution.to(memory_format=memory_format)

    def step():
        _loss(vae, video)[0].backward()
        vae.zero_grad(set_to_none=True)

    seconds = {}
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        use(memory_format)
        timed(video.device, step)
        seconds[memory_format], _ = timed(video.device, step)
    use(min(seconds, key=seconds.get))
    log("vae", **{str(name): value for name, value in seconds.items()})


def train_vae(vae, source, shapes, seconds, log):
    """Train on clips of the given (batch, frames, height, width); end at saved precision."""
    deadline = time.perf_counter() + seconds
    _use_fastest_memory_format(vae, source.draw(*shapes[0])[1], log)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    for step, share in steps_until(deadline):
        loss, error = _loss(vae, source.draw(*source.rng.choice(shapes))[1])
        update([optimizer], loss, min(1.0, (step + 1) / 100) * cosine(1.5e-3, 1e-5, share))
        if step % 20 == 0:
            value = loss.item()  # waits for the device, so that the clock is honest
            if step % 200 == 0:
                log("vae", step=step, loss=value, psnr=psnr(error))
    log("vae", step=step, loss=loss.item(), psnr=psnr(error))
    vae.requires_grad_(False).eval()
    for parameter in vae.parameters():
        parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def measure_vae(vae, source, sizes, sheet, log):
    """Latent statistics into the config; PSNR of fresh clips through `vae.encode` and `decode`."""
    with autocast(vae.device):
        clips = (source.draw(8, FRAMES, *sizes[0])[1] for _ in range(8))
        latents = torch.cat([encode_clip(vae, video)[0].float() for video in clips])
    mean, std = latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()
    vae.register_to_config(latents_mean=mean, latents_std=std)
    log("vae", latents_mean=mean, latents_std=std)
    for size in sizes:
        video = source.draw(6, FRAMES, *size)[1]
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample
        log("vae", size=size, psnr_held_out=psnr(decoded - video))
        if size == sizes[0]:
            save_sheet(
                torch.stack((video, decoded), 1).flatten(0, 1), ["drawn", "decoded"] * 6, sheet
            )
