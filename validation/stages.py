"""The encoder as a list of stages: what each tap is computed from, and the plain formula for it.

The list follows `whisper/model.py`; a test holds it against the taps of `encoder/graph.py`. It
serves to ask of one stage alone what it should have given for the inputs that it got, in any dtype.
It is no encoder: nothing here runs the stages one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions

LAYER_NORM_EPSILON = 1e-5  # torch.nn.LayerNorm's default, Whisper's too


@dataclass(frozen=True)
class Stage:
    """One tap: `kind` of operation, the taps it reads, the weights it uses (OpenAI's names).

    kinds: mel, conv, gelu, positions, layer_norm, linear, attention, residual
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    stride: int = 1  # conv only


def _linear(name: str, x: str, bias: bool = True) -> Stage:
    return Stage(name, "linear", (x,), (f"{name}.weight", *([f"{name}.bias"] if bias else [])))


def _layer_norm(name: str, x: str) -> Stage:
    return Stage(name, "layer_norm", (x,), (f"{name}.weight", f"{name}.bias"))


def stages(dims: ModelDimensions) -> list[Stage]:
    """All stages in the order of computation; names are those of the taps."""
    found = [
        Stage("mel", "mel"),
        Stage("conv1", "conv", ("mel",), ("conv1.weight", "conv1.bias"), stride=1),
        Stage("conv1.gelu", "gelu", ("conv1",)),
        Stage("conv2", "conv", ("conv1.gelu",), ("conv2.weight", "conv2.bias"), stride=2),
        Stage("conv2.gelu", "gelu", ("conv2",)),
        Stage("positional_embedding", "positions", ("conv2.gelu",), ("positional_embedding",)),
    ]
    x = "positional_embedding"
    for layer in range(dims.n_audio_layer):
        b = f"blocks.{layer}"
        found += [
            _layer_norm(f"{b}.attn_ln", x),
            _linear(f"{b}.attn.query", f"{b}.attn_ln"),
            _linear(f"{b}.attn.key", f"{b}.attn_ln", bias=False),
            _linear(f"{b}.attn.value", f"{b}.attn_ln"),
            Stage(
                f"{b}.attn.qkv_attention",
                "attention",
                (f"{b}.attn.query", f"{b}.attn.key", f"{b}.attn.value"),
            ),
            _linear(f"{b}.attn.out", f"{b}.attn.qkv_attention"),
            Stage(f"{b}.attn.residual", "residual", (x, f"{b}.attn.out")),
            _layer_norm(f"{b}.mlp_ln", f"{b}.attn.residual"),
            _linear(f"{b}.mlp.0", f"{b}.mlp_ln"),
            Stage(f"{b}.mlp.1", "gelu", (f"{b}.mlp.0",)),
            _linear(f"{b}.mlp.2", f"{b}.mlp.1"),
            Stage(b, "residual", (f"{b}.attn.residual", f"{b}.mlp.2")),
        ]
        x = b
    return [*found, _layer_norm("ln_post", x)]


def heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, n_state) -> (B, n_head, T, n_state / n_head)."""
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, n_head: int, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v by heads: (B, T, n_state) three times -> (B, T, n_state).

    `scale` None is 1/sqrt(n_state / n_head), which is 1/8 in every Whisper.
    """
    wv = F.scaled_dot_product_attention(
        heads(q, n_head), heads(k, n_head), heads(v, n_head), scale=scale
    )
    return wv.transpose(1, 2).reshape(q.shape)


def compute(
    stage: Stage, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor], n_head: int
) -> Tensor:
    """What `stage` gives for `inputs` (by tap name), in the dtype of the inputs.

    Taps are (B, frames, channels), mel is (B, n_mels, frames). `tensors` are the encoder's, by
    OpenAI's name without "encoder.", in any floating dtype.
    """
    if stage.kind == "mel":
        return inputs["mel"]
    x = inputs[stage.inputs[0]]
    w = [tensors[name].to(x.dtype) for name in stage.weights]
    match stage.kind:
        case "conv":
            channels_first = x if stage.inputs == ("mel",) else x.transpose(1, 2)
            y = F.conv1d(channels_first, w[0], w[1], stride=stage.stride, padding=1)
            return y.transpose(1, 2)
        case "gelu":
            return F.gelu(x)
        case "positions":
            return x + w[0]
        case "layer_norm":
            return F.layer_norm(x, x.shape[-1:], w[0], w[1], LAYER_NORM_EPSILON)
        case "linear":
            return F.linear(x, w[0], w[1] if len(w) == 2 else None)
        case "attention":
            return attend(x, inputs[stage.inputs[1]], inputs[stage.inputs[2]], n_head)
        case "residual":
            return x + inputs[stage.inputs[1]]
    raise ValueError(f"stage {stage.name} is of unknown kind {stage.kind!r}")


def own_output(
    stage: Stage, taps: Mapping[str, Tensor], tensors: Mapping[str, Tensor], n_head: int
) -> Tensor:
    """`compute` in float64 on the taps that one side itself had: what that stage should have said,
    whatever went wrong before it."""
    inputs = {name: taps[name].to(torch.float64) for name in stage.inputs or ("mel",)}
    return compute(stage, inputs, tensors, n_head)
