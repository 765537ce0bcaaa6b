"""The Gluon kernel's algorithm on a CPU: right in any order of events, and never stuck.

Layouts, registers and the copy engine's own rules are for the GPU to show.
"""

import threading
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from gluon_emulator import Deadlock, emulated
from kernel_cases import NASTY, check, check_order, problem, segments, some_full_rows
from test_tail import check as check_tail
from test_tail import tail_of

from dfsattn_diffusers.kernels import api

pytest.importorskip("triton")
BACKENDS = "dfsattn_diffusers.kernels.backends"
_NAMES = ("_hopper_rings", "_hopper_tail", "_hopper_rows", "_hopper_attend", "gluon_hopper")
MODULES = tuple(f"{BACKENDS}.{name}" for name in _NAMES)


def with_stages(module, num_stages):
    """The table of the module's stages, with that many everywhere."""
    return dict.fromkeys(module.NUM_STAGES, num_stages)


@pytest.fixture(params=range(3), ids="seed{}".format)
def backend(request, monkeypatch):
    """The backend on a GPU of three multiprocessors."""
    properties = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    real = api.load_backend
    with emulated(*MODULES, seed=request.param) as module:
        monkeypatch.setattr(module, "_is_hopper", lambda device: True)
        monkeypatch.setattr(
            api, "load_backend", lambda name: module if name == "gluon_hopper" else real(name)
        )
        yield module


@pytest.mark.parametrize("head_dim, key_block", [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_random_maps(backend, head_dim, key_block):
    p = problem(
        dtype=torch.float16, num_queries=700, num_keys=900, head_dim=head_dim, key_block=key_block
    )
    check(p, "gluon_hopper")


@pytest.mark.parametrize("change", NASTY, ids=lambda change: change.__name__)
def test_nasty_problems(backend, change):
    check(change(problem(dtype=torch.bfloat16, num_queries=400)), "gluon_hopper")


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("change", [segments, some_full_rows], ids=lambda change: change.__name__)
def test_rings_of_any_depth(backend, monkeypatch, num_stages, change):
    monkeypatch.setattr(backend, "NUM_STAGES", with_stages(backend, num_stages))
    p = change(problem(dtype=torch.float16, num_queries=650, density=0.4))
    p.mask[:, 0, 1] = False
    check(p, "gluon_hopper")


@pytest.mark.parametrize("heads, num_queries", [(3, 900), (1, 200)])
def test_every_row_is_taken_once(backend, monkeypatch, heads, num_queries):
    """By one program, for each of its warpgroups; also where there are fewer rows than programs."""
    taken, write = [], backend.rings.write_notes

    def note(ring, i, numbers):
        taken.append(tuple(map(int, numbers[:3])))
        write(ring, i, numbers)

    monkeypatch.setattr(backend.rings, "write_notes", note)
    p = problem(dtype=torch.float16, num_queries=num_queries, heads=heads, density=0.3)
    check(p, "gluon_hopper")
    rows = product(range(2), range(heads), range(-(-num_queries // 128)))
    assert Counter(taken) == dict.fromkeys(rows, 2)


@pytest.fixture
def own_tail(backend, monkeypatch):
    """No second pass may add the tail."""

    def refuse(call):
        raise AssertionError("the kernel left the tail to add_tail")

    monkeypatch.setattr(api, "add_tail", refuse)
    return backend


@pytest.mark.parametrize(
    "pool, head_dim, key_block, num_keys",
    [(8, 64, 128, 900), (16, 128, 64, 700), (32, 128, 128, 6200), (32, 64, 64, 4200),
     (64, 64, 64, 4900), (64, 128, 128, 900), (128, 128, 128, 1300), (2, 64, 64, 300),
     (32, 64, 128, 5500)],
)  # fmt: skip
def test_tail_of_random_maps(own_tail, pool, head_dim, key_block, num_keys):
    p = problem(
        dtype=torch.float16, num_queries=300, num_keys=num_keys, head_dim=head_dim,
        key_block=key_block, density=0.3, heads=1,
    )  # fmt: skip
    check_tail(p, pool, True, "gluon_hopper")


@pytest.mark.parametrize("change", NASTY, ids=lambda change: change.__name__)
def test_tail_of_nasty_problems(own_tail, change):
    p = change(problem(dtype=torch.bfloat16, num_queries=400))
    check_tail(p, 32, False, "gluon_hopper")


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("change", [segments, some_full_rows], ids=lambda change: change.__name__)
def test_tail_through_rings_of_any_depth(own_tail, monkeypatch, num_stages, change):
    monkeypatch.setattr(own_tail, "NUM_STAGES", with_stages(own_tail, num_stages))
    p = change(
        problem(dtype=torch.float16, num_queries=300, num_keys=1300, heads=1, density=0.4)
    )
    p.mask[:, 0, 1] = False
    check_tail(p, 8, False, "gluon_hopper")


def test_tail_of_blocks_that_are_not_known_to_be_full(own_tail):
    """Tiles of pools that are full, that may be, that are not, and that lie behind the end."""
    p = problem(dtype=torch.float16, num_queries=200, num_keys=2500, heads=1, density=0.3)
    lengths = torch.full((2, 20), 128, dtype=torch.int32)
    lengths[0, 11], lengths[1, 13], lengths[:, 19] = 77, 0, 68
    p = replace(p, key_lengths=lengths, full_key_blocks=9)
    check_tail(p, 8, False, "gluon_hopper")


def test_tail_after_nothing(own_tail):
    """A row that keeps two tiles' blocks, all of them empty."""
    p = problem(dtype=torch.float16, num_queries=100, num_keys=2500, heads=1, density=0)
    lengths = torch.full((2, 20), 128, dtype=torch.int32)
    lengths[:, :16], p.mask[..., :16] = 0, True
    check_tail(replace(p, key_lengths=lengths), 8, False, "gluon_hopper")


def test_rows_that_keep_everything_read_no_tail(own_tail):
    p = some_full_rows(problem(dtype=torch.float16, num_queries=300))
    without, tail = p.run("gluon_hopper"), tail_of(p, 32, False)
    tail.values.fill_(torch.nan)
    with_tail = p.run("gluon_hopper", tail=tail)
    full = p.mask.all(-1).repeat_interleave(p.query_block, 2)[:, :, :300]
    assert torch.equal(with_tail[full], without[full])
    assert with_tail[~full].isnan().all()


def test_pools_that_the_copy_engine_cannot_read_are_left_to_a_second_pass(backend, monkeypatch):
    p = problem(dtype=torch.float16, num_queries=300, head_dim=128)
    means = tail_of(p, 32, True)
    odd = torch.zeros(*means.keys.shape[:3], 131, dtype=torch.float16)[..., 1:129]
    odd.copy_(means.keys)
    added, add_tail = [], api.add_tail
    monkeypatch.setattr(api, "add_tail", lambda call: (added.append(call), add_tail(call)))
    out = p.run("gluon_hopper", tail=means)
    assert not added
    second = p.run("gluon_hopper", tail=replace(means, keys=odd))
    assert len(added) == 1
    torch.testing.assert_close(out, second, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pool", [None, 16])
@pytest.mark.parametrize("per_head", [False, True])
def test_output_order(backend, pool, per_head):
    p = problem(dtype=torch.float16, num_queries=300)
    tail = tail_of(p, pool, False) if pool else None
    check_order(p, "gluon_hopper", per_head, tail=tail)


def test_the_emulator_sees_a_slot_given_back_too_early(backend, monkeypatch):
    """Values that are released on arrival are overwritten before their product has read them."""
    receive, release = backend.rings.receive, backend.rings.release
    gone = set()

    def hasty(ring, i):
        tile = receive(ring, i)
        if ring[0].shape[0] == 2:  # keys and values, not queries
            release(ring, i)
            gone.add((threading.get_ident(), id(ring), int(i)))
        return tile

    def once(ring, i):
        place = threading.get_ident(), id(ring), int(i)
        if place in gone:
            gone.remove(place)
        else:
            release(ring, i)

    monkeypatch.setattr(backend.rings, "receive", hasty)
    monkeypatch.setattr(backend.rings, "release", once)
    p = problem(dtype=torch.float16, num_queries=900, head_dim=128, density=0.9)
    with pytest.raises(AssertionError):
        check(p, "gluon_hopper")


def test_the_emulator_sees_notes_that_are_not_there_yet(backend, monkeypatch):
    monkeypatch.setattr(backend.rings, "_barrier", lambda: None)
    with pytest.raises(AssertionError, match="others may not have stored"):
        check(problem(dtype=torch.float16, num_queries=200), "gluon_hopper")


def test_the_emulator_sees_a_deadlock(backend, monkeypatch):
    monkeypatch.setattr(backend.rings, "release", lambda ring, i: None)
    with pytest.raises(Deadlock):
        check(problem(dtype=torch.float16, num_queries=500, density=0.9), "gluon_hopper")
