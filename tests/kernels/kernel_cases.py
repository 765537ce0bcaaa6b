"""Attention problems, easy and nasty, and what float64 and eager code make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dfsattn_diffusers.kernels import BlockMap, block_sparse_attention, list_backends
from dfsattn_diffusers.kernels.backends import load_backend, precisions_of

ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
)
# Devices and dtypes: the interpreter multiplies bf16 matrices wrongly, and cuts bf16 off where a
# GPU rounds it.
RUNS = [("cpu", torch.float32), ("cpu", torch.float16)] + [
    pytest.param("cuda", dtype, marks=ON_CUDA)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]
# Logits that a reference has in memory at a time: about 1 GB of float64 with all made from them.
PART_LOGITS = 2**24


@dataclass
class Problem:
    """Arguments of one call; the mask stands for the block map."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    query_block: int = 128
    key_block: int = 128
    key_lengths: Tensor | None = None
    full_key_blocks: int | None = None
    output_order: Tensor | None = None
    out: Tensor | None = None
    scale: float | None = None

    def run(self, backend: str, **overrides):
        block_map = BlockMap.from_mask(
            self.mask, query_block=self.query_block, key_block=self.key_block
        )
        names = ("key_lengths", "full_key_blocks", "output_order", "out", "scale")
        arguments = {name: getattr(self, name) for name in names} | overrides
        return block_sparse_attention(
            self.q, self.k, self.v, block_map, **arguments, backend=backend
        )

    def real_keys(self) -> Tensor:
        """`[B, Nk]` bool, the keys that exist."""
        batch, num_keys = self.k.shape[0], self.k.shape[2]
        lengths = self.key_lengths
        if lengths is None:
            lengths = torch.full((batch, self.mask.shape[3]), self.key_block, device=self.k.device)
        place = torch.arange(self.key_block, device=self.k.device)
        return (place < lengths[..., None]).flatten(1)[:, :num_keys]

    def by_parts(self, reference: Callable) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a reference that gets some query blocks of one head at a time.

        All logits at once would not leave a GPU to several tests. `reference(part, at)` gets the
        part as a problem and, for what else there is, the slices of batch and heads that it is.
        """
        batch, heads, queries, _ = self.q.shape
        size = self.query_block
        rows = max(1, PART_LOGITS // (size * self.k.shape[2]))
        made = []
        for b, h, start in product(
            range(batch), range(heads), range(0, self.mask.shape[2], rows)
        ):
            at = slice(b, b + 1), slice(h, h + 1)
            part = replace(
                self, q=self.q[at][:, :, start * size : (start + rows) * size],
                k=self.k[at], v=self.v[at], mask=self.mask[at][:, :, start : start + rows],
                key_lengths=None if self.key_lengths is None else self.key_lengths[at[0]],
            )  # fmt: skip
            made.append(reference(part, at))
        return tuple(
            torch.cat(x, 2)[0, 0].unflatten(0, (batch, heads, queries)) for x in zip(*made)
        )

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp by masked dense attention in `dtype`, in q's order."""
        return self.by_parts(lambda part, at: part._dense(dtype))

    def _dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        real = self.real_keys()
        mask = self.mask.repeat_interleave(self.query_block, 2)[:, :, : self.q.shape[2]]
        mask = mask.repeat_interleave(self.key_block, 3)[..., : self.k.shape[2]]
        mask = mask & real[:, None, None]
        k, v = (x.masked_fill(~real[:, None, :, None], 0).to(dtype) for x in (self.k, self.v))
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = (self.q.to(dtype) @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
        return weights @ v, logits.logsumexp(-1)


def assert_close(got: Tensor, exact: Tensor, eager: Tensor, largest: float | None = None) -> None:
    """`got` may err twice as much as eager code of its precision, and by one rounding.

    That rounding is of the largest value of `exact`, or of `largest` where sums pass through it.
    """
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got[~finite].double(), exact[~finite])
    if not finite.any():
        return
    exact, eager, error = exact[finite], eager[finite].double(), got[finite].double()
    rounding = torch.finfo(got.dtype).eps * (exact.abs().max() if largest is None else largest)
    allowed = 2 * (eager - exact).abs().max() + rounding
    assert (error - exact).abs().max() <= allowed


def check(problem: Problem, backend: str) -> None:
    """Output and log-sum-exp of a problem without an output order."""
    out, lse = problem.run(backend, return_lse=True)
    exact, eager = problem.dense(torch.float64), problem.dense(problem.q.dtype)
    assert_close(out, exact[0], eager[0])
    assert_close(lse, exact[1], eager[1])


def check_order(problem: Problem, backend: str, per_head: bool, **how) -> None:
    """Rows go where they are told, into a transposed tensor; nothing else is touched."""
    batch, heads, queries, head_dim = problem.q.shape
    rows, make = queries + 30, torch.Generator().manual_seed(3)
    # Other rows and other dropped queries for every head, and not contiguous.
    places = torch.rand(heads, batch, rows, generator=make).argsort(-1)[..., :queries]
    places[torch.rand(places.shape, generator=make) < 0.15] = -1
    places = places.transpose(0, 1).int().to(problem.q.device)
    order = places if per_head else places[0, 0]
    memory = problem.q.new_full((batch, rows, heads, head_dim), 7.0)
    straight, lse = problem.run(backend, return_lse=True, **how)
    out, again = problem.run(
        backend, output_order=order, out=memory.transpose(1, 2), return_lse=True, **how
    )
    assert out.data_ptr() == memory.data_ptr()
    wanted = torch.full_like(out, 7.0)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        row = order[b, h] if per_head else order
        stored = row >= 0
        wanted[b, h, row[stored].long()] = straight[b, h, stored]
    assert torch.equal(out, wanted)
    assert torch.equal(again, lse)


def check_large_offsets(device: str, backend: str, heads: int = 520, **how) -> None:
    """The last of many heads, beyond element 2 ** 31 each, give what they give alone."""
    # All shares one tensor of 4.4 GB, 8.4 MB a head: q, k and v are each a head further on in it,
    # and the output lies between their tokens.
    memory = torch.zeros(1, heads + 2, 2**14, 2, 128, dtype=torch.bfloat16, device=device)
    inputs, out = memory.unbind(3)
    out = out[:, :heads].fill_(torch.nan)
    small = problem(device, torch.bfloat16, num_queries=2**14, heads=3, batch=1, head_dim=128)
    inputs[:, -3:] = small.q
    rows = small.mask.shape[2]
    mask = torch.eye(rows, dtype=torch.bool, device=device).expand(1, heads, rows, rows)
    whole = [inputs[:, i : i + heads] for i in range(3)]
    q, k, v = (x[:, -3:].contiguous() for x in whole)
    last = replace(small, q=q, k=k, v=v, mask=mask[:, -3:]).run(backend, **how)
    q, k, v = whole
    replace(small, q=q, k=k, v=v, mask=mask, out=out).run(backend, **how)
    assert torch.equal(out[:, -3:], last)
    # Before the last three heads, queries, keys and values are all 0.
    assert not out[:, :-3].any()


def problem(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    num_queries: int = 300,
    num_keys: int | None = None,
    head_dim: int = 64,
    batch: int = 2,
    heads: int = 2,
    query_block: int = 128,
    key_block: int = 128,
    density: float = 0.5,
    seed: int = 0,
) -> Problem:
    """Random values and a random map of its own for every batch row and head."""
    make = torch.Generator().manual_seed(seed)
    num_keys = num_queries if num_keys is None else num_keys
    rows, columns = -(-num_queries // query_block), -(-num_keys // key_block)
    q = torch.randn(batch, heads, num_queries, head_dim, generator=make)
    k, v = torch.randn(2, batch, heads, num_keys, head_dim, generator=make)
    mask = torch.rand(batch, heads, rows, columns, generator=make) < density
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    return Problem(q, k, v, mask.to(device), query_block, key_block)


def several_rows(device: str, sizes: tuple[int, int], **more) -> Problem:
    """In bfloat16, for kernels whose programs take several rows; head dim and key block."""
    head_dim, key_block = sizes
    return problem(
        device, torch.bfloat16, head_dim=head_dim, key_block=key_block, heads=5, density=0.2, **more
    )


def large_logits(p: Problem) -> Problem:
    """Far beyond where exp overflows."""
    return replace(p, q=p.q * 40)


def one_hot_rows(p: Problem) -> Problem:
    """Every query meets one key that outweighs all others."""
    k = p.k.clone()
    k[:, :, 5] = p.q[:, :, -1] * 8
    return replace(p, k=k, mask=torch.ones_like(p.mask))


def single_blocks(p: Problem) -> Problem:
    mask = torch.zeros_like(p.mask)
    mask[..., 1] = True
    return replace(p, mask=mask)


def all_blocks(p: Problem) -> Problem:
    return replace(p, mask=torch.ones_like(p.mask))


def some_full_rows(p: Problem) -> Problem:
    """Full rows are implied, not listed: the last row, as text has it, and one more."""
    mask = p.mask.clone()
    mask[:, :, -1] = True
    mask[0, -1, 0] = True
    return replace(p, mask=mask)


def empty_rows(p: Problem) -> Problem:
    mask = p.mask.clone()
    mask[0, 0], mask[1, :, 0] = False, False
    return replace(p, mask=mask)


def segments(p: Problem) -> Problem:
    """Short blocks in the middle, an empty one, other lengths per batch row, NaN in padding."""
    lengths = torch.full((p.k.shape[0], p.mask.shape[3]), p.key_block, dtype=torch.int32)
    lengths[:, 1] = 37
    lengths[0, -1], lengths[1, -1] = 0, 5
    p = replace(p, key_lengths=lengths.to(p.k.device), full_key_blocks=1)
    hidden = ~p.real_keys()[:, None, :, None]
    k, v = p.k.masked_fill(hidden, torch.nan), p.v.masked_fill(hidden, torch.inf)
    return replace(p, k=k, v=v)


def unsure_segments(p: Problem) -> Problem:
    """The same without being told which blocks are full."""
    return replace(segments(p), full_key_blocks=None)


def only_empty_blocks(p: Problem) -> Problem:
    """Rows that keep nothing but an empty block."""
    p = segments(p)
    p.mask[..., :-1] = False
    p.mask[..., -1] = True
    return p


def beside_an_empty_block(p: Problem) -> Problem:
    """Logits far below 0, and a block whose keys, of which there are none, would have 0."""
    q, k = p.q + 3, p.k + 3
    k[:, :, : p.key_block] -= 6
    p = segments(replace(p, q=q, k=k))
    p.mask[..., 1:-1] = False
    p.mask[..., [0, -1]] = True
    return p


def strided(p: Problem) -> Problem:
    """`[B, N, H, D]` in memory, as models have it; k and v are parts of one tensor."""
    q = p.q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = torch.stack([p.k, p.v], 3).transpose(1, 2).contiguous().transpose(1, 2).unbind(3)
    return replace(p, q=q, k=k, v=v)


def other_scale(p: Problem) -> Problem:
    return replace(p, scale=0.3)


NASTY = [
    large_logits, one_hot_rows, single_blocks, all_blocks, some_full_rows, empty_rows, segments,
    unsure_segments, only_empty_blocks, beside_an_empty_block, strided, other_scale,
]


# Of the inputs' precision, with all that the contract has; the others have tests of their own.
BACKENDS = [
    name
    for name in list_backends()
    if "full" in precisions_of(load_backend(name)) and name != "fa4"
]


def _computes(backend: str, dtype: torch.dtype) -> bool:
    try:
        problem(dtype=dtype, num_queries=1).run(backend)
    except ValueError:
        return False
    return True


def _targets():
    """Every backend on a CPU in every precision that it has there, and on a GPU in both halves."""
    half = (torch.bfloat16, torch.float16)
    for backend in BACKENDS:
        for dtype in (*half, torch.float32):
            name = f"{backend}-{dtype}".replace("torch.", "")
            if _computes(backend, dtype):
                yield pytest.param(backend, "cpu", dtype, id=f"{name}-cpu")
            if dtype in half:
                yield pytest.param(backend, "cuda", dtype, marks=ON_CUDA, id=f"{name}-cuda")


TARGETS = list(_targets())
