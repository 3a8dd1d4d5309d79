"""From what the user wrote to one checked checkpoint; it refuses what it does not know, and guesses
nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import whisper

from . import files, hub
from .checkpoint import Checkpoint, Source, check
from .errors import WeightsError
from .hub import MODELS
from .names import is_hugging_face

DEMO = "demo"
DEMO_FILE = Path(__file__).parent / "demo" / "demo.safetensors"

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".pt", ".pth", ".safetensors", ".json", ".bin", ".ckpt", ".gguf", ".npz")


def load(
    spec: str,
    *,
    offline: bool = False,
    revision: str | None = None,
    cache_dir: Path | None = None,
    encoder_only: bool = False,
) -> Checkpoint:
    """The checkpoint that `spec` names, checked tensor by tensor.

    spec          in this order: `demo`, the checkpoint that comes with the package; an existing
                  path (.safetensors, .safetensors.index.json, .pt, or a folder with
                  model.safetensors or its index, and config.json); a model name, see MODELS;
                  a Hugging Face repo id, owner/name
    offline       open no connection; models come from the hub's cache
    revision      branch, tag or commit of the repo; by default the commit that MODELS pins for a
                  model name, and `main` for a repo id. Not for demo nor for a path.
    cache_dir     the hub's cache; by default as HF_HOME and HF_HUB_CACHE say
    encoder_only  read the encoder's tensors alone; a checkpoint that holds no more is as good

    Raises WeightsError, one sentence, for anything that keeps the checkpoint from being whole.
    """
    if spec == DEMO or os.path.exists(spec):
        if revision is not None:
            raise WeightsError(f"weights: {spec} is no repo, it has no revision {revision}")
        return _local(spec, encoder_only)
    if spec in MODELS:
        model = MODELS[spec]
        pinned = revision in (None, model.revision)
        return _from_hub(
            spec,
            model.repo,
            model.revision if pinned else revision,
            sha256=model.sha256 if pinned else None,
            heads=spec,
            offline=offline,
            cache_dir=cache_dir,
            encoder_only=encoder_only,
        )
    if _looks_like_path(spec):
        raise WeightsError(f"weights: no such file or folder: {spec}")
    if _REPO_ID.fullmatch(spec):
        names = [name for name, model in MODELS.items() if model.repo == spec]
        return _from_hub(
            spec,
            spec,
            revision,
            sha256=None,
            heads=names[0] if names else None,
            offline=offline,
            cache_dir=cache_dir,
            encoder_only=encoder_only,
        )
    raise WeightsError(
        f"weights: {spec!r} is no checkpoint: expected demo, an existing path (.safetensors, .pt, "
        f"or a folder with model.safetensors), a model name ({', '.join(MODELS)}), or a Hugging "
        "Face repo id such as openai/whisper-tiny"
    )


def _looks_like_path(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.endswith(_FILE_SUFFIXES) or spec.count("/") > 1


def _local(spec: str, encoder_only: bool) -> Checkpoint:
    path = DEMO_FILE if spec == DEMO else Path(spec)
    if spec == DEMO and not path.is_file():
        raise WeightsError(
            f"weights: the embedded checkpoint is not in this installation ({path}): install the "
            "package whole, or give another checkpoint, such as tiny.en"
        )
    try:
        contents = files.read(path)
    except WeightsError as error:
        if spec in MODELS and path.is_dir():
            raise WeightsError(
                f"{error}; it hides the model {spec}, which {MODELS[spec].repo} names too"
            ) from error
        raise
    beside = contents.path.parent / files.CONFIG
    if contents.dims is None and is_hugging_face(contents.stored) and beside.is_file():
        contents = files.with_config(contents, beside)
    dims, tensors = check(contents, encoder_only=encoder_only)
    source = Source(spec, None, files.sha256(contents.parts), contents.path)
    return Checkpoint(dims, tensors, source, None)


def _from_hub(
    spec: str,
    repo: str,
    revision: str | None,
    *,
    sha256: str | None,
    heads: str | None,
    offline: bool,
    cache_dir: Path | None,
    encoder_only: bool,
) -> Checkpoint:
    snapshot = hub.fetch(
        repo, revision=revision, sha256=sha256, offline=offline, cache_dir=cache_dir
    )
    contents = files.read_safetensors(snapshot.weights, snapshot.config)
    dims, tensors = check(contents, encoder_only=encoder_only)
    source = Source(spec, snapshot.commit, snapshot.sha256, snapshot.weights)
    return Checkpoint(dims, tensors, source, whisper._ALIGNMENT_HEADS[heads] if heads else None)
