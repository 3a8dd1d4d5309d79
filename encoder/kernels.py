"""The operations of `encoder/mojo` in a graph: products and attention of the encoder on the CPU;
and a GELU.

They compute what MAX's own do, in float32, in less time (docs/kernels.md). A graph that is built
with `operations` uses them, every other one MAX's. What is added to a product or made of it,
bias, GELU, residual, the compiler fuses into its store, as with its own.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from max.dtype import DType
from max.graph import DeviceRef, Graph, KernelLibrary, TensorType, TensorValue, ops
from mojo.run import subprocess_run_mojo

MOJO = Path(__file__).parent / "mojo"
SOURCES = (__file__, *(str(path) for path in sorted(MOJO.glob("*.mojo"))))
PANEL = 16  # channels; PANEL in product.mojo
LIBRARY = "max_whisper.mojoc"

# The normal distribution's Phi(x) - 1/2 = x P(x^2) / Q(x^2), factors from the constant on, for x
# within SATURATED, beyond which that is 1/2 or -1/2 in float32 (docs/kernels/fit_phi.py).
SATURATED = 5.543717384338379
PHI_P = (
    0.398942232131958,
    0.03407641500234604,
    0.004689943045377731,
    0.00017095997463911772,
    6.352489890559809e-06,
    2.2480783457012876e-08,
)
PHI_Q = (
    1.0,
    0.2520827353000641,
    0.028771284967660904,
    0.0018965506460517645,
    7.425806688843295e-05,
    1.189707745652413e-06,
)


class KernelError(RuntimeError):
    """The operations cannot be compiled; the message is one sentence."""


_folders: list[tempfile.TemporaryDirectory] = []  # go with the process
_alone = threading.Lock()


def compiled() -> Path:
    """The operations, compiled for this process into a folder that goes with it; seconds, once.

    Raises KernelError."""
    with _alone:
        return _compiled()


@cache
def _compiled() -> Path:
    try:
        _folders.append(tempfile.TemporaryDirectory(prefix="max-whisper-mojo-"))
        path = Path(_folders[-1].name, LIBRARY)
        subprocess_run_mojo(
            ["precompile", str(MOJO), "-o", str(path)], check=True, capture_output=True
        )
    except OSError as error:
        raise KernelError(
            f"cannot compile {MOJO} into {tempfile.gettempdir()}: {error.strerror or error}; set "
            "TMPDIR to a folder that can be written"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), str(error))
        raise KernelError(f"Mojo cannot compile {MOJO}: {first}") from error
    return path


@cache
def _library() -> KernelLibrary:
    found = KernelLibrary()
    found.load_paths([compiled()])
    return found


def operations(device: DeviceRef, dtype: DType = DType.float32) -> KernelLibrary | None:
    """What a graph is built with, `Graph(..., kernel_library=operations(device))`, that shall have
    these operations where they serve; None: they do not, on this device or in this dtype."""
    return _library() if device.is_cpu() and dtype == DType.float32 else None


def serve(channels: int = 0) -> bool:
    """Whether the graph that is being built has these operations, and they have whole panels for so
    many channels, as in all of Whisper's sizes."""
    has = any(path.name == LIBRARY for path in Graph.current.kernel_libraries_paths)
    return has and channels % PANEL == 0


def served(x: TensorValue) -> bool:
    """Of three dimensions, float32, on the CPU."""
    return x.rank == 3 and x.dtype == DType.float32 and x.device.is_cpu()


def require(name: str, fits: bool, *values: TensorValue) -> None:
    """Raise ValueError where an operation would read other memory than its inputs'."""
    if not fits:
        given = ", ".join(f"{x.dtype.name} ({', '.join(map(str, x.shape))})" for x in values)
        raise ValueError(f"{name} cannot take {given}")


def packed(weight: TensorValue) -> TensorValue:
    """weight (out, in) -> (panels, in, 16), with zeros behind the last channel: a copy, of an
    external constant made once, when it is bound, of another value with each run."""
    n_out, n_in = (int(d) for d in weight.shape)
    panels = -(-n_out // PANEL)
    if missing := panels * PANEL - n_out:
        zero = ops.constant(0.0, weight.dtype, weight.device)
        weight = ops.concat([weight, ops.broadcast_to(zero, [missing, n_in])], axis=0)
    return ops.permute(ops.reshape(weight, [panels, PANEL, n_in]), [0, 2, 1])


def polynomial(x: TensorValue, factors: Sequence[float]) -> TensorValue:
    """factors[0] + factors[1] * x + factors[2] * x**2 ..."""
    *lower, y = [ops.constant(factor, x.dtype, x.device) for factor in factors]
    for factor in reversed(lower):
        y = y * x + factor
    return y


def gelu(x: TensorValue) -> TensorValue:
    """`GELU`, the exact one, x * Phi(x), within 1.1e-6 of it for |x| < 8; x float32 of any shape.

    Not of Mojo but of the graph's operations, for the compiler to fuse; MAX's own, `ops.gelu`, has
    an erf that costs several times as much (docs/kernels.md)."""
    low, high = (ops.constant(z, x.dtype, x.device) for z in (-SATURATED, SATURATED))
    z = ops.min(ops.max(x, low), high)
    square = z * z
    return x * (z * polynomial(square, PHI_P) / polynomial(square, PHI_Q) + 0.5)


def linear(x: TensorValue, weight: TensorValue) -> TensorValue:
    """x (B, T, in) float32, weight (out, in) in any dtype -> (B, T, out)."""
    fits = served(x) and weight.rank == 2 and x.shape[2] == weight.shape[1]
    require("linear", fits, x, weight)
    batch, n_ctx, n_in = x.shape
    rows = ops.reshape(x, [batch * n_ctx, n_in])
    out = TensorType(x.dtype, [batch * n_ctx, weight.shape[0]], x.device)
    values = [rows, packed(weight)]
    y = ops.custom("max_whisper.linear", x.device, values, [out])[0].tensor
    return ops.reshape(y, [batch, n_ctx, weight.shape[0]])


def conv1d(x: TensorValue, weight: TensorValue, stride: int) -> TensorValue:
    """Kernel 3, padding 1: x (B, frames, in), weight (out, in, 3) -> (B, frames / stride, out)."""
    fits = served(x) and weight.rank == 3 and weight.shape[2] == 3
    fits = fits and x.shape[2] == weight.shape[1] and int(weight.shape[0]) % PANEL == 0
    require("conv1d", fits, x, weight)
    n_out, n_in, kernel = (int(d) for d in weight.shape)
    matrix = ops.reshape(ops.permute(weight, [0, 2, 1]), [n_out, kernel * n_in])
    out = TensorType(x.dtype, [x.shape[0], -(-int(x.shape[1]) // stride), n_out], x.device)
    values, given = [x, packed(matrix)], {"stride": stride}
    return ops.custom("max_whisper.conv1d", x.device, values, [out], given)[0].tensor


def qkv_attention(q: TensorValue, k: TensorValue, v: TensorValue, n_head: int) -> TensorValue:
    """q, k and v (B, T, n_state) -> wv (B, T, n_state): every frame looks at every frame."""
    fits = served(q) and q.shape == k.shape == v.shape and k.dtype == v.dtype == q.dtype
    require("qkv_attention", fits and int(q.shape[2]) % (n_head * PANEL) == 0, q, k, v)
    values, given = [q, k, v], {"n_head": n_head}
    return ops.custom("max_whisper.qkv_attention", q.device, values, [q.type], given)[0].tensor
