"""Other selection rules, from their papers' descriptions, for comparison at equal cost.

A rule is a function of q, k, v `[B, H, N, D]` in the model's order (after QK norm and rotary
embedding), the token geometry, a share of the video-video work, and the valid text tokens `[B]` or
None. It returns the output `[B, H, N, D]` and its attention arithmetic relative to dense attention,
a 0-dim tensor. Its own knob is solved for, so that the work matches the share. As with ours, text
keys are always kept, text queries are dense, and choosing costs nothing. All choose anew in every
call, as published, and none of the papers' kernels is used: this compares quality, not speed.
"""

import itertools
import math
from contextlib import contextmanager
from unittest import mock

import torch
from rival_attention import (
    CHUNK_ELEMENTS,
    TILE,
    Slots,
    consecutive,
    k_means,
    keep_mass,
    masked_attention,
    tiles,
)

from dfsattn_diffusers.processors import base
from dfsattn_diffusers.selection import row_budget

BLOCK = 128
SMALL_BLOCK = 64
TOKENS_PER_CLUSTER = (256, 96)  # of queries, of keys: about as many as the paper has
LLOYD_ROUNDS = 4


@contextmanager
def in_place_of_ours(rule):
    """Sparse calls of DFSAttn run `rule` at their keep ratio; yields the list of their costs."""
    costs = []

    def attend(prepared, layout, *_, keep_ratio, text_lengths=None, **__):
        x = (prepared.q, prepared.k, prepared.v)
        x = (layout.from_curve(part, prepared.choice) for part in x)
        q, k, v = (part.transpose(1, 2) for part in x)
        # The paper rounds down to whole blocks: no rule shall have more.
        blocks = -(-layout.geometry.video_tokens // BLOCK)
        share = row_budget(keep_ratio, blocks) / blocks
        out, cost = rule(q, k, v, layout.geometry, share, text_lengths)
        costs.append(cost)
        return out.transpose(1, 2), None  # no selection: nothing is cached

    with mock.patch.object(base, "sparse_attention", attend):
        yield costs


def raster_blocks(q, k, v, geometry, share, text_lengths=None):
    """Blocks of consecutive tokens, the highest products of block means in each row."""
    slots = Slots(consecutive(geometry.video_tokens, BLOCK), geometry, BLOCK, text_lengths, q)
    scores = slots.video_means(q, BLOCK) @ slots.video_means(k, BLOCK).transpose(2, 3)
    return slots.attend(q, k, v, top_of_rows(scores, share), BLOCK)


def sliding_window(q, k, v, geometry, share, text_lengths=None):
    """Sliding tile attention (2502.04507): a box of tiles around each tile, moved inside the grid.

    The knob is the box, of the grid's proportions as far as the share allows.
    """
    counts = [-(-size // side) for size, side in zip(geometry.grid, TILE)]
    near = torch.ones(1, 1, dtype=torch.int32)
    for count, width in zip(counts, window_of(geometry.grid, share)):
        near = torch.kron(near, _near(count, width).int())
    slots = Slots(tiles(geometry.grid), geometry, math.prod(TILE), text_lengths, q)
    keep = near.bool().to(q.device).expand(*q.shape[:2], -1, -1)
    return slots.attend(q, k, v, keep, math.prod(TILE))


def radial(q, k, v, geometry, share, text_lengths=None):
    """Radial attention (2506.19852): spatial reach halves as the frame distance doubles.

    All see the first frame. The knob is the reach within a frame and its neighbours.
    """
    frames, area = geometry.grid[0], math.prod(geometry.grid[1:])
    allowed = torch.tensor(radial_bands(frames, area, share), device=q.device)
    index = torch.arange(frames * area, device=q.device)
    frame, place = index // area, index % area

    def keep(rows):
        band = allowed[(frame[rows, None] - frame).abs()]
        return ((place[rows, None] - place).abs() <= band) | (frame == 0)

    return masked_attention(q, k, v, geometry, keep, text_lengths)


def cumulative_mass(q, k, v, geometry, share, text_lengths=None):
    """SpargeAttn (2502.18137): block means, each row keeps its heaviest blocks up to a common mass.

    Its exception for blocks of dissimilar tokens is left out, as in its top-k interface.
    """
    slots = Slots(consecutive(geometry.video_tokens, BLOCK), geometry, BLOCK, text_lengths, q)
    keys = slots.video_means(k, SMALL_BLOCK)
    lengths = slots.lengths(SMALL_BLOCK)[:, None, None, : keys.shape[2]]
    logits = slots.video_means(q, BLOCK) @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
    mass = logits.masked_fill(lengths == 0, -math.inf).softmax(-1)
    rows = slots.lengths(BLOCK)[:, None, : mass.shape[2], None]
    return slots.attend(q, k, v, keep_mass(mass, rows * lengths, share), SMALL_BLOCK)


def clusters(q, k, v, geometry, share, text_lengths=None):
    """Sparse VideoGen 2 (2505.18875): k-means of queries and of keys, cluster pairs by top-p."""
    start = geometry.text_tokens if geometry.text_first else 0
    video = slice(start, start + geometry.video_tokens)
    (q_label, q_mean, q_size), (k_label, k_mean, k_size) = (
        k_means(x[:, :, video].float(), -(-geometry.video_tokens // tokens), LLOYD_ROUNDS)
        for x, tokens in zip((q, k), TOKENS_PER_CLUSTER)
    )
    logits = q_mean @ k_mean.transpose(2, 3) * q.shape[-1] ** -0.5
    mass = (logits + k_size[:, :, None].log()).softmax(-1)
    kept = keep_mass(mass, q_size[..., None] * k_size[:, :, None], share)

    def keep(rows):
        of_query = kept.gather(2, q_label[:, :, rows, None].expand(-1, -1, -1, kept.shape[3]))
        return of_query.gather(3, k_label[:, :, None].expand(-1, -1, of_query.shape[2], -1))

    return masked_attention(q, k, v, geometry, keep, text_lengths)


def piecewise(q, k, v, geometry, share, text_lengths=None):
    """PISA (2602.01077): top blocks exact, the rest by block means and one first-order term.

    With e_j = n_j exp(q k_j) of the means, a block gives e_j (v_j + q C), where C is the covariance
    of keys and values inside blocks, averaged over all blocks. A mean costs as much as a key, and
    the product with C as half the head dim of keys.
    """
    slots = Slots(
        consecutive(geometry.video_tokens, SMALL_BLOCK), geometry, SMALL_BLOCK, text_lengths, q
    )
    scale, dim = q.shape[-1] ** -0.5, q.shape[-1]
    k_mean, v_mean = (slots.video_means(x, SMALL_BLOCK) for x in (k, v))
    blocks = k_mean.shape[2]
    lengths = slots.lengths(SMALL_BLOCK)[:, None, None, :blocks].float()
    scores = slots.video_means(q, SMALL_BLOCK) @ k_mean.transpose(2, 3) * scale + lengths.log()
    kept = blocks
    if share < 1:
        budget = share * geometry.video_tokens - blocks - dim / 2
        kept = min(blocks - 1, max(1, math.floor(budget / (SMALL_BLOCK - 1))))
    keep = top_of_rows(scores, kept / blocks)
    out, cost, lse = slots.attend(q, k, v, keep, SMALL_BLOCK, with_lse=True)
    if kept == blocks:
        return out, cost

    keys, values = (
        slots.video_blocks(x, SMALL_BLOCK) - mean[:, :, :, None]
        for x, mean in ((k, k_mean), (v, v_mean))
    )
    real = slots.real_video(SMALL_BLOCK)[..., None]
    within = (keys * real).flatten(2, 3).transpose(2, 3) @ values.flatten(2, 3)
    within = within * scale / geometry.video_tokens
    start = geometry.text_tokens if geometry.text_first else 0
    step = max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * blocks * SMALL_BLOCK)) * SMALL_BLOCK
    for first in range(0, geometry.video_tokens, step):
        last = min(first + step, geometry.video_tokens)
        rows = slice(start + first, start + last)
        queries = q[:, :, rows].float()
        dropped = ~keep[:, :, torch.arange(first, last, device=q.device) // SMALL_BLOCK]
        logits = queries @ k_mean.transpose(2, 3) * scale + lengths.log()
        logits = logits.masked_fill(~dropped, -math.inf)
        rest = logits.softmax(-1) @ v_mean + queries @ within
        share_of_rest = (logits.logsumexp(-1) - lse[:, :, rows]).sigmoid()[..., None]
        out[:, :, rows] = torch.lerp(out[:, :, rows].float(), rest, share_of_rest).to(out.dtype)
    tokens = slots.lengths(1).sum(1).float()
    extra = geometry.video_tokens * ((blocks - kept) + dim / 2) / tokens.square()
    return out, cost + extra.mean()


RIVALS = {
    "raster blocks": raster_blocks,
    "sliding window (STA)": sliding_window,
    "radial decay (Radial)": radial,
    "cumulative mass (SpargeAttn)": cumulative_mass,
    "clusters (SVG2)": clusters,
    "piecewise (PISA)": piecewise,
}


def window_of(grid, share):
    """Box of tiles that sees about `share` of all pairs and is most like the grid."""
    axes = []
    for size, side in zip(grid, TILE):
        lengths = torch.tensor([min(side, size - start) for start in range(0, size, side)])
        axes.append(
            [
                float(lengths @ (_near(len(lengths), width).long() @ lengths)) / size**2
                for width in range(1, len(lengths) + 1)
            ]
        )

    def misfit(window):
        parts = [axis[width - 1] for axis, width in zip(axes, window)]
        return abs(math.log(math.prod(parts) / share)) + 0.1 * math.log(max(parts) / min(parts))

    return min(itertools.product(*(range(1, len(axis) + 1) for axis in axes)), key=misfit)


def _near(count, width):
    """`[count, count]` bool: a window of `width` around each, moved inside the line."""
    index = torch.arange(count)
    first = (index - width // 2).clamp(0, count - width)[:, None]
    return (index >= first) & (index < first + width)


def radial_bands(frames, area, share):
    """Largest spatial distance kept at each frame distance, for about `share` of all pairs."""

    def bands(reach):
        return [reach >> max(0, distance.bit_length() - 1) for distance in range(frames)]

    def kept(reach):
        reached = [min(band, area - 1) for band in bands(reach)]
        near = [(2 * band + 1) * area - band * (band + 1) for band in reached]
        return sum(
            area**2 if key == 0 else near[abs(query - key)]
            for query in range(frames)
            for key in range(frames)
        )

    largest = area << max(0, (frames - 1).bit_length() - 1)
    low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        if kept(middle) <= share * (frames * area) ** 2:
            low = middle
        else:
            high = middle - 1
    return bands(low)


def top_of_rows(scores, share):
    """Mask of the highest `share` of each row, at least one."""
    count = max(1, round(share * scores.shape[-1]))
    best = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
