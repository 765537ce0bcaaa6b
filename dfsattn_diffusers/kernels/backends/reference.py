"""The specification, in plain torch, on any device: gather the kept blocks, then softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_map import block_lengths
from . import AttentionCall

NAME = "reference"

# Elements of a chunk's largest temporary, per CPU thread: a second-level cache should hold them.
_CHUNK_ELEMENTS = 2**19


def why_not(call: AttentionCall) -> None:
    """It does every call."""


def rank(call: AttentionCall) -> int:
    """Behind all others."""
    return 0


def forward(call: AttentionCall) -> None:
    """Fill `call.out` and `call.lse`; memory is O(N) plus one chunk of query blocks."""
    block_map = call.block_map
    batch, heads, num_queries, head_dim = call.q.shape
    num_rows, num_blocks = block_map.counts[0, 0].numel(), block_map.num_key_blocks
    dtype = torch.promote_types(call.q.dtype, torch.float32)

    # Block num_blocks of every head is empty: entries past a row's count point there.
    lengths = F.pad(block_lengths(call.k, block_map.key_block, call.key_lengths), (0, 1))
    real = _real_keys(lengths, block_map.key_block)[:, None, :, :, None]
    k, v = (
        _to_blocks(x, num_blocks + 1, block_map.key_block, dtype).masked_fill_(~real, 0)
        for x in (call.k, call.v)
    )
    k, v = k.flatten(0, 2), v.flatten(0, 2)
    q = _to_blocks(call.q, num_rows, block_map.query_block, dtype).flatten(0, 2).mul_(call.scale)
    lengths = lengths[:, None].expand(-1, heads, -1).flatten()

    counts, indices = block_map.counts.flatten(), block_map.indices.flatten(0, 2)
    order = torch.arange(counts.numel(), device=q.device)
    widths = [num_blocks] * counts.numel()
    # Only where waiting for the device costs nothing may the counts shape the work.
    if q.device.type == "cpu":
        order = counts.argsort(descending=True, stable=True)
        widths = counts[order].tolist()

    chunk = _CHUNK_ELEMENTS * torch.get_num_threads()
    out = torch.empty_like(q)
    lse = None if call.lse is None else q.new_empty(q.shape[:2])
    start = 0
    while start < len(widths):
        width = max(widths[start], 1)
        per_row = width * block_map.key_block * max(block_map.query_block, head_dim)
        rows = order[start : start + max(1, chunk // per_row)]
        blocks = _kept_blocks(counts[rows], indices[rows], num_blocks, width)
        blocks = blocks + rows[:, None] // num_rows * (num_blocks + 1)
        logits = q[rows] @ _gather(k, blocks).transpose(1, 2)
        _hide_padding(logits, lengths[blocks], block_map.key_block)
        peak = logits.amax(-1, keepdim=True)
        peak.masked_fill_(peak == float("-inf"), 0)
        # In place: a second matrix of weights would not fit the cache beside the first.
        weights = logits.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        out[rows] = (weights @ _gather(v, blocks)).div_(total).masked_fill_(total == 0, 0)
        if lse is not None:
            lse[rows] = (peak + total.log()).squeeze(-1)
        start += len(rows)

    out = out.unflatten(0, (batch, heads, -1)).flatten(2, 3)[:, :, :num_queries]
    store(out.to(call.out.dtype), call.output_order, call.out)
    if lse is not None:
        call.lse.copy_(lse.unflatten(0, (batch, heads, -1)).flatten(2)[:, :, :num_queries])


def _hide_padding(logits: Tensor, lengths: Tensor, size: int) -> None:
    """Make `[R, Q, width * size]` logits -inf behind the `[R, width]` lengths of their blocks."""
    whole = 0
    if logits.device.type == "cpu":  # blocks that all rows have, and whole, need no mask
        whole = int((lengths == size).all(0).cumprod(0).sum())
    mask = ~_real_keys(lengths[:, whole:], size).flatten(1)[:, None]
    logits[..., whole * size :].masked_fill_(mask, float("-inf"))


def _gather(x: Tensor, blocks: Tensor) -> Tensor:
    """Blocks `[R, width]` of `[blocks, size, D]`, side by side: `[R, width * size, D]`."""
    return x.index_select(0, blocks.flatten()).view(len(blocks), -1, x.shape[-1])


def _kept_blocks(counts: Tensor, indices: Tensor, num_blocks: int, width: int) -> Tensor:
    """`[R, width]` key blocks of each row, `num_blocks` after its last."""
    entry = torch.arange(width, device=counts.device)
    listed = F.pad(indices, (0, max(0, width - indices.shape[1])))[:, :width]
    blocks = torch.where(counts[:, None] == num_blocks, entry, listed)
    return torch.where(entry < counts[:, None], blocks, num_blocks)


def _real_keys(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[..., None]


def _to_blocks(x: Tensor, num_blocks: int, size: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, N, D]` to `[B, H, num_blocks, size, D]`, zeros at the end; always a copy."""
    batch, heads, tokens, head_dim = x.shape
    blocks = x.new_empty(batch, heads, num_blocks * size, head_dim, dtype=dtype)
    blocks[:, :, :tokens] = x
    blocks[:, :, tokens:] = 0
    return blocks.unflatten(2, (num_blocks, size))


def store(result: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Write `[B, H, Nq, D]` to the rows of `out` that `order` names; -1 drops a row."""
    if order is None:
        out.copy_(result)
        return
    # One more row takes what is dropped, so that nothing waits for the number of rows left.
    room = F.pad(out, (0, 0, 0, 1))
    rows = torch.where(order < 0, out.shape[2], order).long()
    room.scatter_(2, rows[..., None].expand_as(result), result)
    out.copy_(room[:, :, :-1])
