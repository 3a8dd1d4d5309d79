"""Other engines from PyPI that run the same weights: what they are and how each is given them.

A package is imported when its peer is loaded, and only then: none of them is needed for anything
else. What is not installed says so, and nothing stands in for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper.model import ModelDimensions

    from weights import Checkpoint


class PeerError(Exception):
    """A peer cannot be given this checkpoint, or cannot run; the message is one sentence."""


@dataclass(frozen=True)
class Heard:
    """A transcript: its text, and the tokens of all segments one after another."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Peer:
    """
    name : of the command line
    what : what runs, in one phrase
    precision : "float32", "bfloat16", "float16" or "int8": what its products are computed in
    packages : name of the distribution -> the module that must be there
    format : what its files are called in the folder of the run; peers of one format share them
    convert : (checkpoint, folder) -> nothing; writes the files
    load : (folder, threads) -> an object with `encoder(mel)`, `transcribe(audio)`, or both
    encodes, transcribes : which of them it has
    remark : dims -> what it does otherwise than asked with such a model, a sentence; None: nothing
    """

    name: str
    what: str
    precision: str
    packages: dict[str, str]
    format: str
    convert: Callable[[Checkpoint, Path], None]
    load: Callable[[Path, int], Any]
    encodes: bool = False
    transcribes: bool = False
    remark: Callable[[ModelDimensions], str | None] = lambda dims: None

    @property
    def shown(self) -> tuple[str, ...]:
        """The distributions whose versions say what ran."""
        return tuple(self.packages) + ("ctranslate2",) * ("faster-whisper" in self.packages)

    def cannot_run(self) -> str | None:
        """Why it cannot run here, in one sentence; None: it can."""
        missing = [name for name, module in self.packages.items() if find_spec(module) is None]
        if not missing:
            return None
        return f"{missing[0]} is not installed: pip install 'max-whisper[peers]'"

    def files(self, folder: Path) -> Path:
        """Where in the folder of the run its files are."""
        return folder / self.format

    def converted(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Its files in `folder`, written where no peer of this format has written them. Raises
        PeerError, WeightsError or OSError, and then leaves nothing."""
        done = self.files(folder)
        if not done.exists():
            writing = folder / f".{self.format}.writing"
            writing.mkdir()
            try:
                self.convert(checkpoint, writing)
                os.replace(writing, done)
            finally:
                shutil.rmtree(writing, ignore_errors=True)
        return done


def to_onnx(checkpoint: Checkpoint, folder: Path) -> None:
    from validation.peers.onnx_model import convert

    convert(checkpoint, folder)


def onnxruntime(folder: Path, threads: int) -> Any:
    from validation.peers.onnx_model import OnnxRuntime

    return OnnxRuntime(folder, threads)


def openvino(precision: str) -> Callable[[Path, int], Any]:
    def load(folder: Path, threads: int) -> Any:
        from validation.peers.onnx_model import OpenVino

        return OpenVino(folder, threads, precision)

    return load


def to_ctranslate2(checkpoint: Checkpoint, folder: Path) -> None:
    from validation.peers.ctranslate2_model import convert

    convert(checkpoint, folder)


def faster_whisper(compute_type: str) -> Callable[[Path, int], Any]:
    def load(folder: Path, threads: int) -> Any:
        from validation.peers.ctranslate2_model import FasterWhisper

        return FasterWhisper(folder, threads, compute_type)

    return load


def to_ggml(checkpoint: Checkpoint, folder: Path) -> None:
    from validation.peers.ggml import FILE, write_ggml

    write_ggml(checkpoint, folder / FILE)


def pywhispercpp(folder: Path, threads: int) -> Any:
    from validation.peers.ggml import WhisperCpp

    return WhisperCpp(folder, threads)


def without_times(dims: ModelDimensions) -> str | None:
    """https://github.com/ggml-org/whisper.cpp/blob/master/src/whisper.cpp, `whisper_full`"""
    if dims.n_text_layer != 2:
        return None
    return (
        "pywhispercpp: whisper.cpp takes a model of two decoder layers for a distilled one and "
        "decodes without timestamps, so that its text and its work are others than asked for."
    )


ONNX, CTRANSLATE2 = {"onnx": "onnx"}, {"faster-whisper": "faster_whisper"}
WHISPER_CPP = {"pywhispercpp": "_pywhispercpp"}
REGISTRY = (
    Peer(
        name="onnxruntime",
        what="the encoder as ONNX in onnxruntime",
        precision="float32",
        packages={"onnxruntime": "onnxruntime", **ONNX},
        format="onnx",
        convert=to_onnx,
        load=onnxruntime,
        encodes=True,
    ),
    Peer(
        name="openvino",
        what="the encoder as ONNX in OpenVINO",
        precision="float32",
        packages={"openvino": "openvino", **ONNX},
        format="onnx",
        convert=to_onnx,
        load=openvino("f32"),
        encodes=True,
    ),
    Peer(
        name="openvino-bfloat16",
        what="the encoder as ONNX in OpenVINO, by its precision hint",
        precision="bfloat16",
        packages={"openvino": "openvino", **ONNX},
        format="onnx",
        convert=to_onnx,
        load=openvino("bf16"),
        encodes=True,
    ),
    Peer(
        name="faster-whisper",
        what="faster-whisper, encoder and decoder by CTranslate2",
        precision="float32",
        packages=CTRANSLATE2,
        format="ctranslate2",
        convert=to_ctranslate2,
        load=faster_whisper("float32"),
        encodes=True,
        transcribes=True,
    ),
    Peer(
        name="faster-whisper-int8",
        what="faster-whisper, weights and products in int8",
        precision="int8",
        packages=CTRANSLATE2,
        format="ctranslate2",
        convert=to_ctranslate2,
        load=faster_whisper("int8"),
        encodes=True,
        transcribes=True,
    ),
    Peer(
        name="pywhispercpp",
        what="whisper.cpp, matrices in float16; its binding gives no features",
        precision="float16",
        packages=WHISPER_CPP,
        format="ggml",
        convert=to_ggml,
        load=pywhispercpp,
        transcribes=True,
        remark=without_times,
    ),
)
PEERS = {peer.name: peer for peer in REGISTRY}
