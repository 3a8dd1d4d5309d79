"""The stock decoder on our encoder says, token for token, what it says on its own."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import whisper
from conftest import SAMPLES, Pair, first_window, sample_rows

import decoder_bridge
import weights
from decoder_bridge.model import MaxAudioEncoder, bridged_model, stock_model
from encoder.audio import load_audio
from validation.numbers import noise_mel
from weights import Checkpoint, WeightsError


def words(text: str) -> str:
    return text.strip().lower()


def same_segments(ours: dict, stock: dict) -> None:
    """Two results of `transcribe` agree: tokens, times, text; probabilities to 1e-3."""
    assert ours["text"] == stock["text"]
    assert len(ours["segments"]) == len(stock["segments"])
    for a, b in zip(ours["segments"], stock["segments"], strict=True):
        for key in ("tokens", "text", "seek", "start", "end", "temperature"):
            assert a[key] == b[key], key
        assert a["avg_logprob"] == pytest.approx(b["avg_logprob"], abs=1e-3)
        assert a["no_speech_prob"] == pytest.approx(b["no_speech_prob"], abs=1e-3)
        for x, y in zip(a.get("words", []), b.get("words", []), strict=True):
            assert x["word"] == y["word"]
            assert x["start"] == pytest.approx(y["start"], abs=0.02)
            assert x["end"] == pytest.approx(y["end"], abs=0.02)


SINGLE = [row for row in sample_rows() if row["file"] != "lecture.flac"]  # it is in test_long


@pytest.mark.parametrize("row", sample_rows(), ids=lambda r: r["file"])
def test_demo_decodes_every_sample_as_stock_does(demo: Pair, row):
    mel = first_window(SAMPLES / row["file"])[0]
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    ours, stock = demo.ours.decode(mel, options), demo.stock.decode(mel, options)
    assert ours.tokens == stock.tokens
    assert ours.text == stock.text
    assert ours.tokens  # an empty text would agree too


@pytest.mark.parametrize("row", SINGLE, ids=lambda r: r["file"])
def test_demo_transcribes_every_sample_as_stock_does(demo: Pair, row):
    audio = load_audio(SAMPLES / row["file"])
    ours = demo.ours.transcribe(audio, temperature=0.0, fp16=False)
    same_segments(ours, demo.stock.transcribe(audio, temperature=0.0, fp16=False))
    assert ours["text"].strip()


def test_the_bundled_recording_is_heard(demo: Pair):
    """What `make run` prints is the recording's text, but for one word in ten at the most."""
    import jiwer

    row = next(r for r in sample_rows() if r["file"] == "demo.flac")
    heard = demo.ours.transcribe(load_audio(SAMPLES / row["file"]), fp16=False)["text"]
    assert jiwer.wer(words(row["text"]), words(heard)) <= 0.1


@pytest.mark.parametrize(
    "options",
    [{"beam_size": 5}, {"word_timestamps": True}, {"condition_on_previous_text": False}],
    ids=str,
)
def test_demo_with_options(demo: Pair, options):
    audio = load_audio(SAMPLES / "demo.flac")
    ours = demo.ours.transcribe(audio, temperature=0.0, fp16=False, **options)
    same_segments(ours, demo.stock.transcribe(audio, temperature=0.0, fp16=False, **options))


def test_sliding_windows_over_long_audio(demo: Pair):
    """75 s, the sentence three times: three windows and more, each with features of its own."""
    clip = load_audio(SAMPLES / "demo.flac")
    audio = np.zeros(75 * 16_000, np.float32)
    for start in (0, 31, 62):
        audio[start * 16_000 : start * 16_000 + len(clip)] = clip
    seen: list[int] = []
    hook = demo.ours.encoder.register_forward_hook(lambda *_: seen.append(1))
    try:
        ours = demo.ours.transcribe(audio, temperature=0.0, fp16=False)
    finally:
        hook.remove()
    same_segments(ours, demo.stock.transcribe(audio, temperature=0.0, fp16=False))
    assert len(seen) >= 3
    assert ours["segments"][-1]["start"] >= 55


def test_a_batch_is_decoded_as_one(demo: Pair):
    rows = sample_rows()[:3]
    mel = torch.cat([first_window(SAMPLES / r["file"]) for r in rows])
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    ours, stock = demo.ours.decode(mel, options), demo.stock.decode(mel, options)
    assert [r.tokens for r in ours] == [r.tokens for r in stock]
    assert len({r.text for r in ours}) == 3


def test_refitted_tiny_en_hears_real_speech_as_stock_does(refit: Pair, jfk):
    mel = first_window(jfk)[0]
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    ours, stock = refit.ours.decode(mel, options), refit.stock.decode(mel, options)
    assert ours.tokens == stock.tokens
    assert "my fellow americans" in ours.text.lower()


def test_detect_language(demo_checkpoint: Checkpoint, demo_engine):
    """A multilingual model (random decoder, the same encoder) gives the stock probabilities."""
    from dataclasses import replace

    torch.manual_seed(1)
    stock = whisper.Whisper(replace(demo_checkpoint.dims, n_vocab=51865))
    torch.nn.init.normal_(stock.decoder.positional_embedding, std=0.01)
    tensors = {k: t.float() for k, t in demo_checkpoint.encoder_tensors().items()}
    stock.encoder.load_state_dict(tensors)
    mel = first_window(SAMPLES / "demo.flac")
    with torch.no_grad():
        tokens, expected = whisper.detect_language(stock.eval(), mel)
        stock.encoder = MaxAudioEncoder(demo_engine)
        found_tokens, found = whisper.detect_language(stock, mel)
    assert torch.equal(tokens, found_tokens)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize(
    "shape",
    [(1, 80, 2998), (1, 80, 3002), (2, 80, 1500), (1, 79, 3000), (1, 128, 3000), (80, 3000),
     (1, 1, 80, 3000), (3000,)],
    ids=str,
)  # fmt: skip
def test_a_wrong_shape_raises_as_in_the_stock_encoder(demo: Pair, shape):
    mel = torch.zeros(shape)
    with pytest.raises((AssertionError, RuntimeError)) as stock, torch.no_grad():
        demo.stock.encoder(mel)
    with pytest.raises(stock.type):
        demo.ours.encoder(mel)


def test_fp16_is_refused_with_a_sentence(demo: Pair):
    with pytest.raises(RuntimeError, match="fp16=False"):
        demo.ours.decode(noise_mel()[0], whisper.DecodingOptions(language="en"))


def test_only_the_encoder_was_touched(demo: Pair):
    """Class, dims, decoder weights and alignment heads are the stock model's."""
    assert type(demo.ours) is whisper.Whisper
    assert demo.ours.dims == demo.stock.dims
    ours, stock = demo.ours.decoder.state_dict(), demo.stock.decoder.state_dict()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[k], stock[k]) for k in stock)
    assert torch.equal(demo.ours.alignment_heads.to_dense(), demo.stock.alignment_heads.to_dense())
    assert demo.ours.device == torch.device("cpu")
    assert next(demo.ours.encoder.parameters(), None) is None


def test_load_model_takes_what_whisper_takes():
    ours = inspect.signature(decoder_bridge.load_model).parameters
    assert list(inspect.signature(whisper.load_model).parameters) == list(ours)[:4]
    model = decoder_bridge.load_model("demo", device="cpu", offline=True)
    assert isinstance(model.encoder, MaxAudioEncoder)


def test_an_encoder_alone_has_no_text(demo_checkpoint: Checkpoint):
    from dataclasses import replace

    alone = {k: t for k, t in demo_checkpoint.tensors.items() if k.startswith("encoder.")}
    checkpoint = replace(demo_checkpoint, tensors=alone)
    for build in (bridged_model, stock_model):
        with pytest.raises(WeightsError, match="encoder"):
            build(checkpoint)


def test_an_unknown_model_is_one_sentence():
    with pytest.raises(weights.WeightsError, match="no-such"):
        decoder_bridge.load_model("no-such", offline=True)
