"""Where the time of a denoising step goes: attention, around it, linear layers, the rest."""

import re
from bisect import bisect_right
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from dfsattn_diffusers.processors.base import LayerProcessor

PARTS = ("attention", "around attention", "linear layers", "the rest")
# By names of kernels and operators: ours and cuDNN's, FlashAttention's, the CPU's.
_ATTENTION = re.compile("block_sparse|flash|sdpa|fmha|scaled_dot_product", re.I)
_LINEAR = re.compile("gemm|nvjet|cutlass|addmm|aten::mm", re.I)
_MARK = "dfsattn"


@contextmanager
def _marked():
    """All that our processors do between projections is under one name."""
    attend_now = LayerProcessor.attend_now

    def marked(self, *args):
        with record_function(_MARK):
            return attend_now(self, *args)

    LayerProcessor.attend_now = marked
    try:
        yield
    finally:
        LayerProcessor.attend_now = attend_now


def profile(run, index):
    """Milliseconds of step `index` of a `Denoising`, by `PARTS`.

    "around attention" is what our processors do besides: norms, rotary embedding and order, scores
    and maps, pools, corrections. Stock processors do the like outside of any mark: "the rest".
    """
    activities, on_gpu = [ProfilerActivity.CPU], run.device == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with _marked(), torch.profiler.profile(activities=activities) as profiler:
        run.step(index)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted]
    marks = sorted(
        (event.time_range.start, event.time_range.end) for event in events if event.name == _MARK
    )
    starts = [start for start, _ in marks]
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.name == _MARK:
            continue
        at = event.time_range.start
        i_mark = bisect_right(starts, at) - 1
        ours = i_mark >= 0 and at < marks[i_mark][1]
        # Operators of the CPU contain one another, kernels do not.
        took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        parts[_part_of(event.name, ours)] += took / 1000
    return parts


def _part_of(name, ours):
    if _ATTENTION.search(name):
        return "attention"
    if ours:
        return "around attention"
    return "linear layers" if _LINEAR.search(name) else "the rest"
