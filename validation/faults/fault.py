"""What a fault is, and `Twin`: PyTorch's encoder stage by stage, in which any of them can be made.

The reference never changes, and nothing is patched: a fault is another input, other weights,
another formula for some stages, or another way from the features to the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import whisper
from torch import Tensor
from whisper.model import ModelDimensions

from validation.stages import Stage, compute, stages
from weights import Checkpoint

Taps = dict[str, Tensor]
Tensors = dict[str, Tensor]  # the encoder's, by OpenAI's name without "encoder."
Formula = Callable[[Stage, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
Strength = float | str  # a number, or a word as "float16"

ALL_LAYERS = None
GITHUB = "https://github.com"
EARLIER_PORT = f"{GITHUB}/nijaru/max-whisper, in its history"
UNRECORDED = "no port on record"
YARDSTICK = "nobody's mistake: a yardstick"


def not_run(stage: Stage, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """The formula of a stage that the candidate does not have: it gives no tap."""
    raise LookupError(stage.name)


def unchanged_mel(audio: np.ndarray, mel: Tensor) -> Tensor:
    return mel


def no_weights(tensors: Tensors, layers: list[int]) -> Tensors:
    return {}


def no_formulas(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    return {}


def stock_transcript(
    model: whisper.Whisper, audio: np.ndarray, options: dict[str, Any]
) -> dict[str, Any]:
    return model.transcribe(audio, **options)


@dataclass(frozen=True)
class Fault:
    """One mistake, of one strength where it has strengths.

    group      input, stem, blocks, weights, bridge
    sentence   what was done, as one would say it of a port
    seen       where it was made: links to an issue, a pull request, a repository
    how        which of the functions below makes it: input: `mel`; weights: `weights`, which suit
               any encoder, the compiled graph too; code: `formulas`, for the twin alone; bridge:
               `transcribe`, after a right encoder
    first_tap  the tap that diverges first; "{layer}" where it can be made in one layer alone; ""
               where no tap does (bridge)
    cause      the id that `validation.fingerprints.explain` must give it; None: it must give none
    strength   of a sweep, else None; all of a sweep have one `id`
    unseen     the table of causes does not list it, and was not made to fit it
    yardstick  nobody's mistake, but of a size that is known: it draws the curve

    mel         (audio (samples,) at 16 kHz, the right mel (1, n_mels, frames)) -> the wrong mel
    weights     (the encoder's tensors, layers) -> the wrong ones of them
    formulas    (dims, layers) -> tap name -> formula
    transcribe  (the stock model, audio, options of `whisper.transcribe`) -> what that returns, of
                which "text" and "segments" (start, end, text, tokens) are read; besides, where
                they are there, "cut_off": it went on for too long and was stopped, and "injected":
                the mistake changed something
    """

    id: str
    group: str
    sentence: str
    seen: str
    first_tap: str
    cause: str | None
    how: Literal["input", "weights", "code", "bridge"]
    strength: Strength | None = None
    unseen: bool = False
    yardstick: bool = False
    mel: Callable[[np.ndarray, Tensor], Tensor] = field(default=unchanged_mel, repr=False)
    weights: Callable[[Tensors, list[int]], Tensors] = field(default=no_weights, repr=False)
    formulas: Callable[[ModelDimensions, list[int]], dict[str, Formula]] = field(
        default=no_formulas, repr=False
    )
    transcribe: Callable[[whisper.Whisper, np.ndarray, dict[str, Any]], dict[str, Any]] = field(
        default=stock_transcript, repr=False
    )

    @property
    def key(self) -> str:
        """The id, and the strength where there is one: "E11@float16"."""
        if self.strength is None:
            return self.id
        of = self.strength
        return f"{self.id}@{of if isinstance(of, str) else f'{of:g}'}"

    def diverges_at(self, layer: int | None = ALL_LAYERS) -> str:
        """The first wrong tap where the fault is made in `layer`, or in all."""
        return self.first_tap.format(layer=layer or 0)

    def damage(self, checkpoint: Checkpoint, layer: int | None = ALL_LAYERS) -> Checkpoint:
        """The checkpoint with the weights of the fault, changed ones in float32; unchanged if it
        is no fault of weights."""
        given = {name: t.float() for name, t in checkpoint.encoder_tensors().items()}
        changed = self.weights(given, _layers(checkpoint.dims, layer))
        changed = {f"encoder.{n}": t.float().contiguous() for n, t in changed.items()}
        return replace(checkpoint, tensors=checkpoint.tensors | changed)


def seeded(*names: str) -> torch.Generator:
    """Random numbers that depend on the names alone: the same in every process and on every run."""
    digest = hashlib.sha256(" ".join(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def swept(strengths: Iterable[Strength], make: Callable[[Any], Fault]) -> list[Fault]:
    """One fault for each strength; `make` gives it all but its `strength`."""
    return [replace(make(strength), strength=strength) for strength in strengths]


def every(dims: ModelDimensions, kind: str, formula: Formula) -> dict[str, Formula]:
    """One formula for all stages of a kind."""
    return {stage.name: formula for stage in stages(dims) if stage.kind == kind}


def projections(layers: list[int], *names: str) -> list[str]:
    """ "blocks.0.attn.query" and so on."""
    return [f"blocks.{layer}.attn.{name}" for layer in layers for name in names]


def _layers(dims: ModelDimensions, layer: int | None) -> list[int]:
    if layer is not None and not 0 <= layer < dims.n_audio_layer:
        raise ValueError(f"layer is {layer}, the encoder has 0 to {dims.n_audio_layer - 1}")
    return list(range(dims.n_audio_layer)) if layer is ALL_LAYERS else [layer]


class Twin:
    """PyTorch's encoder in float32, run stage by stage with `validation.stages.compute`.

    It is a candidate like any other (`name`, `taps`, `injected`, `features`). A fault of weights or
    code, and formulas given for some taps besides, take the place of the right ones; without any it
    is right. A wrong input is the caller's to give.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        fault: Fault | None = None,
        layer: int | None = ALL_LAYERS,
        formulas: Mapping[str, Formula] | None = None,
    ):
        self.name = f"torch twin with {fault.key}" if fault else "torch twin"
        self.dims = checkpoint.dims
        damaged = fault.damage(checkpoint, layer) if fault else checkpoint
        self.tensors = {n: t.detach().float() for n, t in damaged.encoder_tensors().items()}
        self.formulas = dict(fault.formulas(self.dims, _layers(self.dims, layer)) if fault else {})
        self.formulas |= formulas or {}
        if unknown := self.formulas.keys() - {stage.name for stage in stages(self.dims)}:
            raise ValueError(f"no stage has the name {sorted(unknown)[0]}")

    def stage(self, stage: Stage, inputs: Mapping[str, Tensor]) -> Tensor:
        """One stage's tap for these inputs, by tap name."""
        formula = self.formulas.get(stage.name)
        if formula is None:
            return compute(stage, inputs, self.tensors, self.dims.n_audio_head)
        return formula(stage, inputs, self.tensors)

    def _run(self, mel: Tensor, inputs: Callable[[Taps], Mapping[str, Tensor]]) -> Taps:
        taps: Taps = {}
        with torch.no_grad():
            for stage in stages(self.dims):
                if self.formulas.get(stage.name) is not_run:
                    continue
                read = {"mel": mel} if stage.kind == "mel" else inputs(taps)
                taps[stage.name] = self.stage(stage, read)
        return taps

    def taps(self, mel: Tensor) -> Taps:
        """mel (1, n_mels, 2 * n_audio_ctx) -> every tap that this encoder has, in order."""
        return self._run(mel, lambda taps: taps)

    def injected(self, reference: Taps) -> Taps:
        """Every stage on the reference's inputs."""
        return self._run(reference["mel"], lambda taps: reference)

    def features(self, mel: Tensor) -> Tensor:
        """mel -> (1, n_audio_ctx, n_audio_state)."""
        return self.taps(mel)["ln_post"]
