"""Mistakes in the two convolutions and the positional embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions, sinusoids

from validation.faults.fault import (
    EARLIER_PORT,
    GITHUB,
    UNRECORDED,
    Fault,
    Formula,
    Tensors,
    every,
    not_run,
    seeded,
)
from validation.stages import Stage

CONVS = ("conv1", "conv2")


def kernels(
    change: Callable[[Tensor], Tensor], names: tuple[str, ...] = CONVS
) -> Callable[[Tensors, list[int]], Tensors]:
    """The fault of these convolutions that changes their kernels, (out, in, 3)."""

    def weights(tensors: Tensors, layers: list[int]) -> Tensors:
        return {f"{name}.weight": change(tensors[f"{name}.weight"]) for name in names}

    return weights


def in_the_middle(taps: Tensor) -> Tensor:
    """One tap (out, in) as a kernel that reads the frame under it and no other."""
    return F.pad(taps[:, :, None], (1, 1))


def first_tap_alone(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """conv1 is a matrix; GELU and conv2 are not there; frames are dropped to get the length."""

    def conv1(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        weight, bias = (tensors[name] for name in stage.weights)
        return F.linear(x["mel"].mT, weight[:, :, 0], bias)

    def positions(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return x["conv1"][:, ::2] + tensors[stage.weights[0]]

    found: dict[str, Formula] = {"conv1": conv1, "positional_embedding": positions}
    return found | dict.fromkeys(("conv1.gelu", "conv2", "conv2.gelu"), not_run)


def stride_missing(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    def conv2(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        weight, bias = (tensors[name] for name in stage.weights)
        y = F.conv1d(x[stage.inputs[0]].mT, weight, bias, stride=1, padding=1)
        return y.mT[:, : dims.n_audio_ctx]

    return {"conv2": conv2}


def corrupt_edges(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """The kernel reads past its input where padding should be. What lies there is nobody's: here
    random numbers of the input's size, the same in every run."""

    def conv(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        name = stage.inputs[0]
        inside = x[name] if name == "mel" else x[name].mT  # (B, channels, frames)
        edges = torch.randn((*inside.shape[:2], 2), generator=seeded("E14", stage.name))
        edges = edges * inside.std()
        padded = torch.cat([edges[..., :1], inside, edges[..., 1:]], 2)
        weight, bias = (tensors[name] for name in stage.weights)
        return F.conv1d(padded, weight, bias, stride=stage.stride).mT

    return every(dims, "conv", conv)


def positions_interleaved(tensors: Tensors, layers: list[int]) -> Tensors:
    """Computed anew, as in the first Transformer: channels sin, cos, sin, cos and so on."""
    frames, channels = tensors["positional_embedding"].shape
    right = sinusoids(frames, channels)
    table = torch.empty_like(right)
    table[:, 0::2], table[:, 1::2] = right[:, : channels // 2], right[:, channels // 2 :]
    return {"positional_embedding": table}


def positions_one_late(tensors: Tensors, layers: list[int]) -> Tensors:
    return {"positional_embedding": tensors["positional_embedding"].roll(1, 0)}


def no_positions(tensors: Tensors, layers: list[int]) -> Tensors:
    return {"positional_embedding": torch.zeros_like(tensors["positional_embedding"])}


FAULTS = [
    Fault(
        id="S07",
        group="stem",
        sentence="Only the middle tap of each kernel of the convolutions is used.",
        seen=EARLIER_PORT,
        first_tap="conv1",
        cause="conv-middle-tap",
        how="weights",
        weights=kernels(lambda w: in_the_middle(w[:, :, 1])),
    ),
    Fault(
        id="S08",
        group="stem",
        sentence="The three taps of each kernel are summed without the shift.",
        seen=EARLIER_PORT,
        first_tap="conv1",
        cause="conv-taps-summed",
        how="weights",
        weights=kernels(lambda w: in_the_middle(w.sum(2))),
    ),
    Fault(
        id="S09",
        group="stem",
        sentence="The three taps of each kernel are averaged without the shift.",
        seen=EARLIER_PORT,
        first_tap="conv1",
        cause="conv-taps-averaged",
        how="weights",
        weights=kernels(lambda w: in_the_middle(w.mean(2))),
    ),
    Fault(
        id="S10",
        group="stem",
        sentence="Of conv1 the first tap alone is used, on the frame under it; GELU and conv2 are "
        "left out, and every second frame is kept.",
        seen=EARLIER_PORT,
        first_tap="conv1",
        cause="conv-outer-tap",
        how="code",
        formulas=first_tap_alone,
    ),
    Fault(
        id="S11",
        group="stem",
        sentence="conv2 has stride 1 in place of 2, and its output is cut to the length.",
        seen=EARLIER_PORT,
        first_tap="conv2",
        cause="conv-stride-missing",
        how="code",
        formulas=stride_missing,
    ),
    Fault(
        id="S12",
        group="stem",
        sentence="The stride of conv2 is done by dropping every second output of a wrong sum: its "
        "three taps without the shift.",
        seen=EARLIER_PORT,
        first_tap="conv2",
        cause="conv-taps-summed",
        how="weights",
        weights=kernels(lambda w: in_the_middle(w.sum(2)), ("conv2",)),
    ),
    Fault(
        id="E-a",
        group="stem",
        sentence="The kernels are reversed: a convolution in place of a correlation.",
        seen=f"{GITHUB}/onnx/onnx/issues/1178, for another model",
        first_tap="conv1",
        cause="conv-reversed",
        how="weights",
        weights=kernels(lambda w: w.flip(2)),
    ),
    Fault(
        id="E14",
        group="stem",
        sentence="The convolutions read what lies beyond their input in place of the padding.",
        seen=f"{GITHUB}/modular/modular/issues/6461, {GITHUB}/modular/modular/issues/6712",
        first_tap="conv1",
        cause="conv-edges",
        how="code",
        formulas=corrupt_edges,
    ),
    Fault(
        id="E15",
        group="stem",
        sentence="The positional embedding is computed anew, with sin and cos interleaved in place "
        "of one after the other.",
        seen=UNRECORDED,
        first_tap="positional_embedding",
        cause="positions-interleaved",
        how="weights",
        weights=positions_interleaved,
    ),
    Fault(
        id="E21",
        group="stem",
        sentence="The positional embedding is one frame late.",
        seen=UNRECORDED,
        first_tap="positional_embedding",
        cause="positions-shifted",
        how="weights",
        weights=positions_one_late,
    ),
    Fault(
        id="E-b",
        group="stem",
        sentence="The positional embedding is not added.",
        seen=UNRECORDED,
        first_tap="positional_embedding",
        cause="positions-missing",
        how="weights",
        weights=no_positions,
    ),
]
