"""Videos side by side, with labels, as files."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LABEL_HEIGHT = 22


def side_by_side(videos: dict[str, np.ndarray], scale: int = 2) -> np.ndarray:
    """Put videos beside each other, each under its label.

    Args:
        videos: Label to `[F, H, W, 3]` in [0, 1], all of one shape.
        scale: Enlargement of each pixel.

    Returns:
        `[F, H', W', 3]` uint8 with even sizes, as video codecs want them.
    """
    parts = []
    for label, video in videos.items():
        frames = (video * 255).round().clip(0, 255).astype(np.uint8)
        frames = frames.repeat(scale, 1).repeat(scale, 2)
        band = _label(label, frames.shape[2])
        parts.append(np.concatenate([np.broadcast_to(band, (len(frames), *band.shape)), frames], 1))
    joined = np.concatenate(parts, 2)
    return np.pad(joined, ((0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)))


def frame_strip(videos: dict[str, np.ndarray], frames: int = 6) -> np.ndarray:
    """A still: one row per video, evenly spaced frames from first to last. `[H', W', 3]` uint8."""
    rows = []
    for label, video in videos.items():
        picked = video[np.linspace(0, len(video) - 1, frames).round().astype(int)]
        row = np.concatenate(list((picked * 255).round().clip(0, 255).astype(np.uint8)), 1)
        rows += [_label(label, row.shape[1]), row]
    return np.concatenate(rows, 0)


def write_video(path: Path, frames: np.ndarray, fps: int = 16) -> None:
    """Write `[F, H, W, 3]` uint8 frames as an mp4; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, fps=fps, codec="libx264", macro_block_size=2)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write `[H, W, 3]` uint8 as a PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, image)


def _label(text: str, width: int) -> np.ndarray:
    band = Image.new("RGB", (width, _LABEL_HEIGHT), "white")
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(band).text((6, 2), text, fill="black", font=font)
    return np.asarray(band)
