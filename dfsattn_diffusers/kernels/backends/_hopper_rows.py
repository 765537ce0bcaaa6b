"""What the Gluon kernels for sm90 do alike with a block map's rows: find, load, multiply, store."""

from __future__ import annotations

from . import _hopper_rings as rings
from . import _hopper_tail as tails
from ._hopper_rings import gl, gluon, warpgroup_mma

# Arguments that are not worth a build of their own.
COUNTS = [
    "H", "N_Q", "N_K", "NUM_WORK", "NUM_ROWS", "NUM_BLOCKS", "MAX_COUNT", "full_key_blocks",
    "order_stride",
]


@gluon.jit
def block_at(p_blocks, i, i_listed):
    """The row's i-th key block: listed, or i itself where nothing is."""
    return gl.where(i < i_listed, gl.load(p_blocks + i, mask=i < i_listed, other=0), i)


@gluon.jit
def _claim(next_row):
    """The place in `rows` of a row that nobody has; the first ones are there without asking."""
    return gl.num_programs(0) + gl.atomic_add(next_row, 1, sem="relaxed")


@gluon.jit
def listed_blocks(i_row, i_count, indices, NUM_BLOCKS, MAX_COUNT):
    """A row's key blocks, and how many of them are listed: none where it keeps all."""
    i_listed = gl.where(i_count == NUM_BLOCKS, 0, i_count)
    return indices + i_row.to(gl.int64) * MAX_COUNT, i_listed


@gluon.jit
def make_row_ring(DTYPE: gl.constexpr, AHEAD: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """For queries of so many rows: a tile for each warpgroup, and what `receive_row` tells."""
    return rings.with_notes(rings.make_ring(DTYPE, 2 * AHEAD, ROWS, D, 1))


@gluon.jit
def receive_row(q_ring, i):
    """A row's queries; sample, head, query block; key blocks, whole ones; whether another follows.

    From the loading warp, which is ahead: loads and divisions would keep products waiting.
    """
    b_q = rings.receive(q_ring, i)
    i_b, i_h = rings.read_note(q_ring, i, 0), rings.read_note(q_ring, i, 1)
    i_q, i_count = rings.read_note(q_ring, i, 2), rings.read_note(q_ring, i, 3)
    i_whole, i_more = rings.read_note(q_ring, i, 4), rings.read_note(q_ring, i, 5)
    return b_q, i_b, i_h, i_q, i_count, i_whole, i_more


@gluon.jit
def _count_whole(p_blocks, i_count, i_listed, NUM_BLOCKS, full_key_blocks):
    """How many of the row's first blocks are sure to be whole, by bisection."""
    i_low, i_high = gl.maximum(i_count - (NUM_BLOCKS - full_key_blocks), 0), i_count
    while i_low < i_high:
        i_middle = (i_low + i_high) // 2
        m_whole = block_at(p_blocks, i_middle, i_listed) < full_key_blocks
        i_low, i_high = gl.where(m_whole, i_middle + 1, i_low), gl.where(m_whole, i_high, i_middle)
    return i_low


@gluon.jit
def produce(q_source, k_source, v_source, q_ring, k_ring, v_ring, rows, next_row, counts, indices,
            H, NUM_WORK, NUM_ROWS, NUM_BLOCKS, MAX_COUNT, full_key_blocks,
            TRANSPOSED: gl.constexpr,
            pool_keys=None, pool_values=None, POOL: gl.constexpr = 0):
    """The loading warp: each row's queries, then keys one tile ahead of values, then pools.

    The first rows go by program, of which there are no more than rows; `next_row`, 0 at the launch,
    counts those that were claimed after them.
    `TRANSPOSED`: values have a column for each key. `POOL`: keys of a pool, 0 without a tail.
    """
    ROWS: gl.constexpr = q_ring[0].shape[1]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    i_tile, i_queries = 0, 0
    i_place, i_later = gl.program_id(0), _claim(next_row)
    i_row = gl.load(rows + i_place)
    while i_place < NUM_WORK:
        i_count = gl.load(counts + i_row)
        i_later_row = gl.load(rows + i_later, mask=i_later < NUM_WORK, other=0)
        p_blocks, i_listed = listed_blocks(i_row, i_count, indices, NUM_BLOCKS, MAX_COUNT)
        i_whole = _count_whole(p_blocks, i_count, i_listed, NUM_BLOCKS, full_key_blocks)
        i_bh, i_q = i_row // NUM_ROWS, i_row % NUM_ROWS
        i_b, i_h = i_bh // H, i_bh % H
        i_more = gl.where(i_later < NUM_WORK, 1, 0)
        for W in gl.static_range(2):
            i_first = (i_q * 2 + W) * ROWS
            rings.write_notes(q_ring, i_queries + W, (i_b, i_h, i_q, i_count, i_whole, i_more))
            rings.fetch(q_ring, i_queries + W, q_source, i_b, i_h, i_first, 0)
        i_queries += 2
        i_block = block_at(p_blocks, 0, i_listed)
        i_last = -1  # not `i_block`: the loop would not carry what starts as another name's value
        for i in range(i_count):
            rings.fetch(k_ring, i_tile + i, k_source, i_b, i_h, i_block * KEYS, 0)
            # One step ahead: the index is in flight while the next step waits.
            i_next = block_at(p_blocks, i + 1, i_listed)
            if i > 0:
                rings.fetch_values(
                    v_ring, i_tile + i - 1, v_source, i_b, i_h, i_last * KEYS, TRANSPOSED
                )
            i_last, i_block = i_block, i_next
        i_tile += i_count
        if i_count > 0:
            rings.fetch_values(v_ring, i_tile - 1, v_source, i_b, i_h, i_last * KEYS, TRANSPOSED)
        if POOL > 0:
            i_end = i_tile + tails.num_tiles(i_count, NUM_BLOCKS, POOL)
            tails.fetch_pools(
                k_ring, v_ring, i_tile, i_end, pool_keys, pool_values, i_b, i_h, TRANSPOSED
            )
            i_tile = i_end
        # While the rings are full, and two rows early: the answer takes its time.
        i_place, i_row, i_later = i_later, i_later_row, _claim(next_row)


@gluon.jit
def real_keys(i, row, KEYS: gl.constexpr):
    """Keys of a row's i-th block that are not padding; none or less where all are."""
    p_blocks, i_listed, N_K, p_lengths = row[3], row[4], row[5], row[6]
    i_block = block_at(p_blocks, i, i_listed)
    i_keys = N_K - i_block * KEYS
    if p_lengths is not None:
        i_keys = gl.minimum(i_keys, gl.load(p_lengths + i_block))
    return i_keys


@gluon.jit
def hide_padding(b_s, i, row):
    """-inf for what is padding of the row's i-th block, whatever the logit is: it may be NaN."""
    KEYS: gl.constexpr = b_s.shape[1]
    if i < row[1]:
        m_k = gl.arange(0, KEYS, gl.SliceLayout(0, b_s.type.layout)) < real_keys(i, row, KEYS)
        b_s = gl.where(m_k[None, :], b_s, float("-inf"))
    return b_s


@gluon.jit
def clear_padding(v_ring, i_ring, i, row, W: gl.constexpr):
    """Padding of values may be NaN, and 0 * NaN is not 0."""
    if (i >= row[2]) & (i < row[1]):
        b_v = rings.receive(v_ring, i_ring)
        rings.clear_rows(b_v, real_keys(i, row, b_v.shape[0]), W)


@gluon.jit
def multiply_keys(b_q, b_k, LOGITS: gl.constexpr, b_bias=None):
    """Starts q times k transposed: in float32, of 8-bit floats in float16, of int8 in int32.

    `b_bias`: what each key's sums begin with, in that type.
    """
    ROWS: gl.constexpr = b_q.shape[0]
    KEYS: gl.constexpr = b_k.shape[0]
    FLOAT: gl.constexpr = gl.float16 if b_q.dtype == gl.float8e4nv else gl.float32
    KIND: gl.constexpr = gl.int32 if b_q.dtype == gl.int8 else FLOAT
    BIASED: gl.constexpr = b_bias is not None
    if BIASED:
        b_s = b_bias[None, :].broadcast_to([ROWS, KEYS])
    else:
        b_s = gl.zeros([ROWS, KEYS], KIND, LOGITS)
    return warpgroup_mma(b_q, b_k.permute((1, 0)), b_s, use_acc=BIASED, is_async=True)


@gluon.jit
def store_rows(
    b_out, b_sum, b_lse, out, lse, output_order, order_stride, i_bh, i_b, i_h, i_first,
    stride_ob, stride_oh, stride_on, N_Q, ORDERED: gl.constexpr, WITH_LSE: gl.constexpr,
):
    """One warpgroup's rows, from query `i_first` on, divided by their sums."""
    OUT: gl.constexpr = b_out.type.layout
    ROWS: gl.constexpr = b_out.shape[0]
    D: gl.constexpr = b_out.shape[1]
    # At head dim 64 each warp stores the rows that it computed, 4 % faster. At 128 that takes 16 KB
    # more of shared memory and is 2 % slower.
    WIDE: gl.constexpr = rings.sixteen_bytes(D, gl.num_warps(), 4 if D == 64 else 1)
    # [ROWS]
    o_q = i_first + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    m_q = o_q < N_Q
    o_out = o_q
    if ORDERED:
        p_order = output_order + i_bh.to(gl.int64) * order_stride
        o_out = gl.load(p_order + o_q, mask=m_q, other=-1)
    if WITH_LSE:
        b_lse = gl.convert_layout(b_lse, gl.SliceLayout(1, WIDE))
        gl.store(lse + i_bh.to(gl.int64) * N_Q + o_q, b_lse, mask=m_q)
    b_sum = gl.convert_layout(gl.where(b_sum == 0.0, 1.0, b_sum), gl.SliceLayout(1, OUT))
    # [ROWS, D]
    b_out = (b_out * (1.0 / b_sum)[:, None]).to(out.dtype.element_ty)
    # As the products leave it a thread has two numbers in a row.
    b_out = gl.convert_layout(b_out, WIDE)
    p_out = out + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh
    p_out += o_out.to(gl.int64) * stride_on
    o_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    gl.store(p_out[:, None] + o_d[None, :], b_out, mask=(m_q & (o_out >= 0))[:, None])
