"""A checkpoint as whisper.cpp's ggml file, and pywhispercpp, which runs it.

The format: https://github.com/ggml-org/whisper.cpp/blob/master/models/convert-pt-to-ggml.py
pywhispercpp binds whisper.cpp's `whisper_encode`, but nothing that gives what it computed: there is
no `encoder` here. Matrices are in float16, as whisper.cpp has them usually: with float32 ones the
wheel's convolution stops the process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from validation.peers import Heard, PeerError

if TYPE_CHECKING:
    from weights import Checkpoint

FILE = "ggml-model.bin"
MAGIC = 0x67676D6C  # "ggml"
FLOAT32, FLOAT16 = 0, 1  # ggml's codes of a tensor's type, and of a file's
SIZES = (  # of the header, in its order
    "n_vocab",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
    "n_mels",
)
ALWAYS_FLOAT32 = (
    "encoder.conv1.bias",
    "encoder.conv2.bias",
    "encoder.positional_embedding",
    "decoder.positional_embedding",
)


def write_ggml(checkpoint: Checkpoint, path: Path) -> None:
    """The whole model, with the mel filters and the tokens, at `path`. Raises PeerError where a
    value is beyond float16, WeightsError without a decoder."""
    from whisper.audio import mel_filters

    from validation.peers.vocabulary import encoding_of, plain_tokens

    checkpoint.require_decoder()
    dims = checkpoint.dims
    tokens = plain_tokens(encoding_of(dims))
    filters = mel_filters("cpu", dims.n_mels).numpy()
    with path.open("wb") as file:
        integers(file, MAGIC, *(getattr(dims, name) for name in SIZES))
        integers(file, FLOAT16, *filters.shape)
        file.write(filters.astype("<f4").tobytes())
        integers(file, len(tokens))
        for token in tokens:
            integers(file, len(token))
            file.write(token)
        for name, x in arrays(checkpoint):
            kind = FLOAT16 if x.dtype == np.float16 else FLOAT32
            encoded = name.encode()
            integers(file, x.ndim, len(encoded), kind, *reversed(x.shape))
            file.write(encoded)
            file.write(x.astype(x.dtype.newbyteorder("<")).tobytes())


def integers(file: BinaryIO, *values: int) -> None:
    """32 bits each, the lowest byte first."""
    file.write(struct.pack(f"<{len(values)}i", *values))


def arrays(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under OpenAI's names, which whisper.cpp has kept; a convolution's bias has a
    second axis of 1 there."""
    for name, tensor in checkpoint.tensors.items():
        x = tensor.float().numpy()
        if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
            x = x[:, None]
        if x.ndim > 1 and name not in ALWAYS_FLOAT32:
            with np.errstate(over="ignore"):
                x = x.astype(np.float16)
            if not np.isfinite(x).all():
                raise PeerError(f"{name} has values that float16 cannot hold")
        yield name, x


class WhisperCpp:
    """whisper.cpp on the CPU, through the functions that pywhispercpp binds."""

    def __init__(self, folder: Path, threads: int):
        import _pywhispercpp as cpp

        self._cpp, self._threads = cpp, threads
        parameters = cpp.whisper_context_default_params()
        parameters.use_gpu = False
        cpp.whisper_log_set(lambda *_: None)  # it would tell stderr of every buffer
        try:
            self._context = cpp.whisper_init_from_file_with_params(str(folder / FILE), parameters)
        finally:
            cpp.whisper_log_set(None)  # a function that is left there breaks the end of Python
        if self._context is None:
            raise PeerError("whisper.cpp cannot read the model that was written for it")

    def transcribe(self, audio: np.ndarray, language: str) -> Heard:
        """Greedy, at temperature 0 alone, window after window with the text before it."""
        cpp, context = self._cpp, self._context
        options: dict[str, Any] = {
            "n_threads": self._threads,
            "language": language,
            "temperature": 0.0,
            "temperature_inc": 0.0,  # no second try at a higher temperature
            "suppress_nst": True,  # the tokens that openai-whisper suppresses
            "print_progress": False,
            "print_timestamps": False,
        }
        parameters = cpp.whisper_full_default_params(
            cpp.whisper_sampling_strategy.WHISPER_SAMPLING_GREEDY
        )
        for name, value in options.items():
            setattr(parameters, name, value)
        if status := cpp.whisper_full(context, parameters, audio, audio.size):
            raise PeerError(f"whisper.cpp ended with status {status}")
        segments = range(cpp.whisper_full_n_segments(context))
        text = b"".join(cpp.whisper_full_get_segment_text(context, i) for i in segments)
        tokens = [
            cpp.whisper_full_get_token_id(context, i, k)
            for i in segments
            for k in range(cpp.whisper_full_n_tokens(context, i))
        ]
        return Heard(text.decode(errors="replace"), tokens)
