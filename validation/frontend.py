"""Whisper's log-mel spectrogram with every choice open, in float64: what a front end that chose one
of them otherwise would have given. No reference comes from here, and nothing is judged.

Arrays are frames first: (frames, bins) and (frames, n_mels). Samples are at 16 kHz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, mel_filters

LEAST = 1e-10  # the clamp under the logarithm
RANGE = 8.0  # decades below the loudest bin that are kept
EPSILON32 = 2.0**-24  # half a step of float32, relative


@dataclass(frozen=True)
class Recipe:
    """How samples become mel bins; the defaults are Whisper's."""

    n_fft: int = N_FFT
    hop: int = HOP_LENGTH
    window: str = "periodic Hann"  # or symmetric Hann, Hamming, rectangular
    edge: str = "reflection"  # before the first sample and after the last; or zeros
    exponent: int = 2  # 2: power, 1: magnitude
    doubled: bool = False  # the bins 1 ... n_fft / 2 - 1 and their mirror images added
    scale: str = "Slaney"  # or HTK
    norm: bool = True  # Slaney's: triangles of equal area
    whole_bins: bool = False  # the triangles' corners rounded down to FFT bins


WHISPER = Recipe()


def window(name: str, n: int) -> Tensor:
    match name:
        case "periodic Hann":
            return torch.hann_window(n, dtype=torch.float64)
        case "symmetric Hann":
            return torch.hann_window(n, periodic=False, dtype=torch.float64)
        case "Hamming":
            return torch.hamming_window(n, dtype=torch.float64)
        case "rectangular":
            return torch.ones(n, dtype=torch.float64)
    raise ValueError(f"unknown window {name!r}")


def spectrogram(audio: Tensor, recipe: Recipe = WHISPER) -> Tensor:
    """(samples,) -> power or magnitude (1 + samples // hop, n_fft / 2 + 1), no frame dropped."""
    stft = torch.stft(
        audio,
        recipe.n_fft,
        recipe.hop,
        window=window(recipe.window, recipe.n_fft),
        pad_mode={"reflection": "reflect", "zeros": "constant"}[recipe.edge],
        return_complex=True,
    )
    bins = torch.view_as_real(stft.T).square().sum(2)  # quicker than abs()
    if recipe.exponent == 1:
        bins = bins.sqrt()
    if recipe.doubled:
        bins[:, 1:-1] *= 2
    return bins


def hertz(scale: str, n: int) -> Tensor:
    """`n` frequencies from 0 to half the sample rate, evenly spaced on a mel scale."""
    nyquist = SAMPLE_RATE / 2
    if scale == "HTK":
        mels = torch.linspace(0, math.log10(1 + nyquist / 700), n, dtype=torch.float64)
        return 700 * (10**mels - 1)
    # Slaney's: 200/3 Hz a mel up to 1000 Hz, above it 27 mels for each factor of 6.4
    top = 15 + 27 * math.log(nyquist / 1000) / math.log(6.4)
    mels = torch.linspace(0, top, n, dtype=torch.float64)
    return torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))


def filters(recipe: Recipe, n_mels: int) -> Tensor:
    """(n_mels, n_fft / 2 + 1); Whisper's own, which are float32, where the recipe is Whisper's."""
    own = recipe.scale == "Slaney" and recipe.norm and not recipe.whole_bins
    if own and recipe.n_fft == N_FFT and n_mels in (80, 128):
        return mel_filters("cpu", n_mels).double()
    corners = hertz(recipe.scale, n_mels + 2)
    at = torch.arange(recipe.n_fft // 2 + 1, dtype=torch.float64)
    if recipe.whole_bins:
        corners = ((recipe.n_fft + 1) * corners / SAMPLE_RATE).floor()
    else:
        at = at * SAMPLE_RATE / recipe.n_fft
    left, top, right = (corners[i : i + n_mels, None] for i in range(3))
    rising = ((at - left) / (top - left)).nan_to_num(nan=math.inf, posinf=math.inf)
    falling = ((right - at) / (right - top)).nan_to_num(nan=0.0, posinf=math.inf)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    if recipe.norm:
        triangles = triangles * 2 / (right - left)
    return triangles


def log10(mel: Tensor, added: float = 0.0) -> Tensor:
    """The logarithm alone; `added` takes the place of the clamp."""
    return (mel + added).log10() if added else mel.clamp(min=LEAST).log10()


def scaled(log: Tensor) -> Tensor:
    """Whisper's last two steps: the floor, and the scale."""
    return (torch.maximum(log, log.max() - RANGE) + 4) / 4


def decibels(mel: Tensor) -> Tensor:
    """Below the loudest, down to -80: librosa's power_to_db with ref=np.max."""
    log = 10 * log10(mel)
    return (log - log.max()).clamp(min=-80)


def float32_noise(power: Tensor, mel: Tensor, bank: Tensor) -> Tensor:
    """About how far a right log-mel in float32 is from the exact one, (frames, n_mels); 0 where the
    floor hides it.

    An FFT leaves in each bin an error of float32's step, relative to the frame's mean bin and not
    to its own: a quiet bin of a loud frame suffers most.
    """
    leaked = bank.sum(1) * power.mean(1, keepdim=True)
    relative = EPSILON32 * (leaked / mel.clamp(min=1e-30)).sqrt()
    floor = max(float(mel.max()) * 10**-RANGE, LEAST)
    return torch.where(mel < floor / 2, 0.0, 2 * relative / (4 * math.log(10)))


def linearly_resampled(audio: Tensor, rate: int) -> Tensor:
    """The samples as they come out if a file of `rate` Hz with the same sound, as far as the rate
    can carry it, is brought to 16 kHz by linear interpolation."""
    n = len(audio)
    step = SAMPLE_RATE // math.gcd(SAMPLE_RATE, rate)
    periods = -(-(n + 2000) // step)  # with silence, so that the end does not meet the start
    smooth = 1 << max(0, periods.bit_length() - 4)  # of small factors: a fast FFT
    padded = -(-periods // smooth) * smooth * step
    there = padded * rate // SAMPLE_RATE
    spectrum = torch.fft.rfft(audio, padded)
    file = torch.fft.irfft(spectrum[: there // 2 + 1], there) * (there / padded)
    at = torch.arange(n, dtype=torch.float64) * (rate / SAMPLE_RATE)
    before = at.floor().long()
    share = at - before
    return file[before] * (1 - share) + file[(before + 1) % there] * share


def silence_after(audio: Tensor, n: int = N_FFT) -> Tensor:
    return F.pad(audio, (0, n))
