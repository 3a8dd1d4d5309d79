"""A checked checkpoint: every tensor that its dims call for under OpenAI's name, and no other; it
refuses a file that lacks one, adds one, or holds a wrong shape, a wrong kind of number, NaN or
Inf."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from whisper.model import ModelDimensions

from . import compact, files
from .errors import WeightsError
from .files import Contents, Stored
from .names import (
    TIED_OUTPUT,
    TOKEN_EMBEDDING,
    Shape,
    expected_shapes,
    from_hugging_face,
    is_hugging_face,
)

HEAD_SIZE = 64  # n_state / n_head of every published Whisper, tiny to large
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_LISTED = 5  # problems that one error spells out


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from."""

    name: str  # what was asked for: `demo`, a model name, a repo id, or a path
    revision: str | None  # the commit of the repo; None for a file on disk
    sha256: str  # of the file read; of shards: their bytes one after another, sorted by file name
    path: Path  # the file, or the index of the shards


@dataclass(frozen=True)
class Checkpoint:
    """One Whisper, or its encoder alone.

    dims             of the whole model. An encoder whose file states no dims has 0 in every text
                     field (n_vocab, n_text_*), since nothing in it tells them.
    tensors          OpenAI's full names ("encoder.conv1.weight", "decoder.ln.bias"), the published
                     dtype, contiguous, on the CPU
    alignment_heads  OpenAI's cross-attention heads for word times, for the models that it named;
                     `whisper.model.Whisper.set_alignment_heads` takes them. None for any other.
    """

    dims: ModelDimensions
    tensors: dict[str, torch.Tensor]
    source: Source
    alignment_heads: bytes | None

    @property
    def has_decoder(self) -> bool:
        return TOKEN_EMBEDDING in self.tensors

    def encoder_tensors(self) -> dict[str, torch.Tensor]:
        """The encoder's tensors, as `whisper.model.AudioEncoder` names them ("conv1.weight")."""
        prefix = "encoder."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def require_decoder(self) -> None:
        """Raises WeightsError where only the encoder was loaded."""
        if not self.has_decoder:
            raise WeightsError(
                f"weights: {self.source.name} holds the encoder alone, and a transcript needs a "
                "decoder too: give a whole checkpoint, such as demo, tiny.en, or OpenAI's .pt"
            )


def check(
    contents: Contents, *, encoder_only: bool = False
) -> tuple[ModelDimensions, dict[str, torch.Tensor]]:
    """The dims and the tensors of `contents` under OpenAI's names.

    Names, shapes and dtypes are checked first, from the file's header, the decoder's too; only then
    are tensors read, and looked through for NaN and Inf. With `encoder_only` the decoder's are not
    read. Raises WeightsError with every problem of the file.
    """
    file = contents.path.name
    if not contents.stored:
        raise WeightsError(f"weights: {file} holds no tensors")
    if any(name.startswith("conv1.") for name in contents.stored):
        raise WeightsError(
            "weights: the names have no 'encoder.' before them, expected encoder.conv1.weight and "
            f"so on, found conv1 ({file})"
        )
    hugging_face = is_hugging_face(contents.stored)
    stored, spelled, unknown = _under_openai_names(contents, hugging_face)
    output = stored.pop(TIED_OUTPUT, None) if hugging_face else None
    decoder = any(name.startswith("decoder.") for name in stored)
    if contents.compact:
        stored = _with_whole_embedding(contents, stored)
    dims = contents.dims or _dims_from_shapes(stored, decoder=decoder, file=file)
    if decoder and not dims.n_vocab:
        raise WeightsError(f"weights: the dims have no text fields but a decoder is there ({file})")
    if dims.n_audio_layer + dims.n_text_layer * decoder > len(stored):
        raise WeightsError(
            f"weights: dims give {dims.n_audio_layer} + {dims.n_text_layer} blocks, but the file "
            f"holds {len(stored)} tensors in all ({file})"
        )

    def called(name: str) -> str:
        return name if spelled[name] == name else f"{name} (stored as {spelled[name]})"

    expected = expected_shapes(dims, decoder=decoder)
    problems = [f"{name} is unknown, expected no such tensor" for name in unknown]
    problems += [
        f"{called(name)} is unknown, expected no such tensor"
        for name in stored
        if name not in expected
    ]
    missing = [name for name in expected if name not in stored]
    problems += [f"{name} is missing, expected shape {expected[name]}" for name in missing]
    for name in [name for name in expected if name in stored]:
        problems += _header_problems(called(name), stored[name], expected[name])
    if output is not None and not decoder:
        problems.append(f"{TIED_OUTPUT} is there without a decoder, expected no such tensor")
    if problems:
        in_part = decoder and any(name.startswith("decoder.") for name in missing)
        raise _error(problems, file, "a decoder must be whole or absent" if in_part else "")

    wanted = expected_shapes(dims, decoder=decoder and not encoder_only)
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in wanted:
        tensor = stored[name].read().contiguous()
        if tensor.data_ptr() in storages:  # two names for one block of memory
            tensor = tensor.clone()
        storages.add(tensor.data_ptr())
        tensors[name] = tensor
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(
                f"{called(name)} holds NaN or Inf in {bad} of {tensor.numel()} places, expected "
                "finite numbers"
            )
    if output is not None and not encoder_only and not problems:
        problems += _tie_problems(output, tensors[TOKEN_EMBEDDING])
    if problems:
        raise _error(problems, file)
    return dims, tensors


def _error(problems: list[str], file: str, note: str = "") -> WeightsError:
    note = f"; {note}" if note else ""
    if len(problems) == 1:
        return WeightsError(f"weights: {problems[0]}{note} ({file})")
    listed = "; ".join(problems[:MOST_LISTED])
    more = len(problems) - MOST_LISTED
    rest = f"; and {more} more" if more > 0 else ""
    return WeightsError(f"weights: {len(problems)} problems ({file}): {listed}{rest}{note}")


def _under_openai_names(
    contents: Contents, hugging_face: bool
) -> tuple[dict[str, Stored], dict[str, str], list[str]]:
    """The stored tensors under OpenAI's names, each name as the file spells it, and the names that
    transformers' convention does not know."""
    stored: dict[str, Stored] = {}
    spelled: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in contents.stored.items():
        ours = name if name == TIED_OUTPUT or not hugging_face else from_hugging_face(name)
        if ours is None or ours in stored:
            unknown.append(name)
        else:
            stored[ours], spelled[ours] = tensor, name
    return stored, spelled, unknown


def _header_problems(called: str, stored: Stored, shape: Shape) -> list[str]:
    problems = []
    if stored.shape != shape:
        problems.append(f"{called} has shape {stored.shape}, expected {shape}")
    if stored.dtype not in FLOATS:
        problems.append(f"{called} has dtype {stored.dtype}, expected one of {', '.join(FLOATS)}")
    return problems


def _tie_problems(output: Stored, embedding: torch.Tensor) -> list[str]:
    """transformers can store the output projection beside the token embedding. OpenAI's decoder has
    one tensor for both, so a second one that differs would be lost without a word."""
    shape, dtype = tuple(embedding.shape), str(embedding.dtype).removeprefix("torch.")
    if (output.shape, output.dtype) != (shape, dtype):
        return [
            f"{TIED_OUTPUT} has shape {output.shape} and dtype {output.dtype}, expected {shape} "
            f"{dtype} as {TOKEN_EMBEDDING}, to which it is tied"
        ]
    if not torch.equal(output.read(), embedding):
        return [
            f"{TIED_OUTPUT} differs from {TOKEN_EMBEDDING}, expected equal values: they are tied"
        ]
    return []


def _with_whole_embedding(contents: Contents, stored: dict[str, Stored]) -> dict[str, Stored]:
    """`stored` with the token embedding at its whole shape, and without the token ids."""
    file, dims = contents.path.name, contents.dims
    if dims is None or not dims.n_vocab:
        raise WeightsError(
            f"weights: the token embedding is compact but no dims are stated, expected n_vocab in "
            f"the metadata ({file})"
        )
    if lost := [name for name in (TOKEN_EMBEDDING, compact.TOKENS) if name not in stored]:
        raise WeightsError(f"weights: {lost[0]} is missing, expected a compact embedding ({file})")
    rest = dict(stored)
    rows, tokens = rest[TOKEN_EMBEDDING], rest.pop(compact.TOKENS)
    if len(rows.shape) != 2 or tokens.shape != (rows.shape[0] - 1,):
        raise WeightsError(
            f"weights: {TOKEN_EMBEDDING} has shape {rows.shape} and {compact.TOKENS} "
            f"{tokens.shape}, expected (n_used + 1, n_text_state) and (n_used,) ({file})"
        )
    n_vocab = dims.n_vocab

    def read() -> torch.Tensor:
        held, ids = rows.read(), tokens.read()
        try:
            return compact.expand(held, ids, n_vocab)
        except WeightsError as error:
            raise WeightsError(f"weights: {error} ({file})") from error

    rest[TOKEN_EMBEDDING] = Stored((n_vocab, rows.shape[1]), rows.dtype, read)
    return rest


def _dims_from_shapes(stored: dict[str, Stored], *, decoder: bool, file: str) -> ModelDimensions:
    """The dims that the shapes imply, for a file that states none. The number of heads leaves no
    mark on any shape; it follows from the head size, which every published Whisper shares."""

    def shape(name: str, n: int) -> Shape:
        if name not in stored:
            raise WeightsError(
                f"weights: {name} is missing, expected it: the file states no dims, and they are "
                f"read from its shape ({file})"
            )
        found = stored[name].shape
        if len(found) != n or 0 in found:
            raise WeightsError(
                f"weights: {name} has shape {found}, expected {n} axes, none of them 0 ({file})"
            )
        return found

    def layers(side: str) -> int:
        at = re.compile(rf"{side}\.blocks\.([0-9]+)\.")
        found = {match[1] for name in stored if (match := at.match(name))}
        if not found:
            raise WeightsError(f"weights: {side}.blocks.0 is missing, expected a block ({file})")
        return len(found)

    def heads(state: int) -> int:
        if state % HEAD_SIZE:
            raise WeightsError(
                f"weights: the file states no dims and its width is {state}, expected a multiple "
                f"of {HEAD_SIZE}, the size of a head ({file})"
            )
        return state // HEAD_SIZE

    n_audio_state, n_mels, _ = shape("encoder.conv1.weight", 3)
    n_audio_ctx, _ = shape("encoder.positional_embedding", 2)
    dims = {
        "n_mels": n_mels,
        "n_audio_ctx": n_audio_ctx,
        "n_audio_state": n_audio_state,
        "n_audio_head": heads(n_audio_state),
        "n_audio_layer": layers("encoder"),
    }
    if not decoder:
        return ModelDimensions(**dims, **dict.fromkeys(files.TEXT_FIELDS, 0))
    n_vocab, n_text_state = shape(TOKEN_EMBEDDING, 2)
    n_text_ctx, _ = shape("decoder.positional_embedding", 2)
    dims |= {
        "n_vocab": n_vocab,
        "n_text_ctx": n_text_ctx,
        "n_text_state": n_text_state,
        "n_text_head": heads(n_text_state),
        "n_text_layer": layers("decoder"),
    }
    return files.parse_dims(dims, Path(file))
