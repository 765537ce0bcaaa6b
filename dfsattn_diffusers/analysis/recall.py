"""Recall of a block map, what it is estimated to be, and what it is sure to be: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Largest slice of the logits that is in memory at a time; a few temporaries have its size.
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class BlockLogits:
    """The logits of query rows against all keys, as statistics of each key block.

    An empty block has a log mass of -inf; the rest is 0.

    Attributes:
        log_mass: `[B, H, R, nK]` log of the sum of `exp(logit)`.
        mean: `[B, H, R, nK]` mean logit.
        low, high: `[B, H, R, nK]` lowest and highest logit.
    """

    log_mass: Tensor
    mean: Tensor
    low: Tensor
    high: Tensor

    @property
    def deviation(self) -> Tensor:
        """`[B, H, R, nK]` largest distance of a logit from the mean."""
        return torch.maximum(self.high - self.mean, self.mean - self.low)

    def joined(self, key_lengths: Tensor, count: int) -> BlockLogits:
        """The same for blocks of `count` pieces, of which `key_lengths` are `[B or 1, nK]`."""
        lengths = key_lengths[:, None, None].unflatten(-1, (-1, count))
        log_mass, mean, low, high = (
            x.unflatten(-1, (-1, count)) for x in (self.log_mass, self.mean, self.low, self.high)
        )
        mean = (mean * lengths).sum(-1) / lengths.sum(-1).clamp(min=1)
        # In place of an empty piece the mean, which is never beyond the others.
        low, high = (torch.where(lengths > 0, x, mean[..., None]) for x in (low, high))
        return BlockLogits(log_mass.logsumexp(-1), mean, low.amin(-1), high.amax(-1))


def block_logits(q: Tensor, k: Tensor, key_lengths: Tensor, *, scale: float) -> BlockLogits:
    """Statistics of `q . k * scale`, in float32 or wider, with the logits in slices only.

    Args:
        q: `[B, H, R, D]` any query rows.
        k: `[B, H, P, D]` all keys, in `nK` blocks of equal size.
        key_lengths: `[B or 1, nK]` real keys at the front of each block; what lies behind them
            does not count, not even if it is NaN.
        scale: Of the logits, as in the attention itself.

    Raises:
        ValueError: `nK` does not divide `P`.
    """
    size = _block_size(k, key_lengths)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype) * scale
    row_bytes = q[..., 0].numel() * size * dtype.itemsize
    step = max(1, _CHUNK_BYTES // row_bytes)
    parts = []
    for lengths, keys in zip(key_lengths.split(step, 1), k.split(step * size, 2)):
        logits = (q @ keys.to(dtype).transpose(2, 3)).unflatten(3, (-1, size))
        padding = _padding(lengths, size)[:, None, None]
        mean = logits.masked_fill(padding, 0).sum(-1) / lengths.clamp(min=1)[:, None, None]
        low, high = torch.where(padding, mean[..., None], logits).aminmax(dim=-1)
        parts.append((logits.masked_fill_(padding, -math.inf).logsumexp(-1), mean, low, high))
    return BlockLogits(*(torch.cat(part, -1) for part in zip(*parts)))


def key_radius(k: Tensor, key_lengths: Tensor) -> Tensor:
    """Largest distance of a block's keys from their mean.

    `|q| * radius * scale` bounds the deviation of every logit of a row `q` from the block's mean
    logit (Cauchy-Schwarz), and costs one pass over the keys for all rows.

    Args:
        k: `[B, H, P, D]` all keys, in `nK` blocks of equal size.
        key_lengths: `[B or 1, nK]` real keys at the front of each block.

    Returns:
        `[B, H, nK]` float32 or wider; 0 for an empty block.
    """
    size = _block_size(k, key_lengths)
    dtype = torch.promote_types(k.dtype, torch.float32)
    block_bytes = k[:, :, :size].numel() * dtype.itemsize
    step = max(1, _CHUNK_BYTES // block_bytes)
    parts = []
    for lengths, keys in zip(key_lengths.split(step, 1), k.split(step * size, 2)):
        padding = _padding(lengths, size)[:, None, :, :, None]
        blocks = keys.to(dtype).unflatten(2, (-1, size)).masked_fill(padding, 0)
        mean = blocks.sum(3, keepdim=True) / lengths.clamp(min=1)[:, None, :, None, None]
        parts.append((blocks - mean).masked_fill_(padding, 0).norm(dim=-1).amax(-1))
    return torch.cat(parts, -1)


def exact_recall(log_mass: Tensor, kept: Tensor) -> Tensor:
    """Share of a row's softmax mass inside the kept blocks.

    Args:
        log_mass: `[..., nK]` of `block_logits`.
        kept: `[..., nK]` bool, broadcastable to it.

    Returns:
        `[...]` in [0, 1]; 1 where nothing is lost.
    """
    return _share(log_mass, log_mass, kept)


def recall_bound(
    mean: Tensor, deviation: Tensor, key_lengths: Tensor, kept: Tensor, *, convex: bool = False
) -> Tensor:
    """Lower bound of the recall of every row whose logits these statistics describe.

    With every logit of block j within `d_j` of the row's mean `s_j`, `n_j` of them, the block's
    mass lies between `n_j exp(s_j - d_j)` and `n_j exp(s_j + d_j)`, so that recall is at least
    `A / (A + B)`: `A` the lower ends of the kept blocks, `B` the upper ends of the rest.

    Granularity is the caller's: a row's own mean and deviation bound that row's recall, and the
    mean of rows' bounds bounds the mean of their recalls.

    Args:
        mean: `[..., nK]` mean logits.
        deviation: `[..., nK]` at least the largest distance of a logit from the mean: exact from
            `block_logits`, which is tight, or from `key_radius`, which is cheap.
        key_lengths: `[..., nK]` real keys, broadcastable to `mean`.
        kept: `[..., nK]` bool, broadcastable to it.
        convex: Use that `s_j` is the mean: by convexity of exp, the ends are
            `n_j exp(s_j)` (Jensen) and `n_j exp(s_j) cosh(d_j)`. Never below the plain bound.

    Returns:
        `[...]` in [0, 1]; 1 where nothing is lost. Exact up to rounding of the logits.
    """
    middle = mean + key_lengths.to(mean.dtype).log()
    if not convex:
        return _share(middle - deviation, middle + deviation, kept)
    return _share(middle, middle + _log_cosh(deviation), kept)


def estimated_recall(scores: Tensor, kept: Tensor) -> Tensor:
    """Share of the block scores inside the kept blocks, as `Selection.recall` but for each row.

    Args:
        scores: `[..., nK]` of `score.score_blocks`.
        kept: `[..., nK]` bool.

    Returns:
        `[...]` in [0, 1].
    """
    return (scores * kept).sum(-1) / scores.sum(-1)


def _share(low: Tensor, high: Tensor, kept: Tensor) -> Tensor:
    """`A / (A + B)` from logs: `A` the sum of `low` where kept, `B` that of `high` elsewhere."""
    log_kept = low.masked_fill(~kept, -math.inf).logsumexp(-1)
    log_lost = high.masked_fill(kept, -math.inf).logsumexp(-1)
    return (log_kept - log_lost).sigmoid().masked_fill(log_lost == -math.inf, 1)


def _block_size(k: Tensor, key_lengths: Tensor) -> int:
    num_blocks = key_lengths.shape[1]
    if k.shape[2] % num_blocks:
        raise ValueError(
            f"k must hold {num_blocks} blocks of equal size, as many as key_lengths has entries, "
            f"got {k.shape[2]} keys; pad them and let key_lengths tell which are real"
        )
    return k.shape[2] // num_blocks


def _padding(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) >= lengths[..., None]


def _log_cosh(x: Tensor) -> Tensor:
    """`log(cosh(x))` for x that is not negative, without overflow."""
    return x + F.softplus(-2 * x) - math.log(2)
