"""Writes a checkpoint as one safetensors file under OpenAI's names; it replaces nothing unasked and
leaves no half-written file."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from . import files
from .checkpoint import Checkpoint
from .errors import WeightsError


def export(checkpoint: Checkpoint, output: Path, *, force: bool = False) -> None:
    """Writes `checkpoint` to `output`, whole or not at all: to a new file beside it, then renamed.

    The dtype stays the published one. The metadata holds `format`, the `dims` as JSON, and where
    the tensors came from: `source`, `revision` (empty for a local file), `sha256`. `load` reads it
    back.

    Raises WeightsError if `output` is there and not `force`, if it is a file that the checkpoint
    was read from, or if it cannot be written.
    """
    source = checkpoint.source
    if output.suffix != ".safetensors":
        raise WeightsError(f"weights: {output} has suffix {output.suffix!r}, expected .safetensors")
    index = source.path.name == files.INDEX or source.path.name.endswith(".index.json")
    for read in (source.path, *(files.shard_paths(source.path) if index else ())):
        if output.exists() and read.exists() and os.path.samefile(output, read):
            raise WeightsError(f"weights: {output} is the file being exported: name another one")
    if output.exists() and not force:
        raise WeightsError(f"weights: {output} exists: name another file, or give --force")
    if output.is_dir():
        raise WeightsError(f"weights: {output} is a folder, expected the name of a file")
    metadata = {
        "format": "pt",
        "dims": json.dumps(asdict(checkpoint.dims)),
        "source": source.name,
        "revision": source.revision or "",
        "sha256": source.sha256,
    }
    try:
        _write(checkpoint, output, metadata)
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(f"weights: cannot write {output}: {reason}") from error
    except SafetensorError as error:  # safetensors' own word for a full disk
        raise WeightsError(f"weights: cannot write {output}: {error}") from error


def _write(checkpoint: Checkpoint, output: Path, metadata: dict[str, str]) -> None:
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(checkpoint.tensors, temporary, metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's file is for its owner alone
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
