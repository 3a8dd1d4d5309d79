"""Windows decoded together: where a recording is cut, what is made of the texts, and that it is
what `whisper.transcribe` makes of the same windows as clips."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from conftest import SAMPLES, Pair, sample_rows
from torch import Tensor
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.tokenizer import get_tokenizer

from decoder_bridge.batch import WITHOUT, bounds, difference, transcribe_batched
from decoder_bridge.model import fast_model
from encoder.audio import SAMPLE_RATE, load_audio
from weights import Checkpoint

TOKENIZER = get_tokenizer(multilingual=False)
BEGIN = TOKENIZER.timestamp_begin


# ---------------------------------------------------------------- where it is cut


def spectrogram(frames: int, *pauses: tuple[int, int], noise: float = 0.0) -> Tensor:
    """(80, frames): speech of changing loudness, much less in the pauses (frame, frame)."""
    generator = torch.Generator().manual_seed(1)
    mel = 0.5 + 0.3 * torch.rand(frames, generator=generator)
    for begin, end in pauses:
        mel[begin:end] = -0.8
    return mel.expand(80, -1) + noise * torch.randn(80, frames, generator=generator)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("pauses", "expected"),
    [
        ([(2400, 2440)], 2420),  # the middle of the only one
        ([(2100, 2180), (2700, 2740)], 2140),  # the longest
        ([(2100, 2140), (2700, 2740)], 2720),  # of equal ones the last
        ([(1000, 1300), (2500, 2530)], 2515),  # the last third alone counts
        ([(2300, 2319), (2990, 2998)], 2310),  # 0.2 s or so
        ([(2400, 2900)], 2850),  # beyond a second: half a second before what follows
        ([(2960, 3040)], 3000),  # a pause that goes on: what lies behind 30 s is looked at
        ([(2700, 4000)], 3000),
    ],
)
def test_a_window_ends_in_a_pause(pauses, expected, noise):
    found = bounds(spectrogram(4000, *pauses, noise=noise))
    assert len(found) == 3
    assert found == pytest.approx([0, expected, 4000], abs=2)


def test_without_a_pause_it_ends_at_the_quietest_frame():
    mel = spectrogram(4000, (2600, 2606), (2300, 2310))
    mel[:, 2600:2606] -= 0.2
    _, at, _ = bounds(mel)
    assert 2600 <= at < 2606


@pytest.mark.parametrize("frames", [0, 1, 3000, 3001, 9500])
@pytest.mark.parametrize("mel", [torch.zeros, lambda *shape: torch.rand(*shape)])
def test_windows_cover_every_frame_and_none_is_longer_than_30_seconds(frames, mel):
    """In silence and in noise as well."""
    found = bounds(mel(80, frames))
    assert (found[0], found[-1]) == (0, frames)
    assert all(0 < b - a <= N_FRAMES for a, b in pairwise(found))
    assert all(b - a >= N_FRAMES * 2 // 3 for a, b in pairwise(found[:-1]))


def test_a_level_of_its_own_for_each_window():
    """A soft speaker after a loud one: the pause is not the soft speech."""
    mel = spectrogram(7000, (2500, 2550), (5000, 5040))
    mel[:, 3000:] -= 0.9
    mel[:, 5000:5040] = -1.1
    _, first, second, _ = bounds(mel)
    assert (first, second) == (pytest.approx(2525, abs=2), pytest.approx(5020, abs=2))


@pytest.fixture(scope="module")
def speech() -> tuple[np.ndarray, list[tuple[float, float]]]:
    """The samples one after another, twice, 0.4 s of faint noise between them; and where it lies,
    in seconds."""
    noise = np.random.default_rng(1)
    parts, gaps, at = [], [], 0
    for row in sample_rows() * 2:
        if row["seconds"] > 10:
            continue
        sound = load_audio(SAMPLES / row["file"])
        gap = (1e-4 * noise.standard_normal(int(0.4 * SAMPLE_RATE))).astype(np.float32)
        at += len(sound)
        gaps.append((at / SAMPLE_RATE, (at + len(gap)) / SAMPLE_RATE))
        at += len(gap)
        parts += [sound, gap]
    return np.concatenate(parts), gaps


def cuts_of(audio: np.ndarray) -> list[int]:
    mel = log_mel_spectrogram(audio, 80, padding=N_SAMPLES)
    return bounds(mel[:, :-N_FRAMES])


def test_speech_is_cut_between_sentences(speech):
    audio, gaps = speech
    cuts = cuts_of(audio)
    assert len(cuts) > 3
    for frame in cuts[1:-1]:
        assert any(begin - 0.3 < frame / 100 < end + 0.3 for begin, end in gaps), frame / 100


# ---------------------------------------------------------------- what is made of the texts


class Scripted:
    """In place of a model: `decode` says what `script` answers for each window, which it knows by
    its first frame, and remembers what it was asked."""

    is_multilingual, num_languages = False, 99
    device = torch.device("cpu")
    dims = SimpleNamespace(n_mels=80, n_audio_ctx=1500, n_text_ctx=448)

    def __init__(self, script: Callable[[Tensor, DecodingOptions], DecodingResult]):
        self.script = script
        self.asked: list[tuple[int, DecodingOptions]] = []

    def decode(self, mel: Tensor, options: DecodingOptions) -> Any:
        if mel.ndim == 2:
            return self.script(mel, options)
        self.asked.append((len(mel), options))
        return [self.script(one, options) for one in mel]


def said(tokens: list[int], mel: Tensor, **how: float) -> DecodingResult:
    figures = {"avg_logprob": -0.1, "no_speech_prob": 0.0, "compression_ratio": 1.0, **how}
    return DecodingResult(
        audio_features=mel, language="en", tokens=tokens, temperature=0.0, **figures
    )


def by_stock(script: Callable[..., DecodingResult], audio: np.ndarray, **how: Any) -> dict:
    """`whisper.transcribe`, without the empty list of words that it gives to an empty segment."""
    result = whisper.transcribe(Scripted(script), audio, fp16=False, **how)
    for segment in result["segments"]:
        segment.pop("words", None)
    return result


def stamp(seconds: float) -> int:
    return BEGIN + round(seconds / 0.02)


def words(text: str) -> list[int]:
    return TOKENIZER.encode(" " + text)


NOISE = np.random.default_rng(3).standard_normal(70 * SAMPLE_RATE).astype(np.float32) / 10


def test_a_text_that_ends_early_goes_on_from_its_last_timestamp():
    """As often as it does, in rounds with the windows that are left."""
    length: list[int] = []

    def script(mel: Tensor, options: DecodingOptions) -> DecodingResult:
        frames = int((mel != 0).any(0).sum())
        length.append(frames)
        if frames < 1000:
            return said([stamp(0), *words("last"), stamp(frames / 100)], mel)
        one = [stamp(0), *words("one"), stamp(2)]
        two = [stamp(2), *words("two"), stamp(9)]
        return said([*one, *two, stamp(9), *words("unfinished")], mel)

    model = Scripted(script)
    result = transcribe_batched(model, NOISE, 2, temperature=0.0)
    cuts = cuts_of(NOISE)
    expected, rounds = [], {}
    for start, end in pairwise(cuts):
        seek, rounds[start] = start, 0
        while seek < end:
            rounds[start] += 1
            if end - seek < 1000:
                expected.append((seek / 100, end / 100, " last"))
                break
            expected += [(seek / 100, seek / 100 + 2, " one")]
            expected += [(seek / 100 + 2, seek / 100 + 9, " two")]
            seek += 900
    found = [(s["start"], s["end"], s["text"]) for s in result["segments"]]
    assert [text for *_, text in found] == [text for *_, text in expected]
    np.testing.assert_allclose([f[:2] for f in found], [e[:2] for e in expected], atol=0.011)
    assert [s["id"] for s in result["segments"]] == list(range(len(found)))
    assert sum(n for n, _ in model.asked) == sum(rounds.values()) == len(length)
    assert max(n for n, _ in model.asked) == 2
    assert max(rounds.values()) > 2
    assert "unfinished" not in result["text"]


def test_only_the_windows_that_fail_are_decoded_again():
    """At the next temperature, without beams, on what the encoder gave the first time."""

    def script(mel: Tensor, options: DecodingOptions) -> DecodingResult:
        again = mel.shape == (1500, 384)
        assert again == (options.temperature > 0)
        full = not again and bool((mel[:, -1] != 0).any() or (mel[:, 2300] != 0).any())
        bad = full and options.temperature == 0
        tokens = [stamp(0), *words("again" if again else "first"), stamp(1)]
        return said(tokens, torch.zeros(1500, 384), avg_logprob=-2.0 if bad else -0.1)

    model = Scripted(script)
    result = transcribe_batched(model, NOISE, 8, best_of=None)
    texts = [s["text"] for s in result["segments"]]
    assert [options.temperature for _, options in model.asked] == [0.0, 0.2]
    assert model.asked[0][0] == len(texts)
    assert model.asked[1][0] == texts.count(" again") > 0
    assert " first" in texts


@pytest.mark.parametrize(
    ("figures", "thresholds", "temperatures"),
    [
        ({"avg_logprob": -2.0}, {}, [0, 0.5]),
        ({"compression_ratio": 3.0}, {}, [0, 0.5]),
        ({"compression_ratio": 3.0}, {"compression_ratio_threshold": None}, [0]),
        ({"avg_logprob": -2.0}, {"logprob_threshold": None}, [0]),
        ({"avg_logprob": -2.0, "no_speech_prob": 0.9}, {}, [0]),  # silence
        ({"avg_logprob": -0.5, "no_speech_prob": 0.9}, {}, [0]),
        ({"avg_logprob": -2.0, "no_speech_prob": 0.9}, {"no_speech_threshold": None}, [0, 0.5]),
        ({"compression_ratio": 3.0, "avg_logprob": -2.0, "no_speech_prob": 0.9}, {}, [0]),
    ],
)
def test_thresholds_are_stocks(figures, thresholds, temperatures):
    """What stock's own loop asks for, and the text that it keeps, from the same answers."""

    def script(mel: Tensor, options: DecodingOptions) -> DecodingResult:
        asked.append(options.temperature)
        features = mel if mel.shape == (1500, 384) else torch.zeros(1500, 384)
        return said([stamp(0), *words("yes"), stamp(1)], features, **figures)

    asked: list[float] = []
    audio, how = NOISE[: 5 * SAMPLE_RATE], {"temperature": (0.0, 0.5), **thresholds}
    ours = transcribe_batched(Scripted(script), audio, 4, **how)
    assert asked == temperatures
    asked.clear()
    assert ours == by_stock(script, audio, **how)
    assert asked == temperatures


TEXTS = {
    "closed": [stamp(0), *words("one"), stamp(3)],
    "two": [stamp(0), *words("one"), stamp(3), stamp(4), *words("two"), stamp(5.5)],
    "open": [stamp(0.5), *words("one"), stamp(3), stamp(3), *words("two")],
    "pair": [stamp(0), *words("one"), stamp(3.02), stamp(3.02)],
    "no end": [stamp(0), *words("one")],
    "nothing": [],
    "no times": words("one two"),
    "no words": [stamp(0), stamp(2), stamp(2), *words("one"), stamp(2.5)],
    "a moment": [stamp(1), *words("one"), stamp(1), stamp(1), *words("two"), stamp(2)],
    "late": [stamp(0), *words("one"), stamp(29), stamp(29), *words("two")],
}


@pytest.mark.parametrize("name", TEXTS)
def test_segments_are_stocks(name):
    """The text is said of every window, and of what is left of it, by both."""

    def script(mel: Tensor, options: DecodingOptions) -> DecodingResult:
        return said(TEXTS[name], torch.zeros(1500, 384))

    audio = NOISE[: 8 * SAMPLE_RATE + 77]
    ours = transcribe_batched(Scripted(script), audio, 3, temperature=0.0)
    assert ours == by_stock(script, audio, temperature=0.0)


def test_text_is_printed_in_order_while_others_wait(capsys):
    def script(mel: Tensor, options: DecodingOptions) -> DecodingResult:
        return said([stamp(0), *words("text"), stamp(1)], torch.zeros(1500, 384))

    result = transcribe_batched(Scripted(script), NOISE, 2, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[00:00.000 --> 00:01.000]  text"
    assert len(lines) == len(result["segments"]) == len(cuts_of(NOISE)) - 1
    assert lines == sorted(lines)
    transcribe_batched(Scripted(script), NOISE, 2)
    assert capsys.readouterr() == ("", "")


def test_nothing_is_nothing():
    result = transcribe_batched(Scripted(lambda *_: None), np.zeros(100, np.float32), 2)
    assert result == {"text": "", "segments": [], "language": "en"}


# ---------------------------------------------------------------- what is refused


OTHER: dict[str, Any] = {
    "word_timestamps": True,
    "condition_on_previous_text": True,
    "initial_prompt": "names",
    "carry_initial_prompt": True,
    "clip_timestamps": "0,5",
    "hallucination_silence_threshold": 1.0,
    "prompt": "names",
    "beam_size": 5,
}


@pytest.mark.parametrize("name", OTHER)
def test_options_that_cannot_hold(name):
    assert WITHOUT.keys() < OTHER.keys()
    model = Scripted(lambda *_: None)
    with pytest.raises(ValueError, match=rf"^{name} cannot hold with batch_size: "):
        transcribe_batched(model, NOISE, 2, **{name: OTHER[name]})
    assert not model.asked


def test_a_batch_of_none():
    with pytest.raises(ValueError, match=r"^batch_size is 0, expected 1 or more$"):
        transcribe_batched(Scripted(lambda *_: None), NOISE, 0)


# ---------------------------------------------------------------- the models


@pytest.fixture(scope="module")
def fast(demo_checkpoint: Checkpoint) -> whisper.Whisper:
    return fast_model(demo_checkpoint, "cpu")


def clips(model: whisper.Whisper, audio: np.ndarray) -> dict[str, Any]:
    """`whisper.transcribe` with our windows as its clips, one after the other."""
    inner = cuts_of(audio)[1:-1]
    return whisper.transcribe(
        model,
        audio,
        clip_timestamps=[0.0, *(frame / 100 for frame in inner for _ in range(2))],
        condition_on_previous_text=False,
        temperature=0.0,
        fp16=False,
    )


def transcript(result: dict[str, Any]) -> list[tuple]:
    return [(s["id"], s["seek"], s["start"], s["end"], s["tokens"]) for s in result["segments"]]


@pytest.fixture(scope="module")
def sequential(demo: Pair, speech) -> dict[str, Any]:
    found = clips(demo.stock, speech[0])
    assert len(found["text"].split()) > 20
    return found


@pytest.mark.parametrize(("name", "batch_size"), [("cpu", 3), ("max", 8), ("max-fast", 8)])
def test_a_batch_is_what_stock_says_of_the_same_windows(
    demo, fast, speech, sequential, name, batch_size
):
    model = {"cpu": demo.stock, "max": demo.ours, "max-fast": fast}[name]
    encoded: list[int] = []
    hook = model.encoder.register_forward_hook(lambda _, x, __: encoded.append(len(x[0])))
    try:
        result = transcribe_batched(model, speech[0], batch_size, temperature=0.0)
    finally:
        hook.remove()
    assert transcript(result) == transcript(sequential)
    assert result["text"] == sequential["text"]
    assert encoded[0] == min(batch_size, len(cuts_of(speech[0])) - 1) > 1
    assert difference(model, result, sequential).identical


def test_beams_of_several_windows_are_max_fasts(demo, fast):
    mel = [load_audio(SAMPLES / name) for name in ("demo.flac", "flite-slt.flac")]
    gap = np.zeros(N_SAMPLES - len(mel[0]), np.float32)
    audio = np.concatenate([mel[0], gap, mel[1]])
    ours = transcribe_batched(fast, audio, 2, temperature=0.0, beam_size=2)
    stock = whisper.transcribe(
        demo.stock,
        audio,
        clip_timestamps=[0.0, *(cuts_of(audio)[1] / 100,) * 2],
        condition_on_previous_text=False,
        temperature=0.0,
        beam_size=2,
        fp16=False,
    )
    assert transcript(ours) == transcript(stock)
    assert len(ours["segments"]) >= 2


def test_the_best_of_several_at_a_higher_temperature(demo, speech):
    """Which openai-whisper draws for one window at a time."""
    audio = speech[0][: 35 * SAMPLE_RATE]
    result = transcribe_batched(demo.stock, audio, 4, temperature=0.4, best_of=2)
    assert {s["temperature"] for s in result["segments"]} == {0.4}


# ---------------------------------------------------------------- how far it is from the other


def test_the_difference_in_words_and_tokens(demo):
    def result(*texts: str) -> dict[str, Any]:
        segments = [{"tokens": [stamp(i), *words(t), stamp(9)]} for i, t in enumerate(texts)]
        return {"text": "".join(f" {t}" for t in texts), "segments": segments, "language": "en"}

    same = difference(demo.stock, result("one bird", "red"), result("one", "bird red"))
    assert same.identical
    assert same.words.rate == same.tokens.rate == 0
    other = difference(demo.stock, result("one bird"), result("one tree red green"))
    assert not other.identical
    assert (other.words.substitutions, other.words.deletions) == (1, 2)
    assert (other.tokens.substitutions, other.tokens.deletions, other.tokens.words) == (1, 2, 4)
    assert other.to_json()["tokens"]["rate"] == 0.75
    absent = difference(demo.stock, result("one"), result())
    assert absent.to_json()["words"]["rate"] is None
    assert absent.tokens.insertions == 1
    assert not absent.identical
