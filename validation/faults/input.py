"""Mistakes in the log-mel spectrogram and in the samples that it is made of.

A window is right as `whisper.transcribe` makes it: the spectrogram of the audio and 30 s of silence
is cut to the audio's frames, and filled up with 0.0, in log-mel, to 3000. So is a wrong one, unless
its mistake is another; where it has fewer frames it is filled up likewise, of more the first 3000
are taken. The arithmetic is NumPy's in float64, apart from that of the fingerprints; the number of
mel bins is that of the right mel, 80 or, for large-v3 and turbo, 128.

Two front ends are right, and their mel is yet another in its last bits: parity fails at mel on
purpose, since both sides must get the same input, and it must give that no name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
from scipy.signal import firwin, resample_poly
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, N_SAMPLES, SAMPLE_RATE, mel_filters

from validation.faults.fault import EARLIER_PORT, GITHUB, UNRECORDED, YARDSTICK, Fault, swept

FILE_RATE = 44_100
SAME = 1e-9  # of two log-mels in float64; a step of float32 is a hundred times larger

MelOf = Callable[[np.ndarray, int], np.ndarray]  # (samples,), n_mels -> (n_mels, frames)

PERIODIC_HANN = np.hanning(N_FFT + 1)[:-1]
SYMMETRIC_HANN = np.hanning(N_FFT)
# OpenAI's file has both: 80 filters, and 128 for large-v3.
SLANEY = {n: mel_filters("cpu", n).numpy().astype(np.float64) for n in (80, 128)}


# ---- the parts of a log-mel spectrogram


def silence_after(audio: np.ndarray) -> np.ndarray:
    """As much as the last frames see; whisper.transcribe adds 30 s, of which no more is used."""
    return np.pad(audio.astype(np.float64), (0, N_FFT))


def power(
    audio: np.ndarray,
    window: np.ndarray = PERIODIC_HANN,
    hop: int = HOP_LENGTH,
    edge: str = "reflect",
) -> np.ndarray:
    """(samples,) -> (bins, 1 + samples // hop); `edge`: a mode of `np.pad`."""
    n_fft = len(window)
    padded = np.pad(audio.astype(np.float64), n_fft // 2, mode=edge)  # type: ignore[call-overload]
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    return np.abs(np.fft.rfft(frames * window, axis=1)).T ** 2


def log10(mel: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(mel, 1e-10))


def scaled(log: np.ndarray, louder: float = 0.0) -> np.ndarray:
    """Whisper's floor, 8 below the loudest bin, which is `louder` than that of `log`; its scale."""
    return (np.maximum(log, log.max() + louder - 8) + 4) / 4


def unfloored(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """The right log-mel before its floor and its scale."""
    return log10(SLANEY[n_mels] @ power(silence_after(audio)))


def right(audio: np.ndarray, n_mels: int = 80) -> np.ndarray:
    return scaled(unfloored(audio, n_mels))


def decibels(mel: np.ndarray) -> np.ndarray:
    """As librosa.power_to_db(mel, ref=np.max): from -80 to 0."""
    log = 10 * log10(mel)
    return np.maximum(log - log.max(), -80)


def htk_corners(n_mels: int) -> np.ndarray:
    """The corners of the triangles in Hz."""
    highest = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    return 700 * (10 ** (np.linspace(0, highest, n_mels + 2) / 2595) - 1)


def slaney_corners(n_mels: int) -> np.ndarray:
    """The same: 15 mels up to 1000 Hz, then 27 for each factor of 6.4."""
    mels = np.linspace(0, 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4), n_mels + 2)
    return np.where(mels < 15, mels * 1000 / 15, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))


def triangles(corners: np.ndarray, n_fft: int) -> np.ndarray:
    """(n_mels, bins), each of the same area, as Slaney's."""
    hertz = np.fft.rfftfreq(n_fft, 1 / SAMPLE_RATE)
    ends = zip(corners, corners[1:], corners[2:], strict=False)
    return np.stack(
        [np.interp(hertz, [a, b, c], [0, 1, 0], 0, 0) * 2 / (c - a) for a, b, c in ends]
    )


def triangles_at_bins(corners: np.ndarray, n_fft: int) -> np.ndarray:
    """(n_mels, bins) of height 1, corners at FFT bins; the lowest may be empty."""
    bins = np.floor((n_fft + 1) * corners / SAMPLE_RATE).astype(int)
    bank = np.zeros((len(corners) - 2, n_fft // 2 + 1))
    for row, a, b, c in zip(bank, bins, bins[1:], bins[2:], strict=False):
        row[a:b] = (np.arange(a, b) - a) / max(b - a, 1)
        row[b:c] = (c - np.arange(b, c)) / max(c - b, 1)
    return bank


# ---- the mistakes: (samples,), n_mels -> (n_mels, frames)


def librosa_defaults(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """librosa.feature.melspectrogram(y=audio, sr=16000, n_mels=n_mels) in decibels."""
    bins = power(audio, np.hanning(2049)[:-1], hop=512, edge="constant")
    return decibels(triangles(slaney_corners(n_mels), 2048) @ bins)


def natural_log(audio: np.ndarray, n_mels: int) -> np.ndarray:
    return np.log(SLANEY[n_mels] @ power(silence_after(audio)) + 1e-8)


def own_recipe(audio: np.ndarray, n_mels: int) -> np.ndarray:
    bank = triangles_at_bins(htk_corners(n_mels), N_FFT)
    log = log10(bank @ power(audio, SYMMETRIC_HANN))
    return (log - log.mean(1, keepdims=True)) / (log.std(1, keepdims=True) + 1e-8)


def symmetric_window(audio: np.ndarray, n_mels: int) -> np.ndarray:
    return scaled(log10(SLANEY[n_mels] @ power(silence_after(audio), SYMMETRIC_HANN)))


def zeros_at_edges(audio: np.ndarray, n_mels: int) -> np.ndarray:
    return scaled(log10(SLANEY[n_mels] @ power(silence_after(audio), edge="constant")))


def last_frame_kept(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """Of a window padded to 30 s, whose 3001 frames end on a reflection."""
    window = np.pad(audio, (0, max(0, N_SAMPLES - len(audio))))
    return scaled(log10(SLANEY[n_mels] @ power(window)))


def mirrored_bins(audio: np.ndarray, n_mels: int) -> np.ndarray:
    bins = power(silence_after(audio))
    bins[1:-1] += bins[1:-1]  # bin N - k equals bin k
    return scaled(log10(SLANEY[n_mels] @ bins))


def htk_scale(audio: np.ndarray, n_mels: int) -> np.ndarray:
    bank = triangles(htk_corners(n_mels), N_FFT)
    return scaled(log10(bank @ power(silence_after(audio))))


def louder_batch(decibels: float) -> MelOf:
    return lambda audio, n_mels: scaled(unfloored(audio, n_mels), louder=decibels / 10)


def added_for_clamp(audio: np.ndarray, n_mels: int) -> np.ndarray:
    return scaled(np.log10(SLANEY[n_mels] @ power(silence_after(audio)) + 1e-10))


def other_filters(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """80 in place of 128 or the reverse, cut or filled up with 0.0 to as many bins."""
    log = right(audio, *(SLANEY.keys() - {n_mels}))[:n_mels]
    return np.pad(log, ((0, n_mels - len(log)), (0, 0)))


def divided_by_32767(audio: np.ndarray, n_mels: int) -> np.ndarray:
    return right(audio.astype(np.float64) * 32768 / 32767, n_mels)


def linearly_resampled(rate: int) -> MelOf:
    """Of a file that has the recording's sound up to 8 kHz and no more: SciPy's default filter,
    ten periods long, would take from it above 6.8 kHz and add images, a mistake of its own."""

    def mel(audio: np.ndarray, n_mels: int) -> np.ndarray:
        step = int(np.gcd(rate, SAMPLE_RATE))
        up, down = rate // step, SAMPLE_RATE // step
        low_pass = firwin(2 * 64 * up + 1, 1 / up, window=("kaiser", 8.0))
        file = resample_poly(audio.astype(np.float64), up, down, window=low_pass)
        seconds = np.arange(len(audio)) / SAMPLE_RATE
        return right(np.interp(seconds, np.arange(len(file)) / rate, file), n_mels)

    return mel


def left_channel(apart: float) -> MelOf:
    """Of two speakers, one on either side, who are `apart` (dB): the left one has the first half of
    the recording. The mean of both channels is the recording."""
    quieter = 10 ** (-apart / 20)
    near, far = 2 / (1 + quieter), 2 * quieter / (1 + quieter)

    def mel(audio: np.ndarray, n_mels: int) -> np.ndarray:
        gain = np.where(np.arange(len(audio)) < len(audio) // 2, near, far)
        return right(gain * audio.astype(np.float64), n_mels)

    return mel


def in_float32(audio: np.ndarray, n_mels: int) -> np.ndarray:
    """The right one, by another FFT."""
    padded = np.pad(np.pad(audio, (0, N_FFT)), N_FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH]
    bins = np.abs(scipy.fft.rfft(frames * PERIODIC_HANN.astype(np.float32), axis=1)).T ** 2
    return scaled(log10(SLANEY[n_mels].astype(np.float32) @ bins))


# ---- the window


def window_of(log: np.ndarray, content: int, mel: Tensor) -> np.ndarray:
    """The first `content` frames of `log`, then 0.0, in the shape of `mel`."""
    window = np.zeros(tuple(mel.shape))
    content = min(content, log.shape[1], mel.shape[2])
    window[0, :, :content] = log[:, :content]
    return window


def instead(wrong: MelOf) -> Callable[[np.ndarray, Tensor], Tensor]:
    """The window that `wrong` gives. What the mistake does not change keeps the bits of the right
    mel: the float32 noise of the one against the other is not part of the mistake."""

    def mel(audio: np.ndarray, right_mel: Tensor) -> Tensor:
        content, n_mels = len(audio) // HOP_LENGTH, right_mel.shape[1]
        found = window_of(wrong(audio, n_mels), content, right_mel)
        same = np.abs(found - window_of(right(audio, n_mels), content, right_mel)) <= SAME
        return torch.where(torch.from_numpy(same), right_mel, torch.from_numpy(found).float())

    return mel


def to_length(wrong: MelOf) -> Callable[[np.ndarray, Tensor], Tensor]:
    """The window of a front end that has frames of its own, as many as it makes of the audio."""

    def mel(audio: np.ndarray, right_mel: Tensor) -> Tensor:
        log = wrong(audio, right_mel.shape[1])
        return torch.from_numpy(window_of(log, log.shape[1], right_mel)).float()

    return mel


def computed(log: MelOf) -> Callable[[np.ndarray, Tensor], Tensor]:
    """The window of `log` in all its bits, float32 noise and all."""

    def mel(audio: np.ndarray, right_mel: Tensor) -> Tensor:
        found = log(audio, right_mel.shape[1])
        return torch.from_numpy(window_of(found, len(audio) // HOP_LENGTH, right_mel)).float()

    return mel


def half_of_the_frames(audio: np.ndarray, right_mel: Tensor) -> Tensor:
    mel = right_mel.clone()
    mel[:, :, mel.shape[2] // 2 :] = 0.0
    return mel


def silence_in_place_of_zeros(audio: np.ndarray, right_mel: Tensor) -> Tensor:
    """log_mel_spectrogram(pad_or_trim(audio)); the frames of the audio are the same."""
    content = len(audio) // HOP_LENGTH
    log = right(audio, right_mel.shape[1])
    silence = np.full(right_mel.shape[1:], max(log.max() - 2, -1.5))
    after = np.concatenate([log, silence], axis=1)[:, : right_mel.shape[2]]
    mel = torch.from_numpy(after).float()[None]
    mel[:, :, :content] = right_mel[:, :, :content]
    return mel


def _fault(
    id: str,
    sentence: str,
    seen: str,
    cause: str | None,
    mel: Callable[[np.ndarray, Tensor], Tensor],
    yardstick: bool = False,
) -> Fault:
    return Fault(
        id=id,
        group="input",
        sentence=sentence,
        seen=seen,
        first_tap="mel",
        cause=cause,
        how="input",
        mel=mel,
        yardstick=yardstick,
    )


FAULTS = [
    _fault(
        "S02",
        "The mel is librosa's with its defaults, 2048 samples every 512, in decibels below the"
        " maximum; its frames, 3.2 times too few, are filled up with 0.0.",
        EARLIER_PORT,
        "mel-librosa-defaults",
        to_length(librosa_defaults),
    ),
    _fault(
        "S03",
        "The natural logarithm of mel + 1e-8 is taken, without clamp, floor and (x + 4) / 4.",
        EARLIER_PORT,
        "mel-natural-log",
        instead(natural_log),
    ),
    _fault(
        "S04",
        "The window is symmetric, the mel scale HTK's at whole FFT bins without Slaney's norm, the"
        " last frame is kept, and each bin is brought to mean 0 and standard deviation 1.",
        f"{EARLIER_PORT} (src/audio/preprocessing.py)",
        "mel-z-score",
        to_length(own_recipe),
    ),
    _fault(
        "S05",
        "The first 1500 of 3000 frames are kept; 0.0 fills up the rest.",
        EARLIER_PORT,
        "frames-cut",
        half_of_the_frames,
    ),
    _fault(
        "S06",
        "Audio shorter than 30 s is followed by silence; whisper.transcribe cuts the spectrogram to"
        " the audio's frames and fills it up with 0.0 in log-mel, which elsewhere is the fault.",
        f"the reverse in {GITHUB}/SYSTRAN/faster-whisper/pull/1084, "
        f"{GITHUB}/vllm-project/vllm-metal/pull/729 and {GITHUB}/ggml-org/whisper.cpp/issues/579",
        "mel-silence-padding",
        silence_in_place_of_zeros,
    ),
    _fault(
        "E01",
        "The Hann window is symmetric in place of periodic.",
        f"{GITHUB}/Blaizzy/mlx-audio/pull/920",
        "mel-window",
        instead(symmetric_window),
    ),
    _fault(
        "E02",
        "The ends of the samples are padded with zeros in the STFT in place of their reflection.",
        f"{GITHUB}/ggml-org/whisper.cpp/pull/1148, "
        f"{GITHUB}/NVIDIA/TensorRT-Model-Connect/pull/1282",
        "mel-edges",
        instead(zeros_at_edges),
    ),
    _fault(
        "E03",
        "The last frame of the STFT of 30 s is kept until the maximum is taken: it is silence, and"
        " nothing changes, unless the audio fills the window.",
        f"{GITHUB}/NVIDIA/TensorRT-Model-Connect/pull/1282",
        "mel-last-frame",
        instead(last_frame_kept),
    ),
    _fault(
        "E04",
        "The FFT's bins are added to their mirror images, which doubles the power.",
        f"{GITHUB}/ggml-org/whisper.cpp/pull/1148, {GITHUB}/huggingface/candle",
        "mel-bins-doubled",
        instead(mirrored_bins),
    ),
    _fault(
        "E05",
        "The mel scale is HTK's in place of Slaney's, with Slaney's norm.",
        f"{GITHUB}/vllm-project/vllm-metal/pull/729",
        "mel-htk",
        instead(htk_scale),
    ),
    *swept(
        (10, 20, 30),
        lambda decibels: _fault(
            "E07",
            f"The log's floor is that of a batch whose loudest recording is {decibels} dB louder.",
            f"{GITHUB}/openai/whisper itself, where log_mel_spectrogram is given a batch",
            "mel-floor",
            instead(louder_batch(decibels)),
        ),
    ),
    _fault(
        "E08",
        "1e-10 is added to the mel power in place of the clamp at 1e-10.",
        f"{GITHUB}/argmaxinc/whisperkittools",
        "mel-added",
        instead(added_for_clamp),
    ),
    _fault(
        "E24",
        "int16 samples are divided by 32767 in place of 32768.",
        f"{GITHUB}/deepjavalibrary/djl/pull/3646",
        "mel-samples-scaled",
        instead(divided_by_32767),
    ),
    _fault(
        "E25",
        "A file of 44.1 kHz, made of the recording, is brought to 16 kHz by linear interpolation.",
        f"{GITHUB}/peteonrails/voxtype/issues/641",
        "mel-resampled",
        instead(linearly_resampled(FILE_RATE)),
    ),
    *swept(
        (3, 10, 20, 40, 60),
        lambda apart: _fault(
            "E26",
            "Of two channels the left alone is taken in place of the mean; of two speakers it has"
            f" the one of the second half {apart} dB below the one of the first, the right the"
            " reverse.",
            UNRECORDED,
            "mel-one-channel",
            instead(left_channel(apart)),
        ),
    ),
    _fault(
        "E23",
        "The mel filters are those of other models: of 128, as for large-v3, the first 80 bins;"
        " or for large-v3 80, and 0.0 above.",
        f"{GITHUB}/tinygrad/tinygrad; {GITHUB}/ggml-org/whisper.cpp/pull/1457",
        "mel-filter-count",
        instead(other_filters),
    ),
    _fault(
        "clean-float64",
        "No mistake: Whisper's log-mel in float64. Parity fails at mel, and must give no cause.",
        YARDSTICK,
        None,
        computed(right),
        yardstick=True,
    ),
    _fault(
        "clean-float32",
        "No mistake: Whisper's log-mel in float32, by another FFT. Parity fails at mel, and must"
        " give no cause.",
        YARDSTICK,
        None,
        computed(in_float32),
        yardstick=True,
    ),
]
