"""A recording cut at its pauses into windows that do not depend on each other, decoded together.

The rules are `whisper.transcribe`'s for clips that are decoded without the text before them. It
refuses the options that need the window before, or a part of the recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import whisper
from scipy.ndimage import uniform_filter1d
from torch import Tensor
from tqdm import tqdm
from whisper.audio import (
    FRAMES_PER_SECOND,
    HOP_LENGTH,
    N_FRAMES,
    N_SAMPLES,
    SAMPLE_RATE,
    log_mel_spectrogram,
    pad_or_trim,
)
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.tokenizer import LANGUAGES, Tokenizer, get_tokenizer
from whisper.utils import format_timestamp, make_safe

if TYPE_CHECKING:
    from encoder.truth import WordErrors

Segment = dict[str, Any]  # of whisper's result

# Options of `whisper.transcribe` that need what a batch does not have, and how they are left out.
WITHOUT: dict[str, Any] = {
    "word_timestamps": False,
    "condition_on_previous_text": False,
    "initial_prompt": None,
    "carry_initial_prompt": False,
    "clip_timestamps": "0",
    "hallucination_silence_threshold": None,
}

INDEPENDENT = "its windows are decoded without the text before them"
REASON = {
    "word_timestamps": "the times of words are found from one window to the next",
    "condition_on_previous_text": INDEPENDENT,
    "initial_prompt": INDEPENDENT,
    "carry_initial_prompt": INDEPENDENT,
    "clip_timestamps": "it cuts the whole recording by itself",
    "hallucination_silence_threshold": "it needs word_timestamps",
}

EARLIEST = N_FRAMES * 2 // 3  # a window ends in its last third
PAUSE = 20  # frames, 0.2 s: shorter ones are within words
LONG = FRAMES_PER_SECOND  # pauses beyond 1 s are as good as that
SMOOTH = 5  # frames, 50 ms
QUIET = 0.25  # of the way from the quietest to the loudest of what is looked at


def bounds(mel: Tensor) -> list[int]:
    """Where the windows of a recording begin and end: 0, ..., its last frame.

    mel : (n_mels, frames), log-mel of the recording without any padding

    A window that would be longer than 30 s is cut in the middle of the longest pause of its last
    third; in pauses beyond 1 s, half a second before what follows, since Whisper wants the first
    word of a window in its first second. Where there is no pause it is cut at the quietest frame.
    """
    frames = mel.shape[1]
    if frames == 0:
        return [0]
    # The mean of the logarithms: a hum fills a few bins, and a soft fricative many.
    loudness = uniform_filter1d(mel.mean(0).cpu().double().numpy(), SMOOTH)
    found = [0]
    while frames - found[-1] > N_FRAMES:
        ahead = loudness[found[-1] : found[-1] + N_FRAMES + LONG]
        found.append(found[-1] + cut(ahead))
    return [*found, frames]


def cut(loudness: np.ndarray) -> int:
    """The frame before which to end a window that begins with this, and may have N_FRAMES."""
    quietest, loudest = np.percentile(loudness, [1, 99])
    loud = loudness > quietest + QUIET * (loudest - quietest)
    at = np.arange(len(loudness), dtype=float)
    before = np.maximum.accumulate(np.where(loud, at, -np.inf))
    after = np.minimum.accumulate(np.where(loud, at, np.inf)[::-1])[::-1]
    margin = np.minimum(at - before, after - at)[EARLIEST : N_FRAMES + 1]  # frames to what is loud
    if margin.max() >= PAUSE // 2:
        return EARLIEST + last_largest(np.minimum(margin, LONG // 2))
    return EARLIEST + last_largest(-loudness[EARLIEST : N_FRAMES + 1])


def last_largest(values: np.ndarray) -> int:
    """The index of the largest value, of the last where there are several."""
    return len(values) - 1 - int(np.argmax(values[::-1]))


@dataclass
class Window:
    """Frames `seek` to `end` are still to be decoded; the segments are of those before."""

    seek: int
    end: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.seek >= self.end


def segments_of(
    result: DecodingResult, seek: int, frames: int, tokenizer: Tokenizer, stride: int
) -> tuple[list[Segment], int]:
    """What `whisper.transcribe` makes of one decoding: its segments, and the frames they cover.

    seek, frames : where the decoded part begins, and how long it is
    stride : frames for a step of the timestamps

    Two timestamps in a row end a segment and begin another. After the last such pair the text is
    unfinished: it is left to the next decoding, which begins there. Unless the text ends with one
    timestamp after a word: then nothing is said after it.
    """
    tokens, first = result.tokens, tokenizer.timestamp_begin
    stamped = [token >= first for token in tokens]
    ends = [i for i in range(1, len(tokens)) if stamped[i - 1] and stamped[i]]
    closed = stamped[-2:] == [False, True]
    offset, precision = seek * HOP_LENGTH / SAMPLE_RATE, stride * HOP_LENGTH / SAMPLE_RATE
    accounted = frames
    if ends:
        if closed:
            ends.append(len(tokens))
        else:
            accounted = (tokens[ends[-1] - 1] - first) * stride
        parts = [tokens[a:b] for a, b in pairwise([0, *ends])]
        times = [((p[0] - first) * precision, (p[-1] - first) * precision) for p in parts]
    else:
        stamps = [token for token in tokens if token >= first]
        said = bool(stamps) and stamps[-1] != first
        end = (stamps[-1] - first) * precision if said else frames * HOP_LENGTH / SAMPLE_RATE
        parts, times = [tokens], [(0.0, end)]
    segments = []
    for part, (start, end) in zip(parts, times, strict=True):
        text = tokenizer.decode([token for token in part if token < tokenizer.eot])
        empty = start == end or not text.strip()
        segments.append(
            {
                "seek": seek,
                "start": offset + start,
                "end": offset + end,
                "text": "" if empty else text,
                "tokens": [] if empty else part,
                "temperature": result.temperature,
                "avg_logprob": result.avg_logprob,
                "compression_ratio": result.compression_ratio,
                "no_speech_prob": result.no_speech_prob,
            }
        )
    return segments, accounted


@dataclass(frozen=True)
class Listener:
    """`whisper.transcribe`'s way to decode, for several windows at once: the next temperature where
    a text is too repetitive or too improbable, and which windows are silence.

    options : of `whisper.DecodingOptions`, without a temperature
    """

    model: whisper.Whisper
    temperatures: Sequence[float]
    compression_ratio_threshold: float | None
    logprob_threshold: float | None
    no_speech_threshold: float | None
    options: dict[str, Any]

    def improbable(self, result: DecodingResult) -> bool:
        return self.logprob_threshold is not None and result.avg_logprob < self.logprob_threshold

    def voiceless(self, result: DecodingResult) -> bool:
        threshold = self.no_speech_threshold
        return threshold is not None and result.no_speech_prob > threshold

    def silent(self, result: DecodingResult) -> bool:
        """Whether nothing is said: no text is made of it."""
        trusted = self.logprob_threshold is not None and result.avg_logprob > self.logprob_threshold
        return self.voiceless(result) and not trusted

    def fails(self, result: DecodingResult) -> bool:
        """Whether the next temperature is tried."""
        threshold, improbable = self.compression_ratio_threshold, self.improbable(result)
        repetitive = threshold is not None and result.compression_ratio > threshold
        return (repetitive or improbable) and not (improbable and self.voiceless(result))

    def __call__(self, mel: Tensor) -> list[DecodingResult]:
        """mel (windows, n_mels, 3000) -> a result for each; encoded once."""
        results: list[DecodingResult] = []
        left = list(range(len(mel)))
        for temperature in self.temperatures:
            found = self.decode(mel, temperature)
            if not results:
                results = found
            else:
                for i, result in zip(left, found, strict=True):
                    results[i] = result
            left = [i for i in left if self.fails(results[i])]
            if not left:
                break
            mel = torch.stack([results[i].audio_features for i in left])
        return results

    def decode(self, mel: Tensor, temperature: float) -> list[DecodingResult]:
        """mel, or the encoder's output, of several windows; beams are for temperature 0, and the
        best of several for the others."""
        dropped = ("beam_size", "patience") if temperature > 0 else ("best_of",)
        kept = {name: value for name, value in self.options.items() if name not in dropped}
        options = DecodingOptions(**kept, temperature=temperature)
        if (options.best_of or 1) > 1 and not searches_batches(self.model):
            return [self.model.decode(one, options) for one in mel]
        return list(self.model.decode(mel, options))


def searches_batches(model: whisper.Whisper) -> bool:
    """Whether several windows are decoded with several sequences each; PyTorch's decoder keeps one
    cache row for each, and openai-whisper gives it one row of audio a window."""
    return getattr(model, "max_decoder", None) is not None


def transcribe_batched(
    model: whisper.Whisper,
    audio: str | np.ndarray | Tensor,
    batch_size: int,
    *,
    verbose: bool | None = None,
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    compression_ratio_threshold: float | None = 2.4,
    logprob_threshold: float | None = -1.0,
    no_speech_threshold: float | None = 0.6,
    **options: Any,
) -> dict[str, Any]:
    """`whisper.transcribe` with `batch_size` windows at a time: `text`, `segments`, `language`.

    audio : a file's name, which needs the `ffmpeg` program, or samples at 16 kHz
    options : as in `whisper.transcribe`; those of WITHOUT may only have the value that is there

    The result is that of `whisper.transcribe` with `bounds` as its clips and no text before them,
    but for rounding and for what is drawn at random. Raises ValueError, one sentence, on options
    that cannot hold.
    """
    check(model, batch_size, options)
    options = {name: value for name, value in options.items() if name not in WITHOUT}
    for punctuation in ("prepend_punctuations", "append_punctuations"):  # of words with times
        options.pop(punctuation, None)
    options["fp16"] = bool(options.get("fp16", True)) and model.device.type != "cpu"
    dtype = torch.float16 if options["fp16"] else torch.float32

    # Of the whole file and 30 s of silence: the floor is 8 below the file's maximum.
    mel = log_mel_spectrogram(audio, model.dims.n_mels, padding=N_SAMPLES)
    content = mel[:, : mel.shape[1] - N_FRAMES]
    if options.get("language") is None:
        options["language"] = "en"
        if model.is_multilingual:
            begin = pad_or_trim(mel, N_FRAMES).to(model.device).to(dtype)
            _, probabilities = model.detect_language(begin)
            options["language"] = max(probabilities, key=probabilities.__getitem__)
            if verbose is not None:
                print(f"Detected language: {LANGUAGES[options['language']].title()}")
    tokenizer = get_tokenizer(
        model.is_multilingual,
        num_languages=model.num_languages,
        language=options["language"],
        task=options.get("task", "transcribe"),
    )
    listen = Listener(
        model,
        [temperature] if isinstance(temperature, int | float) else temperature,
        compression_ratio_threshold,
        logprob_threshold,
        no_speech_threshold,
        options,
    )

    stride = N_FRAMES // model.dims.n_audio_ctx
    windows = [Window(start, end) for start, end in pairwise(bounds(content))]
    waiting, printed = windows, 0
    with tqdm(total=content.shape[1], unit="frames", disable=verbose is not False) as bar:
        while waiting:
            now = waiting[:batch_size]
            cuts = [pad_or_trim(content[:, w.seek : w.end], N_FRAMES) for w in now]
            results = listen(torch.stack(cuts).to(model.device).to(dtype))
            for window, result in zip(now, results, strict=True):
                left = window.end - window.seek
                accounted = left
                if not listen.silent(result):
                    segments, accounted = segments_of(result, window.seek, left, tokenizer, stride)
                    window.segments += segments
                window.seek += accounted
                bar.update(min(accounted, left))
            # A window that is not at its end is decoded from there, in the next round.
            waiting = [window for window in waiting if not window.done]
            while printed < len(windows) and windows[printed].done:
                if verbose:
                    print_segments(windows[printed].segments)
                printed += 1
    found = [segment for window in windows for segment in window.segments]
    return {
        "text": tokenizer.decode([token for segment in found for token in segment["tokens"]]),
        "segments": [{"id": i, **segment} for i, segment in enumerate(found)],
        "language": options["language"],
    }


def check(model: whisper.Whisper, batch_size: int, options: dict[str, Any]) -> None:
    """Raise ValueError, one sentence, on what a batch cannot do."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    for name, value in WITHOUT.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} cannot hold with batch_size: {REASON[name]}")
    if options.get("prompt") is not None:
        raise ValueError(f"prompt cannot hold with batch_size: {REASON['initial_prompt']}")
    if options.get("beam_size") is not None and not searches_batches(model):
        raise ValueError(
            "beam_size cannot hold with batch_size: openai-whisper searches one window at a time; "
            "the variant max-fast searches several"
        )


def print_segments(segments: Sequence[Segment]) -> None:
    """A line for each that has a text, as `whisper.transcribe` prints it."""
    for segment in filter(lambda segment: segment["text"], segments):
        start, end = format_timestamp(segment["start"]), format_timestamp(segment["end"])
        print(make_safe(f"[{start} --> {end}] {segment['text']}"))


@dataclass(frozen=True)
class Difference:
    """How far a batched transcript is from the sequential one, which is taken for the truth.

    words : normalised as OpenAI does before it counts
    tokens : of text, counted in the same way; timestamps are left out, since windows differ
    identical : whether all tokens of text are the same, in the same order
    """

    words: WordErrors
    tokens: WordErrors
    identical: bool

    def to_json(self) -> dict[str, Any]:
        """{words: {substitutions, deletions, insertions, words, rate}, tokens: ..., identical};
        a rate is null where the sequential transcript is empty."""
        counts = {
            name: {**asdict(errors), "rate": errors.rate if errors.words else None}
            for name, errors in (("words", self.words), ("tokens", self.tokens))
        }
        return {**counts, "identical": self.identical}


def difference(
    model: whisper.Whisper, batched: dict[str, Any], sequential: dict[str, Any]
) -> Difference:
    """Of two results of one recording by `model`, from `transcribe_batched` and `transcribe`."""
    import jiwer

    from encoder.truth import WordErrors, word_errors

    eot = get_tokenizer(model.is_multilingual, num_languages=model.num_languages).eot
    ours, theirs = (
        [str(t) for segment in result["segments"] for t in segment["tokens"] if t < eot]
        for result in (batched, sequential)
    )
    if theirs:
        found = jiwer.process_words(" ".join(theirs), " ".join(ours))
        tokens = WordErrors(found.substitutions, found.deletions, found.insertions, len(theirs))
    else:
        tokens = WordErrors(0, 0, len(ours), 0)
    words = word_errors(sequential["text"], batched["text"], sequential["language"])
    return Difference(words, tokens, ours == theirs)
