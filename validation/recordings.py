"""What the fault bench listens to: recordings of at most 30 s, one window of the encoder each, with
what is said in them where that is known.

They are always the same: cut from `samples/`, cut from the files that are given, or made from those
by a seed. Sound is float32 (samples,) at 16 kHz, mono.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from whisper.audio import HOP_LENGTH, N_SAMPLES

from encoder.audio import SAMPLE_RATE, load_audio, require_file
from validation.inputs import at_level, band, noisy, pink

SAMPLES = Path(__file__).parent.parent / "samples"
FEWEST = 12  # bundled recordings, at least
PIECE = 20  # seconds of a long recording that make one of ours, about
SHORTEST = 12  # seconds of single sentences that make one, at least; fewer only if they are
CLIPS = (3, 5)  # so many sentences, at least and at most
WINDOW = N_SAMPLES / SAMPLE_RATE  # 30 s
AUDIBLE = 0.1  # of the loudest sample: with less, the last sound has faded out
TWO_WINDOWS = 45  # seconds
SLOWEST = 0.85  # speed of a variant; it makes more of a recording than 3 s of silence before it


class RecordingsError(Exception):
    """There is no such recording; the message is one sentence."""


@dataclass(frozen=True)
class Recording:
    """`audio` of at most 30 s, but from `joined`; `text` is what is said in the whole of it.

    clips  the recordings that it is put together of, by name; itself where it is not
    """

    name: str
    audio: np.ndarray
    text: str | None
    parts: tuple[str, ...] = ()

    @property
    def clips(self) -> tuple[str, ...]:
        return self.parts or (self.name,)

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLE_RATE

    @property
    def words(self) -> int | None:
        return None if self.text is None else len(self.text.split())

    @property
    def sha256(self) -> str:
        """Of the float32 samples."""
        return hashlib.sha256(np.ascontiguousarray(self.audio).tobytes()).hexdigest()


def bundled(folder: Path = SAMPLES) -> list[Recording]:
    """At least FEWEST recordings made of those that `samples.json` in `folder` lists.

    A recording with the times of its sentences is cut between them into pieces of about 20 s; those
    of one sentence are joined in the order of the list, and, as long as there are too few, in other
    orders. The first one is `filled`: of the first sentences of a long recording, or of the first
    clips where there is none. Raises RecordingsError or AudioError.
    """
    listed = folder / "samples.json"
    if not listed.is_file():
        raise RecordingsError(f"there are no bundled recordings ({listed}): name audio files")
    rows: list[dict[str, Any]] = json.loads(listed.read_text(encoding="utf-8"))
    found: list[Recording] = []
    clips: list[Recording] = []
    for row in rows:
        audio = load_audio(folder / row["file"])
        if "sentences" in row:
            found += pieces(Path(row["file"]).stem, audio, row["sentences"])
        else:
            clips.append(Recording(row["file"], audio, row["text"]))
    if not found and clips:
        fit = sum(seconds <= WINDOW for seconds in accumulate(clip.seconds for clip in clips))
        found.append(filled("clips-1", end_to_end("", clips[: max(1, fit)])))
    for number, order in enumerate(orders(len(clips))):
        if number > 0 and len(found) >= FEWEST:
            break
        for group in groups([clip.seconds for clip in clips], order):
            if number == 0 or len(found) < FEWEST:
                name = f"clips-{1 + sum(r.name.startswith('clips-') for r in found)}"
                found.append(end_to_end(name, [clips[i] for i in group]))
    if len(found) < FEWEST:
        raise RecordingsError(f"{listed} is enough for {len(found)} recordings, expected {FEWEST}")
    for recording in found:
        if len(recording.audio) > N_SAMPLES:
            raise RecordingsError(f"{recording.name} is {recording.seconds:.1f} s long, at most 30")
    return found


def pieces(name: str, audio: np.ndarray, sentences: Sequence[Mapping[str, Any]]) -> list[Recording]:
    """The first sentences that 30 s hold, `filled`, and the rest cut in the pauses that are nearest
    to equal parts of about PIECE seconds."""
    total = len(audio) / SAMPLE_RATE
    pauses = [(a["end"] + b["start"]) / 2 for a, b in pairwise(sentences)]
    first = max(1, sum(s["end"] - sentences[0]["start"] <= WINDOW for s in sentences))
    began = [*pauses, total][first - 1]
    count = max(1, round((total - began) / PIECE))
    later = [pause for pause in pauses if pause > began]
    wanted = [began + (total - began) * i / count for i in range(1, count)]
    cuts = sorted({min(later, key=lambda pause: abs(pause - at)) for at in wanted if later})

    def cut(number: int, start: float, end: float) -> Recording:
        text = " ".join(s["text"] for s in sentences if start <= s["start"] < end)
        part = audio[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        return Recording(f"{name}-{number}", part, text)

    found = [filled(f"{name}-1", cut(1, 0.0, began))]
    if began < total:
        ends = pairwise([began, *cuts, total])
        found += [cut(i, start, end) for i, (start, end) in enumerate(ends, 2)]
    return found


def filled(name: str, recording: Recording) -> Recording:
    """30 s that end with the last sound of the recording, which is cut off in front or preceded by
    silence: the window is full to its end, as in the midst of a longer recording."""
    return replace(recording, name=name, audio=to_the_end(recording.audio))


def to_the_end(audio: np.ndarray) -> np.ndarray:
    """30 s, of which the last sound is the end."""
    loud = np.flatnonzero(np.abs(audio) >= AUDIBLE * np.abs(audio).max())
    sound = audio[: loud[-1] + 1][-N_SAMPLES:]
    return np.pad(sound, (N_SAMPLES - len(sound), 0))


def orders(n: int) -> list[list[int]]:
    """Orders of `n` things, the natural one first, then those that leap by another step."""
    steps = [step for step in range(1, n + 1) if math.gcd(step, n) == 1 and (step < n or n == 1)]
    return [[(start + i * step) % n for i in range(n)] for start in range(n) for step in steps]


def groups(seconds: Sequence[float], order: Sequence[int]) -> list[list[int]]:
    """The things in this order, as many at a time as make a recording; without what is left."""
    fewest, most = CLIPS
    found: list[list[int]] = []
    group: list[int] = []
    for i in order:
        group.append(i)
        long = len(group) >= fewest and sum(seconds[k] for k in group) >= SHORTEST
        if long or len(group) == most:
            found.append(group)
            group = []
    return found


def end_to_end(name: str, recordings: Sequence[Recording]) -> Recording:
    """One after the other, with the pauses that they have; a text only where all have one."""
    texts = [recording.text for recording in recordings]
    text = None if None in texts else " ".join(str(text) for text in texts)
    clips = tuple(clip for recording in recordings for clip in recording.clips)
    return Recording(name, np.concatenate([r.audio for r in recordings]), text, clips)


def joined(recordings: Sequence[Recording], i: int, seconds: float = TWO_WINDOWS) -> Recording:
    """Recording `i` and those after it, after the last the first again, end to end until they are
    at least so long: more than one window."""
    chosen: list[Recording] = []
    while sum(r.seconds for r in chosen) < seconds:
        chosen.append(recordings[(i + len(chosen)) % len(recordings)])
    return end_to_end(recordings[i].name, chosen)


def from_files(paths: Sequence[str], truth: Mapping[str, str] | None = None) -> list[Recording]:
    """The first 30 s of each file; of a longer one the text is left aside, since nobody knows which
    of its words were cut off. `truth` by path, as `encoder.truth.read_truth` gives it.

    Raises RecordingsError or AudioError. All are looked for before any is decoded.
    """
    names = [Path(path).name for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecordingsError(f"{twice[0]} is named twice")
    for path in paths:
        require_file(path)
    found = []
    for path, name in zip(paths, names, strict=True):
        audio = load_audio(path)
        if len(audio) < HOP_LENGTH:
            raise RecordingsError(f"{path} is shorter than 10 ms")
        text = (truth or {}).get(path) if len(audio) <= N_SAMPLES else None
        found.append(Recording(name, audio[:N_SAMPLES], text))
    return found


# Variants: the same words, recorded otherwise. Each draws its own figures and says them.

Change = Callable[[np.ndarray, np.random.Generator], tuple[str, np.ndarray]]


def quieter(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    db = rng.uniform(6, 30)
    return f"{db:.1f} dB quieter", audio * 10 ** (-db / 20)


def white_noise(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    snr = rng.uniform(5, 30)
    return f"white noise {snr:.1f} dB below", noisy(audio, snr, int(rng.integers(2**31)))


def pink_noise(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    snr = rng.uniform(5, 30)
    level = 10 * math.log10(float(np.mean(np.square(audio))))
    noise = at_level(pink(len(audio), int(rng.integers(2**31))), level - snr)
    return f"pink noise {snr:.1f} dB below", audio + noise


def telephone(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    low, high = rng.uniform(200, 400), rng.uniform(3000, 3600)
    return f"{low:.0f} to {high:.0f} Hz", band(audio, low, high)


def at_speed(audio: np.ndarray, factor: float) -> np.ndarray:
    """Played `factor` times as fast, pitch and all, by band-limited resampling."""
    samples = round(len(audio) / factor)
    return np.fft.irfft(np.fft.rfft(audio), samples) * (samples / len(audio))


def slower(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    changed = at_speed(audio, rng.uniform(SLOWEST, 0.95))
    return f"at {len(audio) / len(changed):.3f} of the speed", changed


def faster(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    changed = at_speed(audio, rng.uniform(1.05, 1.15))
    return f"at {len(audio) / len(changed):.3f} of the speed", changed


def later(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    silence = round(rng.uniform(0.5, 3) * SAMPLE_RATE)
    return f"after {silence / SAMPLE_RATE:.2f} s of silence", np.pad(audio, (silence, 0))


def last(audio: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    db = rng.uniform(0, 6)
    return f"the last of 30 s, {db:.1f} dB quieter", to_the_end(audio) * 10 ** (-db / 20)


CHANGES: tuple[Change, ...] = (quieter, white_noise, pink_noise, telephone, faster)
LONGER: tuple[Change, ...] = (slower, later, last)


def variants(recording: Recording, n: int, seed: int = 0) -> list[Recording]:
    """`n` recordings of the same words: first the recording itself, then changed ones, by `seed`.
    None is longer than 30 s: where there is no room, none is made longer. Raises RecordingsError on
    silence, of which no variant can be made."""
    if n < 1:
        raise ValueError(f"{n} variants are asked for, expected 1 or more")
    if not recording.audio.any():
        raise RecordingsError(f"{recording.name} is silent: it has no variants")
    rng = np.random.default_rng(seed)
    audio = recording.audio.astype(np.float64)
    changes = CHANGES + LONGER if len(audio) <= SLOWEST * N_SAMPLES else CHANGES
    found = [recording]
    for i in range(1, n):
        label, changed = changes[(i - 1) % len(changes)](audio, rng)
        sound = np.clip(changed, -1, 1).astype(np.float32)
        name = f"{recording.name} {i + 1}: {label}"
        found.append(Recording(name, sound, recording.text, recording.clips))
    return found
