"""Every backend against dense attention in float64, on easy and on nasty problems."""

import pytest
import torch
from kernel_cases import BACKENDS, NASTY, TARGETS, assert_close, check, check_order, problem


def usual_size(device):
    return 300 if device == "cpu" else 2500


def test_every_backend_is_tested_here():
    assert {target.values[0] for target in TARGETS} == set(BACKENDS)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_ragged_sizes(backend, device, dtype, tokens, head_dim):
    check(problem(device, dtype, num_queries=tokens, head_dim=head_dim, seed=tokens), backend)


@pytest.mark.parametrize("change", NASTY)
@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_nasty(backend, device, dtype, change):
    check(change(problem(device, dtype, num_queries=usual_size(device), seed=1)), backend)


@pytest.mark.parametrize("query_block, key_block", [(128, 64), (64, 128), (64, 64)])
@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_other_blocks_and_lengths(backend, device, dtype, query_block, key_block):
    tokens = usual_size(device)
    p = problem(
        device, dtype, num_queries=tokens // 2, num_keys=tokens, query_block=query_block,
        key_block=key_block, density=0.3, seed=2,
    )
    if backend == "gluon_hopper" and query_block != 128:
        pytest.skip("it needs query blocks of 128")
    check(p, backend)


@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_results_do_not_change_from_run_to_run(backend, device, dtype):
    p = problem(device, dtype, num_queries=usual_size(device), head_dim=128, seed=4)
    first = p.run(backend)
    for _ in range(2 if device == "cpu" else 20):
        assert torch.equal(p.run(backend), first)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_output_order(backend, device, dtype, per_head):
    check_order(problem(device, dtype, num_queries=200, seed=3), backend, per_head)


@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_given_out_without_order(backend, device, dtype):
    p = problem(device, dtype, num_queries=130, seed=4)
    out = torch.empty(2, 130, 2, 64, dtype=dtype, device=device).transpose(1, 2)
    assert p.run(backend, out=out) is out
    assert_close(out, p.dense(torch.float64)[0], p.dense(dtype)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_other_rows_and_heads_do_not_leak(backend, device, dtype):
    p = problem(device, dtype, num_queries=200, seed=5)
    alone = p.run(backend)[0, 1].clone()
    for x in (p.q, p.k, p.v):
        x[0, 0], x[1] = torch.nan, torch.inf
    assert torch.equal(p.run(backend)[0, 1], alone)


@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_dropped_blocks_do_not_leak(backend, device, dtype):
    p = problem(device, dtype, num_queries=300, seed=6)
    p.mask[..., 0], p.mask[..., 1] = False, True
    p.k[:, :, :128], p.v[:, :, :128] = torch.nan, torch.inf
    assert p.run(backend).isfinite().all()


@pytest.mark.parametrize("backend, device, dtype", TARGETS)
def test_runs_agree_bit_by_bit(backend, device, dtype):
    p = problem(device, dtype, num_queries=usual_size(device), seed=7)
    first = p.run(backend)
    for _ in range(2 if device == "cpu" else 19):
        assert torch.equal(p.run(backend), first)
