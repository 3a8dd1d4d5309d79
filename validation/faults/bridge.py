"""Mistakes made after a right encoder: in how its features become a text. No tap shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import whisper
from torch import Tensor, nn
from whisper.audio import (
    CHUNK_LENGTH,
    N_FRAMES,
    N_SAMPLES,
    SAMPLE_RATE,
    log_mel_spectrogram,
    pad_or_trim,
)
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.tokenizer import Tokenizer, get_encoding

from validation.faults.fault import EARLIER_PORT, UNRECORDED, Fault
from validation.faults.input import SAME, scaled, unfloored
from validation.semantic import tokenizer_of, with_encoder

Options = dict[str, Any]  # of `whisper.transcribe`: temperature, fp16, without_timestamps
Transcript = dict[str, Any]  # text, segments; "cut_off" and "injected", as `Fault` says
Transcribe = Callable[[whisper.Whisper, np.ndarray, Options], Transcript]

OVERLAP = 5  # seconds
MOST_WINDOWS = 20  # of a minute of sound; a text whose times hardly advance asks for thousands
SECONDS_A_TIMESTAMP = 0.02
ENGLISH, MULTILINGUAL = 51864, 51865  # rows of the token embedding


def segments_of(
    tokens: Sequence[int], tokenizer: Tokenizer, end: float, start: float = 0.0
) -> list[dict[str, Any]]:
    """The segments of one decoded window, that begins at `start` and holds sound up to `end` (s):
    text between two timestamps; what none follows lasts to the end."""
    found: list[dict[str, Any]] = []
    since, all_of_it, words = start, list[int](), list[int]()

    def close(until: float) -> None:
        text = tokenizer.decode(words)
        found.append({"start": since, "end": until, "text": text, "tokens": all_of_it})

    for token in tokens:
        all_of_it.append(token)
        if token < tokenizer.timestamp_begin:
            words.append(token)
            continue
        time = start + (token - tokenizer.timestamp_begin) * SECONDS_A_TIMESTAMP
        if words:
            close(time)
            all_of_it, words = [], []
        since = time
    if words:
        close(max(since, end))
    return found


def one_window(
    model: whisper.Whisper, audio: np.ndarray, options: Options, **changed: Any
) -> DecodingResult:
    """`whisper.decode` of the first 30 s, padded with silence if there are fewer."""
    mel = log_mel_spectrogram(pad_or_trim(audio), model.dims.n_mels)
    language = None if model.is_multilingual else "en"
    return whisper.decode(
        model, mel, DecodingOptions(**{"language": language, **options, **changed})
    )


def one_decode(
    model: whisper.Whisper, audio: np.ndarray, options: Options, **changed: Any
) -> Transcript:
    result = one_window(model, audio, options, **changed)
    end = min(len(audio) / SAMPLE_RATE, float(CHUNK_LENGTH))
    segments = segments_of(result.tokens, tokenizer_of(model, result.language), end)
    return {"text": result.text, "segments": [{**s, "seek": 0} for s in segments]}


def with_beams(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    return one_decode(model, audio, options, beam_size=5)


def unsuppressed(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    return one_decode(model, audio, options, suppress_tokens="", suppress_blank=False)


class Limited:
    """`whisper.decode` of MOST_WINDOWS windows. After them it hears nothing, and is sure of it, so
    that `whisper.transcribe` goes on by whole windows to the end, with what was said before."""

    def __init__(self, model: whisper.Whisper):
        self.model = model
        self.windows = 0

    @property
    def cut_off(self) -> bool:
        return self.windows > MOST_WINDOWS

    def __call__(self, mel: Tensor, options: DecodingOptions) -> DecodingResult:
        self.windows += 1
        if not self.cut_off:
            return whisper.decode(self.model, mel, options)
        nothing = mel.new_empty(0)
        return DecodingResult(nothing, options.language, avg_logprob=-math.inf, no_speech_prob=1.0)


def transcribed(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    """`whisper.transcribe` by a model that is the caller's own, for MOST_WINDOWS windows."""
    model.decode = limited = Limited(model)
    found = model.transcribe(audio, **options)
    return {**found, "cut_off": limited.cut_off}


class FirstWindow(nn.Module):
    """An encoder that gives the features of its first window for every window."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.first: Tensor | None = None

    def forward(self, mel: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.encoder(mel)
        return self.first


def first_window_again(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    return transcribed(with_encoder(model, FirstWindow(model.encoder)), audio, options)


class FloorOfWindow(nn.Module):
    """An encoder of the windows of one recording, whose log-mel it gives another floor: 8 below the
    loudest bin of the window, not of the file. What that does not change keeps its bits."""

    def __init__(self, encoder: nn.Module, audio: np.ndarray, n_mels: int):
        super().__init__()
        self.encoder = encoder
        mel = log_mel_spectrogram(audio, n_mels, padding=N_SAMPLES)  # as whisper.transcribe does
        self.mel = mel[:, : mel.shape[1] - N_FRAMES]
        self.log = unfloored(audio, n_mels)[:, : self.mel.shape[1]]
        self.right = scaled(self.log)
        self.start = 0
        self.changed = False

    def find(self, window: Tensor) -> int:
        """The frame that the window (n_mels, N_FRAMES) begins at: windows never go back."""
        same = (self.mel[:, self.start :] == window[:, :1]).all(0)
        for start in (same.nonzero().flatten() + self.start).tolist():
            there = self.mel[:, start : start + N_FRAMES]
            if torch.equal(window[:, : there.shape[1]], there):
                return start
        raise ValueError("the window is none of this recording")

    def forward(self, mel: Tensor) -> Tensor:
        self.start = self.find(mel[0])
        part = slice(self.start, self.start + N_FRAMES)
        found = scaled(self.log[:, part])
        same = np.abs(found - self.right[:, part]) <= SAME
        self.changed = self.changed or not same.all()
        right = self.mel[:, part]
        wrong = torch.where(torch.from_numpy(same), right, torch.from_numpy(found).float())
        return self.encoder(pad_or_trim(wrong, N_FRAMES)[None])


def floor_of_window(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    encoder = FloorOfWindow(model.encoder, audio, model.dims.n_mels)
    found = transcribed(with_encoder(model, encoder), audio, options)
    return {**found, "injected": encoder.changed}


def merged(text: str, more: str) -> str:
    """`more` without its longest beginning that is the end of `text`, character by character; with
    a space between them where there is none."""
    longest = min(len(text), len(more))
    same = next((n for n in range(longest, 0, -1) if text.endswith(more[:n])), 0)
    return text + more[same:] if same else f"{text} {more}".strip()


def overlapping(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    step = N_SAMPLES - OVERLAP * SAMPLE_RATE
    last = max(1, len(audio) - OVERLAP * SAMPLE_RATE)
    text, segments = "", list[dict[str, Any]]()
    for start in range(0, last, step):
        piece = audio[start : start + N_SAMPLES]
        result = one_window(model, piece, options)
        begin = start / SAMPLE_RATE
        tokenizer = tokenizer_of(model, result.language)
        segments += segments_of(result.tokens, tokenizer, begin + len(piece) / SAMPLE_RATE, begin)
        text = merged(text, result.text)
    return {"text": text, "segments": segments}


def other_special_tokens(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    """Stock takes an embedding's rows for the sign of an English or a multilingual checkpoint, and
    from it start sequence and ids: here of the other one, everything else as it is."""
    rows = ENGLISH if model.is_multilingual else MULTILINGUAL
    other = with_encoder(model, model.encoder)
    other.dims = replace(model.dims, n_vocab=rows)
    return transcribed(other, audio, {"language": "en", **options})


def other_tokenizer(model: whisper.Whisper, audio: np.ndarray, options: Options) -> Transcript:
    """The tokens are right, their bytes are looked up in the other of Whisper's two tables."""
    right = transcribed(with_encoder(model, model.encoder), audio, options)
    end_of_text = tokenizer_of(model, right["language"]).eot
    table = get_encoding("gpt2" if model.is_multilingual else "multilingual")

    def text(tokens: Sequence[int]) -> str:
        return table.decode([token for token in tokens if token < end_of_text])

    segments = [{**s, "text": text(s["tokens"])} for s in right["segments"]]
    text_of_all = "".join(s["text"] for s in segments)
    return {"text": text_of_all, "segments": segments, "cut_off": right["cut_off"]}


def fault(id: str, sentence: str, transcribe: Transcribe, seen: str = EARLIER_PORT) -> Fault:
    return Fault(
        id=id,
        group="bridge",
        sentence=sentence,
        seen=seen,
        first_tap="",
        cause=None,
        how="bridge",
        transcribe=transcribe,
    )


FAULTS = [
    fault(
        "E07-window",
        "The log's floor is 8 below the loudest bin of each window, not of the file.",
        floor_of_window,
        UNRECORDED,
    ),
    fault("S30", "The first window's features are used for every window.", first_window_again),
    fault(
        "S31",
        "One decode() of 30 s is taken for the whole recording: what it loses is what is said "
        "later, a figure of the recording's length.",
        one_decode,
    ),
    fault(
        "S32",
        "One decode() of 30 s is taken for the whole, with a beam of 5 to help: it contains S31, "
        "and what is said after 30 s is lost in it too.",
        with_beams,
    ),
    fault(
        "S33",
        "One decode() of 30 s is taken for the whole, with no token suppressed to help: it "
        "contains S31, and what is said after 30 s is lost in it too.",
        unsuppressed,
    ),
    fault(
        "S34",
        "Windows of 30 s that overlap by 5 s are merged where their characters are equal.",
        overlapping,
    ),
    fault(
        "S35",
        "Start sequence and special tokens are the multilingual ones for an English checkpoint, or "
        "the reverse.",
        other_special_tokens,
    ),
    fault("S36", "The tokens are decoded with the other GPT-2 table.", other_tokenizer),
]
