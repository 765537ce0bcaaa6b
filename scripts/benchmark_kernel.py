"""Time sparse attention kernels beside dense cuDNN and FlexAttention, on one CUDA GPU.

Values and maps are random and new in every run. A kernel that is not right is not timed.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from benchmark_tools import about, milliseconds, write_json
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dfsattn_diffusers.kernels import BlockMap, block_sparse_attention, list_backends
from dfsattn_diffusers.kernels.backends import AttentionCall, load_backend

# Heads, tokens, head dim of one attention call.
SHAPES = {
    "wan-720p": (40, 75_600, 128),
    "hunyuan-720p": (24, 119_056, 128),
    "hunyuan-480p": (24, 44_816, 128),
    "cogvideox": (48, 17_776, 64),
}
# Ragged and small enough to compare every row.
GATE_SHAPE = (3, 1_000)
BLOCK = 128


@dataclass
class Problem:
    """Random q, k, v, `[1, H, N, D]`, and a random map that keeps the diagonal."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    block_map: BlockMap

    @classmethod
    def random(cls, heads, tokens, head_dim, density, dtype, kind="even"):
        num_blocks = -(-tokens // BLOCK)
        qkv = (torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=dtype) for _ in "qkv")
        scores = torch.rand(1, heads, num_blocks, num_blocks, device="cuda")
        if kind == "even":
            count = max(1, round(density * num_blocks))
        else:
            scores = scores ** _thrift(heads, num_blocks)
            count = num_blocks
        scores.diagonal(dim1=2, dim2=3).fill_(2)
        if kind == "even":
            kept = scores.topk(count, sorted=False).indices
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
        else:
            mask = scores >= _top_share(scores, density)
            mask[:, :, -2:] = True
        block_map = BlockMap.from_mask(mask, query_block=BLOCK, key_block=BLOCK, max_count=count)
        return cls(*qkv, mask, block_map)

    def flops(self, dense=False):
        """Of the two matrix products, for the pairs that are kept."""
        heads, tokens, head_dim = self.q.shape[1:]
        if dense:
            return 4 * head_dim * heads * tokens**2
        start = torch.arange(0, tokens, BLOCK, device="cuda")
        lengths = (tokens - start).clamp(max=BLOCK).double()
        return 4 * head_dim * (self.mask.double() @ lengths @ lengths).sum().item()

    def row(self, head, row, dtype):
        """One query block's output by dense attention in `dtype`."""
        q = self.q[0, head, row * BLOCK : (row + 1) * BLOCK].to(dtype)
        k, v = (x[0, head].to(dtype) for x in (self.k, self.v))
        mask = self.mask[0, head, row].repeat_interleave(BLOCK)[: len(k)]
        logits = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return logits.softmax(-1) @ v


def _thrift(heads, rows):
    """Exponents that make some heads and rows keep many times as much as others."""
    by_row = torch.rand(1, heads, rows, 1, device="cuda").square()
    by_head = torch.rand(1, heads, 1, 1, device="cuda")
    return 1 / (by_row * by_head + 0.03)


def _top_share(scores, share):
    """The score that about this share of a sample reaches."""
    sample = scores.flatten()[torch.randint(scores.numel(), (2**22,), device=scores.device)]
    return sample.quantile(1 - share)


def check(name, problem, out, rows, exact_dtype):
    """Exit unless the rows err no more than twice as much as eager code, plus one rounding.

    Code in fp8 may err by its own rounding, up to 1 / 8 of the largest value.
    """
    fp8 = "fp8" in name
    for head, row in rows:
        exact = problem.row(head, row, exact_dtype)
        allowed = 2 * (problem.row(head, row, out.dtype) - exact).abs().max()
        allowed += (1 / 8 if fp8 else torch.finfo(out.dtype).eps) * exact.abs().max()
        got = out[0, head, row * BLOCK : (row + 1) * BLOCK]
        error = (got - exact).abs().max()
        if not error <= allowed:
            sys.exit(
                f"{name} is wrong at {list(out.shape)}, head {head}, query block {row}: error "
                f"{error:.2e}, allowed {allowed:.2e}; nothing was timed"
            )


def spots(problem, count=6):
    """Some query blocks, the last one of the last head among them."""
    heads, num_rows = problem.mask.shape[1:3]
    picks = torch.randint(heads * num_rows, (count,)).tolist()
    return [(heads - 1, num_rows - 1), *(divmod(pick, num_rows) for pick in picks)]


def as_call(problem):
    q = problem.q
    return AttentionCall(
        q, problem.k, problem.v, problem.block_map, scale=q.shape[-1] ** -0.5, key_lengths=None,
        full_key_blocks=q.shape[2] // BLOCK, output_order=None, out=torch.empty_like(q), lse=None,
    )


def precision_of(name):
    return getattr(load_backend(name), "PRECISION", "full")


def sparse_kernels(extra_settings, dtype):
    """Our backends by name, and the Triton kernel by what differs from its launch table."""

    def public(name):
        precision = precision_of(name)
        return lambda problem: lambda: block_sparse_attention(
            problem.q, problem.k, problem.v, problem.block_map, backend=name, precision=precision
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
        f"ours: {name}": public(name)
        for name in list_backends()
        if name != "reference" and load_backend(name).why_not(as_call(small)) is None
    }
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


def benchmark(shape, density, kind, args):
    """Rows of the table for one shape."""
    problem = Problem.random(*SHAPES[shape], density, args.dtype, kind)
    density = problem.mask.float().mean().item()
    rows = []

    def measure(name, prepare, dense=False):
        try:
            function = prepare(problem)
            out = function()
        except Exception as error:
            # A missing cuDNN or Flex option must not cost the whole table; ours must run.
            if name.startswith("ours"):
                raise
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            print(f"{shape}: {name} does not run here: {reason[:120]}", file=sys.stderr)
            return
        if not dense:
            check(name, problem, out, spots(problem), torch.float32)
        del out
        ms = milliseconds(function, args.iters)
        tflops = problem.flops(dense) / ms / 1e9
        kept = 1.0 if dense else density
        rows.append(dict(shape=shape, maps=kind, density=kept, kernel=name, ms=ms, tflops=tflops))
        print(f"| {shape} | {kind} | {kept:.2g} | {name} | {ms:.2f} | {tflops:.0f} |", flush=True)

    with torch.no_grad():
        measure("dense cuDNN (SDPA)", dense_kernel, dense=True)
        for name, prepare in args.kernels.items():
            measure(name, prepare)
        if args.flex:
            measure("FlexAttention", flex_kernel)
            measure("FlexAttention, TMA", lambda problem: flex_kernel(problem, USE_TMA=True))
    return rows


def gate(kernels, dtype):
    """Every row of small ragged problems, against float64."""
    for head_dim in (64, 128):
        problem = Problem.random(*GATE_SHAPE, head_dim, 0.3, dtype)
        rows = list(product(*map(range, problem.mask.shape[1:3])))
        for name, prepare in kernels.items():
            check(name, problem, prepare(problem)(), rows, torch.float64)


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
    args.kernels = sparse_kernels(args.settings, args.dtype)
    gate(args.kernels, args.dtype)

    record = about(
        dtype=str(args.dtype).removeprefix("torch."),
        seed=seed,
        iterations=args.iters,
        shapes={name: SHAPES[name] for name in args.shapes},
    )
    print(", ".join(f"{key} {record[key]}" for key in ("gpu", "torch", "triton", "dtype", "date")))
    print("\n| shape | maps | density | kernel | ms | TFLOP/s of kept work |\n" + "|---" * 6 + "|")
    rows = []
    for density, shape, kind in product(args.densities, args.shapes, args.maps):
        rows += benchmark(shape, density, kind, args)
    if args.output:
        write_json(args.output, record | {"rows": rows})


if __name__ == "__main__":
    main()
