"""The audio that the limits are calibrated on: speech, and what is unlike speech; always the same.

Everything is float32 (samples,) at 16 kHz in [-1, 1], 30 s or shorter, and follows from the speech
that is given and from fixed seeds. Levels in dB are of full scale: 0 dB is an RMS of 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from encoder.audio import SAMPLE_RATE

N_SAMPLES = 30 * SAMPLE_RATE  # one window
ALMOST = int(29.99 * SAMPLE_RATE)  # 29.99 s: the last frame of the window is padding
TELEPHONE = (300, 3400)  # Hz

Audio = np.ndarray  # float, (samples,)


def _seconds() -> Audio:
    """The time of each sample of a whole window, in s."""
    return np.arange(N_SAMPLES) / SAMPLE_RATE


def _amplitude(db: float) -> float:
    return float(10 ** (db / 20))


def _rms(audio: Audio) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))


def at_level(audio: Audio, db: float) -> Audio:
    """Scaled to an RMS of `db`; raises ValueError on silence, which has no level."""
    rms = _rms(audio)
    if rms == 0:
        raise ValueError("the audio is silent: it cannot be brought to a level")
    return audio * (_amplitude(db) / rms)


def loop(audio: Audio, samples: int) -> Audio:
    """Repeated, then cut to `samples`."""
    return np.resize(audio, samples)


def white(samples: int, seed: int) -> Audio:
    """Normal noise with an RMS of 1."""
    return np.random.default_rng(seed).standard_normal(samples)


def pink(samples: int, seed: int) -> Audio:
    """Noise whose power falls as 1 / frequency, with an RMS of 1."""
    spectrum = np.fft.rfft(white(samples, seed))
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return at_level(np.fft.irfft(spectrum, samples), 0)


def band(audio: Audio, low: float, high: float) -> Audio:
    """Only the frequencies from `low` to `high` Hz."""
    spectrum = np.fft.rfft(audio)
    frequency = np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    return np.fft.irfft(spectrum, len(audio))


def chords(seed: int) -> Audio:
    """30 s of music's kind: every half second three notes of a chord, each of six harmonics, struck
    and dying away."""
    rng = np.random.default_rng(seed)
    step = SAMPLE_RATE // 2
    t = np.arange(step) / SAMPLE_RATE
    strike = (1 - np.exp(-t / 0.01)) * np.exp(-t / 0.2)
    pieces = []
    for _ in range(N_SAMPLES // step):
        root = 110 * 2 ** (rng.integers(0, 24) / 12)  # Hz
        notes = [root * 2 ** (semitones / 12) for semitones in (0, rng.choice([3, 4]), 7)]
        tones = [
            np.sin(2 * np.pi * note * harmonic * t) / harmonic
            for note in notes
            for harmonic in range(1, 7)
            if note * harmonic < SAMPLE_RATE / 2
        ]
        pieces.append(strike * np.sum(tones, axis=0))
    return at_level(np.concatenate(pieces), -20)


def sweep() -> Audio:
    """A sine from 20 Hz to 8 kHz in 30 s, its pitch rising evenly in octaves."""
    octaves = np.log2(8000 / 20)
    t = _seconds()
    phase = 2 * np.pi * 20 * 30 / (octaves * np.log(2)) * (2 ** (octaves * t / 30) - 1)
    return 0.5 * np.sin(phase)


def impulses() -> Audio:
    """One sample of 0.9 every 0.1 s."""
    train = np.zeros(N_SAMPLES)
    train[:: SAMPLE_RATE // 10] = 0.9
    return train


def hum() -> Audio:
    """50 Hz from the mains with nine overtones, at -30 dB."""
    t = _seconds()
    return at_level(np.sum([np.sin(2 * np.pi * 50 * k * t) / k for k in range(1, 11)], axis=0), -30)


def babble(voices: list[Audio]) -> Audio:
    """Eight voices at once, each at one level and begun at another place."""
    rng = np.random.default_rng(5)
    mixed = np.zeros(N_SAMPLES)
    for i in range(8):
        voice = loop(voices[i % len(voices)], N_SAMPLES)
        mixed += at_level(np.roll(voice, int(rng.integers(0, N_SAMPLES))), 0)
    return at_level(mixed, -20)


def noisy(audio: Audio, snr_db: float, seed: int) -> Audio:
    """White noise added, `snr_db` below the audio's own RMS."""
    return audio + _rms(audio) * _amplitude(-snr_db) * white(len(audio), seed)


def _float32(audio: Audio) -> Audio:
    """As a recording would hold it: clipped at full scale."""
    return np.clip(audio, -1, 1).astype(np.float32)


def inputs(speech: dict[str, Audio]) -> dict[str, Audio]:
    """The calibration's inputs by name: every given recording, then 21 that are made, from the
    first of them or from nothing. `speech` is float32 at 16 kHz; what exceeds 30 s is cut.

    Raises ValueError where no speech is given, or some of it is silent or shorter than 1 s.
    """
    if not speech:
        raise ValueError("the calibration needs at least one recording of speech")
    for name, audio in speech.items():
        if len(audio) < SAMPLE_RATE or _rms(audio) == 0:
            raise ValueError(f"{name} is silent or shorter than 1 s: it is no speech")
    cut = {name: np.asarray(audio[:N_SAMPLES], np.float64) for name, audio in speech.items()}
    first = next(iter(cut.values()))
    loudest = int(np.argmax(np.abs(first)))
    start = min(max(0, loudest - SAMPLE_RATE // 2), len(first) - SAMPLE_RATE)
    made: dict[str, Callable[[], Audio]] = {
        "digital silence": lambda: np.zeros(N_SAMPLES),
        "white noise, -20 dB": lambda: at_level(white(N_SAMPLES, 1), -20),
        "white noise, -40 dB": lambda: at_level(white(N_SAMPLES, 2), -40),
        "white noise, -70 dB": lambda: at_level(white(N_SAMPLES, 3), -70),
        "pink noise, -20 dB": lambda: at_level(pink(N_SAMPLES, 4), -20),
        "pink noise, -50 dB": lambda: at_level(pink(N_SAMPLES, 5), -50),
        "chords": lambda: chords(6),
        "impulses": impulses,
        "sine sweep": sweep,
        "hum": hum,
        "speech, 1 s": lambda: first[start : start + SAMPLE_RATE],
        "speech, 29.99 s": lambda: loop(first, ALMOST),
        "speech, clipped": lambda: np.clip(first * (10 / np.abs(first).max()), -0.9, 0.9),
        "speech, -60 dB": lambda: at_level(first, -60),
        "speech, with an offset": lambda: first / np.abs(first).max() * 0.5 + 0.4,
        "speech, reversed": lambda: first[::-1],
        "speech, noise 20 dB below": lambda: noisy(first, 20, 7),
        "speech, noise 10 dB below": lambda: noisy(first, 10, 8),
        "speech, noise at its level": lambda: noisy(first, 0, 9),
        "speech, by telephone": lambda: band(first, *TELEPHONE),
        "babble": lambda: babble(list(cut.values())),
    }
    if known := sorted(made.keys() & cut.keys()):
        raise ValueError(f"{known[0]!r} is the name of an input that is made")
    return {
        name: _float32(audio) for name, audio in (cut | {k: f() for k, f in made.items()}).items()
    }


def varied(audio: Audio, seed: int) -> Audio:
    """The same audio at another level and with another noise in it: float32, as long as before.

    Gain from -30 to 0 dB, then white noise from -90 to -20 dB, both even in dB and by `seed`.
    """
    rng = np.random.default_rng(seed)
    gain, noise = _amplitude(rng.uniform(-30, 0)), _amplitude(rng.uniform(-90, -20))
    return _float32(audio * gain + noise * rng.standard_normal(len(audio)))
