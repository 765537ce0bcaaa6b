"""The tail: pooling, and the pass that adds the pools, against float64 and in every backend."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    NASTY,
    ON_CUDA,
    assert_close,
    check_order,
    problem,
    segments,
    some_full_rows,
)

from dfsattn_diffusers.kernels import BlockMap, Tail, pool_moments, pool_tail
from dfsattn_diffusers.kernels import tail as tail_module

tail_kernels = pytest.importorskip("dfsattn_diffusers.kernels.tail_kernels")

# Torch and, through the interpreter or on a GPU, Triton.
WAYS = ["torch", "triton"]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    kernels = tail_kernels if request.param == "triton" else None
    monkeypatch.setattr(tail_module, "fast", lambda name, x: kernels)
    return request.param


def dtype_of(device, way):
    return torch.bfloat16 if device == "cuda" else torch.float16


def pool_lengths(p, pool):
    """`[B, P]` real keys of each pool of a problem whose keys are padded to whole blocks."""
    real = torch.nn.functional.pad(p.real_keys(), (0, -p.k.shape[2] % p.key_block))
    return real.unflatten(1, (-1, pool)).sum(2, dtype=torch.int32)


def tail_of(p, pool, moment):
    padded = (torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % p.key_block)) for x in (p.k, p.v))
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    energy = (p.q.float().nan_to_num(0) * scale).square().mean(2) if moment else None
    return pool_tail(*padded, pool=pool, lengths=pool_lengths(p, pool), energy=energy)


def exact(p, tail, dtype):
    """Output and log-sum-exp by one softmax over kept keys and the pools of all others."""
    return p.by_parts(lambda part, at: exact_part(part, part_of(tail, at), dtype))


def part_of(tail, at):
    return Tail(tail.keys[at], tail.values[at], tail.bias[at])


def exact_part(p, tail, dtype):
    real = p.real_keys()
    keys, values, means, sums = (x.to(dtype) for x in (p.k, p.v, tail.keys, tail.values))
    keys, values = (x.masked_fill(~real[:, None, :, None], 0) for x in (keys, values))
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    rows = p.mask.repeat_interleave(p.query_block, 2)[:, :, : p.q.shape[2]]
    kept = rows.repeat_interleave(p.key_block, 3)[..., : p.k.shape[2]] & real[:, None, None]
    dropped = ~rows.repeat_interleave(means.shape[2] // p.mask.shape[3], 3)
    q = p.q.to(dtype)
    logits = (q @ keys.transpose(2, 3) * scale).masked_fill(~kept, -torch.inf)
    pools = q @ means.transpose(2, 3) * scale + tail.bias.to(dtype)[:, :, None]
    both = torch.cat([logits, pools.masked_fill(~dropped, -torch.inf)], -1)
    weights = both.softmax(-1).nan_to_num(0)
    return weights @ torch.cat([values, sums], 2), both.logsumexp(-1)


def check(p, pool, moment, backend="reference"):
    tail = tail_of(p, pool, moment)
    out, lse = p.run(backend, tail=tail, return_lse=True)
    wanted, eager = exact(p, tail, torch.float64), exact(p, tail, p.q.dtype)
    assert_close(out, wanted[0], eager[0])
    assert_close(lse, wanted[1], eager[1])
    assert torch.equal(p.run(backend, tail=tail), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize(
    "pool, key_block, head_dim", [(16, 128, 64), (32, 64, 128), (64, 64, 64), (128, 128, 64)]
)
def test_pools_and_blocks(device, way, pool, key_block, head_dim, moment):
    p = problem(
        device,
        dtype_of(device, way),
        num_queries=520,
        num_keys=700,
        key_block=key_block,
        head_dim=head_dim,
        density=0.3,
    )
    check(p, pool, moment)


@pytest.mark.parametrize("pool", [4, 32, 64])
def test_key_blocks_of_no_power_of_two_are_left_to_torch(pool, monkeypatch):
    monkeypatch.setattr(tail_module, "fast", lambda name, x: tail_kernels)
    sizes = dict(num_queries=200, num_keys=500, query_block=64, key_block=192)
    check(problem(dtype=torch.float16, density=0.3, **sizes), pool, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", NASTY, ids=lambda change: change.__name__)
def test_nasty_problems(device, way, change):
    check(change(problem(device, dtype_of(device, way), num_queries=400)), 32, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("query_block", [64, 128])
@pytest.mark.parametrize("per_head", [False, True])
def test_output_order(device, way, query_block, per_head):
    p = problem(device, dtype_of(device, way), num_queries=300, query_block=query_block)
    check_order(p, "reference", per_head, tail=tail_of(p, 16, False))


@pytest.mark.parametrize("device", DEVICES)
def test_keeping_everything_leaves_the_bits(device, way):
    p = some_full_rows(problem(device, dtype_of(device, way)))
    everything = replace(p, mask=torch.ones_like(p.mask))
    tail = tail_of(p, 32, True)
    assert torch.equal(everything.run("reference", tail=tail), everything.run("reference"))
    # Text queries keep everything while others do not.
    rows = slice((p.mask.shape[2] - 1) * p.query_block, None)
    with_tail, without = p.run("reference", tail=tail), p.run("reference")
    assert torch.equal(with_tail[:, :, rows], without[:, :, rows])
    assert not torch.equal(with_tail, without)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moment", [False, True])
def test_pools_of_equal_keys_are_exact(device, way, moment):
    p = problem(device, dtype_of(device, way), num_queries=256)
    k, v = (x[:, :, ::32].repeat_interleave(32, 2) for x in (p.k, p.v))
    p = replace(p, k=k, v=v)
    dense = replace(p, mask=torch.ones_like(p.mask))
    out = p.run("reference", tail=tail_of(p, 32, moment))
    assert_close(out, dense.dense(torch.float64)[0], dense.dense(p.q.dtype)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool, head_dim", [(16, 64), (64, 128), (128, 64)])
def test_pooling(device, way, dtype, pool, head_dim):
    make = torch.Generator().manual_seed(pool)
    lengths = torch.randint(0, pool + 1, (2, 9), generator=make).int()
    lengths[:, 0], lengths[:, -1] = pool, 0
    k, v = torch.randn(2, 2, 9 * pool, 3, head_dim, generator=make) * 3 + 1
    real = (torch.arange(pool) < lengths[..., None]).flatten(1)[..., None, None]
    k, v = (x.masked_fill(~real, torch.nan).to(device, dtype).transpose(1, 2) for x in (k, v))
    energy = torch.rand(2, 3, head_dim, generator=make) * 0.2
    arguments = dict(pool=pool, lengths=lengths.to(device))
    tail = pool_tail(k, v, **arguments, energy=energy.to(device))
    means, variances = pool_moments(k, **arguments)
    assert isinstance(tail, Tail) and tail.keys.dtype == dtype
    assert means.dtype == variances.dtype == tail.bias.dtype == torch.float32
    # Sums are float32, of numbers up to about 16.
    rounding = 128 * torch.finfo(torch.float32).eps
    for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(9)).tolist():
        n = lengths[b, i]
        got = tail.keys, tail.values, means, variances
        got = [x[b, :, i].double().cpu() for x in got]
        bias = tail.bias[b, :, i].double().cpu()
        if n == 0:
            assert not torch.stack(got).any() and (bias == -torch.inf).all()
            continue
        keys, values = (x[b, :, i * pool : i * pool + n].double().cpu() for x in (k, v))
        variance = (keys - keys.mean(1, True)).square().mean(1)
        wanted = [keys.mean(1), values.mean(1), keys.mean(1), variance]
        for x, exact, eps in zip(got, wanted, [torch.finfo(dtype).eps] * 2 + [1e-6] * 2):
            torch.testing.assert_close(x, exact, rtol=eps, atol=rounding)
        spread = (energy[b].double() * variance).sum(-1).sqrt()
        torch.testing.assert_close(bias, n.log() + spread.cosh().log(), rtol=1e-5, atol=1e-5)
    none = pool_tail(k, v, **arguments)
    torch.testing.assert_close(none.bias, lengths.to(device).log()[:, None].expand(2, 3, 9))
    assert torch.equal(none.keys, tail.keys)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [0.0, 1e6])
def test_variance_of_pools_far_from_zero(device, way, first):
    """Nor does a first token far from the others spoil it."""
    make = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, 4 * 64, 64, generator=make) + 1000
    x[:, :, ::64] += first
    lengths = torch.tensor([[64, 17, 1, 2]], dtype=torch.int32)
    means, variances = pool_moments(x.to(device), pool=64, lengths=lengths.to(device))
    for i, n in enumerate(lengths[0].tolist()):
        tokens = x[:, :, 64 * i : 64 * i + n].double()
        exact = (tokens - tokens.mean(2, True)).square().mean(2)
        variance, mean = (x[:, :, i].double().cpu() for x in (variances, means))
        # A rounding of the largest token, and its square.
        rounding = tokens.abs().max().item() * 2**-23
        torch.testing.assert_close(variance, exact, rtol=1e-5, atol=rounding**2)
        torch.testing.assert_close(mean, tokens.mean(2), rtol=1e-7, atol=rounding)


@pytest.mark.parametrize("device", DEVICES)
def test_the_moment_knows_two_clusters_exactly(device, way):
    """Where half the variance, a normal distribution's correction, would run away.

    And where all queries have one energy: the correction is one number for all of them.
    """
    p = problem(device, dtype_of(device, way), num_queries=256)
    k, v = (x[:, :, ::32].repeat_interleave(32, 2) for x in (p.k, p.v))
    k[..., 3] += 6 * (torch.arange(256, device=device) % 2 * 2 - 1)
    q = p.q.clone()
    q[..., 3] = q[..., 3].sign()
    p = replace(p, q=q, k=k.round(), v=v)
    dense = replace(p, mask=torch.ones_like(p.mask))
    wanted, eager = dense.dense(torch.float64), dense.dense(p.q.dtype)
    out, lse = p.run("reference", tail=tail_of(p, 32, True), return_lse=True)
    assert_close(out, wanted[0], eager[0])
    assert_close(lse, wanted[1], eager[1])
    out, _ = p.run("reference", tail=tail_of(p, 32, False), return_lse=True)
    with pytest.raises(AssertionError):
        assert_close(out, wanted[0], eager[0])


def test_a_map_keeps_the_bits_it_was_unpacked_from():
    p = segments(problem())
    packed = BlockMap.from_mask(p.mask, query_block=128, key_block=128).pack()
    assert packed.unpack().bits is packed.bits


def test_variance_beyond_the_range_of_float16(way):
    k = torch.tensor([-900.0, 900.0], dtype=torch.float16).repeat(8)[None, None, :, None]
    k = k.expand(1, 1, 16, 64).contiguous()
    lengths = torch.full((1, 1), 16, dtype=torch.int32)
    _, variance = pool_moments(k, pool=16, lengths=lengths)
    assert (variance == 810_000).all()
    # Spread 900: its hyperbolic cosine is beyond float32.
    tail = pool_tail(k, k, pool=16, lengths=lengths, energy=torch.full((1, 1, 64), 1 / 64))
    assert tail.bias.item() == pytest.approx(900 + math.log(16) - math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(v=torch.zeros(1, 2, 64, 32)), r"k and v must be .* one shape, got .* \[1, 2, 64, 32"),
        (dict(v=torch.zeros(1, 2, 64, 64).half()), r"v must have k's dtype .* call v.to\(k\)"),
        (dict(pool=24), "pool must be a positive int that divides the 64 slots of k, got 24"),
        (dict(pool=0), "pool must be a positive int"),
        (dict(lengths=torch.zeros(1, 3).int()), r"lengths must be int32 \[1 or 1, 2\] on cpu, got"),
        (dict(lengths=torch.zeros(1, 2)), r"lengths must be int32 .* got torch.float32 \[1, 2\]"),
        (dict(energy=torch.zeros(1, 64)), r"energy must be torch.float32 \[1, 2, 64\] on cpu, got"),
    ],
)
def test_bad_input_of_pooling(changes, message):
    x = torch.zeros(1, 2, 64, 64)
    arguments = dict(k=x, v=x, pool=32, lengths=torch.zeros(1, 2).int()) | changes
    with pytest.raises(ValueError, match=message):
        pool_tail(arguments.pop("k"), arguments.pop("v"), **arguments)
