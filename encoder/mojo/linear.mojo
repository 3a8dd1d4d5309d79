"""`Linear` and `Conv1d` without a bias; what follows, bias, GELU, residual, the compiler fuses into
the store."""

import extensibility
from extensibility import InputTensor
from extensibility import _FusedOutputTensor as FusedOutputTensor
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.math import ceildiv
from std.utils.index import IndexList

from .product import Floats, PANEL, PANELS, VECTOR, product
from .share import require_dense, share

comptime BLOCK = 48  # rows of a task: whole tiles, in the second cache
comptime TASKS = 16  # for each thread, where there are as many panels


@extensibility.register("max_whisper.linear")
struct Linear:
    """The product x (rows, in) by weight (panels, in, 16) -> y (rows, out), out <= 16 * panels.

    Few rows, as of a decoder's step, are shared out by panels: each weight is read once.
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        y: FusedOutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        weight: InputTensor[rank=3, ...],
        ctx: DeviceContext,
    ) capturing raises:
        require_dense("x", x.strides(), x.shape())
        require_dense("weight", weight.strides(), weight.shape())
        var rows, n_in, n_out = x.dim_size(0), x.dim_size(1), y.dim_size(1)
        var x_ptr, w_ptr = x.unsafe_ptr(), weight.unsafe_ptr()
        var panels, blocks = weight.dim_size(0), ceildiv(rows, BLOCK)
        var tasks = TASKS * parallelism_level(None)
        var group = max(1, ceildiv(ceildiv(panels * blocks, tasks), PANELS)) * PANELS
        var groups = ceildiv(panels, group)

        def block(i: Int) {imm}:
            var part, which = divmod(i, groups)
            var row, panel = part * BLOCK, which * group

            @always_inline
            def take(r: Int, c: Int, sums: Floats) {imm}:
                var column = panel * PANEL + c
                if column + VECTOR <= n_out:
                    y._lambda_store[width=VECTOR](IndexList[2](row + r, column), sums)
                else:
                    for n in range(n_out - column):
                        y._lambda_store[width=1](IndexList[2](row + r, column + n), sums[n])

            product(
                take,
                min(BLOCK, rows - row),
                min(group, panels - panel),
                x_ptr.unsafe_offset(row * n_in),
                n_in,
                w_ptr.unsafe_offset(panel * n_in * PANEL),
                n_in * PANEL,
                n_in,
            )

        share(block, blocks * groups)


@extensibility.register("max_whisper.conv1d")
struct Conv1d:
    """`Conv1d` with kernel 3 and padding 1: x (B, frames, in) by weight (out / 16, 3 * in, 16)
    -> y (B, frames / stride, out).

    Channels are last, so the three frames that an output reads lie one behind the other: they are
    one row of the product, and rows overlap. Only the first and the last frame read less.
    """

    @staticmethod
    def execute[
        target: StaticString, stride: Int
    ](
        y: FusedOutputTensor[dtype=DType.float32, rank=3, ...],
        x: InputTensor[dtype=DType.float32, rank=3, ...],
        weight: InputTensor[dtype=DType.float32, rank=3, ...],
        ctx: DeviceContext,
    ) capturing raises:
        require_dense("x", x.strides(), x.shape())
        require_dense("weight", weight.strides(), weight.shape())
        var n_ctx, frames, n_in = y.dim_size(1), x.dim_size(1), x.dim_size(2)
        var x_ptr, w_ptr = x.unsafe_ptr(), weight.unsafe_ptr()
        var panels, blocks = weight.dim_size(0), ceildiv(n_ctx, BLOCK)

        def block(i: Int) {imm}:
            var b, part = divmod(i, blocks)

            @always_inline
            def rows(first: Int, last: Int) {imm}:
                """Outputs of which each reads the same taps."""
                var begin, end = first * stride - 1, first * stride + 2
                var left_out = 1 if begin < 0 else 0
                var read = min(end, frames) - max(begin, 0)

                @always_inline
                def take(row: Int, column: Int, sums: Floats) {imm}:
                    y._lambda_store[width=VECTOR](IndexList[3](b, first + row, column), sums)

                product(
                    take,
                    last - first,
                    panels,
                    x_ptr.unsafe_offset((b * frames + max(begin, 0)) * n_in),
                    stride * n_in,
                    w_ptr.unsafe_offset(left_out * n_in * PANEL),
                    3 * n_in * PANEL,
                    read * n_in,
                )

            var first, last = part * BLOCK, min(n_ctx, (part + 1) * BLOCK)
            var inner_first = max(first, 1)
            var inner_last = last - 1 if (last - 1) * stride + 2 > frames else last
            if first < inner_first:
                rows(first, inner_first)
            if inner_first < inner_last:
                rows(inner_first, inner_last)
            if inner_last < last and inner_last >= inner_first:
                rows(inner_last, last)

        share(block, x.dim_size(0) * blocks)
