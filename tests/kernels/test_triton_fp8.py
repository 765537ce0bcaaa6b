"""fp8: the rounding against its specification, attention against eager code that rounds alike."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    NASTY,
    ON_CUDA,
    assert_close,
    check_large_offsets,
    check_order,
    problem,
    segments,
    strided,
)
from test_tail import exact as exact_with_tail
from test_tail import part_of, tail_of

from dfsattn_diffusers.kernels import BlockMap, Tail, explain, quantize
from dfsattn_diffusers.kernels.backends import load_backend
from dfsattn_diffusers.kernels.quantize import ROUNDING, quantize_pools

triton = pytest.importorskip("triton")
tl = triton.language

from dfsattn_diffusers.kernels import quantize_kernels  # noqa: E402

backend = load_backend("triton_fp8")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


def half(device):
    return torch.float16 if device == "cpu" else torch.bfloat16


def quantized(p, **changes):
    changes = dict(query_block=p.query_block) | changes
    return quantize(p.q, p.k, p.v, key_block=p.key_block, key_lengths=p.key_lengths, **changes)


def round_by(monkeypatch, kernels):
    """Let `quantize` call these kernels, or with None its torch code."""
    monkeypatch.setattr(sys.modules[quantize.__module__], "fast", lambda name, x: kernels)


def dequantized(p, x):
    """The problem that the kernel is given, in float64."""
    rows = x.q.shape[2] // x.q_scales.shape[2]
    q = x.q.double() * x.q_scales.double().repeat_interleave(rows, -1)[..., None]
    k = x.k.double() * x.k_scales.double().repeat_interleave(p.key_block, -1)[..., None]
    v = x.v.double() * x.v_scales.double().repeat_interleave(p.key_block, -1)[..., None, :]
    v = v.transpose(2, 3)
    tokens, keys = p.q.shape[2], p.k.shape[2]
    return replace(p, q=q[:, :, :tokens], k=k[:, :, :keys], v=v[:, :, :keys])


def mean_logits(p, x):
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    return x.mean_logits[..., : p.q.shape[2]].double() * scale


def dequantized_tail(p, x, tail):
    """The pools that the kernel is given, in float64."""
    keys, values, *scales = quantize_pools(tail, x, key_block=p.key_block)
    key_scales, value_scales = (s.double().repeat_interleave(p.key_block, -1) for s in scales)
    keys = (keys.double() * key_scales[..., None])[:, :, : tail.keys.shape[2]]
    values = (values.double() * value_scales[..., None, :])[..., : tail.keys.shape[2]]
    return Tail(keys, values.transpose(2, 3), tail.bias)


def eager_fp8(p, x, rounded, tail=None):
    """Dense attention in float32 with weights in e4m3, from 256 down.

    `rounded`: what of the logarithms to base 2 of weights makes them, and what is added up.
    """
    pools = tail and dequantized_tail(p, x, tail)
    # On Hopper, what 8-bit floats give is float16, as is what becomes of it.
    halves = rounded is nearest_logarithm and x.q.is_floating_point()
    out, lse = dequantized(p, x).by_parts(
        lambda part, at: eager_part(part, rounded, halves, pools and part_of(pools, at))
    )
    return out, lse + mean_logits(p, x).float()


def nearest(x):
    """Rounded weights, the sums of exact ones."""
    weights = x.exp2()
    return (weights * 256).to(torch.float8_e4m3fn).float() / 256, weights


def nearest_logarithm(x):
    """Eight codes of e4m3 for each power of two, 120 for 256; the sums of rounded weights."""
    codes = ((x + 15) * 8 - 0.46).round().clamp(min=0)
    weights = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() / 256
    return weights, weights


def eager_part(p, rounded, halves, tail):
    real = p.real_keys()
    rows = p.mask.repeat_interleave(p.query_block, 2)[:, :, : p.q.shape[2]]
    mask = rows.repeat_interleave(p.key_block, 3)[..., : p.k.shape[2]] & real[:, None, None]
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    if halves:
        scale *= 1 - 2.0**-12
    logits = p.q.float() @ p.k.float().transpose(-1, -2) * scale
    if halves:
        logits = logits.half().float()
    logits, values = logits.masked_fill(~mask, -torch.inf), p.v
    if tail is not None:
        pools = p.q.float() @ tail.keys.float().transpose(-1, -2) * scale + tail.bias[:, :, None]
        kept = rows.repeat_interleave(tail.keys.shape[2] // p.mask.shape[3], 3)
        logits = torch.cat([logits, pools.masked_fill(kept, -torch.inf)], -1)
        values = torch.cat([values, tail.values], 2)
    peak = logits.amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0)
    if halves:
        # A whole number of codes, for which a half of one is taken off.
        peak = ((peak / math.log(2) * 8 + 0.46).round() - 0.46) / 8 * math.log(2)
    weights, added = rounded((logits - peak) / math.log(2))
    total = added.sum(-1, keepdim=True)
    out = (weights @ values.float()) / total.masked_fill(total == 0, 1)
    return out, (peak + total.log()).squeeze(-1)


def check_fp8(p, backend="triton_fp8", rounded=nearest, tail=None, precision="fp8"):
    """Beside what it was given, the kernel errs as eager code; and so it does beside the truth."""
    out, lse = p.run(backend, tail=tail, return_lse=True, precision=precision)
    # The Gluon kernel rounds queries itself, each warpgroup its own.
    rows = dict(query_block=64) if backend == "gluon_fp8" else {}
    x = quantized(p, **rows, **ROUNDING[precision])
    eager = eager_fp8(p, x, rounded, tail)
    given, pools = dequantized(p, x), tail and dequantized_tail(p, x, tail)
    exact_out, exact_lse = truth(given, pools)
    assert_close(out, exact_out, eager[0])
    half_lse = given.dense(half(p.q.device.type))[1] + mean_logits(p, x)
    assert_close(lse, exact_lse + mean_logits(p, x), half_lse if rounded is nearest else eager[1])
    exact = truth(p, tail)
    assert_close(out, exact[0], eager[0])
    assert_close(lse, exact[1], eager[1])


def truth(p, tail):
    return p.dense(torch.float64) if tail is None else exact_with_tail(p, tail, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_casts(device):
    """All of e4m3, all ties between its numbers, and what lies beside the ties."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [ties.nextafter(ties + sign) for sign in (1, -1)]
    x = torch.cat([numbers, ties, *beside, torch.randn(2048) * 9, torch.randn(2048) * 0.01])
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024)).to(device)
    out = torch.zeros(len(x), dtype=torch.float8_e4m3fn, device=device)
    cast_kernel[len(x) // 1024,](x, out)
    assert torch.equal(out.float(), x.to(torch.float8_e4m3fn).float())


@triton.jit
def cast_kernel(x, out):
    o_x = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + o_x, quantize_kernels.to_e4m3(tl.load(x + o_x)))


@pytest.mark.parametrize("change", [segments, strided])
@pytest.mark.parametrize("head_dim, key_block", [(64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_round_as_specified(
    monkeypatch, device, precision, dtype, head_dim, key_block, change
):
    rounding = ROUNDING[precision]
    p = problem(device, dtype, num_queries=300, head_dim=head_dim, key_block=key_block)
    p = change(replace(p, k=p.k + 5, v=p.v * 30))
    p.v[0, 0, :key_block] = 0
    round_by(monkeypatch, None)
    wanted = quantized(p, **rounding)
    round_by(monkeypatch, quantize_kernels)
    got = quantized(p)
    torch.testing.assert_close(got.key_mean, wanted.key_mean, rtol=1e-5, atol=1e-6)
    got = quantized(p, key_mean=wanted.key_mean, **rounding)
    for name in ("q", "k", "v"):
        kind = torch.float8_e4m3fn if name == "v" else rounding["dtype"]
        assert getattr(got, name).dtype == kind
        scales, specified = (getattr(x, f"{name}_scales") for x in (got, wanted))
        torch.testing.assert_close(scales, specified, rtol=1e-6, atol=0)
        ours, theirs = (getattr(x, name).float() for x in (got, wanted))
        # A GPU's reciprocal may differ in the last place: ties may fall to the other side.
        unlike = (ours != theirs).float().mean()
        assert unlike <= (0 if device == "cpu" else 1e-3)
        torch.testing.assert_close(
            ours, theirs, rtol=1 / 8, atol=1 if kind == torch.int8 else 2**-9
        )
    torch.testing.assert_close(got.mean_logits, wanted.mean_logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pools", [0, 5])
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_merges_scales_as_specified(device, pools):
    """Two heads of 37 blocks and their pools; one head's values fade out of sight."""
    scales = [torch.rand(1, 2, n, device=device) + 0.1 for n in (37, 37, pools, pools)]
    scales[1][0, 1, 3:] *= 2.0**-60
    if not pools:
        scales[2:] = None, None
    specified = sys.modules[quantize.__module__].merge_scales(*scales)
    assert specified.shape == (1, 2, 37 + pools, 2)
    kept = specified[..., 1].amax(-1) - specified[..., 1].amin(-1)
    assert kept.tolist()[0][1] == 40 and kept.tolist()[0][0] < 4
    torch.testing.assert_close(quantize_kernels.merge_scales(*scales), specified)


@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_interleaved_values(monkeypatch, device, fused, precision, key_block):
    """The same numbers in another order, which the name of each place says."""
    p = segments(problem(device, half(device), num_queries=300, key_block=key_block))
    if not fused:
        round_by(monkeypatch, None)
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15], device=device)
    rounding = ROUNDING[precision]
    plain, other = quantized(p, **rounding), quantized(p, interleaved=True, **rounding)
    groups = plain.v.view(torch.uint8).unflatten(-1, (-1, 16))
    assert torch.equal(other.v.view(torch.uint8).unflatten(-1, (-1, 16)), groups[..., order])
    assert torch.equal(other.v_scales, plain.v_scales)
    assert torch.equal(other.k.view(torch.uint8), plain.k.view(torch.uint8))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_pools_are_centred_as_keys(monkeypatch, device, fused):
    """By the keys' mean, which an empty pool must not bring in."""
    p = segments(problem(device, half(device), num_queries=700))
    p.k.add_(30)
    tail, x = tail_of(p, 32, True), quantized(p)
    assert tail.keys.shape[2] == 24 and tail.bias.isinf().any() and tail.bias.isfinite().any()
    if not fused:
        round_by(monkeypatch, None)
    got, there = dequantized_tail(p, x, tail), tail.bias.isfinite()
    for ours, exact in (
        (got.keys, tail.keys.double() - x.key_mean.double()[:, :, None]),
        (got.values, tail.values.double()),
    ):
        # Three bits after the first, of what is left once the mean is off.
        largest = exact[there].abs().max()
        assert largest < 5
        assert (ours - exact)[there].abs().max() <= largest / 16
    assert got.keys[~there].abs().max() < 1 / 8


@pytest.mark.parametrize("device", DEVICES)
def test_odd_head_dims_are_left_to_torch(device):
    p = problem(device, half(device), num_queries=130, head_dim=80)
    x = quantized(p)
    assert x.v.shape == (2, 2, 80, 256)
    assert error(dequantized(p, x).v, p.v.double()) < 1 / 16


@pytest.mark.parametrize("fused", [False, True])
def test_what_rounding_takes_off_is_carried_on(monkeypatch, fused):
    """Sums over keys err by one rounding at the end of a block, however many they are."""
    if not fused:
        round_by(monkeypatch, None)
    p = segments(problem(dtype=torch.float16, num_queries=700, density=1.0))
    real = p.real_keys()[:, None, :, None]
    exact = p.v.double().masked_fill(~real, 0)
    ours, usual = (
        dequantized(p, quantized(p, carried=carried)).v - exact for carried in (True, False)
    )
    assert not ours.masked_fill(real, 0).any()

    def sums(error):
        return torch.nn.functional.pad(error, (0, 0, 0, -700 % 128)).unflatten(2, (-1, 128)).sum(3)

    # Half the distance of the largest numbers: those of e4m3 from 256 to 448 are 32 apart.
    assert sums(ours).abs().max() <= 16 / 448 * exact.abs().amax() * 1.01
    assert sums(usual).abs().max() > 3 * sums(ours).abs().max()
    # Each value by itself is half as near again.
    assert ours.norm() < 1.6 * usual.norm()


def test_whole_numbers_are_of_one_step():
    """Half of it at most, and padding is zero."""
    p = segments(problem(num_queries=300))
    x = quantized(p, dtype=torch.int8)
    assert x.q.dtype == x.k.dtype == torch.int8 and x.v.dtype == torch.float8_e4m3fn
    given, real = dequantized(p, x), p.real_keys()[:, None, :, None]
    wanted = (p.k.double() - x.key_mean[:, :, None]).masked_fill(~real, 0)
    for got, exact, scales in ((given.q, p.q.double(), x.q_scales), (given.k, wanted, x.k_scales)):
        steps = scales.double().repeat_interleave(128, -1)[..., : exact.shape[2], None]
        assert ((got - exact).abs() <= 0.5001 * steps).all()
        assert ((got / steps).abs().amax((2, 3)) > 126.9).all()
    assert not given.k.masked_fill(real, 0).any()


def test_rounding_is_relative_and_padding_is_zero():
    p = segments(problem(num_queries=300))
    x = quantized(p)
    assert x.k.shape == (2, 2, 384, 64) and x.v.shape == (2, 2, 64, 384)
    given, real = dequantized(p, x), p.real_keys()[:, None, :, None]
    for got, wanted, mean in ((given.q, p.q, 0), (given.k, p.k, x.key_mean[:, :, None])):
        wanted = wanted.double() - mean
        wanted = wanted.masked_fill(~real, 0) if got is given.k else wanted
        largest = wanted.abs().amax()
        # Half the distance to the next number: 2 ** -10 of 448 / 2 ** 10 where it is smallest.
        assert ((got - wanted).abs() <= wanted.abs() / 16 + largest / 448).all()
    assert not given.v.masked_fill(real, 0).any() and not given.k.masked_fill(real, 0).any()


@pytest.mark.parametrize("tokens", [1, 127, 129, 300])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_ragged_sizes(device, head_dim, tokens):
    check_fp8(problem(device, half(device), num_queries=tokens, head_dim=head_dim, seed=tokens))


@pytest.mark.parametrize("change", NASTY)
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("device", DEVICES)
def test_nasty(device, precision, change):
    p = change(problem(device, half(device), num_queries=300, seed=1))
    check_fp8(p, precision=precision)


@pytest.mark.parametrize("query_block, key_block", [(128, 64), (64, 128), (64, 64)])
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("device", DEVICES)
def test_other_blocks_and_lengths(device, precision, query_block, key_block):
    p = problem(
        device, half(device), num_queries=150, num_keys=300, query_block=query_block,
        key_block=key_block, density=0.4, seed=2,
    )
    check_fp8(p, precision=precision)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("key_tile", [32, 64, 128])
def test_every_way_to_launch(monkeypatch, tma, key_tile):
    settings = backend.LaunchSettings(key_tile, 8, 2, tma)
    monkeypatch.setattr(backend, "settings_for", lambda call: settings)
    check_fp8(segments(problem("cpu", torch.float16, num_queries=300, seed=3)))


@pytest.mark.parametrize("device", DEVICES)
def test_value_blocks_of_other_sizes(device):
    """Each value block has a scale of its own, which the weights carry."""
    p = problem(device, half(device), num_queries=300, density=1.0, seed=4)
    p.v[:, :, :128] *= 1000
    p.v[:, :, 128:256] = 0
    p.v[:, :, 256:] /= 1000
    check_fp8(p)


def test_tiny_values():
    """No scale underflows and no sum overflows."""
    p = problem(dtype=torch.float32, num_queries=300, density=1.0, seed=4)
    p.v[:, :, :128] *= 1e-20
    p.v[0, 0] *= 1e-30
    p.v[1] = 0
    check_fp8(p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_head", [False, True])
def test_output_order(device, per_head):
    p = problem(device, half(device), num_queries=200, seed=3)
    check_order(p, "triton_fp8", per_head, precision="fp8")


def realistic(device, dtype):
    """As trained models have them: keys with a common mean, and channels larger than others."""
    p = problem(device, dtype, num_queries=600, head_dim=128, density=0.5, seed=5)
    make = torch.Generator().manual_seed(6)
    mean, size = torch.randn(128, generator=make) * 4, torch.ones(128)
    size[::16] = 4
    mean, size = mean.to(p.q), size.to(p.q)
    return replace(p, q=p.q * size.sqrt(), k=p.k * size + mean, v=p.v * size)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
def test_error_beside_bf16(device, record_property):
    """The report: `pytest -rP -k error_beside`, relative to float64."""
    p = realistic(device, half(device))
    exact = p.dense(torch.float64)[0]
    fp8, int8 = (error(p.run("triton_fp8", precision=name), exact) for name in ROUNDING)
    bf16 = error(p.dense(torch.bfloat16)[0], exact)
    zero = quantized(p, key_mean=torch.zeros(2, 2, 128, device=device))
    rough = error(dequantized(p, zero).dense(torch.float64)[0], exact)
    smooth = error(dequantized(p, quantized(p)).dense(torch.float64)[0], exact)
    print(f"{device}: fp8 {fp8:.2%}, int8 {int8:.2%}, bf16 eager {bf16:.2%}; rounded inputs alone "
          f"{smooth:.2%}, without smoothed keys {rough:.2%}")
    record_property("error", dict(fp8=fp8, int8=int8, bf16=bf16, smooth=smooth, rough=rough))
    # e4m3 has 4 bits of bf16's 8: 16 times its rounding.
    assert bf16 < int8 < fp8 < 16 * bf16
    assert smooth < rough


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(backend="triton", precision="fp8"), "its precision is 'full', not 'fp8'"),
        (dict(backend="triton_fp8"), "its precision is 'fp8' or 'int8', not 'full'"),
        (dict(backend="auto", precision="int4"), "precision must be 'full' here, got 'int4'; "),
    ],
)
def test_precision_is_never_changed_in_silence(arguments, message):
    with pytest.raises(ValueError, match=message):
        problem(dtype=torch.float16).run(**arguments)


def test_where_the_device_cannot(monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    p = problem(dtype=torch.float16)
    with pytest.raises(ValueError, match="got 'fp8'; .*triton_fp8: it needs CUDA tensors, got cpu"):
        p.run("auto", precision="fp8")
    block_map = BlockMap.from_mask(p.mask, query_block=128, key_block=128)
    assert "triton_fp8" in explain(p.q, p.k, p.v, block_map).rejected


def test_capabilities(monkeypatch):
    """sm80 has no 8-bit products, and no later one is in the table."""
    class Elsewhere:
        is_cuda, device, dtype, shape = True, torch.device("cuda"), torch.float16, (1, 1, 9, 64)

    call = type("Call", (), dict(q=Elsewhere, block_map=problem()))
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        reason = backend.why_not(call)
        assert (reason is None) == able
        assert able or "8.9 or 9.0, got {}.{}".format(*capability) in reason


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_offsets_beyond_32_bits(device):
    """The last head starts beyond element 2 ** 31, in 8 bits too: 8.7 GB, and 6.5 in 8 bits."""
    check_large_offsets(device, "triton_fp8", heads=1040, precision="fp8")
