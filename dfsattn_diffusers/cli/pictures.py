"""Heat maps and block maps as images, with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _MISSING = (30, 30, 34), (255, 255, 255), (222, 222, 226)
# From low to high; dark to light, so that it also reads in grey.
_SCALE = np.array(
    [(22, 18, 60), (60, 38, 130), (150, 46, 130), (222, 84, 84), (250, 160, 70), (252, 244, 170)]
)
# Block maps: dropped and kept blocks, each from a score of 0 to the row's highest.
_DROPPED = np.array([(16, 18, 28), (40, 96, 190)])
_KEPT = np.array([(176, 98, 20), (255, 238, 150)])
_UNSCORED = (150, 150, 156)
_FRAME_LINE, _TEXT_LINE = (96, 100, 116), (90, 220, 190)
_MARGIN = 14
_PLOT_PIXELS = 720


def heat_map(
    values: np.ndarray,
    *,
    title: str,
    row_axis: str,
    column_axis: str,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """A table of numbers in colours, with axes and a colour scale.

    Args:
        values: `[R, C]`; NaN is drawn grey.
        title: Above the picture.
        row_axis, column_axis: What the rows and columns are.
        row_labels, column_labels: One for each; where they would overlap, some are left out.
        limits: Values at the ends of the colour scale; None rounds what occurs to tenths.

    Returns:
        `[H, W, 3]` uint8.
    """
    values = np.asarray(values, dtype=float)
    rows, columns = values.shape
    low, high = limits or _limits(values)
    width, height = (max(8, min(44, _PLOT_PIXELS // n)) for n in (columns, rows))
    height = min(height, 30)
    font, small = _font(14), _font(12)
    left = _MARGIN + 20 + max(_width(label, small) for label in row_labels) + 8
    top = _MARGIN + 28
    right, bottom = left + columns * width, top + rows * height
    scale_height = max(bottom - top, 120)
    canvas_width = max(right + 100, left + _width(title, font) + _MARGIN)
    picture = Image.new("RGB", (canvas_width, top + scale_height + 58), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((left, _MARGIN - 2), title, fill=_INK, font=font)

    for r in range(rows):
        for c in range(columns):
            value, x, y = values[r, c], left + c * width, top + r * height
            colour = _MISSING if math.isnan(value) else _colour(value, low, high)
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=colour)
            text = "" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
            if text and width >= _width(text, small) + 4 and height >= 16:
                ink = _INK if sum(colour) > 380 else _PAPER
                draw.text((x + width // 2, y + height // 2), text, ink, small, anchor="mm")

    room = max(_width(label, small) for label in column_labels) + 6
    for c in range(0, columns, -(-room // width)):
        x = left + c * width + width // 2
        draw.text((x, bottom + 4), column_labels[c], _INK, small, anchor="ma")
    for r in range(0, rows, -(-16 // height)):
        y = top + r * height + height // 2
        draw.text((left - 8, y), row_labels[r], _INK, small, anchor="rm")
    draw.text(((left + right) // 2, bottom + 22), column_axis, _INK, font, anchor="ma")
    _paste_upright(picture, row_axis, font, _MARGIN - 4, (top + bottom) // 2)
    _draw_scale(draw, right + 24, top, scale_height, low, high, small)
    if np.isnan(values).any():
        y = top + scale_height + 18
        draw.rectangle((right + 24, y, right + 40, y + 12), fill=_MISSING)
        draw.text((right + 46, y - 1), "dense", _INK, small)
    return np.asarray(picture)


def block_map(
    mask: np.ndarray,
    scores: np.ndarray | None = None,
    *,
    title: str,
    row_lines: Sequence[float] = (),
    column_lines: Sequence[float] = (),
    text_row: float | None = None,
    text_column: float | None = None,
) -> np.ndarray:
    """Which key blocks each query block keeps, kept ones lit.

    Args:
        mask: `[nQ, nK]` bool.
        scores: `[nQv, nK]` scores of the first rows, for shading: a block is the brighter the
            closer it comes to the highest score of its row. None leaves the shading out.
        title: Above the picture.
        row_lines, column_lines: Where frames begin, in blocks.
        text_row, text_column: Where text begins, in blocks.

    Returns:
        `[H, W, 3]` uint8.
    """
    rows, columns = mask.shape
    cell = max(1, min(24, _PLOT_PIXELS // max(rows, columns)))
    shade = np.ones((rows, columns))
    if scores is not None:
        peak = scores.max(-1, keepdims=True)
        shade[: len(scores)] = np.sqrt(scores / np.where(peak > 0, peak, 1))
    cells = np.where(mask[..., None], _blend(_KEPT, shade), _blend(_DROPPED, shade))
    if scores is None:
        cells = np.where(mask[..., None], _KEPT[1], _DROPPED[0])
    else:
        cells[len(scores) :][mask[len(scores) :]] = _UNSCORED
    pixels = cells.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)

    font, small = _font(14), _font(12)
    left, top = _MARGIN + 58, _MARGIN + 28
    right, bottom = left + columns * cell, top + rows * cell
    wide = max(right + _MARGIN, left + _width(title, font) + _MARGIN, left + 560)
    picture = Image.new("RGB", (wide, bottom + 88), _PAPER)
    picture.paste(Image.fromarray(pixels), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.text((left, _MARGIN - 2), title, fill=_INK, font=font)
    for lines, colour in (
        ((row_lines, column_lines), _FRAME_LINE),
        (([text_row], [text_column]), _TEXT_LINE),
    ):
        for y in (top + round(at * cell) for at in lines[0] if at is not None):
            draw.line((left, y, right - 1, y), fill=colour)
        for x in (left + round(at * cell) for at in lines[1] if at is not None):
            draw.line((x, top, x, bottom - 1), fill=colour)

    for c in _ticks(columns):
        draw.text((left + c * cell + cell // 2, bottom + 4), str(c), _INK, small, anchor="ma")
    for r in _ticks(rows):
        draw.text((left - 8, top + r * cell + cell // 2), str(r), _INK, small, anchor="rm")
    draw.text(((left + right) // 2, bottom + 22), "key block", _INK, font, anchor="ma")
    _paste_upright(picture, "query block", font, _MARGIN - 4, (top + bottom) // 2)
    if scores is None:
        legend = [("kept", _KEPT[[1, 1]], 12), ("dropped", _DROPPED[[0, 0]], 12)]
    else:
        legend = [("kept, by score", _KEPT, 12), ("dropped, by score", _DROPPED, 12)]
    if column_lines:
        legend.append(("frame begins", [_FRAME_LINE] * 2, 1))
    if text_column is not None:
        legend.append(("text begins", [_TEXT_LINE] * 2, 1))
    _draw_legend(draw, left, bottom + 56, legend, small)
    return np.asarray(picture)


def _draw_scale(
    draw: ImageDraw.ImageDraw, x: int, top: int, height: int, low: float, high: float, font
) -> None:
    for i in range(height):
        colour = _colour(height - 1 - i, 0, height - 1)
        draw.line((x, top + i, x + 15, top + i), fill=colour)
    for part in range(5):
        y = top + round((height - 1) * (1 - part / 4))
        value = low + (high - low) * part / 4
        draw.text((x + 22, y), f"{value:.3g}", _INK, font, anchor="lm")


def _draw_legend(draw: ImageDraw.ImageDraw, x: int, y: int, entries: Sequence, font) -> None:
    for name, colours, height in entries:
        for i in range(40):
            colour = tuple(_blend(np.array(colours), np.array(i / 39)).round().astype(int))
            draw.line((x + i, y + 6 - height // 2, x + i, y + 6 + height // 2), fill=colour)
        draw.text((x + 46, y - 1), name, _INK, font)
        x += 62 + _width(name, font)


def _paste_upright(picture: Image.Image, text: str, font, x: int, middle: int) -> None:
    label = Image.new("RGB", (_width(text, font) + 4, 20), _PAPER)
    ImageDraw.Draw(label).text((2, 1), text, fill=_INK, font=font)
    label = label.rotate(90, expand=True)
    picture.paste(label, (x, max(0, middle - label.height // 2)))


def _limits(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = math.floor(known.min() * 10) / 10, math.ceil(known.max() * 10) / 10
    return low, max(high, low + 0.1)


def _colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    at = min(max((value - low) / (high - low), 0), 1) * (len(_SCALE) - 1)
    start = min(int(at), len(_SCALE) - 2)
    colour = _blend(_SCALE[start : start + 2], np.array(at - start))
    return tuple(int(c) for c in colour.round())


def _blend(ends: np.ndarray, share: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * share[..., None]


def _ticks(count: int) -> range:
    return range(0, count, max(1, 5 * round(count / 60)))


def _font(size: int):
    return ImageFont.load_default(size=size)


def _width(text: str, font) -> int:
    return math.ceil(font.getlength(text))
