"""What there is to explain of one stage that went wrong: what came in, what came out, what should
have. It forms no opinion; `validation/hypotheses.py` reads it, `validation/fingerprints.py` judges.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from whisper.model import ModelDimensions

from validation.stages import Stage, compute

Taps = Mapping[str, Tensor]


def frames_first(name: str, tap: Tensor) -> Tensor:
    """(1, frames, channels), or mel (1, n_mels, frames) -> (frames, channels), a view."""
    return tap[0].detach().T if name == "mel" else tap[0].detach()


def distance(y: Tensor, prediction: Tensor) -> float:
    """Relative L2 of `y` to the prediction where that is not NaN (it says nothing there); inf where
    it speaks of less than a tenth of `y`, or is zero."""
    if prediction.numel() and not prediction.sum().isnan():  # no NaN: the same, quicker
        norm = torch.linalg.vector_norm(prediction)
        return float(torch.linalg.vector_norm(y - prediction) / norm) if norm else math.inf
    known = ~torch.isnan(prediction)
    norm = torch.linalg.vector_norm(torch.where(known, prediction, 0.0))
    if norm == 0 or known.double().mean() < 0.1:
        return math.inf
    return float(torch.linalg.vector_norm(torch.where(known, y - prediction, 0.0)) / norm)


class Case:
    """One stage with both sides' taps (B = 1), in float64, mel too as (frames, channels).

    Inputs are the candidate's own where it shows them, else the reference's. `rows` restricts the
    case to some frames of the stage's output; `whole` is the case with all of them. `audio`: the
    samples (at 16 kHz) of which the reference's mel was made, where they are known.
    """

    def __init__(
        self,
        stage: Stage,
        candidate: Taps,
        reference: Taps,
        tensors: Taps,
        dims: ModelDimensions,
        audio: Tensor | np.ndarray | None = None,
    ):
        self.stage, self.dims, self.n_head = stage, dims, dims.n_audio_head
        self.candidate, self.reference, self.tensors = candidate, reference, tensors
        self.audio = None if audio is None else torch.as_tensor(audio).detach().double()
        self.rows: Tensor | None = None
        self.whole = self
        self._cache: dict[str, Tensor] = {}

    def on(self, rows: Tensor) -> Case:
        """The case at these frames alone."""
        case = copy.copy(self)  # with the same cache
        case.rows = rows
        return case

    def spread(self, n: int) -> Tensor:
        """The indices of `n` frames from first to last."""
        return torch.linspace(0, len(self.whole.y) - 1, n).long().unique()

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of this name, made when it is first asked for; of the whole case, not cut."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def cut(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def shows(self, name: str) -> bool:
        """Whether the candidate has this tap, in the reference's shape."""
        if name not in self.candidate or name not in self.reference:
            return name in self.candidate
        return self.candidate[name].shape == self.reference[name].shape

    @property
    def has_inputs(self) -> bool:
        """Whether either side shows every input of the stage; without, no formula can be tried."""
        return all(name in self.reference or name in self.candidate for name in self.stage.inputs)

    def side(self, name: str) -> Tensor:
        """The candidate's tap, the reference's where it has none: all frames, as they are."""
        return frames_first(name, (self.candidate if self.shows(name) else self.reference)[name])

    def of(self, name: str) -> Tensor:
        """A tap at the frames of the case."""
        return self.cut(self.side(name)).double()

    def full(self, name: str) -> Tensor:
        """A tap at all frames."""
        return self.once(f"tap {name}", lambda: self.side(name).double())

    def w(self, name: str) -> Tensor:
        """A tensor of the reference's checkpoint."""
        return self.once(f"tensor {name}", lambda: self.tensors[name].detach().double())

    @property
    def index(self) -> Tensor:
        return torch.arange(len(self.whole.y)) if self.rows is None else self.rows

    @property
    def y(self) -> Tensor:
        """What the candidate gave."""
        return self.cut(self.full(self.stage.name))

    @property
    def expected(self) -> Tensor:
        """What it should have given for its inputs."""
        return self.cut(self.once("expected", self._expected))

    def _expected(self) -> Tensor:
        if self.stage.kind == "mel" or not self.has_inputs:
            return frames_first(self.stage.name, self.reference[self.stage.name]).double()
        inputs = {name: self.full(name)[None] for name in self.stage.inputs}
        if "mel" in inputs:
            inputs["mel"] = inputs["mel"].transpose(1, 2)
        return compute(self.stage, inputs, self.tensors, self.n_head)[0]

    @property
    def x(self) -> Tensor:
        """The first input at the frames of the output."""
        return self.of(self.stage.inputs[0])

    @property
    def branch(self) -> Tensor:
        """The second input, likewise."""
        return self.of(self.stage.inputs[1])

    @property
    def weight(self) -> Tensor:
        return self.w(self.stage.weights[0])

    @property
    def bias_name(self) -> str | None:
        return self.stage.weights[1] if len(self.stage.weights) == 2 else None

    @property
    def bias(self) -> Tensor | float:
        return 0.0 if self.bias_name is None else self.w(self.bias_name)

    @property
    def block(self) -> str:
        """ "blocks.2." for a stage of that block, else an empty string."""
        parts = self.stage.name.split(".")
        return f"{parts[0]}.{parts[1]}." if parts[0] == "blocks" else ""
