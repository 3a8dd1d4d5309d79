"""Mistakes in the two convolutions and the positional embedding."""

from __future__ import annotations

import torch

from validation.faults.fault import EARLIER_PORT, Fault, Tensors


def middle_tap(tensors: Tensors, layers: list[int]) -> Tensors:
    middle = torch.tensor([0.0, 1.0, 0.0])
    return {f"{n}.weight": tensors[f"{n}.weight"] * middle for n in ("conv1", "conv2")}


def positions_one_late(tensors: Tensors, layers: list[int]) -> Tensors:
    return {"positional_embedding": tensors["positional_embedding"].roll(1, 0)}


FAULTS = [
    Fault(
        id="S07",
        group="stem",
        sentence="Only the middle tap of each kernel of the convolutions is used.",
        seen=EARLIER_PORT,
        first_tap="conv1",
        cause="conv-middle-tap",
        how="weights",
        weights=middle_tap,
    ),
    Fault(
        id="E21",
        group="stem",
        sentence="The positional embedding is one frame late.",
        seen="no port known; the neighbour of a missing embedding",
        first_tap="positional_embedding",
        cause="positions-shifted",
        how="weights",
        weights=positions_one_late,
    ),
]
