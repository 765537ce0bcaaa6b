"""Weights from the registers of Hopper's first product to those of an 8-bit second one, unmoved.

Of each 16 keys, a thread gets the logits of keys 2 j, 2 j + 1, 2 j + 8 and 2 j + 9, and multiplies
columns 4 j to 4 j + 3: `quantize` puts these keys' values there.
"""

from __future__ import annotations

from ._hopper_rings import gl, gluon

_TO_E4M3 = gl.constexpr("""
{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}
""")


@gluon.constexpr_function
def _words_layout(groups):
    """Of `[64, groups, 4, 4]` bytes: the last four are a register, as in an 8-bit left operand."""
    registers = [[0, 2**i, 0, 0] for i in range(groups.bit_length() - 1)]
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [8, 0, 0, 0], *registers]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, groups, 4, 4])


@gluon.constexpr_function
def parts_layout(keys):
    """Of `[64, 4]`: what each thread of a row makes of its own keys."""
    return gl.SliceLayout(1, gl.SliceLayout(3, _words_layout(keys // 16)))


@gluon.jit
def in_fours(b_x):
    """A thread's four keys of each 16, apart: `[ROWS, KEYS // 16, 4]` each."""
    ROWS: gl.constexpr = b_x.shape[0]
    KEYS: gl.constexpr = b_x.shape[1]
    b_even, b_odd = b_x.reshape([ROWS, KEYS // 16, 2, 4, 2]).split()
    b_0, b_2 = b_even.permute((0, 1, 3, 2)).split()
    b_1, b_3 = b_odd.permute((0, 1, 3, 2)).split()
    return b_0, b_1, b_2, b_3


@gluon.jit
def pack(b_p):
    """Weights in e4m3, four to an int32: `[ROWS, KEYS // 16, 4]`.

    Four bytes of their own would be unpacked and packed again from one loop step to the next.
    """
    b_0, b_1, b_2, b_3 = in_fours(b_p)
    return gl.inline_asm_elementwise(
        _TO_E4M3, "=r,r,r,r,r", [b_0, b_1, b_2, b_3], dtype=gl.int32, is_pure=True, pack=1
    )


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
        dtype=gl.float8e4nv, is_pure=True, pack=4,
    )
    return gl.convert_layout(b_p, LAYOUT, assert_trivial=True)
