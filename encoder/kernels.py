"""The operations of `encoder/mojo` in a graph: products and attention of the encoder on the CPU.

They compute what MAX's own do, in float32, in less time (docs/kernels.md). A graph that is built
with their `library` uses them, every other one MAX's. What is added to a product or made of it,
bias, GELU, residual, the compiler fuses into its store, as with its own.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from max.dtype import DType
from max.graph import DeviceRef, Graph, KernelLibrary, TensorType, TensorValue, ops
from mojo.run import subprocess_run_mojo

MOJO = Path(__file__).parent / "mojo"
SOURCES = (__file__, *(str(path) for path in sorted(MOJO.glob("*.mojo"))))
PANEL = 16  # channels; PANEL in product.mojo


class KernelError(RuntimeError):
    """The operations cannot be compiled; the message is one sentence."""


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="max-whisper-mojo-")  # goes with the process


@cache
def compiled() -> Path:
    """The operations, compiled for this process into a folder that goes with it; about a second.

    Raises KernelError."""
    path = Path(_folder().name, "max_whisper.mojoc")
    try:
        subprocess_run_mojo(
            ["precompile", str(MOJO), "-o", str(path)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        lines = [x for x in said.decode(errors="replace").splitlines() if "error" in x] or [
            str(error)
        ]
        raise KernelError(f"Mojo cannot compile {MOJO}: {lines[0]}") from error
    return path


@cache
def _library() -> KernelLibrary:
    found = KernelLibrary()
    found.load_paths([compiled()])
    return found


def library(device: DeviceRef, dtype: DType = DType.float32) -> KernelLibrary | None:
    """What a graph is built with, `Graph(..., kernel_library=library(device))`, that shall have
    these operations where they serve; None: they do not, on this device or in this dtype."""
    return _library() if device.is_cpu() and dtype == DType.float32 else None


def serve(channels: int = 0) -> bool:
    """Whether the graph that is being built has these operations, and they have whole panels for so
    many channels, as in all of Whisper's sizes."""
    return bool(Graph.current.kernel_libraries_paths) and channels % PANEL == 0


def packed(weight: TensorValue) -> TensorValue:
    """weight (out, in) -> (panels, in, 16), with zeros behind the last channel; of an external
    constant once, when it is bound."""
    n_out, n_in = (int(d) for d in weight.shape)
    panels = -(-n_out // PANEL)
    if missing := panels * PANEL - n_out:
        zero = ops.constant(0.0, weight.dtype, weight.device)
        weight = ops.concat([weight, ops.broadcast_to(zero, [missing, n_in])], axis=0)
    return ops.permute(ops.reshape(weight, [panels, PANEL, n_in]), [0, 2, 1])


def linear(x: TensorValue, weight: TensorValue) -> TensorValue:
    """x (B, T, in) float32, weight (out, in) in any dtype -> (B, T, out)."""
    batch, n_ctx, n_in = x.shape
    rows = ops.reshape(x, [batch * n_ctx, n_in])
    out = TensorType(x.dtype, [batch * n_ctx, weight.shape[0]], x.device)
    values = [rows, packed(weight)]
    y = ops.custom("max_whisper.linear", x.device, values, [out])[0].tensor
    return ops.reshape(y, [batch, n_ctx, weight.shape[0]])


def conv1d(x: TensorValue, weight: TensorValue, stride: int) -> TensorValue:
    """Kernel 3, padding 1: x (B, frames, in), weight (out, in, 3) -> (B, frames / stride, out)."""
    n_out, n_in, kernel = (int(d) for d in weight.shape)
    matrix = ops.reshape(ops.permute(weight, [0, 2, 1]), [n_out, kernel * n_in])
    out = TensorType(x.dtype, [x.shape[0], int(x.shape[1]) // stride, n_out], x.device)
    values, given = [x, packed(matrix)], {"stride": stride}
    return ops.custom("max_whisper.conv1d", x.device, values, [out], given)[0].tensor


def qkv_attention(q: TensorValue, k: TensorValue, v: TensorValue, n_head: int) -> TensorValue:
    """q, k and v (B, T, n_state) -> wv (B, T, n_state): every frame looks at every frame."""
    values, given = [q, k, v], {"n_head": n_head}
    return ops.custom("max_whisper.qkv_attention", q.device, values, [q.type], given)[0].tensor
