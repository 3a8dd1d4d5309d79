"""Reads checkpoint files as they lie on disk, names untouched; it runs no code from a pickle and
loads no tensor before its name and shape have been checked."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from whisper.model import ModelDimensions

from .errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_INDEX_SUFFIX = ".safetensors.index.json"

_HEX_BLOCK = 1 << 20  # bytes per read while hashing

# How safetensors spells the dtypes that a Whisper is published in, and the one of compact token
# ids.
_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I32": "int32",
    "I64": "int64",
}

# transformers' configuration_whisper.py -> whisper.model.ModelDimensions
_CONFIG_FIELDS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what the header says of it, and how to read it."""

    shape: tuple[int, ...]
    dtype: str  # as torch spells it, without "torch."
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Contents:
    """A checkpoint as its file holds it, under the file's own names."""

    path: Path  # what errors name: the file, or the index of the shards
    parts: tuple[Path, ...]  # the files that hold the tensors, sorted by name
    stored: dict[str, Stored]
    dims: ModelDimensions | None  # as the file or its config.json states them
    compact: bool = False  # decoder.token_embedding is stored as `weights.compact` describes


def sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the bytes of `paths`, one file after another, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(_HEX_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise WeightsError(f"weights: cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def read(path: Path) -> Contents:
    """The checkpoint at an existing `path`: `.safetensors`, `.safetensors.index.json`, `.pt`, or a
    folder with `model.safetensors` or `model.safetensors.index.json`, and `config.json`."""
    if path.is_dir():
        for name in (SINGLE, INDEX):
            if (path / name).exists():
                config = path / CONFIG
                return read_safetensors(path / name, config if config.exists() else None)
        raise WeightsError(f"weights: the folder {path} holds neither {SINGLE} nor {INDEX}")
    if path.name.endswith((".safetensors", _INDEX_SUFFIX)):
        return read_safetensors(path, None)
    if path.suffix == ".pt":
        return read_pt(path)
    raise WeightsError(
        f"weights: {path} is not a checkpoint that can be read, expected .safetensors, "
        f"{_INDEX_SUFFIX}, .pt, or a folder with {SINGLE}"
    )


def read_safetensors(path: Path, config: Path | None) -> Contents:
    """One safetensors file, or the index of several.

    `config` is the `config.json` of transformers that states the dims, or None. Both it and the
    metadata may state them; then they must agree.
    """
    if path.name.endswith(_INDEX_SUFFIX):
        stored, parts, metadata = _shards(path)
    else:
        stored, metadata = _one_safetensors(path)
        parts = (path,)
    embedding = metadata.get("token_embedding")
    if embedding not in (None, "compact"):
        raise WeightsError(
            f"weights: the metadata token_embedding is {embedding!r}, expected 'compact' or none "
            f"({path.name})"
        )
    dims = None
    if "dims" in metadata:
        dims = parse_dims(_json(metadata["dims"], path, "the metadata dims"), path)
    contents = Contents(path, parts, stored, dims, compact=embedding == "compact")
    return with_config(contents, config) if config else contents


def with_config(contents: Contents, config: Path) -> Contents:
    """`contents` with the dims that the `config.json` of transformers at `config` states."""
    try:
        text = config.read_text(encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"weights: cannot read {config}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise WeightsError(f"weights: {config} is not JSON: {error}") from error
    dims = parse_config(_json(text, config, "it"), config)
    if contents.dims is not None and contents.dims != dims:
        says, beside = asdict(contents.dims), asdict(dims)
        differ = [
            f"{name} is {beside[name]}, expected {says[name]}"
            for name in says
            if beside[name] != says[name]
        ]
        raise WeightsError(
            f"weights: {config.name} disagrees with the metadata of {contents.path.name}: "
            + "; ".join(differ)
        )
    return replace(contents, dims=dims)


def _one_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        stored = {}
        for name in file.keys():  # noqa: SIM118  # it cannot be iterated itself
            header = file.get_slice(name)
            dtype = str(header.get_dtype())
            stored[name] = Stored(
                tuple(header.get_shape()), _DTYPES.get(dtype, dtype), _reader(file, name, path)
            )
        return stored, file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(
            f"weights: {path} is truncated or is not a safetensors file: {error}"
        ) from error
    except OSError as error:
        raise WeightsError(f"weights: cannot read {path}: {error.strerror or error}") from error


def _reader(file: Any, name: str, path: Path) -> Callable[[], torch.Tensor]:
    def read_one() -> torch.Tensor:
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"weights: cannot read {name} ({path.name}): {error}") from error
        return tensor

    return read_one


def _shards(index: Path) -> tuple[dict[str, Stored], tuple[Path, ...], dict[str, str]]:
    parts = shard_paths(index)
    weight_map = _weight_map(index)
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        if not part.is_file():
            raise WeightsError(f"weights: the shard {part.name} is missing beside {index}")
        held, said = _one_safetensors(part)
        metadata |= said
        for name, tensor in held.items():
            if weight_map.get(name) != part.name:
                raise WeightsError(
                    f"weights: {name} lies in {part.name}, expected "
                    f"{weight_map.get(name, 'nowhere')} ({index.name})"
                )
            stored[name] = tensor
    if lost := sorted(weight_map.keys() - stored.keys()):
        raise WeightsError(
            f"weights: {lost[0]} is missing from {weight_map[lost[0]]}, where {index.name} says it "
            "is" + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else "")
        )
    return stored, parts, metadata


def shard_paths(index: Path) -> tuple[Path, ...]:
    """The files that `index` names, beside it, sorted by name and each once."""
    return tuple(index.parent / name for name in sorted(set(_weight_map(index).values())))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        text = index.read_text(encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"weights: cannot read {index}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise WeightsError(f"weights: {index} is not JSON: {error}") from error
    value = _json(text, index, "it")
    found = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(found, dict) or not found:
        raise WeightsError(
            f"weights: {index} has no weight_map, expected tensor names and their files"
        )
    for name, file in found.items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain:
            raise WeightsError(
                f"weights: {index.name} puts {name} in {file!r}, expected the name of a "
                ".safetensors file in the same folder"
            )
    return found


def read_pt(path: Path) -> Contents:
    """OpenAI's own form, `{"dims": {...}, "model_state_dict": {...}}` written by `torch.save`.

    It is read with `weights_only=True`: a pickle that names any function but those that make
    tensors is refused before the function is called.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise WeightsError(f"weights: cannot read {path}: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            # Torch's remark on a pickle's protocol: what it cannot read, it refuses below.
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights: {path} is refused: its pickle wants to run code or is damaged, expected the "
            "dims and tensors of OpenAI's checkpoints and nothing else"
        ) from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        # What torch's readers raise on bytes that are cut off or were never a checkpoint.
        raise WeightsError(
            f"weights: {path} is truncated or is not a checkpoint of torch.save "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(found, dict) or not {"dims", "model_state_dict"} <= found.keys():
        held = sorted(map(str, found))[:5] if isinstance(found, dict) else type(found).__name__
        raise WeightsError(
            f"weights: {path} holds {held}, expected dims and model_state_dict, as OpenAI publishes"
        )
    state = found["model_state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(
            f"weights: model_state_dict is a {type(state).__name__}, expected a dict ({path.name})"
        )
    stored = {}
    for name, tensor in state.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, torch.Tensor)
            or tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
        ):
            raise WeightsError(
                f"weights: {name} is a {_kind(tensor)}, expected a dense tensor ({path.name})"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored[name] = Stored(tuple(tensor.shape), dtype, tensor.detach)
    return Contents(path, (path,), stored, parse_dims(found["dims"], path))


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor with layout {value.layout} on {value.device}"
    return type(value).__name__


def _json(text: str, path: Path, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"weights: {what} is not JSON: {error} ({path})") from error


def parse_dims(value: object, path: Path) -> ModelDimensions:
    """`ModelDimensions` from a mapping of its ten fields; the text fields may be 0, all or none."""
    names = [field.name for field in fields(ModelDimensions)]
    if not isinstance(value, dict) or set(value) != set(names):
        held = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise WeightsError(f"weights: dims are {held}, expected the fields {names} ({path.name})")
    for name in names:
        number = value[name]
        least = 0 if name in TEXT_FIELDS else 1
        if type(number) is not int or number < least:
            raise WeightsError(
                f"weights: dims {name} is {number!r}, expected a whole number of {least} or more "
                f"({path.name})"
            )
    dims = ModelDimensions(**value)
    text = [getattr(dims, name) for name in TEXT_FIELDS]
    if any(text) and not all(text):
        raise WeightsError(
            f"weights: dims {dict(zip(TEXT_FIELDS, text, strict=True))} are 0 in part, expected "
            f"all or none ({path.name})"
        )
    for state, head in (
        (dims.n_audio_state, dims.n_audio_head),
        (dims.n_text_state, dims.n_text_head),
    ):
        if head and state % head:
            raise WeightsError(
                f"weights: dims give {head} heads for a width of {state}, expected a divisor "
                f"({path.name})"
            )
    if any(text) and dims.n_text_state != dims.n_audio_state:
        raise WeightsError(
            f"weights: dims n_text_state is {dims.n_text_state}, expected n_audio_state, "
            f"{dims.n_audio_state}, which cross-attention reads ({path.name})"
        )
    return dims


TEXT_FIELDS = ("n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer")


def parse_config(value: object, path: Path) -> ModelDimensions:
    """`ModelDimensions` from the `config.json` of transformers.

    What the stock Whisper of OpenAI cannot express is refused: another activation, scaled
    embeddings, another width of the MLP.
    """
    if not isinstance(value, dict) or value.get("model_type") != "whisper":
        found = value.get("model_type") if isinstance(value, dict) else type(value).__name__
        raise WeightsError(f"weights: model_type is {found!r}, expected 'whisper' ({path})")
    if missing := sorted(set(_CONFIG_FIELDS.values()) - value.keys()):
        raise WeightsError(f"weights: {', '.join(missing)} missing, expected them ({path})")
    dims = parse_dims({ours: value[theirs] for ours, theirs in _CONFIG_FIELDS.items()}, path)
    width = 4 * dims.n_audio_state
    for key, expected in (
        ("activation_function", "gelu"),
        ("scale_embedding", False),
        ("encoder_ffn_dim", width),
        ("decoder_ffn_dim", width),
    ):
        if key in value and value[key] != expected:
            raise WeightsError(f"weights: {key} is {value[key]!r}, expected {expected!r} ({path})")
    return dims
