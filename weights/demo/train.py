"""Train `demo`: Whisper's own modules, cross-entropy plus CTC of letters and of words.

    python -m weights.demo.train --steps 9900 --decay 1800

Resumable (the newest checkpoint in --out is taken up again) and seeded: the batch of a step
depends on the corpus, the seed and the step alone. The learning rate warms up, stays, and falls to
zero over the last --decay steps; a run that is asked for more steps later goes on from the last
checkpoint before the fall. Refuses to start without the corpus of `weights.demo.speech`.

Six economies:
- Only the used tokens have an embedding row of their own; all others share one more row, whose
  logit gets + log(number of unused tokens). That is exactly the full softmax over OpenAI's tokens.
- A window shorter than 30 s runs on its own length: the positional embedding is a fixed sinusoid,
  cut to that length.
- CTC over characters teaches the encoder to hear before the decoder can; its head is not exported.
- CTC over words, once there are letters, teaches it to spell them: the decoder then has to read one
  place for a word. Its head is not exported either.
- A timestamp is seen too rarely to be learnt for itself: their rows are one row that all share and
  a linear image of the sinusoids of their times, those that the encoder's positions have.
- Where each word is spoken is known, about: one head of each of the decoder's layers is taught to
  look there, the last layer's at the token that comes next, those before at the one that was given.

float32, or bfloat16 autocast with --bf16: the faster one on a processor with AMX, the slower one
without.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from whisper.audio import HOP_LENGTH, log_mel_spectrogram
from whisper.model import ModelDimensions, Whisper, sinusoids
from whisper.tokenizer import Tokenizer, get_tokenizer

import weights
from weights.demo.speech import SAMPLE_RATE
from weights.demo.text import VOCABULARY

DIMS = ModelDimensions(
    n_mels=80, n_audio_ctx=1500, n_audio_state=384, n_audio_head=6, n_audio_layer=4,
    n_vocab=51864, n_text_ctx=448, n_text_state=384, n_text_head=6, n_text_layer=3,
)  # fmt: skip
CTC_ALPHABET = " abcdefghijklmnopqrstuvwxyz"  # 0 is the blank
WEIGHTS = {"cross_entropy": 1.0, "ctc": 0.5, "words": 1.0, "alignment": 1.0}  # of the losses
NEAR = 0.4  # seconds about a word within which an alignment head may look
RARE = 8.0  # the logit that the blank has above a word before anything is learnt
PEAK_LR = 8e-4
LATER, LATER_LR = 6900, 4e-4  # from this step on
WARMUP = 200  # steps
LOOPS = 0.2  # of the previous texts of the decoder's own training
STUTTER = 0.04  # of the words there
MISHEARD = 0.08  # of the words that the decoder is given, once it has learnt to find its way
HARD, HARD_SHARE = "flite:", 0.35  # voices that are harder to hear than espeak-ng's
WINDOW = 30.0  # seconds, Whisper's own
# The curriculum: (up to this step, whether the decoder learns too, ((seconds, windows a batch,
# share of the steps), ...)), batches of about a minute of audio. The encoder learns to hear by CTC
# alone; the decoder then learns where to look on a few words, and only then to find its way
# through thirty seconds.
CURRICULUM: tuple[tuple[float, bool, tuple[tuple[float, int, float], ...]], ...] = (
    (1500, False, ((2.8, 22, 0.35), (4.6, 14, 0.35), (15.0, 4, 0.15), (WINDOW, 2, 0.15))),
    (2100, True, ((1.3, 40, 0.4), (2.8, 22, 0.4), (4.6, 14, 0.2))),
    (3700, True, ((2.8, 22, 0.2), (4.6, 14, 0.3), (8.0, 8, 0.3), (15.0, 4, 0.2))),
    (4300, True, ((4.6, 14, 0.25), (8.0, 8, 0.3), (15.0, 4, 0.25), (WINDOW, 2, 0.2))),
    (4800, True, ((4.6, 14, 0.05), (8.0, 8, 0.15), (15.0, 4, 0.35), (WINDOW, 2, 0.45))),
    (math.inf, True, ((8.0, 8, 0.1), (15.0, 4, 0.25), (WINDOW, 2, 0.65))),
)
MAX_INITIAL_TIMESTAMP = 1.0  # seconds: stock decoding never begins a window with a later one
MAX_PROMPT = 223  # tokens: n_text_ctx // 2 - 1, what stock decoding keeps
STAMPS = 1501  # 0.00 to 30.00 s; the last of the used tokens
IGNORED = -1  # a target without loss


def used_tokens(tokenizer: Tokenizer) -> list[int]:
    """Token ids that `demo` may say: its words, the special tokens, the timestamps."""
    words = {t for w in VOCABULARY for t in tokenizer.encode(" " + w)}
    special = {tokenizer.sot, tokenizer.eot, tokenizer.no_timestamps, tokenizer.no_speech,
               tokenizer.sot_prev}  # fmt: skip
    stamps = set(range(tokenizer.timestamp_begin, tokenizer.timestamp_begin + STAMPS))
    return sorted(words | special | stamps)


class Corpus:
    """The spoken utterances of some splits: `audio(i)` float32 samples, `text[i]`, `seconds[i]`."""

    def __init__(self, folder: Path, *splits: str):
        self.shards: list[np.ndarray] = []
        self.rows: list[tuple[int, int, int]] = []
        self.text: list[str] = []
        self.voice: list[str] = []
        for path in (path for split in splits for path in sorted(folder.glob(f"{split}-*.json"))):
            samples = np.load(path.with_suffix(".npy"), mmap_mode="r")
            for row in json.loads(path.read_text()):
                self.rows.append((len(self.shards), row["start"], row["length"]))
                self.text.append(row["text"])
                self.voice.append(row["voice"])
            self.shards.append(samples)
        if not self.rows:
            named = " or ".join(splits)
            raise SystemExit(f"train: no {named} corpus in {folder}; run weights.demo.speech first")
        self.seconds = np.array([r[2] for r in self.rows]) / SAMPLE_RATE
        self.by_length = np.argsort(self.seconds, kind="stable")
        hard = [i for i in self.by_length if self.voice[i].startswith(HARD)]
        self.hard_by_length = np.array(hard, dtype=self.by_length.dtype)

    def audio(self, i: int) -> np.ndarray:
        shard, start, length = self.rows[i]
        return np.asarray(self.shards[shard][start : start + length], np.float32) / 32768

    def pick(self, rng: random.Random, low: float, high: float) -> int | None:
        """A random utterance that lasts between `low` and `high` seconds; of the hard voices in
        HARD_SHARE and what falls to them of the rest."""
        among = self.hard_by_length if rng.random() < HARD_SHARE else self.by_length
        a, b = np.searchsorted(self.seconds[among], [low, high])
        return int(among[rng.randrange(a, b)]) if b > a else None


@dataclass(frozen=True)
class Window:
    """One training window. `sentences` are whole ones as (text, start s, end s); `cut` is the
    start of a last one that the window's end cuts, and `cut_text` what is heard of it, about;
    `end` is where the recording ends in it, in seconds, if it does.
    """

    samples: np.ndarray
    sentences: list[tuple[str, float, float]]
    cut: float | None = None
    cut_text: str = ""
    end: float | None = None

    def mel(self, rng: random.Random) -> Tensor:
        """(80, frames) as `whisper.transcribe` gives a window to the encoder: after the recording's
        end 0.0, not silence, and in some a floor that comes from a louder part of the file."""
        mel = log_mel_spectrogram(self.samples)
        if rng.random() < 0.3:
            mel = mel.clamp(min=float(mel.min()) + rng.uniform(0.0, 0.5))
        if self.end is not None:
            mel[:, round(self.end * SAMPLE_RATE) // HOP_LENGTH :] = 0.0
        return mel


def reverberation(samples: np.ndarray, rng: random.Random) -> np.ndarray:
    """A room: a decaying noise tail, 60 dB down after 0.15 to 0.6 s, under the direct sound."""
    decay = rng.uniform(0.15, 0.6)
    t = np.arange(round(decay * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(len(t))
    tail = noise * 10 ** (-3 * t / decay)
    tail *= rng.uniform(0.2, 0.7) / np.linalg.norm(tail)
    tail[0] += 1.0
    size = 1 << (len(samples) + len(tail)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(tail, size), size)
    return wet[: len(samples)].astype(np.float32)


def noise_of(kind: str, count: int, seed: int, corpus: Corpus) -> np.ndarray:
    """`count` samples of noise with mean power 1: white, pink, babble (six voices at once), hum."""
    rng = np.random.default_rng(seed)
    noise: np.ndarray
    if kind == "white":
        noise = rng.standard_normal(count, np.float32)
    elif kind == "pink":
        spectrum = np.fft.rfft(rng.standard_normal(count))
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20)), count)
    elif kind == "babble":
        noise = np.zeros(count)
        for _ in range(6):
            at = -int(rng.integers(SAMPLE_RATE))
            while at < count:
                voice = corpus.audio(int(rng.integers(len(corpus.rows))))[max(0, -at) :]
                at = max(at, 0)
                noise[at : at + len(voice)] += voice[: count - at]
                at += len(voice)
    else:
        t = np.arange(count) / SAMPLE_RATE
        base = float(rng.choice([50.0, 60.0, 100.0, 120.0]))
        tones = [np.sin(2 * np.pi * base * n * t + rng.uniform(0, 6)) / n for n in range(1, 6)]
        noise = np.sum(tones, axis=0) + 0.1 * rng.standard_normal(count)
    return (noise / np.sqrt(np.mean(noise**2) + 1e-12)).astype(np.float32)


def compose(corpus: Corpus, rng: random.Random, seconds: float, run_on: float = 0.0) -> Window:
    """Sentences with pauses between them, a room, noise and level varied, in `seconds` of audio.

    run_on : the share of the sentences that go on, as one sentence, in the next one

    Mostly speech up to the end, which cuts the last sentence, as the sliding window meets it; in
    some windows of 30 s silence from 2 s on or later; 4 % hold no speech.
    """
    full = seconds != WINDOW or rng.random() < 0.7
    room = seconds if full else rng.uniform(2.0, seconds)
    samples: np.ndarray = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    sentences: list[tuple[str, float, float]] = []
    cut, cut_text, joining = None, "", False
    may_cut = full and seconds > 4 and rng.random() < 0.75
    at = rng.choice([0.0, rng.uniform(0.0, 0.9), rng.uniform(0.0, 0.3)])
    if seconds > 8 and rng.random() < 0.06:
        at = rng.uniform(1.0, 6.0)
    elif rng.random() < 0.12:  # the end of a sentence that the window before has heard
        tail = corpus.audio(rng.randrange(len(corpus.rows)))[-round(rng.uniform(800, 4000)) :]
        samples[: len(tail)] += tail
        at = len(tail) / SAMPLE_RATE + rng.uniform(0.15, 0.6)
    empty = rng.random() < 0.04
    while not empty:
        left = room - at
        if may_cut and left < 3.0 and left > 0.4 and rng.random() < 0.8:
            i = corpus.pick(rng, left + 0.1, left + 4.0)
            if i is not None:
                audio = corpus.audio(i)
                start = round(at * SAMPLE_RATE)
                heard = audio[: len(samples) - start]
                samples[start : start + len(heard)] += heard
                cut = at
                cut_text = corpus.text[i][: round(len(corpus.text[i]) * len(heard) / len(audio))]
            break
        low = 0.5 * room if seconds < 5 else 0.2
        i = corpus.pick(rng, min(low, left - 0.2), left)
        if i is None:
            break
        audio = corpus.audio(i)
        start = round(at * SAMPLE_RATE)
        samples[start : start + len(audio)] += audio[: len(samples) - start]
        sentences.append((corpus.text[i], at, at + len(audio) / SAMPLE_RATE))
        if joining:
            (before, begun, _), (text, _, ended) = sentences.pop(-2), sentences.pop()
            sentences.append((f"{before} {text}", begun, ended))
        joining = run_on > 0 and not joining and rng.random() < run_on
        if joining and room - sentences[-1][2] >= 1.0:
            at = sentences[-1][2] + rng.uniform(0.02, 0.12)
            continue
        joining = False
        pause = rng.uniform(0.15, 1.0) if rng.random() < 0.93 else rng.uniform(1.0, 5.0)
        at = sentences[-1][2] + pause
        if room - at < 0.4:
            break
    gain = 10 ** (rng.uniform(-20, 0) / 20)
    if rng.random() < 0.2:
        samples = reverberation(samples, rng)
    spoken = samples[np.abs(samples) > 1e-3]
    power = float(np.mean(spoken**2)) if spoken.size else 0.01
    if rng.random() < 0.5:
        kind = rng.choices(["white", "pink", "babble", "hum"], [0.4, 0.3, 0.15, 0.15])[0]
        if not sentences and kind == "babble":
            kind = "white"  # babble alone is speech
        snr = rng.uniform(15, 40) if kind == "babble" else rng.uniform(8, 40)
        noise = noise_of(kind, len(samples), rng.getrandbits(63), corpus)
        samples = samples + noise * math.sqrt(power) * 10 ** (-snr / 20)
    peak = float(np.abs(samples).max()) or 1.0
    ends = not full and rng.random() < 0.7  # the others go on in silence or noise
    return Window(
        (samples * (gain / peak)).astype(np.float32),
        sentences,
        cut,
        cut_text,
        end=room if ends else None,
    )


@dataclass(frozen=True)
class Said:
    """A token and the second in the window at which it is spoken, about; None: it is not."""

    token: int
    at: float | None = None


def spoken(sentence: tuple[str, float, float], tokenizer: Tokenizer) -> list[Said]:
    """The words of one (text, start s, end s), as if every letter took the same time."""
    words, start, end = sentence
    tokens = tokenizer.encode(" " + words)
    lengths = np.array([len(tokenizer.decode([t])) for t in tokens])
    middles = (np.cumsum(lengths) - lengths / 2) / lengths.sum()
    return [Said(t, start + (end - start) * m) for t, m in zip(tokens, middles, strict=True)]


def stamp(seconds: float, tokenizer: Tokenizer) -> Said:
    """`<|seconds|>`, in steps of 0.02 s up to 30."""
    return Said(tokenizer.timestamp_begin + min(round(seconds / 0.02), 1500), seconds)


def stamped(sentences: list[tuple[str, float, float]], tokenizer: Tokenizer) -> list[Said]:
    """`<|start|> text <|end|>` for every sentence."""
    found = []
    for sentence in sentences:
        _, start, end = sentence
        found += [stamp(start, tokenizer), *spoken(sentence, tokenizer), stamp(end, tokenizer)]
    return found


def prompt_of(
    corpus: Corpus, tokenizer: Tokenizer, rng: random.Random, times: bool, most: int = 12
) -> list[int]:
    """A previous text: one to `most` sentences, with times as `transcribe` hands them on: from the
    beginning of the window in which each was heard."""
    texts = [corpus.text[rng.randrange(len(corpus.rows))] for _ in range(rng.randint(1, most))]
    if not times:
        return tokenizer.encode(" " + " ".join(texts))[-MAX_PROMPT:]
    at, sentences = rng.uniform(0, 1), []
    for text in texts:
        sentences.append((text, at, at + 0.35 * len(text.split())))
        at = sentences[-1][2] + rng.uniform(0.15, 1.0)
        if at > 27.0:
            at = rng.uniform(0, 1)
    return [said.token for said in stamped(sentences, tokenizer)][-MAX_PROMPT:]


def looped(prompt: list[int], rng: random.Random) -> list[int]:
    """A previous text in which one to four tokens come again, three to twelve times."""
    at, size = rng.randrange(len(prompt)), rng.randint(1, 4)
    again = prompt[at : at + size] * rng.randint(3, 12)
    return (prompt[:at] + again + prompt[at:])[-MAX_PROMPT:]


def tokens_of(
    window: Window,
    tokenizer: Tokenizer,
    timestamps: bool,
    prompt: list[int] | None = None,
) -> tuple[list[Said], list[Said]]:
    """(what the decoder is given, what it has to say next) as Whisper's training has them.

    No loss on the prompt. A cut sentence is its start time alone. A window without speech says
    `<|nospeech|>`, and then, given what stock decoding forces instead, `<|endoftext|>`.
    """
    before = [Said(t) for t in ([tokenizer.sot_prev, *prompt] if prompt else [])]
    if not window.sentences and window.cut is None:
        forced = tokenizer.timestamp_begin if timestamps else tokenizer.no_timestamps
        given = [Said(tokenizer.sot), Said(forced)]
        said = [Said(tokenizer.no_speech), Said(tokenizer.eot)]
    else:
        if timestamps:
            text = stamped(window.sentences, tokenizer)
            if window.cut is not None:
                text.append(stamp(window.cut, tokenizer))
            latest = tokenizer.timestamp_begin + round(MAX_INITIAL_TIMESTAMP / 0.02)
            text[0] = replace(text[0], token=min(text[0].token, latest))
        else:
            text = [Said(tokenizer.no_timestamps)]
            text += [said for s in window.sentences for said in spoken(s, tokenizer)]
        given, said = [Said(tokenizer.sot), *text], [*text, Said(tokenizer.eot)]
    return before + given, [Said(IGNORED)] * len(before) + said


@dataclass
class Lines:
    """The decoder's side of a batch: tokens and targets (B, n) rows of the compact table, IGNORED
    where there is no loss; given_at and said_at (B, n): when they are spoken, in seconds, NaN where
    they are not."""

    tokens: Tensor
    targets: Tensor
    given_at: Tensor
    said_at: Tensor


@dataclass
class Batch:
    """mel (B, 80, frames) float32; characters and words: the CTC targets, end to end, with their
    lengths."""

    mel: Tensor
    lines: Lines
    characters: Tensor
    character_lengths: Tensor
    words: Tensor
    word_lengths: Tensor
    decoder: bool


class Batches:
    """The batch of a step, from the corpus, the seed and the step alone."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int):
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.row = {t: i for i, t in enumerate(used_tokens(tokenizer))} | {IGNORED: IGNORED}
        self.words = [t for t in self.row if 0 <= t < tokenizer.eot]

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"batch/{self.seed}/{step}")
        _, decoder, lengths = next(phase for phase in CURRICULUM if step < phase[0])
        seconds, size, _ = rng.choices(lengths, [share for *_, share in lengths])[0]
        windows = [compose(self.corpus, rng, seconds) for _ in range(size)]
        texts = [" ".join([*(s[0] for s in w.sentences), w.cut_text]).strip() for w in windows]
        characters = [[1 + CTC_ALPHABET.index(c) for c in text.lower()] for text in texts]
        words = [self.words_of(window) for window in windows]
        lines = self.lines(windows, rng, seconds, MISHEARD if step >= LATER else 0.0)
        return Batch(
            torch.stack([w.mel(rng) for w in windows]),
            lines,
            torch.tensor([c for row in characters for c in row]),
            torch.tensor([len(row) for row in characters]),
            torch.tensor([w for row in words for w in row]),
            torch.tensor([len(row) for row in words]),
            decoder,
        )

    def lines(
        self,
        windows: Sequence[Window],
        rng: random.Random,
        seconds: float,
        misheard: float,
        prompted: float | None = None,
    ) -> Lines:
        """What the decoder is given of these windows, and what it has to say.

        misheard : the share of wrong words among those that it is given
        prompted : the share of batches after previous texts of up to 60 sentences, of which the
            last 223 tokens count, wrong in places and with tokens that come again and again, as a
            decoder leaves them that lost its way; None: fewer, shorter and right ones
        """
        tokens: list[Tensor] = []
        targets: list[Tensor] = []
        given_at: list[Tensor] = []
        said_at: list[Tensor] = []
        # All of a batch or none, or the short ones would be filled up to the long ones.
        before = prompted is not None and rng.random() < prompted
        for window in windows:
            # Without timestamps a cut sentence has no name: half of all, about, are without.
            timestamps = window.cut is not None or rng.random() < 0.3
            prompt = None
            if before:
                prompt = prompt_of(self.corpus, self.tokenizer, rng, timestamps, 60)
                prompt = [self.misheard(Said(t), rng, misheard).token for t in prompt]
                if rng.random() < LOOPS:
                    prompt = looped(prompt, rng)
            elif prompted is None and rng.random() < (
                0.3 if seconds > 8 else 0.1 if seconds > 4 else 0
            ):
                prompt = prompt_of(self.corpus, self.tokenizer, rng, timestamps)
            given, said = tokens_of(window, self.tokenizer, timestamps, prompt)
            if misheard:
                given = [self.misheard(t, rng, misheard) for t in given]
            if prompted is not None:
                given, said = self.stuttered(given, said, rng)
            tokens.append(torch.tensor([self.row[t.token] for t in given]))
            targets.append(torch.tensor([self.row[t.token] for t in said]))
            for times, sequence in ((given_at, given), (said_at, said)):
                times.append(torch.tensor([math.nan if t.at is None else t.at for t in sequence]))
        longest = max(map(len, tokens))
        assert longest <= DIMS.n_text_ctx, f"a line of {longest} tokens"
        pad = nn.utils.rnn.pad_sequence
        return Lines(
            pad(tokens, batch_first=True, padding_value=0),
            pad(targets, batch_first=True, padding_value=IGNORED),
            pad(given_at, batch_first=True, padding_value=math.nan),
            pad(said_at, batch_first=True, padding_value=math.nan),
        )

    def misheard(self, said: Said, rng: random.Random, share: float) -> Said:
        """Some words replaced by any other: the decoder must go on where it was after a mistake of
        its own, and not where it finds the mistaken word."""
        if said.token >= self.tokenizer.eot or rng.random() >= share:
            return said
        return replace(said, token=rng.choice(self.words))

    def stuttered(
        self, given: list[Said], said: list[Said], rng: random.Random
    ) -> tuple[list[Said], list[Said]]:
        """Now and then the last one to ten words given once more, without loss until the last of
        them: whoever began to repeat must come back to where the recording is."""
        more, targets, run = [], [], 0  # run: words that were given in a row
        for token, target in zip(given, said, strict=True):
            more.append(token)
            targets.append(target)
            run = run + 1 if token.token < self.tokenizer.eot and target.token != IGNORED else 0
            if run and rng.random() < STUTTER:
                count = rng.randint(1, min(10, run))
                more += more[-count:]
                targets += [Said(IGNORED)] * (count - 1) + [target]
        return more, targets

    def words_of(self, window: Window) -> list[int]:
        """The rows of the words heard, + 1; of a cut sentence those before the word that is cut."""
        texts = [text for text, _, _ in window.sentences]
        texts.append(window.cut_text.rpartition(" ")[0])
        tokens = [self.tokenizer.encode(" " + text) for text in texts if text]
        return [1 + self.row[t] for row in tokens for t in row]


def by_ctc(logits: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC of logits (B, frames, classes), 0 the blank; targets end to end."""
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    lengths = torch.full((logits.shape[0],), logits.shape[1])
    return F.ctc_loss(log_probs, targets, lengths, target_lengths, zero_infinity=True)


class Trainee(nn.Module):
    """`whisper.Whisper` with the compact vocabulary, and the CTC heads that training alone uses."""

    basis: Tensor

    def __init__(self, n_used: int, n_words: int):
        super().__init__()
        # Rows of words and special tokens, one that all timestamps share, one of all unused tokens.
        self.whisper = Whisper(replace(DIMS, n_vocab=n_used - STAMPS + 2))
        self.ctc = nn.Linear(DIMS.n_audio_state, len(CTC_ALPHABET) + 1)
        self.words = nn.Linear(DIMS.n_audio_state, n_words + 1)
        nn.init.zeros_(self.words.weight)  # no shock for what has been learnt when it comes in
        nn.init.zeros_(self.words.bias)
        nn.init.constant_(self.words.bias[:1], RARE)  # the blank
        # Rows of length 1, so that the image, from nothing at first, moves like the other rows.
        basis = sinusoids(STAMPS, DIMS.n_text_state) / (DIMS.n_text_state / 2) ** 0.5
        self.register_buffer("basis", basis, persistent=False)
        self.clock = nn.Parameter(torch.zeros(DIMS.n_text_state, DIMS.n_text_state))
        self.positions = self.whisper.encoder.positional_embedding
        nn.init.normal_(self.whisper.decoder.token_embedding.weight, std=0.02)
        nn.init.normal_(self.whisper.decoder.positional_embedding, std=0.01)
        self.log_unused = math.log(DIMS.n_vocab - n_used)
        self.queries: dict[int, Tensor] = {}  # what the cross-attentions were asked, by layer
        for layer, block in enumerate(self.whisper.decoder.blocks):
            block.cross_attn.register_forward_pre_hook(partial(self._see, layer))

    def token_embedding(self) -> Tensor:
        """The decoder's rows: of every used token, and last that of all unused ones."""
        rows = self.whisper.decoder.token_embedding.weight
        others, stamp, unused = rows.split([len(rows) - 2, 1, 1])
        return torch.cat([others, stamp + self.basis @ self.clock, unused])

    def set_stamps(self, rows: Tensor) -> None:
        """The timestamps' rows (1501, 384), as nearly as what they share can have them."""
        shared = rows.mean(0)
        self.whisper.decoder.token_embedding.weight.data[-2] = shared
        fitted = torch.linalg.lstsq(self.basis, rows - shared, rcond=1e-3, driver="gelsd")
        self.clock.data = fitted.solution

    def _see(self, layer: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.queries[layer] = inputs[0]

    def looks_elsewhere(self, layer: int, features: Tensor, at: Tensor) -> Tensor:
        """- log of the share of head 0's cross-attention within NEAR seconds of `at`, the mean."""
        attention = self.whisper.decoder.blocks[layer].cross_attn
        width = DIMS.n_text_state // DIMS.n_text_head
        query, key = attention.query, attention.key  # of head 0 alone
        q = F.linear(self.queries[layer], query.weight[:width], query.bias[:width])
        k = F.linear(features.detach(), key.weight[:width])
        scores = (q @ k.transpose(1, 2)).float() * width**-0.5  # (B, n, frames)
        seconds = 0.02 * torch.arange(k.shape[1])
        near = (seconds - at[..., None]).abs() <= NEAR  # nowhere where `at` is NaN
        known = near.any(-1)
        inside = scores.masked_fill(~near, -math.inf)[known].logsumexp(-1)
        return (scores[known].logsumexp(-1) - inside).sum() / known.sum().clamp(min=1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """cross_entropy, ctc and words, means over tokens, characters and words, and alignment; ctc
        alone of a batch that the decoder does not learn from."""
        encoder = self.whisper.encoder
        frames = batch.mel.shape[-1] // 2
        encoder.positional_embedding = self.positions[:frames]
        features = encoder(batch.mel)
        encoder.positional_embedding = self.positions  # whole again, for the checkpoint
        losses = {"ctc": by_ctc(self.ctc(features), batch.characters, batch.character_lengths)}
        if batch.decoder:
            losses["words"] = by_ctc(self.words(features), batch.words, batch.word_lengths)
            losses |= self.decode(features, batch.lines)
        return losses

    def decode(self, features: Tensor, lines: Lines) -> dict[str, Tensor]:
        """The decoder's losses on features (B, frames, 384): cross_entropy and alignment."""
        rows = {"token_embedding.weight": self.token_embedding()}
        logits = functional_call(self.whisper.decoder, rows, (lines.tokens, features)).float()
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + self.log_unused], dim=-1)
        cross_entropy = F.cross_entropy(
            logits.flatten(0, 1), lines.targets.flatten(), ignore_index=IGNORED
        )
        last = DIMS.n_text_layer - 1
        alignment = self.looks_elsewhere(last, features, lines.said_at)
        for layer in range(last):
            alignment = alignment + self.looks_elsewhere(layer, features, lines.given_at)
        return {"cross_entropy": cross_entropy, "alignment": alignment / DIMS.n_text_layer}

    def take_over(self, checkpoint: weights.Checkpoint, used: list[int]) -> None:
        """Start from an earlier `demo`: every tensor, and the rows of the tokens that it knew; of
        the timestamps' what they share. If its decoder had fewer layers, its last one stays the
        last, and those before it that are new add nothing at first."""
        tensors = {name: t.float() for name, t in checkpoint.tensors.items()}
        blocks = self.whisper.decoder.blocks
        if checkpoint.dims.n_text_layer > len(blocks):
            raise SystemExit(
                f"train: {checkpoint.source.name} has {checkpoint.dims.n_text_layer} decoder "
                f"layers, {len(blocks)} at most are expected"
            )
        was, last = f"decoder.blocks.{checkpoint.dims.n_text_layer - 1}.", len(blocks) - 1
        tensors = {
            f"decoder.blocks.{last}." + name.removeprefix(was) if name.startswith(was) else name: t
            for name, t in tensors.items()
        }
        for layer in range(checkpoint.dims.n_text_layer - 1, last):
            for part in (
                blocks[layer].attn.out,
                blocks[layer].cross_attn.out,
                blocks[layer].mlp[2],
            ):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
            added = blocks[layer].state_dict().items()
            tensors |= {f"decoder.blocks.{layer}.{name}": t for name, t in added}
        table = tensors.pop("decoder.token_embedding.weight")
        missing, unexpected = self.whisper.load_state_dict(tensors, strict=False)
        if missing != ["decoder.token_embedding.weight"] or unexpected:
            raise SystemExit(
                f"train: {checkpoint.source.name} does not fit: {missing} {unexpected}"
            )
        unused = table[-1]  # of a timestamp past 30 s, or of any token that it never said
        shared = (table == table.mode(dim=0).values).all(dim=1)
        with torch.no_grad():
            rows = self.whisper.decoder.token_embedding.weight
            for i, token in enumerate(used[:-STAMPS]):
                if not shared[token]:
                    rows[i] = table[token]
            self.set_stamps(table[used[-STAMPS:]])
            rows[-1] = table[shared.nonzero()[0, 0]] if shared.any() else unused


def learning_rate(step: int, steps: int, decay: int) -> float:
    """Linear warm-up, the peak, half of it later, and a linear fall to zero over the last `decay`
    steps."""
    return (LATER_LR if step >= LATER else PEAK_LR) * min(
        1.0, (step + 1) / WARMUP, (steps - step) / max(1, decay)
    )


def write_losses(
    log: TextIO, step: int, losses: Sequence[dict[str, float]], seconds: float
) -> None:
    """One row of losses.jsonl, the means of the last steps; None of what none of them had."""
    row: dict[str, float | None] = {"step": step}
    for name in WEIGHTS:
        known = [own[name] for own in losses if name in own]
        row[name] = round(sum(known) / len(known), 4) if known else None
    row["seconds"] = round(seconds, 1)
    log.write(json.dumps(row) + "\n")
    log.flush()
    print(row, file=sys.stderr)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The whole file or nothing."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.train", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("build/demo/run"))
    parser.add_argument("--init", help="an earlier demo.safetensors to start from")
    parser.add_argument("--steps", type=int, default=9900)
    parser.add_argument("--decay", type=int, default=1800, help="steps over which the rate falls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast (needs AMX to pay)")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args(argv)

    torch.set_flush_denormal(True)  # else the sharp softmax of attention makes its gradient slow
    torch.manual_seed(args.seed)
    tokenizer = get_tokenizer(multilingual=False)
    corpus = Corpus(args.data, "train")
    batches = Batches(corpus, tokenizer, args.seed)
    used = used_tokens(tokenizer)
    model = Trainee(len(used), sum(token < tokenizer.eot for token in used))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    args.out.mkdir(parents=True, exist_ok=True)
    newest, stable = args.out / "checkpoint.pt", args.out / "stable.pt"
    falling, first = args.steps - args.decay, 0
    if newest.exists():
        state = torch.load(newest, weights_only=True)
        if state["step"] > state["falling"] and state["falling"] < falling:
            state = torch.load(stable, weights_only=True)  # more steps are wanted after a fall
        if state["seed"] != args.seed:
            print(f"train: {newest} was trained with seed {state['seed']}", file=sys.stderr)
            return 1
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    elif args.init:
        model.take_over(weights.load(args.init, offline=True), used)
    hours = corpus.seconds.sum() / 3600
    print(
        f"train: {len(corpus.rows)} utterances, {hours:.1f} h, {len(used)} tokens, "
        f"from step {first} to {args.steps}",
        file=sys.stderr,
    )

    began = time.monotonic()
    losses: list[dict[str, float]] = []  # of the last steps
    with open(args.out / "losses.jsonl", "a") as log:
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.decay)
            batch = batches(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                found = model(batch)
                loss = sum(WEIGHTS[name] * value for name, value in found.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append({name: value.item() for name, value in found.items()})
            if (step + 1) % 20 == 0:
                write_losses(log, step + 1, losses, time.monotonic() - began)
                losses.clear()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "falling": falling,
                    "seed": args.seed,
                    "dims": asdict(DIMS),
                }
                save_state(newest, state)
                if step + 1 <= falling:
                    shutil.copyfile(newest, stable.with_suffix(".tmp"))
                    stable.with_suffix(".tmp").replace(stable)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
