"""What the rivals share: attention by padded blocks or by token masks in chunks, top-p, k-means."""

import math

import torch
import torch.nn.functional as F

from dfsattn_diffusers.kernels import BlockMap, block_sparse_attention

TILE = (4, 4, 8)
# Elements of the largest temporary.
CHUNK_ELEMENTS = 2**28


class Slots:
    """Tokens in an order of blocks: video by `video` `[blocks, block]` (-1 is padding), then text.

    Text fills blocks of its own behind the video; padding is at the end of a block.
    """

    def __init__(self, video, geometry, block, text_lengths, like):
        device, text = like.device, torch.arange(geometry.text_tokens)
        video_start = geometry.text_tokens if geometry.text_first else 0
        text_start = 0 if geometry.text_first else geometry.video_tokens
        video = torch.where(video < 0, video, video + video_start).flatten()
        text = F.pad(text + text_start, (0, -len(text) % block), value=-1)
        self.block, self.video = block, len(video)
        slots = torch.cat([video, text]).to(device)
        self.source = slots.clamp(min=0)
        self.target = torch.where(slots < 0, geometry.tokens, slots)
        self.tokens = geometry.tokens
        self.real = (slots >= 0).expand(like.shape[0], -1).clone()
        if text_lengths is not None:
            place = torch.arange(len(text), device=device)
            self.real[:, self.video :] &= place < text_lengths.to(device)[:, None]

    def lengths(self, size):
        """Real tokens of each run of `size` slots, `[B, P / size]` int32."""
        return self.real.unflatten(1, (-1, size)).sum(2, dtype=torch.int32)

    def real_video(self, size):
        return self.real[:, None, : self.video].unflatten(2, (-1, size))

    def video_blocks(self, x, size):
        """`[B, H, blocks, size, D]` fp32."""
        return x[:, :, self.source[: self.video]].float().unflatten(2, (-1, size))

    def video_means(self, x, size):
        """Mean of the real tokens of each video block, `[B, H, blocks, D]` fp32."""
        real = self.real_video(size)
        total = (self.video_blocks(x, size) * real[..., None]).sum(3)
        return total / real.sum(3).clamp(min=1)[..., None]

    def attend(self, q, k, v, keep, key_block, with_lse=False):
        """Attention over the kept video blocks and all text, `keep` `[B, H, nQ, nK]` of video.

        Returns the output in the model's order, the cost, and with `with_lse` the log-sum-exp.
        """
        rows, columns = len(self.source) // self.block, len(self.source) // key_block
        mask = torch.ones(*keep.shape[:2], rows, columns, dtype=torch.bool, device=q.device)
        mask[:, :, : keep.shape[2], : keep.shape[3]] = keep
        queries, keys = self.lengths(self.block), self.lengths(key_block)
        out, lse = block_sparse_attention(
            *(x[:, :, self.source] for x in (q, k, v)),
            BlockMap.from_mask(mask, query_block=self.block, key_block=key_block),
            key_lengths=keys,
            return_lse=True,
        )
        per_row = torch.einsum("bhqk,bk->bhq", mask.float(), keys.float())
        work = torch.einsum("bhq,bq->b", per_row, queries.float()) / q.shape[1]
        cost = (work / keys.sum(1).float().square()).mean()
        restored = self._restore(out)
        return (
            (restored, cost, self._restore(lse[..., None])[..., 0])
            if with_lse
            else (restored, cost)
        )

    def _restore(self, x):
        """Padding goes to one more row, which is cut off."""
        out = x.new_zeros(*x.shape[:2], self.tokens + 1, x.shape[3])
        return out.index_copy(2, self.target, x)[:, :, :-1]


def masked_attention(q, k, v, geometry, keep, text_lengths=None):
    """Attention with `keep(rows)`, a boolean mask `[..., rows, video]` of some video queries."""
    batch, heads, tokens, _ = q.shape
    text = geometry.text_tokens
    valid = torch.ones(1, 1, 1, text, dtype=torch.bool, device=q.device)
    if text_lengths is not None:
        valid = torch.arange(text, device=q.device) < text_lengths.to(q.device)[:, None, None, None]
    start = text if geometry.text_first else 0
    out, kept = torch.empty_like(q), 0
    everything = torch.ones(1, 1, 1, geometry.video_tokens, dtype=torch.bool, device=q.device)

    def join(video):
        """Not larger than it has to be: most of the time goes into the masks."""
        shape = torch.broadcast_shapes(valid.shape[:-1], video.shape[:-1])
        parts = [valid.expand(*shape, -1), video.expand(*shape, -1)]
        return torch.cat(parts if geometry.text_first else parts[::-1], -1)

    rows_of_text = slice(0, text) if geometry.text_first else slice(geometry.video_tokens, tokens)
    if text:
        out[:, :, rows_of_text] = F.scaled_dot_product_attention(
            q[:, :, rows_of_text], k, v, attn_mask=join(everything)
        )
    step = max(1, CHUNK_ELEMENTS // (batch * heads * tokens))
    for first in range(0, geometry.video_tokens, step):
        last = min(first + step, geometry.video_tokens)
        mask = join(keep(slice(first, last)))
        rows = slice(start + first, start + last)
        out[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask)
        kept = kept + mask.sum((2, 3)).float().mean(1)
    real_text = valid.sum((1, 2, 3)).float()
    real = geometry.video_tokens + real_text
    return out, ((kept + real_text * real) / real.square()).mean()


def consecutive(tokens, block):
    """Runs of `block` tokens, the last one padded with -1."""
    return F.pad(torch.arange(tokens), (0, -tokens % block), value=-1).view(-1, block)


def tiles(grid):
    """The boxes of `TILE` tokens of a grid, row by row, those at the end padded with -1."""
    index = torch.arange(math.prod(grid)).view(grid)
    for axis, side in enumerate(TILE):
        missing = [0, 0] * (2 - axis) + [0, -grid[axis] % side]
        index = F.pad(index, missing, value=-1)
    f, h, w = TILE
    counts = [size // side for size, side in zip(index.shape, TILE)]
    index = index.view(counts[0], f, counts[1], h, counts[2], w).permute(0, 2, 4, 1, 3, 5)
    index = index.reshape(math.prod(counts), f * h * w)
    order = (index < 0).sort(dim=1, stable=True).indices  # padding to the end
    return index.gather(1, order)


def k_means(x, count, rounds):
    """Labels `[B, H, N]`, means `[B, H, count, D]` and sizes of clusters of x `[B, H, N, D]`."""
    tokens = x.shape[2]
    start = torch.linspace(0, tokens - 1, count, device=x.device).round().long()
    means = x[:, :, start]
    step = max(1, CHUNK_ELEMENTS // (x.shape[0] * x.shape[1] * count))
    for _ in range(rounds):
        offset = means.square().sum(-1)[:, :, None]
        label = torch.cat(
            [
                (offset - 2 * part @ means.transpose(2, 3)).argmin(-1)
                for part in x.split(step, dim=2)
            ],
            dim=2,
        )
        total = torch.zeros_like(means).scatter_add_(2, label[..., None].expand_as(x), x)
        ones = torch.ones_like(label, dtype=x.dtype)
        size = ones.new_zeros(means.shape[:3]).scatter_add_(2, label, ones)
        means = torch.where(size[..., None] > 0, total / size.clamp(min=1)[..., None], means)
    return label, means, size


def keep_mass(mass, work, share):
    """Each row's heaviest cells up to a mass that all rows of a batch row share.

    The mass is the largest for which the kept cells' `work` is at most `share` of all.
    """
    ordered, order = mass.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    before[..., 0] = -1.0  # every row keeps its heaviest
    work = work.float().expand_as(mass).gather(-1, order).flatten(1)
    by_mass = before.flatten(1).sort(dim=1, stable=True).indices
    used = work.double().gather(1, by_mass).cumsum(1)
    fits = used <= share * used[:, -1:] * (1 + 1e-9)
    kept = torch.zeros_like(fits).scatter_(1, by_mass, fits).view_as(mass)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)
