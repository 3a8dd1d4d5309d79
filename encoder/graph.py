"""Whisper's audio encoder as a MAX Graph, written once; it computes nothing by itself.

Lay it beside `whisper/model.py` (openai-whisper v20250625, classes `AudioEncoder`,
`ResidualAttentionBlock`, `MultiHeadAttention`,
https://github.com/openai/whisper/blob/v20250625/whisper/model.py): the names are the same, in the
checkpoint, in this graph and in the taps. Sizes are those of tiny in the comments:
B windows, n_mels 80, n_audio_ctx 1500, n_audio_state 384, n_audio_head 6, n_audio_layer 4.

Every user of the network calls these functions: the production graph, the graph with taps, the
graph of single stages. Two arguments make that possible:
    weight(name) -> TensorValue    where a tensor comes from: an external constant, a graph input
    tap(name, x) -> TensorValue    looks at `x` and returns what the network goes on with

Products, attention and GELU are written here with MAX's operations, which run on any device in any
dtype. A graph that is built with `kernels.operations` has this project's own in their place, for
the CPU in float32: the same function, another order of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops
from whisper.model import ModelDimensions

from encoder import kernels
from weights import expected_shapes

SOURCES = (__file__, *kernels.SOURCES)  # the files whose text decides what the graphs compute
LAYER_NORM_EPSILON = 1e-5  # the default of torch.nn.LayerNorm, which Whisper uses

WeightSource = Callable[[str], TensorValue]
Tap = Callable[[str, TensorValue], TensorValue]
Memory = Callable[[str, TensorValue, TensorValue], tuple[TensorValue, TensorValue]]


def no_tap(name: str, x: TensorValue) -> TensorValue:
    """Production: the network goes on with `x`, nobody looks."""
    return x


def gelu(x: TensorValue) -> TensorValue:
    """`GELU`, exact, no tanh: x * Phi(x), of any shape, in x's dtype."""
    return kernels.gelu(x) if kernels.serve() else ops.gelu(x, approximate="none")


def linear(x: TensorValue, weight: TensorValue, bias: TensorValue | None) -> TensorValue:
    """`Linear`: x (..., in), weight (out, in), bias (out,) or none -> (..., out), in x's dtype."""
    if kernels.serve():
        y = kernels.linear(x, weight)
    else:
        y = x @ ops.transpose(ops.cast(weight, x.dtype), 0, 1)
    return y if bias is None else y + ops.cast(bias, x.dtype)


def conv1d(x: TensorValue, weight: TensorValue, bias: TensorValue, stride: int) -> TensorValue:
    """`torch.nn.Conv1d` with kernel 3 and padding 1, channels last.

    x (B, frames, in), weight (out, in, 3), bias (out,) -> (B, frames / stride, out). With MAX's
    operations three views and one product, not `ops.conv2d`, of which wrong results at padded edges
    are reported (modular#6461, #6712).
    """
    batch, frames, channels = x.shape
    n_out, n_in, kernel = (int(d) for d in weight.shape)
    if kernels.serve(n_out):
        return kernels.conv1d(x, weight, stride) + bias
    edge = ops.broadcast_to(ops.constant(0.0, x.dtype, x.device), [batch, 1, channels])
    padded = ops.concat([edge, x, edge], axis=1)  # (B, frames + 2, in)
    views = [padded[:, tap : tap + int(frames) : stride, :] for tap in range(kernel)]
    columns = ops.concat(views, axis=2)  # (B, frames / stride, 3 * in)
    matrix = ops.reshape(ops.permute(weight, [2, 1, 0]), [kernel * n_in, n_out])
    return columns @ ops.cast(matrix, x.dtype) + ops.cast(bias, x.dtype)


def layer_norm(x: TensorValue, weight: WeightSource, name: str) -> TensorValue:
    """`LayerNorm` over the last axis, in float32: x (..., n_state) -> (..., n_state)."""
    gamma, beta = weight(f"{name}.weight"), weight(f"{name}.bias")
    y = ops.layer_norm(ops.cast(x, DType.float32), gamma, beta, epsilon=LAYER_NORM_EPSILON)
    return ops.cast(y, x.dtype)


def stem(
    mel: TensorValue, weight: WeightSource, tap: Tap = no_tap, dtype: DType = DType.float32
) -> TensorValue:
    """mel (B, n_mels, 2 * n_audio_ctx) -> (B, n_audio_ctx, n_audio_state), positions added, in
    `dtype`."""
    x = ops.permute(ops.cast(tap("mel", mel), dtype), [0, 2, 1])  # (B, 80, 3000) -> (B, 3000, 80)
    x = tap("conv1", conv1d(x, weight("conv1.weight"), weight("conv1.bias"), stride=1))
    x = tap("conv1.gelu", gelu(x))  # (B, 3000, 384)
    x = tap("conv2", conv1d(x, weight("conv2.weight"), weight("conv2.bias"), stride=2))
    x = tap("conv2.gelu", gelu(x))  # (B, 1500, 384)
    x = ops.cast(x, DType.float32) + weight("positional_embedding")
    return tap("positional_embedding", ops.cast(x, dtype))


def qkv_attention(
    q: TensorValue, k: TensorValue, v: TensorValue, n_head: int, mask: TensorValue | None = None
) -> TensorValue:
    """`MultiHeadAttention.qkv_attention`: q (B, T, n_state), k and v (B, n, n_state) -> as q.

    mask (T, n): 0 where a query may look, -inf where it may not. With MAX's operations the compiler
    turns `softmax((q @ k) * scale) @ v` into one fused kernel; the order of the operands of the
    multiplication matters to it.
    """
    batch, n_ctx, n_state = q.shape
    if mask is None and q.shape == k.shape and kernels.serve(int(n_state) // n_head):
        return kernels.qkv_attention(q, k, v, n_head)
    n_head_state = int(n_state) // n_head  # 64 in every Whisper

    def heads(y: TensorValue) -> TensorValue:  # (B, n, 384) -> (B, 6, n, 64)
        split = ops.reshape(y, [y.shape[0], y.shape[1], n_head, n_head_state])
        return ops.permute(split, [0, 2, 1, 3])

    scale = n_head_state**-0.5  # 1/sqrt(64); OpenAI gives 64**-0.25 to q and to k
    qk = ops.cast(heads(q) @ ops.transpose(heads(k), 2, 3), DType.float32)
    scores = qk * scale  # (B, 6, T, n)
    if mask is not None:
        scores = scores + mask
    wv = ops.cast(ops.softmax(scores), q.dtype) @ heads(v)  # (B, 6, T, 64)
    return ops.reshape(ops.permute(wv, [0, 2, 1, 3]), [batch, n_ctx, n_state])


def only_these(name: str, k: TensorValue, v: TensorValue) -> tuple[TensorValue, TensorValue]:
    """No memory: the keys and values are those of `x`."""
    return k, v


def attention(
    x: TensorValue,
    weight: WeightSource,
    name: str,
    n_head: int,
    tap: Tap = no_tap,
    mask: TensorValue | None = None,
    remember: Memory = only_these,
) -> TensorValue:
    """`MultiHeadAttention` over itself: x (B, T, n_state) -> (B, T, n_state).

    The encoder has no mask and remembers nothing; with them it is the decoder's: mask (T, n).
    """
    q = linear(x, weight(f"{name}.query.weight"), weight(f"{name}.query.bias"))
    k = linear(x, weight(f"{name}.key.weight"), None)  # Whisper's key has no bias
    v = linear(x, weight(f"{name}.value.weight"), weight(f"{name}.value.bias"))
    q, k, v = tap(f"{name}.query", q), tap(f"{name}.key", k), tap(f"{name}.value", v)
    k, v = remember(name, k, v)  # (B, n, n_state)
    wv = tap(f"{name}.qkv_attention", qkv_attention(q, k, v, n_head, mask))
    return tap(f"{name}.out", linear(wv, weight(f"{name}.out.weight"), weight(f"{name}.out.bias")))


def mlp(x: TensorValue, weight: WeightSource, name: str, tap: Tap = no_tap) -> TensorValue:
    """Linear, exact GELU, Linear: x (B, T, n_state) -> (B, T, 4 * n_state) -> (B, T, n_state)."""
    x = tap(f"{name}.0", linear(x, weight(f"{name}.0.weight"), weight(f"{name}.0.bias")))
    x = tap(f"{name}.1", gelu(x))
    return tap(f"{name}.2", linear(x, weight(f"{name}.2.weight"), weight(f"{name}.2.bias")))


def block(
    x: TensorValue, weight: WeightSource, name: str, n_head: int, tap: Tap = no_tap
) -> TensorValue:
    """`ResidualAttentionBlock`: x (B, T, n_state) -> (B, T, n_state), norms before the branches."""
    attn_ln = tap(f"{name}.attn_ln", layer_norm(x, weight, f"{name}.attn_ln"))
    x = tap(f"{name}.attn.residual", x + attention(attn_ln, weight, f"{name}.attn", n_head, tap))
    mlp_ln = tap(f"{name}.mlp_ln", layer_norm(x, weight, f"{name}.mlp_ln"))
    return tap(name, x + mlp(mlp_ln, weight, f"{name}.mlp", tap))


def encoder(
    mel: TensorValue,
    weight: WeightSource,
    dims: ModelDimensions,
    tap: Tap = no_tap,
    dtype: DType = DType.float32,
) -> TensorValue:
    """`AudioEncoder`: mel (B, n_mels, 2 * n_audio_ctx) -> (B, n_audio_ctx, n_audio_state), computed
    in `dtype`."""
    x = stem(mel, weight, tap, dtype)
    for layer in range(dims.n_audio_layer):
        x = block(x, weight, f"blocks.{layer}", dims.n_audio_head, tap)
    return tap("ln_post", layer_norm(x, weight, "ln_post"))


def encoder_shapes(dims: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """The encoder's tensors as this graph names them ("conv1.weight") with their shapes."""
    shapes = expected_shapes(dims, decoder=False)
    return {name.removeprefix("encoder."): shape for name, shape in shapes.items()}


def kept_as(name: str, shape: tuple[int, ...], dtype: DType) -> DType:
    """The dtype in which a tensor is bound: the factors of products in that of the network, biases,
    norms and positions in float32, to be cast where they are used."""
    return DType.float32 if len(shape) == 1 or name == "positional_embedding" else dtype


def external_weights(
    shapes: Mapping[str, tuple[int, ...]], device: DeviceRef, dtype: DType = DType.float32
) -> WeightSource:
    """External constants, bound by name when the compiled model is initialised, `kept_as` says how.

    They are declared on the host, where the checkpoint is, and moved to `device` once.
    """

    @cache  # a tensor may be used twice
    def weight(name: str) -> TensorValue:
        host = TensorType(kept_as(name, shapes[name], dtype), shapes[name], DeviceRef.CPU())
        value = ops.constant_external(name, host)
        return value if device.is_cpu() else value.to(device)

    return weight


def mel_type(dims: ModelDimensions, device: DeviceRef) -> TensorType:
    """(batch, n_mels, 2 * n_audio_ctx), float32, with any batch size."""
    return TensorType(DType.float32, ["batch", dims.n_mels, 2 * dims.n_audio_ctx], device)


def build(dims: ModelDimensions, device: DeviceRef, dtype: DType = DType.float32) -> Graph:
    """The production graph: one input, mel, with any batch size; one output, the features.

    Both are float32; between them the network computes in `dtype`.
    """
    weight = external_weights(encoder_shapes(dims), device, dtype)
    types, library = [mel_type(dims, device)], kernels.operations(device, dtype)
    with Graph("whisper_audio_encoder", input_types=types, kernel_library=library) as graph:
        features = encoder(graph.inputs[0].tensor, weight, dims, dtype=dtype)
        graph.output(ops.cast(features, DType.float32))
    return graph


def build_tapped(dims: ModelDimensions, device: DeviceRef, dtype: DType = DType.float32) -> Graph:
    """The production graph with one output for each tap, float32, in the order of `tap_names`."""
    weight = external_weights(encoder_shapes(dims), device, dtype)
    taps: list[TensorValue] = []

    def tap(name: str, x: TensorValue) -> TensorValue:
        taps.append(ops.cast(x, DType.float32))
        return x

    types, library = [mel_type(dims, device)], kernels.operations(device, dtype)
    with Graph("whisper_audio_encoder_taps", input_types=types, kernel_library=library) as graph:
        encoder(graph.inputs[0].tensor, weight, dims, tap, dtype)
        graph.output(*taps)
    return graph


def tap_shapes(dims: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """Every tap and its shape without the batch, in order of computation: what the builder taps."""
    found: dict[str, tuple[int, ...]] = {}

    def tap(name: str, x: TensorValue) -> TensorValue:
        found[name] = tuple(int(d) for d in x.shape[1:])
        return x

    cpu = DeviceRef.CPU()
    with Graph("tap_shapes", input_types=[mel_type(dims, cpu)]) as graph:
        encoder(graph.inputs[0].tensor, external_weights(encoder_shapes(dims), cpu), dims, tap)
    return found


def tap_names(dims: ModelDimensions) -> list[str]:
    """The names of the taps, in order of computation: "mel", "conv1", ... "ln_post"."""
    return list(tap_shapes(dims))


def build_stages(dims: ModelDimensions, device: DeviceRef) -> Graph:
    """Every stage of a network with one block, each by itself: the tap that it gives is an output,
    and the network goes on with another tensor, the reference's, which is an input.

    inputs: the reference's taps, in the order of `tap_names` of one layer, any batch size; then the
    weights, in the order of `encoder_shapes` of one layer. No stage sees what another one gave, so
    this graph answers for any layer of any network of this width.
    """
    one = replace(dims, n_audio_layer=1)
    shapes, weights = tap_shapes(one), encoder_shapes(one)
    types = [TensorType(DType.float32, ["batch", *shape], device) for shape in shapes.values()]
    types += [TensorType(DType.float32, shape, device) for shape in weights.values()]
    answers: list[TensorValue] = []
    library = kernels.operations(device)
    with Graph("whisper_audio_encoder_stages", input_types=types, kernel_library=library) as graph:
        inputs = [value.tensor for value in graph.inputs]
        reference = dict(zip(shapes, inputs, strict=False))  # the first of them
        weight = dict(zip(weights, inputs[len(shapes) :], strict=True))

        def tap(name: str, x: TensorValue) -> TensorValue:
            answers.append(x)
            return reference[name]

        encoder(reference["mel"], weight.__getitem__, one, tap)
        graph.output(*answers)
    return graph
