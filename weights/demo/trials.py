"""The recordings that `demo` is evaluated on, made from the held-out corpus and the seed alone.

No training example is in them: a sentence that training holds too is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weights.demo.samples import LECTURE_SECONDS, with_pauses
from weights.demo.speech import SAMPLE_RATE, VOICES, resample
from weights.demo.train import WINDOW, Corpus, noise_of

SEED = 1
PEAK = 0.5  # of a recording, as a share of full scale
NOISES = ("white", "pink")
QUIET, LOUD = -60.0, -20.0  # dB under full scale, root mean square, of what holds no speech


@dataclass(frozen=True)
class Sentence:
    """What is said, and when, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Recording:
    """float32 samples at 16 kHz, what is said in them, and what they are told apart by."""

    name: str
    samples: np.ndarray
    sentences: list[Sentence]
    voice: str = ""
    noise: str = ""

    @property
    def text(self) -> str:
        return " ".join(s.text for s in self.sentences)


def level(samples: np.ndarray) -> np.ndarray:
    """The samples with a peak of PEAK."""
    return (samples * (PEAK / np.abs(samples).max())).astype(np.float32)


def window(
    corpus: Corpus, rows: Iterable[int], rng: random.Random
) -> tuple[np.ndarray, list[Sentence]]:
    """30 s of the given utterances, as many as fit: pauses of 0.15 to 1 s, silence at the end."""
    samples = np.zeros(round(WINDOW * SAMPLE_RATE), np.float32)
    at, sentences = rng.uniform(0.0, 0.9), []
    for i in rows:
        end = at + corpus.seconds[i]
        if end > WINDOW:
            break
        start = round(at * SAMPLE_RATE)
        audio = corpus.audio(i)[: len(samples) - start]
        samples[start : start + len(audio)] = audio
        sentences.append(Sentence(corpus.text[i], at, end))
        at = end + rng.uniform(0.15, 1.0)
    return level(samples), sentences


def windows(corpus: Corpus, held_out: list[int], count: int) -> list[Recording]:
    """`count` clean windows, the voices in turn, every voice through all its sentences before one
    comes again."""
    made: list[Recording] = []
    queues: dict[str, list[int]] = {voice: [] for voice in VOICES}
    for n in range(count):
        voice = VOICES[n % len(VOICES)]
        rng = random.Random(f"evaluate/window/{SEED}/{n}")
        queue = queues[voice]
        while sum(corpus.seconds[i] for i in queue) < WINDOW:
            again = [i for i in held_out if corpus.voice[i] == voice]
            if not again:
                raise SystemExit(f"evaluate: the corpus has no held-out sentence by {voice}")
            rng.shuffle(again)
            queue += again
        samples, sentences = window(corpus, queue, rng)
        del queue[: len(sentences)]
        made.append(Recording(f"window {n}", samples, sentences, voice))
    return made


def noisy(clean: Recording, snr_db: float, number: int, corpus: Corpus) -> Recording:
    """White or pink noise at `snr_db` under the mean power of the speech, its pauses left out.

    Which of the two: in turn, and every voice gets both.
    """
    kind = NOISES[(number + number // len(VOICES)) % len(NOISES)]
    spoken = clean.samples[np.abs(clean.samples) > 1e-3]
    power = float(np.mean(spoken.astype(np.float64) ** 2))
    noise = noise_of(kind, len(clean.samples), 1000 * SEED + number, corpus)
    samples = level(clean.samples + noise * float(np.sqrt(power)) * 10 ** (-snr_db / 20))
    return Recording(f"{clean.name}, {snr_db:g} dB", samples, clean.sentences, clean.voice, kind)


def long_recording(corpus: Corpus, held_out: list[int]) -> Recording:
    """LECTURE_SECONDS of held-out sentences in random order, pauses of about 0.6 s."""
    rng = random.Random(f"evaluate/long/{SEED}")
    rows: list[int] = []
    for i in rng.sample(held_out, len(held_out)):
        if sum(corpus.seconds[j] + 0.6 for j in [*rows, i]) + 0.6 > LECTURE_SECONDS:
            break
        rows.append(i)
    pauses = [rng.uniform(0.35, 0.85) for _ in range(len(rows) + 1)]
    clips = [corpus.audio(i) for i in rows]
    samples, starts = with_pauses(clips, pauses, round(LECTURE_SECONDS * SAMPLE_RATE))
    sentences = [
        Sentence(corpus.text[i], start / SAMPLE_RATE, (start + len(clip)) / SAMPLE_RATE)
        for i, start, clip in zip(rows, starts, clips, strict=True)
    ]
    return Recording("held-out recording", level(samples), sentences)


def lecture(folder: Path) -> Recording:
    """samples/lecture.flac as it is, with its sentences from samples.json."""
    rows = json.loads((folder / "samples.json").read_text())
    (row,) = (row for row in rows if row["file"] == "lecture.flac")
    sentences = [Sentence(s["text"], s["start"], s["end"]) for s in row["sentences"]]
    samples = resample((folder / row["file"]).read_bytes()).astype(np.float32) / 32768
    return Recording("lecture", samples, sentences)


def nothing(corpus: Corpus) -> list[Recording]:
    """30 s each of digital silence, white noise, pink noise and hum, at two levels."""
    count = round(WINDOW * SAMPLE_RATE)
    made = [Recording("silence", np.zeros(count, np.float32), [])]
    for number, kind in enumerate((*NOISES, "hum")):
        noise = noise_of(kind, count, 2000 * SEED + number, corpus)
        for db in (QUIET, LOUD):
            name = f"{'hum' if kind == 'hum' else kind + ' noise'} at {db:g} dB"
            made.append(Recording(name, noise * np.float32(10 ** (db / 20)), [], noise=kind))
    return made
