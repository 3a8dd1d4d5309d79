"""Does the transcript suffer, and how much: the stock decoder on two encoders' features, compared.

What is no set of features (NaN, a wrong shape) is named as the candidate's failure, not decoded.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import Any

import jiwer
import numpy as np
import torch
import whisper
from torch import Tensor, nn
from whisper.audio import FRAMES_PER_SECOND, HOP_LENGTH, N_FRAMES
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import ModelDimensions
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.tokenizer import Tokenizer, get_tokenizer

from encoder.audio import windows as mel_windows

Encode = Callable[[Tensor], Tensor]  # mel (1, n_mels, frames) -> (1, n_audio_ctx, n_audio_state)

# Where `whisper.transcribe` by default decodes a window again, at a higher temperature.
COMPRESSION_RATIO_THRESHOLD = 2.4
LOGPROB_THRESHOLD = -1.0


class FeaturesError(Exception):
    """What an encoder gave are no features; one sentence. An encoder that cannot encode some window
    (a file of features has only its own) may raise it itself."""


class CheckedEncoder(nn.Module):
    """`encode` as a model's encoder; raises FeaturesError unless it keeps the contract: float32, on
    mel's device, (batch, n_audio_ctx, n_audio_state), every value finite."""

    def __init__(self, encode: Encode, dims: ModelDimensions):
        super().__init__()
        # Not as a submodule: the model's device is that of its first parameter, the decoder's.
        self.encode = lambda mel: encode(mel)
        self.shape = (dims.n_audio_ctx, dims.n_audio_state)

    def forward(self, mel: Tensor) -> Tensor:
        features = self.encode(mel)
        if not isinstance(features, Tensor):
            raise FeaturesError(f"the features are a {type(features).__name__}, expected a tensor")
        expected = (mel.shape[0], *self.shape)
        if tuple(features.shape) != expected:
            raise FeaturesError(
                f"the features have shape {tuple(features.shape)}, expected {expected}"
            )
        if features.dtype != torch.float32 or features.device != mel.device:
            raise FeaturesError(
                f"the features are {features.dtype} on {features.device}, expected "
                f"torch.float32 on {mel.device}"
            )
        if bad := int((~torch.isfinite(features)).sum()):
            raise FeaturesError(
                f"{bad} of the {features.numel()} values of the features are NaN or infinite"
            )
        return features


def with_encoder(reference: whisper.Whisper, encoder: nn.Module) -> whisper.Whisper:
    """A model of its own that shares the reference's decoder, with another encoder.

    `copy.copy` would not do: a module's copy shares the table of submodules, and an assignment to
    `.encoder` would change the reference.
    """
    # As small as the constructor makes it: both halves are replaced before they are used.
    model = whisper.Whisper(replace(reference.dims, n_audio_layer=0, n_text_layer=0, n_vocab=1))
    model.dims = reference.dims
    model.encoder, model.decoder = encoder, reference.decoder
    model.register_buffer("alignment_heads", reference.alignment_heads, persistent=False)
    return model


def knows_timestamps(model: whisper.Whisper) -> bool:
    """Whether the timestamp tokens have embeddings of their own: without, decoding with timestamps
    (the default) makes no sense, as in a checkpoint whose embedding was fitted without them."""
    rows = model.decoder.token_embedding.weight[tokenizer_of(model, "en").timestamp_begin :]
    return bool((rows != rows[0]).any())


def tokenizer_of(model: whisper.Whisper, language: str) -> Tokenizer:
    return get_tokenizer(
        model.is_multilingual, num_languages=model.num_languages, language=language
    )


# Teacher forcing: the same tokens before it, what does the decoder say next?


@dataclass(frozen=True)
class Position:
    """One generated position. `token` is what the reference said, `candidate` what the candidate's
    logits put first; `rank` is the token's in the candidate's logits, 1 for the largest, and
    `reference_rank` in the reference's own (not always 1: Whisper's rules suppress some tokens).
    `same_top1`: both sides' logits put the same token first. `same_choice`: under Whisper's rules
    greedy decoding goes on with the same token on both sides."""

    window: int
    position: int
    token: str
    candidate: str
    kl: float
    same_top1: bool
    same_choice: bool
    rank: int
    reference_rank: int


@dataclass(frozen=True)
class Divergence:
    """`Position`s summed up. KL in nats over the whole vocabulary, before any rule; p99 is the
    value at rank ceil(0.99 n). The shares same_top1, same_choice and rank_one are of 1."""

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    same_top1: float
    same_choice: float
    rank_one: float
    worst_rank: int
    reference_worst_rank: int


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) of two rows of logits (..., n_vocab), in nats: (...,) float64."""
    p = reference.to(torch.float64).log_softmax(-1)
    q = candidate.to(torch.float64).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)  # rounding alone can go below 0


def rank(logits: Tensor, token: int) -> int:
    """1 and one for each of the logits (n_vocab,) that is larger than the token's."""
    return 1 + int((logits > logits[token]).sum())


def teacher_forced(
    model: whisper.Whisper,
    features: Sequence[Tensor],
    language: str,
    timestamps: bool,
    window: int = 0,
) -> list[Position]:
    """One 30 s window: greedy `whisper.decode` on the reference's features gives the tokens, then
    the decoder runs once over them on each side's features.

    features : the reference's and the candidate's, each (1, n_audio_ctx, n_audio_state) float32
    Positions are those that were generated, the end-of-text token with them; a text that was cut
    off at its greatest length has none. Raises FeaturesError where the candidate's logits are not
    finite, ValueError where the reference's are not.
    """
    options = DecodingOptions(language=language, without_timestamps=not timestamps, fp16=False)
    tokens = whisper.decode(model, features[0], options)[0].tokens
    task = DecodingTask(model, options)
    begin = len(task.initial_tokens)
    forced = tokens if len(tokens) == task.sample_len else [*tokens, task.tokenizer.eot]
    before = torch.tensor([[*task.initial_tokens, *forced[:-1]]], device=features[0].device)
    with torch.no_grad():
        sides = [model.logits(before, x)[0, begin - 1 :] for x in features]
    if not bool(torch.isfinite(sides[0]).all()):
        raise ValueError("the reference's logits are not finite")
    if not bool(torch.isfinite(sides[1]).all()):
        largest = float(features[1].abs().max())
        raise FeaturesError(f"features of up to {largest:.3g} make the decoder's logits not finite")
    found = []
    for i, (token, r, c) in enumerate(zip(forced, *sides, strict=True)):
        chosen = []
        for logits in (r, c):
            allowed = logits[None].clone()
            for rule in task.logit_filters:
                rule.apply(allowed, before[:, : begin + i])
            chosen.append(int(allowed.argmax()))
        first = int(c.argmax())
        found.append(
            Position(
                window=window,
                position=i,
                token=task.tokenizer.decode_with_timestamps([token]),
                candidate=task.tokenizer.decode_with_timestamps([first]),
                kl=float(kl_divergence(r, c)),
                same_top1=int(r.argmax()) == first,
                same_choice=chosen[0] == chosen[1],
                rank=rank(c, token),
                reference_rank=rank(r, token),
            )
        )
    return found


def summed_up(positions: list[Position]) -> Divergence:
    """At least one position."""
    n = len(positions)
    kl = sorted(p.kl for p in positions)
    return Divergence(
        positions=n,
        kl_mean=math.fsum(kl) / n,
        kl_p99=kl[math.ceil(0.99 * n) - 1],
        kl_max=kl[-1],
        same_top1=sum(p.same_top1 for p in positions) / n,
        same_choice=sum(p.same_choice for p in positions) / n,
        rank_one=sum(p.rank == 1 for p in positions) / n,
        worst_rank=max(p.rank for p in positions),
        reference_worst_rank=max(p.reference_rank for p in positions),
    )


# Transcripts: each side goes its own way.


@dataclass(frozen=True)
class TextError:
    """A text against another, both normalised; `words` of the other. A rate is None where the other
    text is empty and this one is not; where both are, it is 0."""

    wer: float | None
    cer: float | None
    substitutions: int
    deletions: int
    insertions: int
    words: int


@dataclass(frozen=True)
class Difference:
    """The first token that differs: `index` among all tokens, `window` among `Semantic.windows`,
    `time` the start of its segment in seconds; None where that side has no more tokens. The time is
    the reference's, the candidate's where the reference has no more."""

    window: int
    index: int
    time: float
    reference: str | None
    candidate: str | None
    reference_id: int | None
    candidate_id: int | None


@dataclass(frozen=True)
class Window:
    """One window of the reference's transcript: `seek` in frames of 10 ms, `start` and `end` in
    seconds. Of either side the segments that start in it, tokens compared one by one."""

    seek: int
    start: float
    end: float
    identical: bool
    wer: float | None
    reference: str
    candidate: str


@dataclass(frozen=True)
class Coverage:
    """Seconds. Where the last segment ends on either side (0 without one), the audio's length, what
    the reference's segments cover and the candidate's do not (lost), and the reverse (invented).
    Without timestamps a segment is a whole window."""

    reference: float
    duration: float
    candidate: float | None = None
    lost: float | None = None
    invented: float | None = None


@dataclass(frozen=True)
class Spoken:
    """One side's transcript: its language, the number of its tokens (with timestamps), of its
    windows that `whisper.transcribe` would by default have decoded again, and the error against the
    truth."""

    language: str
    tokens: int
    would_retry: int
    truth: TextError | None


def text_error(text: str, truth: str, normalize: Callable[[str], str]) -> TextError:
    """WER and CER of `text` against `truth` by jiwer, after `normalize` on both."""
    truth, text = normalize(truth).strip(), normalize(text).strip()
    words, characters = jiwer.process_words(truth, text), jiwer.process_characters(truth, text)

    def rate(found: jiwer.WordOutput | jiwer.CharacterOutput) -> float | None:
        errors = found.substitutions + found.deletions + found.insertions
        length = found.hits + found.substitutions + found.deletions
        if length:
            return errors / length
        return None if errors else 0.0

    return TextError(
        wer=rate(words),
        cer=rate(characters),
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=words.hits + words.substitutions + words.deletions,
    )


def first_difference(
    reference: list[dict], candidate: list[dict], starts: list[int], tokenizer: Tokenizer
) -> Difference | None:
    """Of two transcripts' segments; `starts` as from `window_starts`. None: equal tokens."""
    a, b = ([(t, s["start"]) for s in side for t in s["tokens"]] for side in (reference, candidate))
    for index, (ours, theirs) in enumerate(zip_longest(a, b)):
        if ours is None or theirs is None or ours[0] != theirs[0]:
            text = [x and tokenizer.decode_with_timestamps([x[0]]) for x in (ours, theirs)]
            time = (ours or theirs)[1]
            ids = [x and x[0] for x in (ours, theirs)]
            return Difference(window_at(time, starts), index, time, *text, *ids)
    return None


def window_starts(segments: list[dict], content_frames: int) -> list[int]:
    """Where the windows of a transcript begin, in frames: from its segments, and every 30 s where
    it skipped windows in which it heard nothing. None where there is no audio."""
    if content_frames == 0:
        return []
    starts = [0]
    for seek in sorted({s["seek"] for s in segments} - {0}):
        skipped = (seek - starts[-1] - 1) // N_FRAMES
        starts += range(seek - skipped * N_FRAMES, seek + 1, N_FRAMES)
    return [*starts, *range(starts[-1] + N_FRAMES, content_frames, N_FRAMES)]


def window_at(seconds: float, starts: list[int]) -> int:
    """Index of the window in which this time lies."""
    return bisect_right(starts, round(seconds * FRAMES_PER_SECOND)) - 1


def by_window(
    reference: list[dict],
    candidate: list[dict],
    starts: list[int],
    content_frames: int,
    normalize: Callable[[str], str],
) -> list[Window]:
    """Both transcripts' segments, window by window of the reference's."""
    found = []
    for i, (start, end) in enumerate(pairwise([*starts, content_frames])):
        here = [
            [s for s in side if window_at(s["start"], starts) == i]
            for side in (reference, candidate)
        ]
        texts = ["".join(s["text"] for s in side) for side in here]
        tokens = [[t for s in side for t in s["tokens"]] for side in here]
        found.append(
            Window(
                seek=start,
                start=start / FRAMES_PER_SECOND,
                end=end / FRAMES_PER_SECOND,
                identical=tokens[0] == tokens[1],
                wer=text_error(texts[1], texts[0], normalize).wer,
                reference=texts[0],
                candidate=texts[1],
            )
        )
    return found


def frames_of(segments: list[dict]) -> set[int]:
    """The frames, of 10 ms each, that segments with text cover."""
    return {
        frame
        for s in segments
        if s["text"].strip()
        for frame in range(*(round(s[key] * FRAMES_PER_SECOND) for key in ("start", "end")))
    }


def coverage(reference: list[dict], candidate: list[dict] | None, content_frames: int) -> Coverage:
    """Of two transcripts' segments; the candidate's None where it has failed."""

    def end(frames: set[int]) -> float:
        return (max(frames) + 1) / FRAMES_PER_SECOND if frames else 0.0

    ours = frames_of(reference)
    found = Coverage(end(ours), content_frames / FRAMES_PER_SECOND)
    if candidate is None:
        return found
    theirs = frames_of(candidate)
    lost, invented = (len(x) / FRAMES_PER_SECOND for x in (ours - theirs, theirs - ours))
    return replace(found, candidate=end(theirs), lost=lost, invented=invented)


def spoken(
    transcript: dict[str, Any], truth: str | None, normalize: Callable[[str], str]
) -> Spoken:
    """What `whisper.transcribe` returned, summed up."""
    segments = transcript["segments"]
    return Spoken(
        language=transcript["language"],
        tokens=sum(len(s["tokens"]) for s in segments),
        would_retry=len(
            {
                s["seek"]
                for s in segments
                if s["compression_ratio"] > COMPRESSION_RATIO_THRESHOLD
                or s["avg_logprob"] < LOGPROB_THRESHOLD
            }
        ),
        truth=None if truth is None else text_error(transcript["text"], truth, normalize),
    )


@dataclass(frozen=True)
class Semantic:
    """What `semantic` found; all that the candidate's features are needed for is None (an empty
    list, not identical) where it has none.

    candidate_failed : why it has none, one sentence
    timestamps : whether both sides were decoded with timestamps, see `knows_timestamps`
    normalizer : which of Whisper's the texts went through before they were compared
    tokens_identical, first_difference : of the two transcripts, all tokens in their order
    positions ... reference_worst_rank : the `Divergence` of all windows of teacher forcing; None
        where the audio has no window
    kl_max_at : the position of the largest divergence
    forced : the `Divergence` of each 30 s window
    wer ... words : the `TextError` of the candidate's text against the reference's
    wer_truth_reference, wer_truth_candidate : of either text against the truth, where given
    text : of the "reference" and the "candidate"
    windows : the transcripts side by side
    """

    candidate_failed: str | None
    timestamps: bool
    normalizer: str
    text: dict[str, str | None]
    reference: Spoken
    coverage: Coverage
    wer_truth_reference: float | None
    candidate: Spoken | None = None
    wer_truth_candidate: float | None = None
    tokens_identical: bool = False
    first_difference: Difference | None = None
    positions: int | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    kl_max_at: Position | None = None
    same_top1: float | None = None
    same_choice: float | None = None
    rank_one: float | None = None
    worst_rank: int | None = None
    reference_worst_rank: int | None = None
    forced: list[Divergence] = field(default_factory=list)
    wer: float | None = None
    cer: float | None = None
    substitutions: int | None = None
    deletions: int | None = None
    insertions: int | None = None
    words: int | None = None
    windows: list[Window] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Dictionaries, lists, text and finite numbers; None is null."""
        return asdict(self)


def transcript(
    model: whisper.Whisper, audio: np.ndarray, content_frames: int, timestamps: bool
) -> dict[str, Any]:
    """`whisper.transcribe` at temperature 0 of the first `content_frames` frames of the audio.

    Raises FeaturesError where the decoder's probabilities are not finite: `decode` itself does not
    mind, it says "!!!!" to the greatest length.
    """
    whole = content_frames == len(audio) // HOP_LENGTH
    found = model.transcribe(
        audio,
        temperature=0.0,
        fp16=False,
        without_timestamps=not timestamps,
        clip_timestamps="0" if whole else [0.0, content_frames / FRAMES_PER_SECOND],
    )
    if not all(math.isfinite(s["avg_logprob"]) for s in found["segments"]):
        raise FeaturesError("the features make the decoder's probabilities not finite")
    return found


def forced_windows(
    reference: whisper.Whisper,
    candidate: whisper.Whisper,
    mel: Tensor,
    language: str,
    timestamps: bool,
) -> list[list[Position]]:
    """`teacher_forced` of every window of mel (windows, n_mels, frames)."""
    found = []
    for i, window in enumerate(mel):
        try:
            with torch.no_grad():
                features = [model.encoder(window[None]) for model in (reference, candidate)]
            found.append(teacher_forced(reference, features, language, timestamps, i))
        except FeaturesError as error:
            raise FeaturesError(f"window {i}: {error}") from error
    return found


def semantic(
    reference_model: whisper.Whisper,
    candidate_encoder: Encode,
    audio: np.ndarray,
    truth: str | None = None,
    *,
    windows: int | None = None,
) -> Semantic:
    """Give the stock decoder the candidate's features instead of the reference's: what changes?

    reference_model : the stock model in float32; it is not changed
    candidate_encoder : a module or function, mel (1, n_mels, 2 * n_audio_ctx) float32 -> features
    audio : float32 (samples,), mono, 16 kHz
    truth : what is said in the whole of it
    windows : only the first so many 30 s of it (the spectrogram stays the whole recording's); the
        truth is then left aside, since nobody knows which of its words were cut off

    First teacher forcing, window by window; then `whisper.transcribe` on both sides, with its
    default options but one: temperature 0 and no other. By default it decodes a window whose text
    looks wrong again at higher temperatures, and samples: two runs of one model would differ. Here
    the greedy text of such a window stays, and `would_retry` counts them. A checkpoint that does
    not know timestamps is decoded without them.

    Texts are compared after Whisper's EnglishTextNormalizer where the checkpoint is English-only,
    and its BasicTextNormalizer otherwise. Features that are none are `candidate_failed`. Whatever
    else the candidate raises goes through; a reference without finite output is a ValueError.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows is {windows}, expected 1 or more, or None")
    content_frames = len(audio) // HOP_LENGTH
    if windows is not None and content_frames > windows * N_FRAMES:
        content_frames, truth = windows * N_FRAMES, None
    timestamps = knows_timestamps(reference_model)
    dims = reference_model.dims
    mel = mel_windows(audio, dims.n_mels)[:windows]
    candidate_model = with_encoder(reference_model, CheckedEncoder(candidate_encoder, dims))
    normalize = (
        BasicTextNormalizer if reference_model.is_multilingual else EnglishTextNormalizer
    )()

    try:
        reference = transcript(reference_model, audio, content_frames, timestamps)
    except FeaturesError as error:
        raise ValueError(f"the reference: {error}") from error
    language, ours = reference["language"], reference["segments"]
    forced: list[list[Position]] = []
    candidate: dict[str, Any] | None = None
    failed: str | None = None
    try:
        forced = forced_windows(reference_model, candidate_model, mel, language, timestamps)
        candidate = transcript(candidate_model, audio, content_frames, timestamps)
    except FeaturesError as error:
        failed = str(error)

    positions = [position for window in forced for position in window]
    heard = spoken(reference, truth, normalize)
    found = Semantic(
        candidate_failed=failed,
        timestamps=timestamps,
        normalizer=type(normalize).__name__,
        text={
            "reference": reference["text"],
            "candidate": candidate["text"] if candidate else None,
        },
        reference=heard,
        wer_truth_reference=heard.truth.wer if heard.truth else None,
        coverage=coverage(ours, candidate["segments"] if candidate else None, content_frames),
        kl_max_at=max(positions, key=lambda p: p.kl, default=None),
        forced=[summed_up(window) for window in forced],
        **(asdict(summed_up(positions)) if positions else {}),
    )
    if candidate is None:
        return found
    theirs = candidate["segments"]
    starts = window_starts(ours, content_frames)
    difference = first_difference(ours, theirs, starts, tokenizer_of(reference_model, language))
    heard = spoken(candidate, truth, normalize)
    return replace(
        found,
        candidate=heard,
        wer_truth_candidate=heard.truth.wer if heard.truth else None,
        tokens_identical=difference is None,
        first_difference=difference,
        windows=by_window(ours, theirs, starts, content_frames, normalize),
        **asdict(text_error(candidate["text"], reference["text"], normalize)),
    )
