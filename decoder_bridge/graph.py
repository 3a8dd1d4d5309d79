"""Whisper's text decoder as MAX Graphs, written once; it computes nothing by itself.

Lay it beside `whisper/model.py` (openai-whisper v20250625, classes `TextDecoder`,
`ResidualAttentionBlock`, `MultiHeadAttention`,
https://github.com/openai/whisper/blob/v20250625/whisper/model.py): the names are the same, in the
checkpoint, in this graph and in the taps. Sizes are those of tiny.en in the comments:
A windows of audio, G beams of each, B = A * G sequences, T new tokens of each, n tokens of each so
far with the new ones, n_vocab 51864, n_audio_ctx 1500, n_text_ctx 448, n_text_state 384,
n_text_head 6, n_text_layer 4.

Three graphs make one artifact:
    cross_attention_keys_values   once for a window: features -> keys and values of every block
    text_decoder                  any number of new tokens -> logits
    text_decoder_step             one new token -> logits
Keys and values of self attention lie in buffers of n_text_ctx rows, which the last two write and
read in place.

`weight` and `tap` are those of `encoder/graph.py`. A third argument says what lies in the buffers:
    remember(name, k, v) -> (k, v)    takes the new keys and values, gives all of them so far

They may read the token embedding in float16 (`half`), half the bytes: each number is made float32
as it is read, and all sums are float32.
"""

from __future__ import annotations

from max.dtype import DType
from max.graph import (
    BufferType,
    BufferValue,
    DeviceRef,
    Dim,
    Graph,
    Module,
    TensorType,
    TensorValue,
    ops,
)
from whisper.model import ModelDimensions

from encoder import kernels
from encoder.graph import (
    Memory,
    Tap,
    WeightSource,
    attention,
    external_weights,
    layer_norm,
    linear,
    mlp,
    no_tap,
    only_these,
    qkv_attention,
)
from weights import expected_shapes

KEYS_VALUES = "cross_attention_keys_values"
DECODER = "text_decoder"
STEP = "text_decoder_step"

TOKEN_EMBEDDING = "token_embedding.weight"
HALF = f"{TOKEN_EMBEDDING}.float16"  # the same numbers

KeysValues = list[tuple[TensorValue, TensorValue]]  # of each block


def cross_attention(
    x: TensorValue,
    n_group: Dim,
    keys_values: tuple[TensorValue, TensorValue],
    weight: WeightSource,
    name: str,
    n_head: int,
    tap: Tap,
) -> TensorValue:
    """`MultiHeadAttention` over the audio: x (B, T, 384), k and v (A, 1500, 384) -> (B, T, 384).

    The beams of a window look at the same keys, and nothing is masked: they are more queries.
    """
    (batch, n_ctx, n_state), (k, v) = x.shape, keys_values
    q = linear(x, weight(f"{name}.query.weight"), weight(f"{name}.query.bias"))
    q = ops.reshape(tap(f"{name}.query", q), [k.shape[0], n_group * n_ctx, n_state])
    wv = qkv_attention(q, k, v, n_head)  # (A, G * T, 384)
    wv = tap(f"{name}.qkv_attention", ops.reshape(wv, [batch, n_ctx, n_state]))
    out = linear(wv, weight(f"{name}.out.weight"), weight(f"{name}.out.bias"))
    return tap(f"{name}.out", out)


def embed(tokens: TensorValue, length: Dim, weight: WeightSource, tap: Tap) -> TensorValue:
    """tokens (A, G, T), the last of n -> (B, T, 384), positions added."""
    n_audio, n_group, n_ctx = tokens.shape
    flat = ops.reshape(tokens, [n_audio * n_group, n_ctx])
    rows = ops.gather(weight(TOKEN_EMBEDDING), flat, axis=0)
    x = tap("token_embedding", ops.cast(rows, DType.float32))
    positions = weight("positional_embedding")[new_rows(n_ctx, length), :]  # (T, 384)
    return tap("positional_embedding", x + positions)


def logits(x: TensorValue, weight: WeightSource, tap: Tap) -> TensorValue:
    """The last norm, then the product with every token's embedding: (B, T, 384) -> (B, T, 51864).

    80 MB of float32 are read here for a token, more than everywhere else together, or 40 MB of
    float16.
    """
    x = tap("ln", layer_norm(x, weight, "ln"))
    return tap("logits", linear(x, weight(TOKEN_EMBEDDING), None))


def new_rows(n_ctx: Dim, length: Dim) -> tuple[slice, Dim]:
    """The index of the last `n_ctx` of `length` rows."""
    stop = ops.shape_to_tensor([length])
    return slice(stop - ops.shape_to_tensor([n_ctx]), stop), n_ctx


def cross_keys_values(
    features: TensorValue, weight: WeightSource, dims: ModelDimensions, tap: Tap = no_tap
) -> KeysValues:
    """features (A, 1500, 384) -> the keys and values of every block's cross attention, as large."""
    found = []
    for layer in range(dims.n_text_layer):
        name = f"blocks.{layer}.cross_attn"
        k = linear(features, weight(f"{name}.key.weight"), None)
        v = linear(features, weight(f"{name}.value.weight"), weight(f"{name}.value.bias"))
        found.append((tap(f"{name}.key", k), tap(f"{name}.value", v)))
    return found


def decoder(
    tokens: TensorValue,
    mask: TensorValue,
    cross: KeysValues,
    remember: Memory,
    weight: WeightSource,
    dims: ModelDimensions,
    rows: TensorValue | None = None,
    tap: Tap = no_tap,
) -> TensorValue:
    """`TextDecoder`: tokens (A, G, T) int64, mask (T, n) -> logits (B, T, 51864).

    rows : (P,) int64, the new tokens whose logits are wanted, (B, P, 51864); none: all of them
    """
    _, n_group, _ = tokens.shape
    n_head = dims.n_text_head
    x = embed(tokens, mask.shape[1], weight, tap)
    for layer in range(dims.n_text_layer):
        name = f"blocks.{layer}"
        y = tap(f"{name}.attn_ln", layer_norm(x, weight, f"{name}.attn_ln"))
        y = attention(y, weight, f"{name}.attn", n_head, tap, mask=mask, remember=remember)
        x = tap(f"{name}.attn.residual", x + y)
        y = tap(f"{name}.cross_attn_ln", layer_norm(x, weight, f"{name}.cross_attn_ln"))
        to = f"{name}.cross_attn"
        y = cross_attention(y, n_group, cross[layer], weight, to, n_head, tap)
        x = tap(f"{to}.residual", x + y)
        y = tap(f"{name}.mlp_ln", layer_norm(x, weight, f"{name}.mlp_ln"))
        x = tap(name, x + mlp(y, weight, f"{name}.mlp", tap))
    return logits(x if rows is None else ops.gather(x, rows, axis=1), weight, tap)


def decoder_shapes(dims: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors as these graphs name them ("blocks.0.attn.key.weight"), with shapes."""
    shapes = expected_shapes(dims)
    part = "decoder."
    return {name.removeprefix(part): s for name, s in shapes.items() if name.startswith(part)}


def with_half(weight: WeightSource, dims: ModelDimensions) -> WeightSource:
    """The same with HALF, an external constant, for the embedding."""
    host = TensorType(DType.float16, decoder_shapes(dims)[TOKEN_EMBEDDING], DeviceRef.CPU())
    table = ops.constant_external(HALF, host)
    return lambda name: table if name == TOKEN_EMBEDDING else weight(name)


def in_buffers(buffers: dict[str, BufferValue], n_ctx: Dim, length: Dim) -> Memory:
    """Memory in buffers (A, G, 448, 384): "blocks.0.attn.key", "blocks.0.attn.value", ...

    New rows are stored behind those that are there, in place; the first n are read.
    """

    def extend(buffer: BufferValue, new: TensorValue) -> TensorValue:  # (B, T, 384) -> (B, n, 384)
        n_audio, n_group, _, n_state = buffer.shape
        every, first = slice(None), (slice(0, ops.shape_to_tensor([length])), length)
        new = ops.reshape(new, [n_audio, n_group, n_ctx, n_state])
        ops.buffer_store_slice(buffer, new, [every, every, new_rows(n_ctx, length), every])
        kept = ops.buffer_load(buffer)[every, every, first, every]  # (A, G, n, 384)
        return ops.reshape(kept, [n_audio * n_group, length, n_state])

    def remember(name: str, k: TensorValue, v: TensorValue) -> tuple[TensorValue, TensorValue]:
        return extend(buffers[f"{name}.key"], k), extend(buffers[f"{name}.value"], v)

    return remember


def add_keys_values(module: Module, dims: ModelDimensions, device: DeviceRef) -> None:
    """Add the graph that is run once for a window: features (A, 1500, 384) -> for each block the
    keys, then the values, of its cross attention."""
    features = TensorType(DType.float32, ["audio", dims.n_audio_ctx, dims.n_text_state], device)
    library = kernels.operations(device)
    with Graph(KEYS_VALUES, input_types=[features], module=module, kernel_library=library) as graph:
        weight = external_weights(decoder_shapes(dims), device)
        found = cross_keys_values(graph.inputs[0].tensor, weight, dims)
        graph.output(*(x for pair in found for x in pair))


def add_decoder(
    module: Module, dims: ModelDimensions, device: DeviceRef, *, step: bool, half: bool = False
) -> None:
    """Add a graph of the decoder: new tokens -> logits.

    inputs: tokens (A, G, T) int64, T being 1 in the graph of a `step`; mask (T, n), which says by
    its shape how many tokens there are with the new ones; rows (P,) int64, but not for a `step`;
    then of each block keys and values of cross attention (A, 1500, 384); then of each block the
    buffers of keys and values of self attention (A, G, 448, 384), of which the first n - T rows are
    read and the T rows behind them are written. Output: logits (A * G, P, 51864).
    """
    n_ctx: str | int = 1 if step else "tokens"
    names = [
        f"blocks.{layer}.attn.{what}"
        for layer in range(dims.n_text_layer)
        for what in ("key", "value")
    ]
    seen = TensorType(DType.float32, ["audio", dims.n_audio_ctx, dims.n_text_state], device)
    shape = ["audio", "group", dims.n_text_ctx, dims.n_text_state]
    types = [
        TensorType(DType.int64, ["audio", "group", n_ctx], device),
        TensorType(DType.float32, [n_ctx, "length"], device),
        *([] if step else [TensorType(DType.int64, ["rows"], device)]),
        *[seen for _ in names],
        *[BufferType(DType.float32, shape, device) for _ in names],
    ]
    called, library = STEP if step else DECODER, kernels.operations(device)
    with Graph(called, input_types=types, module=module, kernel_library=library) as graph:
        inputs = list(graph.inputs)
        tokens, mask = inputs[0].tensor, inputs[1].tensor
        cross = [value.tensor for value in inputs[-2 * len(names) : -len(names)]]
        weight = external_weights(decoder_shapes(dims), device)
        buffers = {n: x.buffer for n, x in zip(names, inputs[-len(names) :], strict=True)}
        answer = decoder(
            tokens,
            mask,
            list(zip(cross[::2], cross[1::2], strict=True)),
            in_buffers(buffers, tokens.shape[2], mask.shape[1]),
            with_half(weight, dims) if half else weight,
            dims,
            None if step else inputs[2].tensor,
        )
        graph.output(answer)


def build(dims: ModelDimensions, device: DeviceRef, half: bool = False) -> Module:
    """The three production graphs, in one module that is compiled as one.

    half : the token embedding is an external constant in float16, `HALF`
    """
    module = Module()
    add_keys_values(module, dims, device)
    add_decoder(module, dims, device, step=False, half=half)
    add_decoder(module, dims, device, step=True, half=half)
    return module


def tapped_types(dims: ModelDimensions, n_ctx: str | int, device: DeviceRef) -> list[TensorType]:
    """features (B, 1500, 384), tokens (B, 1, T) and mask (T, T): the inputs of teacher forcing."""
    return [
        TensorType(DType.float32, ["batch", dims.n_audio_ctx, dims.n_text_state], device),
        TensorType(DType.int64, ["batch", 1, n_ctx], device),
        TensorType(DType.float32, [n_ctx, n_ctx], device),
    ]


def teacher_forcing(graph: Graph, dims: ModelDimensions, device: DeviceRef, tap: Tap) -> None:
    """The whole decoder on the inputs of `tapped_types`: all tokens at once, nothing remembered."""
    features, tokens, mask = (value.tensor for value in graph.inputs)
    weight = external_weights(decoder_shapes(dims), device)
    cross = cross_keys_values(features, weight, dims, tap)
    decoder(tokens, mask, cross, only_these, weight, dims, tap=tap)


def build_tapped(dims: ModelDimensions, device: DeviceRef) -> Graph:
    """The decoder on all tokens at once, with one output for each tap, in the order of
    `tap_names`; inputs as in `tapped_types`."""
    taps: list[TensorValue] = []

    def tap(name: str, x: TensorValue) -> TensorValue:
        taps.append(x)
        return x

    types = tapped_types(dims, "tokens", device)
    library = kernels.operations(device)
    with Graph("whisper_text_decoder_taps", input_types=types, kernel_library=library) as graph:
        teacher_forcing(graph, dims, device, tap)
        graph.output(*taps)
    return graph


def tap_shapes(dims: ModelDimensions, n_ctx: int) -> dict[str, tuple[int, ...]]:
    """Every tap and its shape for `n_ctx` tokens, without the batch, in order of computation: what
    the builder taps."""
    found: dict[str, tuple[int, ...]] = {}

    def tap(name: str, x: TensorValue) -> TensorValue:
        found[name] = tuple(int(d) for d in x.shape[1:])
        return x

    cpu = DeviceRef.CPU()
    with Graph("tap_shapes", input_types=tapped_types(dims, n_ctx, cpu)) as graph:
        teacher_forcing(graph, dims, cpu, tap)
    return found


def tap_names(dims: ModelDimensions) -> list[str]:
    """The names of the taps, in order of computation: "blocks.0.cross_attn.key", ... "logits"."""
    return list(tap_shapes(dims, 1))
