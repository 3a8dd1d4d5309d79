"""encoder/audio.py: every branch on files made here by PyAV, and the same bits as ffmpeg's."""

from __future__ import annotations

import os
import shutil
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import whisper
from whisper.audio import HOP_LENGTH, N_FRAMES
from whisper.decoding import DecodingResult

import encoder.audio
from encoder.audio import AudioError, load_audio, windows

SECONDS = 1.5
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="compares with the ffmpeg program, which is not here"
)


def sound(rate: int, channels: int, seconds: float = SECONDS) -> np.ndarray:
    """A tone and noise, another one in each channel: float32 (channels, samples), within 0.45."""
    generator = np.random.default_rng(rate + channels)
    time = np.arange(int(seconds * rate)) / rate
    tones = [0.3 * np.sin(2 * np.pi * (300 + 150 * c) * time + c) for c in range(channels)]
    noise = generator.uniform(-0.15, 0.15, (channels, len(time)))
    return (np.stack(tones) + noise).astype(np.float32)


def frames_of(samples: np.ndarray, rate: int, layout: str, to: str) -> Iterator[av.AudioFrame]:
    """(channels, samples) float32 as audio frames of the sample format `to`."""
    resampler = av.AudioResampler(format=to, layout=layout, rate=rate)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
    frame.sample_rate = rate
    yield from resampler.resample(frame)
    yield from resampler.resample(None)


def write(
    path: Path,
    codec: str,
    rate: int,
    channels: int,
    *,
    seconds: float = SECONDS,
    sample_format: str | None = None,
    tracks: tuple[int, ...] = (),
    default: int | None = None,
    video: bool = False,
) -> Path:
    """A file with one audio track of `channels`, or one for each of `tracks`; maybe a picture."""
    with av.open(str(path), "w") as container:
        if video:
            picture = container.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
        streams = []
        for number, count in enumerate(tracks or (channels,)):
            options = {"strict": "experimental"} if codec == "vorbis" else {}
            stream = container.add_stream(codec, rate=rate, layout=LAYOUTS[count], options=options)
            if sample_format is not None:
                stream.format = sample_format
            if default is not None:
                kind = av.stream.Disposition
                stream.disposition = kind.default if number == default else kind(0)
            streams.append(stream)
        if video:
            container.mux(picture.encode(image))
            container.mux(picture.encode(None))
        for stream in streams:
            samples = sound(rate, stream.channels, seconds)
            layout = LAYOUTS[stream.channels]
            for frame in frames_of(samples, rate, layout, stream.format.name):
                container.mux(stream.encode(frame))
            # FLAC's encoder ends with an empty packet, which mp4 does not take.
            container.mux([packet for packet in stream.encode(None) if packet.size])
    return path


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """int16 (samples,) or (samples, channels) as a plain wav, by the standard library."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def steps_apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """|ours - theirs| in steps of 16 bits, sample by sample; the lengths must be equal."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs) * 32768


# ---------------------------------------------------------------- without an ffmpeg program


def test_16khz_mono_wav_is_its_samples_divided_by_32768(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 20011).astype(np.int16)
    samples[:2] = -32768, 32767
    audio = load_audio(write_wav(tmp_path / "a.wav", samples, 16000))
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(audio, samples.astype(np.float32) / 32768)


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    samples = (sound(16000, 2) * 32767).T.astype(np.int16)
    audio = load_audio(write_wav(tmp_path / "a.wav", samples, 16000))
    np.testing.assert_allclose(audio, samples.mean(1) / 32768, atol=1.01 / 32768)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_a_tone_keeps_its_samples_at_another_rate(tmp_path, rate):
    def tone(at: int) -> np.ndarray:
        return 0.5 * np.sin(2 * np.pi * 440 * np.arange(at) / at)

    audio = load_audio(write_wav(tmp_path / "a.wav", np.round(tone(rate) * 32768), rate))
    assert len(audio) == 16000
    inside = slice(200, -200)  # the resampler has not heard what is before and after the file
    np.testing.assert_allclose(audio[inside], tone(16000)[inside], atol=2e-3)


def test_the_sample_rate_can_be_chosen(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.arange(-4000, 4000), 8000)
    np.testing.assert_array_equal(load_audio(path, 8000) * 32768, np.arange(-4000, 4000))


@pytest.mark.parametrize(
    ("codec", "suffix", "late"),
    # late: samples at 16 kHz by which a format may be longer, of encoder padding nobody cuts off
    [
        ("pcm_u8", "wav", 0),
        ("pcm_s24le", "wav", 0),
        ("pcm_f32le", "wav", 0),
        ("flac", "flac", 0),
        ("alac", "m4a", 0),
        ("libmp3lame", "mp3", 0),
        ("aac", "m4a", 1024),
        ("vorbis", "ogg", 1024),
        ("libopus", "opus", 320),
        ("aac", "mkv", 2048),
    ],
)
def test_every_format_gives_the_same_sound(tmp_path, codec, suffix, late):
    path = write(tmp_path / f"a.{suffix}", codec, 48000, 2, video=suffix == "mkv")
    audio = load_audio(path)
    plain = load_audio(write(tmp_path / "plain.wav", "pcm_f32le", 48000, 2))
    assert len(plain) <= len(audio) <= len(plain) + late
    shift = int(np.argmax(np.correlate(audio, plain[: len(audio) - late], "valid")))
    assert shift in (range(late) if codec == "aac" else (0,))  # these files keep AAC's priming
    alike = np.corrcoef(audio[shift : shift + 20000], plain[:20000])[0, 1]
    assert alike > (0.9999 if codec in {"pcm_s24le", "pcm_f32le", "flac", "alac"} else 0.95)


def test_the_default_track_is_read_else_the_one_with_most_channels(tmp_path):
    stereo = load_audio(write(tmp_path / "2.mkv", "pcm_s16le", 16000, 2))
    surround = load_audio(write(tmp_path / "6.mkv", "pcm_s16le", 16000, 6))
    tracks = (2, 6, 6)
    most = load_audio(write(tmp_path / "a.mkv", "pcm_s16le", 16000, 0, tracks=tracks, default=99))
    np.testing.assert_array_equal(most, surround)
    chosen = load_audio(write(tmp_path / "b.mkv", "pcm_s16le", 16000, 0, tracks=tracks, default=0))
    np.testing.assert_array_equal(chosen, stereo)


def test_a_change_of_rate_within_the_file_is_followed(tmp_path):
    first = write(tmp_path / "1.mp3", "libmp3lame", 44100, 2)
    second = write(tmp_path / "2.mp3", "libmp3lame", 16000, 1)
    (tmp_path / "both.mp3").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.warns(UserWarning, match=r"both.mp3: 1 audio packets cannot be decoded"):
        audio = load_audio(tmp_path / "both.mp3")
    np.testing.assert_array_equal(audio[:20000], load_audio(first)[:20000])
    assert len(audio) == pytest.approx(2 * SECONDS * 16000, abs=4000)


def test_six_channels_without_names_are_5_1(tmp_path):
    """A plain wav names no channels: the low-frequency channel is left out, as in 5.1."""
    samples = np.zeros((4000, 6), np.int16)
    samples[:, 3] = 20000
    assert not load_audio(write_wav(tmp_path / "lfe.wav", samples, 16000)).any()
    samples[:, 2] = 20000
    assert load_audio(write_wav(tmp_path / "centre.wav", samples, 16000)).all()


def test_a_colon_and_odd_bytes_in_the_name_are_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("take:2.wav", "http:x.wav", os.fsdecode(b"\xff.wav")):
        write_wav(tmp_path / "plain.wav", np.arange(100), 16000).rename(name)
        assert len(load_audio(name)) == 100


def test_tags_that_are_not_utf8_are_no_obstacle(tmp_path):
    def chunk(name: bytes, body: bytes) -> bytes:
        return name + len(body).to_bytes(4, "little") + body

    path = write_wav(tmp_path / "a.wav", np.arange(100), 16000)
    body = path.read_bytes()[8:] + chunk(b"LIST", b"INFO" + chunk(b"INAM", b"\xe9t\xe9\0"))
    path.write_bytes(chunk(b"RIFF", body))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))  # the tag is there
    assert len(load_audio(path)) == 100


def test_a_truncated_file_gives_what_is_there(tmp_path):
    path = write(tmp_path / "a.flac", "flac", 16000, 1)
    whole, data = load_audio(path), path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"a.flac: 1 audio packets cannot be decoded and are left"):
        part = load_audio(path)
    assert 0.3 * len(whole) < len(part) < 0.6 * len(whole)
    np.testing.assert_array_equal(part, whole[: len(part)])


def test_a_file_that_cannot_be_read_to_its_end_says_so(tmp_path):
    """Chained Ogg whose second part has other channels: FFmpeg 8 stops there."""
    first = write(tmp_path / "1.opus", "libopus", 48000, 2)
    second = write(tmp_path / "2.opus", "libopus", 48000, 1)
    (tmp_path / "both.opus").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.warns(UserWarning, match=r"both.opus stops early, what follows cannot be read: "):
        audio = load_audio(tmp_path / "both.opus")
    np.testing.assert_array_equal(audio, load_audio(first))


def undecodable(tmp_path: Path) -> Path:
    """An mp4 whose index is whole and whose every packet is not."""
    path = write(tmp_path / "broken.mp4", "flac", 16000, 1)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    stop = data.index(b"moov") - 4
    path.write_bytes(data[:start] + bytes(stop - start) + data[stop:])
    return path


def nothing(tmp_path: Path) -> Path:
    (tmp_path / "nothing.wav").touch()
    return tmp_path / "nothing.wav"


def text(tmp_path: Path) -> Path:
    (tmp_path / "text.wav").write_text("not audio\n" * 100)
    return tmp_path / "text.wav"


def silent_film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
        container.mux(picture.encode(image))
        container.mux(picture.encode(None))
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "absent.wav", r"absent\.wav: no such file\."),
        (lambda p: p, r" is a directory, not an audio file\."),
        (nothing, r"nothing\.wav is empty \(0 bytes\)\."),
        (text, r"text\.wav is not audio that FFmpeg can open: "),
        (silent_film, r"film\.mkv has no audio stream \(Matroska / WebM\)\."),
        (
            lambda p: write_wav(p / "header.wav", np.zeros(0), 16000),
            r"header\.wav holds no audio samples\.",
        ),
        (undecodable, r"broken\.mp4: 21 of its audio packets cannot be decoded: Invalid data "),
        (
            lambda p: write_wav(p / "nine.wav", np.zeros((50, 9)), 16000),
            r"nine\.wav: FFmpeg cannot turn its audio \(s16, 9 channels, 16000 Hz\) into mono at ",
        ),
    ],
)
def test_what_is_refused_and_how(tmp_path, make, says):
    with pytest.raises(AudioError, match=says) as refusal:
        load_audio(make(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav", np.arange(100), 16000)
    path.chmod(0)
    if os.geteuid() == 0:  # root may read it all the same
        monkeypatch.setattr(encoder.audio.os, "access", lambda *_: False)
    with pytest.raises(AudioError, match=r"a\.wav cannot be read: permission denied\."):
        load_audio(path)


# ---------------------------------------------------------------- log-mel windows


def windows_of_transcribe(audio: np.ndarray) -> torch.Tensor:
    """The windows that the stock `whisper.transcribe` hands to its model."""
    seen = []

    class Model:
        device = torch.device("cpu")
        dims = whisper.model.ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)
        is_multilingual = False
        num_languages = 0

        def decode(self, mel: torch.Tensor, options: object) -> DecodingResult:
            seen.append(mel)
            return DecodingResult(mel, "en", tokens=[1], avg_logprob=0.0, compression_ratio=1.0)

    whisper.transcribe(Model(), audio, fp16=False, temperature=0.0)
    return torch.stack(seen)


@pytest.mark.parametrize("samples", [160, 16000, 480_000, 480_159, 480_160, 1_000_001])
def test_windows_are_those_of_whisper_transcribe(samples):
    audio = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    audio[: samples // 2] *= 1e-3  # the quiet half meets the floor that the loud one sets
    found = windows(audio, 80)
    assert found.dtype == torch.float32
    assert found.shape == (-(-(samples // HOP_LENGTH) // N_FRAMES), 80, N_FRAMES)
    assert torch.equal(found, windows_of_transcribe(audio))


def test_windows_of_less_than_a_frame_are_none():
    assert windows(np.zeros(159, np.float32), 128).shape == (0, 128, 3000)


def test_the_spectrogram_is_openais():
    assert encoder.audio.log_mel_spectrogram is whisper.audio.log_mel_spectrogram


# ---------------------------------------------------------------- against the ffmpeg program


def ffmpeg_in_float(path: Path) -> np.ndarray:
    """As whisper.load_audio, but an ffmpeg before 6.1 is told to resample in float like later."""
    form = "aresample=16000:internal_sample_fmt=fltp"
    form += ",aformat=channel_layouts=mono:sample_rates=16000:sample_fmts=s16"
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", path, "-af", form, "-f", "s16le", "-"]
    out = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(out, np.int16).astype(np.float32) / 32768


@needs_ffmpeg
@pytest.mark.parametrize(
    ("codec", "rate", "channels"),
    [
        ("pcm_s16le", 16000, 1),
        ("pcm_s16le", 16000, 2),
        ("pcm_s16le", 16000, 6),
        ("flac", 16000, 2),
        ("pcm_u8", 8000, 1),
        ("pcm_u8", 44100, 2),
        ("pcm_s24le", 11025, 2),
        ("pcm_s24le", 44100, 6),
        ("pcm_s32le", 48000, 1),
        ("pcm_f32le", 22050, 1),
        ("pcm_f32le", 48000, 6),
    ],
)
def test_lossless_formats_give_ffmpegs_bits(tmp_path, codec, rate, channels):
    path = write(tmp_path / f"a.{codec if codec == 'flac' else 'wav'}", codec, rate, channels)
    assert steps_apart(load_audio(path), whisper.load_audio(str(path))).max() == 0


@needs_ffmpeg
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (22050, 6), (44100, 2), (48000, 1)])
@pytest.mark.parametrize("codec", ["pcm_s16le", "flac"])
def test_16_bits_at_another_rate_give_the_bits_of_ffmpeg_in_float(tmp_path, codec, rate, channels):
    path = write(tmp_path / f"a.{codec if codec == 'flac' else 'wav'}", codec, rate, channels)
    ours = load_audio(path)
    assert steps_apart(ours, ffmpeg_in_float(path)).max() == 0
    assert steps_apart(ours, whisper.load_audio(str(path))).max() <= 5


@needs_ffmpeg
@pytest.mark.parametrize(
    ("codec", "suffix", "rate", "channels"),
    [
        ("libmp3lame", "mp3", 44100, 2),
        ("libmp3lame", "mp3", 16000, 1),
        ("aac", "m4a", 44100, 2),
        ("aac", "mp4", 48000, 6),
        ("aac", "aac", 22050, 1),
        ("libopus", "opus", 48000, 2),
        ("libopus", "mkv", 48000, 6),
        ("libopus", "webm", 16000, 1),
        ("ac3", "ac3", 48000, 2),
    ],
)
def test_lossy_formats_are_within_one_step_of_ffmpeg(tmp_path, codec, suffix, rate, channels):
    video = suffix in {"mp4", "mkv"}
    path = write(tmp_path / f"a.{suffix}", codec, rate, channels, video=video)
    apart = steps_apart(load_audio(path), whisper.load_audio(str(path)))
    assert apart.max() <= 1
    assert (apart > 0).mean() <= 0.005


@needs_ffmpeg
@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (16000, 1), (48000, 6)])
def test_vorbis_is_within_one_step_of_ffmpeg(tmp_path, rate, channels):
    """The wheel cannot write Vorbis as the world does, with libvorbis."""
    plain, path = write(tmp_path / "a.wav", "pcm_s24le", rate, channels), tmp_path / "a.ogg"
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", plain, "-c:a", "libvorbis", path]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this ffmpeg program is without libvorbis")
    apart = steps_apart(load_audio(path), whisper.load_audio(str(path)))
    assert apart.max() <= 1
    assert (apart > 0).mean() <= 0.005


@needs_ffmpeg
@pytest.mark.parametrize("default", [None, 0, 2, 99])
def test_the_track_is_the_one_ffmpeg_takes(tmp_path, default):
    path = tmp_path / "a.mkv"
    write(path, "pcm_s16le", 16000, 0, tracks=(1, 6, 2), default=default, video=True)
    assert steps_apart(load_audio(path), whisper.load_audio(str(path))).max() == 0


@needs_ffmpeg
def test_damaged_and_joined_files_give_what_ffmpeg_gives(tmp_path):
    first = write(tmp_path / "1.mp3", "libmp3lame", 44100, 2).read_bytes()
    second = write(tmp_path / "2.mp3", "libmp3lame", 16000, 1).read_bytes()
    middle = len(first) // 2
    noise = np.random.default_rng(0).bytes(1000)
    for data in (first[:middle], first[:middle] + noise + first[middle + 1000 :], first + second):
        path = tmp_path / "a.mp3"
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder.audio.warnings, "warn", lambda *_, **__: None)
            ours = load_audio(path)
        assert steps_apart(ours, whisper.load_audio(str(path))).max() == 0
