"""torch.compile: one graph for all layers, the same videos, nothing compiled twice."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from tiny_pipelines import FAMILIES, GRID, run, tiny_wan, transformers

from dfsattn_diffusers import DFSAttnConfig, DFSAttnProcessor, dense, enable_dfsattn
from dfsattn_diffusers.kernels.prologue import Stream
from dfsattn_diffusers.layout import TokenGeometry
from dfsattn_diffusers.processors import LayerProcessor
from dfsattn_diffusers.processors.opaque import opaque_attend
from dfsattn_diffusers.state import DFSAttnState, Forward, Position

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)
# Dense, three refreshes, reuse.
STEPS = 5


@pytest.fixture(params=["wan", "hunyuan_video", "cogvideox-5b"])
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler backend that keeps the graphs it is given."""

    def __init__(self, backend="eager"):
        self._compile = torch._dynamo.lookup_backend(backend)
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self._compile(graph, inputs)

    def attentions(self):
        """Attention calls of each graph."""
        attend = torch.ops.dfsattn.attend.default
        counts = []
        for graph in self.graphs:
            targets = [node.target for node in graph.graph.nodes]
            counts.append(sum(target in (attend, opaque_attend) for target in targets))
        return counts


def blocks_of(transformer):
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for name in names for block in getattr(transformer, name, ())]


def compile_blocks(pipe, **options):
    # As `compile_repeated_blocks`, which does not know CogVideoX's blocks.
    for transformer in transformers(pipe).values():
        for block in blocks_of(transformer):
            block.compile(fullgraph=True, **options)


def eager_run(pipe, config=SPARSE):
    """The latents, and the kinds of blocks: class and memory layout of the input."""
    kinds = set()

    def note(block, inputs, kwargs):
        hidden_states = inputs[0] if inputs else kwargs["hidden_states"]
        kinds.add((type(block), hidden_states.stride()))

    blocks = [block for t in transformers(pipe).values() for block in blocks_of(t)]
    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    with enable_dfsattn(pipe, config):
        latents = run(pipe, steps=STEPS)
    for hook in hooks:
        hook.remove()
    return latents, kinds


def test_one_graph_for_all_layers_and_steps(family):
    pipe = FAMILIES[family](layers=3)
    wanted, kinds = eager_run(pipe)
    handle = enable_dfsattn(pipe, SPARSE)
    counting = Counting("aot_eager")
    compile_blocks(pipe, backend=counting)
    after_step = []

    def note(pipe, step, timestep, tensors):
        after_step.append(len(counting.graphs))
        return tensors

    latents = run(pipe, steps=STEPS, callback_on_step_end=note)
    assert torch.equal(latents, wanted)
    assert after_step == [len(kinds)] * STEPS
    assert counting.attentions() == [1] * len(kinds)
    assert all(handle.report().runs[-1].calls.values())


def test_a_whole_transformer_is_one_graph(family):
    pipe = FAMILIES[family]()
    wanted, _ = eager_run(pipe)
    enable_dfsattn(pipe, SPARSE)
    counting = Counting()
    layers = len(blocks_of(pipe.transformer))
    pipe.transformer = torch.compile(pipe.transformer, backend=counting)
    assert torch.equal(run(pipe, steps=STEPS), wanted)
    assert counting.attentions() == [layers]


def test_off_and_on_again_after_compiling():
    pipe = tiny_wan()
    stock = run(pipe, steps=STEPS)
    wanted, kinds = eager_run(pipe)
    counting = Counting()
    compile_blocks(pipe, backend=counting)
    assert torch.equal(run(pipe, steps=STEPS), stock)
    handle = enable_dfsattn(pipe, SPARSE)
    assert torch.equal(run(pipe, steps=STEPS), wanted)
    handle.disable()
    assert torch.equal(run(pipe, steps=STEPS), stock)
    with enable_dfsattn(pipe, SPARSE):
        assert torch.equal(run(pipe, steps=STEPS), wanted)
    assert sorted(counting.attentions()) == [0] * len(kinds) + [1] * len(kinds)


def test_pipelines_share_a_graph_and_nothing_else():
    configs = SPARSE, SPARSE.replace(keep_ratios=(0.2,), order="raster")
    pipes = [tiny_wan(seed=seed) for seed in (0, 1)]
    wanted = [eager_run(pipe, config)[0] for pipe, config in zip(pipes, configs)]
    counting = Counting()
    for pipe, config in zip(pipes, configs):
        enable_dfsattn(pipe, config)
        compile_blocks(pipe, backend=counting)
    for _ in range(2):
        assert all(torch.equal(run(p, steps=STEPS), w) for p, w in zip(pipes, wanted))
    assert counting.attentions() == [1]


def test_bare_on_compiled_blocks(family):
    pipe = FAMILIES[family]()
    wanted, kinds = eager_run(pipe)
    counting = Counting()
    compile_blocks(pipe, backend=counting)
    pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE))
    assert torch.equal(run(pipe, steps=STEPS), wanted)
    # The call during which it binds runs with stock processors.
    assert sorted(counting.attentions()) == [0] * len(kinds) + [1] * len(kinds)


def test_another_size_is_one_more_graph_at_most():
    pipe = tiny_wan()
    grids = (5, 9, 11), (3, 6, 7), (4, 5, 8), (2, 12, 10)
    with enable_dfsattn(pipe, SPARSE):
        wanted = [run(pipe, steps=STEPS, grid=grid) for grid in grids]
    enable_dfsattn(pipe, SPARSE)
    counting = Counting()
    compile_blocks(pipe, backend=counting)
    for grid, latents in zip(grids, wanted):
        assert torch.equal(run(pipe, steps=STEPS, grid=grid), latents)
    assert counting.attentions() == [1, 1]


def test_the_users_attention_backend_counts(monkeypatch):
    backends = []

    def dispatch(*args, backend=None, **kwargs):
        backends.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr(dense, "dispatch_attention_fn", dispatch)
    pipe = tiny_wan()
    enable_dfsattn(pipe, SPARSE)
    compile_blocks(pipe, backend="eager")
    run(pipe, steps=2)
    pipe.transformer.set_attention_backend("_native_math")
    run(pipe, steps=2)
    half = len(backends) // 2
    assert set(backends[:half]) == {None} and half
    assert set(backends[half:]) == {AttentionBackendName("_native_math")}


def test_errors_come_through():
    pipe = tiny_wan()
    enable_dfsattn(pipe, SPARSE)
    compile_blocks(pipe, backend="eager")
    inputs = []
    block = pipe.transformer.blocks[0]
    hook = block.register_forward_pre_hook(lambda block, args: inputs.append(args))
    run(pipe, steps=1)
    hook.remove()
    with pytest.raises(RuntimeError, match="outside a call of its transformer"):
        block(*inputs[0])


def one_layer():
    """A layer in a sparse step, and the arguments of one attention call."""
    state = DFSAttnState(SPARSE.replace(dense_fraction=0))
    geometry = TokenGeometry(GRID)
    position = Position(step=0, num_steps=1, branch="call 0")
    state.begin_forward(Forward("transformer", position, geometry, None, torch.device("cpu")))
    layer = LayerProcessor(state, 0)
    qkv = [torch.randn(1, geometry.tokens, 2, 16) for _ in "qkv"]
    return layer, (layer.handle, *qkv, None, False)


def test_the_operator_keeps_its_word():
    layer, arguments = one_layer()
    wanted = layer.attend([Stream(*arguments[1:4])])
    assert torch.equal(opaque_attend(*arguments), wanted)
    torch.library.opcheck(opaque_attend, arguments)
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.dfsattn.attend.default.tags


def test_handles_are_unique_and_keep_nothing_alive():
    layer, _ = one_layer()
    copies = [layer, copy.copy(layer), copy.deepcopy(layer), LayerProcessor(layer.state, 0)]
    assert len({int(each.handle) for each in copies}) == len(copies)

    pipe = tiny_wan()
    handle = enable_dfsattn(pipe, SPARSE)
    compile_blocks(pipe, backend="eager")
    run(pipe, steps=STEPS)
    ours = [weakref.ref(block.attn1.processor) for block in pipe.transformer.blocks]
    handle.disable()
    del handle
    gc.collect()
    assert [processor() for processor in ours] == [None] * len(ours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_inductor_and_cuda_graphs(family, what, mode):
    pipe = FAMILIES[family](head_dim=64).to("cuda")
    config = SPARSE.replace(tile_size=16, query_block=64, key_block=64)
    wanted, _ = eager_run(pipe, config)
    enable_dfsattn(pipe, config)
    if what == "blocks":
        compile_blocks(pipe, mode=mode)
    else:
        pipe.transformer = torch.compile(pipe.transformer, mode=mode)

    def next_step(pipe, step, timestep, tensors):
        # Graphs of one step follow each other; without this every block would start anew.
        torch.compiler.cudagraph_mark_step_begin()
        return tensors

    counters = torch._dynamo.utils.counters["inductor"]
    counters.clear()
    torch.compiler.cudagraph_mark_step_begin()
    for _ in range(2):
        latents = run(pipe, steps=STEPS, callback_on_step_end=next_step)
        torch.testing.assert_close(latents, wanted, atol=2e-3, rtol=2e-3)
    if mode == "reduce-overhead" and hasattr(torch.Tag, "cudagraph_unsafe"):
        assert counters["cudagraph_skips"] == 0
