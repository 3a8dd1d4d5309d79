"""MAX 26.7's own unfinished `WhisperEncoder`, unchanged, as a candidate.

    python -m validation parity speech.flac --model tiny.en --candidate module:their_max:encoder

Its file imports `transformers.AutoConfig`, for annotations alone: any transformers will do, even
one installed with --no-deps. The file is loaded by its path, since `import max.pipelines` needs all
of max[serve].
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import max.nn
import torch
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType

NAMES = {  # OpenAI's names -> those of the class
    "blocks.": "layers.",
    "attn_ln.": "attention_norm.",
    "attn.query.": "attention.wq.",
    "attn.key.": "attention.wk.",
    "attn.value.": "attention.wv.",
    "attn.out.": "attention.wo.",
    "mlp_ln.": "mlp_norm.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
    "ln_post.": "norm.",
    "positional_embedding": "embed_positions.weight",
}


def their_class():
    """`max.pipelines.architectures.whisper.encoder.WhisperEncoder`, as it is installed."""
    package = Path(max.nn.__file__).parents[1]
    file = package / "pipelines/architectures/whisper/encoder.py"
    spec = importlib.util.spec_from_file_location("their_whisper_encoder", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WhisperEncoder


def their_config(dims):
    """What the class reads; `n_heads` is in no Hugging Face config."""
    return SimpleNamespace(
        d_model=dims.n_audio_state,
        n_heads=dims.n_audio_head,
        encoder_attention_heads=dims.n_audio_head,
        encoder_ffn_dim=4 * dims.n_audio_state,
        encoder_layers=dims.n_audio_layer,
        max_source_positions=dims.n_audio_ctx,
        num_mel_bins=dims.n_mels,
    )


def their_weights(checkpoint):
    """OpenAI's tensors by the class's names, float32; the convolutions (out, in, kernel) ->
    (kernel, in, out), the order of MAX's `Conv1D`."""
    tensors = {}
    for name, tensor in checkpoint.encoder_tensors().items():
        for openai, theirs in NAMES.items():
            name = name.replace(openai, theirs)
        if name in ("conv1.weight", "conv2.weight"):
            tensor = tensor.permute(2, 1, 0)
        tensors[name] = tensor.float().contiguous().numpy()
    return tensors


def encoder(checkpoint):
    """mel (1, n_mels, 2 * n_audio_ctx) -> features, by a compiled `WhisperEncoder`.

    Its input is not `module.input_types()`, which is channels first as PyTorch's is: its `Conv1D`
    works channels last.
    """
    dims = checkpoint.dims
    cpu = DeviceRef.CPU()
    module = their_class()(their_config(dims), DType.float32, cpu)
    module.load_state_dict(their_weights(checkpoint))
    mel_type = TensorType(DType.float32, [1, 2 * dims.n_audio_ctx, dims.n_mels], cpu)
    with Graph("their_whisper_encoder", input_types=[mel_type]) as graph:
        graph.output(*module(graph.inputs[0].tensor))
    model = InferenceSession(devices=[CPU()]).load(graph, weights_registry=module.state_dict())

    def features(mel):
        (x,) = model.execute(Buffer.from_dlpack(mel.transpose(1, 2).contiguous()))
        return torch.from_dlpack(x)

    return features
