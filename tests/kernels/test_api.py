import dataclasses

import pytest
import torch
from kernel_cases import ON_CUDA

from dfsattn_diffusers.kernels import (
    BlockMap,
    Tail,
    block_sparse_attention,
    explain,
    list_backends,
)

Q = torch.randn(1, 2, 200, 64)
MAP = BlockMap.full(1, 2, 2, 2, query_block=128, key_block=128)
LENGTHS = torch.full((1, 2), 72, dtype=torch.int32)
ORDER = torch.arange(200, dtype=torch.int32)


def tail(pools, dtype=torch.float32):
    x = torch.zeros(1, 2, pools, 64, dtype=dtype)
    return Tail(x, x, torch.zeros(1, x.shape[1], pools))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=Q[0]), r"q must be a floating \[B, H, N, D\] tensor .* got torch.float32 \[2, 200"),
        (dict(k=Q.int()), "k must be a floating .* got torch.int32"),
        (dict(v=Q.transpose(2, 3)), r"v's last dimension must be contiguous, .* v.contiguous\(\)"),
        (dict(k=Q.half()), "k must have q's dtype and device, .*float32 on cpu, got .*float16"),
        (dict(v=Q.to("meta")), "v must have q's dtype and device, .* on cpu, got .* on meta"),
        (dict(v=Q[:, :, :100]), r"k and v must share their shape, .* v \[1, 2, 100, 64\]"),
        (dict(k=Q[:, :1], v=Q[:, :1]), r"and B, H, D with q, got q \[1, 2, .*k \[1, 1"),
        (dict(block_map=MAP.to_mask()), "block_map must be a BlockMap, got Tensor; .*from_mask"),
        (dict(q=Q[:, :, :128]), r"block_map must have rows .* = \[1, 2, 1\] for 128 queries"),
        (
            dict(k=Q[:, :, :128], v=Q[:, :, :128]),
            "block_map must have 1 key blocks for 128 keys in blocks of 128, got 2",
        ),
        (
            dict(block_map=dataclasses.replace(MAP, query_block=64)),
            r"must have rows .* = \[1, 2, 4\] for 200 queries in blocks of 64, got \[1, 2, 2\]",
        ),
        (dict(scale=0), "scale must be positive and finite, got 0"),
        (dict(scale=float("nan")), "scale must be positive and finite, got nan"),
        (dict(key_lengths=LENGTHS.long()), r"key_lengths must be int32 \[1, 2\] on cpu, .*int64"),
        (dict(key_lengths=LENGTHS[0]), r"key_lengths must be int32 \[1, 2\] on cpu, got .* \[2\]"),
        (dict(full_key_blocks=2), "full_key_blocks must be an int from 0 to 1, .* 200 keys, got 2"),
        (dict(full_key_blocks=-1), "full_key_blocks must be an int from 0 to 1, .* got -1"),
        (dict(tail=Q), "tail must be a Tail, got Tensor; make one by pool_tail"),
        (dict(tail=tail(3)), "as many pools for each of the 2 key blocks, .* 128, got 3 in all"),
        (dict(tail=tail(6)), "as many pools for each of the 2 key blocks, .* 128, got 6 in all"),
        (dict(tail=tail(4, torch.half)), r"tail.keys must be torch.float32 \[1, 2, 4, 64\] on cpu"),
        (dict(output_order=ORDER), "output_order needs out, .* got None"),
        (
            dict(output_order=ORDER[:100], out=Q.clone()),
            r"output_order must be int32 \[200\] or \[1, 2, 200\] on cpu, got torch.int32 \[100\]",
        ),
        (
            dict(output_order=ORDER.expand(1, 1, 200), out=Q.clone()),
            r"int32 \[200\] or \[1, 2, 200\] on cpu, got torch.int32 \[1, 1, 200\]",
        ),
        (
            dict(output_order=ORDER.expand(1, 2, 200).long(), out=Q.clone()),
            r"int32 \[200\] or \[1, 2, 200\] on cpu, got torch.int64 \[1, 2, 200\]",
        ),
        (dict(out=Q[:, :, :100]), r"out must be \[1, 2, 200, 64\], got \[1, 2, 100, 64\]"),
        (
            dict(out=Q[:, :1], output_order=ORDER),
            r"out must be \[1, 2, M, 64\], got \[1, 1, 200, 64\]",
        ),
        (dict(out=Q.half()), "out must be torch.float32 on cpu .* got torch.float16"),
        (dict(backend="cuda"), "backend must be one of auto, .*reference.*, got 'cuda'"),
    ],
)
def test_bad_input(changes, message):
    arguments = dict(q=Q, k=Q, v=Q, block_map=MAP) | changes
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


def test_map_on_another_device():
    block_map = BlockMap.full(1, 2, 2, 2, query_block=128, key_block=128, device="meta")
    with pytest.raises(ValueError, match="block_map must be on q's device, cpu, got meta"):
        block_sparse_attention(Q, Q, Q, block_map)


def test_gradients_are_refused():
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass; .* torch.no_grad"):
        block_sparse_attention(q, Q, Q, MAP)
    with torch.no_grad():
        assert block_sparse_attention(q, Q, Q, MAP).shape == Q.shape


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dtype=torch.float64), "backend 'triton' cannot do this call: .* got torch.float64"),
        (dict(head_dim=80), "backend 'triton' cannot do this call: .* 64 or 128, got 80"),
        (dict(block=32), "backend 'triton' cannot do this call: .* got 32 and 32"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_named_backend_never_falls_back(device, changes, message):
    size = dict(dtype=torch.float16, head_dim=64, block=64) | changes
    q = torch.ones(1, 1, 64, size["head_dim"], dtype=size["dtype"], device=device)
    rows, block = 64 // size["block"], size["block"]
    block_map = BlockMap.full(
        1, 1, rows, rows, query_block=block, key_block=block, device=device
    )
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, q, q, block_map, backend="triton")
    choice = explain(q, q, q, block_map)
    assert choice.backend == "reference"
    assert "triton" in choice.rejected
    assert torch.equal(block_sparse_attention(q, q, q, block_map), q)


def test_explain_on_cpu():
    choice = explain(Q, Q, Q, MAP)
    assert choice.backend == "reference"
    assert set(choice.rejected) == set(list_backends()) - {"reference"}
    assert "auto does not use it on cpu" in choice.rejected["triton"]
    assert str(choice).startswith("reference (not ") and "; not triton: " in str(choice)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_explain_on_cuda(device):
    q = Q.to(device, torch.bfloat16)
    block_map = BlockMap.full(1, 2, 2, 2, query_block=128, key_block=128, device=device)
    choice = explain(q, q, q, block_map)
    assert choice.backend != "reference"
    assert choice.rejected["reference"] == f"slower than {choice.backend}"
