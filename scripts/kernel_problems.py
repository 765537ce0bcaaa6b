"""Random attention problems for the kernel benchmark, and when an output of theirs is right."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from dfsattn_diffusers.kernels import BlockMap, Tail, pool_tail

BLOCK = 128
# Of a query block, a token: 1.7 and 1.4 times the most that e4m3 did to 400,000 simulated tokens.
FP8_BLOCK, FP8_TOKEN = 0.1, 0.25


@dataclass
class Problem:
    """Random q, k, v, `[1, H, N, D]`, and a random map that keeps the diagonal."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    block_map: BlockMap
    tail: Tail | None = None

    @classmethod
    def random(cls, heads, tokens, head_dim, density, dtype, kind="even", device="cuda"):
        num_blocks = -(-tokens // BLOCK)
        qkv = (torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype) for _ in "qkv")
        scores = torch.rand(1, heads, num_blocks, num_blocks, device=device)
        if kind == "even":
            count = max(1, round(density * num_blocks))
        else:
            scores = scores ** _thrift(heads, num_blocks, device)
            count = num_blocks
        scores.diagonal(dim1=2, dim2=3).fill_(2)
        if kind == "even":
            kept = scores.topk(count, sorted=False).indices
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
        else:
            mask = scores >= _top_share(scores, density)
            mask[:, :, -2:] = True
        block_map = BlockMap.from_mask(mask, query_block=BLOCK, key_block=BLOCK, max_count=count)
        return cls(*qkv, mask, block_map)

    def with_tail(self, pool):
        """The same, with pools of so many tokens for what a row does not keep."""
        tokens, slots = self.q.shape[2], self.mask.shape[-1] * BLOCK
        k, v = (F.pad(x, (0, 0, 0, slots - tokens)) for x in (self.k, self.v))
        start = torch.arange(0, slots, pool, device=k.device, dtype=torch.int32)
        lengths = (tokens - start).clamp(0, pool)[None]
        return replace(self, tail=pool_tail(k, v, pool=pool, lengths=lengths))

    def flops(self, dense=False):
        """Of the two matrix products, for the pairs that are kept and all pools."""
        heads, tokens, head_dim = self.q.shape[1:]
        if dense:
            return 4 * head_dim * heads * tokens**2
        start = torch.arange(0, tokens, BLOCK, device=self.q.device)
        lengths = (tokens - start).clamp(max=BLOCK).double()
        pairs = (self.mask.double() @ lengths @ lengths).sum().item()
        if self.tail is not None:
            pairs += heads * tokens * self.tail.keys.shape[2]
        return 4 * head_dim * pairs

    def row(self, head, row, dtype):
        """One query block's output by dense attention in `dtype`."""
        q = self.q[0, head, row * BLOCK : (row + 1) * BLOCK].to(dtype)
        k, v = (x[0, head].to(dtype) for x in (self.k, self.v))
        mask = self.mask[0, head, row].repeat_interleave(BLOCK)[: len(k)]
        logits = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        if self.tail is not None:
            keys, values = (x[0, head].to(dtype) for x in (self.tail.keys, self.tail.values))
            kept = self.mask[0, head, row].repeat_interleave(len(keys) // self.mask.shape[-1])
            pools = q @ keys.T * q.shape[-1] ** -0.5 + self.tail.bias[0, head].to(dtype)
            logits = torch.cat([logits, pools.masked_fill(kept, -torch.inf)], -1)
            v = torch.cat([v, values])
        return logits.softmax(-1) @ v


def _thrift(heads, rows, device):
    """Exponents that make some heads and rows keep many times as much as others."""
    by_row = torch.rand(1, heads, rows, 1, device=device).square()
    by_head = torch.rand(1, heads, 1, 1, device=device)
    return 1 / (by_row * by_head + 0.03)


def _top_share(scores, share):
    """The score that about this share of a sample reaches."""
    sample = scores.flatten()[torch.randint(scores.numel(), (2**22,), device=scores.device)]
    return sample.quantile(1 - share)


def spots(problem, count=6):
    """Some query blocks, the last one of the last head among them."""
    heads, num_rows = problem.mask.shape[1:3]
    picks = torch.randint(heads * num_rows, (count,)).tolist()
    return [(heads - 1, num_rows - 1), *(divmod(pick, num_rows) for pick in picks)]


class WrongOutput(Exception):
    """An output is further from the truth than its precision explains."""


def check(problem, out, rows, exact_dtype, fp8=False):
    """Relative error over some query blocks, Frobenius; each of them must be right.

    Code may err twice as much as eager code, plus one rounding, anywhere. In fp8 single values say
    little, as averages are small and what is averaged is not: there, norms decide.
    """
    wrong, size = 0.0, 0.0
    for head, row in rows:
        exact = problem.row(head, row, exact_dtype)
        error = out[0, head, row * BLOCK : (row + 1) * BLOCK] - exact
        if fp8:
            by_token = error.norm(dim=-1) / exact.norm(dim=-1)
            limits = [(error.norm() / exact.norm(), FP8_BLOCK), (by_token.max(), FP8_TOKEN)]
        else:
            allowed = 2 * (problem.row(head, row, out.dtype) - exact).abs().max()
            allowed += torch.finfo(out.dtype).eps * exact.abs().max()
            limits = [(error.abs().max(), allowed)]
        for found, allowed in limits:
            if not found <= allowed:
                raise WrongOutput(
                    f"wrong at {list(out.shape)}, head {head}, query block {row}: error "
                    f"{found:.2e}, allowed {allowed:.2e}"
                )
        wrong += error.double().square().sum().item()
        size += exact.double().square().sum().item()
    return (wrong / size) ** 0.5
