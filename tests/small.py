"""A random encoder small enough to run in milliseconds: 2 layers of 128, 20 frames."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from whisper.model import ModelDimensions

from weights import Checkpoint, Source, expected_shapes

N_AUDIO_CTX = 20


def small_checkpoint(seed: int = 1, n_audio_layer: int = 2) -> Checkpoint:
    """Random weights of a size that keeps the activations near 1; the encoder alone."""
    dims = ModelDimensions(80, N_AUDIO_CTX, 128, 2, n_audio_layer, 0, 0, 0, 0, 0)
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if name.endswith(("ln.weight", "ln_post.weight")):
            return 1 + 0.1 * x
        if name.endswith(".bias"):
            return 0.1 * x
        return x / shape[1:].numel() ** 0.5 if name.endswith(".weight") else x

    shapes = expected_shapes(dims, decoder=False)
    tensors = {name: tensor(name, torch.Size(shape)) for name, shape in shapes.items()}
    source = Source(f"/folder/small-{seed}.safetensors", None, f"{seed:064x}", Path("small"))
    return Checkpoint(dims, tensors, source, None)


def small_mel(seed: int = 2) -> Tensor:
    """(1, 80, 40) float32."""
    return torch.randn((1, 80, 2 * N_AUDIO_CTX), generator=torch.Generator().manual_seed(seed))
