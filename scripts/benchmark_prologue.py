"""Time what comes before attention beside a device copy of the same bytes, on one CUDA GPU.

That is the prologue, beside eager torch too, and how keys and values are rounded to 8 bits.

Times are the GPU's alone: every call, a copy too, is queued behind other work, which outlasts what
the host does to launch it and leaves nothing of the inputs in the cache. Values are random and new
in every run. A kernel that is not right is not timed. Every row is written as soon as it is there.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from benchmark_tools import Rows, about, device_ms

from dfsattn_diffusers.kernels import prologue_kernels
from dfsattn_diffusers.kernels.prologue import (
    Norm,
    Prepared,
    Rotary,
    Stream,
    pool_qk,
    pool_reference,
    prepare_qkv,
    reference,
)
from dfsattn_diffusers.kernels.quantize import ROUNDING, quantize_keys
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout

BLOCK, TILE = 128, 16
ORDERS = ("hilbert3d", "hilbert2d")


@dataclass(frozen=True)
class Shape:
    """One attention call of a model: grid, text, heads, head dim, and how it projects."""

    grid: tuple[int, int, int]
    text_tokens: int
    heads: int
    head_dim: int
    norm: str
    text_first: bool = False
    two_streams: bool = False


SHAPES = {
    "wan-720p": Shape((21, 45, 80), 0, 40, 128, "rms_all_heads"),
    "hunyuan-720p": Shape((33, 45, 80), 256, 24, 128, "rms", two_streams=True),
    "hunyuan-720p-single": Shape((33, 45, 80), 256, 24, 128, "rms"),
    "cogvideox": Shape((13, 30, 45), 226, 48, 64, "layer", text_first=True),
}
# How keys and values are rounded, by variant.
ROUNDED = {f"keys and values, {precision}": precision for precision in ROUNDING}
# Ragged and small, for the first check.
SMALL_GRID, SMALL_TEXT = (3, 5, 7), 9


class Problem:
    """Random arguments of `prepare_qkv`."""

    def __init__(self, shape, dtype):
        self.geometry = TokenGeometry(shape.grid, shape.text_tokens, shape.text_first)
        blocks = dict(tile_size=TILE, query_block=BLOCK, key_block=BLOCK)
        layout = TokenLayout.build(self.geometry, order=ORDERS, **blocks, device="cuda")
        self.source, self.tile_lengths = layout.target(), layout.lengths(TILE)
        # Heads take turns.
        self.slots = layout.restore(torch.arange(shape.heads)[None] % len(ORDERS))
        kinds = dict(device="cuda", dtype=dtype)

        def norm():
            size = shape.head_dim * (shape.heads if shape.norm == "rms_all_heads" else 1)
            bias = torch.randn(size, **kinds) if shape.norm == "layer" else None
            return Norm(shape.norm, torch.randn(size, **kinds), bias)

        def stream(rows):
            qkv = (torch.randn(1, rows, shape.heads, shape.head_dim, **kinds) for _ in "qkv")
            return Stream(*qkv, norm(), norm())

        video, text = self.geometry.video_tokens, self.geometry.text_tokens
        rows = (video, text) if shape.two_streams else (video + text,)
        self.streams = [stream(count) for count in rows]
        angle = torch.rand(video, shape.head_dim // 2, device="cuda").repeat_interleave(2, 1) * 6
        self.rotary = Rotary(angle.cos(), angle.sin(), text if shape.text_first else 0)

    def variant(self, name):
        """Arguments after the streams, by name."""
        ordered = dict(rotary=self.rotary, source=self.source)
        pooled = ordered | dict(tile_lengths=self.tile_lengths)
        return {
            "curve order": ordered,
            "curve order and tiles": pooled,
            "tiles alone": pooled | dict(alone=True),
            "order by head": ordered | dict(slots=self.slots),
            "model order": dict(rotary=self.rotary, heads_first=False),
        }[name]

    def exact(self, **arguments):
        def double(norm):
            bias = norm.bias if norm.bias is None else norm.bias.double()
            return replace(norm, weight=norm.weight.double(), bias=bias)

        streams = [
            Stream(x.q.double(), x.k.double(), x.v.double(), double(x.q_norm), double(x.k_norm))
            for x in self.streams
        ]
        return eager(streams, **arguments)


def either(prepare, pool):
    """A function that prepares or, asked for tiles alone, pools."""

    def call(streams, rotary=None, source=None, *, alone=False, **options):
        if not alone:
            return prepare(streams, rotary, source, **options)
        return Prepared(None, None, None, *pool(streams, rotary, source, **options))

    return call


ours, eager = either(prepare_qkv, pool_qk), either(reference, pool_reference)


def parts(prepared):
    names = ("q", "k", "v", "q_tiles", "k_tiles")
    return {name: x for name in names if (x := getattr(prepared, name)) is not None}


def check(name, problem, call, arguments):
    """Exit unless the outputs err no more than twice as much as eager code, plus one rounding."""
    got = parts(call(problem.streams, **arguments))
    torchs = parts(eager(problem.streams, **arguments))
    for part, exact in parts(problem.exact(**arguments)).items():
        allowed = 2 * (torchs[part] - exact).abs().max()
        allowed += torch.finfo(got[part].dtype).eps * exact.abs().max()
        error = (got[part] - exact).abs().max()
        same = (got[part] == torchs[part]).float().mean()
        # Pooled means are sums in another order.
        if not error <= allowed or (same < 0.99 and not part.endswith("tiles")):
            sys.exit(
                f"{name} is wrong in {part} {list(exact.shape)}: error {error:.2e}, allowed "
                f"{allowed:.2e}, {same:.2%} of eager's bits; nothing was timed"
            )


def check_rounding(name, k, v, out, options):
    """Exit unless the first head is what the specification in torch makes of it, but for ties."""
    k, v, key_mean = (x[:, :1].cpu() for x in (k, v, out.key_mean))
    want = quantize_keys(k, v, key_mean=key_mean, **options)
    for part in ("k", "v"):
        got, codes = (getattr(x, part)[:, :1].cpu().view(torch.uint8) for x in (out, want))
        scales = (getattr(x, f"{part}_scales")[:, :1].cpu() for x in (out, want))
        same = (got == codes).float().mean()
        if same < 0.99 or not torch.allclose(*scales):
            sys.exit(f"{name} is wrong in {part}: {same:.2%} of the codes; nothing was timed")


def moved_bytes(problem, arguments, out):
    """Bytes that have to be read and written once."""
    inputs = [x for stream in problem.streams for x in (stream.q, stream.k, stream.v)]
    in_place = any(out.v is stream.v for stream in problem.streams)
    if in_place or out.v is None:
        inputs = [x for stream in problem.streams for x in (stream.q, stream.k)]
    outputs = [x for name, x in parts(out).items() if not (in_place and name == "v")]
    tables = [problem.rotary.cos, problem.rotary.sin, *map(arguments.get, ("source", "slots"))]
    return sum(x.nbytes for x in (*inputs, *outputs, *tables) if x is not None)


def copy_ms(count, iterations):
    """Of a device copy that moves `count` bytes, half of them reads."""
    source = torch.empty(count // 2, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return device_ms(lambda: target.copy_(source), iterations)


def jobs(problem, shape, variant, calls):
    """Bytes to be moved, a kernel's name and a call of it, for each kernel, which is right."""
    if variant in ROUNDED:
        out = ours(problem.streams, **problem.variant("curve order"))
        k, v = out.k, out.v
        options = dict(key_block=BLOCK, interleaved=True) | ROUNDING[ROUNDED[variant]]
        out = quantize_keys(k, v, **options)
        check_rounding(f"{variant}, {shape}", k, v, out, options)
        count = sum(x.nbytes for x in (k, v, out.k, out.v, out.k_scales, out.v_scales))
        del out
        yield count, "ours", partial(quantize_keys, k, v, **options)
        return
    arguments = problem.variant(variant)
    out = ours(problem.streams, **arguments)
    count = moved_bytes(problem, arguments, out)
    del out
    for name, call in calls.items():
        if call is not eager:
            check(f"{name}, {variant}, {shape}", problem, call, arguments)
        yield count, name, partial(call, problem.streams, **arguments)


def benchmark(shape, args, rows):
    """Add the rows of one shape."""
    problem = Problem(SHAPES[shape], args.dtype)
    for variant in args.variants:
        copy = None
        for count, name, call in jobs(problem, shape, variant, args.calls):
            copy = copy or copy_ms(count, args.iters)
            ms = device_ms(call, args.iters)
            rows.add(
                dict(shape=shape, variant=variant, kernel=name, ms=ms, copy_ms=copy,
                     gb_per_s=count / ms / 1e6, share_of_copy=copy / ms)
            )  # fmt: skip
            print(
                f"| {shape} | {variant} | {name} | {ms:.3f} | {count / ms / 1e6:.0f} | "
                f"{copy / ms:.0%} |",
                flush=True,
            )


def print_fastest(rows):
    """Of the kernels timed, by shape and variant."""
    best = {}
    for row in rows:
        key = row["shape"], row["variant"]
        best[key] = min(best.get(key, row), row, key=lambda row: row["ms"])
    print("\n| shape | variant | fastest | ms |\n|---|---|---|---|")
    for (shape, variant), row in best.items():
        print(f"| {shape} | {variant} | {row['kernel']} | {row['ms']:.3f} |")


def with_settings(settings):
    def prepare(streams, rotary, source, **options):
        options = dict(heads_first=True, tile_lengths=None) | options
        return prologue_kernels.prepare_qkv(streams, rotary, source, **options, settings=settings)

    return either(prepare, partial(prologue_kernels.pool_qk, settings=settings))


def launch_settings(text):
    numbers = list(map(int, text.split(",")))
    if len(numbers) != len(fields(prologue_kernels.LaunchSettings)):
        raise ValueError(text)
    return prologue_kernels.LaunchSettings(*numbers)


def main(argv=None):
    variants = [
        "curve order", "curve order and tiles", "tiles alone", "order by head", "model order",
        *ROUNDED,
    ]  # fmt: skip
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="what to time")
    add("--variants", nargs="+", choices=variants, default=variants, help="what to ask for")
    add("--iters", type=int, default=20, help="timed runs, after 3 for warm-up")
    add("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of q, k and v")
    add("--settings", nargs="*", type=launch_settings, default=[], metavar="LAUNCH",
        help="also time slots, tokens, elements and warps like 16,2,2048,4")
    add("--no-eager", dest="eager", action="store_false", help="leave out eager torch")
    add("--seed", type=int, help="of the random values; another one every time by default")
    add("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.iters < 1:
        parser.error(f"--iters must be at least 1, got {args.iters}")
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch sees none")

    seed = torch.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    args.dtype = getattr(torch, args.dtype)
    args.calls = {"ours": ours}
    for settings in args.settings:
        args.calls[f"ours, {','.join(map(str, astuple(settings)))}"] = with_settings(settings)
    with torch.no_grad():
        for name, shape in SHAPES.items():
            text = SMALL_TEXT if shape.text_tokens else 0
            small = Problem(replace(shape, grid=SMALL_GRID, text_tokens=text), args.dtype)
            for variant in variants:
                for _ in jobs(small, f"small {name}", variant, args.calls):
                    pass
    if args.eager:
        args.calls["eager torch"] = eager

    record = about(
        dtype=str(args.dtype).removeprefix("torch."), seed=seed, iterations=args.iters
    )
    print(", ".join(f"{key} {record[key]}" for key in ("gpu", "torch", "triton", "dtype", "date")))
    print("\n| shape | variant | kernel | ms | GB/s | share of copy |\n|---|---|---|---|---|---|")
    table = Rows(args.output, record)
    with torch.no_grad():
        for shape in args.shapes:
            benchmark(shape, args, table)
    print_fastest(table.rows)


if __name__ == "__main__":
    main()
