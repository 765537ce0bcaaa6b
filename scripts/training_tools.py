"""What both trainings share: log, time budgets, contact sheets and the tar parts."""

import atexit
import io
import json
import math
import os
import tarfile
import textwrap
import time

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw


class Log:
    """Prints each record and keeps it as one JSON line, with the seconds since the start."""

    def __init__(self, path):
        self.start = time.perf_counter()
        # Of several processes the first one speaks.
        path = os.devnull if rank() else path
        self.file = open(path, "w", buffering=1)  # noqa: SIM115 - lives as long as the run

    def seconds(self):
        return time.perf_counter() - self.start

    def __call__(self, stage, **record):
        record = {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in record.items()
        }
        line = json.dumps({"seconds": round(self.seconds(), 1), "stage": stage, **record})
        if rank() == 0:
            print(line, flush=True)
        self.file.write(line + "\n")


def join():
    """The device of this process, one of those that `torchrun` started or the only one."""
    gpu, number = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", number) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def rank():
    """Number of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(number):
    """The first process's number, in all of them; the device does not wait."""
    if dist.is_initialized():
        number = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(number, 0)
        number = number.item()
    return number


def average_gradients(parameters):
    """Over all processes."""
    if dist.is_initialized():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, dist.ReduceOp.AVG)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])


def steps_until(deadline):
    """Yield (step, share of the time gone) from now until the deadline; at least one step."""
    start, step, share = time.perf_counter(), 0, 0.0
    while share < 1:
        yield step, share
        share = agreed((time.perf_counter() - start) / max(deadline - start, 1e-3))
        step += 1


def cosine(first, last, share):
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16)


def psnr(error):
    """Decibels of an error between clips in [-1, 1]."""
    return -10 * math.log10(error.square().mean().item() / 4)


def update(optimizers, loss, rate):
    """One step of all of them, with the gradients of all clipped together."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for group in groups:
        group["lr"] = rate
    loss.backward()
    average_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
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
