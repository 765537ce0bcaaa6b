"""Every mistake gets a message that says what was wrong, what was wanted and what to do."""

from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import FAMILIES, run, tiny_wan

import dfsattn_diffusers
from dfsattn_diffusers import DFSAttnProcessor, enable_dfsattn, list_models
from dfsattn_diffusers.kernels import list_backends
from dfsattn_diffusers.processors import ModelAdapter, register_adapter

SPARSE = dict(config="paper", tile_size=8, query_block=32, key_block=32)


def test_unknown_transformer_lists_the_known_ones():
    with pytest.raises(ValueError, match="Linear is not supported") as error:
        enable_dfsattn(torch.nn.Linear(2, 2))
    assert all(name in str(error.value) for name in list_models())
    assert set(list_models()) >= {
        "WanTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "CogVideoXTransformer3DModel",
    }


def test_pipeline_without_a_transformer():
    with pytest.raises(ValueError, match="SimpleNamespace has no transformer that DFSAttn could"):
        enable_dfsattn(SimpleNamespace(unet=torch.nn.Linear(2, 2)))


def test_one_unsupported_transformer_leaves_the_other_untouched():
    pipe = tiny_wan()
    before = pipe.transformer.attn_processors
    pipe.transformer_2 = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear is not supported"):
        enable_dfsattn(pipe)
    assert pipe.transformer.attn_processors == before


@pytest.mark.parametrize("family", FAMILIES)
def test_enabling_twice(family):
    pipe = FAMILIES[family]()
    with enable_dfsattn(pipe), pytest.raises(ValueError, match="on already.*disable_dfsattn"):
        enable_dfsattn(pipe)
    pipe.transformer.set_attn_processor(DFSAttnProcessor())
    with pytest.raises(ValueError, match="on already.*disable_dfsattn"):
        enable_dfsattn(pipe)


def test_unknown_preset_field_and_backend():
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="Unknown preset 'best'; known presets are"):
        enable_dfsattn(pipe, "best")
    with pytest.raises(ValueError, match="Unknown config field 'sparsity'"):
        enable_dfsattn(pipe, sparsity=0.3)
    with pytest.raises(ValueError, match="backend must be auto or one of") as error:
        enable_dfsattn(pipe, backend="cuda")
    assert all(name in str(error.value) for name in list_backends())
    assert run(pipe).isfinite().all()


def test_dense_layers_that_do_not_exist():
    pipe = tiny_wan()
    with pytest.raises(ValueError, match=r"dense_layers must name layers from 0 to 1 .* got \[7\]"):
        enable_dfsattn(pipe, dense_layers=(0, 7))
    assert run(pipe).isfinite().all()


def test_backend_that_cannot_do_it_is_refused_before_any_step():
    """Head dim 16 in float32 on a CPU: nothing for the Triton kernel."""
    pipe, steps = tiny_wan(), []
    enable_dfsattn(pipe, **SPARSE, backend="triton")
    with pytest.raises(ValueError, match="triton"):
        run(pipe, callback_on_step_end=lambda *a: steps.append(1) or {})
    assert not steps


def test_grid_that_does_not_match_the_tokens():
    pipe = tiny_wan()
    enable_dfsattn(pipe, **SPARSE)
    pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda module, args: (torch.cat([args[0], args[0][:, :1]], 1), *args[1:])
    )
    # Rotary embedding would fail on the longer sequence first.
    for block in pipe.transformer.blocks:
        block.register_forward_pre_hook(lambda module, args: (*args[:3], None))
    with pytest.raises(ValueError, match=r"got 496 tokens, but the grid \(5, 9, 11\).* has 495"):
        run(pipe)


@pytest.mark.parametrize("kind, word", [("ring", "Ring"), ("ulysses", "Ulysses")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_context_parallelism_is_refused(kind, word, when):
    pipe = tiny_wan()
    config = SimpleNamespace(
        context_parallel_config=SimpleNamespace(
            ring_degree=2 if kind == "ring" else 1, ulysses_degree=2 if kind == "ulysses" else 1
        )
    )

    def parallelise():
        for processor in pipe.transformer.attn_processors.values():
            processor._parallel_config = config

    if when == "before":
        parallelise()
        with pytest.raises(ValueError, match=f"{word} context parallelism"):
            enable_dfsattn(pipe)
        return
    enable_dfsattn(pipe)
    parallelise()
    with pytest.raises(ValueError, match=f"{word} context parallelism"):
        run(pipe)


def test_blocks_called_without_their_transformer():
    pipe = tiny_wan()
    enable_dfsattn(pipe)
    with pytest.raises(RuntimeError, match="outside a call of its transformer"):
        pipe.transformer.blocks[0].attn1(torch.zeros(1, 4, 32))
    pipe.transformer.set_attn_processor(DFSAttnProcessor())
    with pytest.raises(RuntimeError, match="DFSAttnProcessor ran before its transformer"):
        pipe.transformer.blocks[0].attn1(torch.zeros(1, 4, 32))


def test_bare_processor_arguments():
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1; got 0"):
        DFSAttnProcessor(num_inference_steps=0)
    with pytest.raises(ValueError, match="Unknown preset"):
        DFSAttnProcessor("best")


def test_a_family_registers_once():
    adapter = ModelAdapter("WanTransformer3DModel", object, bool, dict, dict)
    with pytest.raises(ValueError, match="WanTransformer3DModel is registered already"):
        register_adapter(adapter)


@pytest.mark.parametrize("found", ["0.41.0", "0.43.0", "1.0.0.dev0"])
def test_unsupported_diffusers(monkeypatch, found):
    from dfsattn_diffusers import _versions

    monkeypatch.setattr(_versions.importlib.metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=f"diffusers>=0.42,<0.43; found {found}. Run: pip"):
        _versions.check_host_version()


def test_public_names_exist():
    assert all(hasattr(dfsattn_diffusers, name) for name in dfsattn_diffusers.__all__)


def test_fp8_where_no_kernel_has_it_is_refused_before_any_step():
    pipe, steps = tiny_wan(), []
    enable_dfsattn(pipe, **SPARSE, precision="fp8")
    with pytest.raises(ValueError, match="fp8"):
        run(pipe, callback_on_step_end=lambda *a: steps.append(1) or {})
    assert not steps
