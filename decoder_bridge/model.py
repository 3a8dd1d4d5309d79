"""`whisper.Whisper` as it is, and with parts of it computed by MAX; nothing else is touched.

It refuses a checkpoint without a decoder, and mel in any dtype but float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import whisper
from torch import Tensor, nn
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import MultiHeadAttention

import weights
from decoder_bridge.variants import VARIANTS, VariantError, reason_against
from weights import Checkpoint

# max, and whatever imports it, is imported where it is needed: the stock model goes without it.
if TYPE_CHECKING:
    from decoder_bridge.attention import Attention
    from decoder_bridge.engine import Decoder
    from encoder.engine import Engine


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


class MaxAttention(nn.Module):
    """`whisper.model.MultiHeadAttention` of an encoder's block, computed by the MAX engine.

    The stock projections hold the tensors, which MAX reads where they lie, and are never called.
    """

    def __init__(self, stock: MultiHeadAttention, engine: Attention):
        super().__init__()
        self.n_head = stock.n_head
        self.query, self.key, self.value, self.out = stock.query, stock.key, stock.value, stock.out
        self.engine = engine

    def forward(
        self, x: Tensor, xa: None = None, mask: None = None, kv_cache: None = None
    ) -> tuple[Tensor, None]:
        """
        x : torch.Tensor, shape = (batch_size, n_audio_ctx, n_audio_state), float32
        returns what is added to the residual, of the shape of x, and None for the scores, as the
        stock one does where it leaves them to PyTorch

        Another dtype is a RuntimeError, and what the encoder never gives a ValueError.
        """
        if xa is not None or mask is not None or kv_cache is not None:
            raise ValueError("the MAX attention takes no xa, no mask and no kv_cache")
        if x.dtype != torch.float32:
            raise RuntimeError(f"x is {x.dtype}, the MAX attention takes torch.float32: fp16=False")
        if len(x) == 0:
            return torch.empty_like(x), None
        return self.engine(x, dict(self.named_parameters())), None


class MaxWhisper(whisper.Whisper):
    """`whisper.Whisper` on MAX's encoder, whose `decode`, and so `transcribe`, asks MAX's decoder.

    The language is detected, and the times of words are found, by the stock decoder in PyTorch,
    whose tensors MAX's decoder is bound to; the token embedding in float16
    (`decoder_bridge.engine.with_half`). What products read MAX keeps a second time, in the order in
    which they read it (`encoder.kernels.packed`).
    """

    max_decoder: Decoder

    def decode(
        self, mel: Tensor, options: DecodingOptions | None = None, **kwargs: Any
    ) -> DecodingResult | list[DecodingResult]:
        """`whisper.decode`: mel (n_mels, 3000), or several of them, or the encoder's output.

        As there fp16 is True by default, and here that is a ValueError.
        """
        from decoder_bridge.decoding import decode

        return decode(self, self.max_decoder, mel, options or DecodingOptions(), **kwargs)


def stock_model(checkpoint: Checkpoint) -> whisper.Whisper:
    """The whole stock model, PyTorch float32 on the CPU, in evaluation mode: the reference."""
    checkpoint.require_decoder()
    model = whisper.Whisper(checkpoint.dims)
    model.load_state_dict({name: t.float() for name, t in checkpoint.tensors.items()})
    if checkpoint.alignment_heads is not None:
        model.set_alignment_heads(checkpoint.alignment_heads)
    return model.eval()


def attention_model(checkpoint: Checkpoint) -> whisper.Whisper:
    """The stock model in float32, with MAX for the attention of every block of its encoder."""
    from decoder_bridge.attention import Attention

    model = stock_model(checkpoint)
    engine = Attention(model.dims)
    for block in model.encoder.blocks:
        block.attn = MaxAttention(block.attn, engine)
    return model.eval()


Model = TypeVar("Model", bound=whisper.Whisper)


def with_max_encoder(kind: type[Model], checkpoint: Checkpoint, device: str) -> Model:
    """A model of this class: the stock decoder of `checkpoint`, and the encoder by MAX."""
    from encoder.engine import Engine

    checkpoint.require_decoder()
    # Without encoder blocks: the stock encoder is replaced before it has ever been used.
    model = kind(replace(checkpoint.dims, n_audio_layer=0))
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


def bridged_model(checkpoint: Checkpoint, device: str = "auto") -> whisper.Whisper:
    """The stock decoder of `checkpoint` in float32, on the encoder that MAX computes."""
    return with_max_encoder(whisper.Whisper, checkpoint, device)


def fast_model(checkpoint: Checkpoint, device: str = "auto") -> MaxWhisper:
    """Encoder and decoder by MAX, which is bound to the very tensors of the stock decoder."""
    from decoder_bridge.engine import Decoder

    model = with_max_encoder(MaxWhisper, checkpoint, device)
    shared = {f"decoder.{name}": t for name, t in model.decoder.state_dict().items()}
    model.max_decoder = Decoder(replace(checkpoint, tensors=shared), device)
    return model


def load_model(
    name: str,
    device: str | torch.device | None = None,
    download_root: str | Path | None = None,
    in_memory: bool = False,
    *,
    offline: bool = False,
    variant: str = "max",
) -> whisper.Whisper:
    """`whisper.load_model` with the MAX encoder in the model: transcribe, decode, detect_language.

    name : a model name (tiny, tiny.en, ... turbo), `demo`, a Hugging Face repository id, or a path
    device : where the encoder runs: "cpu", "gpu" (or "cuda"), None or "auto" (the CPU); the decoder
        runs on the CPU. Other variants run where their name says, and refuse another device
    download_root : the Hugging Face cache folder; None: huggingface-hub's own
    in_memory : accepted as in `whisper.load_model`; the weights are in memory in any case
    offline : never touch the network
    variant : what computes which part, one of `decoder_bridge.variants.VARIANTS`

    Pass `fp16=False` to `decode` (`transcribe` does so by itself on the CPU). Raises
    `weights.WeightsError`, `encoder.engine.EngineError` or `decoder_bridge.variants.VariantError`,
    one sentence each; the last one before anything is downloaded.
    """
    where = "auto" if device is None else str(device)
    where = "gpu" if where.startswith("cuda") else where
    if reason := reason_against(variant, where):
        raise VariantError(reason)
    checkpoint = weights.load(
        str(name), offline=offline, cache_dir=Path(download_root) if download_root else None
    )
    return VARIANTS[variant].load(checkpoint, where)
