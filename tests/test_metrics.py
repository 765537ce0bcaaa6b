import math

import pytest
import torch

from dfsattn_diffusers.metrics import psnr, ssim


def test_psnr_of_known_errors():
    x = torch.rand(3, 16, 16, 3) * 0.5
    assert psnr(x, x) == math.inf
    assert psnr(x + 0.1, x) == pytest.approx(20, abs=1e-4)
    # Frames are averaged in dB: 20 and 40.
    y = x[:2].clone()
    y[0] += 0.1
    y[1] += 0.01
    assert psnr(y, x[:2]) == pytest.approx(30, abs=1e-3)


def test_ssim_against_a_direct_sum():
    torch.manual_seed(0)
    x = torch.rand(1, 13, 12, 1, dtype=torch.float64)
    y = (x + 0.2 * torch.rand_like(x)).clamp(0, 1)
    taps = [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    values = []
    for top in range(3):
        for left in range(2):
            sums = dict.fromkeys(("w", "x", "y", "xx", "yy", "xy"), 0.0)
            for i in range(11):
                for j in range(11):
                    w = taps[i] * taps[j]
                    a, b = float(x[0, top + i, left + j, 0]), float(y[0, top + i, left + j, 0])
                    for key, term in zip(sums, (1, a, b, a * a, b * b, a * b)):
                        sums[key] += w * term
            mx, my = sums["x"] / sums["w"], sums["y"] / sums["w"]
            vx, vy = sums["xx"] / sums["w"] - mx**2, sums["yy"] / sums["w"] - my**2
            cov = sums["xy"] / sums["w"] - mx * my
            values.append(
                (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
                / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
            )
    assert ssim(x, y) == pytest.approx(sum(values) / len(values), rel=1e-9)
    assert ssim(x, x) == pytest.approx(1)


def test_bad_input():
    with pytest.raises(ValueError, match=r"Two videos of one shape .* got \(1, 2, 2, 3\) and"):
        psnr(torch.zeros(1, 2, 2, 3), torch.zeros(2, 2, 2, 3))
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3))
