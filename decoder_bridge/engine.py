"""The compiled decoder with a checkpoint's weights and its caches; it chooses no token.

It computes on the CPU in float32, and refuses what the checkpoint or the caches do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from max.driver import Buffer
from torch import Tensor
from whisper.model import ModelDimensions

import decoder_bridge.graph
import encoder.graph
from decoder_bridge.graph import (
    DECODER,
    HALF,
    KEYS_VALUES,
    STEP,
    TOKEN_EMBEDDING,
    decoder_shapes,
    tap_names,
)
from encoder.engine import KINDS, Bound, EngineError, Kind, check_input, float32_weights, in_place
from weights import Checkpoint

SOURCES = (*encoder.graph.SOURCES, decoder_bridge.graph.__file__)
SIZES = ("n_vocab", "n_audio_ctx", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer")
KINDS |= {
    "decoder": Kind(decoder_bridge.graph.build, "the decoder", SOURCES, SIZES),
    "decoder-half": Kind(
        partial(decoder_bridge.graph.build, half=True), "the decoder", SOURCES, SIZES
    ),
    "decoder-taps": Kind(
        decoder_bridge.graph.build_tapped, "the decoder with taps", SOURCES, SIZES
    ),
}


def causal_mask(dims: ModelDimensions) -> Tensor:
    """`TextDecoder.mask`: (n_text_ctx, n_text_ctx), -inf above the diagonal, 0 elsewhere."""
    return torch.full((dims.n_text_ctx, dims.n_text_ctx), -torch.inf).triu_(1)


def decoder_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The decoder's tensors, checked, as the graphs bind them: "blocks.0.attn.key.weight", ..."""
    checkpoint.require_decoder()
    part = "decoder."
    tensors = {k.removeprefix(part): x for k, x in checkpoint.tensors.items() if k.startswith(part)}
    return float32_weights(tensors, decoder_shapes(checkpoint.dims), "decoder")


def with_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same and HALF, the token embedding in float16, if not one of its numbers is changed by
    that, as in every checkpoint that was published in float16; else `tensors` as they are."""
    table = tensors[TOKEN_EMBEDDING]
    half = table.half()
    return {**tensors, HALF: half} if torch.equal(half.float(), table) else tensors


def require_cpu(device: str) -> None:
    """Raise EngineError where the decoder is wanted elsewhere."""
    if device == "gpu":
        raise EngineError(
            "device gpu was asked for and the MAX decoder runs on the CPU alone; use --device cpu"
        )


def check_tokens(tokens: Tensor, sequences: int, dims: ModelDimensions, begun: int = 0) -> int:
    """The number of tokens in each sequence, where they are (sequences, 1 or more) int64 of the
    vocabulary on the CPU, and n_text_ctx or fewer with the `begun` ones; else ValueError."""
    if tokens.ndim != 2 or len(tokens) != sequences or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}, expected ({sequences}, 1 or more)"
        )
    if tokens.dtype != torch.int64 or tokens.device.type != "cpu":
        raise ValueError(
            f"tokens are {tokens.dtype} on {tokens.device}, expected torch.int64 on cpu"
        )
    least, most = (int(x) for x in tokens.aminmax())
    if least < 0 or most >= dims.n_vocab:
        wrong = least if least < 0 else most
        raise ValueError(f"token {wrong} is none of the {dims.n_vocab} of this model")
    if begun + tokens.shape[1] > dims.n_text_ctx:
        raise ValueError(
            f"{begun} + {tokens.shape[1]} tokens are more than the decoder's {dims.n_text_ctx}"
        )
    return tokens.shape[1]


class Cache:
    """What a decoder knows of some windows of audio: the keys and values of cross attention, and
    those of self attention for the tokens so far, n_group sequences for each window.

    The graphs write to its memory in place. It is of use to the decoder that made it.
    """

    def __init__(self, dims: ModelDimensions, cross: list[Tensor]):
        self.n_audio, self.n_group = len(cross[0]), 1
        self.length = 0  # tokens so far, of each sequence
        self._dims = dims
        self._cross, self._cross_buffers = cross, [in_place(x) for x in cross]
        self._shared = 0  # as many tokens at the beginning are the same in all beams of a window
        self._allocate(1)

    def _allocate(self, n_group: int) -> None:
        """Memory for all keys and values, which is read only where it has been written."""
        dims, self.n_group = self._dims, n_group
        shape = (2 * dims.n_text_layer, self.n_audio * n_group, dims.n_text_ctx, dims.n_text_state)
        self._own = torch.empty(shape)
        grouped = self._own.view(shape[0], self.n_audio, n_group, *shape[2:])
        self._own_buffers = [in_place(x) for x in grouped]

    @property
    def buffers(self) -> list[Buffer]:
        """The last inputs of the decoder's graphs: cross attention's, then self attention's."""
        return self._cross_buffers + self._own_buffers

    def spread(self, n_group: int) -> None:
        """Go on with `n_group` sequences for each window, which begin with the tokens so far."""
        if self.n_group != 1:
            raise ValueError(f"the windows are spread already, over {self.n_group} sequences each")
        if n_group == 1:
            return
        begun = self._own[:, :, : self.length]
        self._allocate(n_group)
        self._own[:, :, : self.length] = begun.repeat_interleave(n_group, dim=1)
        self._shared = self.length

    def rearrange(self, source_indices: Sequence[int]) -> None:
        """Sequence i becomes what `source_indices[i]`, a beam of the same window, was."""
        if len(source_indices) != self._own.shape[1]:
            raise ValueError(
                f"{len(source_indices)} sources are given for {self._own.shape[1]} sequences"
            )
        if [i // self.n_group for i in source_indices] != [
            i // self.n_group for i in range(len(source_indices))
        ]:
            raise ValueError(f"a beam cannot go on in another window: {list(source_indices)}")
        changed = [i for i, source in enumerate(source_indices) if i != source]
        sources = [source_indices[i] for i in changed]
        own = self._own[:, :, self._shared : self.length]  # the beginning is the same in all
        own[:, changed] = own[:, sources]


class Decoder(Bound):
    """The compiled decoder: `start(features)` -> a cache, `logits(cache, tokens)` as it grows.

    The token embedding, most of what is read for a token, it holds in float16 where that is the
    same numbers.

    Raises `EngineError` where MAX cannot do it, `weights.WeightsError` where the checkpoint has no
    decoder; compiles (minutes, once) where no artifact is kept.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto"):
        require_cpu(device)
        tensors = with_half(decoder_weights(checkpoint))
        self.half = HALF in tensors
        if self.half:
            del tensors[TOKEN_EMBEDDING]
        kind = "decoder-half" if self.half else "decoder"
        super().__init__(kind, checkpoint.dims, device, tensors)
        self._mask = causal_mask(self.dims)

    def start(self, features: Tensor) -> Cache:
        """features (n_audio, n_audio_ctx, n_audio_state) float32: the encoder's output.

        Raises ValueError on another shape, dtype or device.
        """
        expected = (self.dims.n_audio_ctx, self.dims.n_text_state)
        features = check_input("audio_features", features, expected)
        return Cache(self.dims, self._execute(features, graph=KEYS_VALUES))

    def logits(self, cache: Cache, tokens: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """tokens (n_audio * n_group, T) int64, the next T of each sequence -> their logits.

        rows : the tokens whose logits are wanted, 0 <= row < T; None: all of them
        returns (n_audio * n_group, T or len(rows), n_vocab) float32, memory of its own; the cache
        has grown by T. Raises ValueError on tokens or rows that do not fit, and where there would
        be more than n_text_ctx tokens.
        """
        n_new = check_tokens(tokens, cache.n_audio * cache.n_group, self.dims, cache.length)
        rows = range(n_new) if rows is None else rows
        if not rows or min(rows) < 0 or max(rows) >= n_new:
            raise ValueError(f"rows {list(rows)} are asked for, expected some of 0 .. {n_new - 1}")
        length = cache.length + n_new
        grouped = tokens.reshape(cache.n_audio, cache.n_group, n_new).contiguous()
        mask = self._mask[cache.length : length, :length].contiguous()
        if tokens.numel() == 1:
            (answer,) = self._execute(grouped, mask, *cache.buffers, graph=STEP)
            answer = answer if len(rows) == 1 else answer[:, list(rows)]
        else:
            wanted = torch.tensor(list(rows))
            (answer,) = self._execute(grouped, mask, wanted, *cache.buffers, graph=DECODER)
        cache.length = length
        return answer

    def __call__(self, tokens: Tensor, features: Tensor) -> Tensor:
        """`TextDecoder.forward`: tokens (n_audio, T), features as for `start` -> logits
        (n_audio, T, n_vocab), all tokens at once."""
        return self.logits(self.start(features), tokens)


class TappedDecoder(Bound):
    """The same network from the same builder on all tokens at once, every tap an output.

    The compiler fuses less of it: compare its `logits` with `Decoder` before believing its taps.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto"):
        require_cpu(device)
        super().__init__("decoder-taps", checkpoint.dims, device, decoder_weights(checkpoint))
        self._mask = causal_mask(self.dims)
        self._names = tap_names(self.dims)

    def __call__(self, tokens: Tensor, features: Tensor) -> dict[str, Tensor]:
        """tokens (batch, T) int64, features (batch, n_audio_ctx, n_audio_state) float32 -> every
        tap by name, in order of computation. Raises ValueError on other tokens or features."""
        expected = (self.dims.n_audio_ctx, self.dims.n_text_state)
        features = check_input("audio_features", features, expected)
        n_ctx = check_tokens(tokens, len(features), self.dims)
        mask = self._mask[:n_ctx, :n_ctx].contiguous()
        outputs = self._execute(features, tokens[:, None].contiguous(), mask)
        return dict(zip(self._names, outputs, strict=True))
