"""The one room that knows the MAX engine: compile once, keep the artifact, bind weights, execute.

It has no second way to compute anything: what MAX cannot do raises `EngineError`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from max.driver import CPU, Accelerator, Buffer, Device, accelerator_count
from max.engine import CompiledModel, InferenceSession, Model, read
from max.graph import DeviceRef
from torch import Tensor
from whisper.model import ModelDimensions

import encoder.graph
from encoder.graph import encoder_shapes
from weights import Checkpoint

DEVICES = ("auto", "cpu", "gpu")


class EngineError(Exception):
    """MAX cannot do what was asked; the message is one sentence."""


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


def artifact_name(dims: ModelDimensions, device: Device) -> str:
    """File name of the compiled encoder of these dims: what it is, and a hash of all it depends on.

    The hash covers the text of `encoder/graph.py`, the sizes, MAX's version, the processor and the
    accelerator. The weights and the batch size are not part of it: one artifact serves them all.
    """
    sizes = (dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head)
    depends_on = (
        Path(encoder.graph.__file__).read_text(),
        repr((*sizes, dims.n_audio_layer)),
        version("max"),
        cpu_identity(),
        "" if device.is_host else f"{device.api} {device.architecture_name}",
    )
    digest = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    kind = "cpu" if device.is_host else "gpu"
    return f"encoder-{dims.n_audio_layer}x{dims.n_audio_state}-{kind}-float32-{digest}.mef"


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
    """`cpu`, `gpu` (an error without one), or `auto`, which is the CPU: the graph has not run on an
    accelerator yet, so nobody gets one without asking for it."""
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
        with engine_errors(f"write the compiled encoder to {path.parent}"):
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


def compile_encoder(dims: ModelDimensions, device: Device) -> CompiledModel:
    """Build the graph and compile it: minutes, with a progress line."""
    reason = (
        f"Compiling the encoder ({dims.n_audio_layer} layers of {dims.n_audio_state}) for this "
        "machine. It takes minutes, once; later starts take seconds."
    )
    with progress(reason, "compiling"), engine_errors("compile the encoder"):
        graph = encoder.graph.build(dims, DeviceRef.CPU() if device.is_host else DeviceRef.GPU())
        return InferenceSession(devices=[device]).compile(graph)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Only one process at a time is in here for `path`; whoever has to wait says so."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with progress("Another process is compiling the encoder.", "waiting"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def compiled_encoder(dims: ModelDimensions, device: Device) -> CompiledModel:
    """The compiled encoder of these dims: from the artifact folder or, once, from the compiler.

    A second process that wants the same artifact waits for the first one's. A folder that cannot
    be written serves as long as it holds the artifact.
    """
    path = artifact_folder() / artifact_name(dims, device)
    try:
        if compiled := read_artifact(path):
            return compiled
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path):
            if compiled := read_artifact(path):
                return compiled  # another process wrote it meanwhile
            if path.exists():
                print(f"{path} is damaged and will be compiled again", file=sys.stderr)
            compiled = compile_encoder(dims, device)
            write_artifact(compiled, path)
            return compiled
    except OSError as error:
        raise EngineError(
            f"cannot keep the compiled encoder in {path.parent}: {error.strerror or error}; "
            "set MAX_WHISPER_CACHE to a folder that can be written"
        ) from error


def float32_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The encoder's tensors as the graph binds them: float32, contiguous, by name.

    MAX checks neither names nor shapes when it initialises an artifact read from a file, so they
    are checked here, against the graph's own list.
    """
    tensors, shapes = checkpoint.encoder_tensors(), encoder_shapes(checkpoint.dims)
    for name in sorted(shapes.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        expected = shapes.get(name, "nothing")
        if found != expected:
            raise EngineError(f"encoder.{name}: found {found}, the graph expects {expected}")
    return {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}


class Engine:
    """The compiled encoder with a checkpoint's weights: `engine(mel)` -> features.

    Raises `EngineError` where MAX cannot do it; compiles (minutes, once) where no artifact is kept.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto"):
        self.dims = checkpoint.dims
        self._device = select_device(device)
        self.device = "cpu" if self._device.is_host else "gpu"
        # MAX reads CPU weights in place on every execution: they live as long as the model.
        self._weights = float32_weights(checkpoint)
        compiled = compiled_encoder(self.dims, self._device)
        with engine_errors("bind the weights to the compiled encoder"):
            session = InferenceSession(devices=[self._device])
            self._model: Model = session.init(compiled, weights_registry=self._weights)

    @property
    def kernels(self) -> list[str]:
        """The kernels that the compiled model names, in order."""
        return list(self._model.kernel_summaries)

    def __call__(self, mel: Tensor) -> Tensor:
        """mel (batch, n_mels, 2 * n_audio_ctx) float32 -> (batch, n_audio_ctx, n_audio_state).

        On the CPU without a copy on either side; the result's memory belongs to the result alone.
        Raises ValueError on another shape, dtype or device.
        """
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        if mel.ndim != 3 or tuple(mel.shape[1:]) != expected or mel.shape[0] == 0:
            raise ValueError(f"mel has shape {tuple(mel.shape)}, expected (batch, *{expected})")
        if mel.dtype != torch.float32 or mel.device.type != "cpu":
            raise ValueError(f"mel is {mel.dtype} on {mel.device}, expected torch.float32 on cpu")
        with engine_errors("run the encoder"):
            buffer = Buffer.from_dlpack(mel.detach().contiguous())
            if not self._device.is_host:
                buffer = buffer.to(self._device)
            features = self._model.execute(buffer)[0]
            if not self._device.is_host:
                features = features.to(CPU())
            return torch.from_dlpack(features)
