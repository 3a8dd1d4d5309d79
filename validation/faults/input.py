"""Mistakes in the log-mel spectrogram and in the samples that it is made of.

A window is right as `whisper.transcribe` makes it: the spectrogram of the audio and 30 s of silence
is cut to the audio's frames, and filled up with 0.0, in log-mel, to 3000. So is a wrong one, unless
its mistake is another; where it has fewer frames it is filled up likewise, of more the first 3000
are taken. The arithmetic is NumPy's in float64, apart from that of the fingerprints.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.signal import firwin, resample_poly
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, N_SAMPLES, SAMPLE_RATE, mel_filters

from validation.faults.fault import EARLIER_PORT, UNRECORDED, Fault, swept

N_MELS = 80
FILE_RATE = 44_100
SAME = 1e-9  # of two log-mels in float64; a step of float32 is a hundred times larger

MelOf = Callable[[np.ndarray], np.ndarray]  # (samples,) -> (N_MELS, frames)

PERIODIC_HANN = np.hanning(N_FFT + 1)[:-1]
SYMMETRIC_HANN = np.hanning(N_FFT)
# OpenAI's file has 80 filters, and 128 for large-v3.
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


def right(audio: np.ndarray) -> np.ndarray:
    return scaled(log10(SLANEY[80] @ power(silence_after(audio))))


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


# ---- the mistakes: (samples,) -> (N_MELS, frames)


def librosa_defaults(audio: np.ndarray) -> np.ndarray:
    """librosa.feature.melspectrogram(y=audio, sr=16000, n_mels=80) in decibels."""
    bins = power(audio, np.hanning(2049)[:-1], hop=512, edge="constant")
    return decibels(triangles(slaney_corners(N_MELS), 2048) @ bins)


def natural_log(audio: np.ndarray) -> np.ndarray:
    return np.log(SLANEY[80] @ power(silence_after(audio)) + 1e-8)


def own_recipe(audio: np.ndarray) -> np.ndarray:
    bank = triangles_at_bins(htk_corners(N_MELS), N_FFT)
    log = log10(bank @ power(audio, SYMMETRIC_HANN))
    return (log - log.mean(1, keepdims=True)) / (log.std(1, keepdims=True) + 1e-8)


def symmetric_window(audio: np.ndarray) -> np.ndarray:
    return scaled(log10(SLANEY[80] @ power(silence_after(audio), SYMMETRIC_HANN)))


def zeros_at_edges(audio: np.ndarray) -> np.ndarray:
    return scaled(log10(SLANEY[80] @ power(silence_after(audio), edge="constant")))


def last_frame_kept(audio: np.ndarray) -> np.ndarray:
    """Of a window padded to 30 s, whose 3001 frames end on a reflection."""
    window = np.pad(audio, (0, max(0, N_SAMPLES - len(audio))))
    return scaled(log10(SLANEY[80] @ power(window)))


def mirrored_bins(audio: np.ndarray) -> np.ndarray:
    bins = power(silence_after(audio))
    bins[1:-1] += bins[1:-1]  # bin N - k equals bin k
    return scaled(log10(SLANEY[80] @ bins))


def htk_scale(audio: np.ndarray) -> np.ndarray:
    bank = triangles(htk_corners(N_MELS), N_FFT)
    return scaled(log10(bank @ power(silence_after(audio))))


def louder_batch(decibels: float) -> MelOf:
    return lambda audio: scaled(
        log10(SLANEY[80] @ power(silence_after(audio))), louder=decibels / 10
    )


def added_for_clamp(audio: np.ndarray) -> np.ndarray:
    return scaled(np.log10(SLANEY[80] @ power(silence_after(audio)) + 1e-10))


def first_of_128(audio: np.ndarray) -> np.ndarray:
    return scaled(log10(SLANEY[128] @ power(silence_after(audio))))[:N_MELS]


def divided_by_32767(audio: np.ndarray) -> np.ndarray:
    return right(audio.astype(np.float64) * 32768 / 32767)


def linearly_resampled(audio: np.ndarray) -> np.ndarray:
    """Of a file that has the recording's sound up to 8 kHz and no more: SciPy's default filter,
    ten periods long, would take from it above 6.8 kHz and add images, a mistake of its own."""
    step = int(np.gcd(FILE_RATE, SAMPLE_RATE))
    up, down = FILE_RATE // step, SAMPLE_RATE // step
    low_pass = firwin(2 * 64 * up + 1, 1 / up, window=("kaiser", 8.0))
    file = resample_poly(audio.astype(np.float64), up, down, window=low_pass)
    seconds = np.arange(len(audio)) / SAMPLE_RATE
    return right(np.interp(seconds, np.arange(len(file)) / FILE_RATE, file))


def left_channel(audio: np.ndarray) -> np.ndarray:
    half = len(audio) // 2
    left, unheard = 2 * audio.astype(np.float64), audio * 0
    return right(np.concatenate([left[:half], unheard[half:]]))


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
        content = len(audio) // HOP_LENGTH
        found = window_of(wrong(audio), content, right_mel)
        same = np.abs(found - window_of(right(audio), content, right_mel)) <= SAME
        return torch.where(torch.from_numpy(same), right_mel, torch.from_numpy(found).float())

    return mel


def to_length(wrong: MelOf) -> Callable[[np.ndarray, Tensor], Tensor]:
    """The window of a front end that has frames of its own, as many as it makes of the audio."""

    def mel(audio: np.ndarray, right_mel: Tensor) -> Tensor:
        log = wrong(audio)
        return torch.from_numpy(window_of(log, log.shape[1], right_mel)).float()

    return mel


def half_of_the_frames(audio: np.ndarray, right_mel: Tensor) -> Tensor:
    mel = right_mel.clone()
    mel[:, :, mel.shape[2] // 2 :] = 0.0
    return mel


def silence_in_place_of_zeros(audio: np.ndarray, right_mel: Tensor) -> Tensor:
    """log_mel_spectrogram(pad_or_trim(audio)); the frames of the audio are the same."""
    content = len(audio) // HOP_LENGTH
    log = right(audio)
    after = np.concatenate(
        [log, np.full((N_MELS, right_mel.shape[2]), max(log.max() - 2, -1.5))], axis=1
    )[:, : right_mel.shape[2]]
    mel = torch.from_numpy(after).float()[None]
    mel[:, :, :content] = right_mel[:, :, :content]
    return mel


def _fault(
    id: str,
    sentence: str,
    seen: str,
    cause: str,
    mel: Callable[[np.ndarray, Tensor], Tensor],
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
        "the reverse in SYSTRAN/faster-whisper#1084 and vllm-project/vllm-metal#729",
        "mel-silence-padding",
        silence_in_place_of_zeros,
    ),
    _fault(
        "E01",
        "The Hann window is symmetric in place of periodic.",
        "Blaizzy/mlx-audio#920",
        "mel-window",
        instead(symmetric_window),
    ),
    _fault(
        "E02",
        "The ends of the samples are padded with zeros in the STFT in place of their reflection.",
        "ggml-org/whisper.cpp#1148, NVIDIA/TensorRT-Model-Connect#1282",
        "mel-edges",
        instead(zeros_at_edges),
    ),
    _fault(
        "E03",
        "The last frame of the STFT of 30 s is kept until the maximum is taken: it is silence, and"
        " nothing changes, unless the audio fills the window.",
        "NVIDIA/TensorRT-Model-Connect#1282",
        "mel-last-frame",
        instead(last_frame_kept),
    ),
    _fault(
        "E04",
        "The FFT's bins are added to their mirror images, which doubles the power.",
        "ggml-org/whisper.cpp#1148; huggingface/candle",
        "mel-bins-doubled",
        instead(mirrored_bins),
    ),
    _fault(
        "E05",
        "The mel scale is HTK's in place of Slaney's, with Slaney's norm.",
        "vllm-project/vllm-metal#729",
        "mel-htk",
        instead(htk_scale),
    ),
    *swept(
        (10, 20, 30),
        lambda decibels: _fault(
            "E07",
            f"The log's floor is that of a batch whose loudest recording is {decibels} dB louder.",
            "openai/whisper itself, where log_mel_spectrogram is given a batch",
            "mel-floor",
            instead(louder_batch(decibels)),
        ),
    ),
    _fault(
        "E08",
        "1e-10 is added to the mel power in place of the clamp at 1e-10.",
        "argmaxinc/whisperkittools",
        "mel-added",
        instead(added_for_clamp),
    ),
    _fault(
        "E24",
        "int16 samples are divided by 32767 in place of 32768.",
        UNRECORDED,
        "mel-samples-scaled",
        instead(divided_by_32767),
    ),
    _fault(
        "E25",
        "A file of 44.1 kHz, made of the recording, is brought to 16 kHz by linear interpolation.",
        UNRECORDED,
        "mel-resampled",
        instead(linearly_resampled),
    ),
    _fault(
        "E26",
        "Of two channels the left alone is taken in place of the mean; it has the first half of the"
        " recording, the right the second.",
        UNRECORDED,
        "mel-one-channel",
        instead(left_channel),
    ),
    _fault(
        "E23",
        "128 mel bins, as for large-v3, are computed and the first 80 used.",
        "tinygrad/tinygrad",
        "mel-filter-count",
        instead(first_of_128),
    ),
]
