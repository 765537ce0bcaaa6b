"""How close two videos are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean of `10 log10(1 / MSE)` over the frames that differ.

    Args:
        video, reference: `[F, H, W, C]` in [0, 1].

    Returns:
        dB; infinite if every frame is equal.
    """
    _check(video, reference)
    error = (video.double() - reference.double()).square().flatten(1).mean(1)
    error = error[error > 0]
    return float((-10 * error.log10()).mean()) if error.numel() else math.inf


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity, mean over frames, colours and pixels.

    Gaussian window of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, valid region only (Wang et
    al., IEEE Transactions on Image Processing 13, 2004).

    Args:
        video, reference: `[F, H, W, C]` in [0, 1]; height and width of at least 11.
    """
    _check(video, reference)
    if min(video.shape[1:3]) < 11:
        raise ValueError(f"ssim needs frames of at least 11 x 11 pixels; got {video.shape[1:3]}.")
    offset = torch.arange(-5, 6, dtype=torch.float64, device=video.device)
    window = torch.exp(-offset.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        x = functional.conv2d(x, window.view(1, 1, 11, 1))
        return functional.conv2d(x, window.view(1, 1, 1, 11))

    x, y = (v.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for v in (video, reference))
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x.square()
    var_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _check(video: Tensor, reference: Tensor) -> None:
    if video.ndim != 4 or video.shape != reference.shape:
        raise ValueError(
            "Two videos of one shape [F, H, W, C] are needed; got "
            f"{tuple(video.shape)} and {tuple(reference.shape)}."
        )
