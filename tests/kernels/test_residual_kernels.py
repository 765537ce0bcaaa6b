import pytest
import torch

from dfsattn_diffusers.kernels import residual as module
from dfsattn_diffusers.kernels.residual import add_residual, measure_residual

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
POOLS = [1, 4, 32]


def case(dtype, device, pool, per_head, head_dim=64):
    """Outputs, their slots and rows, and the real tokens of every run."""
    make = torch.Generator().manual_seed(pool)
    batch, tokens, heads, slots = 2, 83, 3, 96
    exact, out = (
        torch.randn(batch, tokens, heads, head_dim, generator=make).to(device, dtype) for _ in "eo"
    )
    shape = (batch, heads) if per_head else (1, 1)
    order = torch.rand(*shape, tokens, generator=make).argsort(-1)
    rows = torch.full((*shape, slots), -1)
    rows[..., :tokens] = order
    slot = order.argsort(-1)
    starts = torch.arange(0, slots, pool)
    lengths = (torch.tensor([[tokens], [tokens - 40]]) - starts).clamp(0, pool)
    if not per_head:
        rows, slot = rows[0, 0], slot[0, 0]
    return exact, out, *(x.to(device, torch.int32) for x in (rows, slot, lengths))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("device", DEVICES)
def test_measure_is_the_mean_lack_of_each_run(device, pool, per_head):
    exact, out, rows, _, lengths = case(torch.float64, device, pool, per_head)
    got = measure_residual(exact, out, rows, lengths)
    rows = rows.expand(2, 3, -1)
    for b in range(2):
        for h in range(3):
            for run in range(lengths.shape[1]):
                at = rows[b, h, run * pool :][: lengths[b, run]].long()
                lack = (exact - out)[b, at, h].sum(0) / max(1, len(at))
                torch.testing.assert_close(got[b, h, run], lack, atol=1e-6, rtol=1e-6)


def test_slices_of_heads_are_the_whole(monkeypatch):
    exact, out, rows, _, lengths = case(torch.float32, "cpu", 4, True)
    whole = measure_residual(exact, out, rows, lengths)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    assert torch.equal(measure_residual(exact, out, rows, lengths), whole)


# Triton's interpreter cuts bf16 off where a GPU rounds it.
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_adds_as_the_reference_does(device, pool, per_head, dtype, monkeypatch):
    kernels = pytest.importorskip("dfsattn_diffusers.kernels.residual_kernels")
    exact, out, rows, slots, lengths = case(dtype, device, pool, per_head)
    residual = measure_residual(exact, out, rows, lengths)
    # A view, as the attention kernel's output may be.
    memory = torch.full((2, 84, 5, 64), float("nan"), dtype=dtype, device=device)
    view = memory[:, :83, 1:4]
    view.copy_(out)
    kernels.add(view, residual, slots, pool)
    monkeypatch.setattr(module, "fast", lambda *_: None)
    add_residual(out, residual, slots, pool)
    assert torch.equal(view, out)
    memory[:, :83, 1:4] = torch.nan
    assert memory.isnan().all()


@pytest.mark.parametrize("per_head", [False, True])
def test_one_query_a_run_gives_the_exact_output_back(per_head):
    exact, out, rows, slots, lengths = case(torch.float32, "cpu", 1, per_head)
    lengths = torch.ones_like(lengths)
    lengths[:, 83:] = 0
    add_residual(out, measure_residual(exact, out, rows, lengths), slots, 1)
    torch.testing.assert_close(out, exact)
