"""The promise of the plug-in, on real pipelines of all families with tiny random weights."""

import gc
import weakref

import pytest
import torch
from tiny_pipelines import FAMILIES, run, tiny_wan, transformers

from dfsattn_diffusers import (
    DFSAttnConfig,
    DFSAttnProcessor,
    disable_dfsattn,
    enable_dfsattn,
)

EVERYTHING = DFSAttnConfig(dense_fraction=0, keep_ratios=(1.0,), query_block=64, key_block=64)
SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)


@pytest.fixture(params=FAMILIES)
def pipe(request):
    return FAMILIES[request.param]()


def processors(pipe):
    return {name: module.attn_processors for name, module in transformers(pipe).items()}


def same_objects(a, b):
    return a.keys() == b.keys() and all(
        a[m].keys() == b[m].keys() and all(a[m][k] is b[m][k] for k in a[m]) for m in a
    )


@pytest.mark.parametrize(
    "order", ["hilbert3d", "hilbert2d", "cuboid", "raster", ("hilbert_fw", "hilbert_fh")], ids=str
)
def test_keeping_everything_equals_dense(pipe, order):
    dense = run(pipe, steps=2)
    with enable_dfsattn(pipe, EVERYTHING, order=order) as handle:
        sparse = run(pipe, steps=2)
    # The same latents through float64 weigh what single precision alone is worth.
    exact = run(pipe.to(dtype=torch.float64), steps=2)
    eager_error = (dense - exact).abs().max()
    assert (sparse - exact).abs().max() <= 4 * eager_error + 1e-6
    report = handle.report().runs[0]
    assert report.density == pytest.approx(1) and report.recall == pytest.approx(1)
    assert report.calls["dense"] == 0


def test_disabling_leaves_no_trace(pipe):
    before, stock = processors(pipe), run(pipe)
    handle = enable_dfsattn(pipe, SPARSE)
    assert not same_objects(processors(pipe), before)
    sparse = run(pipe)
    assert not torch.equal(sparse, stock)
    handle.disable()
    assert same_objects(processors(pipe), before)
    assert torch.equal(run(pipe), stock)
    handle.disable()

    enable_dfsattn(pipe, SPARSE)
    assert torch.equal(run(pipe), sparse)
    disable_dfsattn(pipe)
    disable_dfsattn(pipe)
    assert same_objects(processors(pipe), before)
    assert torch.equal(run(pipe), stock)


def test_runs_repeat(pipe):
    with enable_dfsattn(pipe, SPARSE) as handle:
        first, second = run(pipe), run(pipe)
        handle.reset()
        third = run(pipe)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert len(handle.report().runs) == 1


def test_two_pipelines_do_not_share(pipe):
    other = tiny_wan(seed=7)
    alone = run(pipe), run(other)
    with enable_dfsattn(pipe, SPARSE), enable_dfsattn(other, SPARSE, order="raster"):
        sparse = run(pipe), run(other)
        assert torch.equal(run(pipe), sparse[0])
        assert torch.equal(run(other), sparse[1])
    assert not torch.equal(sparse[0], alone[0]) and not torch.equal(sparse[1], alone[1])

    # One after the other within the same step loop: the second runs inside the first's callback.
    def interlope(*args):
        assert torch.equal(run(other), sparse[1])
        return {}

    with enable_dfsattn(pipe, SPARSE), enable_dfsattn(other, SPARSE, order="raster"):
        assert torch.equal(run(pipe, callback_on_step_end=interlope), sparse[0])


def test_sizes_may_change_between_runs(pipe):
    if pipe.transformer.config.get("use_rotary_positional_embeddings") is False:
        grids = [(5, 9, 11)]
    else:
        grids = [(5, 9, 11), (3, 12, 8)]
    fresh = []
    for grid in grids:
        with enable_dfsattn(pipe, SPARSE):
            fresh.append(run(pipe, grid=grid))
    with enable_dfsattn(pipe, SPARSE):
        for grid, wanted in [*zip(grids, fresh), (grids[0], fresh[0])]:
            assert torch.equal(run(pipe, grid=grid), wanted)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("steps", [4, 7, 20])
def test_schedule_follows_the_pipelines_steps(pipe, steps, guidance):
    with enable_dfsattn(pipe, SPARSE) as handle:
        out = run(pipe, steps=steps, guidance=guidance)
    assert out.isfinite().all()
    report = handle.report().runs[-1]
    assert report.steps == report.num_steps == steps
    branches = 2 if guidance and "CogVideoX" not in type(pipe).__name__ else 1
    layers = len(handle._attachments[0]._modules)
    calls = steps * branches * layers
    dense_steps = {4: 1, 7: 2, 20: 5}[steps]
    assert sum(report.calls.values()) == calls
    assert report.calls["dense"] == dense_steps * branches * layers
    # Wan 2.2's second transformer has no map yet when its turn comes within a segment.
    least = 3 * branches * layers
    most = least + branches * layers * (len(processors(pipe)) - 1)
    assert least <= report.calls["refresh"] <= most
    assert report.dense_reasons == {"first part of the run": report.calls["dense"]}
    assert 0.3 < report.density < 0.8 and 0 < report.recall <= 1 and report.seconds > 0


def test_fifty_steps():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, "paper", tile_size=8, query_block=32, key_block=32) as handle:
        run(pipe, steps=50)
    report = handle.report().runs[0]
    assert report.calls == {"dense": 2 * 2 * 12, "refresh": 2 * 2 * 3, "reuse": 2 * 2 * 35}


def test_an_interrupted_run_does_not_spoil_the_next(pipe):
    class Stop(Exception):
        pass

    def stop_at(step):
        def callback(pipe, index, timestep, tensors):
            if index == step:
                raise Stop
            return {}

        return callback

    with enable_dfsattn(pipe, SPARSE) as handle:
        good = run(pipe, steps=6)
        for step in (0, 2, 5):
            with pytest.raises(Stop):
                run(pipe, steps=6, callback_on_step_end=stop_at(step))
            assert torch.equal(run(pipe, steps=6), good)
    assert [r.steps for r in handle.report().runs] == [6, 1, 6, 3, 6, 6, 6]


def test_rows_of_a_batch_are_independent(pipe):
    prompts = ["a red circle moves right", "a blue square"]
    with enable_dfsattn(pipe, SPARSE):
        both = run(pipe, prompt=prompts, seed=[0, 1])
        alone = [run(pipe, prompt=p, seed=[s]) for s, p in enumerate(prompts)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_bare_processor_does_the_same(pipe):
    steps = 5
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe, steps=steps)
    stock = run(pipe, steps=steps)
    bare = [DFSAttnProcessor(SPARSE, num_inference_steps=steps) for _ in transformers(pipe)]
    for transformer, processor in zip(transformers(pipe).values(), bare):
        transformer.set_attn_processor(processor)
    assert torch.equal(run(pipe, steps=steps), wanted)
    assert torch.equal(run(pipe, steps=steps), wanted)
    assert bare[0].handle.report().runs[0].num_steps == steps
    with pytest.raises(ValueError, match="on already"):
        enable_dfsattn(pipe)
    disable_dfsattn(pipe)
    assert torch.equal(run(pipe, steps=steps), stock)


def test_the_bare_processor_sparse_from_the_first_step(pipe):
    config = SPARSE.replace(dense_fraction=0)
    with enable_dfsattn(pipe, config):
        wanted = run(pipe)
    for transformer in transformers(pipe).values():
        transformer.set_attn_processor(DFSAttnProcessor(config))
    assert torch.equal(run(pipe), wanted)


def test_setting_other_processors_turns_the_bare_way_off():
    pipe = tiny_wan()
    before, stock = pipe.transformer.attn_processors, run(pipe)
    pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE))
    sparse = run(pipe)
    pipe.transformer.set_attn_processor(dict(before))
    assert torch.equal(run(pipe), stock)
    pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE, num_inference_steps=4))
    assert torch.equal(run(pipe), sparse)
    pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE, num_inference_steps=4))
    assert torch.equal(run(pipe), sparse)
    disable_dfsattn(pipe)
    assert torch.equal(run(pipe), stock)


def test_an_unbound_bare_processor_can_be_taken_back():
    pipe = tiny_wan()
    stock = run(pipe)
    pipe.transformer.set_attn_processor(DFSAttnProcessor(SPARSE))
    disable_dfsattn(pipe)
    assert torch.equal(run(pipe), stock)


def test_a_bare_processor_that_was_never_called_leaves_no_hook():
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = dict(hooks)
    processor = DFSAttnProcessor(SPARSE)
    assert len(hooks) == len(before) + 1
    del processor
    gc.collect()
    torch.nn.Identity()(0)
    assert hooks == before


@pytest.mark.parametrize("variant", ["cogvideox-2b", "cogvideox-5b"])
def test_fused_projections_before_and_while_enabled(variant):
    pipe = FAMILIES[variant]()
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe)
    with enable_dfsattn(pipe, SPARSE) as handle:
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(run(pipe), wanted, atol=1e-4, rtol=1e-4)
        assert handle.report().runs[0].calls["reuse"] + handle.report().runs[0].calls["refresh"] > 0
    names = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
    assert names == {"FusedCogVideoXAttnProcessor2_0"}
    fused = run(pipe)
    with enable_dfsattn(pipe, SPARSE):
        torch.testing.assert_close(run(pipe), wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(run(pipe), fused)


def test_fused_wan_projections():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe)
        for block in pipe.transformer.blocks:
            block.attn1.fuse_projections()
        torch.testing.assert_close(run(pipe), wanted, atol=1e-4, rtol=1e-4)


def test_branches_have_their_own_maps_unless_shared(pipe):
    with enable_dfsattn(pipe, SPARSE) as handle:
        own = run(pipe)
    refreshes = handle.report().runs[0].calls["refresh"]
    with enable_dfsattn(pipe, SPARSE, share_maps_across_branches=True) as handle:
        shared = run(pipe)
    separate_calls = "CogVideoX" not in type(pipe).__name__
    assert torch.equal(own, shared) != separate_calls
    factor = 2 if separate_calls else 1
    assert handle.report().runs[0].calls["refresh"] * factor == refreshes


def test_dense_layers_and_small_videos_stay_dense(pipe):
    stock = run(pipe)
    with enable_dfsattn(pipe, SPARSE) as handle:
        layers = len(handle._attachments[0]._modules)
    with enable_dfsattn(pipe, SPARSE, dense_layers=range(layers)) as handle:
        torch.testing.assert_close(run(pipe), stock, atol=1e-4, rtol=1e-4)
    assert set(handle.report().runs[0].dense_reasons) == {"dense layer"}
    with enable_dfsattn(pipe, SPARSE, min_tokens=10_000) as handle:
        run(pipe)
    assert set(handle.report().runs[0].dense_reasons) == {"fewer than 10000 video tokens"}
    assert handle.report().runs[0].density == 1 and handle.report().runs[0].recall is None


def test_text_padding_does_not_matter():
    pipe = FAMILIES["hunyuan_video"]()
    with enable_dfsattn(pipe, SPARSE):
        short = run(pipe, max_sequence_length=30)
        long = run(pipe, max_sequence_length=70)
    torch.testing.assert_close(short, long, atol=1e-4, rtol=1e-4)


def test_other_parts_of_the_model_are_left_alone():
    wan, hunyuan = tiny_wan(), FAMILIES["hunyuan_video"]()
    before = {**processors(wan)["transformer"], **processors(hunyuan)["transformer"]}
    enable_dfsattn(wan), enable_dfsattn(hunyuan)
    after = {**processors(wan)["transformer"], **processors(hunyuan)["transformer"]}
    left = {name for name in before if before[name] is after[name]}
    assert left == {name for name in before if "attn2" in name or "context_embedder" in name}


def test_the_users_attention_backend_is_kept():
    pipe = tiny_wan()
    pipe.transformer.set_attention_backend("_native_math")
    with enable_dfsattn(pipe, SPARSE):
        ours = [p for n, p in pipe.transformer.attn_processors.items() if "attn1" in n]
        assert all(p._attention_backend == "_native_math" for p in ours)


def test_a_dropped_pipeline_is_freed():
    pipe = tiny_wan()
    enable_dfsattn(pipe, SPARSE)
    run(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_a_transformer_alone():
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe)
    with enable_dfsattn(pipe.transformer, SPARSE):
        assert torch.equal(run(pipe), wanted)


def test_cpu_offload_hooks_before_and_after(monkeypatch):
    pipe = tiny_wan()
    with enable_dfsattn(pipe, SPARSE):
        wanted = run(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with enable_dfsattn(pipe, SPARSE):
        assert torch.equal(run(pipe), wanted) and torch.equal(run(pipe), wanted)
