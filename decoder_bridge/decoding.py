"""openai-whisper's decoding rules on the MAX decoder; all rules are inherited, none is written.

`Inference` is what whisper's search asks for logits, `DecodingTask` what asks it. Word timestamps
need the weights of cross attention, which `whisper.timing` takes from the stock decoder by hooks:
they are not computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import whisper
from torch import Tensor
from whisper.decoding import (
    BeamSearchDecoder,
    DecodingOptions,
    DecodingResult,
    DecodingTask,
    Inference,
)

from decoder_bridge.engine import Cache, Decoder


class MaxInference(Inference):
    """Logits from the MAX decoder, with a cache that lives from the first call to the cleanup.

    n_group : sequences that are searched for each window, beams or samples
    first : the tokens whose logits the first call answers for; later ones answer for the last token
    """

    def __init__(self, decoder: Decoder, n_group: int, first: tuple[int, ...]):
        self.decoder, self.n_group, self.first = decoder, n_group, first
        self.cache: Cache | None = None

    def logits(self, tokens: Tensor, audio_features: Tensor) -> Tensor:
        """tokens (n_audio * n_group, T), all of them so far; audio_features of as many rows.

        returns (n_audio * n_group, len(first) or 1, n_vocab). In the first call the sequences of a
        window are one and the same, so it is computed once and then copied.
        """
        if self.cache is not None:
            return self.decoder.logits(self.cache, tokens[:, -1:])
        cache = self.decoder.start(audio_features[:: self.n_group])
        logits = self.decoder.logits(cache, tokens[:: self.n_group], self.first)
        cache.spread(self.n_group)
        self.cache = cache
        return logits.repeat_interleave(self.n_group, dim=0)

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        """Sequence i goes on with what sequence `source_indices[i]` has read."""
        assert self.cache is not None, "no sequence has begun"
        self.cache.rearrange(source_indices)

    def cleanup_caching(self) -> None:
        """Forget the windows."""
        self.cache = None


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch on one thread, and then on as many as before.

    After an operation on several threads PyTorch's workers keep their cores busy for a while, and
    MAX, which wants all cores in every kernel, waits for them, step by step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class MaxDecodingTask(DecodingTask):
    """`whisper.decoding.DecodingTask` whose logits come from the MAX decoder.

    model : has the encoder and the sizes; its decoder is used for detecting the language alone
    options : with fp16=False; else ValueError

    Several windows can be searched with several sequences each, which the stock task cannot.
    """

    sot_index: int

    def __init__(self, model: whisper.Whisper, decoder: Decoder, options: DecodingOptions):
        if options.fp16:
            raise ValueError("the MAX decoder computes in float32: pass fp16=False")
        super().__init__(model, options)
        if options.task == "lang_id":
            self.n_group = 1  # nothing is searched
        first = (self.sot_index, self.sample_begin - 1)
        self.inference = MaxInference(decoder, self.n_group, first)
        if isinstance(self.decoder, BeamSearchDecoder):
            self.decoder.inference = self.inference

    def _get_audio_features(self, mel: Tensor) -> Tensor:
        """A row for each sequence: the stock `run` takes every n_group-th of them at its end."""
        features = super()._get_audio_features(mel)
        if isinstance(features, TypeError):
            raise features  # the stock method returns it
        return features[:, None].expand(-1, self.n_group, -1, -1).flatten(0, 1)

    def _detect_language(self, audio_features: Tensor, tokens: Tensor) -> Any:
        return super()._detect_language(audio_features[:: self.n_group], tokens)

    def _main_loop(self, audio_features: Tensor, tokens: Tensor) -> Any:
        """The stock loop, for which the logits of sot, where it finds the probability of no speech,
        are row 0: the first answer holds two rows, sot's and the last one's."""
        sot_index, self.sot_index = self.sot_index, 0
        try:
            with one_torch_thread():
                return super()._main_loop(audio_features, tokens)
        finally:
            self.sot_index = sot_index


@torch.no_grad()
def decode(
    model: whisper.Whisper,
    decoder: Decoder,
    mel: Tensor,
    options: DecodingOptions | None = None,
    **kwargs: Any,
) -> DecodingResult | list[DecodingResult]:
    """`whisper.decode` on the MAX decoder: mel (n_mels, 3000), or several of them, or features.

    Options as in `whisper.decode`, but that fp16=True is a ValueError.
    """
    single = mel.ndim == 2
    options = replace(options or DecodingOptions(fp16=False), **kwargs)
    results = MaxDecodingTask(model, decoder, options).run(mel[None] if single else mel)
    return results[0] if single else results
