"""A matrix product in registers: rows of `a` times panels of `b`.

`a` lies by rows, any distance apart; `b` lies in panels of 16 columns, each panel (depth, 16), so
that one step of the sum reads whole vectors; another dtype than float32 is cast as it is read. A
tile of ROWS rows and PANELS panels is summed in registers over the whole depth and given away once.
With AVX2 it is 6 by 16, twelve of sixteen registers; with AVX-512 12 by 32.
"""

from std.memory import Pointer
from std.sys import simd_width_of

comptime PANEL = 16  # columns; encoder/kernels.py packs weights so
comptime WIDTH = simd_width_of[DType.float32]()
comptime WIDE = WIDTH >= PANEL
comptime ROWS = 12 if WIDE else 6
comptime PANELS = 2 if WIDE else 1
comptime VECTOR = min(WIDTH, PANEL)
comptime VECTORS = PANEL // VECTOR  # of a panel
comptime Floats = SIMD[DType.float32, VECTOR]
comptime Take = ImplicitlyCopyable & RegisterPassable & def(Int, Int, Floats) -> None


@always_inline
def tile[
    rows: Int, panels: Int, a_origin: Origin, b_type: DType, b_origin: Origin, TakeType: Take
](
    take: TakeType,
    row: Int,
    panel: Int,
    a: Pointer[Float32, a_origin],
    a_stride: Int,
    b: Pointer[Scalar[b_type], b_origin],
    b_stride: Int,
    depth: Int,
):
    """One tile, from row `row` and panel `panel` on; `a` and `b` begin there."""
    comptime vectors = panels * VECTORS
    var sums = Array[Floats, rows * vectors](fill=Floats(0))
    for k in range(depth):
        var of_b = Array[Floats, vectors](fill=Floats(0))
        comptime for v in range(vectors):
            of_b[v] = b.unsafe_offset(
                v // VECTORS * b_stride + k * PANEL + v % VECTORS * VECTOR
            ).unsafe_load[width=VECTOR]().cast[DType.float32]()
        comptime for r in range(rows):
            var of_a = Floats(a.unsafe_offset(r * a_stride + k)[])
            comptime for v in range(vectors):
                sums[r * vectors + v] = of_a.fma(of_b[v], sums[r * vectors + v])
    comptime for r in range(rows):
        comptime for v in range(vectors):
            take(row + r, panel * PANEL + v * VECTOR, sums[r * vectors + v])


@always_inline
def columns[
    panels: Int, a_origin: Origin, b_type: DType, b_origin: Origin, TakeType: Take
](
    take: TakeType,
    rows: Int,
    panel: Int,
    a: Pointer[Float32, a_origin],
    a_stride: Int,
    b: Pointer[Scalar[b_type], b_origin],
    b_stride: Int,
    depth: Int,
):
    """All rows of `panels` panels: the panels stay in the nearest cache."""
    var row = 0
    while row + ROWS <= rows:
        tile[ROWS, panels](
            take, row, panel, a.unsafe_offset(row * a_stride), a_stride, b, b_stride, depth
        )
        row += ROWS
    comptime for rest in range(1, ROWS):
        if rows - row == rest:
            tile[rest, panels](
                take, row, panel, a.unsafe_offset(row * a_stride), a_stride, b, b_stride, depth
            )


@always_inline
def product[
    a_origin: Origin, b_type: DType, b_origin: Origin, TakeType: Take
](
    take: TakeType,
    rows: Int,
    panels: Int,
    a: Pointer[Float32, a_origin],
    a_stride: Int,
    b: Pointer[Scalar[b_type], b_origin],
    b_stride: Int,
    depth: Int,
):
    """Every sum to `take(row, column, VECTOR sums)`, once.

    a : (rows, depth), a_stride from row to row
    b : (panels, depth, PANEL), b_stride from panel to panel
    """
    var panel = 0
    while panel + PANELS <= panels:
        columns[PANELS](
            take, rows, panel, a, a_stride, b.unsafe_offset(panel * b_stride), b_stride, depth
        )
        panel += PANELS
    comptime if PANELS > 1:
        if panel < panels:
            columns[1](
                take, rows, panel, a, a_stride, b.unsafe_offset(panel * b_stride), b_stride, depth
            )
