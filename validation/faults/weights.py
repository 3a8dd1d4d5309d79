"""Mistakes in the weights, in their numbers and in what is made of the output; and noise, which is
no mistake of anybody but draws the curve from error to transcript."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from whisper.model import ModelDimensions

from validation.faults.fault import (
    EARLIER_PORT,
    GITHUB,
    YARDSTICK,
    Fault,
    Formula,
    Tensors,
    seeded,
    swept,
)
from validation.stages import Stage, compute, heads, stages

INITIAL_STD = 0.02  # of a matrix that transformers initialises: `init_std` of WhisperConfig
TARGET_STDS = (0.22, 0.30, 0.40)
FACTORS = (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)
PRECISIONS = (
    "float16",
    "bfloat16",
    "tf32",
    "int8 per tensor",
    "int8 per channel",
    "int6 per channel",
    "int4 per channel",
)
NOBODY_STORES = ("tf32", "int6 per channel", "int4 per channel")
FLOATS = ("float16", "bfloat16", "tf32")
TENSORFLOW = (
    "https://www.tensorflow.org/api_docs/python/tf/config/experimental/"
    "enable_tensor_float_32_execution"
)
NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


# ---- missing and exchanged


def initial(name: str, tensor: Tensor) -> Tensor:
    """What a module has before a checkpoint fills it: norms one and zero, biases zero, matrices
    small random numbers."""
    if name.endswith(".bias"):
        return torch.zeros_like(tensor)
    if name.endswith("ln.weight"):
        return torch.ones_like(tensor)
    return INITIAL_STD * torch.randn(tensor.shape, generator=seeded(name))


def one_missing(tensors: Tensors, layers: list[int]) -> Tensors:
    name = f"blocks.{layers[0]}.mlp.0.weight"
    return {name: initial(name, tensors[name])}


def layer_missing(tensors: Tensors, layers: list[int]) -> Tensors:
    prefix = f"blocks.{layers[0]}."
    return {name: initial(name, t) for name, t in tensors.items() if name.startswith(prefix)}


def value_and_out_exchanged(tensors: Tensors, layers: list[int]) -> Tensors:
    changed = {}
    for attn in (f"blocks.{layer}.attn" for layer in layers):
        changed[f"{attn}.value.weight"] = tensors[f"{attn}.out.weight"]
        changed[f"{attn}.out.weight"] = tensors[f"{attn}.value.weight"]
    return changed


# ---- fewer bits


def rounded(x: Tensor, to: str) -> Tensor:
    """float32 numbers as they are after they were stored as `to`: "bfloat16", "int8 per channel".

    tf32 keeps 10 bits of the mantissa, rounded to nearest. intN is symmetric: steps of the largest
    number over 2^(N-1) - 1, of the tensor or of each output channel (the first axis).
    """
    if to == "tf32":
        return (x.contiguous().view(torch.int32) + 0x1000).bitwise_and(~0x1FFF).view(torch.float32)
    if not to.startswith("int"):
        return x.to(getattr(torch, to)).float()
    kind, _, scope = to.partition(" per ")
    largest = 2 ** (int(kind.removeprefix("int")) - 1) - 1
    axes = tuple(range(1, x.ndim)) if scope == "channel" else tuple(range(x.ndim))
    step = x.abs().amax(axes, keepdim=True) / largest
    return torch.where(step > 0, torch.round(x / step) * step, x)


def matrices_rounded(to: str) -> Callable[[Tensors, list[int]], Tensors]:
    """The kernels of the convolutions too; biases, norms and positions stay as they are."""

    def weights(tensors: Tensors, layers: list[int]) -> Tensors:
        return {
            n: rounded(t, to) for n, t in tensors.items() if n.endswith(".weight") and t.ndim > 1
        }

    return weights


def products_rounded(to: str) -> Callable[[ModelDimensions, list[int]], dict[str, Formula]]:
    """Both operands of every product are rounded, the sums are in float32."""

    def product(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        matrix = stage.weights[0]
        operands = {name: rounded(x[name], to) for name in stage.inputs}
        given = {**tensors, matrix: rounded(tensors[matrix], to)}
        return compute(stage, operands, given, 1)

    def formulas(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
        def attention(
            stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
        ) -> Tensor:
            q, k, v = (rounded(heads(x[n], dims.n_audio_head), to) for n in stage.inputs)
            scores = (q @ k.mT) * q.shape[3] ** -0.5
            wv = rounded(scores.softmax(-1), to) @ v
            return wv.transpose(1, 2).flatten(2)

        kinds = {"conv": product, "linear": product, "attention": attention}
        return {s.name: kinds[s.kind] for s in stages(dims) if s.kind in kinds}

    return formulas


# ---- the output, and noise on taps


def changing(
    change: Callable[[Stage, Tensor, Tensor], Tensor],
    taps: Callable[[ModelDimensions], Iterable[str]],
) -> Callable[[ModelDimensions, list[int]], dict[str, Formula]]:
    """The fault in which these taps, right as they are computed, are changed: `change(stage, tap,
    mel)`."""

    def formulas(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
        def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
            return change(stage, compute(stage, x, tensors, dims.n_audio_head), x["mel"])

        return dict.fromkeys(taps(dims), formula)

    return formulas


def output(
    change: Callable[[Tensor], Tensor],
) -> Callable[[ModelDimensions, list[int]], dict[str, Formula]]:
    """The fault in which the features are changed."""
    return changing(lambda stage, y, mel: change(y), lambda dims: ["ln_post"])


def output_scaled(factor: float) -> Callable[[Tensors, list[int]], Tensors]:
    names = ("ln_post.weight", "ln_post.bias")
    return lambda tensors, layers: {name: factor * tensors[name] for name in names}


def to_std(target: float) -> Callable[[Tensor], Tensor]:
    return lambda y: y * (target / y.std(correction=0))


def normalised(y: Tensor) -> Tensor:
    """Each frame to mean 0 and standard deviation 1."""
    return (y - y.mean(-1, keepdim=True)) / y.std(-1, correction=0, keepdim=True)


def noise(
    id: str, size: float, channels: Callable[[int], slice]
) -> Callable[[Stage, Tensor, Tensor], Tensor]:
    """White noise on these channels of n_state, its L2 norm `size` times the tap's: another draw
    for each stage and each recording, the same for all sizes."""

    def add(stage: Stage, y: Tensor, mel: Tensor) -> Tensor:
        recording = hashlib.sha256(mel.contiguous().numpy().tobytes()).hexdigest()
        only = channels(y.shape[-1])
        noise = torch.zeros_like(y)
        generator = seeded(id, stage.name, recording)
        noise[..., only] = torch.randn(y[..., only].shape, generator=generator)
        norms = torch.linalg.vector_norm(y) / torch.linalg.vector_norm(noise)
        return y + noise * (size * norms)

    return add


def every_channel(n_state: int) -> slice:
    return slice(None)


def middle_channel(n_state: int) -> slice:
    return slice(n_state // 2, n_state // 2 + 1)


def noises(
    id: str,
    where: str,
    first_tap: str,
    taps: Callable[[ModelDimensions], Iterable[str]],
    channels: Callable[[int], slice] = every_channel,
) -> list[Fault]:
    return swept(
        NOISES,
        lambda size: Fault(
            id=id,
            group="weights",
            sentence=f"Noise of {size:g} times the tap's norm is added to {where}.",
            seen=YARDSTICK,
            first_tap=first_tap,
            cause=None,
            how="code",
            yardstick=True,
            formulas=changing(noise(id, size, channels), taps),
        ),
    )


FAULTS = [
    Fault(
        id="S25",
        group="weights",
        sentence="A missing key, one matrix of an MLP, is replaced by random numbers.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.mlp.0",
        cause="unknown-weights",
        how="weights",
        weights=one_missing,
    ),
    Fault(
        id="E13",
        group="weights",
        sentence="No key of a layer is found, and the layer stays as it was initialised.",
        seen=f"{GITHUB}/huggingface/transformers/issues/48722, for other models; the whole encoder "
        f"in {GITHUB}/sbryngelson/ANEForge/pull/275",
        first_tap="blocks.{layer}.attn_ln",
        cause="norm-not-affine",
        how="weights",
        weights=layer_missing,
    ),
    Fault(
        id="S26",
        group="weights",
        sentence="Tensors are matched by position: the weights of value and out, of one shape, are "
        "exchanged.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.value",
        cause="other-weights",
        how="weights",
        weights=value_and_out_exchanged,
    ),
    *swept(
        TARGET_STDS,
        lambda target: Fault(
            id="S28",
            group="weights",
            sentence=f"The output is rescaled to a standard deviation of {target:g}.",
            seen=EARLIER_PORT,
            first_tap="ln_post",
            cause="scaled",
            how="code",
            formulas=output(to_std(target)),
        ),
    ),
    *swept(
        FACTORS,
        lambda factor: Fault(
            id="S28-factor",
            group="weights",
            sentence=f"The output is scaled by {factor:g}.",
            seen=YARDSTICK,
            first_tap="ln_post",
            cause="scaled",
            how="weights",
            yardstick=True,
            weights=output_scaled(factor),
        ),
    ),
    Fault(
        id="S29",
        group="weights",
        sentence="The output is normalised once more, each frame to mean 0 and deviation 1.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="frames-renormalised",
        how="code",
        formulas=output(normalised),
    ),
    # A checkpoint in float16, as OpenAI's are, has nothing to lose to float16 and tf32.
    *swept(
        PRECISIONS,
        lambda to: Fault(
            id="E11",
            group="weights",
            sentence=f"The matrices and kernels are stored as {to}.",
            seen=YARDSTICK
            if to in NOBODY_STORES
            else f"on purpose, as in {GITHUB}/ggml-org/whisper.cpp and "
            f"{GITHUB}/OpenNMT/CTranslate2",
            first_tap="conv1",
            cause="weight-rounded",
            how="weights",
            yardstick=to in NOBODY_STORES,
            weights=matrices_rounded(to),
        ),
    ),
    *swept(
        FLOATS,
        lambda to: Fault(
            id="E11-product",
            group="weights",
            sentence=f"Both operands of every product are rounded to {to}.",
            seen=f"matrix units of GPUs and phones; tf32 by default: {TENSORFLOW}",
            first_tap="conv1",
            cause="product-rounded",
            how="code",
            formulas=products_rounded(to),
        ),
    ),
    Fault(
        id="E12",
        group="weights",
        sentence="The output is given channels first and read frames first.",
        seen=f"{GITHUB}/ggml-org/whisper.cpp/pull/1716",
        first_tap="ln_post",
        cause="transposed",
        how="code",
        formulas=output(lambda y: y.mT.reshape(y.shape)),
    ),
    *noises(
        "E-e-positional_embedding",
        "the output of the stem",
        "positional_embedding",
        lambda dims: ["positional_embedding"],
    ),
    *noises("E-e-blocks.1", "the second block's output", "blocks.1", lambda dims: ["blocks.1"]),
    *noises("E-e-ln_post", "the features", "ln_post", lambda dims: ["ln_post"]),
    *noises(
        "E-e-all",
        "every tap but mel",
        "conv1",
        lambda dims: [stage.name for stage in stages(dims) if stage.kind != "mel"],
    ),
    *noises(
        "E-e-channel",
        "one channel of the second block's output",
        "blocks.1",
        lambda dims: ["blocks.1"],
        middle_channel,
    ),
]
