"""The encoder as an ONNX file, and the two that run it: onnxruntime and OpenVINO.

It is written node by node from the checkpoint's tensors, so that each runtime gets the form that
it fuses: one product for query, key and value, weights as right-hand sides, LayerNormalization and
Gelu whole. Operators: https://onnx.ai/onnx/operators/, `MultiHeadAttention` of onnxruntime:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from weights import Checkpoint

OPSET, IR_VERSION = 20, 9  # the first opset with Gelu
EPSILON = 1e-5  # of torch.nn.LayerNorm
PLAIN, FUSED = "encoder.onnx", "encoder-fused.onnx"


def convert(checkpoint: Checkpoint, folder: Path) -> None:
    """Both forms of the encoder into `folder`."""
    write_encoder(checkpoint, folder / PLAIN)
    write_encoder(checkpoint, folder / FUSED, fused=True)


class OnnxRuntime:
    """The encoder in onnxruntime on the CPU, with its own operator for attention."""

    def __init__(self, folder: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(folder / FUSED), options, providers=["CPUExecutionProvider"]
        )

    def encoder(self, mel: np.ndarray) -> np.ndarray:
        """mel (batch, n_mels, 2 * n_audio_ctx) -> (batch, n_audio_ctx, n_audio_state)."""
        features: np.ndarray = self._session.run(None, {"mel": mel})[0]
        return features


class OpenVino:
    """The encoder in OpenVINO on the CPU; precision is its hint: "f32" or "bf16"."""

    def __init__(self, folder: Path, threads: int, precision: str):
        import openvino

        core = openvino.Core()
        self._model = core.compile_model(
            core.read_model(folder / PLAIN),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
            },
        )

    def encoder(self, mel: np.ndarray) -> np.ndarray:
        """mel (batch, n_mels, 2 * n_audio_ctx) -> (batch, n_audio_ctx, n_audio_state)."""
        return np.array(self._model(mel)[0])


class Writer:
    """Collects the nodes and the tensors of one graph; every method returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def tensor(self, name: str, value: np.ndarray) -> str:
        """A constant; float64 and float16 become float32."""
        from onnx import numpy_helper

        if value.dtype.kind == "f":
            value = value.astype(np.float32)
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, outputs: int = 1, **how: Any) -> Any:
        """One operator: the name of its output, or a list of several names."""
        from onnx import helper

        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **how))
        return name if outputs == 1 else names


def write_encoder(checkpoint: Checkpoint, path: Path, fused: bool = False) -> None:
    """mel (batch, n_mels, 2 * n_audio_ctx) -> features (batch, n_audio_ctx, n_audio_state).

    fused : onnxruntime's own operator for attention, which others do not know
    The tensors lie beside the graph, in `path` with the suffix .data.
    """
    import onnx
    from onnx import TensorProto, helper

    dims, w = checkpoint.dims, Writer()
    n_ctx, n_state, n_head = dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head
    tensors = {k: t.float().numpy() for k, t in checkpoint.encoder_tensors().items()}

    def constant(name: str) -> str:
        return w.tensor(name, tensors[name])

    def norm(x: str, name: str) -> str:
        inputs = [x, constant(f"{name}.weight"), constant(f"{name}.bias")]
        return str(w.node("LayerNormalization", inputs, name, axis=-1, epsilon=EPSILON))

    def product(x: str, name: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """x @ weight.T + bias; weight (out, in) as OpenAI has it."""
        y = w.node("MatMul", [x, w.tensor(f"{name}.weight", weight.T)], f"{name}.product")
        return str(w.node("Add", [y, w.tensor(f"{name}.bias", bias)], name))

    def linear(x: str, name: str) -> str:
        return product(x, name, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def conv(x: str, name: str, stride: int) -> str:
        inputs = [x, constant(f"{name}.weight"), constant(f"{name}.bias")]
        y = w.node("Conv", inputs, name, kernel_shape=[3], pads=[1, 1], strides=[stride])
        return str(w.node("Gelu", [y], f"{name}.gelu"))

    def heads(x: str, name: str, order: list[int]) -> str:
        """(batch, n_audio_ctx, n_audio_state) -> (batch, n_head, ...) in this order of axes."""
        y = w.node("Reshape", [x, "of_heads"], f"{name}.heads")
        return str(w.node("Transpose", [y], f"{name}.turned", perm=order))

    def attention(x: str, name: str) -> str:
        parts = ("query", "key", "value")
        weight = np.concatenate([tensors[f"{name}.{part}.weight"] for part in parts])
        key_bias = np.zeros(n_state, np.float32)  # the key has none
        bias = np.concatenate(
            [tensors[f"{name}.query.bias"], key_bias, tensors[f"{name}.value.bias"]]
        )
        qkv = product(x, f"{name}.qkv", weight, bias)
        q, k, v = w.node("Split", [qkv], f"{name}.split", outputs=3, axis=-1, num_outputs=3)
        if fused:
            mixed = w.node(
                "MultiHeadAttention",
                [q, k, v],
                f"{name}.attention",
                domain="com.microsoft",
                num_heads=n_head,
            )
        else:
            q = w.node("Mul", [heads(q, f"{name}.q", [0, 2, 1, 3]), "scale"], f"{name}.scaled")
            scores = w.node("MatMul", [q, heads(k, f"{name}.k", [0, 2, 3, 1])], f"{name}.scores")
            shares = w.node("Softmax", [scores], f"{name}.softmax", axis=-1)
            y = w.node("MatMul", [shares, heads(v, f"{name}.v", [0, 2, 1, 3])], f"{name}.mixed")
            y = w.node("Transpose", [y], f"{name}.back", perm=[0, 2, 1, 3])
            mixed = w.node("Reshape", [y, "of_state"], f"{name}.joined")
        return linear(mixed, f"{name}.out")

    if not fused:
        w.tensor("of_heads", np.array([0, n_ctx, n_head, n_state // n_head], np.int64))
        w.tensor("of_state", np.array([0, n_ctx, n_state], np.int64))
        w.tensor("scale", np.array((n_state // n_head) ** -0.5, np.float32))
    x = conv(conv("mel", "conv1", 1), "conv2", 2)
    x = w.node("Transpose", [x], "frames", perm=[0, 2, 1])
    x = w.node("Add", [x, constant("positional_embedding")], "embedded")
    for layer in range(dims.n_audio_layer):
        b = f"blocks.{layer}"
        y = attention(norm(x, f"{b}.attn_ln"), f"{b}.attn")
        x = w.node("Add", [x, y], f"{b}.attended")
        y = w.node("Gelu", [linear(norm(x, f"{b}.mlp_ln"), f"{b}.mlp.0")], f"{b}.mlp.1")
        x = w.node("Add", [x, linear(y, f"{b}.mlp.2")], b)
    w.nodes.append(
        helper.make_node(
            "LayerNormalization",
            [x, constant("ln_post.weight"), constant("ln_post.bias")],
            ["features"],
            name="ln_post",
            axis=-1,
            epsilon=EPSILON,
        )
    )
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        w.nodes,
        "encoder",
        [helper.make_tensor_value_info("mel", float32, ["batch", dims.n_mels, 2 * n_ctx])],
        [helper.make_tensor_value_info("features", float32, ["batch", n_ctx, n_state])],
        w.tensors,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    data = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data)
