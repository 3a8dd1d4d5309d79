"""The one room that knows the MAX engine: compile once, keep the artifact, bind weights, execute.

It has no second way to compute anything: what MAX cannot do raises `EngineError`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from max.driver import CPU, Accelerator, Buffer, Device, accelerator_count
from max.engine import CompiledModel, InferenceSession, Model, read
from max.graph import DeviceRef, Graph, Module
from torch import Tensor
from whisper.model import ModelDimensions

import encoder.graph
from encoder import kernels
from encoder.graph import encoder_shapes, tap_shapes
from weights import Checkpoint

DEVICES = ("auto", "cpu", "gpu")
SET_TIMER_SLACK, GET_TIMER_SLACK = 29, 30  # of prctl, linux/prctl.h
TIMER_SLACK = 20_000_000  # nanoseconds
_libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


class EngineError(Exception):
    """MAX cannot do what was asked; the message is one sentence."""


@dataclass(frozen=True)
class Kind:
    """A graph, or several in one module, that is compiled and kept.

    build : what makes it
    what : what messages call it, "the encoder"
    sources : the files whose text decides what it computes
    sizes : the fields of `ModelDimensions` that it depends on; the last three are n_state, n_head
        and n_layer
    """

    build: Callable[[ModelDimensions, DeviceRef], Graph | Module]
    what: str
    sources: tuple[str, ...] = encoder.graph.SOURCES
    sizes: tuple[str, ...] = (
        "n_mels",
        "n_audio_ctx",
        "n_audio_state",
        "n_audio_head",
        "n_audio_layer",
    )

    def values(self, dims: ModelDimensions) -> tuple[int, ...]:
        """The sizes of this kind in a model of `dims`."""
        return tuple(getattr(dims, name) for name in self.sizes)


# Another room adds its own kinds.
KINDS = {
    "encoder": Kind(encoder.graph.build, "the encoder"),
    "encoder-taps": Kind(encoder.graph.build_tapped, "the encoder with taps"),
    "stages": Kind(encoder.graph.build_stages, "the encoder's single stages"),
}


def artifact_folder() -> Path:
    """Where compiled graphs are kept: $MAX_WHISPER_CACHE, else the user's cache folder."""
    if folder := os.environ.get("MAX_WHISPER_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "max-whisper"


def cpu_identity() -> str:
    """What a compiled CPU kernel depends on: architecture and instruction sets."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        kept = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
        return platform.machine() + "\n".join(sorted(set(kept)))
    return platform.machine() + platform.processor() + platform.version()


def artifact_name(dims: ModelDimensions, device: Device, kind: str = "encoder") -> str:
    """File name of a compiled graph of these dims: what it is, and a hash of all it depends on.

    The hash covers the text of the builder, the sizes, MAX's version, the processor and the
    accelerator. The weights and the batch size are not part of it: one artifact serves them all.
    """
    sizes = KINDS[kind].values(dims)
    depends_on = (
        *(Path(source).read_text() for source in KINDS[kind].sources),
        repr(sizes),
        version("max"),
        cpu_identity(),
        "" if device.is_host else f"{device.api} {device.architecture_name}",
    )
    digest = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    on = "cpu" if device.is_host else "gpu"
    *_, n_state, _, n_layer = sizes
    return f"{kind}-{n_layer}x{n_state}-{on}-float32-{digest}.mef"


@contextmanager
def progress(reason: str, doing: str) -> Iterator[None]:
    """Say on stderr why this takes long, then how long so far: one live line on a terminal, a line
    every 30 s elsewhere. `doing` is short: a line that wraps cannot be written over."""
    live, began, done = sys.stderr.isatty(), time.monotonic(), threading.Event()
    print(reason, file=sys.stderr)

    def line(end: str) -> None:
        sys.stderr.write(f"{doing}: {time.monotonic() - began:.0f} s{end}")
        sys.stderr.flush()

    def run() -> None:
        while not done.wait(1 if live else 30):
            line("\r" if live else "\n")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        line("\n")


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """What MAX raises (RuntimeError, ValueError, TypeError) as one `EngineError`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise EngineError(f"MAX cannot {what}: {first}") from error


def select_device(name: str) -> Device:
    """`cpu`, `gpu` (an error without one), or `auto`, which is the CPU: on a GPU float32 is TF32,
    hundreds of times less exact (docs/gpu.md), so nobody gets one without asking for it."""
    if name not in DEVICES:
        raise EngineError(f"device is {name!r}, expected one of {', '.join(DEVICES)}")
    if name != "gpu":
        return CPU()
    if accelerator_count() == 0:
        raise EngineError("device gpu was asked for and MAX sees none; use --device cpu")
    return Accelerator()


def write_artifact(compiled: CompiledModel, path: Path) -> None:
    """Keep `compiled` at `path`, its SHA-256 beside it: temporary files, renamed, the hash first.

    A reader that comes between the two renames finds a hash that does not fit, and waits its turn.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        artifact, checksum = Path(folder, "mef"), Path(folder, "sha256")
        with engine_errors(f"write what it compiled to {path.parent}"):
            compiled.export_mef(artifact)
        checksum.write_text(hashlib.sha256(artifact.read_bytes()).hexdigest())
        os.replace(checksum, path.with_suffix(".sha256"))
        os.replace(artifact, path)


def read_artifact(path: Path) -> CompiledModel | None:
    """The artifact at `path`; None where there is none, or where its hash does not fit."""
    checksum = path.with_suffix(".sha256")
    if not path.exists() or not checksum.exists():
        return None
    if checksum.read_text() != hashlib.sha256(path.read_bytes()).hexdigest():
        return None
    with engine_errors(f"read its own artifact {path} (remove it to compile again)"):
        return read(path)


def compile_encoder(dims: ModelDimensions, device: Device, kind: str) -> CompiledModel:
    """Build the graph of this kind and compile it: minutes, with a progress line."""
    what = KINDS[kind].what
    *_, n_state, _, n_layer = KINDS[kind].values(dims)
    reason = (
        f"Compiling {what} ({n_layer} layers of {n_state}) for this "
        "machine. It takes minutes, once; later starts take seconds."
    )
    with progress(reason, "compiling"), engine_errors(f"compile {what}"):
        graph = KINDS[kind].build(dims, DeviceRef.CPU() if device.is_host else DeviceRef.GPU())
        own = [kernels.compiled()] if device.is_host else []
        return InferenceSession(devices=[device]).compile(graph, custom_extensions=own)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Only one process at a time is in here for `path`; whoever has to wait says so."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress(f"Another process is compiling {what}.", "waiting"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def compiled_encoder(dims: ModelDimensions, device: Device, kind: str = "encoder") -> CompiledModel:
    """The compiled graph of these dims: from the artifact folder or, once, from the compiler.

    A second process that wants the same artifact waits for the first one's. A folder that cannot
    be written serves as long as it holds the artifact.
    """
    path = artifact_folder() / artifact_name(dims, device, kind)
    try:
        if compiled := read_artifact(path):
            return compiled
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path, KINDS[kind].what):
            if compiled := read_artifact(path):
                return compiled  # another process wrote it meanwhile
            if path.exists():
                print(f"{path} is damaged and will be compiled again", file=sys.stderr)
            compiled = compile_encoder(dims, device, kind)
            write_artifact(compiled, path)
            return compiled
    except OSError as error:
        what = KINDS[kind].what.removeprefix("the ")
        raise EngineError(
            f"cannot keep the compiled {what} in {path.parent}: {error.strerror or error}; "
            "set MAX_WHISPER_CACHE to a folder that can be written"
        ) from error


def float32_weights(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], part: str = "encoder"
) -> dict[str, Tensor]:
    """The tensors of a part of the model as its graph binds them: float32, contiguous, by name.

    MAX checks neither names nor shapes when it initialises an artifact read from a file, so they
    are checked here, against `shapes`, the graph's own list.
    """
    for name in sorted(shapes.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        expected = shapes.get(name, "nothing")
        if found != expected:
            raise EngineError(f"{part}.{name}: found {found}, the graph expects {expected}")
    return {name: tensors[name].detach().to("cpu", torch.float32).contiguous() for name in shapes}


def check_input(name: str, x: Tensor, expected: tuple[int, ...]) -> Tensor:
    """`x`, contiguous, where it is (batch, *expected), float32, on the CPU; else ValueError."""
    if x.ndim == 0 or x.shape[0] == 0 or tuple(x.shape[1:]) != expected:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (batch, {', '.join(map(str, expected))})"
        )
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"{name} is {x.dtype} on {x.device}, expected torch.float32 on cpu")
    return x.detach().contiguous()


def in_place(x: Tensor) -> Buffer:
    """The memory of `x`, contiguous and on the CPU, as MAX's: for what many executions read, or
    what they write."""
    with engine_errors("use a tensor in place"):
        return Buffer.from_dlpack(x)


@contextmanager
def calm() -> Iterator[None]:
    """The caller, and for good the threads that start inside, wake late from a sleep of a given
    length, by up to TIMER_SLACK.

    With the first execution of a process MAX starts a thread that wakes every 100 us from then on,
    each time at the cost of one that computes (docs/kernels.md). On Linux a thread inherits the
    timer slack of the one that starts it; elsewhere nothing is done.
    """
    if _libc is None:
        yield
        return
    before = _libc.prctl(GET_TIMER_SLACK)
    _libc.prctl(SET_TIMER_SLACK, ctypes.c_ulong(TIMER_SLACK))
    try:
        yield
    finally:
        _libc.prctl(SET_TIMER_SLACK, ctypes.c_ulong(before))


class Bound:
    """A compiled kind with its weights, to be executed."""

    def __init__(self, kind: str, dims: ModelDimensions, device: str, weights: dict[str, Tensor]):
        self.dims = dims
        self._device = select_device(device)
        self.device = "cpu" if self._device.is_host else "gpu"
        # MAX reads biases and norms in place on every execution: they live as long as the model.
        # What products read it has packed into memory of its own when it is bound.
        self._weights = weights
        self._what = KINDS[kind].what
        compiled = compiled_encoder(dims, self._device, kind)
        with engine_errors(f"bind the weights to {self._what}"):
            session = InferenceSession(devices=[self._device])
            self._models: dict[str, Model] = session.init_all(compiled, weights_registry=weights)
        self._model = next(iter(self._models.values()))  # the only one of most kinds

    @property
    def kernels(self) -> list[str]:
        """The kernels that the compiled graphs name, in order."""
        return [kernel for model in self._models.values() for kernel in model.kernel_summaries]

    def _execute(self, *inputs: Tensor | Buffer, graph: str | None = None) -> list[Tensor]:
        """The outputs of the kind's only graph, or of `graph`, for its inputs. On the CPU without a
        copy on either side; the memory of an output belongs to it alone."""
        model = self._model if graph is None else self._models[graph]
        with engine_errors(f"run {self._what}"):
            buffers = [x if isinstance(x, Buffer) else Buffer.from_dlpack(x) for x in inputs]
            if not self._device.is_host:
                buffers = [buffer.to(self._device) for buffer in buffers]
            with calm() if self._device.is_host else nullcontext():
                results = model.execute(*buffers)
            if not self._device.is_host:
                results = [result.to(CPU()) for result in results]
            outputs = [torch.from_dlpack(result) for result in results]
        # an output that is an input unchanged is copied
        given = {x.data_ptr() for x in inputs if isinstance(x, Tensor)}
        return [x.clone() if x.data_ptr() in given else x for x in outputs]


class Engine(Bound):
    """The compiled encoder with a checkpoint's weights: `engine(mel)` -> features.

    Raises `EngineError` where MAX cannot do it; compiles (minutes, once) where no artifact is kept.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto"):
        weights = float32_weights(checkpoint.encoder_tensors(), encoder_shapes(checkpoint.dims))
        super().__init__("encoder", checkpoint.dims, device, weights)

    def __call__(self, mel: Tensor) -> Tensor:
        """mel (batch, n_mels, 2 * n_audio_ctx) float32 -> (batch, n_audio_ctx, n_audio_state).

        Raises ValueError on another shape, dtype or device.
        """
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        return self._execute(check_input("mel", mel, expected))[0]


class TappedEngine(Bound):
    """The same network from the same builder, every tap an output: `engine(mel)` -> taps.

    The compiler fuses less of it: compare its `ln_post` with `Engine` before believing its taps.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto"):
        weights = float32_weights(checkpoint.encoder_tensors(), encoder_shapes(checkpoint.dims))
        super().__init__("encoder-taps", checkpoint.dims, device, weights)
        self._names = list(tap_shapes(self.dims))

    def __call__(self, mel: Tensor) -> dict[str, Tensor]:
        """mel (batch, n_mels, 2 * n_audio_ctx) float32 -> every tap by name, in order of
        computation, (batch, frames, channels); `mel` as the graph got it. Raises as `Engine`."""
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        outputs = self._execute(check_input("mel", mel, expected))
        return dict(zip(self._names, outputs, strict=True))


class StagesEngine(Bound):
    """Each stage alone, fed a reference's taps: `engine(reference, tensors)` -> what each answers.

    One artifact, of one block, serves every layer, every depth and all weights of a width.
    """

    def __init__(self, dims: ModelDimensions, device: str = "auto"):
        one = replace(dims, n_audio_layer=1)
        super().__init__("stages", one, device, {})
        self.dims = dims
        self._shapes = tap_shapes(dims)
        self._taps, self._weight_names = list(tap_shapes(one)), list(encoder_shapes(one))

    def __call__(
        self, reference: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """reference: every tap, (batch, ...) float32; tensors: the encoder's ("conv1.weight").

        Returns for every tap what its stage, with `tensors`, makes of the reference's taps before
        it. Raises ValueError on a missing tap, or another shape, dtype or device; EngineError.
        """
        weights = float32_weights(tensors, encoder_shapes(self.dims))
        if missing := [name for name in self._shapes if name not in reference]:
            raise ValueError(f"the reference lacks the tap {missing[0]}")
        given = {name: check_input(name, reference[name], s) for name, s in self._shapes.items()}
        if len(batches := {len(x) for x in given.values()}) > 1:
            raise ValueError(f"the reference's taps are of several batches: {sorted(batches)}")
        first = next(i for i, name in enumerate(self._taps) if name.startswith("blocks.0."))
        answers: dict[str, Tensor] = {}
        for layer in range(self.dims.n_audio_layer):
            names = [of_layer(name, layer) for name in self._taps]
            fed = list(names)
            if layer:  # the block goes on with what the stem's last tap is replaced by
                fed[first - 1] = f"blocks.{layer - 1}"
            inputs = [given[name] for name in fed]
            inputs += [weights[of_layer(name, layer)] for name in self._weight_names]
            # the stem answers the same each time; ln_post was fed the last block in the last round
            answers |= zip(names, self._execute(*inputs), strict=True)
        return {name: answers[name] for name in self._shapes}


def of_layer(name: str, layer: int) -> str:
    """The name in block `layer` of a tap or tensor of block 0; other names stay."""
    return re.sub(r"^blocks\.0(?=\.|$)", f"blocks.{layer}", name)
