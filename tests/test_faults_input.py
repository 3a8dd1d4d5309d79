"""Every fault of the input, on short, long and real recordings, is made as declared and called by
its name from the samples; right front ends, noise and unknown mistakes are called nothing. No
encoder runs: what is compared is mel alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from conftest import SAMPLES
from scipy.signal import get_window, resample_poly
from torch import Tensor
from whisper.audio import log_mel_spectrogram, mel_filters, pad_or_trim
from whisper.model import ModelDimensions

from encoder.audio import load_audio, windows
from validation import frontend
from validation.faults import input as of_input
from validation.faults import unseen
from validation.faults.fault import Fault
from validation.fingerprints import Cause, explain
from validation.metrics import relative_l2
from validation.stages import stages

DIMS = ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)
MEL = stages(DIMS)[0]
FAULTS = {fault.key: fault for fault in of_input.FAULTS}
UNSEEN = {fault.key: fault for fault in unseen.FAULTS if fault.how == "input"}

# On these three S05, E02 and E03 change nothing where noted; all else differs everywhere.
UNCHANGED = {
    "demo": ("S05", "E02", "E03"),  # 4 s, which begin in digital silence
    "joined": ("E03",),  # 16 s, which begin in the middle of a word
    "jfk": ("S05", "E02", "E03"),  # 11 s, which begin in digital silence
}
RECORDINGS = list(UNCHANGED)


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray]:
    """By name, float32 at 16 kHz."""
    files = sorted(SAMPLES.glob("*.flac"))
    all_in_one = np.concatenate([load_audio(file) for file in files])
    return {"demo": load_audio(SAMPLES / "demo.flac"), "joined": all_in_one[16_000:272_000]}


@pytest.fixture
def audio(request: pytest.FixtureRequest, samples: dict[str, np.ndarray]) -> np.ndarray:
    """The recording whose name is the parameter; jfk is skipped where there is none."""
    if request.param == "jfk":
        path: Path = request.getfixturevalue("jfk")
        return samples.setdefault("jfk", load_audio(path))
    return samples[request.param]


def on(*recordings: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("audio", recordings, indirect=True)


@pytest.fixture(scope="module")
def rights() -> dict[int, Tensor]:
    return {}


@pytest.fixture
def right(audio: np.ndarray, rights: dict[int, Tensor]) -> Tensor:
    """The reference's mel of the recording, (1, 80, 3000)."""
    if len(audio) not in rights:
        rights[len(audio)] = windows(audio, 80)[:1]
    return rights[len(audio)]


def named(audio: np.ndarray, mel: Tensor, right: Tensor) -> Cause | None:
    return explain(MEL, {"mel": mel}, {"mel": right}, {}, DIMS, audio=audio)


# ---- the faults


def test_the_catalogue():
    ids = {fault.id for fault in FAULTS.values()}
    mistakes = "S02 S03 S04 S05 S06 E01 E02 E03 E04 E05 E07 E08 E23 E24 E25 E26"
    assert ids == {*mistakes.split(), "clean-float64", "clean-float32"}
    assert [key for key in FAULTS if key.startswith("E07")] == ["E07@10", "E07@20", "E07@30"]
    for fault in FAULTS.values():
        assert (fault.group, fault.how, fault.first_tap) == ("input", "input", "mel")
        assert fault.sentence.endswith(".")


WORDS = {
    "E01": "a symmetric Hann window in place of a periodic Hann window",
    "E05": "the HTK mel scale in place of Slaney's",
    "E08": "1e-10 added under the logarithm in place of a clamp at 1e-10",
    "E24": "the samples times 32768/32767",
    "E25": "linear resampling from 44100 Hz",
    "E23": "the first bins of 128",
    "S02": "librosa's defaults, 2048 samples every 512 (edges: zeros), in dB",
    "S03": "the natural logarithm in place of log10 ((x + 4) / 4: missing)",
}


@on(*RECORDINGS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_made_and_named(
    audio: np.ndarray, right: Tensor, fault: Fault, request: pytest.FixtureRequest
):
    given_audio, given_mel = audio.copy(), right.clone()
    mel = fault.mel(audio, right)
    assert mel.shape == right.shape
    assert mel.dtype == torch.float32
    assert torch.isfinite(mel).all()
    assert np.array_equal(audio, given_audio)
    assert torch.equal(right, given_mel)
    cause = named(audio, mel, right)
    if fault.id in UNCHANGED[request.node.callspec.params["audio"]]:
        assert torch.equal(mel, right)
        assert cause is None
        return
    if fault.cause is None:  # a right front end
        assert 1e-9 < relative_l2(mel, right) < 1e-5
        assert cause is None
        return
    assert cause is not None
    assert cause.id == fault.cause, cause.sentence
    assert cause.score * 20 <= cause.baseline
    # E25's file is made by another filter than the hypothesis has
    assert cause.score < (1e-3 if fault.id == "E25" else 1e-6)
    assert cause.sentence.startswith("mel: explained ")
    assert cause.sentence.endswith(WORDS.get(fault.id, ""))


EVERY = FAULTS | UNSEEN


@on("demo")
@pytest.mark.parametrize("fault", EVERY.values(), ids=EVERY)
def test_a_fault_is_the_same_every_time(audio: np.ndarray, right: Tensor, fault: Fault):
    assert torch.equal(fault.mel(audio, right), fault.mel(audio, right))


@on("joined")
@pytest.mark.parametrize("fault", UNSEEN.values(), ids=UNSEEN)
def test_the_unseen_are_made(audio: np.ndarray, right: Tensor, fault: Fault):
    """What they are called is not tested: it is measured."""
    assert (fault.group, fault.how, fault.first_tap) == ("input", "input", "mel")
    mel = fault.mel(audio, right)
    assert mel.shape == right.shape
    assert torch.isfinite(mel).all()
    assert 1e-5 < relative_l2(mel, right) < 1


@pytest.mark.parametrize("fault", EVERY.values(), ids=EVERY)
def test_128_bins(samples: dict[str, np.ndarray], fault: Fault):
    """As large-v3 and turbo have."""
    audio = samples["demo"]
    right = windows(audio, 128)[:1]
    mel = fault.mel(audio, right)
    assert mel.shape == right.shape == (1, 128, 3000)
    assert torch.isfinite(mel).all()
    assert torch.equal(mel, right) == (fault.id in UNCHANGED["demo"])
    if fault.key in ("S04", "E01", "E05", "E23", "E26@10"):
        cause = named(audio, mel, right)
        assert cause is not None
        assert cause.id == fault.cause
    if fault.id == "E23":
        assert torch.equal(mel[:, 80:], torch.zeros(1, 48, 3000))
        eighty = windows(audio, 80)[:1]
        assert relative_l2(mel[:, :80], eighty) < 1e-5


def test_one_channel_of_two(samples: dict[str, np.ndarray]):
    """The left channel of two that are made, of which the mean is the recording; and it is called
    that also where the speakers take turns."""
    audio = samples["joined"].astype(np.float64)
    turns = (np.arange(len(audio)) // 40_000) % 2 == 0
    soft = 10 ** (-20 / 20)
    left = np.where(turns, 1.0, soft) * audio
    right_channel = np.where(turns, soft, 1.0) * audio
    louder = 2 / (1 + soft)
    assert np.allclose((left + right_channel) * louder / 2, audio)
    right = windows(samples["joined"], 80)[:1]
    wrong = windows((left * louder).astype(np.float32), 80)[:1]
    cause = named(samples["joined"], wrong, right)
    assert cause is not None
    assert cause.id == "mel-one-channel"
    assert "1.82 times as loud" in cause.sentence
    assert cause.sentence.endswith("the other 0.182 times")
    half = len(audio) // 2
    of_halves = FAULTS["E26@20"].mel(samples["joined"], right)
    heard = np.where(np.arange(len(audio)) < half, 1.0, soft) * audio * louder
    assert relative_l2(of_halves, windows(heard.astype(np.float32), 80)[:1]) < 1e-5
    assert named(samples["joined"], windows((1.3 * left).astype(np.float32), 80)[:1], right) is None


def full_window(samples: dict[str, np.ndarray]) -> np.ndarray:
    """30 s whose last 6 ms are the loudest."""
    audio = np.resize(samples["joined"], 480_000)
    audio[-100:] = 0.9 * np.sin(np.arange(100))
    return audio


def test_the_last_frame_counts_where_the_window_is_full(samples: dict[str, np.ndarray]):
    audio = full_window(samples)
    right = windows(audio, 80)[:1]
    assert relative_l2(FAULTS["E03"].mel(audio, right), right) > 1e-2
    assert torch.equal(FAULTS["S06"].mel(audio, right), right)  # there is nothing to pad
    for key in ("E03", "E04", "E24"):  # no zeros tell the audio's frames from the rest
        cause = named(audio, FAULTS[key].mel(audio, right), right)
        assert cause is not None
        assert cause.id == FAULTS[key].cause, cause.sentence


def test_sizes(samples: dict[str, np.ndarray]):
    """How far each fault is from the right mel of one recording, to two digits."""
    audio = samples["joined"]
    right = windows(audio, 80)[:1]
    off = {key: relative_l2(fault.mel(audio, right), right) for key, fault in FAULTS.items()}
    assert 0 < off["E08"] < 1e-4
    assert 0 < off["E24"] < 1e-4  # 20000 times smaller than a fault of 0.3, and named
    assert 1e-4 < off["E02"] < 1e-1  # two frames
    small = {"E02", "E03", "E08", "E24", "clean-float64", "clean-float32"}
    assert all(off[key] > 1e-3 for key in off.keys() - small)
    assert off["E07@10"] < off["E07@20"] < off["E07@30"]
    assert off["E26@3"] < off["E26@10"] < off["E26@20"] < off["E26@40"]


def test_the_reference_fills_up_with_zeros_in_log_mel(samples: dict[str, np.ndarray]):
    """What S06 says of whisper.transcribe; and S06 is what whisper's own functions give."""
    audio = samples["demo"]
    right = windows(audio, 80)[:1]
    content = len(audio) // 160
    assert not right[:, :, content:].any()
    padded = log_mel_spectrogram(pad_or_trim(audio))[None]
    assert not torch.equal(padded, right)
    assert relative_l2(FAULTS["S06"].mel(audio, right), padded) < 1e-6


def test_what_a_fault_does_not_change_keeps_its_bits(samples: dict[str, np.ndarray]):
    audio = samples["joined"]
    right = windows(audio, 80)[:1]
    frames = (FAULTS["E02"].mel(audio, right) != right).any(dim=1)[0].nonzero().flatten()
    assert frames.tolist() == [0, 1]
    for decibels in (10, 20, 30):
        mel = FAULTS[f"E07@{decibels}"].mel(audio, right)
        content = len(audio) // 160
        low = mel[:, :, :content] != right[:, :, :content]
        floor = mel[:, :, :content][low].unique()
        assert len(floor) == 1
        assert float(floor) == pytest.approx(float(right.max()) + decibels / 40 - 2, abs=1e-6)


# ---- other front ends, in float32 and by another FFT, with one choice open


def power(audio: np.ndarray, window: np.ndarray | None = None, edge: str = "reflect") -> np.ndarray:
    """(201, frames) in float32."""
    window = get_window("hann", 400) if window is None else window
    padded = np.pad(np.pad(audio.astype(np.float32), (0, 480_000)), 200, mode=edge)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: len(audio) // 160 + 9]
    return (np.abs(scipy.fft.rfft(frames * window.astype(np.float32))) ** 2).T


SLANEY = mel_filters("cpu", 80).numpy()


def whisper_log(mel: np.ndarray) -> np.ndarray:
    log = np.log10(np.maximum(mel, np.float32(1e-10)))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def window_of(audio: np.ndarray, log: np.ndarray) -> Tensor:
    mel = torch.zeros(1, 80, 3000)
    content = len(audio) // 160
    mel[0, :, :content] = torch.from_numpy(np.ascontiguousarray(log[:, :content])).float()
    return mel


def height_one() -> np.ndarray:
    """Slaney's triangles without their norm."""
    corners = frontend.hertz("Slaney", 82).numpy()
    return SLANEY * ((corners[2:] - corners[:-2]) / 2)[:, None].astype(np.float32)


def bank_of_htk() -> np.ndarray:
    corners = 700 * (10 ** (np.linspace(0, np.log10(1 + 8000 / 700), 82)) - 1)
    at = np.arange(201) * 40.0
    ends = [corners[i : i + 3] for i in range(80)]
    return np.stack([np.interp(at, end, [0, 1, 0]) for end in ends]).astype(np.float32)


def linear(audio: np.ndarray, up: int, down: int) -> np.ndarray:
    file = resample_poly(audio.astype(np.float64), up, down, window=("kaiser", 5.0))
    at = np.arange(len(audio)) * (up / down)
    return np.interp(at, np.arange(len(file)), file)


def z_scores(audio: np.ndarray) -> np.ndarray:
    log = whisper_log(SLANEY @ power(audio))[:, : len(audio) // 160]
    return (log - log.mean(1, keepdims=True)) / log.std(1, keepdims=True)


MADE: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
    ("mel-window", lambda a: whisper_log(SLANEY @ power(a, np.hanning(400)))),
    ("mel-window", lambda a: whisper_log(SLANEY @ power(a, get_window("hamming", 400)))),
    ("mel-window", lambda a: whisper_log(SLANEY @ power(a, np.ones(400)))),
    ("mel-magnitude", lambda a: whisper_log(SLANEY @ np.sqrt(power(a)))),
    ("mel-norm-missing", lambda a: whisper_log(height_one() @ power(a))),
    ("mel-htk", lambda a: whisper_log(bank_of_htk() @ power(a))),
    ("mel-added", lambda a: 1 + np.log10(SLANEY @ power(a) + 1e-6) / 4),
    ("mel-natural-log", lambda a: np.log(np.maximum(SLANEY @ power(a), 1e-10))),
    ("mel-natural-log", lambda a: (np.log(SLANEY @ power(a) + 1e-6) + 4) / 4),
    ("mel-decibel", lambda a: of_input.decibels(SLANEY @ power(a))),
    ("mel-z-score", z_scores),
    ("mel-samples-scaled", lambda a: whisper_log(SLANEY @ power(a * np.float32(32768 / 32767)))),
    ("mel-samples-scaled", lambda a: whisper_log(SLANEY @ power(a * 32768))),
    ("mel-samples-scaled", lambda a: whisper_log(SLANEY @ power(a / 2))),
]


@on("demo")
@pytest.mark.parametrize(("id", "log"), MADE, ids=[row[0] for row in MADE])
def test_a_front_end_in_float32_is_named(audio: np.ndarray, right: Tensor, id: str, log):
    cause = named(audio, window_of(audio, log(audio)), right)
    assert cause is not None
    assert cause.id == id, cause.sentence


CHANGES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("mel-unscaled", lambda m: 4 * m - 4),
    ("mel-natural-log", lambda m: (np.log(10) * (4 * m - 4) + 4) / 4),
    ("mel-bins-reversed", lambda m: m.flip(1)),
    ("frames-shifted", lambda m: m.roll(1, 2)),
    ("scaled", lambda m: 1.01 * m),
    ("output-rounded", lambda m: m.bfloat16().float()),
]


@on("demo")
@pytest.mark.parametrize(("id", "change"), CHANGES, ids=[row[0] for row in CHANGES])
def test_what_is_named_without_samples_is_named_with_them(
    audio: np.ndarray, right: Tensor, id: str, change
):
    cause = named(audio, change(right), right)
    assert cause is not None
    assert cause.id == id, cause.sentence


# ---- what must be called nothing


def noisy(size: float) -> Callable[[np.ndarray, Tensor], Tensor]:
    def change(audio: np.ndarray, mel: Tensor) -> Tensor:
        noise = torch.randn(mel.shape, generator=torch.Generator().manual_seed(0))
        return mel + size * noise * mel.norm() / noise.norm()

    return change


def of_samples(
    change: Callable[[np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, Tensor], Tensor]:
    """The right mel of other samples, cut and filled up as if they were these."""
    return lambda audio, mel: windows(change(audio).astype(np.float32), 80)[:1]


def with_hiss(audio: np.ndarray) -> np.ndarray:
    return audio + 1e-3 * np.random.default_rng(0).standard_normal(len(audio))


def narrow(audio: np.ndarray) -> np.ndarray:
    return resample_poly(resample_poly(audio, 1, 2), 2, 1)[: len(audio)]


def shuffled(audio: np.ndarray, mel: Tensor) -> Tensor:
    order = torch.randperm(mel.shape[2], generator=torch.Generator().manual_seed(0))
    return mel[:, :, order]


NOTHING: list[tuple[str, Callable[[np.ndarray, Tensor], Tensor]]] = [
    ("float64", lambda a, m: window_of(a, of_input.right(a))),
    ("another FFT in float32", lambda a, m: window_of(a, whisper_log(SLANEY @ power(a)))),
    ("noise of 2e-6", noisy(2e-6)),
    ("noise of 1e-5", noisy(1e-5)),
    ("noise of 1e-2", noisy(1e-2)),
    ("hiss", of_samples(with_hiss)),
    ("half the bandwidth", of_samples(narrow)),
    ("a gain of 1.3", of_samples(lambda a: 1.3 * a)),
    ("pre-emphasis", of_samples(lambda a: a - 0.97 * np.concatenate([[0], a[:-1]]))),
    ("another recording", of_samples(lambda a: a[::-1].copy())),
    ("faster", of_samples(lambda a: resample_poly(a, 9, 10))),
    ("shuffled frames", shuffled),
    ("a gap", lambda a, m: torch.where(torch.arange(3000) // 100 == 1, 0.0, m)),
    ("smoothed", lambda a, m: (m + m.roll(1, 2)) / 2),
]


@on("demo")
@pytest.mark.parametrize(("what", "change"), NOTHING, ids=[row[0] for row in NOTHING])
def test_nothing_is_named(audio: np.ndarray, right: Tensor, what: str, change):
    cause = named(audio, change(audio, right), right)
    assert cause is None, cause


@on("joined", "jfk")
@pytest.mark.parametrize(("what", "change"), NOTHING[:4], ids=[row[0] for row in NOTHING[:4]])
def test_noise_is_named_nothing(audio: np.ndarray, right: Tensor, what: str, change):
    mel = change(audio, right)
    assert 1e-7 < relative_l2(mel, right) < 2e-5
    cause = named(audio, mel, right)
    assert cause is None, cause


def test_the_float32_noise_is_foreseen(samples: dict[str, np.ndarray]):
    """`float32_noise` against what whisper's float32 leaves, where it is more than storage does."""
    audio = samples["joined"]
    content = len(audio) // 160
    padded = frontend.silence_after(torch.from_numpy(audio).double())
    spectrum, bank = frontend.spectrogram(padded), frontend.filters(frontend.WHISPER, 80)
    mel = spectrum @ bank.T
    exact = frontend.scaled(frontend.log10(mel))[:content]
    off = (windows(audio, 80)[0].T[:content].double() - exact).abs()
    foreseen = frontend.float32_noise(spectrum, mel, bank)[:content]
    loud = foreseen > 2e-7
    ratio = (off / foreseen)[loud]
    assert 0.2 < float(ratio.median()) < 2
    assert float((ratio > 10).double().mean()) < 1e-3
    assert float(off[~loud].max()) < 2e-6


# ---- what cannot be explained, and what is computed beside


def test_samples_of_another_recording_are_refused(samples: dict[str, np.ndarray]):
    right = windows(samples["demo"], 80)[:1]
    for wrong in (samples["joined"], samples["demo"][800:], samples["demo"][None]):
        with pytest.raises(ValueError, match="do not give the reference's mel: relative L2"):
            explain(MEL, {"mel": right * 2}, {"mel": right}, {}, DIMS, audio=wrong)
    cause = explain(MEL, {"mel": right * 2}, {"mel": right}, {}, DIMS)
    assert cause is not None
    assert cause.id == "scaled"


def test_samples_as_a_tensor(samples: dict[str, np.ndarray]):
    audio = samples["demo"]
    right = windows(audio, 80)[:1]
    mel = {"mel": FAULTS["E01"].mel(audio, right)}
    of_array = explain(MEL, mel, {"mel": right}, {}, DIMS, audio=audio)
    assert of_array == explain(MEL, mel, {"mel": right}, {}, DIMS, audio=torch.from_numpy(audio))


@pytest.mark.parametrize("n_mels", [80, 128])
def test_the_filters_are_openai_s(n_mels: int):
    """The formula, for which Whisper's own stand in where they are known, gives the same."""
    own = mel_filters("cpu", n_mels).double()
    assert torch.equal(frontend.filters(frontend.WHISPER, n_mels), own)
    formula = of_input.triangles(of_input.slaney_corners(n_mels), 400)
    assert np.abs(formula - own.numpy()).max() < 1e-8
    finer = frontend.filters(frontend.Recipe(n_fft=2048), 80).numpy()
    assert np.allclose(finer, of_input.triangles(of_input.slaney_corners(80), 2048), atol=1e-12)


def test_an_unknown_window_is_refused():
    with pytest.raises(ValueError, match="unknown window 'Blackman'"):
        frontend.window("Blackman", 400)
