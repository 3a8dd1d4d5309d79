"""What a text loses by other features: the stock decoder on the features of all recordings at once,
compared with what it says of the reference's. Each recording is one window, decoded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import whisper
from torch import Tensor
from whisper.audio import HOP_LENGTH
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from encoder.audio import windows
from validation.faults import Fault
from validation.faults.bridge import segments_of, transcribed
from validation.recordings import Recording, joined
from validation.semantic import (
    FeaturesError,
    TextError,
    coverage,
    kl_divergence,
    knows_timestamps,
    text_error,
    tokenizer_of,
    with_encoder,
)

FORCED = ("kl_mean", "kl_max", "same_top1")
SAID = (
    "tokens",
    "reference_tokens",
    "tokens_identical",
    "first_difference",
    "first_difference_tokens",
    "wer",
    "wer_truth",
    "wer_truth_reference",
    "lost",
    "invented",
    "text",
    "reference_text",
)
# What there is without a transcript. `cut_off`: the decoding did not come to an end by itself.
NO_TRANSCRIPT: dict[str, Any] = {
    "failed": None,
    "cut_off": False,
    "reference_cut_off": False,
    **dict.fromkeys((*FORCED, *SAID)),
}


@dataclass(frozen=True)
class Heard:
    """One side's text; `tokens` with timestamps where they are decoded; `segments` have start, end
    (s) and text."""

    text: str
    tokens: list[int]
    segments: list[dict[str, Any]]

    @classmethod
    def of(cls, transcript: Mapping[str, Any]) -> Heard:
        """What `whisper.transcribe` returns."""
        segments = transcript["segments"]
        return cls(transcript["text"], [t for s in segments for t in s["tokens"]], segments)


NOTHING = Heard("", [], [])


def counted(found: TextError) -> dict[str, Any]:
    return {
        name: getattr(found, name)
        for name in ("wer", "substitutions", "deletions", "insertions", "words")
    }


def options_for(model: whisper.Whisper) -> DecodingOptions:
    """Greedy, with timestamps where the checkpoint knows them."""
    return DecodingOptions(
        language=None if model.is_multilingual else "en",
        without_timestamps=not knows_timestamps(model),
        fp16=False,
    )


def comes_to_an_end(model: whisper.Whisper, recording: Recording) -> bool:
    """Whether the text of the recording, one window, ends before the most tokens it may have."""
    options = options_for(model)
    mel = windows(recording.audio, model.dims.n_mels)[0]
    (result,) = whisper.decode(model, mel[None], options)
    task = DecodingTask(model, replace(options, language=result.language))
    return len(result.tokens) < task.sample_len


class Transcripts:
    """The reference's texts of `recordings`, and what other features make of them.

    model     the stock model; it is not changed
    features  the reference's, one (1, n_audio_ctx, n_audio_state) for each recording
    A checkpoint that does not know timestamps is decoded without them. Raises ValueError where the
    reference's logits are not finite.
    """

    def __init__(
        self, model: whisper.Whisper, recordings: Sequence[Recording], features: Sequence[Tensor]
    ):
        self.model, self.recordings = model, recordings
        self.timestamps = knows_timestamps(model)
        self.normalize = (BasicTextNormalizer if model.is_multilingual else EnglishTextNormalizer)()
        self.options = options_for(model)
        self.features = torch.cat(list(features))
        self.results = self._decode(self.features)
        self.heard = [self._heard(i, result) for i, result in enumerate(self.results)]
        self.tasks = [
            DecodingTask(model, replace(self.options, language=result.language))
            for result in self.results
        ]
        self.logits = [self._logits(i, x[None]) for i, x in enumerate(self.features)]
        for recording, logits in zip(recordings, self.logits, strict=True):
            if not bool(torch.isfinite(logits).all()):
                raise ValueError(f"{recording.name}: the reference's logits are not finite")
        self._joined: dict[int, tuple[Recording, Mapping[str, Any]]] = {}

    def _decode(self, features: Tensor) -> list[DecodingResult]:
        return whisper.decode(self.model, features, self.options)

    def _heard(self, i: int, result: DecodingResult) -> Heard:
        tokenizer = tokenizer_of(self.model, result.language)
        segments = segments_of(result.tokens, tokenizer, self.recordings[i].seconds)
        return Heard(result.text, result.tokens, segments)

    def _logits(self, i: int, features: Tensor) -> Tensor:
        """Teacher forcing on what the reference said of recording `i`: a row of logits for each
        generated token, the end of the text with them unless it was cut off."""
        task, tokens = self.tasks[i], self.results[i].tokens
        forced = tokens if len(tokens) == task.sample_len else [*tokens, task.tokenizer.eot]
        before = torch.tensor([[*task.initial_tokens, *forced[:-1]]])
        with torch.no_grad():
            return self.model.logits(before, features)[0, len(task.initial_tokens) - 1 :]

    def _forced(self, i: int, features: Tensor) -> dict[str, float]:
        logits = self._logits(i, features)
        kl = kl_divergence(self.logits[i], logits)
        if not bool(torch.isfinite(kl).all()):
            largest = float(features.abs().max())
            raise FeaturesError(
                f"features of up to {largest:.3g} make the decoder's logits not finite"
            )
        same = self.logits[i].argmax(-1) == logits.argmax(-1)
        return {
            "kl_mean": float(kl.mean()),
            "kl_max": float(kl.max()),
            "same_top1": float(same.double().mean()),
        }

    def _said(
        self, ours: Heard, theirs: Heard | None, recording: Recording, timestamps: bool
    ) -> dict[str, Any]:
        """Two texts of one recording; `theirs` None: there is none, and nothing was heard."""
        other = theirs or NOTHING
        pairs = list(zip_longest(ours.tokens, other.tokens))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        frames = len(recording.audio) // HOP_LENGTH
        covered = coverage(ours.segments, other.segments, frames) if timestamps else None
        truth = recording.text
        # The same tokens can be looked up in another table; `whisper.decode` strips its text.
        same_text = ours.text.strip() == other.text.strip()
        return {
            "tokens": len(other.tokens),
            "reference_tokens": len(ours.tokens),
            "tokens_identical": theirs is not None and first is None and same_text,
            "first_difference": first,
            "first_difference_tokens": None
            if first is None
            else [None if token is None else self._spelt(token) for token in pairs[first]],
            "wer": counted(text_error(other.text, ours.text, self.normalize)),
            "wer_truth": None
            if truth is None
            else counted(text_error(other.text, truth, self.normalize)),
            "wer_truth_reference": None
            if truth is None
            else text_error(ours.text, truth, self.normalize).wer,
            "lost": covered.lost if covered else None,
            "invented": covered.invented if covered else None,
            "text": other.text,
            "reference_text": ours.text,
        }

    def _spelt(self, token: int) -> str:
        return tokenizer_of(self.model, "en").decode_with_timestamps([token])

    def _unended(self, i: int, result: DecodingResult) -> bool:
        return len(result.tokens) == self.tasks[i].sample_len

    def of(self, features: Sequence[Tensor | None]) -> list[dict[str, Any]]:
        """The transcript's part of the rows for features of all recordings, (1, n_audio_ctx,
        n_audio_state) and finite, or None where an encoder gave none: that of NO_TRANSCRIPT.

        They are decoded as one batch, always of the same size: the reference's features stand in
        for what is missing, and what is said of them is not looked at.
        """
        batch = [self.features[i][None] if x is None else x for i, x in enumerate(features)]
        results = self._decode(torch.cat(batch))
        found = []
        for i, (x, result) in enumerate(zip(features, results, strict=True)):
            row: dict[str, Any] = dict(NO_TRANSCRIPT)
            row["reference_cut_off"] = self._unended(i, self.results[i])
            theirs = None
            if x is not None:
                try:
                    row |= self._forced(i, x)
                    if not math.isfinite(result.avg_logprob):
                        raise FeaturesError("the decoder's probabilities are not finite")
                    theirs = self._heard(i, result)
                    row["cut_off"] = self._unended(i, result)
                except FeaturesError as error:
                    row["failed"] = str(error)
            recording = self.recordings[i]
            found.append(row | self._said(self.heard[i], theirs, recording, self.timestamps))
        return found

    def across_windows(self, fault: Fault) -> list[dict[str, Any]]:
        """The same for a fault of the bridge: on each recording and those after it, end to end;
        and `injected`."""
        options = {
            "temperature": 0.0,
            "fp16": False,
            "without_timestamps": not self.timestamps,
        }
        found = []
        for i in range(len(self.recordings)):
            if i not in self._joined:
                recording = joined(self.recordings, i)
                stock = with_encoder(self.model, self.model.encoder)
                self._joined[i] = recording, transcribed(stock, recording.audio, options)
            recording, said = self._joined[i]
            right = Heard.of(said)
            row: dict[str, Any] = dict(NO_TRANSCRIPT)
            row["reference_cut_off"] = said["cut_off"]
            made: dict[str, Any] = {}
            theirs = None
            try:
                made = fault.transcribe(self.model, recording.audio, dict(options))
                theirs = Heard.of(made)
            except FeaturesError as error:
                row["failed"] = str(error)
            row |= {"injected": made.get("injected", True), "cut_off": made.get("cut_off", False)}
            found.append(row | self._said(right, theirs, recording, self.timestamps))
        return found
