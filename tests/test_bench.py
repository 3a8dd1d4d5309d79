"""The fault bench: its recordings, the mistakes after the encoder, one trial, and the command that
goes on where it was stopped. A random checkpoint makes it quick; `demo` where words matter."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from conftest import SAMPLES, Pair
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn
from whisper.audio import N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.decoding import DecodingOptions
from whisper.model import ModelDimensions
from whisper.tokenizer import get_tokenizer

import weights
from encoder.audio import SAMPLE_RATE, AudioError
from validation import bench, findings, fingerprints, trials
from validation.faults import FAULTS, Fault, Twin, bridge
from validation.faults.bridge import FirstWindow, FloorOfWindow, merged, segments_of, transcribed
from validation.ledger import Ledger, LedgerError
from validation.parity import first_diverging, judge
from validation.recordings import (
    Recording,
    RecordingsError,
    bundled,
    end_to_end,
    filled,
    from_files,
    joined,
    variants,
)
from validation.semantic import with_encoder
from validation.transcripts import Heard, Transcripts
from validation.trials import Bench, BenchError
from weights import Checkpoint, expected_shapes

FILES = [str(SAMPLES / "demo.flac"), str(SAMPLES / "flite-slt.flac")]
FOUR = "S07,S14,S18,S23"
# A text of 16 tokens at most, since a random decoder never ends one.
DIMS = ModelDimensions(80, 1500, 128, 2, 2, 51864, 32, 128, 2, 1)


def random_file(folder: Path) -> Path:
    """A whole checkpoint of random weights, of a size that keeps the activations near 1."""
    generator = torch.Generator().manual_seed(1)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if name.endswith(("ln.weight", "ln_post.weight")):
            return 1 + 0.1 * x
        if name.endswith(".bias"):
            return 0.1 * x
        return x / shape[1:].numel() ** 0.5 if name.endswith(".weight") else x

    shapes = expected_shapes(DIMS, decoder=True)
    path = folder / "random.safetensors"
    save_file({name: tensor(name, torch.Size(shape)) for name, shape in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two() -> list[Recording]:
    return from_files(FILES)


@pytest.fixture(scope="module")
def small(
    model_file: Path, two: list[Recording], tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    checkpoint = weights.load(str(model_file), offline=True)
    return Bench(checkpoint, two, tmp_path_factory.mktemp("bench"), on_max=False)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def write_wav(path: Path, audio: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((audio * 32767).astype("<i2").tobytes())


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---- recordings


def test_the_bundled_recordings():
    found, again = bundled(), bundled()
    assert len(found) >= 12
    assert len({r.name for r in found}) == len(found)
    for recording, same in zip(found, again, strict=True):
        assert 10 < recording.seconds <= 30
        assert recording.audio.dtype == np.float32
        assert np.array_equal(recording.audio, same.audio)
        assert (recording.words or 0) >= 12
    assert len({r.sha256 for r in found}) == len(found)


def test_one_of_them_is_full_to_its_end():
    """What it takes for S05 and E03 to change anything."""
    recording = bundled()[0]
    assert len(recording.audio) == N_SAMPLES
    assert np.abs(recording.audio[-160:]).max() >= 0.1 * np.abs(recording.audio).max()
    mel = trials.windows(recording.audio, 80)[:1]
    for key in ("S05", "E03"):
        assert not torch.equal(FAULTS[key].mel(recording.audio, mel), mel)


def loud_at_end(audio: np.ndarray) -> np.ndarray:
    return np.r_[audio[:-1], np.float32(0.9)]


def samples_of(folder: Path, clips: int) -> np.ndarray:
    """65 s of sentences of 4 s with 1 s of silence after each, and so many clips of 3 s or more."""
    audio = np.concatenate(
        [np.r_[loud_at_end(noise(4, i)), np.zeros(SAMPLE_RATE, np.float32)] for i in range(13)]
    )
    write_wav(folder / "long.wav", audio)
    sentences = [{"text": f"word{i}", "start": 5.0 * i, "end": 5.0 * i + 4} for i in range(13)]
    rows: list[dict[str, Any]] = [{"file": "long.wav", "text": "", "sentences": sentences}]
    for i in range(clips):
        write_wav(folder / f"{i}.wav", loud_at_end(noise(3 + 0.1 * (i % 11), 20 + i)))
        rows.append({"file": f"{i}.wav", "text": f"clip{i}"})
    (folder / "samples.json").write_text(json.dumps(rows))
    return audio


def test_a_long_recording_is_cut_in_its_pauses(tmp_path: Path):
    """The first sentences fill 30 s; eleven clips have to be joined in other orders until there are
    twelve recordings."""
    audio = samples_of(tmp_path, 11)
    found = bundled(tmp_path)
    assert [r.name for r in found[:3]] == ["long-1", "long-2", "long-3"]
    assert " ".join(str(r.text) for r in found[:3]) == " ".join(f"word{i}" for i in range(13))
    assert [r.seconds for r in found[:3]] == [30, 20, 15.5]
    assert not found[0].audio[:SAMPLE_RATE].any()
    assert np.abs(found[0].audio[SAMPLE_RATE:] - audio[: 29 * SAMPLE_RATE]).max() < 1e-4
    for i in (1, 2):
        assert not found[i].audio[: SAMPLE_RATE // 4].any()  # in the midst of a pause
        assert not found[i].audio[-SAMPLE_RATE // 4 :].any()
    assert len(found) == 12
    assert found[3].text == "clip0 clip1 clip2 clip3"
    for recording in found[3:]:
        assert recording.seconds >= 12
    orders = [r.text for r in found[3:]]
    assert len(set(orders)) == len(orders)
    assert found[0].clips == ("long-1",)
    assert found[3].clips == ("0.wav", "1.wav", "2.wav", "3.wav")
    clips = [clip for r in found for clip in r.clips]
    assert len(set(clips)) == 3 + 11 < len(clips)


def test_no_clip_is_heard_twice_where_there_are_enough(tmp_path: Path):
    samples_of(tmp_path, 40)
    found = bundled(tmp_path)
    assert len(found) >= 12
    clips = [clip for r in found for clip in r.clips]
    assert len(set(clips)) == len(clips)


def test_clips_alone(tmp_path: Path):
    """The first ones fill 30 s, as many as it holds; what is too long is cut off in front."""
    samples_of(tmp_path, 11)
    rows = json.loads((tmp_path / "samples.json").read_text())
    (tmp_path / "samples.json").write_text(json.dumps(rows[1:]))
    found = bundled(tmp_path)
    assert found[0].name == "clips-1"
    assert found[0].seconds == 30
    assert found[0].clips == tuple(f"{i}.wav" for i in range(8))  # 26.8 s, with another 30.6
    assert found[0].audio[-1]
    assert found[1].text == "clip0 clip1 clip2 clip3"
    whole = end_to_end("whole", [replace(r, text="one") for r in found[:2]])
    cut = filled("cut", whole)
    assert cut.seconds == 30
    assert np.array_equal(cut.audio, whole.audio[-N_SAMPLES:])


def test_without_samples_there_are_none(tmp_path: Path):
    with pytest.raises(RecordingsError, match="name audio files"):
        bundled(tmp_path)
    rows = [{"file": "demo.flac", "text": "one"}]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    shutil.copy(SAMPLES / "demo.flac", tmp_path)
    with pytest.raises(RecordingsError, match="is enough for 1 recordings"):
        bundled(tmp_path)


def test_files_are_cut_to_a_window(tmp_path: Path):
    long, short = tmp_path / "long.wav", tmp_path / "short.wav"
    write_wav(long, noise(31))
    write_wav(short, noise(2))
    found = from_files([str(long), str(short)], {str(long): "many words", str(short): "two words"})
    assert [r.seconds for r in found] == [30, 2]
    assert [r.text for r in found] == [None, "two words"]
    with pytest.raises(RecordingsError, match=r"long\.wav is named twice"):
        from_files([str(long), str(long)])
    write_wav(short, noise(0.005))
    with pytest.raises(RecordingsError, match="shorter than 10 ms"):
        from_files([str(short)])
    with pytest.raises(AudioError, match="no such file"):
        from_files([str(long), str(tmp_path / "none.wav")])


@pytest.mark.parametrize("seconds", [25, 30])
def test_variants_are_the_same_words_otherwise(seconds: float):
    recording = Recording("a", noise(seconds), "some words")
    found = variants(recording, 15, seed=3)
    assert found[0] is recording
    assert len({r.sha256 for r in found}) == len({r.name for r in found}) == len(found)
    for one in found:
        assert one.text == "some words"
        assert one.clips == ("a",)
        assert one.audio.dtype == np.float32
        assert np.abs(one.audio).max() <= 1
        assert len(one.audio) <= N_SAMPLES
    assert any(len(one.audio) > len(recording.audio) for one in found) == (seconds < 30)
    full = [one for one in found if ": the last of 30 s" in one.name]
    assert len(full) == (seconds < 30)
    for one in full:
        assert len(one.audio) == N_SAMPLES
        assert one.audio[-1] != 0
    again = variants(recording, len(found), seed=3)
    assert [r.sha256 for r in found] == [r.sha256 for r in again]
    other = variants(recording, len(found), seed=4)
    assert not {r.sha256 for r in found[1:]} & {r.sha256 for r in other[1:]}
    with pytest.raises(RecordingsError, match="silent"):
        variants(Recording("b", np.zeros(SAMPLE_RATE, np.float32), None), 2)


def test_the_speed_of_a_variant_is_its_pitch():
    """A sine of 1000 Hz, played at another speed, is a sine of that many times 1000 Hz."""
    t = np.arange(4 * SAMPLE_RATE) / SAMPLE_RATE
    tone = Recording("tone", (0.5 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32), None)
    fast, slow = variants(tone, 7)[5:7]
    for one in (slow, fast):
        spectrum = np.abs(np.fft.rfft(one.audio))
        heard = spectrum.argmax() / one.seconds
        assert heard == pytest.approx(1000 * tone.seconds / one.seconds, rel=1e-3)
        assert np.abs(one.audio).max() == pytest.approx(0.5, rel=0.05)
    assert slow.seconds > tone.seconds > fast.seconds


def test_joined_goes_round():
    clips = [Recording(str(i), noise(10 + i, i), f"w{i}") for i in range(3)]
    found = joined(clips, 2, seconds=40)
    assert found.name == "2"
    assert found.text == "w2 w0 w1 w2"
    assert found.seconds == 12 + 10 + 11 + 12
    assert joined(clips[:1], 0).seconds == 50
    assert end_to_end("x", [clips[0], replace(clips[1], text=None)]).text is None


# ---- after the encoder


def test_segments_are_between_timestamps():
    tokenizer = get_tokenizer(False)
    begin = tokenizer.timestamp_begin
    words = tokenizer.encode(" one two")
    tokens = [begin + 50, *words, begin + 100, begin + 150, *words]
    first, second = segments_of(tokens, tokenizer, end=30.0, start=10.0)
    assert (first["start"], first["end"]) == (11.0, 12.0)
    assert first["tokens"] == tokens[:4]
    assert (second["start"], second["end"]) == (13.0, 30.0)
    assert first["text"] == second["text"] == " one two"
    assert segments_of(words, tokenizer, end=5.0)[0]["end"] == 5.0
    assert segments_of([begin, begin + 3], tokenizer, end=5.0) == []


def test_texts_are_merged_by_their_characters():
    assert merged("a cat sat on", "sat on the mat") == "a cat sat on the mat"
    assert merged("a cat", "the mat") == "a cathe mat"  # what such a port gets
    assert merged("one", "two") == "one two"
    assert merged("", "two") == "two"


def test_the_first_window_again():
    module = FirstWindow(nn.Flatten())
    first = module(torch.ones(1, 2))
    assert torch.equal(module(torch.zeros(1, 2)), first)


def test_the_floor_of_each_window():
    """Two windows, the second one softer: what its floor does not change keeps its bits, what it
    does is what the sound of that window alone gives."""
    audio = np.r_[noise(30, 1), 0.01 * noise(10, 2)]
    mel = log_mel_spectrogram(audio, 80, padding=N_SAMPLES)
    encoder = FloorOfWindow(nn.Identity(), audio, 80)
    first = pad_or_trim(mel[:, :3000], 3000)[None]
    assert torch.equal(encoder(first), first)
    assert not encoder.changed
    second = pad_or_trim(mel[:, 3000:4000], 3000)[None]
    found = encoder(second)
    changed = found != second
    assert 0 < int(changed.sum()) < 0.001 * changed.numel()  # 40 dB below, and 80 dB are kept
    assert (second[changed] == second[..., :1000].min()).all()
    assert (found[changed] < second[changed]).all()
    loud = 10 * noise(29.5, 1)
    quiet = np.r_[loud, np.zeros(SAMPLE_RATE // 2, np.float32), 1e-3 * noise(10, 2)]
    mel = log_mel_spectrogram(quiet, 80, padding=N_SAMPLES)
    encoder = FloorOfWindow(nn.Identity(), quiet, 80)
    second = pad_or_trim(mel[:, 3000:4000], 3000)[None]
    found = encoder(second)
    assert encoder.changed
    assert not found[..., 1000:].any()
    alone = log_mel_spectrogram(quiet[30 * SAMPLE_RATE :], 80, padding=N_SAMPLES)
    assert torch.allclose(found[0, :, 3:997], alone[:, 3:997], atol=1e-4)
    with pytest.raises(ValueError, match="none of this recording"):
        encoder(second + 1)


@pytest.fixture(scope="module")
def long_audio() -> Recording:
    return joined(bundled(), 0)


@pytest.fixture(scope="module")
def right(demo: Pair, long_audio: Recording) -> Heard:
    return Heard.of(demo.stock.transcribe(long_audio.audio, temperature=0.0, fp16=False))


AS_STOCK = {"temperature": 0.0, "fp16": False, "without_timestamps": False}


def decoded(model: whisper.Whisper, audio: np.ndarray, **options: Any) -> str:
    mel = log_mel_spectrogram(pad_or_trim(audio), 80)
    return whisper.decode(model, mel, DecodingOptions(fp16=False, language="en", **options)).text


def test_a_text_without_end_is_cut_off(
    demo: Pair, long_audio: Recording, right: Heard, monkeypatch: pytest.MonkeyPatch
):
    """With what was said before, and without an error."""
    monkeypatch.setattr(bridge, "MOST_WINDOWS", 1)
    model = with_encoder(demo.stock, demo.stock.encoder)
    options = {"temperature": 0.0, "fp16": False}
    found = transcribed(model, long_audio.audio, options)
    assert found["cut_off"]
    first = [s for s in right.segments if s["seek"] == 0]
    assert [s["text"] for s in found["segments"]] == [s["text"] for s in first]
    assert found["text"].strip()
    monkeypatch.setattr(bridge, "MOST_WINDOWS", 20)
    found = transcribed(model, long_audio.audio, options)
    assert not found["cut_off"]
    assert found["text"] == right.text


@pytest.mark.parametrize("id_", ["E07-window", "S30", "S31", "S32", "S33", "S34", "S35", "S36"])
def test_each_fault_of_the_bridge(id_: str, demo: Pair, long_audio: Recording, right: Heard):
    model, audio = demo.stock, long_audio.audio
    if id_ == "S35":  # it says as much as it can: one sentence is enough
        audio = audio[: 3 * SAMPLE_RATE]
    if id_ == "E07-window":  # windows whose loudest bin is far under the file's
        audio = audio.copy()
        audio[N_SAMPLES:] *= 0.03
    before = {name: x.clone() for name, x in model.state_dict().items()}
    encoder, dims, given = model.encoder, model.dims, dict(AS_STOCK)
    made = FAULTS[id_].transcribe(model, audio, given)
    heard = Heard.of(made)
    assert not made.get("cut_off", False)
    assert given == AS_STOCK
    assert (model.encoder, model.dims) == (encoder, dims)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(s["start"] <= s["end"] for s in heard.segments)
    step = 25 * SAMPLE_RATE
    match id_:
        case "E07-window":
            assert made["injected"]
            assert heard.text.split()
        case "S30":  # what is said after the first window changes nothing
            other = audio.copy()
            other[N_SAMPLES:] *= 0.1
            assert Heard.of(FAULTS[id_].transcribe(model, other, given)).text == heard.text
            assert heard.text.startswith(right.segments[0]["text"])
        case "S31":
            assert heard.text == decoded(model, audio)
            assert all(s["end"] <= 30 for s in heard.segments)
        case "S32":
            assert heard.text == decoded(model, audio, beam_size=5)
        case "S33":
            assert heard.text == decoded(model, audio, suppress_tokens="", suppress_blank=False)
        case "S34":
            first, second, third = (
                decoded(model, audio[start : start + N_SAMPLES]) for start in (0, step, 2 * step)
            )
            assert heard.text == merged(merged(first, second), third)
            assert any(s["start"] >= 25 for s in heard.segments) == bool(second or third)
        case "S35":
            assert heard.tokens != right.tokens
            assert heard.text.split() != right.text.split()
        case "S36":
            assert heard.tokens == right.tokens
            assert heard.text.split() != right.text.split()


# ---- transcripts


@pytest.fixture(scope="module")
def said(demo: Pair, two: list[Recording]) -> tuple[Transcripts, list[Tensor]]:
    with torch.no_grad():
        features = [demo.stock.encoder(trials.windows(r.audio, 80)[:1]) for r in two]
    truths = ["our teacher calls the word before the tree", None]
    spoken = [replace(r, text=text) for r, text in zip(two, truths, strict=True)]
    return Transcripts(demo.stock, spoken, features), features


def test_the_same_features_say_the_same(said: tuple[Transcripts, list[Tensor]]):
    transcripts, features = said
    for row, own in zip(transcripts.of(features), transcripts.heard, strict=True):
        assert row["failed"] is None
        assert row["kl_max"] < 1e-9
        assert row["same_top1"] == 1
        assert row["tokens_identical"]
        assert row["first_difference"] is None
        assert row["wer"]["wer"] == row["lost"] == row["invented"] == 0
        assert row["wer"]["words"] == len(row["text"].split()) > 2
        assert row["text"] == row["reference_text"] == own.text
    first, second = transcripts.of(features)
    assert first["wer_truth"]["words"] == 8
    assert first["wer_truth"]["wer"] == first["wer_truth_reference"]
    assert second["wer_truth"] is second["wer_truth_reference"] is None


def test_missing_features_are_all_words_lost(said: tuple[Transcripts, list[Tensor]]):
    transcripts, features = said
    missing, kept = transcripts.of([None, features[1]])
    assert not missing["tokens_identical"]
    assert missing["first_difference"] == 0
    assert missing["text"] == ""
    assert missing["wer"]["deletions"] == missing["wer"]["words"] > 2
    assert missing["lost"] > 0 == missing["invented"]
    assert missing["kl_mean"] is None
    assert kept == transcripts.of(features)[1]


def test_the_other_recordings_features(said: tuple[Transcripts, list[Tensor]]):
    """Each recording gets the features of the other, and so the other's text."""
    transcripts, features = said
    for i, row in enumerate(transcripts.of(features[::-1])):
        assert row["text"] == transcripts.heard[1 - i].text
        at, (ours, theirs) = row["first_difference"], row["first_difference_tokens"]
        assert ours != theirs
        assert ours.startswith("<|") or ours.strip() in row["reference_text"]
        assert row["tokens"] == len(transcripts.heard[1 - i].tokens) > at
        assert row["cut_off"] is row["reference_cut_off"] is False
        assert 0 < row["kl_mean"] < row["kl_max"]
        assert row["same_top1"] < 1
        assert row["wer"]["wer"] > 0


def test_features_that_break_the_decoder(said: tuple[Transcripts, list[Tensor]]):
    transcripts, features = said
    broken, kept = transcripts.of([features[0] * 1e38, features[1]])
    assert broken["cut_off"] is False
    assert "not finite" in broken["failed"]
    assert broken["text"] == ""
    assert kept["tokens_identical"]


# ---- one trial


def ln_post(id_: str, formula: Any) -> Fault:
    return Fault(
        id=id_,
        group="blocks",
        sentence="Made for the test.",
        seen="",
        first_tap="ln_post",
        cause=None,
        how="code",
        formulas=lambda dims, layers: {"ln_post": formula},
    )


@pytest.mark.parametrize("key", ["S07", "S14", "S18", "S22", "E09", "E17"])
def test_only_what_is_wrong_is_run_again(small: Bench, key: str):
    """The taps are the twin's, bit for bit, and those that are the right twin's are known."""
    twin, p = Twin(small.checkpoint, FAULTS[key]), small.prepared[0]
    taps, same = trials.taps_of(twin, p.golden.mel, p.twin, small.tensors)
    whole = twin.taps(p.golden.mel)
    assert list(taps) == list(whole)
    for name, tap in whole.items():
        assert torch.equal(taps[name], tap), name
        assert (name in same) == torch.equal(tap, p.twin[name]), name
    assert 0 < len(same) < len(taps)


@pytest.mark.parametrize("key", ["S07", "S18", "S22", "E17"])
def test_the_verdict_is_that_of_parity(small: Bench, key: str):
    """With the whole comparison of `parity`, of every tap and with everything injected."""
    fault = FAULTS[key]
    twin = Twin(small.checkpoint, fault)
    for row, p in zip(small.trial(fault), small.prepared, strict=True):
        taps = twin.taps(p.golden.mel)
        injected = twin.injected(p.golden.taps)
        judged = judge(taps, injected, p.golden, small.tensors, small.dims)
        first = first_diverging(judged)
        assert first is not None
        assert row["first_tap"] == first.stage.name == row["expected_first_tap"]
        assert row["at_tap"]["relative_l2"] == pytest.approx(first.free.relative_l2)
        assert row["at_tap"]["sqnr_db"] == pytest.approx(first.free.sqnr_db)
        final = judged[-1].free
        assert row["final"]["relative_l2"] == pytest.approx(final.relative_l2)
        assert row["final"]["max_abs"] == pytest.approx(final.max_abs)
        right, wrong = p.golden.taps["ln_post"].numpy(), taps["ln_post"].numpy()
        psnr = 20 * np.log10(np.abs(right).max() / np.sqrt(np.mean((right - wrong) ** 2)))
        assert row["final"]["psnr_db"] == pytest.approx(psnr, abs=1e-3)
        assert row["cause"] == row["expected_cause"] == fault.cause
        assert row["detected"]
        assert row["max"] is None
        assert row["failed"] is None


def same_weights(tensors: dict[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    return {"ln_post.bias": tensors["ln_post.bias"].clone()}


@pytest.mark.parametrize(
    "fault",
    [
        FAULTS["S05"],  # of recordings of 4 s, all of which are in the first half of a window
        replace(FAULTS["S14"], id="nothing", weights=same_weights),
    ],
    ids=lambda fault: fault.id,
)
def test_what_is_not_injected(small: Bench, fault: Fault):
    for row in small.trial(fault):
        assert not row["injected"]
        assert not row["detected"]
        assert row["final"]["relative_l2"] < 1e-5


def test_what_is_injected(small: Bench):
    """A weight that is another, an input, and a tap that is missing; a fault of the bridge says
    itself whether it has changed anything."""
    for key in ("S14", "E23", "S22"):
        assert all(row["injected"] for row in small.trial(FAULTS[key]))
    stock = replace(FAULTS["S31"], transcribe=FAULTS["S14"].transcribe)
    assert all(row["injected"] for row in small.trial(stock))

    def says(model: whisper.Whisper, audio: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
        return {"text": "", "segments": [], "injected": False, "cut_off": True}

    for row in small.trial(replace(FAULTS["S31"], transcribe=says)):
        assert (row["injected"], row["cut_off"]) == (False, True)


def test_what_changes_nothing_is_not_detected(small: Bench):
    same = ln_post("same", lambda s, x, t: torch.nn.functional.layer_norm(
        x[s.inputs[0]], (128,), t["ln_post.weight"], t["ln_post.bias"]
    ))  # fmt: skip
    for row in small.trial(same):
        assert not row["detected"]
        assert row["first_tap"] is row["cause"] is row["at_tap"] is None
        assert row["final"]["relative_l2"] < 1e-5
        assert row["tokens_identical"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (ln_post("nan", lambda s, x, t: x[s.inputs[0]] * torch.nan), "are NaN or infinite"),
        (ln_post("cut", lambda s, x, t: x[s.inputs[0]][:, :100]), "have shape (1, 100, 128)"),
    ],
    ids=lambda value: value.id if isinstance(value, Fault) else "",
)
def test_what_are_no_features(small: Bench, fault: Fault, sentence: str):
    for row in small.trial(fault):
        json.dumps(row, allow_nan=False)
        assert sentence in row["failed"]
        assert row["detected"]
        assert row["first_tap"] == "ln_post"
        assert row["final"] is None
        assert not row["tokens_identical"]
        assert row["text"] == ""


def test_two_trials_are_equal(small: Bench):
    keys = ("S14", "S30")
    first, second = ([small.trial(FAULTS[key]) for key in keys] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert without_seconds(a) == without_seconds(b)


def test_a_row_of_the_bridge_has_the_keys_of_any_other(small: Bench):
    encoder, bridge = small.trial(FAULTS["S23"])[0], small.trial(FAULTS["S31"])[0]
    assert encoder.keys() == bridge.keys()
    for key in ("first_tap", "expected_first_tap", "cause", "at_tap", "final", "max", "kl_mean"):
        assert bridge[key] is None
    assert bridge["detected"] is False


def test_the_encoder_alone(small: Bench, two: list[Recording], tmp_path: Path):
    """No decoder: the numbers are the same, there is no text, and no fault of the bridge."""
    alone = {n: t for n, t in small.checkpoint.tensors.items() if n.startswith("encoder.")}
    checkpoint = replace(small.checkpoint, tensors=alone)
    other = Bench(checkpoint, two, tmp_path, on_max=False)
    for with_text, without in zip(
        small.trial(FAULTS["S23"]), other.trial(FAULTS["S23"]), strict=True
    ):
        assert without["final"] == with_text["final"]
        assert without["first_tap"] == "ln_post"
        assert without["text"] is without["wer"] is without["tokens_identical"] is None
    with pytest.raises(BenchError, match="needs a decoder"):
        other.trial(FAULTS["S31"])


def test_nothing_is_measured_by_a_bench_that_is_wrong(
    small: Bench, two: list[Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trials, "Twin", lambda checkpoint: Twin(checkpoint, FAULTS["E09"]))
    with pytest.raises(BenchError, match=r"demo\.flac: torch twin .* differs .* at conv1\.gelu"):
        Bench(small.checkpoint, two, tmp_path, on_max=False)
    assert [path.name for path in tmp_path.iterdir()] == ["00-reference.safetensors"]


def test_what_was_prepared_is_used_again(
    small: Bench, two: list[Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = Bench(small.checkpoint, two[:1], tmp_path, on_max=False).prepared[0]
    written = (tmp_path / "00-twin.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(trials, "golden_of", None)  # would be called, and fail
        again = Bench(small.checkpoint, two[:1], tmp_path, on_max=False).prepared[0]
    assert (tmp_path / "00-twin.safetensors").stat().st_mtime_ns == written
    for name, tap in first.twin.items():
        assert torch.equal(tap, again.twin[name])
    other = Bench(small.checkpoint, two[1:], tmp_path, on_max=False).prepared[0]
    assert other.golden.file == two[1].name
    assert torch.equal(other.golden.mel, small.prepared[1].golden.mel)


@pytest.fixture(scope="module")
def on_max(
    demo_checkpoint: Checkpoint, two: list[Recording], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("on-max")
    yield Bench(demo_checkpoint, two[:1], folder)
    shutil.rmtree(folder)  # 370 MB


LOUDER = Fault(
    id="louder",
    group="input",
    sentence="Made for the test.",
    seen="",
    first_tap="mel",
    cause="scaled-and-offset",
    how="input",
    mel=lambda audio, mel: mel + 0.1,
)


@pytest.mark.parametrize(
    "fault",
    [
        *(FAULTS[key] for key in ("S07", "S14", "S16", "E22-swapped", "E11@int8 per tensor")),
        LOUDER,
    ],
    ids=lambda f: f.key,
)
def test_the_compiled_graph_says_the_same(
    on_max: Bench, fault: Fault, monkeypatch: pytest.MonkeyPatch
):
    explained: list[str] = []
    explain = fingerprints.explain

    def spied(stage: Any, *of: Any) -> Any:
        explained.append(stage.name)
        return explain(stage, *of)

    monkeypatch.setattr(fingerprints, "explain", spied)
    (row,) = on_max.trial(fault)
    assert len(explained) == (1 if fault is LOUDER else 2)  # a mel is the same on both sides
    found = row["max"]
    assert found["detected"]
    assert found["first_tap"] == row["first_tap"] == fault.diverges_at()
    assert found["same_first_tap"]
    assert found["cause"] == row["cause"] == fault.cause
    assert found["twin_relative_l2"] == row["final"]["relative_l2"] > 1e-3
    assert found["final_relative_l2"] != found["twin_relative_l2"]  # another encoder's
    assert 0 < found["relative_difference"] < 0.01


# ---- the rows' file


HEADER = {"schema": 1, "weights": "a", "recordings": [{"name": "x"}, {"name": "y"}]}


def two_rows(fault: str) -> list[dict[str, Any]]:
    return [{"fault": fault, "recording": name, "text": "ü\u2028"} for name in "xy"]


def test_a_ledger_is_gone_on_with(tmp_path: Path):
    path = tmp_path / "trials.jsonl"
    ledger = Ledger(path, HEADER)
    ledger.add(two_rows("A"))
    ledger.add(two_rows("B"))
    ledger.close()
    assert Ledger(path, HEADER).rows == {"A": two_rows("A"), "B": two_rows("B")}
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        left = Ledger(path, HEADER)
        assert set(left.rows) == {"A"} if b'"B"' in whole[:cut] else set(left.rows) <= {"A"}
        assert all(own == two_rows(fault) for fault, own in left.rows.items())
        for fault in "AB":
            if fault not in left.rows:
                left.add(two_rows(fault))
        left.close()
        assert path.read_bytes() == whole


def test_a_ledger_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "trials.jsonl"
    first = Ledger(path, HEADER)
    first.add(two_rows("A"))
    first.close()
    kept = path.read_bytes()
    other = {**HEADER, "weights": "b", "schema": 2}
    with pytest.raises(LedgerError, match="measured with other schema, weights"):
        Ledger(path, other)
    assert path.read_bytes() == kept
    damaged = kept.splitlines(keepends=True)
    for line in (b"{]\n", b'"text"\n', b"{}\n"):
        path.write_bytes(damaged[0] + line + damaged[2])
        with pytest.raises(LedgerError, match=r"line 2.*--restart begins anew"):
            Ledger(path, HEADER)
    path.write_bytes(b"[]\n")
    with pytest.raises(LedgerError, match="measured with other"):
        Ledger(path, HEADER)
    assert Ledger(path, other, restart=True).rows == {}


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(tmp_path / "trials.jsonl", HEADER)
    ledger.add(two_rows("A"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LedgerError, match=r"trials\.jsonl cannot be written: No space left"):
            ledger.add(two_rows("B"))
    assert "B" not in ledger.rows
    ledger.close()
    with pytest.raises(LedgerError, match=r"none/trials\.jsonl cannot be written: No such file"):
        Ledger(tmp_path / "none" / "trials.jsonl", HEADER)


# ---- the targets


def test_the_targets_hold_on_a_subset(
    demo_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
):
    """The short form's faults of the encoder, on two recordings."""
    folder = tmp_path_factory.mktemp("subset")
    subset = Bench(demo_checkpoint, bundled()[1:3], folder, on_max=False)
    keys = [key for key in bench.SHORT if FAULTS[key].how != "bridge"]
    rows = [row for key in keys for row in subset.trial(FAULTS[key])]
    shutil.rmtree(folder)  # 740 MB
    targets = findings.findings(rows, {"seed": 0})["targets"]
    for name in ("detected", "first_tap", "cause_right", "cause_wrong"):
        assert targets[name]["met"] is True, targets[name]
    assert targets["detected"]["value"] == 1
    assert targets["first_tap"]["value"] >= 0.95
    assert targets["cause_right"]["value"] >= 0.8
    assert targets["cause_wrong"]["value"] <= 0.02
    assert sum(row["injected"] and row["detected"] for row in rows) > 0.8 * len(rows)


# ---- the command


def command(model_file: Path, out: Path, *more: str) -> list[str]:
    given = [*FILES, "--model", str(model_file), "--out", str(out), "--no-max", "--offline"]
    return [*given, "--faults", FOUR, *more]


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().split("\n")[1:-1]]


@pytest.fixture(scope="module")
def measured(
    model_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    out = tmp_path_factory.mktemp("command")
    report = out / "found.json"
    files = ["--json", str(report), "--markdown", str(out / "found.md"), "--svg", str(out)]
    assert bench.main(command(model_file, out, *files)) == bench.PASSED
    return out, rows_in(out), json.loads(report.read_text())


def test_the_command(measured: tuple[Path, list[dict[str, Any]], dict[str, Any]]):
    out, rows, found = measured
    assert [(r["fault"], r["recording"]) for r in rows] == [
        (fault, Path(file).name) for fault in FOUR.split(",") for file in FILES
    ]
    assert all(row["detected"] for row in rows)
    assert {row["fault"] for row in found["faults"]} == set(FOUR.split(","))
    assert all(row["injected"] for row in rows)
    assert not any(row["unseen"] or row["yardstick"] for row in rows)
    assert all(row["reference_cut_off"] for row in rows)  # 16 tokens at most, and no end
    assert {row["reference_tokens"] for row in rows} == {16}
    about = found["about"]
    assert about["clips"] == {"distinct": 2, "used": 2}
    assert about["recordings"][0]["clips"] == ["demo.flac"]
    assert about["threads"] == torch.get_num_threads()
    assert {"scipy", "torch", "python"} <= about["versions"].keys()
    assert about["recordings"][0]["name"] == "demo.flac"
    assert about["recordings"][0]["seconds"] == pytest.approx(3.8, abs=0.1)
    assert about["seed"] == 0
    assert about["command"].startswith("python -m validation faults ")
    assert about["seconds_of_trials"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert "S07" in (out / "found.md").read_text()
    for plot in bench.PLOTS:
        assert (out / f"{plot}.svg").read_text().startswith("<svg")


def test_findings_again_from_the_json(
    measured: tuple[Path, list[dict[str, Any]], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The same findings, tables and plots, and nothing is measured."""
    out, _, found = measured
    given = ["--from", str(out / "found.json"), "--json", str(tmp_path / "found.json")]
    given += ["--markdown", str(tmp_path / "found.md"), "--svg", str(tmp_path)]
    assert bench.main(given) == bench.PASSED
    assert json.loads((tmp_path / "found.json").read_text()) == found
    for name in ("found.md", *(f"{plot}.svg" for plot in bench.PLOTS)):
        assert (tmp_path / name).read_text() == (out / name).read_text()
    beside = tmp_path / "beside.md"
    given = ["--from", str(out / "found.json"), "--beside", str(out / "found.json")]
    assert bench.main([*given, "--markdown", str(beside)]) == bench.PASSED
    assert "of 4 with a class on both 4 have the same, 0 the next" in beside.read_text()
    capsys.readouterr()
    other = tmp_path / "other.json"
    for text in ("{]", "{}", "[1]"):
        other.write_text(text)
        assert bench.main(["--from", str(other)]) == bench.CANNOT
        assert "holds no findings of this command" in capsys.readouterr().err
    assert bench.main(["--from", str(tmp_path / "none.json")]) == bench.CANNOT
    assert "No such file" in capsys.readouterr().err


def test_a_killed_run_goes_on(
    measured: tuple[Path, list[dict[str, Any]], dict[str, Any]],
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Cut in the midst of the last row: its fault is measured again, and no other."""
    out, rows, _ = measured
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    tried: list[str] = []
    trial = Bench.trial

    def spied(self: Bench, fault: Fault) -> list[dict[str, Any]]:
        tried.append(fault.key)
        return trial(self, fault)

    monkeypatch.setattr(Bench, "trial", spied)
    bench.main(command(model_file, tmp_path))
    assert tried == ["S23"]
    assert without_seconds(rows_in(tmp_path)) == without_seconds(rows)
    bench.main(command(model_file, tmp_path))
    assert tried == ["S23"]


def test_a_missed_target_is_status_1(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A fault that the suite calls by another name than the catalogue."""
    monkeypatch.setitem(FAULTS, "S07", replace(FAULTS["S07"], cause="conv-reversed"))
    report = tmp_path / "found.json"
    given = command(model_file, tmp_path / "out", "--json", str(report))
    assert bench.main([*given[1:], "--faults", "S07"]) == bench.MISSED
    found = json.loads(report.read_text())
    assert findings.missed(found, whole=False) == ["cause_right", "cause_wrong"]
    assert {miss["kind"] for miss in found["misses"]} == {"cause wrong"}


def test_other_code_is_not_mixed_in(
    measured: tuple[Path, list[dict[str, Any]], dict[str, Any]],
    model_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out, _, _ = measured
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(bench, "CODE", (*bench.CODE, "tests/test_bench.py"))
    assert bench.main(command(model_file, tmp_path)) == bench.CANNOT
    assert "was measured with other code: --restart begins anew" in capsys.readouterr().err


def test_the_code_that_rows_depend_on():
    files = {path for pattern in bench.CODE for path in bench.ROOT.glob(pattern)}
    names = {path.relative_to(bench.ROOT).as_posix() for path in files}
    expected = {"validation/faults/stem.py", "validation/trials.py", "encoder/graph.py"}
    assert expected | {"encoder/mojo/attention.mojo"} <= names
    for pattern in bench.NOT_CODE:  # each is of something
        assert list((bench.ROOT / "validation").glob(pattern)), pattern


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (BenchError("it is odd"), "S07: it is odd"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            "S07: /x: No space left on device",
        ),
    ],
    ids=["BenchError", "OSError"],
)
def test_what_fails_says_at_which_fault(
    small: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
):
    def fails(self: Bench, fault: Fault) -> None:
        raise error

    monkeypatch.setattr(Bench, "trial", fails)
    with pytest.raises(BenchError) as raised:
        bench.trial(small, "S07")
    assert str(raised.value) == sentence


def process_of(target: Any, *args: Any) -> tuple[Any, Any]:
    """(a process of its own that runs it, the queue that it answers in)."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=target, args=(*args, results) if args else (3,))
    process.start()
    return process, results


def test_a_process_that_reports_an_error(tmp_path: Path):
    settings = {"model": str(tmp_path / "no-such"), "offline": True, "on_max": False, "threads": 1}
    tasks = multiprocessing.get_context("spawn").Queue()
    process, results = process_of(bench.work, settings, [], tmp_path, tasks)
    with pytest.raises(BenchError, match="no-such"):
        bench.answer(results, [process])
    process.join()
    assert process.exitcode == 0


def test_a_process_that_dies():
    process, results = process_of(os._exit)
    with pytest.raises(BenchError, match="a process ended with status 3; the same command goes on"):
        bench.answer(results, [process])


def test_several_processes_measure_the_same(
    measured: tuple[Path, list[dict[str, Any]], dict[str, Any]], model_file: Path, tmp_path: Path
):
    """Up to the rounding of another number of threads."""
    out, rows, _ = measured
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    (tmp_path / "trials.jsonl").unlink()
    report = tmp_path / "found.json"
    again = ["--jobs", "2", "--json", str(report)]
    assert bench.main(command(model_file, tmp_path, *again)) == bench.PASSED
    about = json.loads(report.read_text())["about"]
    assert about["jobs"] == 2
    assert about["threads"] == max(1, (os.cpu_count() or 1) // 2)
    found = json.loads(report.read_text())["rows"]
    same = ("fault", "recording", "first_tap", "cause", "tokens_identical", "text", "wer")
    expected = {(row["fault"], row["recording"]): row for row in rows}
    assert len(found) == len(rows) == 8
    for row in found:
        right = expected[row["fault"], row["recording"]]
        assert {key: row[key] for key in same} == {key: right[key] for key in same}
        for key in ("relative_l2", "max_abs"):
            assert row["final"][key] == pytest.approx(right["final"][key], rel=1e-3)


def test_other_recordings_are_not_mixed_in(
    measured: tuple[Path, list[dict[str, Any]], dict[str, Any]],
    model_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    out, _, _ = measured
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    kept = (tmp_path / "trials.jsonl").read_bytes()
    other = command(model_file, tmp_path, "--seed", "1")[1:]
    assert bench.main(other) == bench.CANNOT
    said = capsys.readouterr()
    assert said.out == ""
    assert "was measured with other recordings: --restart begins anew" in said.err
    assert len(said.err.splitlines()) == 1
    assert (tmp_path / "trials.jsonl").read_bytes() == kept
    mine = tmp_path / "mine.safetensors"
    mine.write_text("not of this bench")
    (tmp_path / "prepared" / "notes-max.json").write_text("nor this")
    assert bench.main([*other, "--restart"]) == bench.PASSED
    assert mine.read_text() == "not of this bench"
    assert (tmp_path / "prepared" / "notes-max.json").exists()
    assert not (tmp_path / "prepared" / "01-twin.safetensors").exists()
    assert len(rows_in(tmp_path)) == 4
    assert {row["recording"] for row in rows_in(tmp_path)} == {"flite-slt.flac"}


def test_one_run_at_a_time(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with FileLock(tmp_path / "lock"):
        assert bench.main(command(model_file, tmp_path)) == bench.CANNOT
    assert f"another run measures in {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--truth", "x.txt"], "belong to audio files"),
        (["--variants", "2"], "belong to audio files"),
        ([FILES[0], "--variants", "0"], "--variants must be 1 or more"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--json", "no/such/x.json"], "no/such is no folder"),
        (["--markdown", "."], "is a folder"),
        (["--json", "x", "--markdown", "x"], "x is named twice"),
        (["--svg", "no/such"], "no/such is no folder"),
        (["--beside", "x.json"], "--beside goes with --markdown"),
        (["--from", "x.json", FILES[0]], "--from measures nothing"),
        ([FILES[0], "--truth", "pyproject.toml", "--json", "./pyproject.toml"], "named twice"),
        ([FILES[0], "--markdown", f"{SAMPLES}/../samples/demo.flac"], "named twice"),
        (["--svg", ".", "--json", "kl.svg"], "kl.svg is named twice"),
        (["--out", ".", "--json", "trials.jsonl"], "trials.jsonl is named twice"),
    ],
)
def test_usage(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        bench.main(options)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--faults", "S07,nonsense"], "'nonsense' is no fault, expected some of"),
        (["--group", "nonsense"], "'nonsense' is no group, expected one of"),
        (["--faults", "S07", "--group", "bridge"], "none of those faults is of the group bridge"),
        (["no-such.flac"], "no-such.flac: no such file"),
        ([FILES[0], "--truth", "no-such.txt"], "no-such.txt cannot be read"),
        (["--model", "no-such.safetensors"], "no-such.safetensors"),
        (["--out", FILES[0]], FILES[0]),
    ],
)
def test_what_cannot_be_measured(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert bench.main([*options, "--offline"]) == bench.CANNOT
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_encoder_alone_leaves_the_bridge_out(small: Bench, capsys: pytest.CaptureFixture[str]):
    alone = {n: t for n, t in small.checkpoint.tensors.items() if n.startswith("encoder.")}
    checkpoint = replace(small.checkpoint, tensors=alone)
    assert bench.measurable(["S07", "S31"], checkpoint, []) == ["S07"]
    assert "1 faults of the transcript are left out" in capsys.readouterr().err
    with pytest.raises(BenchError, match="has no decoder"):
        bench.measurable(["S31"], checkpoint, [])


def test_variants_are_those_whose_text_ends(
    small: Bench, demo_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    """In the order in which they are made, and none of a decoder that never ends a text."""
    args = bench.build_parser().parse_args([FILES[0], "--variants", "2"])
    with pytest.raises(BenchError, match=r"of 6 variants of demo.flac .* in 0, and 2 are wanted"):
        bench.listened_to(bench.named(args), small.checkpoint, args)
    made = [r.name for r in variants(bench.named(args)[0], 6)]
    looping = made[1]
    monkeypatch.setattr(bench, "comes_to_an_end", lambda _, recording: recording.name != looping)
    found = bench.listened_to(bench.named(args), demo_checkpoint, args)
    assert [r.name for r in found] == [made[0], made[2]]


def test_the_same_words_again_leave_the_bridge_out(
    small: Bench, capsys: pytest.CaptureFixture[str]
):
    """Variants of one recording, end to end, say the same in every window: no loss would show."""
    one, other = Recording("a", noise(5), "x"), Recording("b", noise(6), "y")
    both = ["S07", "S31"]
    assert bench.measurable(both, small.checkpoint, variants(one, 3)) == ["S07"]
    assert "all recordings are of a, the same words" in capsys.readouterr().err
    assert bench.measurable(both, small.checkpoint, [one]) == both
    assert bench.measurable(both, small.checkpoint, [*variants(one, 3), other]) == both


def test_the_short_form_is_of_the_catalogue():
    parser = bench.build_parser()
    assert set(bench.chosen(parser.parse_args(["--short"]))) == set(bench.SHORT)
    stem = bench.chosen(parser.parse_args(["--short", "--group", "stem"]))
    assert stem == [key for key in FAULTS if key in bench.SHORT and FAULTS[key].group == "stem"]
    assert len(stem) == 3
    assert set(bench.SHORT) <= set(FAULTS)
    assert {FAULTS[key].group for key in bench.SHORT} == {f.group for f in FAULTS.values()}
