"""The attention of one encoder block, alone, in MAX: one graph for all layers, its weights inputs.

It has no norm and no residual: whoever calls it, the stock encoder, has them. It computes on the
CPU in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType
from torch import Tensor
from whisper.model import ModelDimensions

import encoder.graph
from encoder import kernels
from encoder.engine import KINDS, Bound, Kind, check_input, float32_weights
from encoder.graph import attention, encoder_shapes


def attention_shapes(dims: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """The tensors of one block's attention, as `MultiHeadAttention` names them: "query.weight"."""
    shapes, part = encoder_shapes(dims), "blocks.0.attn."
    return {name.removeprefix(part): s for name, s in shapes.items() if name.startswith(part)}


def build(dims: ModelDimensions, device: DeviceRef) -> Graph:
    """inputs: x (B, n_audio_ctx, n_audio_state), any batch size, then the weights in the order of
    `attention_shapes`; output: what the block adds to its residual, of the shape of x."""
    shapes = attention_shapes(dims)
    types = [TensorType(DType.float32, ["batch", dims.n_audio_ctx, dims.n_audio_state], device)]
    types += [TensorType(DType.float32, shape, device) for shape in shapes.values()]
    library = kernels.operations(device)
    with Graph("whisper_audio_attention", input_types=types, kernel_library=library) as graph:
        x, *tensors = (value.tensor for value in graph.inputs)
        weight = dict(zip((f"attn.{name}" for name in shapes), tensors, strict=True))
        graph.output(attention(x, weight.__getitem__, "attn", dims.n_audio_head))
    return graph


KINDS["attention"] = Kind(
    build,
    "the encoder's attention",
    (*encoder.graph.SOURCES, __file__),
    ("n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer"),
)


class Attention(Bound):
    """The compiled graph: `attention(x, tensors)` -> what `MultiHeadAttention` with them answers.

    One artifact serves every layer, every depth and all weights of a width. Raises `EngineError`
    where MAX cannot do it; compiles (a minute or two, once) where no artifact is kept.
    """

    def __init__(self, dims: ModelDimensions):
        one = replace(dims, n_audio_layer=1)
        super().__init__("attention", one, "cpu", {})
        self._shapes = attention_shapes(one)

    def __call__(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x (batch, n_audio_ctx, n_audio_state) float32, tensors by the names of
        `attention_shapes`, read where they lie -> (batch, n_audio_ctx, n_audio_state).

        Raises ValueError on another shape, dtype or device of x, EngineError on other tensors.
        """
        weights = float32_weights(tensors, self._shapes, "attn")
        x = check_input("x", x, (self.dims.n_audio_ctx, self.dims.n_audio_state))
        return self._execute(x, *weights.values())[0]
