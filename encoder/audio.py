"""An audio file of any format as 16 kHz samples and log-mel windows; refuses what FFmpeg refuses.

FFmpeg comes with the PyAV wheel: no `ffmpeg` program is needed. The log-mel spectrogram is
openai-whisper's own, imported, so that the encoder sees the input it was trained on.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable, Iterator

import av
import numpy as np
import torch
from whisper.audio import (
    N_FRAMES,
    N_SAMPLES,
    SAMPLE_RATE,
    log_mel_spectrogram,
    pad_or_trim,
)

__all__ = [
    "N_FRAMES",
    "N_SAMPLES",
    "SAMPLE_RATE",
    "AudioError",
    "load_audio",
    "log_mel_spectrogram",
    "require_file",
    "windows",
]

# ffmpeg's own limit (-max_error_rate): above this share of undecodable packets it fails.
MAX_ERROR_RATE = 2 / 3


class AudioError(Exception):
    """The file cannot be read as audio; the message is one sentence that names the file."""


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise AudioError unless `path` is an existing, readable file that is not empty.

    Costs one `stat`, opens nothing: a pipe keeps its bytes.
    """
    name = os.fspath(path)
    try:
        status = os.stat(name)
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file.") from error
    except OSError as error:
        raise AudioError(f"{name} cannot be read: {error.strerror}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{name} is a directory, not an audio file.")
    if not os.access(name, os.R_OK):
        raise AudioError(f"{name} cannot be read: permission denied.")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise AudioError(f"{name} is empty (0 bytes).")


def load_audio(path: str | os.PathLike[str], sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Decode the file's audio: float32 (samples,), mono, in [-1, 1), at `sample_rate` Hz.

    Follows `whisper.load_audio`, which runs `ffmpeg -i path -f s16le -ac 1 -ar 16000 -`: the
    stream that ffmpeg would choose, one libswresample pass for downmix, rate and rounding to
    16 bits, then division by 32768.

    Where the result differs from that of an ffmpeg program of another version (found with 5.1):
    - 16-bit audio at another rate: FFmpeg 6.1 and newer, so the wheel's, resamples it in float,
      ffmpeg 5.1 in 16-bit integers. In noise that makes up to 5 steps of 1/32768, and more where a
      resampled channel exceeds full scale, since the integers clip there. ffmpeg 5.1 told to
      resample in float (`aresample=internal_sample_fmt=fltp`) gives the same bits as this.
    - AAC, Vorbis, Opus, AC-3: single samples by one step, since the decoders differ.
    - A few rare ones by more: IMA ADPCM, the joints of chained Ogg, 16 channels without names.
    Equal bit for bit: mp3, 8-bit, 24-bit and float wav and 24-bit flac at any rate, 16 bits at
    16 kHz. The number of samples is equal in all of them, but for a chained Ogg whose parts differ
    in rate or channels: there FFmpeg 8 stops at the first joint, which is a warning here.

    What ffmpeg decodes with exit status 0 is returned here too: of a truncated or damaged file
    the part that can be decoded, with a warning that says what was left out.

    Raises AudioError for a file that is missing, unreadable, empty, not audio, without an audio
    stream, undecodable (more than two thirds of its packets), without samples, or of a channel
    layout that FFmpeg cannot mix down.
    """
    name = os.fspath(path)
    require_file(name)
    try:
        # "file:" so that a colon in the name is not taken for a protocol ("take:2.wav").
        # Tags in another encoding than UTF-8 must not stop the audio: metadata_errors.
        container = av.open(f"file:{name}", metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise AudioError(f"{name} is not audio that FFmpeg can open: {_reason(error)}.") from error
    with container:
        stream = _choose_stream(container, name)
        pieces = list(_mono(_frames(container, stream, name), sample_rate, name))
    samples = np.concatenate(pieces) if pieces else np.empty(0, np.int16)
    if not samples.size:
        raise AudioError(f"{name} holds no audio samples.")
    return samples.astype(np.float32) / 32768.0


def windows(audio: np.ndarray, n_mels: int) -> torch.Tensor:
    """Log-mel of consecutive 30 s windows: (windows, n_mels, 3000) float32.

    `audio` is float32 (samples,) at 16 kHz. Follows `whisper.transcribe` for a file in which
    every window is decoded to its end: the spectrogram is that of the whole file and 30 s of
    silence after it, so its floor (8 below the file's maximum) is the file's; a window that
    reaches past the last of the samples // 160 content frames is filled up with zeros.
    Audio shorter than one frame (160 samples) has no window.
    """
    mel = log_mel_spectrogram(audio, n_mels, padding=N_SAMPLES)
    content_frames = mel.shape[-1] - N_FRAMES
    cut = [
        pad_or_trim(mel[:, seek : min(seek + N_FRAMES, content_frames)], N_FRAMES)
        for seek in range(0, content_frames, N_FRAMES)
    ]
    return torch.stack(cut) if cut else mel.new_empty((0, n_mels, N_FRAMES))


def _choose_stream(container: av.container.InputContainer, name: str) -> av.AudioStream:
    """The audio stream ffmpeg takes by default: marked as default, then most channels, then first.

    Follows `map_auto_audio` in FFmpeg's fftools/ffmpeg_mux_init.c, without its preference for
    streams of which a packet was seen while probing, which PyAV does not tell.
    """
    streams = container.streams.audio
    if not streams:
        raise AudioError(f"{name} has no audio stream ({container.format.long_name}).")
    stream = max(
        streams,
        key=lambda s: (bool(s.disposition & av.stream.Disposition.default), s.channels),
    )
    if stream.codec_context is None:
        raise AudioError(f"{name}: this FFmpeg has no decoder for its audio stream.")
    return stream


def _packets(
    container: av.container.InputContainer, stream: av.AudioStream, name: str
) -> Iterator[av.Packet | None]:
    """The stream's packets, then None to drain the decoder. A read error ends the file."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            warnings.warn(
                f"{name} stops early, what follows cannot be read: {_reason(error)}.", stacklevel=2
            )
            break
        if packet is None:
            break
        if packet.size:  # PyAV ends with an empty packet, in case of a read error without one
            yield packet
    yield None


def _frames(
    container: av.container.InputContainer, stream: av.AudioStream, name: str
) -> Iterator[av.AudioFrame]:
    """The stream's decoded frames, without the packets that cannot be decoded, as in ffmpeg."""
    decoded = failed = 0
    reason = ""
    for packet in _packets(container, stream, name):
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.EOFError:  # the decoder met the end of its stream before the packets' end
            continue
        except av.error.FFmpegError as error:
            failed, reason = failed + 1, _reason(error)
            continue
        decoded += len(frames)
        yield from frames
    if failed > MAX_ERROR_RATE * (decoded + failed):
        raise AudioError(f"{name}: {failed} of its audio packets cannot be decoded: {reason}.")
    if failed:
        warnings.warn(
            f"{name}: {failed} audio packets cannot be decoded and are left out: {reason}.",
            stacklevel=2,
        )


def _mono(frames: Iterable[av.AudioFrame], sample_rate: int, name: str) -> Iterator[np.ndarray]:
    """Frames of any format as int16 pieces: (samples,), mono, at `sample_rate` Hz."""
    resampler: av.AudioResampler | None = None
    source: tuple[str, str, int] | None = None
    try:
        for frame in frames:
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
            if resampler is None or form != source:
                # Format, layout or rate may change on the way (as in a chained Ogg). There ffmpeg
                # starts its filters anew and drops what the old resampler still held (about 1 ms).
                source = form
                resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate)
            for piece in resampler.resample(frame):
                yield piece.to_ndarray()[0]
        if resampler is not None:
            for piece in resampler.resample(None):
                yield piece.to_ndarray()[0]
    except av.error.FFmpegError as error:
        raise AudioError(
            f"{name}: FFmpeg cannot turn its audio ({', '.join(map(str, source or ()))} Hz) "
            f"into mono at {sample_rate} Hz: {_reason(error)}."
        ) from error


def _reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's own words for the error."""
    return error.strerror or str(error)
