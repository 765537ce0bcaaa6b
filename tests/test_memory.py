"""Residuals that cannot fit are refused in the first calls of a run."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from test_compile import compile_blocks
from tiny_pipelines import FAMILIES, TEXT_LENGTH, run, tiny_wan, transformers

from dfsattn_diffusers import DFSAttnConfig, enable_dfsattn, memory
from dfsattn_diffusers.kernels.prologue import Stream
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout
from dfsattn_diffusers.processors import LayerProcessor
from dfsattn_diffusers.state import DFSAttnState, Forward, Position

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)
CORRECTED = SPARSE.replace(residual_pool=8)
# One call of Wan 14B at 720p: 31 GB for the residuals of all queries.
GRID, QUERY = (21, 45, 80), torch.empty(1, 75600, 40, 128, dtype=torch.bfloat16, device="meta")
CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Free memory of all devices, which a test may set, and the devices that were asked."""
    now = SimpleNamespace(bytes=2**60, asked=[])

    def free_memory(device):
        now.asked.append(device)
        return now.bytes() if callable(now.bytes) else now.bytes

    monkeypatch.setattr(memory, "free_memory", free_memory)
    return now


def large_state(pool, layers=None):
    state = DFSAttnState(DFSAttnConfig(residual_pool=pool))
    state.residuals.layers["transformer"] = Counter(layers or {CPU: 40})
    return state


def start(state, branch="cond", query=QUERY, grid=GRID):
    position, geometry = Position(0, 50, branch), TokenGeometry(grid)
    state.begin_forward(Forward("transformer", position, geometry, None, query.device))


def call(state, branch="cond", query=QUERY, grid=GRID):
    start(state, branch, query, grid)
    state.check_memory(query)


def expected(state):
    return sum(size for _, _, size in state.residuals._entries.values())


def kept(state):
    return sum(cached.kept.residual.nbytes for cached in state._maps.values())


def test_the_error_says_what_was_wrong_and_what_fits(free):
    free.bytes = int(20e9)
    with pytest.raises(MemoryError) as error:
        call(large_state(1))
    assert str(error.value) == (
        "The residuals of residual_pool=1 will take 30.99 GB on meta, for 40 layers in all "
        "transformers and guidance branches so far, but there is room for 20.00 GB. Set "
        "residual_pool=2, which takes 15.49 GB, or None, or make a smaller video."
    )
    call(large_state(2))
    free.bytes = int(1e9)
    with pytest.raises(MemoryError, match="Set residual_pool=32, which takes 0.97 GB, or None"):
        call(large_state(2))
    free.bytes = int(0.2e9)
    with pytest.raises(MemoryError, match="GB. Set residual_pool=None, or make a smaller video"):
        call(large_state(2))


def test_a_second_branch_takes_as_much_again(free):
    free.bytes = int(40e9)
    state = large_state(1)
    call(state)
    # What was refused once is refused again.
    for _ in range(2):
        with pytest.raises(MemoryError, match="61.97 GB on meta, for 80 layers.*pool=2, which"):
            call(state, "uncond")
    call(state)
    state.begin_run(50)
    call(state, "uncond")
    # Another size takes the place of the first, another batch likewise.
    call(state, "uncond", grid=(21, 45, 100))
    half = QUERY[:, :, :20]
    call(state, "uncond", query=half.expand(2, -1, -1, -1))
    call(state, "cond", query=half[..., :32])
    assert expected(state) == 75648 * 40 * 40 * 128 * 2 * 1.125


def test_layers_are_counted_where_they_are(free):
    free.bytes = int(20e9)
    meta, other = torch.device("meta"), torch.device("cuda:1")
    call(large_state(1, {meta: 10, CPU: 10, other: 20}))
    with pytest.raises(MemoryError, match="for 30 layers"):
        call(large_state(1, {meta: 10, CPU: 20, other: 10}))


def test_nobody_asks_where_nothing_is_kept(free):
    free.bytes = 0
    pipe = tiny_wan()
    for changes in ({"residual_pool": None}, {"min_tokens": 10**6}):
        with enable_dfsattn(pipe, CORRECTED, **changes):
            run(pipe)
    with enable_dfsattn(pipe, CORRECTED, dense_layers=(0, 1)):
        run(pipe)
    # A mask that sparse attention cannot honour.
    state = large_state(1)
    layer, query = LayerProcessor(state, 0), torch.zeros(1, 6, 1, 16)
    start(state, query=query, grid=(1, 2, 3))
    layer.attend([Stream(query, query, query)], attention_mask=torch.ones(1, 1, 1, 6) > 0)
    assert not free.asked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dense_layers, rank", [((), None), ((1,), None), ((), 4)])
def test_as_much_is_expected_as_will_be_kept(family, dense_layers, rank, free):
    pipe, found = FAMILIES[family](), []

    def look(pipe, index, timestep, tensors):
        if index == 11:
            found.append((expected(handle.state), kept(handle.state)))
        return {}

    changes = dict(dense_layers=dense_layers, residual_rank=rank)
    with enable_dfsattn(pipe, CORRECTED, **changes) as handle:
        for _ in range(2):
            run(pipe, steps=12, callback_on_step_end=look)
        branches = 1 if family.startswith("cogvideox") else 2
        assert len(free.asked) == 2 * branches * len(transformers(pipe))
        assert not handle.state.residuals._entries
    assert found[0][0] == found[0][1] > 0 and found[0] == found[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_fails_before_its_work_and_the_next_one_succeeds(family, compiled, free):
    torch._dynamo.reset()
    pipe = FAMILIES[family]()
    if compiled:
        compile_blocks(pipe, backend="eager")
    with enable_dfsattn(pipe, CORRECTED) as handle:
        wanted = run(pipe, steps=8)
        free.bytes = 0
        with pytest.raises(MemoryError, match="residual_pool=8 will take .* on cpu, for"):
            run(pipe, steps=8)
        failed = handle.report().runs[-1]
        assert failed.steps == 1 and not sum(failed.calls.values())
        free.bytes = 2**60
        assert torch.equal(run(pipe, steps=8), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("short", [0, 1])
def test_what_is_kept_already_is_no_longer_free(short, free):
    """In a short run the first branch keeps its residuals before the second is known."""
    pipe = tiny_wan()
    with enable_dfsattn(pipe, CORRECTED) as handle:
        sizes = []
        free.bytes = lambda: sizes.append(expected(handle.state)) or 2**60
        run(pipe, steps=4)
        need = 2 * sizes[1]
        assert sizes[1] > 0
        free.bytes = lambda: need - short - kept(handle.state)
        if not short:
            run(pipe, steps=4)
            return
        with pytest.raises(MemoryError, match="Set residual_pool=16, which"):
            run(pipe, steps=4)
    assert handle.report().runs[-1].calls["refresh"] == 2


def test_offloaded_layers_count(free):
    pipe = tiny_wan()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert pipe.transformer.blocks[0].attn1.to_q.weight.device.type == "meta"
    with enable_dfsattn(pipe, CORRECTED):
        run(pipe)
        free.bytes = 0
        with pytest.raises(MemoryError, match="for 2 layers"):
            run(pipe)
    remove_hook_from_module(pipe.transformer, recurse=True)


def test_processors_that_were_replaced_do_not_count(free):
    pipe = tiny_wan()
    stock = pipe.transformer.blocks[0].attn1.processor
    with enable_dfsattn(pipe, CORRECTED):
        pipe.transformer.blocks[0].attn1.set_processor(stock)
        free.bytes = 0
        with pytest.raises(MemoryError, match="for 1 layers"):
            run(pipe)


def test_slots_are_those_of_the_layout():
    for geometry in (TokenGeometry((5, 9, 11), TEXT_LENGTH, True), TokenGeometry((1, 2, 3))):
        blocks = dict(query_block=32, key_block=64)
        layout = TokenLayout.build(geometry, order="raster", tile_size=8, **blocks)
        assert layout.slots == geometry.slots(64)


def test_off_cuda_nothing_is_known():
    assert memory.free_memory(CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_free_memory_of_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    assert 0 < memory.free_memory(device) <= total
    pipe = tiny_wan(head_dim=64).to(device, torch.bfloat16)
    with enable_dfsattn(pipe, SPARSE, query_block=64, key_block=64, residual_pool=1):
        assert run(pipe).isfinite().all()
