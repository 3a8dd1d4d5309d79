"""Whoever claims to be Whisper's encoder: the taps that it gives, in one form; it judges nothing.

    max                   the encoder of this package
    torch                 stock openai-whisper in PyTorch's fused attention
    npz:FILE              taps that somebody's port wrote to an .npz or .safetensors
    onnx:FILE             an ONNX model under onnxruntime
    module:PACKAGE:NAME   what NAME(checkpoint) of an importable module returns

A candidate gives what it has. No tap of another one is ever put in the place of one that it lacks,
and what cannot be had is a `CandidateError`.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from whisper.model import AudioEncoder, ModelDimensions

from encoder.engine import Engine, StagesEngine, TappedEngine
from encoder.graph import tap_shapes
from validation.metrics import relative_l2
from validation.reference import Taps, record, stock_encoder
from validation.stages import Stage, stages
from weights import Checkpoint

KINDS = ("max", "torch", "npz:FILE", "onnx:FILE", "module:PACKAGE:NAME")
PERTURBED = "blocks.0.mlp.0.bias"


class CandidateError(Exception):
    """The candidate cannot be asked, or what it gave is no set of taps; one sentence."""


class Candidate(Protocol):
    """One encoder with its weights, asked one 30 s window at a time."""

    name: str  # as it was asked for: "max", "npz:FILE"

    def taps(self, mel: Tensor) -> Taps:
        """mel (1, n_mels, 2 * n_audio_ctx) float32 -> the taps that it has, at least one, in order
        of computation, (1, frames, channels); NaN is left in. Raises CandidateError, EngineError.
        """

    def injected(self, reference: Taps) -> Taps | None:
        """What each of its stages makes of the reference's taps before it; None where nobody can
        feed its stages."""

    def features(self, mel: Tensor) -> Tensor | None:
        """`ln_post` as it runs when nobody looks, (1, n_audio_ctx, n_audio_state); None where it
        does not give that tap."""


def resolve(spec: str, checkpoint: Checkpoint, device: str = "auto") -> Candidate:
    """The candidate that `spec` names, with the weights of `checkpoint`.

    A file of taps and an ONNX model hold what they hold: of the checkpoint they use the dims alone.
    Raises CandidateError on an unknown spec, a missing file, a module that cannot be imported.
    """
    kind, _, rest = spec.partition(":")
    if spec == "max":
        return MaxCandidate(checkpoint, device)
    if spec == "torch":
        return TorchCandidate(checkpoint)
    if kind == "npz" and rest:
        return FileCandidate(spec, Path(rest), checkpoint.dims)
    if kind == "onnx" and rest:
        return OnnxCandidate(spec, Path(rest), checkpoint.dims)
    if kind == "module" and rest:
        # Its own copy: code that folds or zeroes a tensor in place must not reach the reference.
        tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
        return ModuleCandidate(spec, replace(checkpoint, tensors=tensors))
    raise CandidateError(f"candidate is {spec!r}, expected one of {', '.join(KINDS)}")


class MaxCandidate:
    """This package's encoder: the graph with taps, the graph of stages, the production graph."""

    name = "max"

    def __init__(self, checkpoint: Checkpoint, device: str = "auto"):
        self.checkpoint, self.device = checkpoint, device

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.checkpoint, self.device)

    @cached_property
    def tapped(self) -> TappedEngine:
        return TappedEngine(self.checkpoint, self.device)

    @cached_property
    def stages(self) -> StagesEngine:
        return StagesEngine(self.checkpoint.dims, self.device)

    def taps(self, mel: Tensor) -> Taps:
        return self.tapped(mel)

    def injected(self, reference: Taps) -> Taps:
        return self.stages(reference, self.checkpoint.encoder_tensors())

    def features(self, mel: Tensor) -> Tensor:
        return self.engine(mel)


def ran(candidate: Candidate, mel: Tensor, features: Tensor | None) -> dict[str, Any]:
    """The proof that the candidate ran, for the report: the kernels of the production graph, and
    how far its output moves where one tensor bound to it is perturbed. One more encoder run.

    `features` is what `candidate.features(mel)` gave. Only `max` can be proved: for any other
    candidate every value is None.
    """
    if not isinstance(candidate, MaxCandidate) or features is None:
        return {"kernels": None, "perturbed": None, "output_changed_by": None}
    name = f"encoder.{PERTURBED}"
    tensors = dict(candidate.checkpoint.tensors)
    tensors[name] = tensors[name] + 0.5
    other = Engine(replace(candidate.checkpoint, tensors=tensors), candidate.device)
    return {
        "kernels": count_kernels(candidate.engine.kernels),
        "perturbed": PERTURBED,
        "output_changed_by": relative_l2(other(mel), features),
    }


def count_kernels(kernels: Sequence[str]) -> dict[str, int]:
    """How many of the kernel summaries hold each of the names that matter; `mo.div` is the quotient
    of `encoder.kernels.gelu`, `gelu` MAX's own."""
    ours = (f"max_whisper.{name}" for name in ("conv1d", "linear", "qkv_attention"))
    maxs = ("no_mask_flash_attention_cpu", "matmul", "layer_norm", "gelu", "softmax")
    wanted = (*ours, "mo.div", *maxs)
    return {name: sum(name in kernel for kernel in kernels) for name in wanted}


class TorchCandidate:
    """Stock openai-whisper in float32 as `whisper.transcribe` runs it, in PyTorch's fused
    attention, where the reference writes attention out."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint):
        self.dims = checkpoint.dims
        self.module = stock_encoder(checkpoint)

    def taps(self, mel: Tensor) -> Taps:
        return in_order(record(self.module, mel), self.dims, self.name)

    def injected(self, reference: Taps) -> Taps:
        """By the module's own parts, `LayerNorm`, `Linear`, `Conv1d`, `qkv_attention`; what stands
        in `forward` as a sum or as `F.gelu` is written out again."""
        with torch.no_grad():
            return {s.name: answer(self.module, s, reference) for s in stages(self.dims)}

    def features(self, mel: Tensor) -> Tensor:
        with torch.no_grad():
            return self.module(mel)


def answer(module: AudioEncoder, stage: Stage, reference: Taps) -> Tensor:
    """What one stage of the stock encoder gives for the reference's taps, in float32."""
    inputs = [reference[name] for name in stage.inputs]
    match stage.kind:
        case "mel":
            return reference["mel"]
        case "conv":
            x = inputs[0] if stage.inputs == ("mel",) else inputs[0].transpose(1, 2)
            return module.get_submodule(stage.name)(x).transpose(1, 2).contiguous()
        case "gelu" if stage.name.startswith("conv"):
            return F.gelu(inputs[0])
        case "linear" | "layer_norm" | "gelu":
            return module.get_submodule(stage.name)(inputs[0])
        case "attention":
            attention: Any = module.get_submodule(stage.name.removesuffix(".qkv_attention"))
            return attention.qkv_attention(*inputs)[0]
        case "positions":
            return inputs[0] + module.positional_embedding
        case "residual":
            return inputs[0] + inputs[1]
    raise ValueError(f"stage {stage.name} is of unknown kind {stage.kind!r}")


def in_order(
    found: Mapping[str, Tensor], dims: ModelDimensions, who: str, several: bool = False
) -> Taps:
    """`found`, checked and sorted as the network computes: tap names, floating-point numbers,
    (1, frames, channels), of which the 1 may be left out; with `several` any number of windows.
    Raises CandidateError."""
    shapes = tap_shapes(dims)
    if not found:
        raise CandidateError(f"{who} gives no tap")
    for name, x in found.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "taps are mel, conv1 ... ln_post"
            raise CandidateError(f"{who}: {name!r} is no tap; {hint}")
        windows = x.shape[:-2]
        if tuple(x.shape[-2:]) != shapes[name] or not (
            windows == () or windows == (1,) or (several and len(windows) == 1 and windows[0])
        ):
            expected = ("1 or more" if several else "1", *shapes[name])
            raise CandidateError(
                f"{who}: {name} has shape {tuple(x.shape)}, expected "
                f"({', '.join(map(str, expected))})"
            )
        if not x.is_floating_point():
            raise CandidateError(f"{who}: {name} holds {x.dtype}, expected floating-point numbers")
    return {
        name: found[name].detach().cpu().reshape(-1, *shape)
        for name, shape in shapes.items()
        if name in found
    }


class FileCandidate:
    """Taps that were written to a file: an .npz or a .safetensors, tap name -> array.

    Arrays are (frames, channels), mel (n_mels, frames), for one window, or (windows, frames,
    channels) for several; of several the one is taken whose `mel` is nearest, so `mel` must be in
    the file then. Any floating dtype; any of the taps.
    """

    def __init__(self, spec: str, path: Path, dims: ModelDimensions):
        self.name = spec
        self.dims = dims
        self._found = in_order(read_taps(path), dims, path.name, several=True)
        counts = {name: len(x) for name, x in self._found.items()}
        self.windows = max(counts.values())
        if len(set(counts.values())) > 1:
            raise CandidateError(
                f"{path.name}: the taps are of different numbers of windows: {counts}"
            )
        if self.windows > 1 and "mel" not in self._found:
            raise CandidateError(
                f"{path.name} holds {self.windows} windows and no mel to tell them apart; add the "
                "tap mel, or write one file a window"
            )

    def taps(self, mel: Tensor) -> Taps:
        at = 0
        if self.windows > 1:
            distances = (self._found["mel"].double() - mel.double()).square().sum(dim=(1, 2))
            at = int(distances.argmin())
        return {name: x[at : at + 1] for name, x in self._found.items()}

    def injected(self, reference: Taps) -> None:
        return None

    def features(self, mel: Tensor) -> Tensor | None:
        return self.taps(mel).get("ln_post")


def read_taps(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz or .safetensors by name. Raises CandidateError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix != ".npz":
            raise CandidateError(f"{path} is neither an .npz nor a .safetensors")
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except OSError as error:
        raise CandidateError(f"{path}: {error.strerror or error}") from error
    except (
        SafetensorError,
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        TypeError,
        EOFError,
    ) as error:
        raise CandidateError(f"{path} cannot be read as taps: {first_line(error)}") from error


class OnnxCandidate:
    """An ONNX model under onnxruntime on the CPU, in the precision that it was exported in.

    One input, mel (1, n_mels, 2 * n_audio_ctx) float32; outputs named as the taps are, or one
    output of any name, which is taken as `ln_post`.
    """

    def __init__(self, spec: str, path: Path, dims: ModelDimensions):
        self.name, self.dims, self._file = spec, dims, path.name
        try:
            runtime: Any = importlib.import_module("onnxruntime")
            state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        except ImportError as error:
            raise CandidateError(
                f"{spec} needs onnxruntime, which is not installed; it is in the extra `peers`"
            ) from error
        if not path.is_file():
            raise CandidateError(f"{path}: no such file")
        # onnxruntime's own errors have no class in common but Exception
        names = "Fail InvalidArgument InvalidGraph InvalidProtobuf NoModel NoSuchFile NotFound"
        names += " NotImplemented RuntimeException"
        self._errors = (RuntimeError, *(getattr(state, name) for name in names.split()))
        try:
            self._session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise CandidateError(f"{path} cannot be loaded as ONNX: {first_line(error)}") from error
        self._inputs = [i.name for i in self._session.get_inputs()]
        if len(self._inputs) != 1:
            raise CandidateError(
                f"{path.name} takes {len(self._inputs)} inputs ({', '.join(self._inputs)}), "
                "expected one, mel"
            )
        self._outputs = [o.name for o in self._session.get_outputs()]
        if len(self._outputs) == 1 and self._outputs[0] not in tap_shapes(dims):
            self._outputs = ["ln_post"]

    def taps(self, mel: Tensor) -> Taps:
        try:
            results = self._session.run(None, {self._inputs[0]: mel.numpy()})
        except self._errors as error:
            raise CandidateError(
                f"{self._file} cannot be run on mel of shape {tuple(mel.shape)}, float32: "
                f"{first_line(error)}"
            ) from error
        outputs = [torch.from_numpy(np.asarray(result)) for result in results]
        return in_order(dict(zip(self._outputs, outputs, strict=True)), self.dims, self._file)

    def injected(self, reference: Taps) -> None:
        return None

    def features(self, mel: Tensor) -> Tensor | None:
        return self.taps(mel).get("ln_post")


class ModuleCandidate:
    """What a function of the user's makes of a checkpoint: a callable of mel.

    factory(checkpoint) -> callable; callable(mel (1, n_mels, 2 * n_audio_ctx), torch float32) ->
    the features (1, n_audio_ctx, n_audio_state), or a dict of taps. A `torch.nn.Module` that
    returns features is looked into by hooks, as far as its parts have OpenAI's names.
    """

    def __init__(self, spec: str, checkpoint: Checkpoint):
        self.name, self.dims = spec, checkpoint.dims
        _, package, factory = (*spec.split(":"), "")[:3]
        if not package or not factory:
            raise CandidateError(f"candidate is {spec!r}, expected module:PACKAGE:NAME")
        with foreign_errors(spec):
            self._call: Any = getattr(importlib.import_module(package), factory)(checkpoint)
        if not callable(self._call):
            raise CandidateError(
                f"{spec} returned {type(self._call).__name__}, expected a function of mel"
            )

    def taps(self, mel: Tensor) -> Taps:
        if not isinstance(self._call, nn.Module):
            return self._ask(mel, {})
        found: Taps = {}
        with hooks(self._call, self.dims, found):
            return self._ask(mel, found)

    def injected(self, reference: Taps) -> None:
        return None

    def features(self, mel: Tensor) -> Tensor | None:
        return self._ask(mel, {}).get("ln_post")

    def _ask(self, mel: Tensor, seen: Taps) -> Taps:
        """One call, on a copy: the reference's mel is out of its reach. `seen` is what hooks see
        meanwhile; `ln_post` is what it returns, whatever its own module `ln_post` gave."""
        with torch.no_grad(), foreign_errors(self.name):
            given = self._call(mel.clone())
        found = dict(given) if isinstance(given, Mapping) else {**seen, "ln_post": given}
        for name, x in found.items():
            if not isinstance(x, Tensor):
                raise CandidateError(
                    f"{self.name}: {name} is {type(x).__name__}, expected a torch.Tensor"
                )
        return in_order(found, self.dims, self.name)


@contextmanager
def hooks(module: nn.Module, dims: ModelDimensions, found: Taps) -> Iterator[None]:
    """Collect in `found` what passes through the parts of `module` that have OpenAI's names: the
    output of a part named as a tap is, and the input of a part that reads a tap which no part
    gives. Of a part that runs twice the first run counts. `conv2.gelu` cannot be seen so."""
    parts = dict(module.named_modules())
    read_by = {"mel": "conv1", "conv1.gelu": "conv2", "positional_embedding": "blocks.0"}
    for b in (f"blocks.{layer}" for layer in range(dims.n_audio_layer)):
        read_by |= {f"{b}.attn.qkv_attention": f"{b}.attn.out", f"{b}.attn.residual": f"{b}.mlp_ln"}

    def see(name: str, part: nn.Module, x: object) -> None:
        if isinstance(x, Tensor) and name not in found:
            turned = isinstance(part, nn.Conv1d) and name != "mel"  # channels first
            found[name] = (x.transpose(1, 2) if turned else x).clone()  # it may be changed in place

    def output(name: str) -> Callable[..., None]:
        return lambda part, inputs, y: see(name, part, y)

    def first_input(name: str) -> Callable[..., None]:
        return lambda part, inputs: see(name, part, inputs[0] if inputs else None)

    handles = [
        parts[stage.name].register_forward_hook(output(stage.name))
        for stage in stages(dims)
        if stage.name in parts
    ]
    handles += [
        parts[part].register_forward_pre_hook(first_input(name))
        for name, part in read_by.items()
        if part in parts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class foreign_errors:
    """What the user's code raises, of whatever class, and its `sys.exit`, as one sentence with the
    place where it was raised. Ctrl-C goes through."""

    def __init__(self, spec: str):
        self.spec = spec

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception | SystemExit):
            return
        frames = traceback.extract_tb(trace)
        theirs = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
        place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
        raise CandidateError(
            f"{self.spec} raised {type(error).__name__}: {first_line(error)}{place}"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
