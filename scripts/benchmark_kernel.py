"""Time sparse attention kernels beside dense cuDNN and FlexAttention, on one CUDA GPU.

Times are the GPU's alone: every call is queued behind other work, which leaves nothing of the
inputs in the cache. Values and maps are random and new in every run. A kernel that is not right is
not timed; the others are, and every row is written as soon as it is there.
"""

import sys
import traceback
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import astuple, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from benchmark_tools import Rows, about, device_ms
from kernel_problems import BLOCK, Problem, WrongOutput, check, spots
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dfsattn_diffusers.kernels import block_sparse_attention, list_backends
from dfsattn_diffusers.kernels.backends import AttentionCall, load_backend, precisions_of

# Heads, tokens, head dim of one attention call.
SHAPES = {
    "wan-720p": (40, 75_600, 128),
    "hunyuan-720p": (24, 119_056, 128),
    "hunyuan-480p": (24, 44_816, 128),
    "cogvideox": (48, 17_776, 64),
}
# Ragged and small enough to compare every row.
GATE_SHAPE = (3, 1_000)
DENSE = "dense cuDNN (SDPA)"
# With pools of 64 tokens for what is not kept, as the presets have.
POOL, TAIL = 64, ", tail of 64"


def as_call(problem):
    q = problem.q
    return AttentionCall(
        q, problem.k, problem.v, problem.block_map, scale=q.shape[-1] ** -0.5, key_lengths=None,
        full_key_blocks=q.shape[2] // BLOCK, output_order=None, out=torch.empty_like(q), lse=None,
    )


def offers():
    """Our backends and the precisions of each, with what tells them apart in a table."""
    for name in list_backends():
        for precision in precisions_of(load_backend(name)):
            yield name, precision, f"ours: {name}" + (", int8" if precision == "int8" else "")


def sparse_kernels(extra_settings, dtype):
    """Our backends by name, and the Triton kernel by what differs from its launch table."""

    def public(name, precision):
        return lambda problem: lambda: block_sparse_attention(
            problem.q, problem.k, problem.v, problem.block_map, backend=name, precision=precision,
            tail=problem.tail,
        )

    def launched(change):
        backend = load_backend("triton")

        def prepare(problem):
            call = as_call(problem)
            settings = change(backend.settings_for(call))
            return lambda: (backend.launch(call, settings), call.out)[1]

        return prepare

    small = Problem.random(*GATE_SHAPE, 128, 0.3, dtype)
    kernels = {
        title: public(name, precision)
        for name, precision, title in offers()
        if name != "reference" and load_backend(name).why_not(as_call(small)) is None
    }
    kernels |= {name + TAIL: kernel for name, kernel in kernels.items()}
    kernels["ours: triton, pointers"] = launched(lambda table: replace(table, tma=False))
    for settings in extra_settings:
        *numbers, tma = astuple(settings)
        text = ",".join(map(str, [*numbers, "tma" if tma else "pointers"]))
        kernels[f"ours: triton, {text}"] = launched(lambda table, s=settings: s)
    return kernels


def dense_kernel(problem):
    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(problem.q, problem.k, problem.v)

    return run


def flex_kernel(problem, **options):
    """FlexAttention over the same blocks, compiled; all count as full, so there is no mask."""
    counts = problem.mask.sum(-1, dtype=torch.int32)
    indices = problem.mask.byte().argsort(dim=-1, descending=True, stable=True).int()
    tokens = problem.q.shape[2]
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices, BLOCK_SIZE=BLOCK,
        seq_lengths=(tokens, tokens),
    )
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        problem.q, problem.k, problem.v, block_mask=block_mask, kernel_options=options or None
    )


FLEX = {
    "FlexAttention": flex_kernel,
    "FlexAttention, TMA": lambda problem: flex_kernel(problem, USE_TMA=True),
}


def attempt(name, function, failed):
    """What a function returns; None where it fails, which is printed and, if it matters, noted."""
    try:
        return function()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        print(f"{name}: {reason[:200]}", file=sys.stderr, flush=True)
        wrong = isinstance(error, WrongOutput)
        # A missing cuDNN or Flex option is no failure; ours must run, and what runs must be right.
        if wrong or name.startswith("ours"):
            failed.append(name)
            if not wrong:
                traceback.print_exc()


def for_kernel(name, problem):
    """The problem, with a tail where the kernel's name says so."""
    return problem.with_tail(POOL) if name.endswith(TAIL) else problem


def measure(name, prepare, problem, iterations):
    """What one kernel's row says of it; nothing checks the dense one."""
    dense = name == DENSE
    problem = for_kernel(name, problem)
    function = prepare(problem)
    out, error = function(), None
    if not dense:
        error = check(problem, out, spots(problem), torch.float32, fp8="fp8" in name)
    del out
    ms = device_ms(function, iterations)
    density = 1.0 if dense else problem.mask.float().mean().item()
    tflops = problem.flops(dense) / ms / 1e9
    row = dict(density=density, kernel=name, ms=ms, tflops=tflops, error=error)
    if problem.tail is not None:
        row["pools"] = problem.flops() / replace(problem, tail=None).flops() - 1
    return row


def benchmark(shape, density, kind, args, rows, failed):
    """Add the rows of one shape, and the names of kernels that fail."""
    problem = Problem.random(*SHAPES[shape], density, args.dtype, kind)
    for name, prepare in args.kernels.items():
        measured = partial(measure, name, prepare, problem, args.iters)
        row = attempt(f"{name}, {shape}, {kind} {density:g}", measured, failed)
        if row is None:
            continue
        rows.add(dict(shape=shape, maps=kind, **row))
        cells = shape, kind, f"{row['density']:.2g}", name, f"{row['ms']:.2f}"
        cells += f"{row['tflops']:.0f}", "-" if row["error"] is None else f"{row['error']:.2%}"
        print(f"| {' | '.join(cells)} |", flush=True)


def gate(kernels, dtype, failed):
    """The kernels that are right in every row of small ragged problems, against float64."""
    for head_dim in (64, 128):
        problem = Problem.random(*GATE_SHAPE, head_dim, 0.3, dtype)
        rows = list(product(*map(range, problem.mask.shape[1:3])))

        def error_of(name, prepare, problem=problem, rows=rows):
            problem = for_kernel(name, problem)
            return check(problem, prepare(problem)(), rows, torch.float64, fp8="fp8" in name)

        kernels = {
            name: prepare
            for name, prepare in kernels.items()
            if attempt(name, partial(error_of, name, prepare), failed) is not None
        }
    return kernels


def launch_settings(text):
    key_tile, num_warps, num_stages, *tma = text.split(",")
    if tma not in ([], ["tma"]):
        raise ValueError(text)
    make = load_backend("triton").LaunchSettings
    return make(int(key_tile), int(num_warps), int(num_stages), bool(tma))


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="what to time")
    add("--densities", nargs="+", type=float, default=[0.2], help="kept share of the key blocks")
    add("--maps", nargs="+", choices=["even", "uneven"], default=["even"],
        help="rows that keep the same number of blocks, or very different numbers")
    add("--iters", type=int, default=10, help="timed runs, after 3 for warm-up")
    add("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of q, k and v")
    add("--no-flex", dest="flex", action="store_false", help="leave out FlexAttention")
    add("--settings", nargs="*", type=launch_settings, default=[], metavar="LAUNCH",
        help="also time the Triton kernel with key tile, warps and stages like 128,8,3,tma")
    add("--seed", type=int, help="of the random values; another one every time by default")
    add("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch sees none")
    if any(not 0 < density <= 1 for density in args.densities):
        parser.error(f"--densities must lie in (0, 1], got {args.densities}")

    seed = torch.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    args.dtype = getattr(torch, args.dtype)
    failed = []
    sparse = gate(sparse_kernels(args.settings, args.dtype), args.dtype, failed)
    args.kernels = {DENSE: dense_kernel} | sparse | (FLEX if args.flex else {})

    record = about(
        dtype=str(args.dtype).removeprefix("torch."),
        seed=seed,
        iterations=args.iters,
        shapes={name: SHAPES[name] for name in args.shapes},
    )
    print(", ".join(f"{key} {record[key]}" for key in ("gpu", "torch", "triton", "dtype", "date")))
    header = "shape", "maps", "density", "kernel", "ms", "TFLOP/s of kept work", "error"
    print(f"\n| {' | '.join(header)} |\n" + "|---" * len(header) + "|")
    rows = Rows(args.output, record)
    with torch.no_grad():
        for density, shape, kind in product(args.densities, args.shapes, args.maps):
            benchmark(shape, density, kind, args, rows, failed)
    if failed:
        sys.exit(f"not timed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
