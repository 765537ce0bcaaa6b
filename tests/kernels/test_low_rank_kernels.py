"""The kernels that measure residuals in few directions against the torch code of `LowRank`."""

import pytest
import torch
from kernel_cases import ON_CUDA, RUNS

from dfsattn_diffusers.kernels import low_rank
from dfsattn_diffusers.kernels import residual as module
from dfsattn_diffusers.kernels.low_rank import RUN, LowRank
from dfsattn_diffusers.kernels.residual import measure_residual
from dfsattn_diffusers.kernels.rows import take_rows

kernels = pytest.importorskip("dfsattn_diffusers.kernels.low_rank_kernels")

DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
BATCH, HEADS, SLOTS = 2, 3, 160
# Tokens of each batch row: the second one's last runs are without any.
REAL = (150, 75)


def decaying(make, tokens, head_dim):
    """`[B, N, H, D]` that falls so fast along random directions that few rounds find them."""
    x = torch.randn(BATCH, HEADS, tokens, head_dim, generator=make)
    turn = torch.randn(BATCH, HEADS, head_dim, head_dim, generator=make)
    return (8 * x * 0.2 ** torch.arange(head_dim) @ torch.linalg.qr(turn).Q).transpose(1, 2)


def case(pool, per_head, dtype=torch.float32, lack=None, head_dim=64, device="cpu"):
    """Outputs in strided views, their rows and the lengths of runs; all that is not real is NaN.

    Where heads share their rows, batch rows share their lengths.
    """
    make = torch.Generator().manual_seed(pool)
    tokens = REAL[0]
    out = torch.randn(BATCH, tokens, HEADS, head_dim, generator=make).to(dtype)
    if lack is None:
        lack = decaying(make, tokens, head_dim)
    else:
        out, lack = out.round(), lack(make, out.shape)
    exact = (out.float() + lack).to(dtype)
    shape = (BATCH, HEADS) if per_head else (1, 1)
    order = torch.rand(*shape, tokens, generator=make).argsort(-1)
    rows = torch.full((*shape, SLOTS), -1)
    rows[..., :tokens] = order
    real = torch.tensor(REAL if per_head else REAL[:1])[:, None]
    lengths = (real - torch.arange(0, SLOTS, pool)).clamp(0, pool)
    for x in (exact, out) if per_head else ():
        x.transpose(1, 2)[1:].scatter_(
            2, order[1:, :, REAL[1] :, None].expand(-1, -1, -1, head_dim), torch.nan
        )
    rows = rows if per_head else rows[0, 0]
    rows, lengths = (x.to(device, torch.int32) for x in (rows, lengths))
    tokens_first = out.new_full((BATCH, tokens + 5, HEADS + 2, head_dim), torch.nan, device=device)
    heads_first = out.new_full((BATCH, HEADS, tokens + 3, head_dim), torch.nan, device=device)
    views = heads_first[:, :, :tokens].transpose(1, 2), tokens_first[:, 2:-3, 1:-1]
    for view, x in zip(views, (exact, out)):
        view.copy_(x)
    return *views, rows, lengths


def lacks(exact, out, rows, lengths):
    """`[B, H, R, D]` float32 by torch, on the CPU."""
    exact, out, rows, lengths = (x.cpu() for x in (exact, out, rows, lengths))
    exact, out = (take_rows(x.transpose(1, 2), rows.clamp(min=0)).float() for x in (exact, out))
    return module.pool_tiles(exact - out, lengths)


def on_cpu(low):
    return LowRank(low.codes.cpu(), low.scales.cpu(), low.basis.cpu())


def rebuilt(low):
    return low.coefficients() @ low.basis


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pool", [1, 4, 32])
@pytest.mark.parametrize("device, dtype", RUNS)
def test_holds_what_torch_code_holds(device, pool, per_head, dtype):
    arguments = case(pool, per_head, dtype, device=device)
    x = lacks(*arguments)
    got, wanted = on_cpu(kernels.measure(*arguments, 4)), LowRank.of(x, 4)
    for name in ("codes", "scales", "basis"):
        made, like = getattr(got, name), getattr(wanted, name)
        assert (made.dtype, made.shape) == (like.dtype, like.shape)
    # A run without tokens is half a step to the side that the direction's sign says.
    real = arguments[3].cpu()[:, None, :, None] > 0
    got, wanted, x = (y.where(real, 0) for y in (rebuilt(got), rebuilt(wanted), x))
    # Codes on the edge between two steps fall to either side, which shows where rows are few.
    far = 0.05 if pool == 32 else 0.02
    assert ((got - wanted).norm(dim=(2, 3)) < far * x.norm(dim=(2, 3))).all()
    assert ((got - x).norm(dim=(2, 3)) < (1 + far) * (wanted - x).norm(dim=(2, 3)) + 1e-6).all()


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_products_do_not_depend_on_their_division(device, head_dim, monkeypatch):
    arguments = case(1, True, head_dim=head_dim, device=device)
    x = lacks(*arguments)
    wanted, sums = x.mT @ x, {}
    for programs in (1, 12, kernels._PROGRAMS):
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        made = kernels._sum_products(*arguments)
        sums[made.shape[1]] = made.sum(1).cpu()
    assert list(sums) == [1, 2, 5]
    for total in sums.values():
        error = (total.view_as(wanted) - wanted).abs().amax((2, 3))
        # On a GPU values are rounded to bf16.
        assert (error <= 2**-8 * wanted.amax((2, 3))).all()
    assert torch.equal(made, kernels._sum_products(*arguments))


@pytest.mark.parametrize("head_dim, rank", [(16, 2), (64, 4), (64, 6), (128, 8)])
@pytest.mark.parametrize("device", DEVICES)
def test_directions(device, head_dim, rank):
    """Of separate eigenvalues what eigenvectors span, of close ones as much energy as in torch."""
    make = torch.Generator().manual_seed(rank)
    turn = torch.linalg.qr(torch.randn(3, head_dim, head_dim, generator=make)).Q
    place = torch.arange(head_dim)
    values = torch.stack([7 * 0.3**place, 1.0 / (1 + place), torch.ones(head_dim)])
    gram = turn.mT * values[:, None] @ turn
    # Three spans, whose sum is the matrix.
    sums = torch.stack([gram / 2, gram / 8, gram * 3 / 8], 1).to(device)
    got = kernels._find_directions(sums, rank).cpu()
    wanted = low_rank._main_directions(gram[None], rank)[0]
    torch.testing.assert_close(got @ got.mT, torch.eye(rank).expand(3, -1, -1), atol=1e-5, rtol=0)
    energy = [(basis @ gram @ basis.mT).diagonal(dim1=1, dim2=2).sum(1) for basis in (got, wanted)]
    torch.testing.assert_close(*energy, rtol=0.01, atol=0)
    for basis in (got, wanted):
        cosines = torch.linalg.svdvals(basis[0] @ turn[0, :rank].mT)
        torch.testing.assert_close(cosines, torch.ones(rank), atol=0.01, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_directions_that_are_not_there_are_zero(device):
    make = torch.Generator().manual_seed(0)
    row = torch.randn(1, 32, generator=make)
    sums = torch.stack([torch.zeros(32, 32), row.T @ row])[:, None].to(device)
    basis = kernels._find_directions(sums, 4).cpu()
    assert not basis[0].any() and not basis[1, 1:].any()
    torch.testing.assert_close(basis[1, :1].abs(), row.abs() / row.norm())


def whole(make, shape):
    """Whole numbers up to 15, so that sums are exact and scales powers of two: half are ties."""
    return torch.randint(-15, 16, shape, generator=make).float()


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_exact_coefficients_are_the_same_bits(device, rank, monkeypatch):
    make = torch.Generator().manual_seed(rank)
    arguments = case(1, True, lack=whole, device=device)
    basis = torch.zeros(BATCH, HEADS, rank, 64)
    basis.scatter_(3, torch.rand(basis.shape, generator=make).argsort(3)[..., :1], -1.0)
    monkeypatch.setattr(low_rank, "_main_directions", lambda *_: basis)
    wanted = LowRank.of(lacks(*arguments), rank)
    got = on_cpu(kernels._encode_in(basis.to(device), *arguments))
    assert torch.equal(got.scales, wanted.scales)
    assert torch.equal(got.codes, wanted.codes)
    steps = wanted.coefficients() / wanted.scales.float().repeat_interleave(RUN, 2)[:, :, :SLOTS]
    assert wanted.codes.unique().numel() > 8 and steps.abs().max() == 7.5


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pool", [1, 4, 32])
@pytest.mark.parametrize("device, dtype", RUNS)
def test_codes_of_a_basis_are_those_of_torch_code(device, pool, per_head, dtype, monkeypatch):
    """But for the few that lie on the edge between two, since sums differ in their order."""
    make = torch.Generator().manual_seed(0)
    arguments = case(pool, per_head, dtype, device=device)
    basis = torch.linalg.qr(torch.randn(BATCH, HEADS, 64, 6, generator=make)).Q.mT.contiguous()
    monkeypatch.setattr(low_rank, "_main_directions", lambda *_: basis)
    wanted = LowRank.of(lacks(*arguments), 6)
    got = on_cpu(kernels._encode_in(basis.to(device), *arguments))
    torch.testing.assert_close(got.scales, wanted.scales, rtol=2**-7, atol=0)
    steps = [(low.codes & 15, low.codes >> 4) for low in (got, wanted)]
    for ours, theirs in zip(*steps):
        off = (ours.int() - theirs.int()).abs()
        assert off.max() <= 1 and (off > 0).sum() <= 2 + 0.002 * off.numel()
    assert (got.scales != wanted.scales).sum() <= 1 + 0.02 * wanted.scales.numel()


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_no_residual_is_zero(device, rank):
    arguments = case(4, True, lack=lambda _, shape: torch.zeros(shape), device=device)
    low = on_cpu(kernels.measure(*arguments, rank))
    assert not low.basis.any() and (low.coefficients().abs() < 1e-19).all()


def test_measure_residual_uses_them_where_they_serve(monkeypatch):
    used = []

    def measure(*arguments):
        used.append(arguments)
        return measured(*arguments)

    measured = kernels.measure
    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(module, "fast", lambda name, _: {"low_rank_kernels": kernels}[name])
    exact, out, rows, lengths = case(32, False, head_dim=32)
    assert isinstance(measure_residual(exact, out, rows, lengths, 2), LowRank)
    assert len(used) == 1
    measure_residual(exact, out, rows, lengths)
    measure_residual(exact[..., :24], out[..., :24], rows, lengths, 2)
    measure_residual(exact[..., ::2], out[..., ::2], rows, lengths, 2)
    measure_residual(exact.double(), out.double(), rows, lengths, 2)
    assert len(used) == 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_takes_little_memory_and_does_not_wait(device):
    exact, out = torch.randn(2, 1, 8192, 48, 64, device=device).bfloat16()
    rows = torch.arange(8192, device=device, dtype=torch.int32)
    lengths = torch.ones_like(rows)[None]
    measure_residual(exact, out, rows, lengths, 8)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        low = measure_residual(exact, out, rows, lengths, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < low.nbytes + kernels._SUM_BYTES + 2**20 < out.nbytes


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_CUDA)])
def test_large_offsets(device):
    """Heads whose values lie beyond element 2 ** 31 give what they give alone."""
    tokens, heads = 2**14, 520
    memory = torch.zeros(1, tokens, heads, 2, 128, dtype=torch.bfloat16, device=device)
    memory[:, :, -3:].normal_()
    exact, out = memory.unbind(3)
    rows = torch.arange(tokens, device=device, dtype=torch.int32)
    lengths = torch.ones_like(rows)[None]
    whole = kernels.measure(exact, out, rows, lengths, 4)
    last = kernels._encode_in(
        whole.basis[:, -3:].contiguous(), exact[:, :, -3:], out[:, :, -3:], rows, lengths
    )
    assert torch.equal(whole.codes[:, -3:], last.codes)
    assert torch.equal(whole.scales[:, -3:], last.scales)
    assert not whole.basis[:, :-3].any() and whole.basis[:, -3:].square().sum() > 11.9
