"""What both trainings share: log, time budgets, contact sheets and the tar parts."""

import io
import json
import math
import tarfile
import textwrap
import time

import torch
from PIL import Image, ImageDraw


class Log:
    """Prints each record and keeps it as one JSON line, with the seconds since the start."""

    def __init__(self, path):
        self.start = time.perf_counter()
        self.file = open(path, "w", buffering=1)  # noqa: SIM115 - lives as long as the run

    def seconds(self):
        return time.perf_counter() - self.start

    def __call__(self, stage, **record):
        record = {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in record.items()
        }
        line = json.dumps({"seconds": round(self.seconds(), 1), "stage": stage, **record})
        print(line, flush=True)
        self.file.write(line + "\n")


def steps_until(deadline):
    """Yield (step, share of the time gone) from now until the deadline; at least one step."""
    start, step, share = time.perf_counter(), 0, 0.0
    while share < 1:
        yield step, share
        step, share = step + 1, (time.perf_counter() - start) / max(deadline - start, 1e-3)


def cosine(first, last, share):
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def psnr(error):
    """Decibels of an error between clips in [-1, 1]."""
    return -10 * math.log10(error.square().mean().item() / 4)


def update(optimizer, loss, rate):
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(device, function, *arguments):
    """Seconds that one call takes, work on the device included, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def save_sheet(videos, texts, path, columns=9):
    """One row per clip of `videos` `[B, 3, T, H, W]` in [-1, 1], its text at the left."""
    frames = torch.linspace(0, videos.shape[2] - 1, columns).round().long().tolist()
    rows = videos[:, :, frames].permute(0, 3, 2, 4, 1).flatten(2, 3)  # B, H, columns * W, 3
    rows = ((rows.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    sheet = Image.new("RGB", (170 + rows.shape[2], len(rows) * rows.shape[1]), "white")
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        sheet.paste(Image.fromarray(row), (170, index * rows.shape[1]))
        ImageDraw.Draw(sheet).text((6, index * rows.shape[1] + 4), textwrap.fill(text, 24), "black")
    sheet.save(path)


def pack(folder, report, part_bytes=14 * 2**20):
    """The folder as a tar file in small parts; `cat` them to have it back."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, arcname=folder.name)
    data, parts = buffer.getvalue(), []
    for start in range(0, len(data), part_bytes):
        parts.append(f"{folder.name}.tar.part{len(parts)}")
        (report / parts[-1]).write_bytes(data[start : start + part_bytes])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"folder_bytes": size, "parts": parts}
