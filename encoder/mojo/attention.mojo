"""Attention of every frame to every frame, in blocks that stay in the cache.

Keys are taken KEYS at a time. What was summed over earlier keys is made smaller when a larger score
comes (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao and others,
"FlashAttention", 2022), so the scores of a task are small enough for it.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv, round
from std.memory import Layout, Pointer, alloc, bitcast

from .product import Floats, PANEL, VECTOR, product
from .share import require_dense, share

comptime QUERIES = 36  # rows of a task
comptime KEYS = 192  # columns of scores at a time
comptime LOG2_E = 1.4426950408889634
comptime LOWEST = -126.0  # the exponent of the least normal float32


@always_inline
def power_of_2[width: Int](x: SIMD[DType.float32, width]) -> SIMD[DType.float32, width]:
    """2**x for x <= 0, within 2e-7 of it; below 2**-126 it is 2**-126, and NaN stays NaN.

    x = n + f with f in [-1/2, 1/2]: 2**f by its Taylor polynomial of degree 7, 2**n by the bits.
    """
    comptime F = SIMD[DType.float32, width]
    var above = x.lt(F(LOWEST)).select(F(LOWEST), x)
    var n = round(above)
    var f = above - n
    var p = F(1.5252733804059841e-5)
    p = p.fma(f, F(1.5403530393381609e-4))
    p = p.fma(f, F(1.3333558146428443e-3))
    p = p.fma(f, F(9.618129107628477e-3))
    p = p.fma(f, F(5.550410866482158e-2))
    p = p.fma(f, F(2.402265069591007e-1))
    p = p.fma(f, F(6.931471805599453e-1))
    p = p.fma(f, F(1.0))
    return p * bitcast[DType.float32, width]((n.cast[DType.int32]() + 127) << 23)


@always_inline
def largest[origin: Origin](row: Pointer[Float32, origin], n: Int) -> Float32:
    """The largest of n numbers; what it is beside NaN is not said."""
    var whole = n // VECTOR * VECTOR
    var found = Floats(Float32.MIN)
    for i in range(0, whole, VECTOR):
        found = max(found, row.unsafe_offset(i).unsafe_load[width=VECTOR]())
    var one = found.reduce_max()
    for i in range(whole, n):
        one = max(one, row.unsafe_offset(i)[])
    return one


@always_inline
def exponentials[
    origin: MutOrigin
](row: Pointer[Float32, origin], n: Int, highest: Float32, scale: Float32) -> Float32:
    """2**((x - highest) * scale) in place of n numbers x; their sum."""
    var whole = n // VECTOR * VECTOR
    var sums = Floats(0)
    for i in range(0, whole, VECTOR):
        var at = row.unsafe_offset(i)
        var e = power_of_2((at.unsafe_load[width=VECTOR]() - highest) * scale)
        at.unsafe_store(e)
        sums += e
    var sum = sums.reduce_add()
    for i in range(whole, n):
        var at = row.unsafe_offset(i)
        var e = power_of_2[1]((at[] - highest) * scale)
        at[] = e
        sum += e
    return sum


@extensibility.register("max_whisper.qkv_attention")
struct QKVAttention:
    """`softmax(q @ k.T / sqrt(n_state / n_head)) @ v` of each head: q, k and v (B, T, n_state)
    -> wv (B, T, n_state)."""

    @staticmethod
    def execute[
        target: StaticString, n_head: Int
    ](
        wv: OutputTensor[dtype=DType.float32, rank=3, ...],
        q: InputTensor[dtype=DType.float32, rank=3, ...],
        k: InputTensor[dtype=DType.float32, rank=3, ...],
        v: InputTensor[dtype=DType.float32, rank=3, ...],
        ctx: DeviceContext,
    ) raises:
        require_dense("q", q.strides(), q.shape())
        require_dense("k", k.strides(), k.shape())
        require_dense("v", v.strides(), v.shape())
        var batch, n_ctx, n_state = q.dim_size(0), q.dim_size(1), q.dim_size(2)
        var size = n_state // n_head  # 64 in every Whisper
        var scale = Float32(LOG2_E) / Float32(size) ** 0.5
        var padded = ceildiv(n_ctx, PANEL) * PANEL
        var per_head = (padded + n_ctx) * size
        var blocks = ceildiv(n_ctx, QUERIES)
        var packed = alloc(Layout[Float32](count=batch * n_head * per_head)).unsafe_leak()
        var q_ptr, k_ptr, v_ptr = q.unsafe_ptr(), k.unsafe_ptr(), v.unsafe_ptr()
        var wv_ptr = wv.unsafe_ptr()

        def pack(i: Int) {imm}:
            """Keys (padded / 16, size, 16), transposed; values (size / 16, n_ctx, 16)."""
            var b, head = divmod(i, n_head)
            var keys = packed.unsafe_offset(i * per_head)
            var values = keys.unsafe_offset(padded * size)
            var first = b * n_ctx * n_state + head * size
            for panel in range(padded // PANEL):
                for d in range(size):
                    var to = keys.unsafe_offset((panel * size + d) * PANEL)
                    comptime for lane in range(PANEL):
                        # behind the last key the last again: its score is not read
                        var t = min(panel * PANEL + lane, n_ctx - 1)
                        to.unsafe_offset(lane)[] = k_ptr.unsafe_offset(first + t * n_state + d)[]
            for t in range(n_ctx):
                var value = v_ptr.unsafe_offset(first + t * n_state)
                for d in range(0, size, PANEL):
                    comptime for n in range(0, PANEL, VECTOR):
                        values.unsafe_offset(d * n_ctx + t * PANEL + n).unsafe_store(
                            value.unsafe_offset(d + n).unsafe_load[width=VECTOR]()
                        )

        def attend(i: Int) {imm}:
            var of_head, block = divmod(i, blocks)
            var b, head = divmod(of_head, n_head)
            var keys = packed.unsafe_offset(of_head * per_head)
            var values = keys.unsafe_offset(padded * size)
            var rows = min(QUERIES, n_ctx - block * QUERIES)
            var at = (b * n_ctx + block * QUERIES) * n_state + head * size
            var scores = alloc(Layout[Float32](count=QUERIES * (KEYS + size + 3))).unsafe_leak()
            var out = scores.unsafe_offset(QUERIES * KEYS)  # (rows, size), not yet divided
            var highest = out.unsafe_offset(QUERIES * size)
            var sums = highest.unsafe_offset(QUERIES)
            var keep = sums.unsafe_offset(QUERIES)  # what remains of earlier keys
            for r in range(rows):
                highest.unsafe_offset(r)[] = Float32.MIN
                sums.unsafe_offset(r)[] = 0
                for d in range(size):
                    out.unsafe_offset(r * size + d)[] = 0

            @always_inline
            def score(row: Int, column: Int, x: Floats) {imm}:
                scores.unsafe_offset(row * KEYS + column).unsafe_store(x)

            @always_inline
            def add(row: Int, column: Int, x: Floats) {imm}:
                var to = out.unsafe_offset(row * size + column)
                var before = to.unsafe_load[width=VECTOR]()
                to.unsafe_store(before.fma(Floats(keep.unsafe_offset(row)[]), x))

            for first in range(0, n_ctx, KEYS):
                var here = min(KEYS, n_ctx - first)
                product(
                    score,
                    rows,
                    ceildiv(here, PANEL),
                    q_ptr.unsafe_offset(at),
                    n_state,
                    keys.unsafe_offset(first * size),
                    size * PANEL,
                    size,
                )
                for r in range(rows):
                    var row = scores.unsafe_offset(r * KEYS)
                    var before = highest.unsafe_offset(r)[]
                    var now = max(before, largest(row, here))
                    var shrink = power_of_2[1]((before - now) * scale)
                    highest.unsafe_offset(r)[] = now
                    keep.unsafe_offset(r)[] = shrink
                    var sum = exponentials(row, here, now, scale)
                    sums.unsafe_offset(r)[] = sums.unsafe_offset(r)[] * shrink + sum
                product(
                    add,
                    rows,
                    size // PANEL,
                    scores,
                    KEYS,
                    values.unsafe_offset(first * PANEL),
                    n_ctx * PANEL,
                    here,
                )
            for r in range(rows):
                var sum = sums.unsafe_offset(r)[]
                for d in range(0, size, VECTOR):
                    wv_ptr.unsafe_offset(at + r * n_state + d).unsafe_store(
                        out.unsafe_offset(r * size + d).unsafe_load[width=VECTOR]() / sum
                    )
            scores.unsafe_free()

        share(pack, batch * n_head)
        share(attend, batch * n_head * blocks)
        packed.unsafe_free()
