"""No device sync in the step loop beyond what the stock pipeline does."""

import pytest
import torch
from tiny_pipelines import FAMILIES, run, transformers
from torch.utils._python_dispatch import TorchDispatchMode

import dfsattn_diffusers.attention
from dfsattn_diffusers import DFSAttnConfig, DFSAttnProcessor, enable_dfsattn
from dfsattn_diffusers.kernels.backends import AttentionCall
from dfsattn_diffusers.kernels.tail import add_tail

SPARSE = DFSAttnConfig(keep_ratios=(0.5, 0.4, 0.3), tile_size=8, query_block=32, key_block=32)
BEYOND = SPARSE.replace(tail="moment", tail_pool=16, budget="layer", selection="error")
CORRECTED = BEYOND.replace(order=("hilbert3d", "hilbert2d", "hilbert_fw"), residual_pool=8)
# Operators whose result the host waits for on an accelerator, whatever device the tests run on.
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "is_nonzero")


class SyncCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean_index = name in ("index", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        self.count += boolean_index or any(name.startswith(s) for s in SYNCS)
        return func(*args, **(kwargs or {}))


def dense_masked(q, k, v, block_map, *, key_lengths, output_order, out, scale, tail, **_):
    """Stands in for the kernel, whose CPU reference may look at the counts."""
    lengths = torch.arange(block_map.key_block) < key_lengths[..., None]
    mask = block_map.to_mask().repeat_interleave(block_map.query_block, 2)
    mask = mask.repeat_interleave(block_map.key_block, 3) & lengths.flatten(1)[:, None, None]
    logits = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    result, lse = logits.softmax(-1) @ v, logits.logsumexp(-1)
    # Padding rows land on a spare row, so that no boolean index is needed.
    spare = out.new_empty(*out.shape[:2], out.shape[2] + 1, out.shape[3])
    target = torch.where(output_order < 0, out.shape[2], output_order).long()
    spare.scatter_(2, target[..., None].expand_as(result), result)
    out.copy_(spare[:, :, :-1])
    if tail is not None:
        add_tail(
            AttentionCall(
                q, k, v, block_map, scale, key_lengths, 0, output_order, out, lse, tail
            )
        )


def syncs(pipe, steps):
    with SyncCounter() as counter:
        out = run(pipe, steps=steps)
    return counter.count, out


@pytest.mark.parametrize("way", ["enable", "bare"])
@pytest.mark.parametrize(
    "config", [SPARSE, BEYOND, CORRECTED], ids=["paper", "beyond", "corrected"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_sync_in_the_step_loop(family, way, config, monkeypatch):
    pipe = FAMILIES[family]()
    stock = {steps: syncs(pipe, steps)[0] for steps in (4, 12)}
    with enable_dfsattn(pipe, config):
        wanted = run(pipe, steps=12)
    monkeypatch.setattr(dfsattn_diffusers.attention, "block_sparse_attention", dense_masked)
    if way == "enable":
        enable_dfsattn(pipe, config)
    else:
        for transformer in transformers(pipe).values():
            transformer.set_attn_processor(DFSAttnProcessor(config))
    # The first run finds out whether the backend serves the model.
    run(pipe)
    ours = {steps: syncs(pipe, steps) for steps in (4, 12)}
    torch.testing.assert_close(ours[12][1], wanted, atol=1e-4, rtol=1e-4)
    # What building the token layout costs once per run must not grow with the steps.
    assert ours[12][0] - ours[4][0] == stock[12] - stock[4]
