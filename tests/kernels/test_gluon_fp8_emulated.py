"""The Gluon kernel in 8 bits on a CPU: its algorithm, and the order of its values' keys.

Layouts, registers and the copy engine's own rules are for the GPU to show.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gluon_emulator import emulated
from kernel_cases import NASTY, check_order, problem, segments, some_full_rows
from test_gluon_emulated import BACKENDS, MODULES, with_stages
from test_tail import tail_of
from test_triton_fp8 import check_fp8, nearest_logarithm, truth

from dfsattn_diffusers.kernels import api
from dfsattn_diffusers.kernels.quantize import ROUNDING

OURS = tuple(
    f"{BACKENDS}.{name}" for name in ("_hopper_bytes", "_hopper_attend_bytes", "gluon_fp8")
)


@pytest.fixture(params=range(2), ids="seed{}".format)
def backend(request, monkeypatch):
    """The backend on a GPU of three multiprocessors."""
    properties = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    real = api.load_backend
    with emulated(*MODULES, *OURS, seed=request.param) as module:
        monkeypatch.setattr(sys.modules[MODULES[-1]], "_is_hopper", lambda device: True)
        monkeypatch.setattr(
            api, "load_backend", lambda name: module if name == "gluon_fp8" else real(name)
        )
        yield module


def check(p, precision="fp8", tail=None):
    check_fp8(p, "gluon_fp8", nearest_logarithm, tail, precision)


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("head_dim, key_block", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_random_maps(backend, head_dim, key_block, precision):
    p = problem(
        dtype=torch.float16, num_queries=700, num_keys=900, head_dim=head_dim, key_block=key_block
    )
    check(p, precision)


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("change", NASTY, ids=lambda change: change.__name__)
def test_nasty_problems(backend, change, precision):
    check(change(problem(dtype=torch.float16, num_queries=400)), precision)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("change", [segments, some_full_rows], ids=lambda change: change.__name__)
def test_rings_of_any_depth(backend, monkeypatch, num_stages, change):
    monkeypatch.setattr(backend, "NUM_STAGES", with_stages(backend, num_stages))
    p = change(problem(dtype=torch.float16, num_queries=650, density=0.4))
    p.mask[:, 0, 1] = False
    check(p)


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize(
    "pool, head_dim, key_block, num_keys",
    [(8, 64, 128, 900), (32, 64, 128, 5500), (32, 128, 64, 4200), (64, 128, 128, 900)],
)  # fmt: skip
def test_tail(backend, monkeypatch, pool, head_dim, key_block, num_keys, precision):
    """The last tile of pools is as wide as a block, a half, and a quarter; alone, and not."""
    monkeypatch.setattr(api, "add_tail", None)
    p = problem(
        dtype=torch.float16, num_queries=300, num_keys=num_keys, head_dim=head_dim,
        key_block=key_block, density=0.3, heads=1,
    )  # fmt: skip
    p.mask[:, :, 0] = False
    check(p, precision, tail_of(p, pool, True))


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("change", [segments, some_full_rows], ids=lambda change: change.__name__)
def test_tail_of_short_blocks(backend, monkeypatch, change, precision):
    monkeypatch.setattr(api, "add_tail", None)
    p = change(problem(dtype=torch.float16, num_queries=400, num_keys=1300, heads=1, density=0.4))
    p.mask[:, 0, 1] = False
    check(p, precision, tail_of(p, 32, False))


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("size", [0, 2.0**-40, 2.0**-20, 2.0**-8])
def test_tail_of_faint_queries(backend, monkeypatch, size, precision):
    """The bias of a pool, or of padding, is beyond all multiples of such a scale of logits."""
    monkeypatch.setattr(api, "add_tail", None)
    p = problem(dtype=torch.bfloat16, num_queries=300, num_keys=1300, heads=1, density=0.4)
    p = segments(replace(p, q=p.q * size, v=p.v + 1))
    tail = tail_of(p, 32, False)
    out, lse = p.run("gluon_fp8", tail=tail, return_lse=True, precision=precision)
    exact_out, exact_lse = truth(p, tail)
    assert (out - exact_out).norm() < 0.01 * exact_out.norm()
    # By so much a straight line between powers of two may exceed the exponential, or it this.
    assert (lse - exact_lse).abs().max() < 0.06


def test_value_blocks_of_other_sizes(backend):
    """Each value block has a scale of its own, which the weights carry."""
    p = problem(dtype=torch.float16, num_queries=300, density=1.0, seed=4)
    p.v[:, :, :128] *= 1000
    p.v[:, :, 128:256] = 0
    p.v[:, :, 256:] /= 1000
    check(p)


@pytest.mark.parametrize("per_head", [False, True])
def test_output_order(backend, per_head):
    p = problem(dtype=torch.float16, num_queries=300)
    check_order(p, "gluon_fp8", per_head, precision="fp8")
