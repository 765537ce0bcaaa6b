"""The selection kernels against the torch code of `selection.py`, and their order of ties."""

import pytest
import torch
from kernel_cases import ON_CUDA

from dfsattn_diffusers import selection

top_blocks = pytest.importorskip("dfsattn_diffusers.kernels.top_blocks")

DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


def plain(scores, per_row, more, shared_from):
    """Stable sorts: of equal scores the first are kept."""

    def top(x, count):
        order = x.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)

    mask = top(scores, per_row)
    if not more:
        return mask
    rest = scores.masked_fill(mask, -torch.inf).flatten(shared_from)
    count = more * scores.shape[shared_from:-1].numel()
    return mask | top(rest, count).view_as(scores)


def softmax_scores(columns=67, sharpness=3.0, seed=0):
    make = torch.Generator().manual_seed(seed)
    heads = torch.tensor([0.1, 1.0, sharpness])[:, None, None]
    return (torch.randn(2, 3, 11, columns, generator=make) * heads).softmax(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared_from", [1, 2])
@pytest.mark.parametrize("per_row, more", [(1, 0), (20, 0), (67, 0), (1, 3), (5, 15), (5, 62)])
@pytest.mark.parametrize("kind", ["spread", "peaked", "few values", "equal", "zero", "tiny"])
def test_same_as_stable_sorts(device, kind, per_row, more, shared_from):
    scores = softmax_scores(sharpness=200.0 if kind == "peaked" else 3.0)
    if kind == "few values":
        scores = (scores * 200).round() / 200
    elif kind in ("equal", "zero"):
        scores = torch.full_like(scores, 0.25 if kind == "equal" else 0.0)
    elif kind == "tiny":
        scores = scores * 1e-38
    mask = top_blocks.keep_highest(scores.to(device), per_row, more, shared_from)
    assert torch.equal(mask.cpu(), plain(scores, per_row, more, shared_from))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [1, 2, 64, 300])
@pytest.mark.parametrize("budget", ["row", "head", "layer"])
def test_same_as_torch(device, budget, columns):
    """Also where the scores are part of rows with text."""
    scores = softmax_scores(columns + 3)[..., :columns]
    kept = max(1, columns // 3)
    wanted = selection._keep_highest(scores, kept, budget)
    sure = kept if budget == "row" else max(1, int(kept * selection._ROW_FLOOR))
    shared_from = 2 if budget == "head" else 1
    on_device = softmax_scores(columns + 3).to(device)[..., :columns]
    got = top_blocks.keep_highest(on_device, sure, kept - sure, shared_from)
    assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
@pytest.mark.parametrize("budget", ["row", "head", "layer"])
def test_large(device, budget):
    make = torch.Generator(device).manual_seed(0)
    scores = torch.randn(1, 40, 591, 591, generator=make, device=device).softmax(-1)
    got = selection._keep_highest(scores, 177, budget)
    sure = 177 if budget == "row" else 44
    assert torch.equal(got, plain(scores, sure, 177 - sure, 2 if budget == "head" else 1))
    assert torch.equal(got, selection._keep_highest(scores, 177, budget))
