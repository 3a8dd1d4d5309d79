"""The calibration's audio: what each input's name says, always the same, and never by accident."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SAMPLES

from encoder.audio import SAMPLE_RATE, load_audio, windows
from validation.inputs import N_SAMPLES, at_level, band, inputs, loop, pink, varied, white

RATE = SAMPLE_RATE


def db(audio: np.ndarray) -> float:
    """RMS in dB of full scale."""
    return float(10 * np.log10(np.mean(np.square(audio, dtype=np.float64))))


def energy(audio: np.ndarray, low: float, high: float) -> float:
    """The share of the energy between two frequencies in Hz."""
    power = np.abs(np.fft.rfft(audio.astype(np.float64))) ** 2
    frequency = np.fft.rfftfreq(len(audio), 1 / RATE)
    return float(power[(frequency >= low) & (frequency <= high)].sum() / power.sum())


@pytest.fixture(scope="module")
def speech() -> dict[str, np.ndarray]:
    names = ("demo.flac", "flite-slt.flac")
    return {name: load_audio(SAMPLES / name) for name in names}


@pytest.fixture(scope="module")
def made(speech) -> dict[str, np.ndarray]:
    return inputs(speech)


def test_at_least_twenty_of_the_right_form(made, speech):
    assert len(made) >= 20 + len(speech)
    assert list(made)[: len(speech)] == list(speech)
    for name, audio in made.items():
        assert audio.dtype == np.float32, name
        assert audio.ndim == 1, name
        assert RATE <= len(audio) <= N_SAMPLES, name
        assert np.isfinite(audio).all(), name
        assert np.abs(audio).max() <= 1, name
        assert windows(audio, 80).shape == (1, 80, 3000), name


def test_one_recording_is_enough(speech):
    one = inputs({"demo.flac": speech["demo.flac"]})
    assert len(one) >= 21


def test_they_are_always_the_same_and_none_twice(made, speech):
    again = inputs(speech)
    assert list(again) == list(made)
    for name in made:
        assert np.array_equal(made[name], again[name]), name
    assert len({audio.tobytes() for audio in made.values()}) == len(made)


def test_the_given_audio_is_left_alone(speech):
    before = {name: audio.copy() for name, audio in speech.items()}
    found = inputs(speech)
    varied(speech["demo.flac"], 1)
    for name, audio in speech.items():
        assert np.array_equal(audio, before[name])
        assert np.array_equal(found[name], audio[:N_SAMPLES])


def test_silence_and_noise(made):
    assert not made["digital silence"].any()
    for name, level in (
        ("white noise, -20 dB", -20),
        ("white noise, -40 dB", -40),
        ("white noise, -70 dB", -70),
        ("pink noise, -20 dB", -20),
        ("pink noise, -50 dB", -50),
    ):
        assert db(made[name]) == pytest.approx(level, abs=0.01), name
    octaves = [(250, 500), (500, 1000), (1000, 2000), (2000, 4000)]
    white_shares = [energy(made["white noise, -20 dB"], *o) for o in octaves]
    assert white_shares == pytest.approx([1 / 32, 1 / 16, 1 / 8, 1 / 4], rel=0.05)
    pink_shares = [energy(made["pink noise, -20 dB"], *o) for o in octaves]
    assert pink_shares == pytest.approx([np.mean(pink_shares)] * 4, rel=0.05)


def test_lengths(made):
    assert len(made["speech, 1 s"]) == RATE
    assert len(made["speech, 29.99 s"]) == 479_840
    assert np.abs(made["speech, 1 s"]).max() == np.abs(made["demo.flac"]).max()


def test_speech_made_worse(made):
    demo = made["demo.flac"].astype(np.float64)
    clipped = made["speech, clipped"]
    assert np.abs(clipped).max() == np.float32(0.9)
    assert np.mean(np.abs(clipped) == np.float32(0.9)) > 0.01
    assert db(made["speech, -60 dB"]) == pytest.approx(-60, abs=0.01)
    assert np.array_equal(made["speech, reversed"], made["demo.flac"][::-1])
    assert made["speech, with an offset"].mean() == pytest.approx(0.4, abs=0.01)
    for name, snr in (
        ("speech, noise 20 dB below", 20),
        ("speech, noise 10 dB below", 10),
        ("speech, noise at its level", 0),
    ):
        added = made[name] - demo
        assert db(demo) - db(added) == pytest.approx(snr, abs=0.3), name
    assert energy(made["speech, by telephone"], 300, 3400) > 0.999999
    assert energy(demo, 300, 3400) < 0.99
    assert np.corrcoef(made["speech, by telephone"], band(demo, 300, 3400))[0, 1] > 0.9999


def test_tones(made):
    assert energy(made["hum"], 49, 501) > 0.9999
    assert db(made["hum"]) == pytest.approx(-30, abs=0.01)
    impulses = made["impulses"]
    assert np.count_nonzero(impulses) == 300
    assert (np.diff(np.flatnonzero(impulses)) == 1600).all()
    sweep = made["sine sweep"]
    crossings = np.diff(np.signbit(sweep)).astype(int)
    assert crossings[: 2 * RATE].sum() < 200  # from 20 Hz
    assert crossings[-RATE // 100 :].sum() > 140  # to 8000 Hz, half the rate
    chords = made["chords"]
    assert db(chords) == pytest.approx(-20, abs=0.01)
    early, late = (chords.reshape(-1, RATE // 2)[:, s] for s in (slice(0, 2000), slice(6000, None)))
    assert db(early) > db(late) + 10  # each chord dies away


def test_babble_is_of_all_voices(speech, made):
    """It changes with each voice that is given, and is steadier than one alone."""
    fewer = inputs({"demo.flac": speech["demo.flac"]})
    assert not np.array_equal(fewer["babble"], made["babble"])

    def loudness(audio: np.ndarray) -> np.ndarray:
        whole = audio[: len(audio) // 1600 * 1600].reshape(-1, 1600)
        return np.sqrt((whole.astype(np.float64) ** 2).mean(1))

    one, many = loudness(loop(speech["demo.flac"], N_SAMPLES)), loudness(made["babble"])
    assert many.std() / many.mean() < 0.7 * one.std() / one.mean()


def test_long_speech_is_cut(speech):
    long = {"long.flac": loop(speech["demo.flac"], 45 * RATE)}
    assert len(inputs(long)["long.flac"]) == N_SAMPLES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "at least one recording"),
        ({"short.wav": np.ones(RATE - 1, np.float32)}, r"short\.wav is silent or shorter than 1 s"),
        ({"quiet.wav": np.zeros(RATE, np.float32)}, r"quiet\.wav is silent"),
        ({"babble": np.ones(RATE, np.float32)}, "'babble' is the name of an input"),
    ],
    ids=["none", "short", "silent", "name"],
)
def test_what_is_no_speech_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        inputs(given)


def test_silence_has_no_level():
    with pytest.raises(ValueError, match="silent"):
        at_level(np.zeros(10), -20)


def test_noise_of_another_seed_is_another(made):
    for noise in (white, pink):
        assert np.array_equal(noise(1000, 1), noise(1000, 1))
        assert abs(np.corrcoef(noise(100_000, 1), noise(100_000, 2))[0, 1]) < 0.05


def test_varied_by_seed(made):
    demo = made["demo.flac"]
    found = [varied(demo, seed) for seed in range(10)]
    assert np.array_equal(varied(demo, 3), found[3])
    assert len({audio.tobytes() for audio in found}) == 10
    for audio in found:
        assert audio.dtype == np.float32
        assert audio.shape == demo.shape
        assert np.abs(audio).max() <= 1


def test_varied_in_gain_and_noise(made):
    """Of 100 seeds, both fill their ranges: the gain by what is common, the noise by silence."""
    demo = made["demo.flac"].astype(np.float64)
    silence = np.zeros(len(demo), np.float32)
    gains, noises = [], []
    for seed in range(100):
        noise = varied(silence, seed).astype(np.float64)
        gain = ((varied(demo, seed) - noise) * demo).sum() / (demo**2).sum()
        gains.append(20 * np.log10(gain))
        noises.append(db(noise))
    assert -30.1 <= min(gains) < -27
    assert -3 < max(gains) <= 0.1
    assert -90.1 <= min(noises) < -83
    assert -27 < max(noises) <= -19.9
    assert abs(np.corrcoef(gains, noises)[0, 1]) < 0.3
