"""What the reference promises beside being right: speed on a CPU, no waiting on a GPU."""

import time

import pytest
import torch
from kernel_cases import problem, segments
from torch.nn import functional as F

from dfsattn_diffusers.kernels import BlockMap, block_sparse_attention


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best_cpu_seconds(function, repeats):
    """CPU seconds of one thread: what other processes do at the same time hardly counts."""

    def seconds():
        start = time.process_time()
        function()
        return time.process_time() - start

    return min(seconds() for _ in range(repeats))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_faster_than_dense_on_cpu(head_dim):
    tokens, num_blocks = 16_384, 128
    make = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, tokens, head_dim, generator=make)
    rank = torch.rand(1, 1, num_blocks, num_blocks, generator=make).argsort(-1)
    block_map = BlockMap.from_mask(rank < num_blocks // 5, query_block=128, key_block=128)

    def speed_up():
        dense = best_cpu_seconds(lambda: F.scaled_dot_product_attention(q, k, v), 3)
        sparse = best_cpu_seconds(
            lambda: block_sparse_attention(q, k, v, block_map, backend="reference"), 5
        )
        return dense / sparse

    # A neighbour that takes the shared cache slows the sparse one more, for a while.
    assert any(speed_up() >= 2.5 for _ in range(5))


def test_result_does_not_depend_on_other_rows():
    """Rows are padded to the longest of their chunk; that must not show."""
    p = segments(problem(num_queries=700, seed=8))
    p.mask[:, :, 2:] = False
    p.mask[:, :, :, 0] = True
    short = p.run("reference")[:, :, :256].clone()
    p.mask[:, :, 2:] = True
    torch.testing.assert_close(p.run("reference")[:, :, :256], short)


def test_nothing_depends_on_values_off_the_cpu():
    """The meta device has no values to wait for, and goes the way of a GPU."""
    p = segments(problem(num_queries=300))
    block_map = BlockMap.from_mask(p.mask, query_block=128, key_block=128)
    q, k, v, lengths = (x.to("meta") for x in (p.q, p.k, p.v, p.key_lengths))
    order = torch.arange(300, dtype=torch.int32, device="meta")
    block_map = BlockMap(
        block_map.counts.to("meta"), block_map.indices.to("meta"), 3, query_block=128, key_block=128
    )
    out, lse = block_sparse_attention(
        q, k, v, block_map, key_lengths=lengths, output_order=order, out=torch.empty_like(q),
        return_lse=True, backend="reference",
    )
    assert out.shape == q.shape and lse.shape == q.shape[:3]


@pytest.mark.usefixtures("one_thread")
def test_memory_is_bounded_by_chunks(monkeypatch):
    """No temporary comes near one head's matrix of logits."""
    tokens, largest = 8_192, 0
    p = problem(num_queries=tokens, batch=1, heads=1, density=0.2)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    block_map = BlockMap.from_mask(p.mask, query_block=128, key_block=128)
    with Watch():
        block_sparse_attention(p.q, p.k, p.v, block_map, backend="reference")
    assert largest <= tokens**2 / 16
