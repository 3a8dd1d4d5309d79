"""Mistakes that the table of causes was not written for: the figure for naming them is the honest
one, since all others were made first and their names fitted to them.

Each is something that somebody could do, in a form that `validation/fingerprints.py` does not have.
Its cause is the id that would be true of it, None where no id is. Nothing is added there to suit
one of these: what is to be named belongs into another module first, and a new one here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.audio import N_FFT
from whisper.model import ModelDimensions

from validation.faults.blocks import attention, layer_norm, taken_from
from validation.faults.fault import GITHUB, UNRECORDED, Fault, Formula, Tensors, every, swept
from validation.faults.input import (
    instead,
    linearly_resampled,
    log10,
    louder_batch,
    power,
    right,
    scaled,
    silence_after,
    slaney_corners,
    triangles,
)
from validation.faults.weights import matrices_rounded, output, rounded, to_std
from validation.stages import LAYER_NORM_EPSILON, Stage, attend, compute

LAYER = 1  # where a mistake is made in one alone
BLOCK = 32  # numbers that share a step, as in ggml's formats


# ---- input


def fft_of_512(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """The window of 400 samples in the middle of a frame of 512, and filters for its bins."""
    window = np.zeros(512)
    window[56 : 56 + N_FFT] = np.hanning(N_FFT + 1)[:-1]
    bank = triangles(slaney_corners(n_mels), 512)
    return scaled(log10(bank @ power(silence_after(audio), window)))


def at_full_scale(audio: np.ndarray, n_mels: int) -> np.ndarray:
    loudest = np.abs(audio).max()
    return right(audio / loudest if loudest > 0 else audio, n_mels)


# ---- weights


def positions_three_late(tensors: Tensors, layers: list[int]) -> Tensors:
    return {"positional_embedding": tensors["positional_embedding"].roll(3, 0)}


def positions_of_another_step(tensors: Tensors, layers: list[int]) -> Tensors:
    """The frequencies fall to 1/10000 after the last channel, not with it."""
    frames, channels = tensors["positional_embedding"].shape
    half = channels // 2
    frequencies = torch.exp(-np.log(10000) * torch.arange(half) / half)
    angles = torch.arange(frames)[:, None] * frequencies
    return {"positional_embedding": torch.cat([angles.sin(), angles.cos()], 1)}


def last_blocks_exchanged(tensors: Tensors, layers: list[int]) -> Tensors:
    last = len(layers) - 1
    return taken_from({LAYER: last, last: LAYER})(tensors, layers)


def out_transposed(tensors: Tensors, layers: list[int]) -> Tensors:
    name = f"blocks.{LAYER}.attn.out.weight"
    return {name: tensors[name].T}


def in_blocks(bits: int) -> Callable[[Tensors, list[int]], Tensors]:
    """The matrices, not the kernels: each BLOCK numbers of a row have a step of their own, that of
    the largest of them over 2^(bits-1) - 1."""

    def weights(tensors: Tensors, layers: list[int]) -> Tensors:
        return {
            name: rounded(t.reshape(-1, BLOCK), f"int{bits} per channel").view_as(t)
            for name, t in tensors.items()
            if name.endswith(".weight") and t.ndim == 2
        }

    return weights


def float8(tensors: Tensors, layers: list[int]) -> Tensors:
    """e4m3, the largest of each tensor at the format's own."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    changed = {}
    for name in matrices_rounded("float16")(tensors, layers):
        step = tensors[name].abs().max() / largest
        changed[name] = (tensors[name] / step).to(torch.float8_e4m3fn).float() * step
    return changed


# ---- code


def dynamic_int8(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """Every linear layer on int8: its weights with a step for each output, its input with one."""

    def linear(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        name, matrix = stage.inputs[0], stage.weights[0]
        given = {**tensors, matrix: rounded(tensors[matrix], "int8 per channel")}
        return compute(stage, {name: rounded(x[name], "int8 per tensor")}, given, 1)

    return every(dims, "linear", linear)


def epsilon_outside(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    weight, bias = (tensors[name] for name in stage.weights)
    y = x[stage.inputs[0]]
    deviation = y.std(-1, correction=0, keepdim=True)
    return (y - y.mean(-1, keepdim=True)) / (deviation + LAYER_NORM_EPSILON) * weight + bias


def heads_moved(q: Tensor, k: Tensor, v: Tensor, n_head: int) -> Tensor:
    return attend(q, k, v, n_head).unflatten(2, (n_head, -1)).roll(1, 2).flatten(2)


def tanh_once(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    return {f"blocks.{LAYER}.mlp.1": lambda s, x, t: F.gelu(x[s.inputs[0]], approximate="tanh")}


def _fault(id: str, sentence: str, first_tap: str, cause: str | None, **of: Any) -> Fault:
    """Made by what is given: mel, weights or formulas."""
    how = {"mel": "input", "weights": "weights", "formulas": "code"}
    (made,) = how.keys() & of.keys()
    return Fault(
        id=f"U-{id}",
        sentence=sentence,
        first_tap=first_tap,
        cause=cause,
        unseen=True,
        **{"how": how[made], "seen": UNRECORDED} | of,
    )


FAULTS = [
    _fault(
        "resampled",
        "A file of 88.2 kHz, made of the recording, is brought to 16 kHz by linear interpolation.",
        "mel",
        "mel-resampled",
        group="input",
        seen=f"{GITHUB}/peteonrails/voxtype/issues/641",
        mel=instead(linearly_resampled(88_200)),
    ),
    _fault(
        "floor",
        "The log's floor is that of a batch whose loudest recording is 15 dB louder.",
        "mel",
        "mel-floor",
        group="input",
        mel=instead(louder_batch(15)),
    ),
    _fault(
        "full-scale",
        "The samples are brought to full scale before the spectrogram is made of them.",
        "mel",
        "mel-samples-scaled",
        group="input",
        mel=instead(at_full_scale),
    ),
    _fault(
        "fft-512",
        "The FFT has 512 points, of which the window of 400 samples fills the middle.",
        "mel",
        None,
        group="input",
        mel=instead(fft_of_512),
    ),
    _fault(
        "positions-late",
        "The positional embedding is three frames late.",
        "positional_embedding",
        "positions-shifted",
        group="stem",
        weights=positions_three_late,
    ),
    _fault(
        "positions-step",
        "The positional embedding is computed anew, its frequencies a step of log(10000) / n apart "
        "in place of log(10000) / (n - 1).",
        "positional_embedding",
        None,
        group="stem",
        weights=positions_of_another_step,
    ),
    _fault(
        "epsilon",
        "The layer norms have epsilon 0.0003 in place of 1e-05.",
        "blocks.0.attn_ln",
        "norm-epsilon",
        group="blocks",
        formulas=lambda dims, layers: every(dims, "layer_norm", layer_norm(3e-4)),
    ),
    _fault(
        "epsilon-outside",
        "The layer norms add epsilon to the deviation, not to the variance under the root.",
        "blocks.0.attn_ln",
        None,
        group="blocks",
        seen=f"{GITHUB}/hkproj/pytorch-transformer/pull/31, for another model",
        formulas=lambda dims, layers: every(dims, "layer_norm", epsilon_outside),
    ),
    _fault(
        "scale",
        "Scores are scaled by 1/sqrt(n_head) in place of 1/sqrt(n_head_state).",
        "blocks.0.attn.qkv_attention",
        None,
        group="blocks",
        formulas=attention(lambda q, k, v, n_head: attend(q, k, v, n_head, scale=n_head**-0.5)),
    ),
    _fault(
        "heads",
        "Attention has twice as many heads, of half the width, and the scale that goes with it.",
        "blocks.0.attn.qkv_attention",
        None,
        group="blocks",
        formulas=attention(lambda q, k, v, n_head: attend(q, k, v, 2 * n_head)),
    ),
    _fault(
        "heads-moved",
        "The heads are put together one place further on.",
        "blocks.0.attn.qkv_attention",
        "heads-permuted",
        group="blocks",
        formulas=attention(heads_moved),
    ),
    _fault(
        "transposed",
        "One square weight of one layer, that of out, is used without its transpose.",
        f"blocks.{LAYER}.attn.out",
        "weight-transposed",
        group="blocks",
        weights=out_transposed,
    ),
    _fault(
        "tanh",
        "GELU is computed in its tanh form in the MLP of one layer.",
        f"blocks.{LAYER}.mlp.1",
        "gelu-tanh",
        group="blocks",
        formulas=tanh_once,
    ),
    _fault(
        "swapped",
        "The second layer and the last are run in each other's place.",
        f"blocks.{LAYER}.attn_ln",
        "block-other-weights",
        group="blocks",
        seen=f"{GITHUB}/arcee-ai/mergekit/issues/143, for another model",
        weights=last_blocks_exchanged,
    ),
    *swept(
        (8, 5),
        lambda bits: _fault(
            "blocks-of-32",
            f"The matrices are stored as int{bits}, with a step for each 32 numbers of a row.",
            "blocks.0.attn.query",
            "weight-rounded",
            group="weights",
            seen=f"on purpose, about as in {GITHUB}/ggml-org/whisper.cpp",
            weights=in_blocks(bits),
        ),
    ),
    _fault(
        "float8",
        "The matrices and kernels are stored as float8, of 3 bits of mantissa.",
        "conv1",
        "weight-rounded",
        group="weights",
        weights=float8,
    ),
    _fault(
        "dynamic-int8",
        "Linear layers have int8 weights and round their inputs to int8, as dynamic quantisation "
        "does.",
        "blocks.0.attn.query",
        "product-rounded",
        group="weights",
        formulas=dynamic_int8,
    ),
    _fault(
        "std",
        "The output is rescaled to a standard deviation of 0.35.",
        "ln_post",
        "scaled",
        group="weights",
        formulas=output(to_std(0.35)),
    ),
]
