import pytest
import torch
from kernel_cases import ON_CUDA, RUNS

from dfsattn_diffusers.kernels import residual as module
from dfsattn_diffusers.kernels.low_rank import RUN, LowRank, bytes_of
from dfsattn_diffusers.kernels.residual import add_residual, measure_residual

DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
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


def added_by_kernel(out, residual, slots, pool):
    """What the kernel makes of `out`, in a view as the attention kernel's output may be."""
    kernels = pytest.importorskip("dfsattn_diffusers.kernels.residual_kernels")
    memory = out.new_full((2, 84, 5, 64), float("nan"))
    view = memory[:, :83, 1:4]
    view.copy_(out)
    kernels.add(view, residual, slots, pool)
    made = view.clone()
    view.fill_(torch.nan)
    assert memory.isnan().all()
    return made


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("device, dtype", RUNS)
def test_kernel_adds_as_the_reference_does(device, pool, per_head, dtype, monkeypatch):
    exact, out, rows, slots, lengths = case(dtype, device, pool, per_head)
    residual = measure_residual(exact, out, rows, lengths)
    by_kernel = added_by_kernel(out, residual, slots, pool)
    monkeypatch.setattr(module, "fast", lambda *_: None)
    add_residual(out, residual, slots, pool)
    assert torch.equal(by_kernel, out)


@pytest.mark.parametrize("per_head", [False, True])
def test_one_query_a_run_gives_the_exact_output_back(per_head):
    exact, out, rows, slots, lengths = case(torch.float32, "cpu", 1, per_head)
    lengths = torch.ones_like(lengths)
    lengths[:, 83:] = 0
    add_residual(out, measure_residual(exact, out, rows, lengths), slots, 1)
    torch.testing.assert_close(out, exact)


def decaying(device="cpu", rows=300, head_dim=64):
    """Rows whose energy falls along random directions, and an empty head."""
    make = torch.Generator().manual_seed(0)
    scale = torch.arange(1, head_dim + 1.0) ** -1.0
    x = torch.randn(2, 3, rows, head_dim, generator=make) * scale
    x = x @ torch.linalg.qr(torch.randn(2, 3, head_dim, head_dim, generator=make)).Q
    x[1, 2] = 0
    return x.to(device)


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_low_rank_holds_nearly_what_eigenvectors_do(device, rank):
    x = decaying(device)
    low = LowRank.of(x, rank)
    got = low.coefficients() @ low.basis
    values = torch.linalg.eigvalsh(x.mT @ x)[:, :, :-rank]
    best = values.clamp(min=0).sum((0, 1, 2))
    lost, energy = (got - x).square().sum(), x.square().sum()
    assert best <= lost < best + 0.02 * energy
    assert (got[1, 2] == 0).all()
    overlap = low.basis[:, :2] @ low.basis[:, :2].mT
    wanted = torch.eye(rank, device=device).expand_as(overlap)
    torch.testing.assert_close(overlap, wanted, atol=1e-5, rtol=0)
    assert low.nbytes == 6 * bytes_of(300, 64, rank) < x.nbytes / 8


def test_codes_are_within_half_a_step():
    """Of the scale that a run's largest coefficient sets."""
    x = decaying()
    low = LowRank.of(x, 4)
    wanted, steps = x @ low.basis.mT, low.scales.float().repeat_interleave(RUN, 2)[:, :, :300]
    # The scale is rounded to bf16, so that the largest may lie a little outside.
    assert ((low.coefficients() - wanted).abs() <= 0.53 * steps + 1e-20).all()


def test_more_directions_than_there_are_do_no_harm():
    make = torch.Generator().manual_seed(0)  # rounding takes 0.06 to 0.15 of other draws
    x = torch.randn(1, 1, 40, 1, generator=make) * torch.randn(1, 1, 1, 16, generator=make)
    low = LowRank.of(x, 24)
    assert not low.basis[:, :, 1:].any()
    assert ((low.coefficients() @ low.basis - x).norm() / x.norm()) < 0.1


@pytest.mark.parametrize("rank", [2, 8])
def test_slices_of_heads_have_the_same_directions(monkeypatch, rank):
    exact, out, rows, _, lengths = case(torch.float32, "cpu", 4, True)
    whole = measure_residual(exact, out, rows, lengths, rank)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    parts = measure_residual(exact, out, rows, lengths, rank)
    assert whole.codes.shape == (2, 3, lengths.shape[1], rank // 2)
    torch.testing.assert_close(
        parts.coefficients() @ parts.basis, whole.coefficients() @ whole.basis
    )


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pool, rank", [(1, 2), (1, 8), (4, 4)])
@pytest.mark.parametrize("device, dtype", RUNS)
def test_kernel_adds_low_rank_as_the_reference_does(
    device, pool, rank, per_head, dtype, monkeypatch
):
    exact, out, rows, slots, lengths = case(dtype, device, pool, per_head)
    residual = measure_residual(exact, out, rows, lengths, rank)
    by_kernel = added_by_kernel(out, residual, slots, pool)
    monkeypatch.setattr(module, "fast", lambda *_: None)
    add_residual(out, residual, slots, pool)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(by_kernel, out, atol=8 * eps, rtol=4 * eps)
