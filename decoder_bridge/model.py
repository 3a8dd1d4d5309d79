"""The stock openai-whisper model whose `.encoder` is the MAX encoder; nothing else is touched.

It refuses a checkpoint without a decoder, and mel in any dtype but float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import whisper
from torch import Tensor, nn

import weights
from encoder.engine import Engine
from weights import Checkpoint


class MaxAudioEncoder(nn.Module):
    """`whisper.model.AudioEncoder` with the same contract, computed by the MAX engine.

    It has no parameters: the weights are bound to the compiled graph, and no gradient flows.
    """

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        """
        x : torch.Tensor, shape = (batch_size, n_mels, 2 * n_audio_ctx), float32
            the mel spectrogram of the audio
        returns (batch_size, n_audio_ctx, n_audio_state), float32

        As in the stock encoder a wrong number of frames is an AssertionError, and a wrong number of
        axes or mel bins a RuntimeError. Another dtype, which the stock one would compute in, is a
        RuntimeError too: `DecodingOptions(fp16=True)` halves the mel before it comes here.
        """
        dims = self.engine.dims
        if x.ndim != 3 or x.shape[1] != dims.n_mels:
            raise RuntimeError(
                f"mel has shape {tuple(x.shape)}, expected (batch, {dims.n_mels}, "
                f"{2 * dims.n_audio_ctx})"
            )
        assert x.shape[2] == 2 * dims.n_audio_ctx, "incorrect audio shape"
        if x.dtype != torch.float32:
            raise RuntimeError(f"mel is {x.dtype}, the MAX encoder takes torch.float32: fp16=False")
        if x.shape[0] == 0:
            return x.new_empty(0, dims.n_audio_ctx, dims.n_audio_state)
        return self.engine(x)


def stock_model(checkpoint: Checkpoint) -> whisper.Whisper:
    """The whole stock model, PyTorch float32 on the CPU, in evaluation mode: the reference."""
    checkpoint.require_decoder()
    model = whisper.Whisper(checkpoint.dims)
    model.load_state_dict({name: t.float() for name, t in checkpoint.tensors.items()})
    if checkpoint.alignment_heads is not None:
        model.set_alignment_heads(checkpoint.alignment_heads)
    return model.eval()


def bridged_model(checkpoint: Checkpoint, device: str = "auto") -> whisper.Whisper:
    """The stock decoder of `checkpoint` in float32, on the encoder that MAX computes."""
    checkpoint.require_decoder()
    # Without encoder blocks: the stock encoder is replaced before it has ever been used.
    model = whisper.Whisper(replace(checkpoint.dims, n_audio_layer=0))
    model.dims = checkpoint.dims
    model.decoder.load_state_dict(
        {
            name.removeprefix("decoder."): t.float()
            for name, t in checkpoint.tensors.items()
            if name.startswith("decoder.")
        }
    )
    if checkpoint.alignment_heads is not None:
        model.set_alignment_heads(checkpoint.alignment_heads)
    model.encoder = MaxAudioEncoder(Engine(checkpoint, device))
    return model.eval()


def load_model(
    name: str,
    device: str | torch.device | None = None,
    download_root: str | Path | None = None,
    in_memory: bool = False,
    *,
    offline: bool = False,
) -> whisper.Whisper:
    """`whisper.load_model` with the MAX encoder in the model: transcribe, decode, detect_language.

    name : a model name (tiny, tiny.en, ... turbo), `demo`, a Hugging Face repository id, or a path
    device : where the encoder runs: "cpu", "gpu" (or "cuda"), None or "auto" (the CPU); the decoder
        runs on the CPU
    download_root : the Hugging Face cache folder; None: huggingface-hub's own
    in_memory : accepted as in `whisper.load_model`; the weights are in memory in any case
    offline : never touch the network

    Pass `fp16=False` to `decode` (`transcribe` does so by itself on the CPU). Raises
    `weights.WeightsError` or `encoder.engine.EngineError`, one sentence each.
    """
    checkpoint = weights.load(
        str(name), offline=offline, cache_dir=Path(download_root) if download_root else None
    )
    kind = "auto" if device is None else str(device)
    return bridged_model(checkpoint, "gpu" if kind.startswith("cuda") else kind)
