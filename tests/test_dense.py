"""Dense attention: the user's backend, or 8 bits where they are asked for."""

from collections import Counter

import pytest
import torch
from tiny_pipelines import FAMILIES, run, tiny_wan
from torch.nn.functional import scaled_dot_product_attention

import dfsattn_diffusers.attention
import dfsattn_diffusers.dense
from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn
from dfsattn_diffusers.dense import dense_attention
from dfsattn_diffusers.kernels import block_sparse_attention
from dfsattn_diffusers.text import TextLengths

DENSE = DFSAttnConfig(dense_fraction=1.0)
FP8 = DENSE.replace(precision="fp8", dense_precision="fp8", backend="triton_fp8")
ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


@pytest.fixture
def stand_in(monkeypatch):
    """The torch reference for a kernel in 8 bits, of which no CPU has one; what was asked for."""
    used = []

    def attention(*args, precision, backend, **kwargs):
        used.append((precision, backend))
        return block_sparse_attention(*args, **kwargs, backend="reference")

    for module in (dfsattn_diffusers.attention, dfsattn_diffusers.dense):
        monkeypatch.setattr(module, "block_sparse_attention", attention)
    return used


def qkv(device, tokens=300):
    generator = torch.Generator().manual_seed(0)
    shape = 2, tokens, 3, 64
    x = (torch.randn(shape, generator=generator).to(device, torch.float16) for _ in "qkv")
    return list(x)


def exact(x, mask=None):
    q, k, v = (part.transpose(1, 2).double() for part in x)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def error(got, wanted):
    return (got - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("lengths", [(300, 300), (290, 290), (290, 140), (129, 260)])
@pytest.mark.parametrize("config, most", [(DENSE, 2e-3), (FP8, 0.08)], ids=["full", "fp8"])
@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_not_seen(request, device, config, most, lengths):
    used = request.getfixturevalue("stand_in") if device == "cpu" else None
    x, longest = qkv(device), max(lengths)
    rows = torch.tensor(lengths, dtype=torch.int32, device=device)
    real = torch.arange(300, device=device) < rows[:, None]
    text = TextLengths(rows, min(lengths), longest)
    for part in x:
        part[~real] = 9.0  # a mask does not hide NaN from the user's backend
    out = dense_attention(*x, config, mask=real[:, None, None], text=text)
    assert used in (None, [] if config is DENSE else [("fp8", "triton_fp8")])
    wanted = exact(x, real[:, None, None])
    assert out.shape == wanted.shape and (out[:, longest:] == 0).all()
    for row, length in enumerate(lengths):
        got = out[row, :length]
        assert 0 < error(got, wanted[row, :length]) < most
        # Not as if each row had all keys that the longest one has.
        if length < longest:
            assert error(got, exact([part[:, :longest] for part in x])[row, :length]) > 2 * most


def test_other_masks_are_for_the_users_backend():
    x, mask = qkv("cpu"), torch.rand(2, 1, 300, 300) < 0.5
    assert error(dense_attention(*x, FP8, mask=mask), exact(x, mask)) < 2e-3


def test_a_kernel_of_other_precision_is_left_to_the_sparse_steps():
    assert FP8.kernel(FP8.dense_precision)["backend"] == "triton_fp8"
    other = FP8.replace(precision="full", backend="triton")
    assert other.kernel(other.dense_precision)["backend"] == "auto"


def test_corrections_are_measured_without_the_errors_of_8_bits(stand_in):
    pipe = tiny_wan()
    sparse = DFSAttnConfig(
        dense_fraction=0, keep_ratios=(0.3,), tile_size=8, query_block=32, key_block=32,
        precision="fp8", backend="triton_fp8",
    )
    for pool, refresh in ((None, ("fp8", "triton_fp8")), (8, ("full", "auto"))):
        stand_in.clear()
        with enable_dfsattn(pipe, sparse, residual_pool=pool):
            run(pipe, steps=2)
        assert stand_in.pop(0) == ("fp8", "triton_fp8")  # one token, before anything else
        half = len(stand_in) // 2
        assert set(stand_in[:half]) == {refresh} and set(stand_in[half:]) == {("fp8", "triton_fp8")}


def test_corrections_can_be_measured_by_full_precision(stand_in):
    pipe, seen = tiny_wan(), {}
    config = DFSAttnConfig(
        dense_fraction=0.5, keep_ratios=(0.3,), tile_size=8, query_block=32, key_block=32,
        residual_pool=8, precision="fp8", dense_precision="fp8", backend="triton_fp8",
    )
    for precision in (None, "fp8", "full"):
        stand_in.clear()
        with enable_dfsattn(pipe, config, correction_precision=precision):
            run(pipe, steps=4)
        seen[precision] = Counter(stand_in)
    # What a correction takes off its dense attention is in full precision always.
    refreshes = seen["full"]["full", "auto"]
    assert refreshes > 0 and seen[None] == seen["fp8"]
    assert seen["fp8"] - seen["full"] == {("fp8", "triton_fp8"): refreshes}
    assert seen["full"]["fp8", "triton_fp8"] > 2 * refreshes


def test_where_no_kernel_has_fp8_it_is_refused_before_any_step():
    pipe, steps = tiny_wan(), []
    for name in ("dense_precision", "correction_precision"):
        refused = pytest.raises(ValueError, match=f"{name}='fp8': .* cpu")
        with enable_dfsattn(pipe, DENSE, **{name: "fp8"}), refused:
            run(pipe, callback_on_step_end=lambda *a: steps.append(1) or {})
    assert not steps


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_steps_in_fp8(family, device):
    pipe = FAMILIES[family](head_dim=64).to(device, torch.bfloat16)
    stock = run(pipe).float()
    with enable_dfsattn(pipe, DENSE, dense_precision="fp8"):
        fp8 = run(pipe).float()
    assert 0 < error(fp8, stock) < 0.1
