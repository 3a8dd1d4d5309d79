"""The reference's side of a comparison in one file: taps, noise floors, mel and hashes.

With it a candidate is judged where stock openai-whisper is not run. A file that is damaged, of
another format, or of another encoder's weights is refused; nothing in it is computed anew.

The file is a safetensors file: tensors "0/mel", "0/conv1", ... (window/tap) in float32, and under
the metadata key "max_whisper_golden" a JSON description with a SHA-256 of itself and of all
tensors. One window with every tap takes 185 MB for tiny, 4.5 GB for large; `taps=` keeps fewer.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from whisper.model import ModelDimensions

from validation.stages import stages
from weights import Checkpoint

Taps = dict[str, Tensor]  # tap name -> (1, frames, channels); only mel is (1, n_mels, frames)

FORMAT = 1
KEY = "max_whisper_golden"
PACKAGES = ("torch", "numpy", "openai-whisper", "safetensors")


class GoldenError(Exception):
    """The file cannot be written or used; the message is one sentence."""


@dataclass(frozen=True)
class Golden:
    """The reference's side of one window: everything that a candidate is judged by.

    mel        (1, n_mels, 2 * n_audio_ctx) float32, what both sides are given
    taps       the stock encoder's, float32, eager attention
    floor      relative L2 of each tap from the float64 twin
    own_floor  relative L2 that float32 costs in each stage alone
    file, window, audio_sha256   which window of which audio this is
    """

    mel: Tensor
    taps: Taps
    floor: dict[str, float]
    own_floor: dict[str, float]
    file: str = ""
    window: int = 0
    audio_sha256: str = ""

    @property
    def mel_sha256(self) -> str:
        """Of the float32 values in row order."""
        return hashlib.sha256(_bytes(self.mel)).hexdigest()


@dataclass(frozen=True)
class Goldens:
    """One or more windows of one encoder.

    weights_sha256  of the checkpoint's file
    encoder_sha256  of the encoder's tensors alone, see `encoder_sha256`
    versions        of the packages that computed the taps
    """

    model: str
    dims: ModelDimensions
    weights_sha256: str
    encoder_sha256: str
    versions: dict[str, str]
    windows: list[Golden]


def _bytes(x: Tensor) -> Any:
    """The values in row order, as something to hash."""
    return x.detach().contiguous().reshape(-1).numpy()


def encoder_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the encoder's tensors: names, shapes and float32 values. It is the same for a
    whole checkpoint, for its encoder alone, and for a copy in float32 of one in float16."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name].float()))
    return digest.hexdigest()


def goldens_of(checkpoint: Checkpoint, windows: Iterable[Golden]) -> Goldens:
    """`windows`, which the checkpoint's encoder gave, with what has to be known about it."""
    return Goldens(
        model=Path(checkpoint.source.name).name,
        dims=checkpoint.dims,
        weights_sha256=checkpoint.source.sha256,
        encoder_sha256=encoder_sha256(checkpoint.encoder_tensors()),
        versions={package: version(package) for package in PACKAGES},
        windows=list(windows),
    )


def _content_sha256(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description without its own hash, and of all tensors with their names."""
    stated = {key: value for key, value in description.items() if key != "content_sha256"}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True, allow_nan=False).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def save(path: str | os.PathLike[str], goldens: Goldens, taps: Iterable[str] | None = None) -> None:
    """Write the file: a temporary one beside it, renamed, so that `path` is never half of one.

    `taps` names those to keep (mel is always kept); None keeps all. A candidate can be injected
    with the reference's inputs only at stages whose inputs were kept.
    Raises GoldenError where a name is no tap of this encoder or the file cannot be written,
    ValueError where a window is not what `Golden` says.
    """
    target = Path(path)
    names = [stage.name for stage in stages(goldens.dims)]
    kept = set(names if taps is None else taps) | {"mel"}
    if unknown := sorted(kept - set(names)):
        raise GoldenError(f"the encoder has no tap {', '.join(unknown)}, so none can be kept")
    tensors: dict[str, Tensor] = {}
    windows = []
    for i, golden in enumerate(goldens.windows):
        if "mel" in golden.taps and not torch.equal(golden.taps["mel"], golden.mel):
            raise ValueError(f"window {i}: the tap mel is not the window's mel")
        found = {name: x for name, x in {**golden.taps, "mel": golden.mel}.items() if name in kept}
        for name, x in found.items():
            if x.dtype != torch.float32:
                raise ValueError(f"window {i}: {name} is {x.dtype}, expected torch.float32")
            tensors[f"{i}/{name}"] = x.detach().contiguous()
        windows.append(
            {
                "file": golden.file,
                "window": golden.window,
                "audio_sha256": golden.audio_sha256,
                "mel_sha256": golden.mel_sha256,
                "taps": [name for name in names if name in found],
                "floor": {name: golden.floor[name] for name in names if name in golden.floor},
                "own_floor": {n: golden.own_floor[n] for n in names if n in golden.own_floor},
            }
        )
    description: dict[str, Any] = {
        "format": FORMAT,
        "model": goldens.model,
        "dims": asdict(goldens.dims),
        "weights_sha256": goldens.weights_sha256,
        "encoder_sha256": goldens.encoder_sha256,
        "versions": goldens.versions,
        "windows": windows,
    }
    description["content_sha256"] = _content_sha256(description, tensors)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as folder:
            temporary = Path(folder, "golden")
            temporary.touch()
            mode = temporary.stat().st_mode  # any new file's; safetensors keeps others from reading
            save_file(tensors, temporary, metadata={KEY: json.dumps(description)})
            temporary.chmod(mode)
            os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GoldenError(f"{target} cannot be written: {reason}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors, as they stand in the file."""
    if not path.is_file():
        raise GoldenError(f"{path} cannot be read: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise GoldenError(f"{path} is no golden: it was not made with parity --save")
            description = json.loads(metadata[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise GoldenError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise GoldenError(f"{path} is damaged or no safetensors file: {error}") from error
    return description, tensors


def load(path: str | os.PathLike[str], checkpoint: Checkpoint | None = None) -> Goldens:
    """Read a file that `save` wrote.

    Raises GoldenError where it is missing, damaged (its content does not fit its hash) or of
    another format, and where `checkpoint` is given and its encoder is not the one that was saved.
    """
    target = Path(path)
    description, tensors = _read(target)
    if (found := description.get("format")) != FORMAT:
        raise GoldenError(
            f"{target} is a golden of format {found}, this version reads format {FORMAT}; "
            "make it again with parity --save"
        )
    if description.get("content_sha256") != _content_sha256(description, tensors):
        raise GoldenError(
            f"{target} is damaged: its content does not fit its own SHA-256; make it again with "
            "parity --save"
        )
    if checkpoint is not None:
        given = encoder_sha256(checkpoint.encoder_tensors())
        if given != description["encoder_sha256"]:
            raise GoldenError(
                f"{target} holds the reference of {description['model']}, whose encoder has "
                f"SHA-256 {description['encoder_sha256'][:12]}, and "
                f"{Path(checkpoint.source.name).name} has {given[:12]}: give --model the "
                "checkpoint that the golden was made from"
            )
    try:
        return _goldens(description, tensors)
    except KeyError as error:
        raise GoldenError(f"{target} lacks {error}: it was not made with parity --save") from error


def _goldens(description: dict[str, Any], tensors: dict[str, Tensor]) -> Goldens:
    """What the file says, in our types; raises KeyError with the name of what it does not say."""
    windows = []
    for i, stated in enumerate(description["windows"]):
        taps = {name: tensors[f"{i}/{name}"] for name in stated["taps"]}
        windows.append(
            Golden(
                mel=taps["mel"],
                taps=taps,
                floor=stated["floor"],
                own_floor=stated["own_floor"],
                file=stated["file"],
                window=stated["window"],
                audio_sha256=stated["audio_sha256"],
            )
        )
    return Goldens(
        model=description["model"],
        dims=ModelDimensions(**description["dims"]),
        weights_sha256=description["weights_sha256"],
        encoder_sha256=description["encoder_sha256"],
        versions=description["versions"],
        windows=windows,
    )
