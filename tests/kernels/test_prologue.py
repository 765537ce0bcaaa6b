"""The prologue against the stock processors' q, k, v, and its kernel against its reference."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.transformers import transformer_hunyuan_video, transformer_wan
from kernel_cases import ON_CUDA, assert_close
from torch import Tensor

from dfsattn_diffusers.kernels import prologue
from dfsattn_diffusers.kernels.prologue import (
    NORM_KINDS,
    Norm,
    Prepared,
    Rotary,
    Stream,
    pool_qk,
    pool_reference,
    pool_tiles,
    prepare_qkv,
    reference,
)
from dfsattn_diffusers.layout import TokenGeometry, TokenLayout

kernels = pytest.importorskip("dfsattn_diffusers.kernels.prologue_kernels")

DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Where dtypes meet nothing new; the interpreter takes seconds for each.
ONE_ON_CPU = [
    ("cpu", torch.bfloat16), *(pytest.param("cuda", dtype, marks=ON_CUDA) for dtype in DTYPES)
]  # fmt: skip
HEADS, BATCH, GRID = 3, 2, (2, 3, 3)


@pytest.fixture(autouse=True)
def nearest_bfloat16(monkeypatch):
    """The interpreter cuts float32 off where a GPU rounds to the nearest bfloat16."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float

    def convert(x, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return stock(x, source, target, rounding)
        x = torch.from_numpy(np.ascontiguousarray(x)).view(torch.float32)
        return x.bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@dataclass
class Case:
    """One attention call: what the prologue gets, what stock attention got, `[B, N, H, D]`."""

    streams: list[Stream]
    rotary: Rotary | None
    stock: list[Tensor] | None
    geometry: TokenGeometry

    def arguments(self, device="cpu", dtype=None):
        def move(x):
            return x if x is None else x.to(device, dtype or x.dtype)

        def norm(x):
            return x and replace(x, weight=move(x.weight), bias=move(x.bias))

        streams = [
            Stream(move(x.q), move(x.k), move(x.v), norm(x.q_norm), norm(x.k_norm))
            for x in self.streams
        ]
        rotary = self.rotary
        if rotary is not None:
            rotary = replace(rotary, cos=rotary.cos.to(device), sin=rotary.sin.to(device))
        return streams, rotary


def tables(make, rows, head_dim, interleaved=True):
    angle = torch.rand(rows, head_dim // 2, generator=make) * 6
    angle = angle.repeat_interleave(2, 1) if interleaved else torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


def randomise(module, make):
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=make) * 0.5
    return module


def norm_of(module):
    """What the integration reads off a host's norm."""
    if module is None:
        return None
    kind = {"LayerNorm": "layer", "RMSNorm": "rms"}[type(module).__name__]
    if isinstance(module, torch.nn.RMSNorm):
        kind = "rms_all_heads"
    return Norm(kind, module.weight, getattr(module, "bias", None), module.eps)


def split(x):
    return x.unflatten(2, (HEADS, -1))


def capture(monkeypatch, owner, name, call):
    """q, k, v that `call` hands to the attention function."""
    seen = []

    def attention(q, k, v, **_):
        seen.extend(x.clone() for x in (q, k, v))
        return v

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, attention)
        call()
    return seen


def wan(monkeypatch, make, dtype, head_dim, fused):
    width = HEADS * head_dim
    attn = transformer_wan.WanAttention(
        width, HEADS, head_dim, eps=1e-6, processor=transformer_wan.WanAttnProcessor()
    )
    attn = randomise(attn, make).to(dtype)
    if fused:
        attn.fuse_projections()
    rows = TokenGeometry(GRID).tokens
    x = torch.randn(BATCH, rows, width, generator=make).to(dtype)
    cos, sin = (t[None, :, None] for t in tables(make, rows, head_dim))
    stock = capture(
        monkeypatch,
        transformer_wan,
        "dispatch_attention_fn",
        lambda: attn(x, rotary_emb=(cos, sin)),
    )
    q, k, v = attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    stream = Stream(split(q), split(k), split(v), norm_of(attn.norm_q), norm_of(attn.norm_k))
    return Case([stream], Rotary(cos, sin, float32_steps=False), stock, TokenGeometry(GRID))


def hunyuan(monkeypatch, make, dtype, head_dim, dual):
    width, text_tokens = HEADS * head_dim, 5
    added = dict(added_kv_proj_dim=width, context_pre_only=False) if dual else dict(pre_only=True)
    attn = Attention(
        query_dim=width, heads=HEADS, dim_head=head_dim, out_dim=width, bias=True, eps=1e-6,
        qk_norm="rms_norm", processor=transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0(),
        **added,
    )  # fmt: skip
    attn = randomise(attn, make).to(dtype)
    geometry = TokenGeometry(GRID, text_tokens)
    x = torch.randn(BATCH, geometry.video_tokens, width, generator=make).to(dtype)
    text = torch.randn(BATCH, text_tokens, width, generator=make).to(dtype)
    cos, sin = tables(make, geometry.video_tokens, head_dim)
    stock = capture(
        monkeypatch,
        transformer_hunyuan_video,
        "dispatch_attention_fn",
        lambda: attn(x, text, image_rotary_emb=(cos, sin)),
    )
    norms = norm_of(attn.norm_q), norm_of(attn.norm_k)
    joint = x if dual else torch.cat([x, text], 1)
    streams = [Stream(*(split(f(joint)) for f in (attn.to_q, attn.to_k, attn.to_v)), *norms)]
    if dual:
        projected = (split(f(text)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        norms = norm_of(attn.norm_added_q), norm_of(attn.norm_added_k)
        streams.append(Stream(*projected, *norms))
    return Case(streams, Rotary(cos, sin), stock, geometry)


def cogvideox(monkeypatch, make, dtype, head_dim, rotated):
    width, text_tokens = HEADS * head_dim, 5
    attn = Attention(
        query_dim=width, heads=HEADS, dim_head=head_dim, bias=True, eps=1e-6,
        qk_norm="layer_norm" if rotated else None, processor=CogVideoXAttnProcessor2_0(),
    )  # fmt: skip
    attn = randomise(attn, make).to(dtype)
    geometry = TokenGeometry(GRID, text_tokens, text_first=True)
    x = torch.randn(BATCH, geometry.video_tokens, width, generator=make).to(dtype)
    text = torch.randn(BATCH, text_tokens, width, generator=make).to(dtype)
    turn = tables(make, geometry.video_tokens, head_dim) if rotated else None
    stock = capture(
        monkeypatch,
        attention_processor.F,
        "scaled_dot_product_attention",
        lambda: attn(x, text, image_rotary_emb=turn),
    )
    joint = torch.cat([text, x], 1)
    qkv = (split(f(joint)) for f in (attn.to_q, attn.to_k, attn.to_v))
    stream = Stream(*qkv, norm_of(attn.norm_q), norm_of(attn.norm_k))
    rotary = turn and Rotary(*turn, first_row=text_tokens)
    return Case([stream], rotary, [x.transpose(1, 2) for x in stock], geometry)


FAMILIES = {
    "wan": lambda *a: wan(*a, 128, fused=False),
    "wan-fused": lambda *a: wan(*a, 64, fused=True),
    "hunyuan-dual": lambda *a: hunyuan(*a, 128, dual=True),
    "hunyuan-single": lambda *a: hunyuan(*a, 128, dual=False),
    "cogvideox-5b": lambda *a: cogvideox(*a, 64, rotated=True),
    "cogvideox-2b": lambda *a: cogvideox(*a, 64, rotated=False),
}


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    def build(dtype):
        with torch.no_grad():
            return FAMILIES[request.param](monkeypatch, torch.Generator().manual_seed(7), dtype)

    return build


def tensors(prepared: Prepared):
    names = ("q", "k", "v", "q_tiles", "k_tiles")
    return {name: x for name in names if (x := getattr(prepared, name)) is not None}


def assert_same(got: Prepared, eager: Prepared, exact: Prepared):
    """As near to float64 as the reference, and for all but a few roundings the same bits."""
    eager, exact = tensors(eager), tensors(exact)
    assert tensors(got).keys() == eager.keys()
    for name, x in tensors(got).items():
        x = x.cpu()
        assert (x.dtype, x.shape) == (eager[name].dtype, eager[name].shape), name
        # A tile's mean is as wrong as the sum of its tokens is rounded.
        largest = exact[name[0]].abs().max().item()
        assert_close(x, exact[name].double(), eager[name], largest=largest)
        if x.dtype != torch.float32:
            assert (x == eager[name]).float().mean() > 0.99, name


def kernel(call, streams, rotary=None, source=None, **options):
    """`call` by the kernel, on a CPU too."""
    assert kernels.can_prepare(streams, rotary, source, options.get("tile_lengths"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prologue, "fast", lambda name, x: kernels)
        return call(streams, rotary, source, **options)


def check(case, device, dtype, source=None, **options):
    place = None if source is None else source.to(device)
    moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    got = kernel(prepare_qkv, *case.arguments(device, dtype), place, **moved)
    eager = reference(*case.arguments("cpu", dtype), source, **options)
    exact = reference(*case.arguments("cpu", torch.float64), source, **options)
    assert_same(got, eager, exact)
    if "tile_lengths" in options:
        tiles = kernel(pool_qk, *case.arguments(device, dtype), place, **moved)
        assert_same(replace(got, q_tiles=tiles[0], k_tiles=tiles[1]), eager, exact)
        tiles = pool_reference(*case.arguments("cpu", dtype), source, **options)
        assert torch.equal(tiles[0], eager.q_tiles) and torch.equal(tiles[1], eager.k_tiles)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_has_the_bits_of_the_stock_processor(family, dtype):
    case = family(dtype)
    got = reference(*case.arguments(), heads_first=False)
    for name, x, stock in zip("qkv", (got.q, got.k, got.v), case.stock):
        assert x.dtype == stock.dtype == dtype
        assert torch.equal(x, stock), name


def layout_of(case, order):
    """Blocks of 16 along a curve, so that there is padding."""
    blocks = dict(tile_size=8, query_block=16, key_block=16)
    return TokenLayout.build(case.geometry, order=order, **blocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_curve_order_with_tiles(family, device, dtype):
    case = family(dtype)
    layout = layout_of(case, "hilbert3d")
    text_lengths = torch.tensor([3, 0]) if case.geometry.text_tokens else None
    lengths = layout.lengths(8, text_lengths)
    got = check(case, device, dtype, layout.target(), tile_lengths=lengths)
    padding = layout.target() < 0
    assert padding.any()
    for x, stock in zip((got.q, got.k, got.v), case.stock):
        assert x.is_contiguous() and not x[:, :, padding].any()
        curve = layout.to_curve(stock).masked_fill(padding[:, None], 0)
        assert torch.allclose(x.cpu(), curve, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
    for x, pooled in ((got.q, got.q_tiles), (got.k, got.k_tiles)):
        pools = (pool_tiles(x.cpu().to(t), lengths) for t in (torch.float64, torch.float32))
        assert_close(pooled.cpu(), *pools, largest=x.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [16, 32])
def test_tiles_alone(family, device, tile):
    """Larger ones than a step holds are summed in memory."""
    case = family(torch.float16)
    blocks = dict(tile_size=tile, query_block=tile, key_block=tile)
    layout = TokenLayout.build(case.geometry, order="hilbert2d", **blocks)
    source, lengths = layout.target(), layout.lengths(tile)
    arguments = *case.arguments(device), source.to(device)
    got = kernel(pool_qk, *arguments, tile_lengths=lengths.to(device))
    eager = reference(*case.arguments(), source, tile_lengths=lengths)
    exact = reference(*case.arguments("cpu", torch.float64), source, tile_lengths=lengths)
    tiles = replace(eager, q_tiles=got[0].cpu(), k_tiles=got[1].cpu())
    assert_same(tiles, eager, exact)


def own_slots(source, heads, make):
    """`[B, H, N]`, an order for each batch row and head, padding where `source` has it."""
    real = torch.nonzero(source >= 0).flatten().to(torch.int32)
    orders = [real[torch.randperm(len(real), generator=make)] for _ in range(BATCH * heads)]
    return torch.stack(orders).view(BATCH, heads, -1)


@pytest.mark.parametrize("device, dtype", ONE_ON_CPU)
def test_every_head_in_its_own_order(family, device, dtype):
    case = family(dtype)
    layout = layout_of(case, "hilbert2d")
    slots = own_slots(layout.target(), HEADS, torch.Generator().manual_seed(5))
    got = check(case, device, dtype, layout.target(), slots=slots)
    for x, stock in zip((got.q, got.k, got.v), case.stock):
        assert x.is_contiguous() and not x[:, :, layout.target() < 0].any()
        rows = x.cpu().gather(2, slots.long()[..., None].expand(-1, -1, -1, x.shape[3]))
        near = dict(rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
        assert torch.allclose(rows, stock.transpose(1, 2), **near)


@pytest.mark.parametrize("call", [reference, lambda *a, **k: kernel(prepare_qkv, *a, **k)])
def test_slots_of_one_order_for_all_heads_change_nothing(family, call):
    case = family(torch.float16)
    layout = layout_of(case, "hilbert3d")
    slots = layout.restore().expand(BATCH, HEADS, -1)
    # Rows may be read in any order, as long as padding stays where it is.
    source = layout.target()
    real = source >= 0
    wanted = call(*case.arguments(), source)
    for order in (source, source.masked_scatter(real, source[real].flip(0))):
        got = call(*case.arguments(), order, slots=slots)
        for name, x in tensors(got).items():
            assert torch.equal(x, getattr(wanted, name)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads_first", [False, True])
def test_model_order(family, device, heads_first):
    case = family(torch.float16)
    got = check(case, device, torch.float16, heads_first=heads_first)
    assert got.q.is_contiguous()
    if not heads_first and len(case.streams) == 1:
        v = case.arguments()[0][0].v
        assert torch.equal(got.v.cpu(), v)


def plain_case(make, norm=None, rows=(6, 3), head_dim=64, heads=HEADS, rotary=None):
    def stream(count):
        q, k, v = torch.randn(3, BATCH, count, heads, head_dim, generator=make)
        return Stream(q, k, v, norm, norm)

    return Case([stream(count) for count in rows], rotary, None, TokenGeometry((1, 1, sum(rows))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["rms", "rms_all_heads", "layer"])
def test_halves_half_tables_and_text_before_video(device, dtype, interleaved, kind):
    make = torch.Generator().manual_seed(1)
    cos, sin = (t.to(dtype) for t in tables(make, 5, 64, interleaved))
    rotary = Rotary(cos, sin, 3, interleaved, float32_steps=not interleaved)
    case = plain_case(make, Norm(kind, eps=1e-5), rows=(3, 6), rotary=rotary)
    source = torch.randperm(9, generator=make).to(torch.int32)
    lengths = torch.tensor([[3, 2, 0], [1, 0, 3]], dtype=torch.int32)
    assert not kernels.can_prepare(*case.arguments("cpu", dtype), source, lengths)
    source = torch.cat([source, torch.full((3,), -1, dtype=torch.int32)])
    check(case, device, dtype, source, tile_lengths=lengths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(9,), (3, 6)])
@pytest.mark.parametrize("rotated", ["halves", "neighbours", None])
@pytest.mark.parametrize("kind", [*NORM_KINDS, None])
def test_slots_of_many_heads(device, rows, rotated, kind):
    make = torch.Generator().manual_seed(6)
    pairs = tables(make, 5, 64, rotated == "neighbours")
    rotary = rotated and Rotary(*pairs, 3, rotated == "neighbours")
    case = plain_case(make, kind and Norm(kind, eps=1e-5), rows, heads=21, rotary=rotary)
    # Padding anywhere, and a last step with slots that are not there.
    source = (torch.randperm(14, generator=make) - 5).clamp(min=-1).to(torch.int32)
    check(case, device, torch.bfloat16, source, slots=own_slots(source, 21, make))


@pytest.mark.parametrize("device", DEVICES)
def test_many_heads_and_long_tiles(device):
    make = torch.Generator().manual_seed(2)
    weight = torch.randn(21 * 64, generator=make)
    case = plain_case(make, Norm("rms_all_heads", weight), rows=(32,), heads=21)
    check(case, device, torch.float16, tile_lengths=torch.tensor([[20]], dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
def test_projections_of_different_strides_are_copied(device):
    case = plain_case(torch.Generator().manual_seed(3), Norm("layer"))
    first = case.streams[0]
    q = first.q.transpose(1, 2).contiguous().transpose(1, 2)
    case.streams[0] = replace(first, q=q)
    assert q.stride() != first.k.stride()
    check(case, device, torch.float32)


def test_norms_that_differ_take_the_reference():
    case = plain_case(torch.Generator().manual_seed(4), Norm("rms"))
    case.streams[1] = replace(case.streams[1], q_norm=None)
    streams, _ = case.arguments()
    assert not kernels.can_prepare(streams, None, None, None)
    got, wanted = prepare_qkv(streams), reference(streams)
    assert torch.equal(got.q, wanted.q) and torch.equal(got.v, wanted.v)


def test_bad_arguments_say_what_to_do():
    x = torch.zeros(1, 4, 2, 64)
    good = Stream(x, x, x)
    table = torch.zeros(4, 64)

    def fails(match, streams=(good,), *rest, **options):
        with pytest.raises(ValueError, match=match):
            prepare_qkv(streams, *rest, **options)

    fails("one or two, got 3", (good,) * 3)
    fails(r"k must be torch.float32 \[1, 4, 2, 64\]", (Stream(x, x[:, 1:], x),))
    fails("v must be torch.float32", (Stream(x, x, x.half()),))
    fails("got torch.float32 .4, 2, 64", (Stream(x[0], x, x),))
    fails("q must be torch.float32", (good, Stream(*[x.half()] * 3)))
    fails("kind must be one of", (replace(good, q_norm=Norm("l2")),))
    head = x[0, 0, 0]
    fails("weight of a 'rms_all_heads'", (replace(good, k_norm=Norm("rms_all_heads", head)),))
    fails("bias needs kind 'layer'", (replace(good, q_norm=Norm("rms", bias=head)),))
    fails("R at most 2 rows", (good,), Rotary(table, table, first_row=2))
    fails("sin must be", (good,), Rotary(table, table[1:]))
    fails(r"source must be int32 \[P\]", (good,), None, torch.arange(4))
    lengths = torch.zeros(1, 3, dtype=torch.int32)
    fails("T a divisor of the 4 slots", (good,), tile_lengths=lengths)
    with pytest.raises(ValueError, match="T a divisor of the 4 slots"):
        pool_qk((good,), None, None, lengths)

    order = torch.arange(4, dtype=torch.int32)
    slots, asked = order.expand(1, 2, 4), ((good,), None, order)
    fails("slots needs a source of at least 4 slots, got None", slots=slots)
    fails("at least 4 slots, got .3.; name every row once", (good,), None, order[:3], slots=slots)
    fails("slots needs heads_first=True, got False; leave", *asked, slots=slots, heads_first=False)
    for wrong in (slots.long(), slots[:, :1], slots[..., :3], slots[0]):
        fails(r"slots must be int32 \[1, 2, 4\] on cpu, got", *asked, slots=wrong)
    options = dict(tile_lengths=lengths[:, :2], slots=slots)
    fails(r"slots needs tile_lengths None, got \[1, 2\]; pool", *asked, **options)
