"""Mistakes in the blocks and in ln_post."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions

from validation.faults.fault import (
    EARLIER_PORT,
    Fault,
    Formula,
    Tensors,
    every,
    not_run,
    projections,
)
from validation.stages import Stage, attend, compute, stages


def no_attention_biases(tensors: Tensors, layers: list[int]) -> Tensors:
    names = projections(layers, "query", "value", "out")
    return {f"{n}.bias": torch.zeros_like(tensors[f"{n}.bias"]) for n in names}


def square_weights_transposed(tensors: Tensors, layers: list[int]) -> Tensors:
    names = projections(layers, "query", "key", "value", "out")
    return {f"{n}.weight": tensors[f"{n}.weight"].T for n in names}


def scale_of_whole_state(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        q, k, v = (x[name] for name in stage.inputs)
        return attend(q, k, v, dims.n_audio_head, scale=dims.n_audio_state**-0.5)

    return dict.fromkeys(projections(layers, "qkv_attention"), formula)


def key_bias(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """As `torch.nn.Linear` initialises a bias that no checkpoint fills."""
    bound = dims.n_audio_state**-0.5
    noise = torch.rand(dims.n_audio_state, generator=torch.Generator().manual_seed(0))
    bias = (2 * noise - 1) * bound

    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return compute(stage, x, tensors, dims.n_audio_head) + bias

    return dict.fromkeys(projections(layers, "key"), formula)


def half_of_the_layers(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """The second half of the blocks is not there; ln_post reads the last that is."""
    last = dims.n_audio_layer // 2 - 1
    run = f"blocks.{last}" if last >= 0 else "positional_embedding"

    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return compute(replace(stage, inputs=(run,)), x, tensors, dims.n_audio_head)

    left_out = tuple(f"blocks.{i}" for i in range(last + 1, dims.n_audio_layer))
    names = [
        s.name for s in stages(dims) if f"{s.name}.".startswith(tuple(f"{b}." for b in left_out))
    ]
    return dict.fromkeys(names, not_run) | {"ln_post": formula}


FAULTS = [
    Fault(
        id="S14",
        group="blocks",
        sentence="The biases of query, value and out are not loaded.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.query",
        cause="bias-missing",
        how="weights",
        weights=no_attention_biases,
    ),
    Fault(
        id="S16",
        group="blocks",
        sentence="The square weights of attention are used without their transpose.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.query",
        cause="weight-transposed",
        how="weights",
        weights=square_weights_transposed,
    ),
    Fault(
        id="S18",
        group="blocks",
        sentence="Scores are scaled by 1/sqrt(n_state) in place of 1/sqrt(n_head_state).",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="attention-scale",
        how="code",
        formulas=scale_of_whole_state,
    ),
    Fault(
        id="S21",
        group="blocks",
        sentence="ReLU is used in place of GELU.",
        seen=EARLIER_PORT,
        first_tap="conv1.gelu",
        cause="gelu-relu",
        how="code",
        formulas=lambda dims, layers: every(dims, "gelu", lambda s, x, t: F.relu(x[s.inputs[0]])),
    ),
    Fault(
        id="S22",
        group="blocks",
        sentence="Half of the layers are run.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="blocks-skipped",
        how="code",
        formulas=half_of_the_layers,
    ),
    Fault(
        id="S23",
        group="blocks",
        sentence="The last layer norm, ln_post, is missing.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="norm-missing",
        how="code",
        formulas=lambda dims, layers: {"ln_post": lambda s, x, t: x[s.inputs[0]]},
    ),
    Fault(
        id="E09",
        group="blocks",
        sentence="GELU is computed in its tanh form in place of the exact one.",
        seen="candle, tinygrad, whisper.cpp; the reverse in kyutai-labs/pocket-tts#278",
        first_tap="conv1.gelu",
        cause="gelu-tanh",
        how="code",
        formulas=lambda dims, layers: every(
            dims, "gelu", lambda s, x, t: F.gelu(x[s.inputs[0]], approximate="tanh")
        ),
    ),
    Fault(
        id="E17",
        group="blocks",
        sentence="The key has a bias, which no checkpoint fills. (softmax does not see it.)",
        seen="vllm-project/vllm#12342",
        first_tap="blocks.{layer}.attn.key",
        cause="bias-added",
        how="code",
        formulas=key_bias,
    ),
]
