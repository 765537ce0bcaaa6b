"""Kernels need torch alone; without triton its backend says so."""

import subprocess
import sys

SCRIPT = """
import sys, types
from pathlib import Path
for name in ("diffusers", "transformers", "triton"):
    sys.modules[name] = None
package = types.ModuleType("dfsattn_diffusers")
package.__path__ = [sys.argv[1]]
sys.modules["dfsattn_diffusers"] = package
import torch
from dfsattn_diffusers.kernels import BlockMap, block_sparse_attention, explain, list_backends
from dfsattn_diffusers.kernels.prologue import Stream, prepare_qkv
assert "triton" in list_backends()
q = torch.ones(1, 1, 3, 64)
block_map = BlockMap.full(1, 1, 1, 1, query_block=64, key_block=64)
assert torch.equal(block_sparse_attention(q, q, q, block_map), q)
print(explain(q, q, q, block_map))
assert torch.equal(prepare_qkv([Stream(q, q, q)]).v, q.transpose(1, 2))
try:
    block_sparse_attention(q, q, q, block_map, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_diffusers_and_triton():
    import dfsattn_diffusers

    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, dfsattn_diffusers.__path__[0]],
        capture_output=True, text=True, check=True,
    )
    chosen, refused = run.stdout.splitlines()
    for name in ("gluon_hopper", "triton"):
        assert f"not {name}: import of triton halted" in chosen
    assert refused.startswith("backend 'triton' cannot do this call: import of triton halted")
