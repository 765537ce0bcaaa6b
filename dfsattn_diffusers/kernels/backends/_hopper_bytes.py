"""Weights in e4m3, from the registers of Hopper's first product to those of the second, unmoved.

Of each 16 keys, a thread gets the logits of keys 2 j, 2 j + 1, 2 j + 8 and 2 j + 9, and multiplies
columns 4 j to 4 j + 3: `quantize` puts these keys' values there.

No exponential is taken: the code of a weight is linear in its logarithm between powers of two, and
as near to the weight as 3 % of it, where rounding to e4m3 alone is as near as 2.6 % (root of the
mean square). Source: Schraudolph, A fast, compact approximation of the exponential function, Neural
Computation 11, 1999.
"""

from __future__ import annotations

import torch

from ..quantize import LARGEST, SMALLEST
from ._hopper_rings import fence_async_shared, gl, gluon, sixteen_bytes, warpgroup_mma

# Below 2^-14, float16 counts in steps of 2^-24: to round to it is to round to an integer.
_TO_CODES = gl.constexpr("""
{
    .reg .b32 low, high;
    cvt.rn.relu.f16x2.f32 low, $2, $1;
    cvt.rn.relu.f16x2.f32 high, $4, $3;
    prmt.b32 $0, low, high, 0x6420;
}
""")
# Likewise of float16 times $5 plus $6, both of which are twice in a register. Halves are put
# together where they are used: ptxas has them so already, and moves fewer registers.
_HALVES_TO_CODES = gl.constexpr("""
{
    .reg .b32 low, high;
    mov.b32 low, {$1, $2};
    mov.b32 high, {$3, $4};
    fma.rn.relu.f16x2 low, low, $5, $6;
    fma.rn.relu.f16x2 high, high, $5, $6;
    prmt.b32 $0, low, high, 0x6420;
}
""")
# Two float16 times $4, which is twice in its register, plus two others.
_SCALE = gl.constexpr("""
{
    .reg .b32 both, bias;
    mov.b32 both, {$2, $3};
    mov.b32 bias, {$5, $6};
    fma.rn.f16x2 both, both, $4, bias;
    mov.b32 {$0, $1}, both;
}
""")
_LARGER_PAIR = gl.constexpr("""
{
    .reg .b32 low, high;
    mov.b32 low, {$1, $2};
    mov.b32 high, {$3, $4};
    max.f16x2 $0, low, high;
}
""")
_LARGER_OF_PAIR = gl.constexpr("""
{
    .reg .b16 low, high;
    mov.b32 {low, high}, $1;
    max.f16 low, low, high;
    cvt.f32.f16 $0, low;
}
""")
# The nearest whole numbers, ties to even, of four times a factor: the lowest bytes of what is left
# when 3 * 2^22 is added. Said step by step, since one instruction for both would round but once.
_TO_WHOLE = gl.constexpr("""
{
    .reg .f32 a, b, c, d;
    .reg .b32 low, high, e, f;
    mul.rn.f32 a, $1, $5;
    mul.rn.f32 b, $2, $6;
    mul.rn.f32 c, $3, $7;
    mul.rn.f32 d, $4, $8;
    add.rn.f32 a, a, 0f4B400000;
    add.rn.f32 b, b, 0f4B400000;
    add.rn.f32 c, c, 0f4B400000;
    add.rn.f32 d, d, 0f4B400000;
    mov.b32 e, a;
    mov.b32 f, b;
    prmt.b32 low, e, f, 0x0040;
    mov.b32 e, c;
    mov.b32 f, d;
    prmt.b32 high, e, f, 0x0040;
    prmt.b32 $0, low, high, 0x5410;
}
""")
# What a power of two is worth: eight codes.
OCTAVE = gl.constexpr(8 * 2.0**-24)
# By so many powers of two the straight line exceeds the exponential, on average.
_EXCESS = gl.constexpr(0.0575)
# Code 0 is at 2^-7, but for that excess.
ORIGIN = gl.constexpr(7 - 0.0575)

# Minus this stands for -inf among whole numbers.
_HIDDEN = gl.constexpr(2.0**30)
_SMALLEST = gl.constexpr(SMALLEST)
_E4M3, _INT8 = (gl.constexpr(LARGEST[kind]) for kind in (torch.float8_e4m3fn, torch.int8))


@gluon.constexpr_function
def _log2(x):
    return x.bit_length() - 1


@gluon.constexpr_function
def _words_layout(groups):
    """Of `[64, groups, 4, 4]` bytes: the last four are a register, as in an 8-bit left operand."""
    registers = [[0, 2**i, 0, 0] for i in range(_log2(groups))]
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [8, 0, 0, 0], *registers]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, groups, 4, 4])


@gluon.jit
def _registers(TEXT: gl.constexpr, CONSTRAINTS: gl.constexpr, args):
    return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, args, dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _in_two(b_x):
    """Neighbours, apart: `[ROWS, KEYS // 16, 2, 4]` each."""
    ROWS: gl.constexpr = b_x.shape[0]
    KEYS: gl.constexpr = b_x.shape[1]
    return b_x.reshape([ROWS, KEYS // 16, 2, 4, 2]).split()


@gluon.jit
def _in_fours(b_x):
    """A thread's four keys of each 16, apart: `[ROWS, KEYS // 16, 4]` each."""
    b_even, b_odd = _in_two(b_x)
    b_0, b_2 = b_even.permute((0, 1, 3, 2)).split()
    b_1, b_3 = b_odd.permute((0, 1, 3, 2)).split()
    return b_0, b_1, b_2, b_3


@gluon.jit
def _twice(b_x):
    """The same float16 twice in an int32."""
    # Beyond the largest it is infinite, and infinity times 0 no number.
    b_x = gl.minimum(b_x, 65504.0).to(gl.float16)
    b_bits = b_x.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return b_bits | (b_bits << 16)


@gluon.jit
def round_queries(b_q, b_tile):
    """A warpgroup's queries into a tile of 8 bits, as `quantize` rounds a block; their scale."""
    WIDE: gl.constexpr = sixteen_bytes(b_q.shape[1], gl.num_warps())
    NARROW: gl.constexpr = b_tile.dtype
    LARGEST: gl.constexpr = _INT8 if gl.int8 == NARROW else _E4M3
    # [ROWS, D]
    b_x = b_q.load(WIDE).to(gl.float32)
    b_peak = gl.maximum(gl.max(gl.max(gl.abs(b_x), 1), 0), _SMALLEST)
    b_factor = gl.div_rn(1.0, b_peak) * LARGEST
    if gl.int8 == NARROW:
        b_x = gl.inline_asm_elementwise(
            _TO_WHOLE, "=r,f,f,f,f,f,f,f,f", [b_x, b_factor], dtype=gl.int8, is_pure=True, pack=4
        )
    else:
        b_x = (b_x * b_factor).to(NARROW)
    b_tile.store(b_x)
    # The tensor cores read past the caches of ordinary stores.
    fence_async_shared()
    return gl.div_rn(b_peak, LARGEST)


@gluon.jit
def multiply_vector(b_q, p_x):
    """Queries times the vector at `p_x`, `[ROWS]`."""
    D: gl.constexpr = b_q.shape[1]
    WIDE: gl.constexpr = sixteen_bytes(D, gl.num_warps())
    b_x = gl.load(p_x + gl.arange(0, D, gl.SliceLayout(0, WIDE)))
    return gl.sum(b_q.load(WIDE).to(gl.float32) * b_x[None, :], 1)


@gluon.jit
def scale_and_hide(b_s, b_scale, b_bias):
    """Logits in float16 times a scale, plus a bias for each column."""
    LOGITS: gl.constexpr = b_s.type.layout
    b_even, b_odd = _in_two(b_s)
    b_bias_even, b_bias_odd = _in_two(b_bias[None, :].broadcast_to(b_s.shape))
    b_even, b_odd = gl.inline_asm_elementwise(
        _SCALE, "=h,=h,h,h,r,h,h", [b_even, b_odd, _twice(b_scale), b_bias_even, b_bias_odd],
        dtype=(gl.float16, gl.float16), is_pure=True, pack=1,
    )
    b_s = gl.join(b_even, b_odd).reshape(b_s.shape)
    return gl.convert_layout(b_s, LOGITS, assert_trivial=True)


@gluon.jit
def not_finer(b_scale):
    """A scale by which whole sums have room for a bias.

    Logits of a smaller one are all nearly 0, and are so by this one too.
    """
    return gl.maximum(b_scale, 2.0**-24)


@gluon.jit
def in_sums(b_bias, b_scale):
    """A bias as whole sums begin with it that are to be multiplied by `not_finer(b_scale)`."""
    # The products of two vectors add up to less than 2^21.
    b_bias = b_bias / not_finer(b_scale)
    return gl.minimum(gl.maximum(b_bias, -_HIDDEN), _HIDDEN).to(gl.int32)


@gluon.jit
def hide(b_peak, b_scale):
    """The largest of whole sums times their scale: -inf where all of them began with that."""
    return gl.where(b_peak < -_HIDDEN / 2 * b_scale, float("-inf"), b_peak)


@gluon.jit
def _larger_groups(b_x):
    """Of `[ROWS, GROUPS, 4]` pairs of float16 the larger ones of both halves of the groups."""
    ROWS: gl.constexpr = b_x.shape[0]
    GROUPS: gl.constexpr = b_x.shape[1]
    b_0, b_1 = b_x.reshape([ROWS, 2, GROUPS // 2, 4]).permute((0, 2, 3, 1)).split()
    return _registers("max.f16x2 $0, $1, $2;", "=r,r,r", [b_0, b_1])


@gluon.jit
def peak(b_s, b_scale):
    """Each row's largest logit times a scale, `[ROWS]` float32.

    Of float16, the nearest number for which `pack` has a level that float16 can hold.
    """
    b_0, b_1, b_2, b_3 = _in_fours(b_s)
    # As trees: a chain of maxima, each of which waits for the one before, takes twice as long.
    if b_s.dtype == gl.float16:
        b_peak = _registers(_LARGER_PAIR, "=r,h,h,h,h", [b_0, b_1, b_2, b_3])
        for _ in gl.static_range(_log2(b_peak.shape[1])):
            b_peak = _larger_groups(b_peak)
        b_peak = gl.inline_asm_elementwise(
            _LARGER_OF_PAIR, "=f,r", [b_peak], dtype=gl.float32, is_pure=True, pack=1
        )
    else:
        b_peak = gl.maximum(gl.maximum(b_0, b_1), gl.maximum(b_2, b_3))
    # [ROWS]
    b_peak = gl.max(gl.max(b_peak, 1), 1).to(gl.float32) * b_scale
    if b_s.dtype == gl.float16:
        # Then the level is a whole number of codes: from 2^20 on, numbers are eighths apart.
        b_peak = ((b_peak + _EXCESS + 1572864.0) - 1572864.0) - _EXCESS
    return b_peak


@gluon.jit
def codes_of(b_s, b_factor, b_level):
    """Codes of weights by logits of 32 bits, for `pack_codes` to round; arguments as of `pack`."""
    return b_s.to(gl.float32) * b_factor + b_level[:, None]


@gluon.jit
def pack_codes(b_codes):
    """As `pack`, of codes in float32."""
    b_0, b_1, b_2, b_3 = _in_fours(b_codes)
    return _registers(_TO_CODES, "=r,r,r,r,r", [b_0, b_1, b_2, b_3])


@gluon.jit
def pack(b_s, b_factor, b_level):
    """e4m3 of weights, four to an int32: `[ROWS, KEYS // 16, 4]`; 0 from 2^-7 down.

    Four bytes of their own would be unpacked and packed again from one loop step to the next.

    Args:
        b_s: Logits `[ROWS, KEYS]` in float16. `b_s * b_factor + b_level`, of which the last is
            `[ROWS]` and a multiple of 2^-24, is to be `OCTAVE * (ORIGIN + log2(weight))`, of
            weights up to 256.
    """
    b_0, b_1, b_2, b_3 = _in_fours(b_s)
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, b_0.type.layout))
    b_level = gl.convert_layout(_twice(b_level), ROW, assert_trivial=True)[:, None, None]
    args = [b_0, b_1, b_2, b_3, _twice(b_factor), b_level]
    return _registers(_HALVES_TO_CODES, "=r,h,h,h,h,r,r", args)


@gluon.jit
def as_operand(b_packed, OUT: gl.constexpr):
    """What `pack` has made, as the left operand of a product with layout `OUT`."""
    ROWS: gl.constexpr = b_packed.shape[0]
    GROUPS: gl.constexpr = b_packed.shape[1]
    WORDS: gl.constexpr = _words_layout(GROUPS)
    LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=4)
    b_packed = gl.convert_layout(b_packed, gl.SliceLayout(3, WORDS), assert_trivial=True)
    b_packed = b_packed[:, :, :, None].broadcast_to([ROWS, GROUPS, 4, 4])
    b_p = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r", [b_packed.reshape([ROWS, GROUPS * 16])],
        # Not pure: triton 3.9 would make one for each of two products, in registers of its own.
        dtype=gl.float8e4nv, is_pure=False, pack=4,
    )
    return gl.convert_layout(b_p, LAYOUT, assert_trivial=True)


@gluon.constexpr_function
def _sums_layout():
    """Of `[64, 8]`: the narrowest product, of which every column is the same here."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])


@gluon.jit
def make_ones(DTYPE: gl.constexpr, KEYS: gl.constexpr):
    """Shared memory with the right operand of `start_sum`."""
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, KEYS], DTYPE)
    ANY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    b_ones = gl.allocate_shared_memory(DTYPE, [8, KEYS], TILE)
    # By its code: of a float32 that is cast, ptxas leaves every other byte unset.
    b_ones.store(gl.full([8, KEYS], 0x38, gl.int8, ANY).to(DTYPE, bitcast=True))
    return b_ones


@gluon.jit
def start_sum(b_p, b_ones):
    """Starts the sum of each row's weights as they were rounded, for `add_sum`.

    A product, since the tensor cores have time: threads would take one instruction a weight.
    """
    ROWS: gl.constexpr = b_p.shape[0]
    SUMS: gl.constexpr = _sums_layout()
    b_ones = b_ones.slice(0, b_p.shape[1], dim=1)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=4)
    b_p = gl.convert_layout(b_p, LEFT, assert_trivial=True)
    b_zero = gl.zeros([ROWS, 8], gl.float32, SUMS)
    return warpgroup_mma(b_p, b_ones.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def _once(b_sums):
    """One of the two columns that a thread has, `[ROWS, 4]`."""
    b_sum, b_same = b_sums.reshape([b_sums.shape[0], 4, 2]).split()
    return b_sum


@gluon.jit
def no_sum(ROWS: gl.constexpr):
    """A sum to begin with, `[ROWS, 4]`, four times the same."""
    return _once(gl.zeros([ROWS, 8], gl.float32, _sums_layout()))


@gluon.jit
def add_sum(b_sum, b_part):
    """The sum and what `start_sum` has started."""
    return b_sum + gl.convert_layout(_once(b_part), b_sum.type.layout, assert_trivial=True)


@gluon.jit
def times_rows(b_sum, b_x):
    """The sum times a factor for each row."""
    b_x = gl.convert_layout(b_x, gl.SliceLayout(1, b_sum.type.layout), assert_trivial=True)
    return b_sum * b_x[:, None]
