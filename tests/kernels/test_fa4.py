"""What is handed to FlashAttention-4, by a stand-in that computes from exactly that."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from kernel_cases import (
    NASTY,
    ON_CUDA,
    Problem,
    all_blocks,
    assert_close,
    check,
    check_order,
    empty_rows,
    large_logits,
    one_hot_rows,
    other_scale,
    problem,
    single_blocks,
    some_full_rows,
    strided,
)
from torch.nn import functional as F

from dfsattn_diffusers.kernels import BlockMap, explain
from dfsattn_diffusers.kernels.backends import load_backend

backend = load_backend("fa4")
# All but those with key lengths.
CHANGES = [
    large_logits, one_hot_rows, single_blocks, all_blocks, some_full_rows, empty_rows, strided,
    other_scale,
]


class Lists(NamedTuple):
    """As `BlockSparseTensorsTorch` of 4.0.0b36."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def stand_in(q, k, v, *, softmax_scale=None, block_sparse_tensors=None, return_lse=False):
    """The checks of 4.0.0b36, and attention that masks the sequence's end where it does.

    Lists are read from their ends, and only the block that is read first loses the keys behind
    the end; elsewhere these would count as zeros.
    """
    lists, (batch, queries, heads, head_dim) = block_sparse_tensors, q.shape
    assert k.shape == v.shape == (batch, k.shape[1], heads, head_dim)
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    query_block, key_block = lists.block_size
    rows, columns = -(-queries // query_block), -(-k.shape[1] // key_block)
    for counts, indices in (lists[:2], lists[2:4]):
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == indices.shape[:3] == (batch, heads, rows)
        assert 1 <= indices.shape[3] <= columns and counts.is_contiguous()
    assert not lists.mask_block_cnt.any()
    pad = (0, 0, 0, 0, 0, columns * key_block - k.shape[1])
    k, v = (F.pad(x, pad).transpose(1, 2).double() for x in (k, v))
    out = torch.zeros(batch, heads, queries, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads, queries), -torch.inf, device=q.device)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        here = slice(row * query_block, (row + 1) * query_block)
        blocks = lists.full_block_idx[b, h, row, : lists.full_block_cnt[b, h, row]].tolist()
        assert all(0 <= block < columns for block in blocks)
        keys = [
            key
            for place, block in enumerate(reversed(blocks))
            for key in range(block * key_block, (block + 1) * key_block)
            if place > 0 or key < k.shape[2] - pad[-1]
        ]
        if keys:
            logits = q[b, here, h].double() @ k[b, h, keys].T * softmax_scale
            out[b, h, here] = logits.softmax(-1) @ v[b, h, keys]
            lse[b, h, here] = logits.logsumexp(-1).float()
    return out.transpose(1, 2).to(q.dtype), lse if return_lse else None


def install(monkeypatch, lists=Lists):
    modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute")}
    modules["flash_attn"].__path__ = modules["flash_attn.cute"].__path__ = []
    for name, member, value in (
        ("interface", "flash_attn_func", stand_in),
        ("block_sparsity", "BlockSparseTensorsTorch", lists),
    ):
        module = modules[f"flash_attn.cute.{name}"] = ModuleType(name)
        setattr(module, member, value)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def target(request, monkeypatch):
    """On a CPU the stand-in, on a GPU the package."""
    backend._package.cache_clear()
    if request.param == "cpu":
        install(monkeypatch)
        monkeypatch.setattr(backend, "capability", lambda device: "9.0")
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of capability 9.0")
    elif isinstance(reason := backend._package(), str):
        pytest.skip(reason)
    yield request.param
    backend._package.cache_clear()


def test_all_that_it_can_do_is_tested():
    lengths = {"segments", "unsure_segments", "only_empty_blocks", "beside_an_empty_block"}
    assert {c.__name__ for c in NASTY} - {c.__name__ for c in CHANGES} == lengths


@pytest.mark.parametrize("change", CHANGES)
def test_nasty(target, change):
    check(change(problem(target, torch.bfloat16, num_queries=300, seed=1)), "fa4")


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_sizes(target, head_dim, tokens):
    check(
        problem(target, torch.float16, num_queries=tokens, head_dim=head_dim, seed=tokens), "fa4"
    )


@pytest.mark.parametrize("query_block, key_block", [(128, 64), (64, 128), (64, 64)])
def test_other_blocks_and_lengths(target, query_block, key_block):
    p = problem(
        target, torch.bfloat16, num_queries=150, num_keys=300, query_block=query_block,
        key_block=key_block, density=0.4, seed=2,
    )
    check(p, "fa4")


def test_narrow_lists(target):
    """Full rows are written out where indices are narrower than that."""
    p = some_full_rows(problem(target, torch.bfloat16, num_queries=600, density=0.3, seed=5))
    p.mask[:, :, :-1, 3:] = False
    block_map = BlockMap.from_mask(p.mask, query_block=128, key_block=128, max_count=3)
    assert block_map.indices.shape[-1] == 3
    module = importlib.import_module("dfsattn_diffusers.kernels")
    out = module.block_sparse_attention(p.q, p.k, p.v, block_map, backend="fa4")
    kept = replace(p, mask=block_map.to_mask())
    assert_close(out, kept.dense(torch.float64)[0], kept.dense(torch.bfloat16)[0])


@pytest.mark.parametrize("per_head", [False, True])
def test_output_order(target, per_head):
    check_order(problem(target, torch.float16, num_queries=200, seed=3), "fa4", per_head)


def reason(p: Problem):
    block_map = BlockMap.from_mask(p.mask, query_block=p.query_block, key_block=p.key_block)
    return explain(p.q, p.k, p.v, block_map, key_lengths=p.key_lengths).rejected["fa4"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dtype=torch.float32), "it needs torch.bfloat16 or torch.float16, got torch.float32"),
        (dict(head_dim=32), "it needs head dim 64 or 128, got 32"),
        (dict(query_block=32), "query and key blocks of 64 or 128, got 32 and 128"),
    ],
)
def test_refuses_what_it_cannot_do(target, changes, message):
    assert message in reason(problem(target, **dict(dtype=torch.bfloat16) | changes))


def test_refuses_key_lengths_and_never_falls_back(target):
    p = problem(target, torch.bfloat16)
    lengths = torch.full((2, 3), 44, dtype=torch.int32, device=target)
    assert "got key_lengths" in reason(replace(p, key_lengths=lengths))
    with pytest.raises(ValueError, match="'fa4' cannot do this call: .* got key_lengths"):
        replace(p, key_lengths=lengths).run("fa4")


def test_is_not_chosen_by_auto(target):
    assert reason(problem(target, torch.bfloat16)) == f"auto does not use it on {target}"


def test_says_what_is_missing(monkeypatch):
    p = problem(dtype=torch.bfloat16)
    assert reason(p) == "it needs a CUDA device of capability 9.0, got cpu"
    monkeypatch.setattr(backend, "capability", lambda device: "9.0")
    backend._package.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash_attn" in reason(p) and reason(p).endswith("pip install 'flash-attn-4>=4.0.0b36'")
    backend._package.cache_clear()
    install(monkeypatch, NamedTuple("Old", [("mask_block_cnt", int)]))
    assert "has no block_size: it is too old; pip install" in reason(p)
    backend._package.cache_clear()
