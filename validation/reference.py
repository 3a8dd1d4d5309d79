"""The reference encoders: stock openai-whisper in float32, and its float64 twin (noise floor).

Neither is ever replaced by anything else: what cannot be loaded raises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from whisper.model import AudioEncoder, LayerNorm, disable_sdpa

from weights import Checkpoint


def stock_encoder(checkpoint: Checkpoint) -> AudioEncoder:
    """`whisper.model.AudioEncoder` with the checkpoint's weights, PyTorch float32 on the CPU."""
    d = checkpoint.dims
    module = AudioEncoder(d.n_mels, d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
    module.load_state_dict({name: t.float() for name, t in checkpoint.encoder_tensors().items()})
    return module.eval()


def float64_encoder(checkpoint: Checkpoint) -> AudioEncoder:
    """The same module in float64 throughout; Whisper's LayerNorm, which casts to float32, is
    replaced by the plain one it is derived from."""
    module = stock_encoder(checkpoint).double()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LayerNorm):
                plain = nn.LayerNorm(child.normalized_shape, child.eps, dtype=torch.float64)
                plain.load_state_dict(child.state_dict())
                setattr(parent, name, plain)
    return module


def run_eager(module: AudioEncoder, mel: Tensor) -> Tensor:
    """mel (B, n_mels, frames) -> features, window by window, attention written out."""
    with torch.no_grad(), disable_sdpa():
        return torch.cat([module(window[None]) for window in mel])


def run_float64(module: AudioEncoder, mel: Tensor) -> Tensor:
    """mel -> features in float64. Through PyTorch's fused attention: the eager one of Whisper
    rounds the scores to float32."""
    with torch.no_grad():
        return torch.cat([module(window[None].double()) for window in mel])
